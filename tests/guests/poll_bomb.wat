;; Asks for 100 000 timers at once; exits with the error that this gives.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 200)
  (func (export "_start") (local $at i32) (local $left i32)
    (local.set $left (i32.const 100000))
    (loop $more
      (i32.store (i32.add (local.get $at) (i32.const 16)) (i32.const 1))
      (i64.store (i32.add (local.get $at) (i32.const 24)) (i64.const 3600000000000))
      (local.set $at (i32.add (local.get $at) (i32.const 48)))
      (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
    (call $exit (call $poll (i32.const 0) (i32.const 6553600) (i32.const 100000) (i32.const 13000000)))))
