;; world: adapter
;; Declares a credential in the header `host`, which the host sets.
(module
  (memory (export "memory") 1)
  ;; Result of `describe`: name, version, summary, endpoints, credentials, schema (offset, length).
  (data (i32.const 16) "\00\04\00\00\07\00\00\00\07\04\00\00\05\00\00\00\0c\04\00\00\09\00\00\00\00\00\00\00\00\00\00\00\80\00\00\00\01\00\00\00\15\04\00\00\02\00\00\00")
  (data (i32.const 128) "\17\04\00\00\03\00\00\00\1a\04\00\00\04\00\00\00\1e\04\00\00\11\00\00\00\01\00\00\00")
  (data (i32.const 1024) "hostile0.0.1From wat/{}keyhostinternal.example/")
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 32768)
  (func (export "batchwright:plugin/plugin@0.1.0#describe") (result i32) i32.const 16)
  (func (export "batchwright:plugin/plugin@0.1.0#configure") (param i32 i32) (result i32) i32.const 64)
  (func (export "batchwright:plugin/inference@0.1.0#begin") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64 i32) (result i32) unreachable)
  (func (export "batchwright:plugin/inference@0.1.0#resume") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable))
