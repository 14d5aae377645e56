;; Waits in poll_oneoff for stdin, prints what it was woken by and ends.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  ;; 0: a subscription to fd_read of descriptor 0, 64: its event, 128: an iovec
  (data (i32.const 8) "\01")
  (data (i32.const 128) "\90\00\00\00\06\00\00\00")
  (data (i32.const 144) "woken\n")
  (func (export "_start")
    (if (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 120)) (then unreachable))
    (if (i32.ne (i32.load8_u (i32.const 74)) (i32.const 1)) (then unreachable))
    (drop (call $fd_write (i32.const 1) (i32.const 128) (i32.const 1) (i32.const 120)))))
