;; A reactor whose timer's handler never returns.
(module
  (import "stockade:plugin/v1" "timer_set" (func $timer_set (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "tick")
  (func (export "stockade_start") (param i32) (result i32)
    (call $timer_set (i32.const 0) (i32.const 4) (i32.const 1) (i32.const 0)))
  (func (export "stockade_timer") (param i32) (result i32)
    (loop $forever (br $forever))
    (i32.const 0)))
