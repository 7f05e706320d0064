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

mod cases;
mod inputs;
mod mutations;

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant};

use batchwright_domain::endpoint::Endpoint;
use batchwright_egress::{HttpResponse, TransportError};
use rustix::time::{ClockId, clock_gettime};

use crate::contract::types::{
    Answer, BatchContext, Kind, Line, Outcome, Request, Step, ValidationReport, Violation,
};
use crate::error::CallError;
use crate::plugin::Plugin;
use inputs::{
    ENDPOINTS, FAULTS, INPUT_LINES, ODD_BODIES, ODD_RESPONSE_BODIES, ODD_RETRY_AFTER_VALUES,
    OTHER_BODY,
};

/// Tenant of the first instance.
const FIRST_TENANT: &str = "one";

/// Tenant of the second instance. A result must not depend on calls of the first instance.
const SECOND_TENANT: &str = "two";

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

    /// Runs the checks of an adapter.
    async fn adapter(&mut self, plugin: &Plugin) {
        let handled: Vec<_> =
            ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(*endpoint)).collect();
        if handled.is_empty() {
            self.record(
                "handles an endpoint",
                Err("`describe` names no endpoint of the Batch API".into()),
            );
        }
        for (endpoint, body) in &handled {
            let endpoint = endpoint.as_str();
            let good = request(endpoint, body);
            let (first_step, same) = self.begin_twice(plugin, &good).await;
            self.record(
                format!("{endpoint}: `begin` returns the same step from every instance"),
                same,
            );
            if let Some(Step::Send { request, .. }) = &first_step {
                let sendable =
                    plugin.gateway().check(request).map_err(|error| error.detail().to_owned());
                self.record(
                    format!("{endpoint}: the host accepts the adapter's request"),
                    sendable,
                );
            }
            // Now the second instance saw another request last. A plugin that keeps a request
            // outside of the state fails the checks of `resume`.
            let other = Request {
                custom_id: "other".into(),
                model: "other".into(),
                ..request(endpoint, OTHER_BODY)
            };
            self.begin(plugin, SECOND_TENANT, &other).await.ok();
            if let Some(Step::Send { state, .. } | Step::Wait { state, .. }) = first_step {
                self.outcomes(plugin, endpoint, &state).await;
            }
            for (place, body) in ODD_BODIES.iter().enumerate() {
                let (_, same) = self.begin_twice(plugin, &request(endpoint, body)).await;
                self.record(format!("{endpoint}: odd body {}", place + 1), same);
            }
            let deep = format!(
                r#"{{"model":"m","messages":[],"x":{}{}}}"#,
                "[".repeat(5000),
                "]".repeat(5000)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &deep)).await;
            self.record(format!("{endpoint}: a body nested 5,000 levels deep"), same);
            let long = format!(
                r#"{{"model":"m","input":"{0}","prompt":"{0}","messages":[]}}"#,
                "x".repeat(1 << 20)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &long)).await;
            self.record(format!("{endpoint}: a body of 1 MiB"), same);
        }
        if plugin.handles(Endpoint::ChatCompletions) {
            let robot = r#"{"model":"m","messages":[{"role":"robot","content":"x"}]}"#;
            let step =
                self.begin(plugin, FIRST_TENANT, &request("/v1/chat/completions", robot)).await;
            let refused = match step {
                Ok(Step::Done(Answer::Failure(_))) => Ok(()),
                Ok(Step::Done(Answer::Response(response))) if response.status >= 400 => Ok(()),
                Ok(_) => Err("a message with the role `robot` is not refused; the contract of \
                              `begin` requires it"
                    .into()),
                Err(error) => Err(error.detail()),
            };
            self.record("refuses an unknown role before anything is sent", refused);
        }
        if plugin.classifies(true) {
            self.classification(plugin).await;
        }
        let foreign = self.resume(plugin, SECOND_TENANT, b"not its own", Outcome::Elapsed).await;
        self.record(
            "`resume` handles a state that the plugin did not return",
            foreign.map(drop).map_err(|error| error.detail()),
        );
    }

    /// Begins a request on both instances, then again on the first, and compares the steps.
    async fn begin_twice(
        &mut self,
        plugin: &Plugin,
        request: &Request,
    ) -> (Option<Step>, Result<(), String>) {
        let first = self.begin(plugin, FIRST_TENANT, request).await;
        let others = [
            self.begin(plugin, SECOND_TENANT, request).await,
            self.begin(plugin, FIRST_TENANT, request).await,
        ];
        let same = others.iter().try_for_each(|other| check_equal(&first, other));
        (first.ok(), same)
    }

    /// Classifies odd responses on both instances and compares the results.
    async fn classification(&mut self, plugin: &Plugin) {
        for status in [200, 204, 400, 401, 403, 429, 500, 503, 599] {
            let mut found = Ok(());
            for body in ODD_RESPONSE_BODIES {
                let headers = vec![("retry-after".to_owned(), "soon".to_owned())];
                let response = HttpResponse { status, headers, body: body.to_vec() };
                let (one, two) = (
                    plugin.classify(&FIRST_TENANT.into(), &response).await,
                    plugin.classify(&SECOND_TENANT.into(), &response).await,
                );
                found = found.and(check_equal(&one, &two));
            }
            self.record(
                format!("`classify` returns the same result from every instance, status {status}"),
                found,
            );
        }
    }

    /// Resumes with every outcome of an exchange on both instances and compares the steps.
    async fn outcomes(&mut self, plugin: &Plugin, endpoint: &str, state: &[u8]) {
        for status in
            [200, 201, 204, 301, 400, 401, 404, 408, 409, 413, 429, 500, 502, 503, 529, 599]
        {
            let mut found = Ok(());
            for body in ODD_RESPONSE_BODIES {
                let outcome = || {
                    let headers = vec![
                        ("content-type".to_owned(), "application/json".to_owned()),
                        ("retry-after".to_owned(), "Wed, 21 Oct 2015 07:28:00 GMT".to_owned()),
                    ];
                    Outcome::Response(HttpResponse { status, headers, body: body.to_vec() })
                };
                let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
                let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
                found = found.and(check_equal(&one, &two)).map_err(|problem| {
                    format!(
                        "{problem}; the body was {}",
                        String::from_utf8_lossy(body).escape_debug()
                    )
                });
            }
            self.record(format!("{endpoint}: responses with status {status}"), found);
        }
        for value in ODD_RETRY_AFTER_VALUES {
            let outcome = || {
                let headers = vec![("retry-after".to_owned(), value.to_owned())];
                Outcome::Response(HttpResponse { status: 429, headers, body: b"{}".to_vec() })
            };
            let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
            let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
            let shown: String = value.chars().take(20).collect();
            self.record(
                format!("{endpoint}: 429 with retry-after {shown}"),
                check_equal(&one, &two),
            );
        }
        let deep =
            format!(r#"{{"error":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000)).into_bytes();
        for status in [200, 503] {
            let response =
                Outcome::Response(HttpResponse { status, headers: Vec::new(), body: deep.clone() });
            let found = self.resume(plugin, FIRST_TENANT, state, response).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.record(
                format!("{endpoint}: a response with status {status}, nested 10,000 levels deep"),
                found,
            );
        }
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1 << 20));
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        let long =
            Outcome::Response(HttpResponse { status: 200, headers, body: long.into_bytes() });
        let found = self.resume(plugin, FIRST_TENANT, state, long).await;
        self.record(
            format!("{endpoint}: a response of 1 MiB"),
            found.map(drop).map_err(|error| error.detail()),
        );
        for fault in FAULTS {
            let outcome = || Outcome::Error(TransportError::new(fault, "It did not work."));
            let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
            let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
            self.record(
                format!("{endpoint}: {fault:?} instead of a response"),
                check_equal(&one, &two),
            );
        }
    }

    /// Runs the checks of a validator.
    async fn validator(&mut self, plugin: &Plugin) {
        let numbered = |texts: &[&str]| -> Vec<Line> {
            (1..)
                .zip(texts)
                .map(|(number, text)| Line { number, text: (*text).to_owned() })
                .collect()
        };
        let lines = numbered(&INPUT_LINES);
        for (endpoint, _) in ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(*endpoint)) {
            let endpoint = endpoint.as_str();
            let batch = context(endpoint);
            let whole = self.validate(plugin, FIRST_TENANT, &batch, &lines).await;
            let again = self.validate(plugin, SECOND_TENANT, &batch, &lines).await;
            self.record(
                format!("{endpoint}: `validate` returns the same violations from every instance"),
                check_equal(&whole, &again),
            );
            let mut one_by_one = Ok(Vec::new());
            for line in &lines {
                let found =
                    self.validate(plugin, FIRST_TENANT, &batch, std::slice::from_ref(line)).await;
                one_by_one = one_by_one.and_then(|mut all: Vec<Violation>| {
                    all.extend(found?);
                    Ok(all)
                });
            }
            self.record(
                format!("{endpoint}: `validate` returns the same violations line by line"),
                check_equal(&whole, &one_by_one),
            );
            let bare =
                BatchContext { metadata: Vec::new(), first_model: None, ..context(endpoint) };
            let found = self.validate(plugin, FIRST_TENANT, &bare, &lines).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.record(
                format!("{endpoint}: a batch without metadata whose first line names no model"),
                found,
            );
            let none = self.validate(plugin, FIRST_TENANT, &batch, &[]).await;
            self.record(
                format!("{endpoint}: no violations without lines"),
                match none {
                    Ok(found) if found.is_empty() => Ok(()),
                    Ok(found) => Err(format!("found {found:?}")),
                    Err(error) => Err(error.detail()),
                },
            );
        }
        let batch = context("/v1/chat/completions");
        let long = format!(r#"{{"custom_id":"{}"}}"#, "x".repeat(1 << 20));
        let deep =
            format!(r#"{{"custom_id":"a","body":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        for (name, text) in
            [("a line of 1 MiB", &long), ("a line nested 10,000 levels deep", &deep)]
        {
            let found = self.validate(plugin, FIRST_TENANT, &batch, &numbered(&[text])).await;
            self.record(name, found.map(drop).map_err(|error| error.detail()));
        }
        let many: Vec<&str> = INPUT_LINES.iter().copied().cycle().take(1000).collect();
        let found = self.validate(plugin, FIRST_TENANT, &batch, &numbered(&many)).await;
        self.record("1,000 lines in one call", found.map(drop).map_err(|error| error.detail()));
    }
}

fn request(endpoint: &str, body: &str) -> Request {
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

fn context(endpoint: &str) -> BatchContext {
    let metadata = vec![("team".into(), "research".into())];
    BatchContext {
        id: format!("batch_{}", "0".repeat(32)),
        endpoint: endpoint.into(),
        metadata,
        first_model: Some("m".into()),
    }
}

/// Checks that two instances returned equal results. A failed call is a problem too.
fn check_equal<T: Debug>(
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
