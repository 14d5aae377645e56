;; Built for a version of the contract that does not exist yet.
(module
  (import "stockade:plugin/v2" "log" (func $log (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")))
