//! Recorded conversations, which an author keeps beside a component.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::inputs::FAULTS;
use super::mutations;
use super::{ONE, Report, TWO, context, cut, request};
use crate::egress::{Fault, HttpResponse, TransportError};
use crate::plugin::error::CallError;
use crate::plugin::plugin::Plugin;
use crate::plugin::types::{Answer, BatchContext, Kind, Line, Outcome, Step};

/// A recorded case: a file that an author adds.
enum Case {
    Adapter(AdapterCase),
    Validator(ValidatorCase),
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterCase {
    request: CaseRequest,
    exchanges: Vec<Exchange>,
    answer: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ValidatorCase {
    batch: CaseBatch,
    lines: Vec<String>,
    violations: Vec<Value>,
}

#[derive(Clone, Deserialize)]
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

/// What the adapter is to send, as far as it is said, and what comes of it; or the end of a pause that it asked for.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exchange {
    #[serde(default)]
    request: Value,
    response: Option<CaseResponse>,
    /// A fault as the contract names it, such as `timeout`.
    error: Option<String>,
    #[serde(default)]
    elapsed: bool,
}

impl Exchange {
    fn outcome(self) -> Result<Outcome, String> {
        match (self.response, self.error, self.elapsed) {
            (Some(CaseResponse { status, headers, body }), None, false) => {
                let body =
                    body.as_str().map_or_else(|| body.to_string(), str::to_owned).into_bytes();
                Ok(Outcome::Response(HttpResponse {
                    status,
                    headers: headers.into_iter().collect(),
                    body,
                }))
            }
            (None, Some(name), false) => {
                let named = |fault: &&Fault| {
                    format!("{fault:?}").eq_ignore_ascii_case(&name.replace('-', ""))
                };
                let fault = *FAULTS
                    .iter()
                    .find(named)
                    .ok_or_else(|| format!("`{name}` is no fault of the contract"))?;
                Ok(Outcome::Error(TransportError::new(fault, "It did not work.")))
            }
            (None, None, true) => Ok(Outcome::Elapsed),
            _ => Err("has one of `response`, `error` and `elapsed`".into()),
        }
    }
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseResponse {
    status: u16,
    #[serde(default)]
    headers: std::collections::BTreeMap<String, String>,
    body: Value,
}

impl Report {
    /// Plays every case of a folder.
    pub(super) async fn cases(&mut self, plugin: &Plugin, folder: &Path) {
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) => {
                return self
                    .note(folder.display().to_string(), Err(format!("cannot be read: {error}")));
            }
        };
        let mut paths: Vec<_> = files.flatten().map(|file| file.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        if paths.is_empty() {
            self.note(folder.display().to_string(), Err("there is no .json file in it".into()));
        }
        for path in paths {
            let name = path
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let found = match read_case(&path) {
                Ok(Case::Adapter(case)) if plugin.kind == Kind::Adapter => {
                    let found = self.replay(plugin, case.clone()).await;
                    let has_response = |exchange: &Exchange| {
                        exchange.response.as_ref().is_some_and(|response| response.body.is_object())
                    };
                    if found.is_ok() && case.exchanges.iter().any(has_response) {
                        let mutated = self.mutate(plugin, case).await;
                        self.note(format!("case {name}, with changed responses"), mutated);
                    }
                    found
                }
                Ok(Case::Validator(case)) if plugin.kind == Kind::Validator => {
                    self.judge(plugin, case).await
                }
                Ok(_) => Err(format!(
                    "is a case for the other kind; this is a plugin of kind {}",
                    plugin.kind
                )),
                Err(error) => Err(error),
            };
            self.note(format!("case {name}"), found);
        }
    }

    /// Plays a recorded conversation; each step on the other instance.
    async fn replay(&mut self, plugin: &Plugin, case: AdapterCase) -> Result<(), String> {
        let AdapterCase { request: CaseRequest { endpoint, model, body }, exchanges, answer } =
            case;
        let mut asked = request(&endpoint, &body.to_string());
        asked.model =
            model.or_else(|| Some(body.get("model")?.as_str()?.to_owned())).unwrap_or_default();
        let failed = |error: CallError| error.detail();
        let mut step = self.begin(plugin, ONE, &asked).await.map_err(failed)?;
        for (place, (exchange, tenant)) in
            exchanges.into_iter().zip([TWO, ONE].into_iter().cycle()).enumerate()
        {
            let here = |problem: String| format!("exchange {}: {problem}", place + 1);
            let state = match step {
                Step::Send { request, state } if !exchange.elapsed => {
                    let headers: serde_json::Map<String, Value> = request
                        .headers
                        .iter()
                        .map(|(name, value)| (name.to_lowercase(), value.clone().into()))
                        .collect();
                    let sent = serde_json::json!({
                        "method": request.method, "url": request.url, "headers": headers, "body": as_json(&request.body),
                    });
                    contains(&sent, &exchange.request, "request").map_err(here)?;
                    state
                }
                Step::Wait { state, .. } if exchange.elapsed => state,
                step => {
                    let wanted = if exchange.elapsed { "to wait" } else { "to send" };
                    let problem = format!(
                        "the adapter was to ask {wanted}; it asks for {}",
                        cut(&shown(&step).to_string())
                    );
                    return Err(here(problem));
                }
            };
            step = self
                .resume(plugin, tenant, &state, exchange.outcome().map_err(here)?)
                .await
                .map_err(failed)?;
        }
        match &step {
            Step::Send { request, .. } if answer.get("send").is_none() => Err(format!(
                "the case has too few exchanges: the adapter sends {} {} next and waits for a response",
                request.method, request.url
            )),
            Step::Wait { milliseconds, .. } if answer.get("wait").is_none() => Err(format!(
                "the case has too few exchanges: the adapter waits {milliseconds} ms next; add {{\"elapsed\": true}}"
            )),
            step => contains(&shown(step), &answer, "answer"),
        }
    }

    /// Plays a conversation up to each of its responses, and changes that one: whatever comes, the adapter has an answer, the same from every
    /// instance, and sends nowhere else.
    async fn mutate(&mut self, plugin: &Plugin, case: AdapterCase) -> Result<(), String> {
        let AdapterCase { request: CaseRequest { endpoint, model, body }, exchanges, .. } = case;
        let mut asked = request(&endpoint, &body.to_string());
        asked.model =
            model.or_else(|| Some(body.get("model")?.as_str()?.to_owned())).unwrap_or_default();
        let failed = |error: CallError| error.detail();
        let mut step = self.begin(plugin, ONE, &asked).await.map_err(failed)?;
        for (place, exchange) in (1..).zip(exchanges) {
            let (Step::Send { state, .. } | Step::Wait { state, .. }) = step else { return Ok(()) };
            if let Some(response) = &exchange.response {
                for mutations::Mutation { change, body } in mutations::of(&response.body) {
                    let outcome = || {
                        let headers = response.headers.clone().into_iter().collect();
                        Outcome::Response(HttpResponse {
                            status: response.status,
                            headers,
                            body: body.clone().into_bytes(),
                        })
                    };
                    let one = self.resume(plugin, ONE, &state, outcome()).await;
                    let two = self.resume(plugin, TWO, &state, outcome()).await;
                    let here = |problem: String| {
                        format!("exchange {place}, its response with {change}: {problem}")
                    };
                    super::same(&one, &two).map_err(here)?;
                    // What an adapter polls for it asks for after its pause.
                    let next = match one {
                        Ok(Step::Wait { state, .. }) => {
                            self.resume(plugin, ONE, &state, Outcome::Elapsed).await
                        }
                        step => step,
                    };
                    if let Ok(Step::Send { request, .. }) = &next {
                        plugin
                            .gateway()
                            .check(request)
                            .map_err(|error| here(error.detail().to_owned()))?;
                        if ["../", "?y=1", "#z"].iter().any(|part| request.url.contains(part)) {
                            let problem = format!(
                                "it sends to {}, where the id leads elsewhere; encode it",
                                request.url
                            );
                            return Err(here(problem));
                        }
                    }
                }
            }
            step = self.resume(plugin, ONE, &state, exchange.outcome()?).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn judge(&mut self, plugin: &Plugin, case: ValidatorCase) -> Result<(), String> {
        let ValidatorCase { batch, lines, violations: expected } = case;
        let context = BatchContext {
            metadata: batch.metadata.into_iter().collect(),
            first_model: batch.first_model,
            ..context(&batch.endpoint)
        };
        let lines: Vec<Line> =
            (1..).zip(lines).map(|(number, text)| Line { number, text }).collect();
        let found =
            self.validate(plugin, ONE, &context, &lines).await.map_err(|error| error.detail())?;
        let mut found: Vec<Value> = found
            .into_iter()
            .map(|found| {
                serde_json::json!({"line": found.line, "code": found.code, "message": found.message, "param": found.param})
            })
            .collect();
        if found.len() != expected.len() {
            return Err(format!(
                "there are {} findings and not {}: {found:?}",
                found.len(),
                expected.len()
            ));
        }
        // They may stand in any order.
        for expected in &expected {
            match found.iter().position(|found| contains(found, expected, "violations").is_ok()) {
                Some(place) => drop(found.remove(place)),
                None => {
                    let line = found.iter().find(|found| found.get("line") == expected.get("line"));
                    return contains(line.unwrap_or(&Value::Null), expected, "violations");
                }
            }
        }
        Ok(())
    }
}

fn read_case(path: &Path) -> Result<Case, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| format!("is not JSON: {error}"))?;
    let is_no_case = |error: serde_json::Error| format!("is no case: {error}");
    match (value.get("request"), value.get("batch")) {
        (Some(_), None) => serde_json::from_value(value).map(Case::Adapter).map_err(is_no_case),
        (None, Some(_)) => serde_json::from_value(value).map(Case::Validator).map_err(is_no_case),
        _ => {
            Err("is no case: one has `request`, `exchanges` and `answer`, or `batch`, `lines` and `violations`".into())
        }
    }
}

fn as_json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into())
}

/// A step as a case has it.
fn shown(step: &Step) -> Value {
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
        Answer::Failure(failure) => {
            serde_json::json!({"code": failure.code, "message": failure.message})
        }
    };
    match step {
        Step::Done(done) => answer(done),
        Step::Retry { after_milliseconds, otherwise } => {
            serde_json::json!({"retry": {"after_milliseconds": after_milliseconds, "otherwise": answer(otherwise)}})
        }
        Step::Wait { milliseconds, state } => {
            serde_json::json!({"wait": milliseconds, "state": as_json(state)})
        }
        Step::Send { request, state } => serde_json::json!({
            "send": {"method": request.method, "url": request.url}, "state": as_json(state),
        }),
    }
}

/// Whether everything that is expected is there; of an object only the members that are named.
fn contains(found: &Value, expected: &Value, place: &str) -> Result<(), String> {
    match (found, expected) {
        (_, Value::Null) if place == "request" => Ok(()),
        (Value::Object(found), Value::Object(expected)) => {
            expected.iter().try_for_each(|(key, value)| {
                let place = format!("{place}.{key}");
                match found.get(key) {
                    Some(found) => contains(found, value, &place),
                    None => Err(format!("{place} is missing")),
                }
            })
        }
        (Value::Array(found), Value::Array(expected)) if found.len() == expected.len() => {
            (0..).zip(found.iter().zip(expected)).try_for_each(|(index, (found, expected))| {
                contains(found, expected, &format!("{place}[{index}]"))
            })
        }
        _ if found == expected => Ok(()),
        _ => Err(format!(
            "{place} is {}, expected was {}",
            cut(&found.to_string()),
            cut(&expected.to_string())
        )),
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
