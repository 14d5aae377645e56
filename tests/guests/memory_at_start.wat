;; Declares 32 MiB, so a smaller limit keeps it from starting.
(module
  (memory (export "memory") 512)
  (func (export "_start")))
