;; Not a core module.
(component)
