;; Writes lines of 64 bytes, a thousand a call, as fast as it can for ever.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "\00\04\00\00\00\fa\00\00")
  (func (export "_start")
    (local $at i32)
    (memory.fill (i32.const 1024) (i32.const 120) (i32.const 64000))
    (local.set $at (i32.const 1087))
    (loop $lines
      (i32.store8 (local.get $at) (i32.const 10))
      (local.set $at (i32.add (local.get $at) (i32.const 64)))
      (br_if $lines (i32.lt_u (local.get $at) (i32.const 65024))))
    (loop $again
      (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
      (br $again))))
