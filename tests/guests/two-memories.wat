;; Would split what it takes over two memories.
(module
  (memory $a (export "memory") 1)
  (memory $b 1)
  (func (export "_start")))
