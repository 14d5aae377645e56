;; A WASI 0.2 command that appends to the file `hog` of its first directory until that is refused: by
;; a stream that it asks for room, by one that it does not, and by the file itself. Succeeds when each
;; refusal says that there is no space left.
(component
  (import "wasi:io/error@0.2.0" (instance $errors
    (export "error" (type (sub resource)))))
  (alias export $errors "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $output-stream (sub resource)))
    (alias outer 1 $error (type $outer-error))
    (export "error" (type $e (eq $outer-error)))
    (type $stream-error' (variant (case "last-operation-failed" (own $e)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error')))
    (export "[method]output-stream.check-write"
      (func (param "self" (borrow $output-stream)) (result (result u64 (error $stream-error)))))
    (export "[method]output-stream.write"
      (func (param "self" (borrow $output-stream)) (param "contents" (list u8))
        (result (result (error $stream-error)))))
    (export "[method]output-stream.blocking-flush"
      (func (param "self" (borrow $output-stream)) (result (result (error $stream-error)))))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output-stream)) (param "contents" (list u8))
        (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $stream))
  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $descriptor (sub resource)))
    (alias outer 1 $stream (type $outer-stream))
    (export "output-stream" (type $output-stream (eq $outer-stream)))
    (alias outer 1 $error (type $outer-error))
    (export "error" (type $e (eq $outer-error)))
    (type $path-flags' (flags "symlink-follow"))
    (export "path-flags" (type $path-flags (eq $path-flags')))
    (type $open-flags' (flags "create" "directory" "exclusive" "truncate"))
    (export "open-flags" (type $open-flags (eq $open-flags')))
    (type $descriptor-flags' (flags "read" "write" "file-integrity-sync" "data-integrity-sync"
      "requested-write-sync" "mutate-directory"))
    (export "descriptor-flags" (type $descriptor-flags (eq $descriptor-flags')))
    (type $error-code' (enum "access" "would-block" "already" "bad-descriptor" "busy" "deadlock"
      "quota" "exist" "file-too-large" "illegal-byte-sequence" "in-progress" "interrupted"
      "invalid" "io" "is-directory" "loop" "too-many-links" "message-size" "name-too-long"
      "no-device" "no-entry" "no-lock" "insufficient-memory" "insufficient-space" "not-directory"
      "not-empty" "not-recoverable" "unsupported" "no-tty" "no-such-device" "overflow"
      "not-permitted" "pipe" "read-only" "invalid-seek" "text-file-busy" "cross-device"))
    (export "error-code" (type $error-code (eq $error-code')))
    (export "[method]descriptor.open-at"
      (func (param "self" (borrow $descriptor)) (param "path-flags" $path-flags)
        (param "path" string) (param "open-flags" $open-flags) (param "flags" $descriptor-flags)
        (result (result (own $descriptor) (error $error-code)))))
    (export "[method]descriptor.append-via-stream"
      (func (param "self" (borrow $descriptor))
        (result (result (own $output-stream) (error $error-code)))))
    (export "[method]descriptor.write"
      (func (param "self" (borrow $descriptor)) (param "buffer" (list u8)) (param "offset" u64)
        (result (result u64 (error $error-code)))))
    (export "filesystem-error-code"
      (func (param "err" (borrow $e)) (result (option $error-code))))))
  (alias export $types "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $outer))
    (export "descriptor" (type $d (eq $outer)))
    (export "get-directories" (func (result (list (tuple (own $d) string)))))))
  (core module $memory
    (memory (export "memory") 1)
    (data (i32.const 16) "hog")
    (global $free (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
      (global.set $free (i32.add (local.get $at) (local.get 3)))
      (local.get $at)))
  (core instance $memory (instantiate $memory))
  (alias core export $memory "memory" (core memory $bytes))
  (alias core export $memory "realloc" (core func $realloc))
  (core func $get-directories
    (canon lower (func $preopens "get-directories") (memory $bytes) (realloc $realloc)))
  (core func $open-at (canon lower (func $types "[method]descriptor.open-at") (memory $bytes)))
  (core func $append
    (canon lower (func $types "[method]descriptor.append-via-stream") (memory $bytes)))
  (core func $write-at (canon lower (func $types "[method]descriptor.write") (memory $bytes)))
  (core func $code (canon lower (func $types "filesystem-error-code") (memory $bytes)))
  (core func $check (canon lower (func $streams "[method]output-stream.check-write") (memory $bytes)))
  (core func $write (canon lower (func $streams "[method]output-stream.write") (memory $bytes)))
  (core func $flush
    (canon lower (func $streams "[method]output-stream.blocking-flush") (memory $bytes)))
  (core func $write-all
    (canon lower (func $streams "[method]output-stream.blocking-write-and-flush") (memory $bytes)))
  (core module $program
    (import "host" "get-directories" (func $get-directories (param i32)))
    (import "host" "open-at" (func $open-at (param i32 i32 i32 i32 i32 i32 i32)))
    (import "host" "append" (func $append (param i32 i32)))
    (import "host" "write-at" (func $write-at (param i32 i32 i32 i64 i32)))
    (import "host" "code" (func $code (param i32 i32)))
    (import "host" "check" (func $check (param i32 i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (import "host" "flush" (func $flush (param i32 i32)))
    (import "host" "write-all" (func $write-all (param i32 i32 i32 i32)))
    (import "memory" "memory" (memory 1))
    ;; Whether a stream's error, which lies there, is the one of a full disk.
    (func $is-full (param $error i32) (result i32)
      (if (i32.load8_u (local.get $error)) (then (return (i32.const 0))))
      (call $code (i32.load offset=4 (local.get $error)) (i32.const 192))
      (i32.and (i32.load8_u (i32.const 192)) (i32.eq (i32.load8_u (i32.const 193)) (i32.const 23))))
    (func (export "run") (result i32) (local $file i32) (local $stream i32) (local $length i32)
      (local $error i32)
      (call $get-directories (i32.const 64))
      (call $open-at (i32.load (i32.load (i32.const 64))) (i32.const 0) (i32.const 16) (i32.const 3)
        (i32.const 1) (i32.const 2) (i32.const 128))
      (if (i32.load8_u (i32.const 128)) (then (return (i32.const 1))))
      (local.set $file (i32.load (i32.const 132)))
      (call $append (local.get $file) (i32.const 136))
      (if (i32.load8_u (i32.const 136)) (then (return (i32.const 1))))
      (local.set $stream (i32.load (i32.const 140)))
      ;; Where the look at the room says it, and where waiting for the room does.
      (local.set $error (i32.const 152))
      (block $refused
        (loop $more
          (call $check (local.get $stream) (i32.const 144))
          (br_if $refused (i32.load8_u (i32.const 144)))
          (local.set $length (i32.wrap_i64 (i64.load (i32.const 152))))
          (if (i32.gt_u (local.get $length) (i32.const 32768))
            (then (local.set $length (i32.const 32768))))
          (if (local.get $length)
            (then (call $write (local.get $stream) (i32.const 4096) (local.get $length) (i32.const 160)))
            (else (call $flush (local.get $stream) (i32.const 160))))
          (br_if $more (i32.eqz (i32.load8_u (i32.const 160)))))
        (local.set $error (i32.const 164)))
      (if (i32.eqz (call $is-full (local.get $error))) (then (return (i32.const 1))))
      (call $append (local.get $file) (i32.const 136))
      (call $write-all (i32.load (i32.const 140)) (i32.const 4096) (i32.const 4096) (i32.const 160))
      (if (i32.eqz (i32.load8_u (i32.const 160))) (then (return (i32.const 1))))
      (if (i32.eqz (call $is-full (i32.const 164))) (then (return (i32.const 1))))
      (call $write-at (local.get $file) (i32.const 4096) (i32.const 4096) (i64.const 0) (i32.const 208))
      (if (i32.eqz (i32.load8_u (i32.const 208))) (then (return (i32.const 1))))
      (i32.ne (i32.load8_u (i32.const 216)) (i32.const 23))))
  (core instance $program (instantiate $program
    (with "host" (instance
      (export "get-directories" (func $get-directories)) (export "open-at" (func $open-at))
      (export "append" (func $append)) (export "write-at" (func $write-at))
      (export "code" (func $code)) (export "check" (func $check)) (export "write" (func $write))
      (export "flush" (func $flush)) (export "write-all" (func $write-all))))
    (with "memory" (instance $memory))))
  (func $run (result (result)) (canon lift (core func $program "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
