;; A ranker that replies after 0.4 seconds.
(module
  (import "stockade:plugin/v1" "clock_ms" (func $clock_ms (result i64)))
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "[]")
  (func (export "stockade_rank") (param i32) (result i32)
    (local $end i64)
    (local.set $end (i64.add (call $clock_ms) (i64.const 400)))
    (loop $wait (br_if $wait (i64.lt_s (call $clock_ms) (local.get $end))))
    (call $reply (i32.const 0) (i32.const 2))))
