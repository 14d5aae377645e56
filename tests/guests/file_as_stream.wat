;; Closes its output and opens a file, to have it under the output's number, and puts a file in
;; its input's place; exits with 1 when either works.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_renumber" (func $renumber (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "note")
  (func (export "_start")
    (drop (call $close (i32.const 1)))
    (drop (call $open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 4)
      (i32.const 1) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 128)))
    (if (i32.lt_u (i32.load (i32.const 128)) (i32.const 3)) (then (call $exit (i32.const 1))))
    (if (i32.eqz (call $renumber (i32.load (i32.const 128)) (i32.const 0))) (then (call $exit (i32.const 1))))
    (call $exit (i32.const 0))))
