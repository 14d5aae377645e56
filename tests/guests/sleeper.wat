;; Sleeps an hour at a time and never looks whether it shall stop.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 1040) (i32.const 1))
    (i64.store (i32.const 1048) (i64.const 3600000000000))
    (loop $again
      (if (call $poll (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 24)) (then unreachable))
      (br $again))))
