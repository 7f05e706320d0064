;; component
;; Exports a contract version that the host does not support.
(component
  (core module $m (func (export "run")))
  (core instance $i (instantiate $m))
  (func $run (canon lift (core func $i "run")))
  (instance $e (export "begin" (func $run)))
  (export "batchwright:plugin/plugin@0.2.0" (instance $e))
  (export "batchwright:plugin/inference@0.2.0" (instance $e)))
