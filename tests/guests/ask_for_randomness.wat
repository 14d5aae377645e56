;; Asks for a megabyte of randomness at once, which would hold the thread. Exits with 1 when
;; it was given.
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 32)
  (func (export "_start")
    (if (i32.eqz (call $random (i32.const 0) (i32.const 1048576)))
      (then (call $exit (i32.const 1))))))
