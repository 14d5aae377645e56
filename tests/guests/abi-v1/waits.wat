;; A command: waits for messages and tells each, until it is told to end. Replies to calls with
;; the message itself.
(module
  (import "stockade:plugin/v1" "log" (func $log (param i32 i32 i32) (result i32)))
  (import "stockade:plugin/v1" "next_message" (func $next_message (param i32) (result i32)))
  (import "stockade:plugin/v1" "message_read" (func $message_read (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 4)
  (data (i32.const 0) "nothing yet")
  (func (export "_start")
    (local $length i32)
    (if (i32.eqz (call $next_message (i32.const 1)))
      (then (drop (call $log (i32.const 2) (i32.const 0) (i32.const 11)))))
    (loop $again
      (local.set $length (call $next_message (i32.const -1)))
      (drop (call $message_read (i32.const 4096) (local.get $length)))
      (drop (call $log (i32.const 2) (i32.const 4096) (local.get $length)))
      ;; {"kind":"c...
      (if (i32.eq (i32.load8_u (i32.const 4105)) (i32.const 99))
        (then (drop (call $reply (i32.const 4096) (local.get $length)))))
      ;; {"kind":"sh...
      (br_if $again (i32.ne (i32.load8_u (i32.const 4106)) (i32.const 104))))))
