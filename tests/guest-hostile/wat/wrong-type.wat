;; component
;; Exports the names of the contract with wrong types.
(component
  (core module $m (func (export "run")))
  (core instance $i (instantiate $m))
  (func $run (canon lift (core func $i "run")))
  (instance $plugin (export "describe" (func $run)) (export "configure" (func $run)))
  (instance $inference (export "begin" (func $run)) (export "resume" (func $run)))
  (export "batchwright:plugin/plugin@0.1.0" (instance $plugin))
  (export "batchwright:plugin/inference@0.1.0" (instance $inference)))
