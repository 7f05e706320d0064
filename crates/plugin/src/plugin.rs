//! Loaded plugin: its instances by tenant, and the calls of its functions.
//!
//! **One call.**
//! 1. The caller takes a permit of the tenant's pool. Calls are short and occupy a thread, so a
//!    pool has twice as many permits as the machine has threads.
//! 2. The call gets an idle instance of the same tenant, or a new one. Tenants never share an
//!    instance: what a guest remembers of one tenant cannot reach another.
//! 3. The instance runs the function within the limits of [`crate::sandbox::instance`].
//! 4. The result is checked, as a guest's value is untrusted input, and bounded in size.
//! 5. The instance returns to its pool only if the call succeeded and the instance is not bloated.
//!    A trap can leave the guest's memory inconsistent.
//!
//! **Errors.** A failed call gives a [`CallError`] that names the limit and its setting. Clients
//! see the short text. The log has the detail, which may contain settings or the guest's output.
//!
//! **Out of memory.** Linear memory never shrinks, so a used instance can lack room for a request
//! that fits into a new one. Two measures keep such a request from failing: a call with large
//! arguments avoids a used instance without room, and `begin` tries again on a new instance after
//! it ran out of memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::text::printable;
use batchwright_egress::{Gateway, HttpResponse};
use batchwright_memory::Holder;
use tokio::sync::{Semaphore, SemaphorePermit};
use wasmtime::component::Component;
use wasmtime::{Engine, Trap};

use crate::contract::answer::check_step;
use crate::contract::types::{
    BatchContext, Classification, Description, Kind, Line, Outcome, Request, Step,
    ValidationReport, Violation,
};
use crate::error::CallError;
use crate::package::manifest::{Isolation, Limits};
use crate::package::routing::Routing;
use crate::package::trust::VerifiedSignature;
use crate::sandbox::engine::GUEST_STACK_BYTES;
use crate::sandbox::instance::{
    CpuTimeExceeded, DeadlineExceeded, Instance, Refused, Template, in_time,
};
use crate::sandbox::instances::{IdleInstances, Instances};
use crate::sandbox::log::{PluginLog, RecentOutput};

/// Lines for which a validator gets the CPU time of one call.
const LINES_PER_CPU_UNIT: usize = 1000;
/// Bytes for which a validator gets the CPU time of one call.
const BYTES_PER_CPU_UNIT: usize = 1 << 20;

/// Size of the violations of one call above which further ones are only counted.
const MAX_VIOLATION_BYTES: usize = 256 << 10;

/// Bytes at the beginning of a response body that `classify` receives.
pub const CLASSIFY_BODY_BYTES: usize = 4 << 10;

/// Shortest interval between calls of `classify` for responses whose class the host knows.
const CLASSIFY_SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Component with its settings, checked and ready to be called.
pub struct Plugin {
    facts: PluginFacts,
    runtime: PluginRuntime,
    /// Time of the last sampled call of `classify`.
    last_classified: Mutex<Option<Instant>>,
    /// Pools of instances, by tenant.
    pools: Mutex<HashMap<TenantId, Arc<Pool>>>,
}

/// Instances of one plugin for one tenant. An instance never changes pools.
pub(crate) struct Pool {
    idle: Arc<IdleInstances>,
    /// Holder in whose name instances reserve memory.
    holder: Holder,
    /// Permits for calls. Calls are short and occupy a thread, so more calls than threads gain
    /// little.
    permits: Semaphore,
}

/// Instance for one call, which returns to its pool only if the call succeeded.
struct Lease<'a> {
    pool: &'a Pool,
    instance: Instance,
    _permit: Option<SemaphorePermit<'a>>,
}

/// Facts about a plugin that loading has established.
pub(crate) struct PluginFacts {
    /// Name of the TOML file without its extension.
    pub name: String,
    /// World that the component implements.
    pub kind: Kind,
    /// Result of `describe`.
    pub description: Description,
    /// SHA-256 of the component, in hexadecimal.
    pub sha256: String,
    /// Signature, if the server requires signatures.
    pub signed: Option<VerifiedSignature>,
    /// Limits of calls and exchanges.
    pub limits: Limits,
    /// What the plugin serves.
    pub routing: Routing,
    /// Time of the load, in Unix seconds.
    pub loaded_at: i64,
    /// Settings as a JSON object, for `configure`.
    pub settings: String,
}

/// What a plugin runs with.
pub(crate) struct PluginRuntime {
    /// Reference that lets other plugins of the same component share its code.
    pub _component: Arc<Component>,
    /// Linked component.
    pub template: Template,
    /// Engine of the component.
    pub engine: Engine,
    /// Log of the plugin.
    pub log: Arc<PluginLog>,
    /// Gateway for exchanges.
    pub gateway: Gateway,
    /// Registry of idle instances, shared by all plugins.
    pub instances: Arc<Instances>,
}

impl Plugin {
    /// Creates a plugin without instances.
    pub(crate) fn new(facts: PluginFacts, runtime: PluginRuntime) -> Self {
        Self { facts, runtime, last_classified: Mutex::default(), pools: Mutex::default() }
    }

    /// Returns the violations in these lines.
    pub async fn validate(
        &self,
        tenant: &TenantId,
        batch: BatchContext,
        lines: Vec<Line>,
    ) -> Result<ValidationReport, CallError> {
        const FUNCTION: &str = "validate";
        let bytes: usize = lines.iter().map(|line| line.text.len()).sum();
        let units =
            lines.len().div_ceil(LINES_PER_CPU_UNIT).max(bytes.div_ceil(BYTES_PER_CPU_UNIT));
        let numbers: std::collections::HashSet<u64> =
            lines.iter().map(|line| line.number).collect();
        let pool = self.pool(tenant);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let mut lease = self.lease(&pool, units, bytes).await?;
        let waited = lease.instance.waited.clone();
        let call = lease.instance.exports.validate(&mut lease.instance.store, batch, lines);
        let called = in_time(&self.facts.limits, units, &waited, call).await;
        let mut violations: Vec<Violation> = self.end_lease(lease, FUNCTION, called)?;
        // Bounded without an await after the call, so that few lists of a guest's full size exist
        // at a time. A guest may return violations in any order.
        violations.sort_by_key(|violation| violation.line);
        let (mut kept, mut bytes, mut unlisted) = (Vec::new(), 0_usize, 0_u64);
        for mut violation in violations {
            if !numbers.contains(&violation.line) {
                let message = format!(
                    "it reported a violation of line {}, which it was not given.",
                    violation.line
                );
                return Err(CallError::Contract {
                    plugin: self.facts.name.clone(),
                    function: FUNCTION,
                    message,
                });
            }
            if bytes >= MAX_VIOLATION_BYTES {
                unlisted = unlisted.saturating_add(1);
                continue;
            }
            violation.code = printable(&violation.code, 64);
            violation.message = printable(&violation.message, 1000);
            violation.param = violation.param.as_deref().map(|param| printable(param, 200));
            bytes = bytes.saturating_add(violation.message.len()).saturating_add(100);
            kept.push(violation);
        }
        Ok(ValidationReport { violations: kept, unlisted })
    }

    /// Returns the first step of a request. A call that runs out of memory on a used instance is
    /// repeated on a new one.
    pub async fn begin(
        &self,
        tenant: &TenantId,
        request: impl Fn() -> Request,
    ) -> Result<Step, CallError> {
        let pool = self.pool(tenant);
        let mut needs_new = false;
        loop {
            let request = request();
            let bytes = if needs_new { usize::MAX } else { request.body.len() };
            let mut lease = self.lease(&pool, 1, bytes).await?;
            let was_used = lease.instance.calls > 1;
            let waited = lease.instance.waited.clone();
            let call = lease.instance.exports.begin(&mut lease.instance.store, request);
            let called = in_time(&self.facts.limits, 1, &waited, call).await;
            match self.end_lease(lease, "begin", called) {
                Err(CallError::Memory { .. }) if was_used && !needs_new => needs_new = true,
                step => return self.check_step(step?, "begin"),
            }
        }
    }

    /// Returns the next step of a request. After success `outcome` is unchanged, so the caller can
    /// repeat the call. After an error `outcome` may be lost.
    pub async fn resume(
        &self,
        tenant: &TenantId,
        state: &[u8],
        outcome: &mut Outcome,
    ) -> Result<Step, CallError> {
        let bytes = match &outcome {
            Outcome::Response(response) => response.body.len(),
            Outcome::Error(_) | Outcome::Elapsed => 0,
        };
        let pool = self.pool(tenant);
        let mut lease = self.lease(&pool, 1, bytes.saturating_add(state.len())).await?;
        let waited = lease.instance.waited.clone();
        let call = lease.instance.exports.resume(&mut lease.instance.store, state, outcome);
        let called = in_time(&self.facts.limits, 1, &waited, call).await;
        let step = self.end_lease(lease, "resume", called)?;
        self.check_step(step, "resume")
    }

    /// Returns true if `classify` is to be called for a response. `matters` is false for a response
    /// that the host can classify: only a sample of those is classified, for the rate limits that
    /// the provider reports.
    pub fn classifies(&self, matters: bool) -> bool {
        matches!(self.runtime.template, Template::Adapter { classifier: Some(_), .. })
            && (matters || self.is_sample_due())
    }

    /// Returns the adapter's classification of a response.
    pub async fn classify(
        &self,
        tenant: &TenantId,
        response: &HttpResponse,
    ) -> Result<Classification, CallError> {
        let beginning = response
            .body
            .get(..response.body.len().min(CLASSIFY_BODY_BYTES))
            .unwrap_or_default()
            .to_vec();
        let pool = self.pool(tenant);
        let mut lease = self.lease(&pool, 1, beginning.len()).await?;
        let waited = lease.instance.waited.clone();
        let store = &mut lease.instance.store;
        let call = lease.instance.exports.classify(
            store,
            response.status,
            response.headers.clone(),
            beginning,
        );
        let called = in_time(&self.facts.limits, 1, &waited, call).await;
        self.end_lease(lease, "classify", called)
    }

    fn is_sample_due(&self) -> bool {
        let mut last = self.last_classified.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| last.elapsed() >= CLASSIFY_SAMPLE_INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }

    /// Checks that `describe` still returns the description from the load. An error is a message.
    pub async fn describe_again(&self) -> Result<(), String> {
        let mut instance =
            self.instantiate(&self.holder(None)).await.map_err(|error| error.to_string())?;
        for _ in 0..2 {
            instance.allow(&self.facts.limits, 1);
            let waited = instance.waited.clone();
            let called = in_time(
                &self.facts.limits,
                1,
                &waited,
                instance.exports.describe(&mut instance.store),
            )
            .await;
            let (found, schema) = called.map_err(|error| {
                self.explain("describe", &error, instance.refused(), &instance.output).detail()
            })?;
            let known = &self.facts.description;
            let same_schema = serde_json::from_str::<serde_json::Value>(&schema).ok().as_ref()
                == Some(&known.settings_schema);
            if found.name != known.name
                || found.version != known.version
                || found.endpoints != known.endpoints
                || !same_schema
            {
                return Err(format!(
                    "it returned {} {} at load and now returns {} {}; name, version, \
                     endpoints and settings-schema must not change",
                    known.name, known.version, found.name, found.version
                ));
            }
        }
        Ok(())
    }

    /// Returns the linear memory of the largest idle instance, in bytes.
    pub fn most_memory(&self) -> usize {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.values().map(|pool| pool.idle.max_memory()).max().unwrap_or(0)
    }

    /// Returns the gateway for the exchanges that steps ask for.
    pub fn gateway(&self) -> &Gateway {
        &self.runtime.gateway
    }

    /// Returns the name of the TOML file without its extension.
    pub fn name(&self) -> &str {
        &self.facts.name
    }

    /// Returns the world that the component implements.
    pub fn kind(&self) -> Kind {
        self.facts.kind
    }

    /// Returns the result of `describe`.
    pub fn description(&self) -> &Description {
        &self.facts.description
    }

    /// Returns the SHA-256 of the component, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.facts.sha256
    }

    /// Returns the signature, if the server requires signatures.
    pub fn signature(&self) -> Option<&VerifiedSignature> {
        self.facts.signed.as_ref()
    }

    /// Returns the limits of calls and exchanges.
    pub fn limits(&self) -> &Limits {
        &self.facts.limits
    }

    /// Returns what the plugin serves, as the operator configured it.
    pub fn routing(&self) -> &Routing {
        &self.facts.routing
    }

    /// Returns the time of the load, in Unix seconds.
    pub fn loaded_at(&self) -> i64 {
        self.facts.loaded_at
    }

    /// Returns true if the plugin serves this tenant.
    pub fn serves(&self, tenant: &TenantId) -> bool {
        self.facts.routing.serves(tenant)
    }

    /// Returns true if both the description and the operator allow this endpoint.
    pub fn handles(&self, endpoint: Endpoint) -> bool {
        [&self.facts.description.endpoints, &self.facts.routing.endpoints]
            .into_iter()
            .all(|list| list.is_empty() || list.iter().any(|known| known == endpoint.as_str()))
    }

    /// Validates a step against the contract and the plugin's limits.
    fn check_step(&self, step: Step, function: &'static str) -> Result<Step, CallError> {
        let max_wait = self.facts.limits.max_wait;
        let checked = match step {
            Step::Wait { milliseconds, .. }
                if Duration::from_millis(milliseconds) > max_wait.duration() =>
            {
                Err(format!(
                    "it asks for a pause of {milliseconds} ms; \
                     the limit is {max_wait}, [limits] max_wait."
                ))
            }
            step => check_step(step),
        };
        checked.map_err(|message| CallError::Contract {
            plugin: self.facts.name.clone(),
            function,
            message,
        })
    }

    fn pool(&self, tenant: &TenantId) -> Arc<Pool> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(tenant) {
            return pool.clone();
        }
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let pool = Arc::new(Pool {
            idle: self.runtime.instances.idle_list(),
            holder: self.holder(Some(tenant)),
            permits: Semaphore::new(threads.saturating_mul(2)),
        });
        pools.insert(tenant.clone(), pool.clone());
        pool
    }

    /// Returns an instance for a call with this many bytes of arguments.
    async fn lease<'a>(
        &self,
        pool: &'a Pool,
        units: u32,
        bytes: usize,
    ) -> Result<Lease<'a>, CallError> {
        let permit = pool.permits.acquire().await.ok();
        let idle = pool.idle.take().filter(|instance| !instance.lacks_memory_for(bytes));
        let mut instance = match idle {
            Some(instance) => instance,
            // Boxed, as the future is large and rarely needed.
            None => Box::pin(self.instantiate(&pool.holder)).await?,
        };
        instance.allow(&self.facts.limits, units);
        Ok(Lease { pool, instance, _permit: permit })
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
    fn end_lease<T>(
        &self,
        lease: Lease,
        function: &'static str,
        called: wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        match called {
            Ok(value) => {
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

    /// Converts and logs the error of a call.
    pub(crate) fn explain(
        &self,
        function: &'static str,
        error: &wasmtime::Error,
        refused: Option<Refused>,
        output: &RecentOutput,
    ) -> CallError {
        self.logged(explain(&self.facts.name, &self.facts.limits, function, error, refused, output))
    }

    /// Logs an error for the operator and returns it.
    fn logged(&self, error: CallError) -> CallError {
        self.runtime.log.write_call_error(&error.detail());
        error
    }
}

/// Converts the error of a call into the limit that the call exceeded, or into a trap.
pub(crate) fn explain(
    plugin: &str,
    limits: &Limits,
    function: &'static str,
    error: &wasmtime::Error,
    refused: Option<Refused>,
    output: &RecentOutput,
) -> CallError {
    let plugin = plugin.to_owned();
    if error.is::<CpuTimeExceeded>() {
        return CallError::Cpu { plugin, function, limit: limits.call_timeout.to_string() };
    }
    if error.is::<DeadlineExceeded>() {
        return CallError::DeadlineExceeded { plugin, function };
    }
    match refused {
        Some(Refused::Memory) => {
            return CallError::Memory { plugin, function, limit: limits.max_memory.to_string() };
        }
        Some(Refused::Table) => {
            return CallError::Table { plugin, function, limit: limits.max_table_elements.get() };
        }
        None => {}
    }
    if error.downcast_ref::<Trap>() == Some(&Trap::StackOverflow) {
        return CallError::Stack {
            plugin,
            function,
            limit: format!("{}KiB", GUEST_STACK_BYTES >> 10),
        };
    }
    let message = printable(&error.root_cause().to_string(), 500);
    if message.contains("fuel allocated for hostcalls") {
        return CallError::Answer { plugin, function, limit: limits.max_output.to_string() };
    }
    if message.contains("store handle limit exceeded") {
        return CallError::Handles { plugin, function, limit: limits.max_handles.get() };
    }
    CallError::Trap { plugin, function, message, output: output.joined() }
}
