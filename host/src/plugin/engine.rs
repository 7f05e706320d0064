//! The WebAssembly engine that all plugins share, and the clock that ends their calls.

use std::time::Duration;

use wasmtime::{Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::manifest::MOST_MEMORY;

/// How often running guests are interrupted to see whether their time is up, and to let others run.
pub const TICK: Duration = Duration::from_millis(10);

/// Instances alive at a time, over all plugins and tenants. A slot that is not in use costs address space alone.
const INSTANCES: u32 = 1000;

/// Core modules, memories and tables in one component: those of other languages' runtimes have a handful.
const PARTS: u32 = 32;

/// Builds the engine and starts its ticking thread, which ends with the engine.
pub fn start() -> Result<Engine, String> {
    let engine = Engine::new(&config(true)).or_else(|error| {
        // Where address space is short (a strict `ulimit -v`), instances are made one by one, which is slower.
        tracing::warn!("plugins run without an instance pool: {error:#}");
        Engine::new(&config(false))
    });
    let engine = engine.map_err(|error| format!("the WebAssembly engine does not start: {error:#}"))?;
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

fn config(pooled: bool) -> Config {
    let mut config = Config::new();
    config.wasm_component_model(true);
    config.epoch_interruption(true);
    config.max_wasm_stack(512 << 10);
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
        .max_memories_per_component(PARTS)
        .max_tables_per_component(PARTS)
        .max_memory_size(usize::try_from(MOST_MEMORY.bytes()).unwrap_or(usize::MAX))
        .table_elements(100_000)
        .max_unused_warm_slots(16)
        // What a fresh instance finds already mapped; the rest of its memory is given back after use.
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(64 << 10);
    pool
}
