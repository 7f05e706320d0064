;; module
;; Core module instead of a component.
(module (func (export "run")))
