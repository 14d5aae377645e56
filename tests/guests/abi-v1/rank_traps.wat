;; A ranker that traps.
(module
  (memory (export "memory") 1)
  (func (export "stockade_rank") (param i32) (result i32) unreachable))
