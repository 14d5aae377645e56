;; Asks for 1 GiB before its first instruction.
(module
  (memory (export "memory") 16384)
  (func (export "_start")))
