;; A reactor that makes a counter and a gauge, and would rank.
(module
  (import "stockade:plugin/v1" "metric_add" (func $metric_add (param i32 i32 f64) (result i32)))
  (import "stockade:plugin/v1" "metric_set" (func $metric_set (param i32 i32 f64) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "seen")
  (data (i32.const 8) "level")
  (func (export "stockade_start") (param i32) (result i32)
    (drop (call $metric_add (i32.const 0) (i32.const 4) (f64.const 2)))
    (call $metric_set (i32.const 8) (i32.const 5) (f64.const 0.5))))
