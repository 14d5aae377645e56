;; Imports a function that version 1 does not have.
(module
  (import "stockade:plugin/v1" "read_minds" (func (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")))
