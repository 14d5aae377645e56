;; Tries every low descriptor as a directory to reach a file outside; exits with 1 if it can.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "../../../../../../etc/passwd")
  (func (export "_start") (local $fd i32)
    (loop $next
      (if (i32.eqz (call $prestat (local.get $fd) (i32.const 0))) (then (call $exit (i32.const 1))))
      (if (i32.eqz (call $open (local.get $fd) (i32.const 0) (i32.const 64) (i32.const 28)
            (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 0)))
        (then (call $exit (i32.const 1))))
      (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $fd) (i32.const 64))))))
