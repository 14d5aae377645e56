;; A plugin that needs no toolchain: prints one line and ends. Preview 1, text format.
(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param $fd i32) (param $iovs i32) (param $count i32) (param $written i32) (result i32)))
  (memory (export "memory") 1)

  ;; one iovec, { address, length }, and the text it points to
  (data (i32.const 0) "\08\00\00\00" "\15\00\00\00" "Hello from hello.wat\n")

  (func (export "_start")
    (drop (call $fd_write
      (i32.const 1)      ;; stdout
      (i32.const 0)      ;; the iovec
      (i32.const 1)      ;; just one
      (i32.const 64))))) ;; where the number of bytes written goes: after the text
