//! Adapter from OpenAI's chat completions to Anthropic's Messages API. Component of world
//! `adapter`.
//!
//! - `request`, `messages` and `tools` translate the request body, or refuse a parameter that the
//!   Messages API does not have.
//! - `response` translates the response, its errors and its retry delay.
//! - `exact` keeps numbers that `serde_json::Value` cannot hold.

mod bindings;
mod exact;
mod messages;
mod refused;
mod request;
mod response;
mod tools;

use std::cell::RefCell;

use bindings::exports::batchwright::plugin::{
    inference::{self, Answer, Exchange, Failure, Header, HttpRequest, Outcome, Step},
    plugin,
};
use serde::{Deserialize, Serialize};

/// JSON Schema of the settings. Each setting has a default, which the host fills in.
const SETTINGS: &str = r#"{
  "type": "object",
  "properties": {
    "base_url": {"type": "string", "pattern": "^https?://", "default": "https://api.anthropic.com",
      "description": "URL before /v1/messages"},
    "version": {"type": "string", "default": "2023-06-01",
      "description": "The anthropic-version header"},
    "max_tokens": {"type": "integer", "minimum": 1, "default": 4096,
      "description": "max_tokens of a request that gives none: the API requires it"}
  },
  "additionalProperties": false
}"#;

/// Settings of the operator.
#[derive(Default, Deserialize)]
struct Settings {
    base_url: String,
    version: String,
    max_tokens: u64,
}

/// Data of the request that `resume` needs. It goes into the state, because `resume` may run in
/// another instance.
#[derive(Serialize, Deserialize)]
struct RequestContext {
    id: String,
    /// The client's name of the model.
    model: String,
    created_at: u64,
}

struct Component;

thread_local! {
    static CURRENT: RefCell<Settings> = RefCell::default();
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "anthropic".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Anthropic's Messages API, for chat completions".into(),
            endpoints: vec!["/v1/chat/completions".into()],
            credentials: vec![plugin::Credential {
                name: "api_key".into(),
                header: "x-api-key".into(),
                prefix: String::new(),
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
    fn begin(request: inference::Request) -> Step {
        CURRENT.with_borrow(|settings| {
            let (body, client_model) =
                match request::translate(&request.body, &request.model, settings.max_tokens) {
                    Ok(translated) => translated,
                    Err(refused) => return failed(refused.code, refused.message),
                };
            let context = RequestContext {
                id: request.id,
                model: client_model,
                created_at: request.created_at,
            };
            let header =
                |name: &str, value: &str| Header { name: name.into(), value: value.into() };
            Step::Send(Exchange {
                request: HttpRequest {
                    method: "POST".into(),
                    url: format!("{}/v1/messages", settings.base_url),
                    headers: vec![
                        header("content-type", "application/json"),
                        header("anthropic-version", &settings.version),
                    ],
                    body: exact::write(&body).into_bytes(),
                },
                // Serialization of this struct cannot fail.
                state: serde_json::to_vec(&context).unwrap_or_default(),
            })
        })
    }

    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        let Ok(context) = serde_json::from_slice(&state) else {
            return failed("adapter_error", "The state is not the adapter's own.".into());
        };
        match outcome {
            Outcome::Response(answer) => response::translate(&context, answer),
            Outcome::Error(error) => response::no_answer(error),
            Outcome::Elapsed => failed("adapter_error", "The adapter never asks to wait.".into()),
        }
    }
}

/// Ends a request with a failure.
fn failed(code: &str, message: String) -> Step {
    Step::Done(Answer::Failure(Failure { code: code.into(), message }))
}
