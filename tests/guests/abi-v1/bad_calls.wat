;; Serves calls badly, each in its own way by the last byte of the payload: 0 no reply, 1 a
;; failure after a reply, 2 an endless loop, 3 two replies, 4 a trap.
(module
  (import "stockade:plugin/v1" "message_body_read" (func $body_read (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "ok")
  (func (export "stockade_call") (param i32) (result i32)
    (drop (call $body_read (i32.const 64) (i32.const 1)))
    (if (i32.eq (i32.load8_u (i32.const 64)) (i32.const 0)) (then (return (i32.const 0))))
    (if (i32.eq (i32.load8_u (i32.const 64)) (i32.const 2)) (then (loop $l (br $l))))
    (if (i32.eq (i32.load8_u (i32.const 64)) (i32.const 4)) (then unreachable))
    (drop (call $reply (i32.const 0) (i32.const 2)))
    (if (i32.eq (i32.load8_u (i32.const 64)) (i32.const 1)) (then (return (i32.const 7))))
    (if (i32.ne (call $reply (i32.const 0) (i32.const 1)) (i32.const -7)) (then unreachable))
    (i32.const 0)))
