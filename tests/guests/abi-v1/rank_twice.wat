;; A ranker that names a candidate twice.
(module
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "[0, 1, 0]")
  (func (export "stockade_rank") (param i32) (result i32)
    (call $reply (i32.const 0) (i32.const 9))))
