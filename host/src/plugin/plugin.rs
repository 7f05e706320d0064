//! A loaded plugin: its instances, by tenant, and the calls made of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};
use wasmtime::component::Component;
use wasmtime::{Engine, Trap};

use super::answer::{checked, for_people};
use super::engine::STACK;
use super::error::CallError;
use super::instance::{Asleep, Instance, OutOfTime, Refused, Template, in_time};
use super::instances::{Instances, Kept};
use super::log::{PluginLog, Said};
use super::manifest::{Isolation, Limits};
use super::trust::Signed;
use super::types::{
    BatchContext, Classification, Description, Judgement, Kind, Line, Outcome, Request, Step,
    Violation,
};
use crate::egress::{Gateway, HttpResponse};
use crate::memory::Holder;

/// Lines and bytes for which a validator is granted the CPU time of one call.
const LINES_A_UNIT: usize = 1000;
const BYTES_A_UNIT: usize = 1 << 20;

/// Text of violations that is kept of one call, in bytes.
const VIOLATION_BYTES: usize = 256 << 10;

/// How much of a body `classify` is given, in bytes.
pub const BEGINNING: usize = 4 << 10;

/// How often `classify` is asked about answers like others.
const NOW_AND_THEN: Duration = Duration::from_millis(100);

/// A component with its settings, checked and ready.
pub struct Plugin {
    /// The name of its TOML file.
    pub name: String,
    pub kind: Kind,
    pub description: Description,
    pub sha256: String,
    /// Where signatures are asked for.
    pub signed: Option<Signed>,
    pub limits: Limits,
    /// Validators: place in the order, and the endpoints it is for.
    pub order: i64,
    pub endpoints: Vec<String>,
    /// Empty means all.
    pub tenants: Vec<String>,
    pub models: Vec<String>,
    pub aliases: std::collections::BTreeMap<String, String>,
    /// The models of requests that name none, by endpoint.
    pub default_models: std::collections::BTreeMap<String, String>,
    /// Nothing is sent for now.
    pub paused: bool,
    /// Unix seconds.
    pub loaded_at: i64,
    pub(super) settings: String,
    /// Shared with other plugins of the same component for as long as this one is there.
    pub(super) _component: Arc<Component>,
    pub(super) template: Template,
    pub(super) engine: Engine,
    pub(super) log: Arc<PluginLog>,
    pub(super) gateway: Gateway,
    pub(super) instances: Arc<Instances>,
    pub(super) last_classified: Mutex<Option<Instant>>,
    pub(super) pools: Mutex<HashMap<String, Arc<Pool>>>,
}

/// One tenant's instances of one plugin. No instance ever changes pools.
pub(super) struct Pool {
    idle: Arc<Kept>,
    /// Whose memory its instances take.
    holder: Holder,
    /// Calls are short and hold a thread while they run, so more instances than threads gain little.
    permits: Semaphore,
}

/// An instance for one call. It goes back to its pool only if the call went well.
struct Lease<'a> {
    pool: &'a Pool,
    instance: Instance,
    _permit: Option<SemaphorePermit<'a>>,
}

impl Plugin {
    /// What is wrong with these lines.
    pub async fn validate(
        &self,
        tenant: &str,
        batch: BatchContext,
        lines: Vec<Line>,
    ) -> Result<Judgement, CallError> {
        const FUNCTION: &str = "validate";
        let bytes: usize = lines.iter().map(|line| line.text.len()).sum();
        let units = lines.len().div_ceil(LINES_A_UNIT).max(bytes.div_ceil(BYTES_A_UNIT));
        let numbers: std::collections::HashSet<u64> =
            lines.iter().map(|line| line.number).collect();
        let pool = self.pool(tenant);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let mut lease = self.lease(&pool, units, bytes).await?;
        let waited = lease.instance.waited.clone();
        let call = lease.instance.exports.validate(&mut lease.instance.store, batch, lines);
        let called = in_time(&self.limits, units, &waited, call).await;
        let mut violations: Vec<Violation> = self.settle(lease, FUNCTION, called)?;
        // In one go with the call, so that not many wait as large as a guest can make them. They may stand in any order.
        violations.sort_by_key(|violation| violation.line);
        let (mut kept, mut bytes, mut unlisted) = (Vec::new(), 0_usize, 0_u64);
        for mut violation in violations {
            if !numbers.contains(&violation.line) {
                let message = format!("it judged line {}, which it was not given.", violation.line);
                return Err(CallError::Contract {
                    plugin: self.name.clone(),
                    function: FUNCTION,
                    message,
                });
            }
            if bytes >= VIOLATION_BYTES {
                unlisted = unlisted.saturating_add(1);
                continue;
            }
            violation.code = for_people(&violation.code, 64);
            violation.message = for_people(&violation.message, 1000);
            violation.param = violation.param.as_deref().map(|param| for_people(param, 200));
            bytes = bytes.saturating_add(violation.message.len()).saturating_add(100);
            kept.push(violation);
        }
        Ok(Judgement { violations: kept, unlisted })
    }

    /// The first step of a request. One that runs out of memory on a used instance begins again on a new one.
    pub async fn begin(
        &self,
        tenant: &str,
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
            let called = in_time(&self.limits, 1, &waited, call).await;
            match self.settle(lease, "begin", called) {
                Err(CallError::Memory { .. }) if was_used && !needs_new => needs_new = true,
                step => return self.checked(step?, "begin"),
            }
        }
    }

    /// The next step. The outcome is as it was when this returns, so that the call can be made again; after an error it may be gone.
    pub async fn resume(
        &self,
        tenant: &str,
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
        let called = in_time(&self.limits, 1, &waited, call).await;
        let step = self.settle(lease, "resume", called)?;
        self.checked(step, "resume")
    }

    /// Whether the adapter is to be asked about a response. Where that does not matter, as the host thinks it an answer like others, it is asked now
    /// and then, for what the provider says of its limits.
    pub fn classifies(&self, matters: bool) -> bool {
        matches!(self.template, Template::Adapter { classifier: Some(_), .. })
            && (matters || self.asks_now_and_then())
    }

    /// What the adapter knows of a response.
    pub async fn classify(
        &self,
        tenant: &str,
        response: &HttpResponse,
    ) -> Result<Classification, CallError> {
        let beginning =
            response.body.get(..response.body.len().min(BEGINNING)).unwrap_or_default().to_vec();
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
        let called = in_time(&self.limits, 1, &waited, call).await;
        self.settle(lease, "classify", called)
    }

    fn asks_now_and_then(&self) -> bool {
        let mut last = self.last_classified.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= NOW_AND_THEN);
        if due {
            *last = Some(Instant::now());
        }
        due
    }

    /// Whether `describe` still says what it said when the plugin was loaded.
    pub async fn describe_again(&self) -> Result<(), String> {
        let mut instance =
            self.instantiate(&self.holder(None)).await.map_err(|error| error.to_string())?;
        for _ in 0..2 {
            instance.allow(&self.limits, 1);
            let waited = instance.waited.clone();
            let called =
                in_time(&self.limits, 1, &waited, instance.exports.describe(&mut instance.store))
                    .await;
            let (found, schema) = called.map_err(|error| {
                self.explain("describe", &error, instance.refused(), &instance.said).detail()
            })?;
            let known = &self.description;
            let same_schema = serde_json::from_str::<serde_json::Value>(&schema).ok().as_ref()
                == Some(&known.settings_schema);
            if found.name != known.name
                || found.version != known.version
                || found.endpoints != known.endpoints
                || !same_schema
            {
                return Err(format!(
                    "it was {} {} at first and is now {} {}",
                    known.name, known.version, found.name, found.version
                ));
            }
        }
        Ok(())
    }

    /// Linear memory of the idle instance that holds most, in bytes.
    pub fn most_memory(&self) -> usize {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.values().map(|pool| pool.idle.max_memory()).max().unwrap_or(0)
    }

    /// The way out for the exchanges that its steps ask for.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Whether it is for this tenant.
    pub fn serves(&self, tenant: &str) -> bool {
        self.tenants.is_empty() || self.tenants.iter().any(|known| known == tenant)
    }

    /// Whether it is for this endpoint, by its own word and the operator's.
    pub fn handles(&self, endpoint: &str) -> bool {
        [&self.description.endpoints, &self.endpoints]
            .into_iter()
            .all(|list| list.is_empty() || list.iter().any(|known| known == endpoint))
    }

    fn checked(&self, step: Step, function: &'static str) -> Result<Step, CallError> {
        let longest = self.limits.max_wait;
        let checked = match step {
            Step::Wait { milliseconds, .. }
                if Duration::from_millis(milliseconds) > longest.duration() =>
            {
                Err(format!(
                    "it asks for a pause of {milliseconds} ms; the limit is {longest}, [limits] max_wait."
                ))
            }
            step => checked(step),
        };
        checked.map_err(|message| CallError::Contract {
            plugin: self.name.clone(),
            function,
            message,
        })
    }

    fn pool(&self, tenant: &str) -> Arc<Pool> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(tenant) {
            return pool.clone();
        }
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let pool = Arc::new(Pool {
            idle: self.instances.place(),
            holder: self.holder(Some(tenant)),
            permits: Semaphore::new(threads.saturating_mul(2)),
        });
        pools.insert(tenant.to_owned(), pool.clone());
        pool
    }

    /// An instance for a call that is given so many bytes.
    async fn lease<'a>(
        &self,
        pool: &'a Pool,
        units: u32,
        bytes: usize,
    ) -> Result<Lease<'a>, CallError> {
        let permit = pool.permits.acquire().await.ok();
        let idle = pool.idle.take().filter(|instance| !instance.is_too_full_for(bytes));
        let mut instance = match idle {
            Some(instance) => instance,
            // Seldom, and large: callers are smaller without it.
            None => Box::pin(self.instantiate(&pool.holder)).await?,
        };
        instance.allow(&self.limits, units);
        Ok(Lease { pool, instance, _permit: permit })
    }

    /// A new instance, configured. It waits for memory and for a slot of wasmtime's pool.
    pub(super) async fn instantiate(&self, holder: &Holder) -> Result<Instance, CallError> {
        let place = (&self.instances, holder);
        let (made, refused) =
            Instance::new(&self.template, &self.engine, &self.limits, &self.log, place).await;
        let (refused, said) = refused;
        let mut instance =
            made.map_err(|error| self.explain("instantiate", &error, refused, &said))?;
        instance.allow(&self.limits, 1);
        let waited = instance.waited.clone();
        let call = instance.exports.configure(&mut instance.store, &self.settings);
        let called = in_time(&self.limits, 1, &waited, call).await;
        match called {
            Ok(Ok(())) => {
                instance.at_first = instance.memory();
                Ok(instance)
            }
            Ok(Err(message)) => {
                let message = for_people(&message, 1000);
                Err(self.told(CallError::Configure { plugin: self.name.clone(), message }))
            }
            Err(error) => {
                Err(self.explain("configure", &error, instance.refused(), &instance.said))
            }
        }
    }

    /// Who holds the memory of an instance.
    pub(super) fn holder(&self, tenant: Option<&str>) -> Holder {
        format!("{}/{}", self.name, tenant.unwrap_or_default()).into()
    }

    /// Ends a lease: the instance is kept after a call that went well, and thrown away after one that did not.
    fn settle<T>(
        &self,
        lease: Lease,
        function: &'static str,
        called: wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        match called {
            Ok(value) => {
                let fresh = lease.instance.calls < self.limits.max_calls.get()
                    && !lease.instance.is_bloated();
                if self.limits.instances == Isolation::Tenant && fresh {
                    self.instances.keep(&lease.pool.idle, lease.instance);
                }
                Ok(value)
            }
            Err(error) => {
                Err(self.explain(function, &error, lease.instance.refused(), &lease.instance.said))
            }
        }
    }

    pub(super) fn explain(
        &self,
        function: &'static str,
        error: &wasmtime::Error,
        refused: Option<Refused>,
        said: &Said,
    ) -> CallError {
        self.told(explain(&self.name, &self.limits, function, error, refused, said))
    }

    /// Tells the operator of a failed call.
    fn told(&self, error: CallError) -> CallError {
        self.log.write(tracing::Level::WARN, &error.detail());
        error
    }
}

/// Which limit a failed call ran into, if it was one.
pub(super) fn explain(
    plugin: &str,
    limits: &Limits,
    function: &'static str,
    error: &wasmtime::Error,
    refused: Option<Refused>,
    said: &Said,
) -> CallError {
    let plugin = plugin.to_owned();
    if error.is::<OutOfTime>() {
        return CallError::Cpu { plugin, function, limit: limits.call_timeout.to_string() };
    }
    if error.is::<Asleep>() {
        return CallError::Asleep { plugin, function };
    }
    match refused {
        Some(Refused::Memory) => {
            return CallError::Memory { plugin, function, limit: limits.memory.to_string() };
        }
        Some(Refused::Table) => {
            return CallError::Table { plugin, function, limit: limits.table_elements.get() };
        }
        None => {}
    }
    if error.downcast_ref::<Trap>() == Some(&Trap::StackOverflow) {
        return CallError::Stack { plugin, function, limit: format!("{}KiB", STACK >> 10) };
    }
    let message = for_people(&error.root_cause().to_string(), 500);
    if message.contains("fuel allocated for hostcalls") {
        return CallError::Answer { plugin, function, limit: limits.answer.to_string() };
    }
    if message.contains("store handle limit exceeded") {
        return CallError::Handles { plugin, function, limit: limits.handles.get() };
    }
    CallError::Trap { plugin, function, message, said: said.in_words() }
}
