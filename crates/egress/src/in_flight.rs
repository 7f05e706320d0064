//! Exchanges in flight by tenant, over all plugins, for the limit `max_requests_in_flight`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchwright_domain::ids::TenantId;

/// Admits waiting requests of a plugin; returns false if the plugin is gone.
type Waker = Box<dyn Fn() -> bool + Send + Sync>;

/// Exchanges in flight by tenant.
#[derive(Default)]
pub(crate) struct TenantsInFlight {
    tenants: Mutex<HashMap<TenantId, Count>>,
    wakers: Mutex<Vec<Arc<Waker>>>,
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
    /// Adds a plugin whose waiting requests are admitted when a tenant falls below its limit.
    pub(crate) fn add_waker(&self, waker: impl Fn() -> bool + Send + Sync + 'static) {
        lock(&self.wakers).push(Arc::new(Box::new(waker)));
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
            let wakers = lock(&self.wakers).clone();
            let gone: Vec<_> = wakers.into_iter().filter(|waker| !waker()).collect();
            lock(&self.wakers).retain(|waker| !gone.iter().any(|gone| Arc::ptr_eq(gone, waker)));
        }
    }
}
