//! Sandbox: one call of a guest, bounded in CPU time, memory, output, handles and stack.
//!
//! `engine` configures wasmtime, `instance` is one sandbox, `instances` bounds the memory of all of
//! them, `wasi` is the empty world that a component may import, and `log` bounds what guests log.

pub(crate) mod cpu_shares;
pub(crate) mod engine;
pub(crate) mod instance;
pub(crate) mod instances;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod wasi;
