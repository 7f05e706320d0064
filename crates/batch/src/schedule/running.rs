//! Batches that this process works on, each with its claim and its stop signal.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_store::Claim;

use crate::schedule::stop::{Reason, Stop};

/// Batches that this process works on, by tenant and batch id.
#[derive(Default)]
pub(crate) struct Running(Mutex<HashMap<(TenantId, BatchId), RunningBatch>>);

/// Batch that this process works on.
struct RunningBatch {
    stop: Arc<Stop>,
    claim: Claim,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, HashMap<(TenantId, BatchId), RunningBatch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a claimed batch and returns its stop signal.
    pub(crate) fn add(&self, claim: &Claim) -> Arc<Stop> {
        let stop = Arc::new(Stop::default());
        let running = RunningBatch { stop: stop.clone(), claim: claim.clone() };
        self.lock().insert((claim.tenant.clone(), claim.batch_id.clone()), running);
        stop
    }

    /// Removes a batch, unless the batch was released and claimed again meanwhile.
    pub(crate) fn remove(&self, claim: &Claim, stop: &Arc<Stop>) {
        let key = (claim.tenant.clone(), claim.batch_id.clone());
        let mut running = self.lock();
        if running.get(&key).is_some_and(|current| Arc::ptr_eq(&current.stop, stop)) {
            running.remove(&key);
        }
    }

    /// Stops a batch, and returns false if this process does not work on it.
    pub(crate) fn stop(&self, tenant: &TenantId, batch: &BatchId, reason: Reason) -> bool {
        let running = self.lock();
        let found = running.get(&(tenant.clone(), batch.clone()));
        if let Some(found) = found {
            found.stop.because(reason);
        }
        found.is_some()
    }

    /// Stops all batches of a tenant.
    pub(crate) fn stop_tenant(&self, tenant: &TenantId, reason: Reason) {
        for ((of_tenant, _), running) in self.lock().iter() {
            if of_tenant == tenant {
                running.stop.because(reason);
            }
        }
    }

    /// Stops all batches.
    pub(crate) fn stop_all(&self, reason: Reason) {
        for running in self.lock().values() {
            running.stop.because(reason);
        }
    }

    /// Returns the claim of a batch, or `None` if this process does not work on it.
    pub(crate) fn claim(&self, tenant: &TenantId, batch: &BatchId) -> Option<Claim> {
        let running = self.lock();
        running.get(&(tenant.clone(), batch.clone())).map(|found| found.claim.clone())
    }
}
