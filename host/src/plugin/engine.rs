//! The WebAssembly engine that all plugins share, and the clock that ends their calls.

use std::time::Duration;

use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::manifest::{MOST_MEMORY, MOST_TABLE};

/// How often running guests are interrupted to see whether their time is up, and to let others run.
pub const TICK: Duration = Duration::from_millis(10);

/// Instances alive at a time, over all plugins and tenants. A slot that is not in use costs address space alone.
const INSTANCES: u32 = 1000;

/// Core modules, memories and tables in one component: those of other languages' runtimes have a handful.
const PARTS: u32 = 32;

/// Memories in one component; more would let one component take many slots of the pool.
const MEMORIES: u32 = 4;

/// Stack of a guest, in bytes, for every plugin: enough for the runtimes of other languages.
pub const STACK: usize = 512 << 10;

/// What an engine can run. Calls cost a third more where functions may be asynchronous, so only components that need it pay for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    Plain,
    /// Components that import WASI 0.3, whose functions are asynchronous.
    Concurrent,
}

impl Flavour {
    /// What this component needs. The names of imports stand in its bytes as they are; one that is mistaken for such a name costs only speed.
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

/// Builds the engine and starts its ticking thread, which ends with the engine.
pub fn start(flavour: Flavour) -> Result<Engine, String> {
    let engine = Engine::new(&config(flavour, true)).or_else(|error| {
        // Where address space is short (a strict `ulimit -v`), instances are made one by one, which is slower.
        tracing::warn!("plugins run without an instance pool: {error:#}");
        Engine::new(&config(flavour, false))
    });
    let engine =
        engine.map_err(|error| format!("the WebAssembly engine does not start: {error:#}"))?;
    let ticking = engine.weak();
    std::thread::Builder::new()
        .name("epoch".into())
        .spawn(move || {
            while let Some(engine) = ticking.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(TICK);
            }
        })
        .map_err(|error| format!("the thread that ends overlong calls does not start: {error}"))?;
    Ok(engine)
}

/// An engine that only compiles: its code fits the one of `start`.
pub fn compiler(flavour: Flavour) -> Result<Engine, String> {
    Engine::new(&config(flavour, false))
        .map_err(|error| format!("the compiler does not start: {error:#}"))
}

fn config(flavour: Flavour, pooled: bool) -> Config {
    let mut config = Config::new();
    config.concurrency_support(flavour == Flavour::Concurrent);
    config.wasm_component_model(true);
    config.epoch_interruption(true);
    config.max_wasm_stack(STACK);
    config.async_stack_size(1 << 20);
    if pooled {
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool()));
    }
    config
}

fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES)
        .total_core_instances(INSTANCES * 4)
        .total_memories(INSTANCES * 2)
        .total_tables(INSTANCES * 4)
        .total_stacks(INSTANCES)
        .max_core_instances_per_component(PARTS)
        .max_memories_per_component(MEMORIES)
        .max_tables_per_component(PARTS)
        .max_memory_size(usize::try_from(MOST_MEMORY.bytes()).unwrap_or(usize::MAX))
        .table_elements(MOST_TABLE)
        .max_unused_warm_slots(16)
        // What a fresh instance finds already mapped; the rest of its memory is given back after use.
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(64 << 10);
    pool
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_imports_of_wasi_0_3_ask_for_the_slower_engine() {
        for (bytes, flavour) in [
            (&b"..wasi:cli/stdout@0.3.0.."[..], Flavour::Concurrent),
            (
                b"wasi:cli/stdout@0.2.6 wasi:clocks/monotonic-clock@0.3.0-rc-2026-01-01",
                Flavour::Concurrent,
            ),
            (b"wasi:cli/stdout@0.2.3", Flavour::Plain),
            (b"wasi: see batchwright:plugin/logging@0.3.0", Flavour::Plain),
            (b"wasi:", Flavour::Plain),
        ] {
            assert_eq!(Flavour::of(bytes), flavour, "{}", String::from_utf8_lossy(bytes));
        }
    }
}
