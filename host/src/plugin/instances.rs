//! Instances of all plugins: how much memory they hold, and which of them make way.
//!
//! **Threat.** A thousand plugins or tenants each keep an idle instance, a guest grows to its limit and stays there, or one component
//! has as many memories and tables as it can. Then the next tenant's call finds no slot in wasmtime's pool and no memory.
//!
//! **Layers.** Every instance holds a share of the pool `instances` for its linear memory and what the host keeps for it; a guest that asks
//! for more waits inside of its call until there is room. Whoever needs room first evicts idle instances, the least recently used one
//! before the others. One that was idle for a minute is dropped. While somebody waits for room, no instance is kept. A slot of wasmtime's
//! pool is waited for in the same way, and no call fails for want of one.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::instance::Instance;
use crate::memory::{Holder, Pool, Share};

/// What the host keeps for an instance beside its linear memory, in bytes: its store, its tables, the stack of its calls.
pub const OVERHEAD: usize = 128 << 10;

/// How long an instance stays that nobody uses, and how often such are looked for.
const IDLE: Duration = Duration::from_secs(60);
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How long somebody who waits for a slot goes without a look.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

pub struct Instances {
    memory: Pool,
    kept: Mutex<Vec<Weak<Kept>>>,
    /// Told whenever an instance is kept or dropped.
    returned: Notify,
}

/// Idle instances of one plugin and tenant; the one used last is at the end.
pub struct Kept(Mutex<Vec<(Instant, Instance)>>);

impl Instances {
    /// Starts to drop what is idle for long, for as long as it lives.
    pub fn start(memory: Pool) -> Arc<Self> {
        let instances = Arc::new(Self { memory, kept: Mutex::default(), returned: Notify::new() });
        let sweeping = Arc::downgrade(&instances);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                let Some(instances) = sweeping.upgrade() else { return };
                while instances.evict(IDLE) {}
            }
        });
        instances
    }

    /// A place for idle instances.
    pub fn place(&self) -> Arc<Kept> {
        let place = Arc::new(Kept(Mutex::default()));
        let mut kept = self.lock();
        kept.retain(|known| known.strong_count() > 0);
        kept.push(Arc::downgrade(&place));
        place
    }

    /// A share for an instance, with room for what the host keeps for it.
    pub async fn share(&self, holder: &Holder) -> Share {
        let mut share = self.memory.share(holder);
        self.cover(&mut share, OVERHEAD).await;
        share
    }

    /// Has a share grow; idle instances make way for it.
    pub async fn cover(&self, share: &mut Share, bytes: usize) {
        while !share.try_cover(bytes) {
            if self.evict(Duration::ZERO) {
                continue;
            }
            let mut waiting = std::pin::pin!(share.cover(bytes));
            loop {
                tokio::select! {
                    () = &mut waiting => return,
                    // One may have become idle in the moment before it was known that somebody waits.
                    () = tokio::time::sleep(POLL_INTERVAL) => drop(self.evict(Duration::ZERO)),
                }
            }
        }
    }

    /// Keeps an instance for the next call, unless others need its memory.
    pub fn keep(&self, place: &Kept, instance: Instance) {
        if self.memory.is_short() {
            drop(instance);
        } else {
            place.lock().push((Instant::now(), instance));
        }
        self.returned.notify_one();
    }

    /// Makes a slot of wasmtime's pool free, or waits a while until one may be.
    pub async fn wait_for_slot(&self) {
        if !self.evict(Duration::ZERO) {
            tokio::time::timeout(POLL_INTERVAL, self.returned.notified()).await.ok();
        }
    }

    /// Drops the instance that is idle for longest, if it is for as long as this; whether there was one.
    fn evict(&self, at_least: Duration) -> bool {
        let places: Vec<Arc<Kept>> = self.lock().iter().filter_map(Weak::upgrade).collect();
        let oldest = places
            .iter()
            .filter_map(|place| Some((place.lock().first()?.0, place)))
            .min_by_key(|(at, _)| *at);
        let Some((since, place)) = oldest.filter(|(since, _)| since.elapsed() >= at_least) else {
            return false;
        };
        let mut idle = place.lock();
        // Somebody may have taken it meanwhile.
        if idle.first().is_some_and(|(at, _)| *at == since) {
            let evicted = idle.remove(0);
            drop(idle);
            drop(evicted);
        }
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Kept>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// The instance that was used last.
    pub fn take(&self) -> Option<Instance> {
        self.lock().pop().map(|(_, instance)| instance)
    }

    /// Linear memory of the instance that holds most, in bytes.
    pub fn max_memory(&self) -> usize {
        self.lock().iter().map(|(_, instance)| instance.memory()).max().unwrap_or(0)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Instance)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
