;; Grows three memories in turn, each until that is refused.
(component
  (core module $hog
    (memory 1)
    (func (export "grow")
      (loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))))
  (core instance $a (instantiate $hog))
  (core instance $b (instantiate $hog))
  (core instance $c (instantiate $hog))
  (core module $program
    (import "a" "grow" (func $a))
    (import "b" "grow" (func $b))
    (import "c" "grow" (func $c))
    (func (export "run") (result i32) (call $a) (call $b) (call $c) (i32.const 0)))
  (core instance $program (instantiate $program
    (with "a" (instance $a)) (with "b" (instance $b)) (with "c" (instance $c))))
  (func $run (result (result)) (canon lift (core func $program "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
