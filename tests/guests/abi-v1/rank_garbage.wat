;; A ranker that replies with no JSON.
(module
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "not json")
  (func (export "stockade_rank") (param i32) (result i32)
    (call $reply (i32.const 0) (i32.const 8))))
