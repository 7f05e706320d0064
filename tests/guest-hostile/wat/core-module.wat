;; module
;; No component at all.
(module (func (export "run")))
