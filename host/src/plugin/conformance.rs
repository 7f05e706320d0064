//! Is a component what the contract asks for? It is given good, odd and hostile input, and what its author recorded; whatever it does is
//! noted.
//!
//! Two tenants stand for two instances: a plugin is pure, so both must say the same, also when they are asked again.

use std::fmt::Debug;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::error::CallError;
use super::plugin::Plugin;
use super::types::{BatchContext, Kind, Line, Outcome, Request, Step, Violation};
use crate::egress::{Fault, HttpResponse, TransportError};

/// Tenants of the two instances; what one was told the other must not need to know.
const ONE: &str = "one";
const TWO: &str = "two";

const ENDPOINTS: [(&str, &str); 5] = [
    ("/v1/chat/completions", r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#),
    ("/v1/completions", r#"{"model":"m","prompt":"hi"}"#),
    ("/v1/embeddings", r#"{"model":"m","input":["a","b"]}"#),
    ("/v1/responses", r#"{"model":"m","input":"hi"}"#),
    ("/v1/moderations", r#"{"model":"m","input":"hi"}"#),
];

/// Bodies that a client may send and that validators may have let through.
const ODD_BODIES: [&str; 9] = [
    "{}",
    r#"{"model":"m","messages":[]}"#,
    r#"{"model":"m","messages":null,"input":null,"prompt":null}"#,
    r#"{"model":"m","messages":[{"role":"user","content":7},7,null,[]]}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"\u0000 ü 😀 \ud83d\ude00"}],"n":1e999}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"\ud800"}],"\udfff":1}"#,
    r#"{"model":"m","model":"n","messages":[{"role":"user","content":"x"}]}"#,
    r#"{"model":"m","messages":[{"role":"user","content":[{"type":"nobody knows"}]}],"tools":"x","stop":{}}"#,
    r#"{"model":"m","input":{"a":[[[[[[[[]]]]]]]]},"prompt":[[1,2],[3]]}"#,
];

/// Bodies that a provider may answer with.
const ODD_ANSWERS: [&[u8]; 10] = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"<html><body>an error page</body></html>",
    b"{\"error\":\"as a string\"}",
    b"{\"error\":{\"message\":\"m\",\"type\":\"t\"}}",
    b"{\"choices\":[],\"usage\":{\"prompt_tokens\":-1}}",
    b"\xff\xfe not UTF-8",
    b"{\"message\":{\"content\":null},\"content\":[{\"type\":\"text\"}],\"usage\":7",
];

const FAULTS: [Fault; 7] = [
    Fault::NameResolution,
    Fault::Connection,
    Fault::Tls,
    Fault::Timeout,
    Fault::Protocol,
    Fault::TooLarge,
    Fault::NotAllowed,
];

/// Lines of an input file, good and bad.
const LINES: [&str; 14] = [
    r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"hi"}]}}"#,
    r#"{"custom_id":"b","method":"POST","url":"/v1/embeddings","body":{"model":"m","input":"hi"}}"#,
    "{}",
    "[]",
    "null",
    "7",
    "\"text\"",
    "no json",
    "{\"custom_id\":",
    r#"{"custom_id":7,"method":[],"url":{},"body":"x"}"#,
    r#"{"custom_id":"\ud800","method":"POST","url":"/v1/chat/completions","body":{"\udfff":1e999}}"#,
    "{\"custom_id\":\"\u{0}\u{1}\"}",
    r#"{"custom_id":"ü😀","method":"get","url":"","body":{"model":null,"messages":{},"stream":"yes"}}"#,
    r#"{"custom_id":"c","custom_id":"d","body":{},"body":[]}"#,
];

/// How one check went.
pub struct Check {
    pub name: String,
    /// What is wrong; none if nothing is.
    pub problem: Option<String>,
}

/// How long the calls of a function took, on the clock of an idle machine.
pub struct Timing {
    pub function: &'static str,
    pub calls: usize,
    pub median: Duration,
    pub longest: Duration,
}

#[derive(Default)]
pub struct Report {
    pub checks: Vec<Check>,
    pub timings: Vec<Timing>,
    /// Linear memory of the instance that holds most, in bytes.
    pub memory: usize,
    begin: Vec<Duration>,
    resume: Vec<Duration>,
    validate: Vec<Duration>,
}

/// A recorded case: a file that an author adds.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Case {
    Adapter { request: CaseRequest, exchanges: Vec<Exchange>, answer: Value },
    Validator { batch: CaseBatch, lines: Vec<String>, violations: Vec<Value> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseRequest {
    endpoint: String,
    #[serde(default)]
    model: Option<String>,
    body: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseBatch {
    endpoint: String,
    #[serde(default)]
    metadata: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    first_model: Option<String>,
}

/// What the adapter is to send, as far as it is said, and what comes back.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Exchange {
    #[serde(default)]
    request: Value,
    response: CaseResponse,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseResponse {
    status: u16,
    #[serde(default)]
    headers: std::collections::BTreeMap<String, String>,
    body: Value,
}

/// Runs all checks, and the cases of a folder.
pub async fn check(plugin: &Plugin, cases: Option<&Path>) -> Report {
    let mut report = Report::default();
    match plugin.kind {
        Kind::Adapter => report.adapter(plugin).await,
        Kind::Validator => report.validator(plugin).await,
    }
    if let Some(folder) = cases {
        report.cases(plugin, folder).await;
    }
    report.memory = plugin.most_memory();
    for (function, times) in
        [("begin", &mut report.begin), ("resume", &mut report.resume), ("validate", &mut report.validate)]
    {
        times.sort_unstable();
        if let (Some(median), Some(longest)) = (times.get(times.len() / 2), times.last()) {
            let (median, longest) = (*median, *longest);
            report.timings.push(Timing { function, calls: times.len(), median, longest });
        }
    }
    report
}

impl Report {
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|check| check.problem.is_some()).count()
    }

    fn note(&mut self, name: impl Into<String>, found: Result<(), String>) {
        self.checks.push(Check { name: name.into(), problem: found.err() });
    }

    async fn begin(&mut self, plugin: &Plugin, tenant: &str, request: &Request) -> Result<Step, CallError> {
        let begun = Instant::now();
        let step = plugin.begin(tenant, request.clone()).await;
        self.begin.push(begun.elapsed());
        step
    }

    async fn resume(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        state: &[u8],
        outcome: Outcome,
    ) -> Result<Step, CallError> {
        let begun = Instant::now();
        let step = plugin.resume(tenant, state, outcome).await;
        self.resume.push(begun.elapsed());
        step
    }

    async fn validate(
        &mut self,
        plugin: &Plugin,
        tenant: &str,
        batch: &BatchContext,
        lines: &[Line],
    ) -> Result<Vec<Violation>, CallError> {
        let begun = Instant::now();
        let found = plugin.validate(tenant, batch.clone(), lines.to_vec()).await;
        self.validate.push(begun.elapsed());
        found.map(|mut violations| {
            violations.sort_by_key(|violation| violation.line);
            violations
        })
    }

    async fn adapter(&mut self, plugin: &Plugin) {
        let handled: Vec<_> = ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(endpoint)).collect();
        if handled.is_empty() {
            self.note("handles an endpoint", Err("`describe` names no endpoint of the Batch API".into()));
        }
        for (endpoint, body) in &handled {
            let good = request(endpoint, body);
            let (begun, same) = self.begin_twice(plugin, &good).await;
            self.note(format!("{endpoint}: begins, the same from every instance"), same);
            if let Some(Step::Send { state, .. } | Step::Wait { state, .. }) = begun {
                self.outcomes(plugin, endpoint, &state).await;
            }
            for (place, body) in ODD_BODIES.iter().enumerate() {
                let (_, same) = self.begin_twice(plugin, &request(endpoint, body)).await;
                self.note(format!("{endpoint}: odd body {}", place + 1), same);
            }
            let long = format!(r#"{{"model":"m","input":"{0}","prompt":"{0}","messages":[]}}"#, "x".repeat(1 << 20));
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &long)).await;
            self.note(format!("{endpoint}: a body of a MiB"), same);
        }
        if plugin.handles("/v1/chat/completions") {
            let robot = r#"{"model":"m","messages":[{"role":"robot","content":"x"}]}"#;
            let refused = match self.begin(plugin, ONE, &request("/v1/chat/completions", robot)).await {
                Ok(Step::Done(_)) => Ok(()),
                Ok(_) => Err("a message with the role `robot` is sent on; the contract has it refused".into()),
                Err(error) => Err(error.to_string()),
            };
            self.note("refuses an unknown role before anything is sent", refused);
        }
        let stranger = self.resume(plugin, TWO, b"not its own", Outcome::Elapsed).await;
        self.note("takes a state that is not its own", stranger.map(drop).map_err(|error| error.to_string()));
    }

    async fn begin_twice(&mut self, plugin: &Plugin, request: &Request) -> (Option<Step>, Result<(), String>) {
        let first = self.begin(plugin, ONE, request).await;
        let others = [self.begin(plugin, TWO, request).await, self.begin(plugin, ONE, request).await];
        let same = others.iter().try_for_each(|other| same(&first, other));
        (first.ok(), same)
    }

    /// Every outcome of an exchange, on both instances.
    async fn outcomes(&mut self, plugin: &Plugin, endpoint: &str, state: &[u8]) {
        for status in [200, 201, 204, 301, 400, 401, 404, 408, 409, 413, 429, 500, 502, 503, 529, 599] {
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
                    format!("{problem}; the body was {}", String::from_utf8_lossy(body).escape_debug())
                });
            }
            self.note(format!("{endpoint}: answers of status {status}"), found);
        }
        for fault in FAULTS {
            let outcome = || Outcome::Error(TransportError { fault, message: "It did not work.".into() });
            let one = self.resume(plugin, ONE, state, outcome()).await;
            let two = self.resume(plugin, TWO, state, outcome()).await;
            self.note(format!("{endpoint}: {fault:?} in place of an answer"), same(&one, &two));
        }
    }

    async fn validator(&mut self, plugin: &Plugin) {
        let numbered = |texts: &[&str]| -> Vec<Line> {
            (1..).zip(texts).map(|(number, text)| Line { number, text: (*text).to_owned() }).collect()
        };
        let lines = numbered(&LINES);
        for (endpoint, _) in ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(endpoint)) {
            let batch = context(endpoint);
            let whole = self.validate(plugin, ONE, &batch, &lines).await;
            let again = self.validate(plugin, TWO, &batch, &lines).await;
            self.note(format!("{endpoint}: judges odd lines, the same from every instance"), same(&whole, &again));
            let mut one_by_one = Ok(Vec::new());
            for line in &lines {
                let found = self.validate(plugin, ONE, &batch, std::slice::from_ref(line)).await;
                one_by_one = one_by_one.and_then(|mut all: Vec<Violation>| {
                    all.extend(found?);
                    Ok(all)
                });
            }
            self.note(format!("{endpoint}: judges each line alone as it does among others"), same(&whole, &one_by_one));
            let none = self.validate(plugin, ONE, &batch, &[]).await;
            self.note(
                format!("{endpoint}: no lines, no findings"),
                match none {
                    Ok(found) if found.is_empty() => Ok(()),
                    Ok(found) => Err(format!("found {found:?}")),
                    Err(error) => Err(error.to_string()),
                },
            );
        }
        let batch = context("/v1/chat/completions");
        let long = format!(r#"{{"custom_id":"{}"}}"#, "x".repeat(1 << 20));
        let deep = format!(r#"{{"custom_id":"a","body":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        for (name, text) in [("a line of a MiB", &long), ("a line nested 10,000 deep", &deep)] {
            let found = self.validate(plugin, ONE, &batch, &numbered(&[text])).await;
            self.note(name, found.map(drop).map_err(|error| error.to_string()));
        }
        let many: Vec<&str> = LINES.iter().copied().cycle().take(1000).collect();
        let found = self.validate(plugin, ONE, &batch, &numbered(&many)).await;
        self.note("a thousand lines in one call", found.map(drop).map_err(|error| error.to_string()));
    }

    async fn cases(&mut self, plugin: &Plugin, folder: &Path) {
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) => return self.note(folder.display().to_string(), Err(format!("cannot be read: {error}"))),
        };
        let mut paths: Vec<_> = files.flatten().map(|file| file.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        if paths.is_empty() {
            self.note(folder.display().to_string(), Err("there is no .json file in it".into()));
        }
        for path in paths {
            let found = match read_case(&path) {
                Ok(Case::Adapter { request, exchanges, answer }) if plugin.kind == Kind::Adapter => {
                    self.replay(plugin, request, exchanges, &answer).await
                }
                Ok(Case::Validator { batch, lines, violations }) if plugin.kind == Kind::Validator => {
                    self.judge(plugin, batch, lines, &violations).await
                }
                Ok(_) => Err(format!("is a case for the other kind; this is a plugin of kind {}", plugin.kind)),
                Err(error) => Err(error),
            };
            let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            self.note(format!("case {name}"), found);
        }
    }

    /// Plays a recorded conversation; each step on the other instance.
    async fn replay(
        &mut self,
        plugin: &Plugin,
        case: CaseRequest,
        exchanges: Vec<Exchange>,
        expected: &Value,
    ) -> Result<(), String> {
        let mut asked = request(&case.endpoint, &case.body.to_string());
        asked.model = case.model.or_else(|| Some(case.body.get("model")?.as_str()?.to_owned())).unwrap_or_default();
        let failed = |error: CallError| error.to_string();
        let mut step = self.begin(plugin, ONE, &asked).await.map_err(failed)?;
        for (place, (exchange, tenant)) in exchanges.into_iter().zip([TWO, ONE].into_iter().cycle()).enumerate() {
            let Step::Send { request, state } = step else {
                return Err(format!("exchange {}: the adapter sends nothing, its step is {step:?}", place + 1));
            };
            let headers: serde_json::Map<String, Value> =
                request.headers.iter().map(|(name, value)| (name.to_lowercase(), value.clone().into())).collect();
            let sent = serde_json::json!({
                "method": request.method, "url": request.url, "headers": headers, "body": as_json(&request.body),
            });
            contains(&sent, &exchange.request, "request")
                .map_err(|problem| format!("exchange {}: {problem}", place + 1))?;
            let CaseResponse { status, headers, body } = exchange.response;
            let body = body.as_str().map_or_else(|| body.to_string(), str::to_owned).into_bytes();
            let outcome = Outcome::Response(HttpResponse { status, headers: headers.into_iter().collect(), body });
            step = self.resume(plugin, tenant, &state, outcome).await.map_err(failed)?;
        }
        contains(&shown(&step), expected, "answer")
    }

    async fn judge(
        &mut self,
        plugin: &Plugin,
        batch: CaseBatch,
        lines: Vec<String>,
        expected: &[Value],
    ) -> Result<(), String> {
        let context = BatchContext {
            metadata: batch.metadata.into_iter().collect(),
            first_model: batch.first_model,
            ..context(&batch.endpoint)
        };
        let lines: Vec<Line> = (1..).zip(lines).map(|(number, text)| Line { number, text }).collect();
        let found = self.validate(plugin, ONE, &context, &lines).await.map_err(|error| error.to_string())?;
        let found: Vec<Value> = found
            .into_iter()
            .map(|found| {
                serde_json::json!({"line": found.line, "code": found.code, "message": found.message, "param": found.param})
            })
            .collect();
        if found.len() != expected.len() {
            return Err(format!("there are {} findings and not {}: {found:?}", found.len(), expected.len()));
        }
        found.iter().zip(expected).try_for_each(|(found, expected)| contains(found, expected, "violations"))
    }
}

fn read_case(path: &Path) -> Result<Case, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    serde_json::from_str(&text).map_err(|error| {
        format!(
            "is no case ({error}): one has `request`, `exchanges` and `answer`, or `batch`, `lines` and `violations`"
        )
    })
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
        (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
        (Ok(one), Ok(other)) => {
            let (one, other) = (format!("{one:?}"), format!("{other:?}"));
            if one == other { Ok(()) } else { Err(format!("two instances differ: {} and {}", cut(&one), cut(&other))) }
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(300).collect()
}

fn as_json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into())
}

/// A step as a case has it.
fn shown(step: &Step) -> Value {
    use super::types::Answer;
    let answer = |answer: &Answer| match answer {
        Answer::Response(response) => {
            let usage = response.usage.map(|usage| {
                serde_json::json!({
                    "input_tokens": usage.input_tokens, "cached_input_tokens": usage.cached_input_tokens,
                    "output_tokens": usage.output_tokens, "reasoning_tokens": usage.reasoning_tokens,
                })
            });
            serde_json::json!({"status": response.status, "body": as_json(response.body.as_bytes()), "usage": usage})
        }
        Answer::Failure(failure) => serde_json::json!({"code": failure.code, "message": failure.message}),
    };
    match step {
        Step::Done(done) => answer(done),
        Step::Retry { after_milliseconds, otherwise } => {
            serde_json::json!({"retry": {"after_milliseconds": after_milliseconds, "otherwise": answer(otherwise)}})
        }
        Step::Wait { milliseconds, .. } => serde_json::json!({"wait": milliseconds}),
        Step::Send { request, .. } => serde_json::json!({"send": {"method": request.method, "url": request.url}}),
    }
}

/// Whether everything that is expected is there; of an object only the members that are named.
fn contains(found: &Value, expected: &Value, place: &str) -> Result<(), String> {
    match (found, expected) {
        (_, Value::Null) if place == "request" => Ok(()),
        (Value::Object(found), Value::Object(expected)) => expected.iter().try_for_each(|(key, value)| {
            let place = format!("{place}.{key}");
            match found.get(key) {
                Some(found) => contains(found, value, &place),
                None => Err(format!("{place} is missing")),
            }
        }),
        (Value::Array(found), Value::Array(expected)) if found.len() == expected.len() => (0..)
            .zip(found.iter().zip(expected))
            .try_for_each(|(index, (found, expected))| contains(found, expected, &format!("{place}[{index}]"))),
        _ if found == expected => Ok(()),
        _ => Err(format!("{place} is {}, expected was {}", cut(&found.to_string()), cut(&expected.to_string()))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_expected_must_be_there_and_more_may() {
        let found = json!({"a": {"b": [1, {"c": "x", "d": 2}]}, "e": null});
        assert_eq!(contains(&found, &json!({"a": {"b": [1, {"c": "x"}]}}), "answer"), Ok(()));
        assert_eq!(contains(&found, &Value::Null, "request"), Ok(()));
        for (expected, problem) in [
            (json!({"a": {"b": [1]}}), "answer.a.b is [1,{\"c\":\"x\",\"d\":2}], expected was [1]"),
            (json!({"z": 1}), "answer.z is missing"),
            (json!({"a": {"b": [1, {"c": "y"}]}}), "answer.a.b[1].c is \"x\", expected was \"y\""),
            (json!({"e": 1}), "answer.e is null, expected was 1"),
        ] {
            assert_eq!(contains(&found, &expected, "answer"), Err(problem.to_owned()));
        }
    }
}
