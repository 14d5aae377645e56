;; A reactor that does what a call asks: the first byte of the payload names the function, the rest is
;; what it is given. The reply is a sign, + or -, and the answer.
(module
  (import "stockade:plugin/v1" "cache_stats" (func $cache_stats (result i32)))
  (import "stockade:plugin/v1" "cache_keys" (func $cache_keys (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "cache_request" (func $cache_request (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "state_get" (func $state_get (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "state_set" (func $state_set (param i32 i32 i32 i32) (result i32)))
  (import "stockade:plugin/v1" "answer_length" (func $answer_length (result i32)))
  (import "stockade:plugin/v1" "answer_read" (func $answer_read (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "message_body_read" (func $body_read (param i32 i32) (result i32)))
  (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
  (memory (export "memory") 20)
  (data (i32.const 0) "counter")
  (func $do (param $what i32) (param $length i32) (result i32)
    ;; k: cache_keys
    (if (i32.eq (local.get $what) (i32.const 107))
      (then (return (call $cache_keys (i32.const 1025) (local.get $length)))))
    ;; r: cache_request
    (if (i32.eq (local.get $what) (i32.const 114))
      (then (return (call $cache_request (i32.const 1025) (local.get $length)))))
    ;; w: state_set of "counter"
    (if (i32.eq (local.get $what) (i32.const 119))
      (then (return (call $state_set (i32.const 0) (i32.const 7) (i32.const 1025) (local.get $length)))))
    ;; g: state_get of "counter"
    (if (i32.eq (local.get $what) (i32.const 103))
      (then (return (call $state_get (i32.const 0) (i32.const 7)))))
    ;; s: cache_stats
    (call $cache_stats))
  (func (export "stockade_call") (param i32) (result i32)
    (local $length i32) (local $outcome i32)
    (local.set $length (call $body_read (i32.const 1024) (i32.const 65536)))
    (local.set $outcome (call $do (i32.load8_u (i32.const 1024)) (i32.sub (local.get $length) (i32.const 1))))
    (i32.store8 (i32.const 131072) (select (i32.const 45) (i32.const 43) (i32.lt_s (local.get $outcome) (i32.const 0))))
    (local.set $length (call $answer_read (i32.const 131073) (call $answer_length)))
    (drop (call $reply (i32.const 131072) (i32.add (local.get $length) (i32.const 1))))
    (i32.const 0)))
