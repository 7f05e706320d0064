//! Adapter for any provider with the OpenAI API. Component of world `streaming-adapter`.
//!
//! The component imports nothing. It sends the request body as the client wrote it, unknown fields
//! included, and replaces only the model name. It returns a good response of the provider
//! unchanged.
//!
//! - `request` checks the body and replaces the model name.
//! - `provider` turns a response or a transport error into an answer or a retry.
//! - `error_in_body` finds errors in responses with status 200, and classifies them.
//! - `background` polls responses that the provider makes in the background.
//! - `usage` and `retry_after` read token counts and delays in the forms that providers use.

mod background;
mod bindings;
mod error_in_body;
mod header;
mod provider;
mod request;
mod retry_after;
mod settings;
mod usage;

use std::cell::RefCell;

use bindings::exports::batchwright::plugin::{
    classification,
    inference::{self, Answer, Exchange, Failure, HttpRequest, Outcome, Step},
    plugin, streaming,
};
use settings::Settings;

struct Component;

thread_local! {
    static SETTINGS: RefCell<Settings> = RefCell::new(Settings::default());
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        let credential = |name: &str, header: &str, prefix: &str| plugin::Credential {
            name: name.into(),
            header: header.into(),
            prefix: prefix.into(),
            // A model server in a private network often needs no key.
            required: false,
        };
        plugin::Description {
            name: "openai".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Any provider that speaks the OpenAI API".into(),
            endpoints: [
                "chat/completions",
                "completions",
                "embeddings",
                "responses",
                "moderations",
            ]
            .map(|name| format!("/v1/{name}"))
            .to_vec(),
            credentials: vec![
                credential("api_key", "authorization", "Bearer "),
                credential("azure_api_key", "api-key", ""),
            ],
            settings_schema: settings::SCHEMA.into(),
        }
    }

    fn configure(text: String) -> Result<(), String> {
        let settings = Settings::parse(&text)?;
        SETTINGS.with_borrow_mut(|current| *current = settings);
        Ok(())
    }
}

impl inference::Guest for Component {
    fn begin(request: inference::Request) -> Step {
        let body = match request::prepare(&request.endpoint, &request.model, request.body) {
            Ok(body) => body,
            Err(message) => return failed("invalid_request", message),
        };
        let state = background::state(&request.endpoint, &body);
        SETTINGS.with_borrow(|settings| {
            Step::Send(Exchange {
                request: HttpRequest {
                    method: "POST".into(),
                    url: settings.url(&request.endpoint),
                    headers: settings.headers_with_key(&request.id, request.attempt),
                    body: body.into_bytes(),
                },
                state,
            })
        })
    }

    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        match outcome {
            Outcome::Response(response) => match background::unfinished(&state, &response) {
                Some(id) => background::wait(id),
                None => provider::answer(response),
            },
            Outcome::Error(error) => provider::no_answer(error),
            Outcome::Elapsed => SETTINGS.with_borrow(|settings| background::poll(&state, settings)),
        }
    }
}

impl classification::Guest for Component {
    fn classify(head: classification::Head) -> classification::Classification {
        classification::Classification {
            standing: error_in_body::standing(&head),
            delay_milliseconds: None,
            remaining: None,
            reset_milliseconds: None,
        }
    }
}

impl streaming::Guest for Component {
    fn stream_endpoints() -> Vec<String> {
        ["chat/completions", "completions", "responses"].map(|name| format!("/v1/{name}")).to_vec()
    }
}

/// Ends a request with a failure.
fn failed(code: &str, message: String) -> Step {
    Step::Done(Answer::Failure(Failure { code: code.into(), message }))
}
