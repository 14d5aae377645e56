;; Writes the file `note` of its first directory; exits with the error that this gives.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "\00\01\00\00\05\00\00\00")
  (data (i32.const 64) "note")
  (data (i32.const 256) "note\n")
  (func (export "_start") (local $error i32)
    (local.set $error (call $open (i32.const 3) (i32.const 1) (i32.const 64) (i32.const 4)
      (i32.const 9) (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 128)))
    (if (local.get $error) (then (call $exit (local.get $error))))
    (call $exit (call $write (i32.load (i32.const 128)) (i32.const 0) (i32.const 1) (i32.const 132)))))
