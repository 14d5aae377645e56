;; Loops before it is even instantiated.
(module
  (memory (export "memory") 1)
  (func $loop (loop $forever (br $forever)))
  (start $loop)
  (func (export "_start")))
