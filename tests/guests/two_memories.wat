;; Needs a proposal that is off: a limit per memory would be two limits.
(module
  (memory (export "memory") 1)
  (memory 1)
  (func (export "_start")))
