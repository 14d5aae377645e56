;; Prints its arguments on stdout and its environment on stderr, each string as it lies in
;; memory: ended by a zero byte.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  ;; 0: count, 4: size, 8: an iovec, 16: written, 1024: pointers, 65536: strings
  (func $print (param $fd i32)
    (i32.store (i32.const 8) (i32.const 65536))
    (i32.store (i32.const 12) (i32.load (i32.const 4)))
    (if (call $fd_write (local.get $fd) (i32.const 8) (i32.const 1) (i32.const 16))
      (then unreachable)))
  (func (export "_start")
    (if (call $args_sizes (i32.const 0) (i32.const 4)) (then unreachable))
    (if (call $args (i32.const 1024) (i32.const 65536)) (then unreachable))
    (call $print (i32.const 1))
    (if (call $environ_sizes (i32.const 0) (i32.const 4)) (then unreachable))
    (if (call $environ (i32.const 1024) (i32.const 65536)) (then unreachable))
    (call $print (i32.const 2))))
