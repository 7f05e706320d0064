//! Echo adapter: answers each request from the request itself, without a provider and without a
//! key. Component of world `adapter`.
//!
//! The adapter is for trials and for tests of the server and its clients. Responses have the exact
//! shapes of the API and are deterministic.

mod answers;
mod bindings;
mod numbers;
mod surrogates;
mod tokens;

use bindings::exports::batchwright::plugin::{
    inference::{self, Answer, Failure, Outcome, Response, Step},
    plugin,
};

struct Component;

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "echo".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Answers each request from the request itself: no provider, no key".into(),
            endpoints: answers::ENDPOINTS.iter().map(|(path, _)| (*path).into()).collect(),
            credentials: Vec::new(),
            settings_schema: r#"{"type":"object","properties":{},"additionalProperties":false}"#
                .into(),
        }
    }

    fn configure(_settings: String) -> Result<(), String> {
        Ok(())
    }
}

impl inference::Guest for Component {
    fn begin(request: inference::Request) -> Step {
        Step::Done(match answers::answer(&request) {
            Ok((body, usage)) => Answer::Response(Response {
                status: 200,
                request_id: Some(request.id),
                body: surrogates::restore(&body.to_string()),
                usage: Some(usage),
            }),
            Err(refused) if refused.status == 0 => Answer::Failure(Failure {
                code: "invalid_request".into(),
                message: refused.message,
            }),
            Err(refused) => Answer::Response(Response {
                status: refused.status,
                request_id: Some(request.id),
                body: surrogates::restore(&refused.body().to_string()),
                usage: None,
            }),
        })
    }

    fn resume(_state: Vec<u8>, _outcome: Outcome) -> Step {
        let message = "The echo adapter answers at once and is never resumed.".into();
        Step::Done(Answer::Failure(Failure { code: "adapter_error".into(), message }))
    }
}
