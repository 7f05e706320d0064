//! Instances of a plugin by tenant: leases for calls, creation and return.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use batchwright_domain::ids::TenantId;
use batchwright_domain::text::printable;
use batchwright_memory::Holder;

use crate::error::CallError;
use crate::package::limits::Isolation;
use crate::plugin::Plugin;
use crate::sandbox::cpu_shares::Turn;
use crate::sandbox::instance::{Instance, in_time};
use crate::sandbox::instances::IdleInstances;

/// Instances of one plugin for one tenant. An instance never changes pools.
pub(crate) struct Pool {
    pub(super) idle: Arc<IdleInstances>,
    /// Holder in whose name instances reserve memory.
    holder: Holder,
    tenant: TenantId,
}

/// Instance for one call, which returns to its pool only if the call succeeded.
pub(super) struct Lease<'a> {
    pool: &'a Pool,
    pub(super) instance: Instance,
    turn: Turn,
    /// Time that earlier calls of the instance have waited for memory.
    waited_before: Duration,
}

impl Plugin {
    pub(super) fn pool(&self, tenant: &TenantId) -> Arc<Pool> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(tenant) {
            return pool.clone();
        }
        let pool = Arc::new(Pool {
            idle: self.runtime.instances.idle_list(),
            holder: self.holder(Some(tenant)),
            tenant: tenant.clone(),
        });
        pools.insert(tenant.clone(), pool.clone());
        pool
    }

    /// Returns an instance for a call with this many bytes of arguments.
    pub(super) async fn lease<'a>(
        &self,
        pool: &'a Pool,
        units: u32,
        bytes: usize,
    ) -> Result<Lease<'a>, CallError> {
        let mut turn = self.runtime.instances.cpu.turn(&pool.tenant).await;
        let idle = pool.idle.take().filter(|instance| !instance.lacks_memory_for(bytes));
        let mut instance = match idle {
            Some(instance) => instance,
            None => {
                let started = Instant::now();
                // Boxed, as the future is large and rarely needed.
                let created = Box::pin(self.instantiate(&pool.holder)).await;
                // Mostly a wait for memory or for a slot, which is not the tenant's CPU time.
                turn.excuse(started.elapsed());
                created?
            }
        };
        instance.allow(&self.facts.limits, units);
        let waited_before = instance.waited.total();
        Ok(Lease { pool, instance, turn, waited_before })
    }

    /// Creates and configures an instance. Waits for memory and for a slot of wasmtime's pool.
    pub(crate) async fn instantiate(&self, holder: &Holder) -> Result<Instance, CallError> {
        let place = (&self.runtime.instances, holder);
        let (created, refused) = Instance::new(
            &self.runtime.template,
            &self.runtime.engine,
            &self.facts.limits,
            &self.runtime.log,
            place,
        )
        .await;
        let (refused, output) = refused;
        let mut instance =
            created.map_err(|error| self.explain("instantiate", &error, refused, &output))?;
        self.runtime.instances.metrics.created(&self.facts.name);
        instance.allow(&self.facts.limits, 1);
        let waited = instance.waited.clone();
        let call = instance.exports.configure(&mut instance.store, &self.facts.settings);
        let called = in_time(&self.facts.limits, 1, &waited, call).await;
        match called {
            Ok(Ok(())) => {
                instance.configured_memory = instance.memory();
                instance.calls = 0;
                Ok(instance)
            }
            Ok(Err(message)) => {
                let message = printable(&message, 1000);
                Err(self.logged(CallError::Configure { plugin: self.facts.name.clone(), message }))
            }
            Err(error) => {
                Err(self.explain("configure", &error, instance.refused(), &instance.output))
            }
        }
    }

    /// Returns the holder in whose name an instance reserves memory.
    pub(crate) fn holder(&self, tenant: Option<&TenantId>) -> Holder {
        format!("{}/{}", self.facts.name, tenant.map_or("", TenantId::as_str)).into()
    }

    /// Ends a lease. The instance returns to its pool after success and is dropped after an error.
    pub(super) fn end_lease<T>(
        &self,
        lease: Lease,
        function: &'static str,
        called: wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        let waited = lease.instance.waited.total().saturating_sub(lease.waited_before);
        let mut turn = lease.turn;
        turn.excuse(waited);
        let metrics = &self.runtime.instances.metrics;
        metrics.took(&self.facts.name, turn.took());
        match called {
            Ok(value) => {
                metrics.returned(&self.facts.name, function);
                let is_reusable = lease.instance.calls
                    < self.facts.limits.max_calls_per_instance.get()
                    && !lease.instance.is_bloated();
                if self.facts.limits.isolation == Isolation::PerTenant && is_reusable {
                    self.runtime.instances.release(&lease.pool.idle, lease.instance);
                }
                Ok(value)
            }
            Err(error) => Err(self.explain(
                function,
                &error,
                lease.instance.refused(),
                &lease.instance.output,
            )),
        }
    }
}
