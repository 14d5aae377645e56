;; Makes a symbolic link out of its first directory; exits with the error that this gives.
(module
  (import "wasi_snapshot_preview1" "path_symlink" (func $link (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "../../../../../../etc/passwd")
  (data (i32.const 64) "note")
  (func (export "_start")
    (call $exit (call $link (i32.const 0) (i32.const 28) (i32.const 3) (i32.const 64) (i32.const 4)))))
