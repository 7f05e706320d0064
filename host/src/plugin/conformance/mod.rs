//! Is a component what the contract asks for? It is given good, odd and hostile input, and what its author recorded; whatever it does is
//! noted.
//!
//! Two tenants stand for two instances: a plugin is pure, so both must say the same, also when they are asked again.

mod cases;
mod inputs;
mod mutations;

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use inputs::{ENDPOINTS, FAULTS, LINES, ODD_ANSWERS, ODD_BODIES, ODD_RETRY_AFTER, OTHER_BODY};

use super::error::CallError;
use super::plugin::Plugin;
use super::types::{
    Answer, BatchContext, Judgement, Kind, Line, Outcome, Request, Step, Violation,
};
use crate::egress::{HttpResponse, TransportError};

/// Tenants of the two instances; what one was told the other must not need to know.
const ONE: &str = "one";
const TWO: &str = "two";

/// How one check went.
pub struct Check {
    pub name: String,
    /// What is wrong; none if nothing is.
    pub problem: Option<String>,
}

/// What the calls of one function took.
#[derive(Default)]
pub struct Calls {
    /// CPU time of each: theirs, and the host's for passing arguments and results.
    times: Vec<Duration>,
    /// The most linear memory an instance held after one, in bytes.
    pub memory: usize,
    /// The most time on the clock that a call took beyond its CPU time.
    waited: Duration,
}

impl Calls {
    pub fn count(&self) -> usize {
        self.times.len()
    }

    pub fn median(&self) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }

    pub fn longest(&self) -> Duration {
        self.times.iter().max().copied().unwrap_or_default()
    }

    fn note(&mut self, (begun, since): (Duration, Instant), plugin: &Plugin) {
        let time = cpu_time().saturating_sub(begun);
        self.waited = self.waited.max(since.elapsed().saturating_sub(time));
        self.times.push(time);
        self.memory = self.memory.max(plugin.most_memory());
    }
}

/// CPU time of this thread. A check is polled by one thread alone, and calls run where they are polled.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// When a call begins, on both clocks.
fn now() -> (Duration, Instant) {
    (cpu_time(), Instant::now())
}

/// A call that waits longer than this, on the clock, for anything but the processor.
const MAX_WAIT: Duration = Duration::from_secs(2);

/// Calls in a row that run out of time before the rest is not tried any more.
const MAX_OUT_OF_TIME: u32 = 3;

/// What stands for the checks that are not made.
const REST: &str = "the rest of the checks";

#[derive(Default)]
pub struct Report {
    pub checks: Vec<Check>,
    out_of_time: u32,
    begin: Calls,
    resume: Calls,
    validate: Calls,
}

/// Runs all checks, and the cases of a folder.
pub async fn check(plugin: &Plugin, cases: Option<&Path>) -> Report {
    let mut report = Report::default();
    let described = plugin.describe_again().await;
    report.note("`describe` says the same again, after `configure`", described);
    match plugin.kind {
        Kind::Adapter => report.adapter(plugin).await,
        Kind::Validator => report.validator(plugin).await,
    }
    if let Some(folder) = cases {
        report.cases(plugin, folder).await;
    }
    report.waits();
    report
}

impl Report {
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|check| check.problem.is_some()).count()
    }

    /// Each function that was called, with what its calls took.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, &Calls)> {
        let all = [("begin", &self.begin), ("resume", &self.resume), ("validate", &self.validate)];
        all.into_iter().filter(|(_, calls)| calls.count() > 0)
    }

    /// Whether enough calls ran out of time: each takes long, and the rest would say the same.
    fn gave_up(&self) -> bool {
        self.out_of_time >= MAX_OUT_OF_TIME
    }

    /// Takes note of how a call ended.
    fn ended<T>(&mut self, called: &Result<T, CallError>) {
        match called {
            Err(CallError::Cpu { .. } | CallError::Asleep { .. }) => {
                self.out_of_time = self.out_of_time.saturating_add(1)
            }
            _ if self.gave_up() => {}
            _ => self.out_of_time = 0,
        }
    }

    /// What a call is answered with once the plugin was given up.
    fn given_up<T>(plugin: &Plugin, function: &'static str) -> Result<T, CallError> {
        Err(CallError::Asleep { plugin: plugin.name.clone(), function })
    }

    /// A guest that waits holds an instance and its memory.
    fn waits(&mut self) {
        let waits: Vec<(&str, Duration)> =
            self.calls().map(|(function, calls)| (function, calls.waited)).collect();
        let longest = waits.into_iter().max_by_key(|(_, waited)| *waited);
        if let Some((function, waited)) =
            longest.filter(|(_, waited)| *waited > MAX_WAIT && !self.gave_up())
        {
            let problem = format!(
                "a call of `{function}` waited {waited:.1?}; a plugin has nothing to wait for"
            );
            self.note("does not wait", Err(problem));
        }
    }

    fn note(&mut self, name: impl Into<String>, found: Result<(), String>) {
        if self.gave_up() {
            if self.checks.last().is_none_or(|last| last.name != REST) {
                self.checks.push(Check { name: name.into(), problem: found.err() });
                let problem =
                    format!("not made, as {MAX_OUT_OF_TIME} calls in a row ran out of time");
                self.checks.push(Check { name: REST.into(), problem: Some(problem) });
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
        if self.gave_up() {
            return Self::given_up(plugin, "begin");
        }
        let begun = now();
        let step = plugin.begin(tenant, || request.clone()).await;
        self.begin.note(begun, plugin);
        self.ended(&step);
        step
    }

    async fn resume(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        state: &[u8],
        mut outcome: Outcome,
    ) -> Result<Step, CallError> {
        if self.gave_up() {
            return Self::given_up(plugin, "resume");
        }
        let begun = now();
        let step = plugin.resume(tenant, state, &mut outcome).await;
        self.resume.note(begun, plugin);
        self.ended(&step);
        step
    }

    async fn validate(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        batch: &BatchContext,
        lines: &[Line],
    ) -> Result<Vec<Violation>, CallError> {
        if self.gave_up() {
            return Self::given_up(plugin, "validate");
        }
        let begun = now();
        let found = plugin.validate(tenant, batch.clone(), lines.to_vec()).await;
        self.validate.note(begun, plugin);
        self.ended(&found);
        found.map(|Judgement { mut violations, .. }| {
            // They may stand in any order.
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

    async fn adapter(&mut self, plugin: &Plugin) {
        let handled: Vec<_> =
            ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(endpoint)).collect();
        if handled.is_empty() {
            self.note(
                "handles an endpoint",
                Err("`describe` names no endpoint of the Batch API".into()),
            );
        }
        for (endpoint, body) in &handled {
            let good = request(endpoint, body);
            let (begun, same) = self.begin_twice(plugin, &good).await;
            self.note(format!("{endpoint}: begins, the same from every instance"), same);
            if let Some(Step::Send { request, .. }) = &begun {
                let sendable =
                    plugin.gateway().check(request).map_err(|error| error.detail().to_owned());
                self.note(
                    format!("{endpoint}: what it sends is a request the host would send"),
                    sendable,
                );
            }
            // The other instance sees somebody else's request last: whoever keeps one outside of the state is found out.
            let other = Request {
                custom_id: "other".into(),
                model: "other".into(),
                ..request(endpoint, OTHER_BODY)
            };
            self.begin(plugin, TWO, &other).await.ok();
            if let Some(Step::Send { state, .. } | Step::Wait { state, .. }) = begun {
                self.outcomes(plugin, endpoint, &state).await;
            }
            for (place, body) in ODD_BODIES.iter().enumerate() {
                let (_, same) = self.begin_twice(plugin, &request(endpoint, body)).await;
                self.note(format!("{endpoint}: odd body {}", place + 1), same);
            }
            let deep = format!(
                r#"{{"model":"m","messages":[],"x":{}{}}}"#,
                "[".repeat(5000),
                "]".repeat(5000)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &deep)).await;
            self.note(format!("{endpoint}: a body nested 5,000 deep"), same);
            let long = format!(
                r#"{{"model":"m","input":"{0}","prompt":"{0}","messages":[]}}"#,
                "x".repeat(1 << 20)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &long)).await;
            self.note(format!("{endpoint}: a body of a MiB"), same);
        }
        if plugin.handles("/v1/chat/completions") {
            let robot = r#"{"model":"m","messages":[{"role":"robot","content":"x"}]}"#;
            let refused = match self.begin(plugin, ONE, &request("/v1/chat/completions", robot)).await {
                Ok(Step::Done(Answer::Failure(_))) => Ok(()),
                Ok(Step::Done(Answer::Response(response))) if response.status >= 400 => Ok(()),
                Ok(_) => Err("a message with the role `robot` is not refused, as `begin` of the contract asks".into()),
                Err(error) => Err(error.detail()),
            };
            self.note("refuses an unknown role before anything is sent", refused);
        }
        if plugin.classifies(true) {
            self.classification(plugin).await;
        }
        let stranger = self.resume(plugin, TWO, b"not its own", Outcome::Elapsed).await;
        self.note(
            "takes a state that is not its own",
            stranger.map(drop).map_err(|error| error.detail()),
        );
    }

    async fn begin_twice(
        &mut self,
        plugin: &Plugin,
        request: &Request,
    ) -> (Option<Step>, Result<(), String>) {
        let first = self.begin(plugin, ONE, request).await;
        let others =
            [self.begin(plugin, TWO, request).await, self.begin(plugin, ONE, request).await];
        let same = others.iter().try_for_each(|other| same(&first, other));
        (first.ok(), same)
    }

    /// What the adapter knows of odd responses, by both instances.
    async fn classification(&mut self, plugin: &Plugin) {
        for status in [200, 204, 400, 401, 403, 429, 500, 503, 599] {
            let mut found = Ok(());
            for body in ODD_ANSWERS {
                let headers = vec![("retry-after".to_owned(), "soon".to_owned())];
                let response = HttpResponse { status, headers, body: body.to_vec() };
                let (one, two) =
                    (plugin.classify(ONE, &response).await, plugin.classify(TWO, &response).await);
                found = found.and(same(&one, &two));
            }
            self.note(
                format!("classifies answers with status {status}, the same in every instance"),
                found,
            );
        }
    }

    /// Every outcome of an exchange, on both instances.
    async fn outcomes(&mut self, plugin: &Plugin, endpoint: &str, state: &[u8]) {
        for status in
            [200, 201, 204, 301, 400, 401, 404, 408, 409, 413, 429, 500, 502, 503, 529, 599]
        {
            let mut found = Ok(());
            for body in ODD_ANSWERS {
                let outcome = || {
                    let headers = vec![
                        ("content-type".to_owned(), "application/json".to_owned()),
                        ("retry-after".to_owned(), "Wed, 21 Oct 2015 07:28:00 GMT".to_owned()),
                    ];
                    Outcome::Response(HttpResponse { status, headers, body: body.to_vec() })
                };
                let one = self.resume(plugin, ONE, state, outcome()).await;
                let two = self.resume(plugin, TWO, state, outcome()).await;
                found = found.and(same(&one, &two)).map_err(|problem| {
                    format!(
                        "{problem}; the body was {}",
                        String::from_utf8_lossy(body).escape_debug()
                    )
                });
            }
            self.note(format!("{endpoint}: answers of status {status}"), found);
        }
        for value in ODD_RETRY_AFTER {
            let outcome = || {
                let headers = vec![("retry-after".to_owned(), value.to_owned())];
                Outcome::Response(HttpResponse { status: 429, headers, body: b"{}".to_vec() })
            };
            let one = self.resume(plugin, ONE, state, outcome()).await;
            let two = self.resume(plugin, TWO, state, outcome()).await;
            let shown: String = value.chars().take(20).collect();
            self.note(format!("{endpoint}: 429 with retry-after {shown}"), same(&one, &two));
        }
        let deep =
            format!(r#"{{"error":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000)).into_bytes();
        for status in [200, 503] {
            let answer =
                Outcome::Response(HttpResponse { status, headers: Vec::new(), body: deep.clone() });
            let found = self.resume(plugin, ONE, state, answer).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.note(
                format!("{endpoint}: an answer of status {status} nested 10,000 deep"),
                found,
            );
        }
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1 << 20));
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        let long =
            Outcome::Response(HttpResponse { status: 200, headers, body: long.into_bytes() });
        let found = self.resume(plugin, ONE, state, long).await;
        self.note(
            format!("{endpoint}: an answer of a MiB"),
            found.map(drop).map_err(|error| error.detail()),
        );
        for fault in FAULTS {
            let outcome = || Outcome::Error(TransportError::new(fault, "It did not work."));
            let one = self.resume(plugin, ONE, state, outcome()).await;
            let two = self.resume(plugin, TWO, state, outcome()).await;
            self.note(format!("{endpoint}: {fault:?} in place of an answer"), same(&one, &two));
        }
    }

    async fn validator(&mut self, plugin: &Plugin) {
        let numbered = |texts: &[&str]| -> Vec<Line> {
            (1..)
                .zip(texts)
                .map(|(number, text)| Line { number, text: (*text).to_owned() })
                .collect()
        };
        let lines = numbered(&LINES);
        for (endpoint, _) in ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(endpoint)) {
            let batch = context(endpoint);
            let whole = self.validate(plugin, ONE, &batch, &lines).await;
            let again = self.validate(plugin, TWO, &batch, &lines).await;
            self.note(
                format!("{endpoint}: judges odd lines, the same from every instance"),
                same(&whole, &again),
            );
            let mut one_by_one = Ok(Vec::new());
            for line in &lines {
                let found = self.validate(plugin, ONE, &batch, std::slice::from_ref(line)).await;
                one_by_one = one_by_one.and_then(|mut all: Vec<Violation>| {
                    all.extend(found?);
                    Ok(all)
                });
            }
            self.note(
                format!("{endpoint}: judges each line alone as it does among others"),
                same(&whole, &one_by_one),
            );
            let bare =
                BatchContext { metadata: Vec::new(), first_model: None, ..context(endpoint) };
            let found = self.validate(plugin, ONE, &bare, &lines).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.note(
                format!("{endpoint}: a batch without metadata whose first line names no model"),
                found,
            );
            let none = self.validate(plugin, ONE, &batch, &[]).await;
            self.note(
                format!("{endpoint}: no lines, no findings"),
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
        for (name, text) in [("a line of a MiB", &long), ("a line nested 10,000 deep", &deep)] {
            let found = self.validate(plugin, ONE, &batch, &numbered(&[text])).await;
            self.note(name, found.map(drop).map_err(|error| error.detail()));
        }
        let many: Vec<&str> = LINES.iter().copied().cycle().take(1000).collect();
        let found = self.validate(plugin, ONE, &batch, &numbered(&many)).await;
        self.note("a thousand lines in one call", found.map(drop).map_err(|error| error.detail()));
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

/// Whether two instances said the same; a call that failed is a problem by itself.
fn same<T: Debug>(one: &Result<T, CallError>, other: &Result<T, CallError>) -> Result<(), String> {
    match (one, other) {
        (Err(error), _) | (_, Err(error)) => Err(error.detail()),
        (Ok(one), Ok(other)) => {
            let (one, other) = (format!("{one:?}"), format!("{other:?}"));
            if one == other {
                Ok(())
            } else {
                Err(format!("two instances differ: {} and {}", cut(&one), cut(&other)))
            }
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(300).collect()
}
