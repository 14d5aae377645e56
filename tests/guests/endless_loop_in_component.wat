;; A WASI 0.2 command that never ends.
(component
  (core module $program (func (export "run") (result i32) (loop $forever (br $forever)) (i32.const 0)))
  (core instance $program (instantiate $program))
  (func $run (result (result)) (canon lift (core func $program "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
