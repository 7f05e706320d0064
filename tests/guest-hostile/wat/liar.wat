;; world: adapter
;; Forges lines of `plugin inspect` with line breaks and escapes in its summary.
(module
  (memory (export "memory") 1)
  ;; Result of `describe`: name, version, summary, endpoints, credentials, schema (offset, length).
  (data (i32.const 16) "\00\04\00\00\07\00\00\00\07\04\00\00\05\00\00\00\0c\04\00\00\2f\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\3b\04\00\00\02\00\00\00")
  (data (i32.const 1024) "hostile0.0.1harmless\0aimports    nothing\0asha256     0000\1b[8m{}")
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) i32.const 32768)
  (func (export "batchwright:plugin/plugin@0.1.0#describe") (result i32) i32.const 16)
  (func (export "batchwright:plugin/plugin@0.1.0#configure") (param i32 i32) (result i32) i32.const 64)
  (func (export "batchwright:plugin/inference@0.1.0#begin") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64 i32) (result i32) unreachable)
  (func (export "batchwright:plugin/inference@0.1.0#resume") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable))
