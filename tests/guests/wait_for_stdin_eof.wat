;; Reads stdin to its end, then says goodbye. Exits with 9 when stdin had bytes.
(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\20\00\00\00\08\00\00\00")
  (data (i32.const 64) "\50\00\00\00\04\00\00\00")
  (data (i32.const 80) "bye\n")
  (func (export "_start")
    (if (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)) (then unreachable))
    (if (i32.load (i32.const 16)) (then (call $exit (i32.const 9))))
    (drop (call $fd_write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 16)))))
