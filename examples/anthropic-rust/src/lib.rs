//! Anthropic's Messages API behind OpenAI's chat completions, as a component of world `adapter`.
//!
//! `request` turns a chat completion's request into a message's, `response` the answer back, errors and advice to try again included.

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

const SETTINGS: &str = r#"{
  "type": "object",
  "properties": {
    "base_url": {"type": "string", "pattern": "^https?://", "default": "https://api.anthropic.com",
      "description": "What stands before /v1/messages"},
    "version": {"type": "string", "default": "2023-06-01", "description": "The anthropic-version header"},
    "max_tokens": {"type": "integer", "minimum": 1, "default": 4096,
      "description": "Tokens to ask for where a request does not say: the API needs a number"}
  },
  "additionalProperties": false
}"#;

#[derive(Default, Deserialize)]
struct Settings {
    base_url: String,
    version: String,
    max_tokens: u64,
}

/// What `resume` must know of the request: it may run in another instance.
#[derive(Serialize, Deserialize)]
struct Asked {
    id: String,
    /// As the client named it.
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
        // The host fills in the schema's defaults, so every setting is there.
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
            let (body, asked_model) =
                match request::translate(&request.body, &request.model, settings.max_tokens) {
                    Ok(translated) => translated,
                    Err(refused) => return failed(refused.code, refused.message),
                };
            let asked =
                Asked { id: request.id, model: asked_model, created_at: request.created_at };
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
                // It was made here, so it can be written.
                state: serde_json::to_vec(&asked).unwrap_or_default(),
            })
        })
    }

    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        let Ok(asked) = serde_json::from_slice(&state) else {
            return failed("adapter_error", "The state is not the adapter's own.".into());
        };
        match outcome {
            Outcome::Response(answer) => response::translate(&asked, answer),
            Outcome::Error(error) => response::no_answer(error),
            Outcome::Elapsed => failed("adapter_error", "The adapter never asks to wait.".into()),
        }
    }
}

fn failed(code: &str, message: String) -> Step {
    Step::Done(Answer::Failure(Failure { code: code.into(), message }))
}
