;; component
;; Imports an interface that the host does not provide.
(component
  (import "wasi:http/outgoing-handler@0.2.0" (instance (export "handle" (func))))
  (core module $m (func (export "run")))
  (core instance $i (instantiate $m))
  (func $run (canon lift (core func $i "run")))
  (instance $plugin (export "describe" (func $run)) (export "configure" (func $run)))
  (instance $inference (export "begin" (func $run)) (export "resume" (func $run)))
  (export "batchwright:plugin/plugin@0.1.0" (instance $plugin))
  (export "batchwright:plugin/inference@0.1.0" (instance $inference)))
