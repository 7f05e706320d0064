//! Conformance checks: whether a component keeps the contract.
//!
//! The checks call a component with valid, odd and hostile inputs (`inputs`), with its author's
//! recorded cases (`cases`), and with mutations of the recorded responses (`mutations`).
//!
//! **Purity.** A plugin is a pure function of its arguments. An instance never changes its tenant,
//! so two tenants mean two instances. The checks make the same call on both instances, repeat it,
//! and mix in calls with other data. If the results differ, the plugin keeps data outside of the
//! state that it returns.
//!
//! **Robustness.** A call must neither trap nor exceed a limit, whatever its input. After several
//! timeouts in a row the remaining checks are skipped, because each timeout takes long.
//!
//! **Blocking.** A call that waits for anything but the CPU holds an instance and its memory, so
//! it is reported as a problem.

mod adapter;
pub(crate) mod case_file;
mod validator;

mod cases;
mod inputs;
mod mutations;

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::contract::types::{
    BatchContext, Kind, Line, Outcome, Request, Step, ValidationReport, Violation,
};
use crate::error::CallError;
use crate::plugin::Plugin;

/// Tenant of the first instance.
pub(crate) const FIRST_TENANT: &str = "one";

/// Tenant of the second instance. A result must not depend on calls of the first instance.
pub(crate) const SECOND_TENANT: &str = "two";

/// Result of one check.
pub struct Check {
    /// Name of the check.
    pub name: String,
    /// Problem that the check found; None if the check passed.
    pub problem: Option<String>,
}

/// Resources that the calls of one function used.
#[derive(Default)]
pub struct Calls {
    /// CPU time of each call, with the time of the host for arguments and results.
    times: Vec<Duration>,
    /// Maximum linear memory of an instance after a call, in bytes.
    pub memory: usize,
    /// Maximum time that a call took in addition to its CPU time.
    max_blocked: Duration,
}

impl Calls {
    /// Returns the number of calls.
    pub fn count(&self) -> usize {
        self.times.len()
    }

    /// Returns the median CPU time of a call.
    pub fn median(&self) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }

    /// Returns the maximum CPU time of a call.
    pub fn longest(&self) -> Duration {
        self.times.iter().max().copied().unwrap_or_default()
    }

    /// Records a call that started at these times.
    fn record(&mut self, (cpu_start, start): (Duration, Instant), plugin: &Plugin) {
        let time = cpu_time().saturating_sub(cpu_start);
        self.max_blocked = self.max_blocked.max(start.elapsed().saturating_sub(time));
        self.times.push(time);
        self.memory = self.memory.max(plugin.most_memory());
    }
}

/// Returns the CPU time of this thread. One thread polls all checks, and a call runs on the thread
/// that polls it.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// Returns the current CPU time and wall-clock time, as the start of a call.
fn now() -> (Duration, Instant) {
    (cpu_time(), Instant::now())
}

/// Maximum time that a call may block in addition to its CPU time.
const MAX_BLOCKED_TIME: Duration = Duration::from_secs(2);

/// Timeouts in a row after which the remaining checks are skipped.
const MAX_CONSECUTIVE_TIMEOUTS: u32 = 3;

/// Name of the check that reports the skipped checks.
const SKIPPED_CHECKS_NAME: &str = "the remaining checks";

/// Results of all checks, with the resources that the calls used.
#[derive(Default)]
pub struct Report {
    /// Results in the order of the checks.
    pub checks: Vec<Check>,
    consecutive_timeouts: u32,
    begin: Calls,
    resume: Calls,
    validate: Calls,
}

/// Runs all checks on a plugin, and the recorded cases of a folder.
pub async fn check(plugin: &Plugin, cases: Option<&Path>) -> Report {
    let mut report = Report::default();
    let described = plugin.describe_again().await;
    report.record("`describe` returns the same result after `configure`", described);
    match plugin.kind() {
        Kind::Adapter => report.adapter(plugin).await,
        Kind::Validator => report.validator(plugin).await,
    }
    if let Some(folder) = cases {
        report.cases(plugin, folder).await;
    }
    report.check_blocking();
    report
}

impl Report {
    /// Returns the number of failed checks.
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|check| check.problem.is_some()).count()
    }

    /// Returns each called function with the resources that its calls used.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, &Calls)> {
        let all = [("begin", &self.begin), ("resume", &self.resume), ("validate", &self.validate)];
        all.into_iter().filter(|(_, calls)| calls.count() > 0)
    }

    /// Returns true if the remaining checks are skipped.
    fn is_aborted(&self) -> bool {
        self.consecutive_timeouts >= MAX_CONSECUTIVE_TIMEOUTS
    }

    /// Counts consecutive timeouts. A call of an aborted plugin does not reset the count.
    fn count_timeout<T>(&mut self, called: &Result<T, CallError>) {
        match called {
            Err(CallError::Cpu { .. } | CallError::DeadlineExceeded { .. }) => {
                self.consecutive_timeouts = self.consecutive_timeouts.saturating_add(1)
            }
            _ if self.is_aborted() => {}
            _ => self.consecutive_timeouts = 0,
        }
    }

    /// Returns the result of a skipped call.
    fn skipped<T>(plugin: &Plugin, function: &'static str) -> Result<T, CallError> {
        Err(CallError::DeadlineExceeded { plugin: plugin.name().to_owned(), function })
    }

    /// Checks that no call blocked, because a blocked call holds an instance and its memory.
    fn check_blocking(&mut self) {
        let blocked: Vec<(&str, Duration)> =
            self.calls().map(|(function, calls)| (function, calls.max_blocked)).collect();
        let longest = blocked.into_iter().max_by_key(|(_, blocked)| *blocked);
        if let Some((function, blocked)) =
            longest.filter(|(_, blocked)| *blocked > MAX_BLOCKED_TIME && !self.is_aborted())
        {
            let problem = format!(
                "a call of `{function}` blocked for {blocked:.1?}; a plugin has nothing to wait for"
            );
            self.record("does not block", Err(problem));
        }
    }

    /// Records the result of a check, or that the remaining checks are skipped.
    fn record(&mut self, name: impl Into<String>, found: Result<(), String>) {
        if self.is_aborted() {
            if self.checks.last().is_none_or(|last| last.name != SKIPPED_CHECKS_NAME) {
                self.checks.push(Check { name: name.into(), problem: found.err() });
                let problem = format!(
                    "skipped, because {MAX_CONSECUTIVE_TIMEOUTS} calls in a row ran out of time"
                );
                self.checks
                    .push(Check { name: SKIPPED_CHECKS_NAME.into(), problem: Some(problem) });
            }
            return;
        }
        self.checks.push(Check { name: name.into(), problem: found.err() });
    }

    async fn begin(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        request: &Request,
    ) -> Result<Step, CallError> {
        if self.is_aborted() {
            return Self::skipped(plugin, "begin");
        }
        let start = now();
        let step = plugin.begin(&tenant.into(), || request.clone()).await;
        self.begin.record(start, plugin);
        self.count_timeout(&step);
        step
    }

    async fn resume(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        state: &[u8],
        mut outcome: Outcome,
    ) -> Result<Step, CallError> {
        if self.is_aborted() {
            return Self::skipped(plugin, "resume");
        }
        let start = now();
        let step = plugin.resume(&tenant.into(), state, &mut outcome).await;
        self.resume.record(start, plugin);
        self.count_timeout(&step);
        step
    }

    async fn validate(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        batch: &BatchContext,
        lines: &[Line],
    ) -> Result<Vec<Violation>, CallError> {
        if self.is_aborted() {
            return Self::skipped(plugin, "validate");
        }
        let start = now();
        let found = plugin.validate(&tenant.into(), batch.clone(), lines.to_vec()).await;
        self.validate.record(start, plugin);
        self.count_timeout(&found);
        found.map(|ValidationReport { mut violations, .. }| {
            // The order of the violations does not matter.
            violations.sort_by(|one, other| {
                (one.line, &one.code, &one.param, &one.message).cmp(&(
                    other.line,
                    &other.code,
                    &other.param,
                    &other.message,
                ))
            });
            violations
        })
    }
}

pub(crate) fn request(endpoint: &str, body: &str) -> Request {
    Request {
        id: format!("batch_req_{}", "0".repeat(32)),
        custom_id: "case".into(),
        endpoint: endpoint.into(),
        model: "m".into(),
        body: body.into(),
        created_at: 1_700_000_000,
        attempt: 1,
    }
}

pub(crate) fn context(endpoint: &str) -> BatchContext {
    let metadata = vec![("team".into(), "research".into())];
    BatchContext {
        id: format!("batch_{}", "0".repeat(32)),
        endpoint: endpoint.into(),
        metadata,
        first_model: Some("m".into()),
    }
}

/// Checks that two instances returned equal results. A failed call is a problem too.
pub(crate) fn check_equal<T: Debug>(
    one: &Result<T, CallError>,
    other: &Result<T, CallError>,
) -> Result<(), String> {
    match (one, other) {
        (Err(error), _) | (_, Err(error)) => Err(error.detail()),
        (Ok(one), Ok(other)) => {
            let (one, other) = (format!("{one:?}"), format!("{other:?}"));
            if one == other {
                Ok(())
            } else {
                Err(format!("two instances differ: {} and {}", truncate(&one), truncate(&other)))
            }
        }
    }
}

/// Returns the first 300 characters of a text.
fn truncate(text: &str) -> String {
    text.chars().take(300).collect()
}
