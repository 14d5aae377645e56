;; Traps, as abort() and a Rust panic do.
(module
  (memory (export "memory") 1)
  (func (export "_start") unreachable))
