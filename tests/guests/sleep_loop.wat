;; Prints "tick" and sleeps for 20 ms, for ever.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  ;; 0: a subscription to the monotonic clock, 64: its event, 128: an iovec
  (data (i32.const 16) "\01\00\00\00")
  (data (i32.const 24) "\00\2d\31\01\00\00\00\00")
  (data (i32.const 128) "\90\00\00\00\05\00\00\00")
  (data (i32.const 144) "tick\n")
  (func (export "_start")
    (loop $again
      (drop (call $fd_write (i32.const 1) (i32.const 128) (i32.const 1) (i32.const 120)))
      (if (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 120)) (then unreachable))
      (br $again))))
