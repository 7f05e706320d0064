//! WebAssembly engine that all plugins share, and the epoch clock that interrupts their calls.

use std::time::Duration;

use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::package::limits::{MAX_MEMORY, MAX_TABLE_ELEMENTS};

/// Interval of the epoch interrupts. At each interrupt a running guest is checked for its CPU time
/// and yields to other tasks.
pub(crate) const EPOCH_INTERVAL: Duration = Duration::from_millis(10);

/// Instances alive at a time, over all plugins and tenants. An unused slot costs only address
/// space.
const MAX_INSTANCES: u32 = 1000;

/// Core instances, and likewise tables, of one component. Components with a language runtime have a
/// handful.
const MAX_CORE_PARTS_PER_COMPONENT: u32 = 32;

/// Memories of one component. A higher limit lets one component occupy many slots of the pool.
const MAX_MEMORIES_PER_COMPONENT: u32 = 4;

/// Call stack of a guest, in bytes. The size suffices for language runtimes.
pub(crate) const GUEST_STACK_BYTES: usize = 512 << 10;

/// Kind of engine. A call costs a third more in an engine with asynchronous functions, so only
/// components that need such functions run in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Engine of components without asynchronous functions.
    Plain,
    /// Engine of components that import WASI 0.3, whose functions are asynchronous.
    Concurrent,
}

impl EngineKind {
    /// Returns the kind of engine that a component needs.
    ///
    /// Names of imports occur verbatim in the bytes of a component. A false match costs only speed.
    pub fn of(component: &[u8]) -> Self {
        let concurrent = memchr::memmem::find_iter(component, b"wasi:").any(|at| {
            let name = component.get(at..).unwrap_or_default();
            let of_name =
                |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b':' | b'/');
            let end = name.iter().take(100).position(|byte| !of_name(byte)).unwrap_or_default();
            name.get(end..).is_some_and(|rest| rest.starts_with(b"@0.3."))
        });
        if concurrent { Self::Concurrent } else { Self::Plain }
    }
}

/// Builds an engine and starts its epoch thread, which ends with the engine.
pub(crate) fn start(engine_kind: EngineKind) -> Result<Engine, String> {
    let engine = Engine::new(&config(engine_kind, true)).or_else(|error| {
        // Without enough address space for the pool (a strict `ulimit -v`), each instance is
        // allocated on demand, which is slower.
        tracing::warn!(
            error = format_args!("{error:#}"),
            "instance pool unavailable, plugins run without it"
        );
        Engine::new(&config(engine_kind, false))
    });
    let engine =
        engine.map_err(|error| format!("the WebAssembly engine does not start: {error:#}"))?;
    let weak = engine.weak();
    std::thread::Builder::new()
        .name("epoch".into())
        .spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(EPOCH_INTERVAL);
            }
        })
        .map_err(|error| {
            format!("the thread that enforces call_timeout does not start: {error}")
        })?;
    Ok(engine)
}

/// Builds an engine that only compiles. The compiled code runs in the engine of [`start`].
pub(crate) fn compiler(engine_kind: EngineKind) -> Result<Engine, String> {
    Engine::new(&config(engine_kind, false))
        .map_err(|error| format!("the compiler does not start: {error:#}"))
}

fn config(engine_kind: EngineKind, pooled: bool) -> Config {
    let mut config = Config::new();
    config.concurrency_support(engine_kind == EngineKind::Concurrent);
    config.wasm_component_model(true);
    config.epoch_interruption(true);
    config.max_wasm_stack(GUEST_STACK_BYTES);
    config.async_stack_size(1 << 20);
    if pooled {
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool()));
    }
    config
}

fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * 4)
        .total_memories(MAX_INSTANCES * 2)
        .total_tables(MAX_INSTANCES * 4)
        .total_stacks(MAX_INSTANCES)
        .max_core_instances_per_component(MAX_CORE_PARTS_PER_COMPONENT)
        .max_memories_per_component(MAX_MEMORIES_PER_COMPONENT)
        .max_tables_per_component(MAX_CORE_PARTS_PER_COMPONENT)
        .max_memory_size(usize::try_from(MAX_MEMORY.bytes()).unwrap_or(usize::MAX))
        .table_elements(MAX_TABLE_ELEMENTS)
        .max_unused_warm_slots(16)
        // Memory that stays mapped for the next instance of a slot. The rest is released to the
        // system after use.
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(64 << 10);
    pool
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_kind_is_concurrent_only_for_imports_of_wasi_0_3() {
        for (bytes, engine_kind) in [
            (&b"..wasi:cli/stdout@0.3.0.."[..], EngineKind::Concurrent),
            (
                b"wasi:cli/stdout@0.2.6 wasi:clocks/monotonic-clock@0.3.0-rc-2026-01-01",
                EngineKind::Concurrent,
            ),
            (b"wasi:cli/stdout@0.2.3", EngineKind::Plain),
            (b"wasi: see batchwright:plugin/logging@0.3.0", EngineKind::Plain),
            (b"wasi:", EngineKind::Plain),
        ] {
            assert_eq!(EngineKind::of(bytes), engine_kind, "{}", String::from_utf8_lossy(bytes));
        }
    }
}
