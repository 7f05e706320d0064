//! Memory of all plugins' instances, with eviction of idle ones.
//!
//! **Threat.** A thousand plugins or tenants each keep an idle instance, a guest grows to its
//! memory limit and stays there, or a component declares as many memories and tables as it can. The
//! next tenant's call then finds no slot in wasmtime's pool and no memory.
//!
//! **Layers.**
//! - Every instance reserves its linear memory, and the host's overhead for it, from the memory
//!   pool `instances`. A guest that grows waits inside its call until the pool has room.
//! - An instance that needs room evicts idle instances, the least recently used one first.
//! - While an instance waits for room, no other instance is pooled after its call.
//! - An instance that was idle for a minute is dropped.
//! - A slot of wasmtime's pool is waited for in the same way, so calls wait instead of failing when
//!   all slots are in use.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use batchwright_memory::{Holder, Pool, Reservation};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::sandbox::cpu_shares::CpuShares;
use crate::sandbox::instance::Instance;
use crate::sandbox::metrics::SandboxMetrics;

/// Memory of the host for one instance, beside linear memory: store, tables, stack of its calls.
pub(crate) const HOST_OVERHEAD_BYTES: usize = 128 << 10;

/// Time after which an idle instance is dropped.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of the search for instances that are idle for too long.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// Interval in which a waiting call tries again to evict an idle instance.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Registry of the idle instances of all plugins, with the memory pool of all instances.
pub(crate) struct Instances {
    /// Shares of CPU time.
    pub(crate) cpu: Arc<CpuShares>,
    pub(crate) metrics: SandboxMetrics,
    memory: Pool,
    idle: Mutex<Vec<Weak<IdleInstances>>>,
    /// Notified whenever a call ends and its instance becomes idle or is dropped.
    call_ended: Notify,
}

/// Idle instances of one plugin and tenant, ordered by last use; the most recently used is last.
pub(crate) struct IdleInstances(Mutex<Vec<(Instant, Instance)>>);

impl Instances {
    /// Creates the registry and starts the task that drops instances after [`IDLE_TIMEOUT`]. The
    /// task ends with the registry.
    pub(crate) fn start(memory: Pool, metrics: SandboxMetrics) -> Arc<Self> {
        let instances = Arc::new(Self {
            cpu: CpuShares::new(),
            metrics,
            memory,
            idle: Mutex::default(),
            call_ended: Notify::new(),
        });
        let weak = Arc::downgrade(&instances);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                let Some(instances) = weak.upgrade() else { return };
                while instances.evict(IDLE_TIMEOUT) {}
            }
        });
        instances
    }

    /// Creates and registers an empty list of idle instances.
    pub(crate) fn idle_list(&self) -> Arc<IdleInstances> {
        let list = Arc::new(IdleInstances(Mutex::default()));
        let mut lists = self.lock();
        lists.retain(|known| known.strong_count() > 0);
        lists.push(Arc::downgrade(&list));
        list
    }

    /// Reserves memory for a new instance: [`HOST_OVERHEAD_BYTES`]. Waits until the pool has room.
    pub(crate) async fn reservation(&self, holder: &Holder) -> Reservation {
        let mut reservation = self.memory.reservation(holder);
        self.grow_to(&mut reservation, HOST_OVERHEAD_BYTES).await;
        reservation
    }

    /// Grows a reservation to `bytes`. Evicts idle instances, and waits, until the pool has room.
    pub(crate) async fn grow_to(&self, reservation: &mut Reservation, bytes: usize) {
        while !reservation.try_grow_to(bytes) {
            if self.evict(Duration::ZERO) {
                continue;
            }
            let mut waiting = std::pin::pin!(reservation.grow_to(bytes));
            loop {
                tokio::select! {
                    () = &mut waiting => return,
                    // An instance may have become idle just before the pool knew of this waiter.
                    () = tokio::time::sleep(POLL_INTERVAL) => drop(self.evict(Duration::ZERO)),
                }
            }
        }
    }

    /// Releases an instance into the list for the next call, or drops it if another instance waits
    /// for memory.
    pub(crate) fn release(&self, list: &IdleInstances, instance: Instance) {
        if self.memory.is_short() {
            drop(instance);
        } else {
            list.lock().push((Instant::now(), instance));
        }
        self.call_ended.notify_one();
    }

    /// Frees a slot of wasmtime's pool by eviction, or waits until a call may have freed one. The
    /// caller tries again.
    pub(crate) async fn wait_for_slot(&self) {
        if !self.evict(Duration::ZERO) {
            tokio::time::timeout(POLL_INTERVAL, self.call_ended.notified()).await.ok();
        }
    }

    /// Drops the least recently used idle instance of all lists. Returns false if no instance is
    /// idle for `min_idle`.
    fn evict(&self, min_idle: Duration) -> bool {
        let lists: Vec<Arc<IdleInstances>> = self.lock().iter().filter_map(Weak::upgrade).collect();
        let oldest = lists
            .iter()
            .filter_map(|list| Some((list.lock().first()?.0, list)))
            .min_by_key(|(at, _)| *at);
        let Some((since, list)) = oldest.filter(|(since, _)| since.elapsed() >= min_idle) else {
            return false;
        };
        let mut idle = list.lock();
        // A call may have taken the instance in the meantime.
        if idle.first().is_some_and(|(at, _)| *at == since) {
            let evicted = idle.remove(0);
            drop(idle);
            drop(evicted);
            self.metrics.evicted();
        }
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<IdleInstances>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IdleInstances {
    /// Removes and returns the most recently used instance.
    pub(crate) fn take(&self) -> Option<Instance> {
        self.lock().pop().map(|(_, instance)| instance)
    }

    /// Returns the linear memory of the largest instance, in bytes.
    pub(crate) fn max_memory(&self) -> usize {
        self.lock().iter().map(|(_, instance)| instance.memory()).max().unwrap_or(0)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Instance)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
