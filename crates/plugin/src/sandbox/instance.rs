//! Instance of a component, in a store of its own and with its plugin's limits.
//!
//! **Threat.** The code of a guest is hostile. It loops, sleeps, asks for all memory, recurses,
//! opens handles without end, returns gigabytes, floods the log, or traps. None of this may slow
//! down or stop another plugin, another tenant or the server: it fails the call, and the call fails
//! one request.
//!
//! **Limits of one call.**
//! - *CPU time* (`call_timeout`). The engine's epoch ticks at a fixed interval. At each tick a
//!   running guest yields to other tasks, and `on_tick` counts the ticks that the guest has seen. A
//!   guest that waits for a processor sees one tick for many, so the count is close to CPU time,
//!   and a busy machine does not fail a call.
//! - *Wall clock* ([`in_time`]). A guest that sleeps uses no CPU time, so a deadline bounds the
//!   call, too. Guests and requests share the processors, so the deadline is ten times the CPU time
//!   and a fixed allowance. Time in which the call waits for memory of the host does not count.
//! - *Linear memory* (`memory`), summed over all memories of the store: [`MemoryLimit`]. Within the
//!   limit, growth reserves memory from the pool of all instances before the guest gets it. The
//!   call waits while the pool is empty.
//! - *Tables, handles, stack*. Each has a limit, as each takes memory of the host.
//! - *Output*. Bytes that a guest passes to the host are bounded by `answer`, its log lines by
//!   [`PluginLog`].
//!
//! **Isolation.** An instance belongs to one plugin and one tenant and never serves another. An
//! instance whose call failed is dropped, as its memory may be inconsistent. An instance that has
//! grown much is dropped, too, as linear memory never shrinks. WASI grants nothing: see
//! [`crate::sandbox::wasi`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchwright_memory::{Holder, Reservation};
use tokio::time::Instant;
use wasmtime::{
    Engine, PoolConcurrencyLimitError, ResourceLimiterAsync, Store, StoreContextMut, UpdateDeadline,
};
use wasmtime_wasi::{WasiCtxView, WasiView};

use crate::contract::guest_log::GuestLog;
use crate::contract::world::{self, Exports};
use crate::package::limits::Limits;
use crate::sandbox::engine::{EPOCH_INTERVAL, EngineKind};
use crate::sandbox::instances::{HOST_OVERHEAD_BYTES, Instances};
use crate::sandbox::log::{PluginLog, RecentOutput};
use crate::sandbox::wasi::EmptyWorld;

/// Error of a call that used up its CPU time.
#[derive(Debug, thiserror::Error)]
#[error("out of CPU time")]
pub(crate) struct CpuTimeExceeded;

/// Error of a call that exceeded its deadline on the wall clock, for example because the guest
/// sleeps.
#[derive(Debug, thiserror::Error)]
#[error("deadline exceeded")]
pub(crate) struct DeadlineExceeded;

/// Time on the wall clock that a call gets beyond a multiple of its CPU time. Guests do no I/O, but
/// a language runtime may sleep for a moment.
const WALL_CLOCK_ALLOWANCE: Duration = Duration::from_secs(5);

/// Largest part of its memory limit that an instance may hold to be reused, in percent. The next
/// call needs room, too.
const MAX_REUSE_PERCENT: usize = 75;

/// Memory that a call may need for each byte of its arguments: a parsed value and its copies.
const BYTES_NEEDED_PER_INPUT_BYTE: usize = 6;

/// Largest growth of linear memory for which an instance is reused.
const MAX_REUSE_GROWTH_BYTES: usize = 8 << 20;

/// Longest wait for a slot of wasmtime's pool.
const SLOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Time that calls of an instance have waited for memory of the host. The wait extends the guest's
/// deadline.
#[derive(Default)]
pub(crate) struct MemoryWait(AtomicU64);

impl MemoryWait {
    fn add(&self, since: Instant) {
        let waited = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_add(waited, Ordering::Relaxed);
    }

    pub(crate) fn total(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Awaits `wait` and adds its duration to `waited`. The sum is updated during the wait, so that
/// [`in_time`] sees it.
async fn count_wait(waited: &MemoryWait, wait: impl Future<Output = ()>) {
    const UPDATE_INTERVAL: Duration = Duration::from_secs(1);
    let mut wait = std::pin::pin!(wait);
    loop {
        let since = Instant::now();
        let done = tokio::time::timeout(UPDATE_INTERVAL, &mut wait).await.is_ok();
        waited.add(since);
        if done {
            return;
        }
    }
}

/// Runs a call with a deadline on the wall clock, derived from its CPU time. The time in which the
/// call waits for memory extends the deadline.
///
/// An instance whose call fails with [`DeadlineExceeded`] must not be used again.
pub(crate) async fn in_time<T>(
    limits: &Limits,
    units: u32,
    waited: &MemoryWait,
    call: impl Future<Output = wasmtime::Result<T>>,
) -> wasmtime::Result<T> {
    // Other guests and requests share the processors, so a call takes many times its CPU time.
    let timeout = limits
        .call_timeout
        .duration()
        .saturating_mul(units.max(1))
        .saturating_mul(10)
        .saturating_add(WALL_CLOCK_ALLOWANCE);
    let begun = Instant::now();
    let waited_before = waited.total();
    let mut call = std::pin::pin!(call);
    loop {
        let excused = waited.total().saturating_sub(waited_before);
        let left = timeout.saturating_add(excused).saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(wasmtime::Error::new(DeadlineExceeded));
        }
        if let Ok(done) = tokio::time::timeout(left, &mut call).await {
            return done;
        }
    }
}

/// State of the host in the store of an instance.
pub(crate) struct State {
    memory: MemoryLimit,
    /// Epoch ticks that the running call has left.
    ticks_left: u32,
    /// WASI context, created when the guest first uses it.
    wasi: Option<Box<EmptyWorld>>,
    log: Arc<PluginLog>,
    /// Last lines that the guest wrote.
    output: RecentOutput,
}

/// Limit of linear memory, summed over all memories of a store. `wasmtime::StoreLimits` limits each
/// memory on its own.
pub(crate) struct MemoryLimit {
    limit: usize,
    used: usize,
    reservation: Reservation,
    instances: Arc<Instances>,
    waited: Arc<MemoryWait>,
    table_elements: usize,
    /// Last refusal. A refusal is no error by itself, but a guest mostly traps after it.
    refused: Option<Refused>,
}

/// Resource that a guest asked for beyond its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Linear memory.
    Memory,
    /// Elements of a table.
    Table,
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        self.instances.metrics.remove_live();
    }
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
        let held = HOST_OVERHEAD_BYTES.saturating_add(used);
        if !self.reservation.try_grow_to(held) {
            count_wait(&self.waited, self.instances.grow_to(&mut self.reservation, held)).await;
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
        let wasi =
            self.wasi.get_or_insert_with(|| Box::new(EmptyWorld::new(&self.log, &self.output)));
        WasiCtxView { ctx: &mut wasi.ctx, table: &mut wasi.table }
    }
}

impl GuestLog for State {
    fn write(&mut self, level: tracing::Level, message: String) {
        self.output.add(&message);
        self.log.write(level, &message);
    }
}

/// Creates the linker with all imports that plugins may have: WASI as an empty world, and the log.
pub(crate) fn linker(
    engine: &Engine,
    engine_kind: EngineKind,
) -> wasmtime::Result<wasmtime::component::Linker<State>> {
    let mut linker = wasmtime::component::Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    if engine_kind == EngineKind::Concurrent {
        wasmtime_wasi::p3::add_to_linker(&mut linker)?;
    }
    world::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// Linked component, from which instances are created.
pub(crate) type Template = world::Template<State>;

/// Instance of a component, for one plugin and tenant.
pub(crate) struct Instance {
    /// Store that holds the guest and the host's state for it.
    pub store: Store<State>,
    /// Functions of the guest.
    pub exports: Exports,
    /// Number of calls after `configure`.
    pub calls: u32,
    /// Time that calls have waited for memory.
    pub waited: Arc<MemoryWait>,
    /// Linear memory after `configure`, in bytes.
    pub configured_memory: usize,
    /// Last lines that the guest wrote.
    pub output: RecentOutput,
}

impl Instance {
    /// Creates an instance. Waits for memory and for a slot of wasmtime's pool. The guest's start
    /// code has the limits of one call.
    ///
    /// Returns the guest's last refusal and output beside the result, to explain an error.
    pub(crate) async fn new(
        template: &Template,
        engine: &Engine,
        limits: &Limits,
        log: &Arc<PluginLog>,
        place: (&Arc<Instances>, &Holder),
    ) -> (wasmtime::Result<Self>, (Option<Refused>, RecentOutput)) {
        let begun = Instant::now();
        loop {
            let (created, refused) = Self::try_new(template, engine, limits, log, place).await;
            let is_full =
                created.as_ref().is_err_and(|error| error.is::<PoolConcurrencyLimitError>());
            if !is_full || begun.elapsed() > SLOT_TIMEOUT {
                return (created, refused);
            }
            place.0.wait_for_slot().await;
        }
    }

    async fn try_new(
        template: &Template,
        engine: &Engine,
        limits: &Limits,
        log: &Arc<PluginLog>,
        (instances, holder): (&Arc<Instances>, &Holder),
    ) -> (wasmtime::Result<Self>, (Option<Refused>, RecentOutput)) {
        let table_elements = limits.max_table_elements.get() as usize;
        let waited = Arc::new(MemoryWait::default());
        let reservation = instances.reservation(holder).await;
        instances.metrics.add_live();
        let memory = MemoryLimit {
            limit: limits.max_memory.in_memory(),
            used: 0,
            reservation,
            instances: instances.clone(),
            waited: waited.clone(),
            table_elements,
            refused: None,
        };
        let output = RecentOutput::default();
        let state =
            State { memory, ticks_left: 0, wasi: None, log: log.clone(), output: output.clone() };
        let mut store = Store::new(engine, state);
        store.limiter_async(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.max_output.in_memory());
        store.set_max_component_handles(limits.max_handles.get() as usize);
        store.epoch_deadline_callback(on_tick);
        grant_cpu_time(&mut store, limits, 1);
        let exports = in_time(limits, 1, &waited, template.instantiate(&mut store)).await;
        let refused = store.data().memory.refused;
        (
            exports.map(|exports| Self {
                store,
                exports,
                calls: 0,
                waited,
                configured_memory: 0,
                output: output.clone(),
            }),
            (refused, output),
        )
    }

    /// Grants the next call its CPU time: `units` times `call_timeout`.
    pub(crate) fn allow(&mut self, limits: &Limits, units: u32) {
        self.calls = self.calls.saturating_add(1);
        grant_cpu_time(&mut self.store, limits, units);
    }

    /// Returns true if a large call has grown the instance so much that it is not worth reusing:
    /// linear memory never shrinks.
    pub(crate) fn is_bloated(&self) -> bool {
        let has_grown = self.memory() > self.configured_memory;
        self.memory() > self.configured_memory.saturating_add(MAX_REUSE_GROWTH_BYTES)
            || has_grown && self.memory() > self.limit() / 100 * MAX_REUSE_PERCENT
    }

    /// Returns true if a call with this many bytes of arguments may exceed the memory limit in this
    /// instance but not in a new one.
    pub(crate) fn lacks_memory_for(&self, bytes: usize) -> bool {
        let left = self.limit().saturating_sub(self.memory());
        self.memory() > self.configured_memory
            && bytes.saturating_mul(BYTES_NEEDED_PER_INPUT_BYTE) > left
    }

    fn limit(&self) -> usize {
        self.store.data().memory.limit
    }

    /// Returns the linear memory of the instance, in bytes.
    pub(crate) fn memory(&self) -> usize {
        self.store.data().memory.used
    }

    /// Returns the guest's last refusal in the running call.
    pub(crate) fn refused(&self) -> Option<Refused> {
        self.store.data().memory.refused
    }
}

fn grant_cpu_time(store: &mut Store<State>, limits: &Limits, units: u32) {
    let ticks = limits.call_timeout.duration().as_millis().div_ceil(EPOCH_INTERVAL.as_millis());
    // One more, as the first tick may come immediately.
    let ticks =
        u32::try_from(ticks).unwrap_or(u32::MAX).saturating_mul(units.max(1)).saturating_add(1);
    let state = store.data_mut();
    state.ticks_left = ticks;
    state.memory.refused = None;
    store.set_epoch_deadline(1);
}

/// Counts the epoch ticks that a guest sees while it runs, and ends the call when none is left.
///
/// A thread that does not run sees one tick for many, so the count is close to CPU time. The guest
/// yields at each tick, so a long call delays others by one tick.
fn on_tick(mut store: StoreContextMut<State>) -> wasmtime::Result<UpdateDeadline> {
    let state = store.data_mut();
    match state.ticks_left.checked_sub(1) {
        Some(left) => {
            state.ticks_left = left;
            Ok(UpdateDeadline::Yield(1))
        }
        None => Err(wasmtime::Error::new(CpuTimeExceeded)),
    }
}
