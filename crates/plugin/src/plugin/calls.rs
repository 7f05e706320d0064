//! Calls of the functions of a plugin, with checks of the results.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::text::printable;
use batchwright_egress::HttpResponse;

use crate::contract::answer::check_step;
use crate::contract::types::{
    BatchContext, Classification, Line, Outcome, Request, Step, ValidationReport, Violation,
};
use crate::error::CallError;
use crate::plugin::{CLASSIFY_BODY_BYTES, Plugin};
use crate::sandbox::instance::in_time;

/// Lines for which a validator gets the CPU time of one call.
const LINES_PER_CPU_UNIT: usize = 1000;

/// Bytes for which a validator gets the CPU time of one call.
const BYTES_PER_CPU_UNIT: usize = 1 << 20;

/// Size of the violations of one call above which further ones are only counted.
const MAX_VIOLATION_BYTES: usize = 256 << 10;

/// Shortest interval between calls of `classify` for responses whose class the host knows.
const CLASSIFY_SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

impl Plugin {
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
                return Err(self.contract_violation(FUNCTION, message));
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
        self.runtime.template.classifies() && (matters || self.is_sample_due())
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

    /// Returns true if streams of an endpoint may be passed on to clients.
    pub async fn streams(&self, tenant: &TenantId, endpoint: Endpoint) -> Result<bool, CallError> {
        if !self.runtime.template.streams() {
            return Ok(false);
        }
        let ask = async || {
            let pool = self.pool(tenant);
            let mut lease = self.lease(&pool, 1, 0).await?;
            let waited = lease.instance.waited.clone();
            let call = lease.instance.exports.stream_endpoints(&mut lease.instance.store);
            let called = in_time(&self.facts.limits, 1, &waited, call).await;
            let named: Vec<String> = self.end_lease(lease, "stream-endpoints", called)?;
            let known = Endpoint::ALL.into_iter();
            let is_named = |endpoint: &Endpoint| named.iter().any(|name| name == endpoint.as_str());
            Ok(known.filter(is_named).collect())
        };
        let endpoints = self.stream_endpoints.get_or_try_init(ask).await?;
        Ok(endpoints.contains(&endpoint))
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
        checked.map_err(|message| self.contract_violation(function, message))
    }
}
