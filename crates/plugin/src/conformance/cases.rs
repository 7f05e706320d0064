//! Recorded cases, which an author keeps beside a component.
//!
//! An adapter's case is a request, its exchanges and the final answer. A validator's case is a
//! batch, its lines and the expected violations. An expected value lists only the members that
//! matter; the actual value may have more.

use std::path::Path;

use batchwright_egress::HttpResponse;
use serde_json::Value;

use super::case_file::{AdapterCase, Case, CaseRequest, Exchange, ValidatorCase};
use super::{FIRST_TENANT, Report, SECOND_TENANT, context, mutations, request, truncate};
use crate::Plugin;
use crate::contract::types::{Answer, BatchContext, Kind, Line, Outcome, Step};
use crate::error::CallError;

impl Report {
    /// Runs every case of a folder.
    pub(crate) async fn cases(&mut self, plugin: &Plugin, folder: &Path) {
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) => {
                return self
                    .record(folder.display().to_string(), Err(format!("cannot be read: {error}")));
            }
        };
        let mut paths: Vec<_> = files.flatten().map(|file| file.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        if paths.is_empty() {
            self.record(folder.display().to_string(), Err("there is no .json file in it".into()));
        }
        for path in paths {
            let name = path
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let found = match read_case(&path) {
                Ok(Case::Adapter(case)) if plugin.kind() == Kind::Adapter => {
                    let found = self.replay(plugin, case.clone()).await;
                    let has_response = |exchange: &Exchange| {
                        exchange.response.as_ref().is_some_and(|response| response.body.is_object())
                    };
                    if found.is_ok() && case.exchanges.iter().any(has_response) {
                        let mutated = self.mutate(plugin, case).await;
                        self.record(format!("case {name}, with changed responses"), mutated);
                    }
                    found
                }
                Ok(Case::Validator(case)) if plugin.kind() == Kind::Validator => {
                    self.validate_case(plugin, case).await
                }
                Ok(_) => Err(format!(
                    "is a case for the other kind of plugin; this plugin is of kind {}",
                    plugin.kind()
                )),
                Err(error) => Err(error),
            };
            self.record(format!("case {name}"), found);
        }
    }

    /// Replays the exchanges of an adapter's case. The steps alternate between two instances.
    async fn replay(&mut self, plugin: &Plugin, case: AdapterCase) -> Result<(), String> {
        let AdapterCase { request: CaseRequest { endpoint, model, body }, exchanges, answer } =
            case;
        let mut case_request = request(&endpoint, &body.to_string());
        case_request.model =
            model.or_else(|| Some(body.get("model")?.as_str()?.to_owned())).unwrap_or_default();
        let failed = |error: CallError| error.detail();
        let mut step = self.begin(plugin, FIRST_TENANT, &case_request).await.map_err(failed)?;
        for (place, (exchange, tenant)) in
            exchanges.into_iter().zip([SECOND_TENANT, FIRST_TENANT].into_iter().cycle()).enumerate()
        {
            let locate = |problem: String| format!("exchange {}: {problem}", place + 1);
            let state = match step {
                Step::Send { request, state } if !exchange.elapsed => {
                    let headers: serde_json::Map<String, Value> = request
                        .headers
                        .iter()
                        .map(|(name, value)| (name.to_lowercase(), value.clone().into()))
                        .collect();
                    let sent = serde_json::json!({
                        "method": request.method,
                        "url": request.url,
                        "headers": headers,
                        "body": as_json(&request.body),
                    });
                    contains(&sent, &exchange.request, "request").map_err(locate)?;
                    state
                }
                Step::Wait { state, .. } if exchange.elapsed => state,
                step => {
                    let expected = if exchange.elapsed { "wait" } else { "send" };
                    let problem = format!(
                        "expected the adapter to {expected}, but it returned {}",
                        truncate(&step_to_json(&step).to_string())
                    );
                    return Err(locate(problem));
                }
            };
            step = self
                .resume(plugin, tenant, &state, exchange.outcome().map_err(locate)?)
                .await
                .map_err(failed)?;
        }
        match &step {
            Step::Send { request, .. } if answer.get("send").is_none() => Err(format!(
                "the case has too few exchanges: the adapter sends {} {} next and waits for a \
                 response",
                request.method, request.url
            )),
            Step::Wait { milliseconds, .. } if answer.get("wait").is_none() => Err(format!(
                "the case has too few exchanges: the adapter waits {milliseconds} ms next; add \
                 {{\"elapsed\": true}}"
            )),
            step => contains(&step_to_json(step), &answer, "answer"),
        }
    }

    /// Replays an adapter's case up to each response, and mutates that response.
    ///
    /// For each mutation, both instances must return the same step, and the next request must still
    /// be allowed.
    async fn mutate(&mut self, plugin: &Plugin, case: AdapterCase) -> Result<(), String> {
        let AdapterCase { request: CaseRequest { endpoint, model, body }, exchanges, .. } = case;
        let mut case_request = request(&endpoint, &body.to_string());
        case_request.model =
            model.or_else(|| Some(body.get("model")?.as_str()?.to_owned())).unwrap_or_default();
        let failed = |error: CallError| error.detail();
        let mut step = self.begin(plugin, FIRST_TENANT, &case_request).await.map_err(failed)?;
        for (place, exchange) in (1..).zip(exchanges) {
            let (Step::Send { state, .. } | Step::Wait { state, .. }) = step else { return Ok(()) };
            if let Some(response) = &exchange.response {
                for mutations::Mutation { change, body } in mutations::generate(&response.body) {
                    let outcome = || {
                        let headers = response.headers.clone().into_iter().collect();
                        Outcome::Response(HttpResponse {
                            status: response.status,
                            headers,
                            body: body.clone().into_bytes(),
                        })
                    };
                    let one = self.resume(plugin, FIRST_TENANT, &state, outcome()).await;
                    let two = self.resume(plugin, SECOND_TENANT, &state, outcome()).await;
                    let locate = |problem: String| {
                        format!("exchange {place}, its response with {change}: {problem}")
                    };
                    super::check_equal(&one, &two).map_err(locate)?;
                    // An adapter that polls sends its next request after the wait.
                    let next = match one {
                        Ok(Step::Wait { state, .. }) => {
                            self.resume(plugin, FIRST_TENANT, &state, Outcome::Elapsed).await
                        }
                        step => step,
                    };
                    if let Ok(Step::Send { request, .. }) = &next {
                        plugin
                            .gateway()
                            .check(request)
                            .map_err(|error| locate(error.detail().to_owned()))?;
                        if ["../", "?y=1", "#z"].iter().any(|part| request.url.contains(part)) {
                            let problem = format!(
                                "it sends to {}, where the id changes the path or the query; \
                                 percent-encode the id",
                                request.url
                            );
                            return Err(locate(problem));
                        }
                    }
                }
            }
            step = self
                .resume(plugin, FIRST_TENANT, &state, exchange.outcome()?)
                .await
                .map_err(failed)?;
        }
        Ok(())
    }

    /// Runs a validator's case and compares the violations.
    async fn validate_case(&mut self, plugin: &Plugin, case: ValidatorCase) -> Result<(), String> {
        let ValidatorCase { batch, lines, violations: expected } = case;
        let context = BatchContext {
            metadata: batch.metadata.into_iter().collect(),
            first_model: batch.first_model,
            ..context(&batch.endpoint)
        };
        let lines: Vec<Line> =
            (1..).zip(lines).map(|(number, text)| Line { number, text }).collect();
        let found = self
            .validate(plugin, FIRST_TENANT, &context, &lines)
            .await
            .map_err(|error| error.detail())?;
        let mut found: Vec<Value> = found
            .into_iter()
            .map(|found| {
                serde_json::json!({
                    "line": found.line,
                    "code": found.code,
                    "message": found.message,
                    "param": found.param,
                })
            })
            .collect();
        if found.len() != expected.len() {
            return Err(format!(
                "there are {} violations instead of {}: {found:?}",
                found.len(),
                expected.len()
            ));
        }
        // The order of the violations does not matter.
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
    let not_a_case = |error: serde_json::Error| format!("is not a case: {error}");
    match (value.get("request"), value.get("batch")) {
        (Some(_), None) => serde_json::from_value(value).map(Case::Adapter).map_err(not_a_case),
        (None, Some(_)) => serde_json::from_value(value).map(Case::Validator).map_err(not_a_case),
        _ => Err(
            "is not a case: a case has `request`, `exchanges` and `answer`, or `batch`, `lines` \
                 and `violations`"
                .into(),
        ),
    }
}

fn as_json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned().into())
}

/// Returns a step in the JSON form of a case.
fn step_to_json(step: &Step) -> Value {
    let answer = |answer: &Answer| match answer {
        Answer::Response(response) => {
            let usage = response.usage.map(|usage| {
                serde_json::json!({
                    "input_tokens": usage.input_tokens,
                    "cached_input_tokens": usage.cached_input_tokens,
                    "output_tokens": usage.output_tokens,
                    "reasoning_tokens": usage.reasoning_tokens,
                })
            });
            let body = as_json(response.body.as_bytes());
            serde_json::json!({"status": response.status, "body": body, "usage": usage})
        }
        Answer::Failure(failure) => {
            serde_json::json!({"code": failure.code, "message": failure.message})
        }
    };
    match step {
        Step::Done(done) => answer(done),
        Step::Retry { after_milliseconds, otherwise } => {
            serde_json::json!({
                "retry": {
                    "after_milliseconds": after_milliseconds,
                    "otherwise": answer(otherwise),
                },
            })
        }
        Step::Wait { milliseconds, state } => {
            serde_json::json!({"wait": milliseconds, "state": as_json(state)})
        }
        Step::Send { request, state } => serde_json::json!({
            "send": {"method": request.method, "url": request.url}, "state": as_json(state),
        }),
    }
}

/// Checks that a value contains the expected value. Objects may have additional members.
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
            "{place} is {}, expected {}",
            truncate(&found.to_string()),
            truncate(&expected.to_string())
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn contains_ignores_additional_members_and_names_the_first_difference() {
        let found = json!({"a": {"b": [1, {"c": "x", "d": 2}]}, "e": null});
        assert_eq!(contains(&found, &json!({"a": {"b": [1, {"c": "x"}]}}), "answer"), Ok(()));
        assert_eq!(contains(&found, &Value::Null, "request"), Ok(()));
        for (expected, problem) in [
            (json!({"a": {"b": [1]}}), "answer.a.b is [1,{\"c\":\"x\",\"d\":2}], expected [1]"),
            (json!({"z": 1}), "answer.z is missing"),
            (json!({"a": {"b": [1, {"c": "y"}]}}), "answer.a.b[1].c is \"x\", expected \"y\""),
            (json!({"e": 1}), "answer.e is null, expected 1"),
        ] {
            assert_eq!(contains(&found, &expected, "answer"), Err(problem.to_owned()));
        }
    }
}
