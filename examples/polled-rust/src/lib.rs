//! Adapter for a provider with an API of jobs: a request submits a job, then polls it until it is
//! finished. Component of world `adapter`.
//!
//! - `submission` checks a request and writes the body of its job.
//! - `job` reads the provider's responses and returns the next step.
//!
//! All data between two calls is in [`State`]. The host stores the state of a `wait`, so polling
//! continues after a restart, and the job is not submitted again.

mod bindings;
mod job;
mod submission;

use std::cell::RefCell;

use bindings::exports::batchwright::plugin::{
    inference::{self, Answer, Exchange, Failure, Header, HttpRequest, Outcome, Step},
    plugin,
};
use serde::{Deserialize, Serialize};

/// JSON Schema of the settings.
const SETTINGS: &str = r#"{
  "type": "object",
  "properties": {
    "base_url": {"type": "string", "pattern": "^https?://", "description": "URL before /jobs"},
    "poll_interval_seconds": {"type": "integer", "minimum": 1, "maximum": 3600, "default": 10,
      "description": "Pause between two polls of a job"}
  },
  "required": ["base_url"],
  "additionalProperties": false
}"#;

/// Settings of the operator.
#[derive(Default, Deserialize)]
struct Settings {
    base_url: String,
    poll_interval_seconds: u64,
}

/// State of a request between two calls.
///
/// A later version of this adapter may read it, so a new field must have a default.
#[derive(Default, Deserialize, Serialize)]
struct State {
    /// Id of the job; none until the provider has accepted it.
    job: Option<String>,
}

impl State {
    fn write(&self) -> Vec<u8> {
        // Serialization of this struct cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

struct Component;

thread_local! {
    static CURRENT: RefCell<Settings> = RefCell::default();
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "polled".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Chat completions as jobs that are submitted and polled".into(),
            endpoints: vec!["/v1/chat/completions".into()],
            credentials: vec![plugin::Credential {
                name: "api_key".into(),
                header: "authorization".into(),
                prefix: "Bearer ".into(),
                required: true,
            }],
            settings_schema: SETTINGS.into(),
        }
    }

    fn configure(text: String) -> Result<(), String> {
        // The host fills in the schema's defaults, so every setting is present.
        let mut settings: Settings =
            serde_json::from_str(&text).map_err(|error| format!("settings: {error}"))?;
        settings.base_url.truncate(settings.base_url.trim_end_matches('/').len());
        CURRENT.set(settings);
        Ok(())
    }
}

impl inference::Guest for Component {
    /// Submits the job, or refuses the request.
    fn begin(request: inference::Request) -> Step {
        let body = match submission::write(&request.body, &request.model) {
            Ok(body) => body,
            Err(message) => return failed("invalid_request", message),
        };
        // The number grows only after a response, so the retry of a submission without a response
        // has the same key and finds the job that it may have created.
        let key = format!("{}-{}", request.id, request.attempt);
        let header = |name: &str, value: &str| Header { name: name.into(), value: value.into() };
        let headers =
            vec![header("content-type", "application/json"), header("idempotency-key", &key)];
        CURRENT.with_borrow(|settings| {
            Step::Send(Exchange {
                request: HttpRequest {
                    method: "POST".into(),
                    url: format!("{}/jobs", settings.base_url),
                    headers,
                    body,
                },
                state: State::default().write(),
            })
        })
    }

    /// Polls the job after a pause, or reads the response of the provider.
    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        let Ok(state) = serde_json::from_slice::<State>(&state) else {
            return failed("adapter_error", "The state is not the adapter's own.".into());
        };
        CURRENT.with_borrow(|settings| match outcome {
            Outcome::Response(response) => {
                job::read(&state, &response, settings.poll_interval_seconds)
            }
            Outcome::Error(error) => job::no_response(error),
            Outcome::Elapsed => poll(state, settings),
        })
    }
}

/// Asks the provider for the job.
fn poll(state: State, settings: &Settings) -> Step {
    let Some(id) = &state.job else {
        return failed("adapter_error", "The adapter waits only for a job.".into());
    };
    Step::Send(Exchange {
        request: HttpRequest {
            method: "GET".into(),
            url: format!("{}/jobs/{id}", settings.base_url),
            headers: Vec::new(),
            body: Vec::new(),
        },
        state: state.write(),
    })
}

/// Ends a request with a failure.
fn failed(code: &str, message: String) -> Step {
    Step::Done(Answer::Failure(Failure { code: code.into(), message }))
}

#[cfg(test)]
mod tests {
    use super::inference::{Guest as _, HttpResponse, Request};
    use super::plugin::Guest as _;
    use super::*;

    fn configure() {
        let settings = r#"{"base_url": "https://jobs.example.com/", "poll_interval_seconds": 10}"#;
        Component::configure(settings.into()).unwrap();
    }

    fn request(body: &str) -> Request {
        Request {
            id: "batch_req_1".into(),
            custom_id: "a".into(),
            endpoint: "/v1/chat/completions".into(),
            model: "theirs".into(),
            body: body.into(),
            created_at: 1_700_000_000,
            attempt: 2,
        }
    }

    fn response(body: &str) -> Outcome {
        Outcome::Response(HttpResponse { status: 200, headers: Vec::new(), body: body.into() })
    }

    #[test]
    fn job_is_submitted_once_and_then_polled() {
        configure();
        let submitted = Component::begin(request(r#"{"messages": [{"role": "user"}]}"#));
        let Step::Send(Exchange { request, state }) = submitted else { panic!("expected a send") };
        assert_eq!(request.url, "https://jobs.example.com/jobs");
        let key = request.headers.iter().find(|header| header.name == "idempotency-key");
        assert_eq!(key.unwrap().value, "batch_req_1-2");
        let accepted = Component::resume(state, response(r#"{"id": "j1", "status": "queued"}"#));
        let Step::Wait(pause) = accepted else { panic!("expected a wait") };
        assert_eq!(pause.milliseconds, 10_000);
        let polled = Component::resume(pause.state.clone(), Outcome::Elapsed);
        let Step::Send(Exchange { request, state }) = polled else { panic!("expected a send") };
        assert_eq!(
            (request.method.as_str(), request.url.as_str()),
            ("GET", "https://jobs.example.com/jobs/j1")
        );
        // The host stores a state once, so the state of a job must not change between polls.
        assert_eq!(state, pause.state);
    }

    #[test]
    fn unknown_role_and_foreign_state_end_the_request() {
        configure();
        let code = |step: Step| match step {
            Step::Done(Answer::Failure(failure)) => failure.code,
            _ => "no failure".into(),
        };
        let robot = r#"{"messages": [{"role": "robot"}]}"#;
        assert_eq!(code(Component::begin(request(robot))), "invalid_request");
        let resumed = |state: Vec<u8>| code(Component::resume(state, Outcome::Elapsed));
        assert_eq!(resumed(b"foreign".to_vec()), "adapter_error");
        assert_eq!(resumed(State::default().write()), "adapter_error");
    }
}
