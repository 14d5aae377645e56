;; Writes 2 MiB from one buffer to the file `big` of its first directory and reads them into one of
;; 3 MiB, in as many calls as that takes; exits with an error, with 101 when a call has changed the
;; list of buffers, and with 102 when something else came back.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_pread"
    (func $read (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 66)
  (data (i32.const 64) "big")
  (func $check (param $error i32)
    (if (local.get $error) (then (call $exit (local.get $error)))))
  (func $describe (param $buffer i32) (param $length i32)
    ;; An empty buffer first, which a call passes over.
    (i32.store (i32.const 0) (i32.const 0))
    (i32.store (i32.const 4) (i32.const 0))
    (i32.store (i32.const 8) (local.get $buffer))
    (i32.store (i32.const 12) (local.get $length)))
  (func $is_described (param $buffer i32) (param $length i32)
    (if (i32.or
          (i32.ne (i32.load (i32.const 8)) (local.get $buffer))
          (i32.ne (i32.load (i32.const 12)) (local.get $length)))
      (then (call $exit (i32.const 101)))))
  (func (export "_start") (local $file i32) (local $done i32) (local $left i32)
    (memory.fill (i32.const 65536) (i32.const 7) (i32.const 0x200000))
    (call $check (call $open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 3)
      (i32.const 9) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 128)))
    (local.set $file (i32.load (i32.const 128)))
    (loop $more
      (local.set $left (i32.sub (i32.const 0x200000) (local.get $done)))
      (call $describe (i32.add (i32.const 65536) (local.get $done)) (local.get $left))
      (call $check (call $write (local.get $file) (i32.const 0) (i32.const 2) (i32.const 132)))
      (call $is_described (i32.add (i32.const 65536) (local.get $done)) (local.get $left))
      (local.set $done (i32.add (local.get $done) (i32.load (i32.const 132))))
      (br_if $more (i32.lt_u (local.get $done) (i32.const 0x200000))))
    (memory.fill (i32.const 65536) (i32.const 0) (i32.const 0x300000))
    (local.set $done (i32.const 0))
    (loop $more
      (local.set $left (i32.sub (i32.const 0x300000) (local.get $done)))
      (call $describe (i32.add (i32.const 65536) (local.get $done)) (local.get $left))
      (call $check (call $read (local.get $file) (i32.const 0) (i32.const 2)
        (i64.extend_i32_u (local.get $done)) (i32.const 132)))
      (call $is_described (i32.add (i32.const 65536) (local.get $done)) (local.get $left))
      (local.set $done (i32.add (local.get $done) (i32.load (i32.const 132))))
      (br_if $more (i32.load (i32.const 132))))
    (if (i32.ne (local.get $done) (i32.const 0x200000)) (then (call $exit (i32.const 102))))
    (loop $all
      (local.set $done (i32.sub (local.get $done) (i32.const 8)))
      (if (i64.ne (i64.load offset=65536 (local.get $done)) (i64.const 0x0707070707070707))
        (then (call $exit (i32.const 102))))
      (br_if $all (local.get $done)))))
