;; world: adapter
;; Grows its table without end in `begin`.
(module
  (memory (export "memory") 1)
  (table $table 1 funcref)
  ;; Result of `describe`: name, version, summary, endpoints, credentials, schema (offset, length).
  (data (i32.const 16) "\00\01\00\00\07\00\00\00\07\01\00\00\05\00\00\00\0c\01\00\00\09\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\15\01\00\00\02\00\00\00")
  (data (i32.const 256) "hostile0.0.1From wat/{}")
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 4096)
  (func (export "batchwright:plugin/plugin@0.1.0#describe") (result i32) i32.const 16)
  (func (export "batchwright:plugin/plugin@0.1.0#configure") (param i32 i32) (result i32) i32.const 64)
  (func (export "batchwright:plugin/inference@0.1.0#begin") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64 i32) (result i32) (loop $again (br_if $again (i32.ne (table.grow $table (ref.null func) (i32.const 1000)) (i32.const -1)))) unreachable)
  (func (export "batchwright:plugin/inference@0.1.0#resume") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable))
