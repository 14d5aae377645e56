;; Imports something that no command gets.
(component
  (import "wasi:http/outgoing-handler@0.2.0" (instance $http (export "handle" (func))))
  (core module $program (func (export "run") (result i32) (i32.const 0)))
  (core instance $program (instantiate $program))
  (func $run (result (result)) (canon lift (core func $program "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
