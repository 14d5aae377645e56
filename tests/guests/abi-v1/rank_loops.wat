;; A ranker that never returns.
(module
  (memory (export "memory") 1)
  (func (export "stockade_rank") (param i32) (result i32)
    (loop $forever (br $forever))
    (i32.const 0)))
