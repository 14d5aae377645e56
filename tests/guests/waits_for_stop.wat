;; Reads its input until it ends, which is how a plugin learns that it shall stop.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\20\00\00\00\06\00\00\00")
  (data (i32.const 8) "\30\00\00\00\08\00\00\00")
  (data (i32.const 16) "\80\00\00\00\10\00\00\00")
  (data (i32.const 32) "ready\0a")
  (data (i32.const 48) "goodbye\0a")
  (func (export "_start")
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 24)))
    (if (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24)) (then unreachable))
    ;; Nothing was read: the input is at its end.
    (if (i32.load (i32.const 24)) (then unreachable))
    (drop (call $fd_write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 24)))))
