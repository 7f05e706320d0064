//! One sandbox: an instance of a component in a store of its own, held to its plugin's limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use wasmtime::component::{HasSelf, InstancePre};
use wasmtime::{
    Engine, PoolConcurrencyLimitError, ResourceLimiterAsync, Store, StoreContextMut, UpdateDeadline,
};
use wasmtime_wasi::{WasiCtxView, WasiView};

use super::bindings::v0_1::{self, Exports, logging};
use super::engine::{Flavour, TICK};
use super::instances::{Instances, OVERHEAD};
use super::log::{PluginLog, Said};
use super::manifest::Limits;
use super::wasi::EmptyWorld;
use crate::memory::{Holder, Share};

/// The CPU time of the running call is used up.
#[derive(Debug, thiserror::Error)]
#[error("out of CPU time")]
pub struct OutOfTime;

/// The running call waits, for a clock of its own say, and does not come back.
#[derive(Debug, thiserror::Error)]
#[error("asleep")]
pub struct Asleep;

/// What a call may wait beyond its CPU time. Guests do no I/O and have nothing to wait for, but a language's runtime has clocks.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most of its limit of memory that an instance holds and is still kept, as a share in percent: the next call needs room, too.
const MAX_KEPT_PERCENT: usize = 75;

/// Memory that a call may need for each byte that it is given: a parsed value and its copies.
const NEEDED_PER_BYTE: usize = 6;

/// What the linear memory of an instance may grow by and the instance is still kept, in bytes.
const KEPT_GROWTH: usize = 8 << 20;

/// How long a slot of wasmtime's pool is waited for.
const SLOT_TIMEOUT: Duration = Duration::from_secs(300);

/// How long calls of an instance have waited for memory: that is not the guest's fault.
#[derive(Default)]
pub struct Waited(AtomicU64);

impl Waited {
    fn add(&self, since: Instant) {
        let waited = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_add(waited, Ordering::Relaxed);
    }

    fn so_far(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Counts a wait while it goes on, so that whoever looks meanwhile sees it.
async fn counted(waited: &Waited, wait: impl Future<Output = ()>) {
    const LOOK: Duration = Duration::from_secs(1);
    let mut wait = std::pin::pin!(wait);
    loop {
        let since = Instant::now();
        let done = tokio::time::timeout(LOOK, &mut wait).await.is_ok();
        waited.add(since);
        if done {
            return;
        }
    }
}

/// Runs a call within the time on the clock that its CPU time leaves it. An instance whose call is given up must not be used again.
pub async fn in_time<T>(
    limits: &Limits,
    units: u32,
    waited: &Waited,
    call: impl Future<Output = wasmtime::Result<T>>,
) -> wasmtime::Result<T> {
    // Other guests and requests take turns with this one, so its time on the clock is many times that on the processor.
    let most = limits
        .call_timeout
        .duration()
        .saturating_mul(units.max(1))
        .saturating_mul(10)
        .saturating_add(PATIENCE);
    let begun = Instant::now();
    let before = waited.so_far();
    let mut call = std::pin::pin!(call);
    loop {
        let excused = waited.so_far().saturating_sub(before);
        let left = most.saturating_add(excused).saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(wasmtime::Error::new(Asleep));
        }
        if let Ok(done) = tokio::time::timeout(left, &mut call).await {
            return done;
        }
    }
}

/// What a store knows besides the guest.
pub struct State {
    memory: MemoryLimit,
    /// Ticks that the running call may still see.
    ticks_left: u32,
    world: Option<Box<EmptyWorld>>,
    log: Arc<PluginLog>,
    /// What the guest wrote last.
    said: Said,
}

/// Linear memory over all memories of a store: `wasmtime::StoreLimits` counts each alone.
pub struct MemoryLimit {
    limit: usize,
    used: usize,
    share: Share,
    instances: Arc<Instances>,
    waited: Arc<Waited>,
    table_elements: usize,
    /// What the guest was refused last; what it does then is its own affair, mostly a trap.
    refused: Option<Refused>,
}

/// What a guest asked for and did not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Memory,
    Table,
}

#[async_trait::async_trait]
impl ResourceLimiterAsync for MemoryLimit {
    async fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let used = self.used.saturating_add(desired.saturating_sub(current));
        if used > self.limit {
            self.refused = Some(Refused::Memory);
            return Ok(false);
        }
        let held = OVERHEAD.saturating_add(used);
        if !self.share.try_cover(held) {
            counted(&self.waited, self.instances.cover(&mut self.share, held)).await;
        }
        self.used = used;
        Ok(true)
    }

    async fn table_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if desired > self.table_elements {
            self.refused = Some(Refused::Table);
            return Ok(false);
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        64
    }

    fn tables(&self) -> usize {
        64
    }

    fn memories(&self) -> usize {
        32
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let world =
            self.world.get_or_insert_with(|| Box::new(EmptyWorld::new(&self.log, &self.said)));
        WasiCtxView { ctx: &mut world.ctx, table: &mut world.table }
    }
}

impl logging::Host for State {
    fn log(&mut self, level: logging::Level, message: String) {
        let level = match level {
            logging::Level::Error => tracing::Level::ERROR,
            logging::Level::Warn => tracing::Level::WARN,
            logging::Level::Info => tracing::Level::INFO,
            logging::Level::Debug => tracing::Level::DEBUG,
        };
        self.said.add(&message);
        self.log.write(level, &message);
    }
}

/// What plugins may import: WASI as an empty world, and the log.
pub fn linker(
    engine: &Engine,
    flavour: Flavour,
) -> wasmtime::Result<wasmtime::component::Linker<State>> {
    let mut linker = wasmtime::component::Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    if flavour == Flavour::Concurrent {
        wasmtime_wasi::p3::add_to_linker(&mut linker)?;
    }
    logging::add_to_linker::<State, HasSelf<State>>(&mut linker, |state| state)?;
    Ok(linker)
}

/// How instances of one component are made.
pub enum Template {
    Validator(v0_1::validator::ValidatorPre<State>),
    Adapter {
        linked: InstancePre<State>,
        adapter: v0_1::adapter::AdapterIndices,
        classifier: Option<v0_1::classifier::ClassifierIndices>,
    },
}

pub struct Instance {
    pub store: Store<State>,
    pub exports: Exports,
    pub calls: u32,
    pub waited: Arc<Waited>,
    /// Linear memory it had when it was configured, in bytes.
    pub at_first: usize,
    /// What the guest wrote last.
    pub said: Said,
}

impl Instance {
    /// Makes a sandbox. It waits for memory and for a slot of wasmtime's pool; its start code runs within the time of one call.
    pub async fn new(
        template: &Template,
        engine: &Engine,
        limits: &Limits,
        log: &Arc<PluginLog>,
        place: (&Arc<Instances>, &Holder),
    ) -> (wasmtime::Result<Self>, (Option<Refused>, Said)) {
        let begun = Instant::now();
        loop {
            let (made, refused) = Self::make(template, engine, limits, log, place).await;
            let full = made.as_ref().is_err_and(|error| error.is::<PoolConcurrencyLimitError>());
            if !full || begun.elapsed() > SLOT_TIMEOUT {
                return (made, refused);
            }
            place.0.wait_for_slot().await;
        }
    }

    async fn make(
        template: &Template,
        engine: &Engine,
        limits: &Limits,
        log: &Arc<PluginLog>,
        (instances, holder): (&Arc<Instances>, &Holder),
    ) -> (wasmtime::Result<Self>, (Option<Refused>, Said)) {
        let table_elements = limits.table_elements.get() as usize;
        let waited = Arc::new(Waited::default());
        let memory = MemoryLimit {
            limit: limits.memory.in_memory(),
            used: 0,
            share: instances.share(holder).await,
            instances: instances.clone(),
            waited: waited.clone(),
            table_elements,
            refused: None,
        };
        let said = Said::default();
        let state =
            State { memory, ticks_left: 0, world: None, log: log.clone(), said: said.clone() };
        let mut store = Store::new(engine, state);
        store.limiter_async(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.answer.in_memory());
        store.set_max_component_handles(limits.handles.get() as usize);
        store.epoch_deadline_callback(on_tick);
        allow(&mut store, limits, 1);
        let exports = match template {
            Template::Validator(pre) => {
                in_time(limits, 1, &waited, pre.instantiate_async(&mut store))
                    .await
                    .map(Exports::Validator)
            }
            Template::Adapter { linked, adapter, classifier } => {
                in_time(limits, 1, &waited, linked.instantiate_async(&mut store)).await.and_then(
                    |instance| {
                        let exports = adapter.load(&mut store, &instance)?;
                        let classifier = classifier
                            .as_ref()
                            .map(|known| known.load(&mut store, &instance))
                            .transpose()?;
                        Ok(Exports::Adapter(exports, classifier))
                    },
                )
            }
        };
        let refused = store.data().memory.refused;
        (
            exports.map(|exports| Self {
                store,
                exports,
                calls: 0,
                waited,
                at_first: 0,
                said: said.clone(),
            }),
            (refused, said),
        )
    }

    /// Grants the next call its CPU time, `units` times that of one call.
    pub fn allow(&mut self, limits: &Limits, units: u32) {
        self.calls = self.calls.saturating_add(1);
        allow(&mut self.store, limits, units);
    }

    /// Whether one large call has made it hold much more than it needs for others: linear memory never shrinks.
    pub fn is_bloated(&self) -> bool {
        let has_grown = self.memory() > self.at_first;
        self.memory() > self.at_first.saturating_add(KEPT_GROWTH)
            || has_grown && self.memory() > self.limit() / 100 * MAX_KEPT_PERCENT
    }

    /// Whether a call with so many bytes may run out of memory here though it would not on a new instance.
    pub fn is_too_full_for(&self, bytes: usize) -> bool {
        let left = self.limit().saturating_sub(self.memory());
        self.memory() > self.at_first && bytes.saturating_mul(NEEDED_PER_BYTE) > left
    }

    fn limit(&self) -> usize {
        self.store.data().memory.limit
    }

    /// Linear memory it holds, in bytes.
    pub fn memory(&self) -> usize {
        self.store.data().memory.used
    }

    /// What the guest was refused, if it ever was.
    pub fn refused(&self) -> Option<Refused> {
        self.store.data().memory.refused
    }
}

fn allow(store: &mut Store<State>, limits: &Limits, units: u32) {
    let ticks = limits.call_timeout.duration().as_millis().div_ceil(TICK.as_millis());
    // One tick more: the first may come at once.
    let ticks =
        u32::try_from(ticks).unwrap_or(u32::MAX).saturating_mul(units.max(1)).saturating_add(1);
    let state = store.data_mut();
    state.ticks_left = ticks;
    state.memory.refused = None;
    store.set_epoch_deadline(1);
}

/// Counts the ticks that a guest sees while it runs. A thread that does not run sees one tick for many, so this is near CPU time.
/// The guest yields at each, so that a long call delays others by a tick at the most.
fn on_tick(mut store: StoreContextMut<State>) -> wasmtime::Result<UpdateDeadline> {
    let state = store.data_mut();
    match state.ticks_left.checked_sub(1) {
        Some(left) => {
            state.ticks_left = left;
            Ok(UpdateDeadline::Yield(1))
        }
        None => Err(wasmtime::Error::new(OutOfTime)),
    }
}
