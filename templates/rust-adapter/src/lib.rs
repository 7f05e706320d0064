//! Adapter that forwards chat completions to the provider at `base_url`.

use std::cell::RefCell;

use serde_json::{Map, Value, json};

wit_bindgen::generate!({ path: "wit", world: "adapter" });

use exports::batchwright::plugin::{inference::*, plugin};

struct Component;
export!(Component);

thread_local! {
    /// Base URL of the provider, without a slash at the end.
    static BASE_URL: RefCell<String> = RefCell::default();
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "{{name}}".into(),
            version: "0.1.0".into(),
            summary: "Forwards chat completions".into(),
            endpoints: vec!["/v1/chat/completions".into()],
            // The host adds the secret to each request. The plugin never sees it.
            credentials: vec![plugin::Credential {
                name: "api_key".into(),
                header: "authorization".into(),
                prefix: "Bearer ".into(),
                required: false,
            }],
            settings_schema: json!({
                "type": "object",
                "properties": {"base_url": {
                    "type": "string",
                    "pattern": "^https?://",
                    "description": "URL before /chat/completions",
                }},
                "required": ["base_url"],
                "additionalProperties": false,
            })
            .to_string(),
        }
    }

    fn configure(settings: String) -> Result<(), String> {
        let settings: Value = serde_json::from_str(&settings).map_err(|error| error.to_string())?;
        let base_url = settings["base_url"].as_str().ok_or("base_url is missing")?;
        BASE_URL.set(base_url.trim_end_matches('/').to_owned());
        Ok(())
    }
}

impl Guest for Component {
    /// Returns the request to send, or refuses it.
    fn begin(request: Request) -> Step {
        let mut body: Map<String, Value> = match serde_json::from_str(&request.body) {
            Ok(body) => body,
            Err(error) => {
                return Step::Done(failure(
                    "invalid_request",
                    format!("The body cannot be read: {error}."),
                ));
            }
        };
        for message in body.get("messages").and_then(Value::as_array).into_iter().flatten() {
            let role = message["role"].as_str().unwrap_or("none");
            if !["system", "developer", "user", "assistant", "tool", "function"].contains(&role) {
                return Step::Done(failure(
                    "invalid_request",
                    format!("Unknown message role: {role}"),
                ));
            }
        }
        body.insert("model".into(), request.model.into());
        Step::Send(Exchange {
            request: HttpRequest {
                method: "POST".into(),
                url: BASE_URL.with_borrow(|base_url| format!("{base_url}/chat/completions")),
                headers: vec![Header {
                    name: "content-type".into(),
                    value: "application/json".into(),
                }],
                body: Value::Object(body).to_string().into_bytes(),
            },
            // Data for `resume`, which may run in another instance.
            state: Vec::new(),
        })
    }

    /// Translates the response, or retries the request.
    fn resume(_state: Vec<u8>, outcome: Outcome) -> Step {
        let answer = match outcome {
            Outcome::Response(answer) => answer,
            Outcome::Error(error) => {
                let permanent =
                    matches!(error.fault, TransportFault::NotAllowed | TransportFault::TooLarge);
                let unreachable = failure("provider_unreachable", error.message);
                return if permanent { Step::Done(unreachable) } else { retry(None, unreachable) };
            }
            Outcome::Elapsed => {
                return Step::Done(failure("adapter_error", "This adapter never waits.".into()));
            }
        };
        let status = answer.status;
        let object = serde_json::from_slice::<Map<String, Value>>(&answer.body).ok();
        if (200..300).contains(&status) {
            return Step::Done(match object {
                Some(object) => response(status, usage(&object), object),
                None => failure(
                    "invalid_provider_response",
                    "The provider's answer is not a JSON object.".into(),
                ),
            });
        }
        let error = object.filter(|object| object.contains_key("error")).unwrap_or_else(|| {
            let message = format!("The provider answered with status {status}.");
            let error = json!({
                "message": message, "type": "provider_error", "param": null, "code": null,
            });
            Map::from_iter([("error".into(), error)])
        });
        let refused = response(status, None, error);
        if status == 429 || status >= 500 {
            retry(retry_after(&answer.headers), refused)
        } else {
            Step::Done(refused)
        }
    }
}

/// Returns the token usage of a chat completion.
fn usage(answer: &Map<String, Value>) -> Option<Usage> {
    let usage = answer.get("usage")?;
    Some(Usage {
        input_tokens: usage["prompt_tokens"].as_u64()?,
        cached_input_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
        output_tokens: usage["completion_tokens"].as_u64()?,
        reasoning_tokens: usage["completion_tokens_details"]["reasoning_tokens"]
            .as_u64()
            .unwrap_or(0),
    })
}

/// Returns the `Retry-After` seconds in milliseconds. For a date, the host's own backoff applies.
fn retry_after(headers: &[Header]) -> Option<u64> {
    let header = headers.iter().find(|header| header.name.eq_ignore_ascii_case("retry-after"))?;
    header.value.trim().parse::<u64>().ok()?.checked_mul(1000)
}

fn retry(after_milliseconds: Option<u64>, otherwise: Answer) -> Step {
    Step::Retry(Advice { after_milliseconds, otherwise })
}

fn response(status: u16, usage: Option<Usage>, body: Map<String, Value>) -> Answer {
    Answer::Response(Response {
        status,
        request_id: None,
        body: Value::Object(body).to_string(),
        usage,
    })
}

fn failure(code: &str, message: String) -> Answer {
    Answer::Failure(Failure { code: code.into(), message })
}
