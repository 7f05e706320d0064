//! Exchanges in flight by tenant, over all plugins, for the limit `max_requests_in_flight`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use batchwright_domain::ids::TenantId;

/// Queue of requests that wait for a plugin, or for the limit of their tenant.
pub(crate) trait WaitingRequests: Send + Sync {
    /// Admits waiting requests while permits are free.
    fn wake(self: Arc<Self>);
}

/// Exchanges in flight by tenant.
#[derive(Default)]
pub(crate) struct TenantsInFlight {
    tenants: Mutex<HashMap<TenantId, Count>>,
    /// Queues of all plugins that are loaded.
    queues: Mutex<Vec<Weak<dyn WaitingRequests>>>,
}

#[derive(Default)]
struct Count {
    in_flight: u64,
    /// True if a request of the tenant was passed over since the last release.
    is_awaited: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TenantsInFlight {
    /// Adds the queue of a plugin, which is asked again when a tenant falls below its limit.
    pub(crate) fn add_queue(&self, queue: Weak<dyn WaitingRequests>) {
        let mut queues = lock(&self.queues);
        // A plugin that is loaded again has a new queue.
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(queue);
    }

    /// Counts one more exchange of a tenant, or returns false if its limit does not allow it.
    pub(crate) fn take(&self, tenant: &TenantId, max: Option<u64>) -> bool {
        let mut tenants = lock(&self.tenants);
        let count = match tenants.get_mut(tenant) {
            Some(count) => count,
            None => tenants.entry(tenant.clone()).or_default(),
        };
        if max.is_some_and(|max| count.in_flight >= max) {
            count.is_awaited = true;
            return false;
        }
        count.in_flight = count.in_flight.saturating_add(1);
        true
    }

    /// Returns the exchanges of a tenant in flight.
    pub(crate) fn of(&self, tenant: &TenantId) -> u64 {
        lock(&self.tenants).get(tenant).map_or(0, |count| count.in_flight)
    }

    /// Ends an exchange of a tenant. No lock may be held.
    pub(crate) fn release(&self, tenant: &TenantId) {
        let is_awaited = {
            let mut tenants = lock(&self.tenants);
            let Some(count) = tenants.get_mut(tenant) else { return };
            count.in_flight = count.in_flight.saturating_sub(1);
            let is_awaited = std::mem::take(&mut count.is_awaited);
            if count.in_flight == 0 {
                tenants.remove(tenant);
            }
            is_awaited
        };
        if is_awaited {
            // A request of the tenant may wait for another plugin.
            let queues = lock(&self.queues).clone();
            queues.iter().filter_map(Weak::upgrade).for_each(WaitingRequests::wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Asked(AtomicUsize);

    impl WaitingRequests for Asked {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn queues_are_asked_when_an_awaited_place_is_free_and_forgotten_with_their_plugin() {
        let (tenants, tenant) = (TenantsInFlight::default(), TenantId::from("t"));
        let queue = Arc::new(Asked::default());
        tenants.add_queue(Arc::downgrade(&(queue.clone() as Arc<dyn WaitingRequests>)));
        assert!(tenants.take(&tenant, Some(1)));
        tenants.release(&tenant);
        assert_eq!(queue.0.load(Ordering::Relaxed), 0, "nobody waited");
        assert!(tenants.take(&tenant, Some(1)) && !tenants.take(&tenant, Some(1)));
        tenants.release(&tenant);
        assert_eq!(queue.0.load(Ordering::Relaxed), 1);
        // A plugin is loaded again and again, and no request waits meanwhile.
        for _ in 0..10 {
            let queue: Arc<dyn WaitingRequests> = Arc::new(Asked::default());
            tenants.add_queue(Arc::downgrade(&queue));
        }
        assert_eq!(lock(&tenants.queues).len(), 2);
        assert!(lock(&tenants.tenants).is_empty());
    }
}
