//! Responses that the provider makes in the background (`"background": true`): it is asked for them until they are made.

use serde::Deserialize;

use crate::bindings::exports::batchwright::plugin::inference::{
    Exchange, HttpRequest, HttpResponse, Pause, Step,
};
use crate::failed;
use crate::settings::Settings;

/// How long to wait before the provider is asked again.
const POLL_INTERVAL: u64 = 5000;

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    object: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    id: String,
}

/// The state of a request of which no response is known yet.
const BEGUN: &[u8] = b"begun";

/// The state of a request: none if it is not one that may be made in the background, so that nothing is looked for in its answer.
pub(crate) fn state(endpoint: &str, body: &str) -> Vec<u8> {
    if endpoint == "/v1/responses" && body.contains("\"background\"") {
        BEGUN.to_vec()
    } else {
        Vec::new()
    }
}

/// The id of a response that is not made yet.
pub(crate) fn unfinished(state: &[u8], response: &HttpResponse) -> Option<String> {
    if state.is_empty() || !(200..300).contains(&response.status) {
        return None;
    }
    let found: Response = serde_json::from_slice(&response.body).ok()?;
    let unfinished =
        found.object == "response" && matches!(found.status.as_str(), "queued" | "in_progress");
    // It becomes a part of a URL.
    let fits = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    // Dots alone would be a step up.
    let is_name = found.id.chars().any(|letter| letter.is_ascii_alphanumeric());
    (unfinished && is_name && found.id.len() <= 256 && found.id.chars().all(fits))
        .then_some(found.id)
}

/// Asks again after a while. The state is the response's id.
pub(crate) fn wait(id: String) -> Step {
    Step::Wait(Pause { milliseconds: POLL_INTERVAL, state: id.into_bytes() })
}

/// Asks for the response whose id is the state.
pub(crate) fn ask(state: &[u8], settings: &Settings) -> Step {
    let Ok(id) = std::str::from_utf8(state) else {
        return failed(
            "adapter_error",
            "The state of a request is not one of this adapter's.".into(),
        );
    };
    Step::Send(Exchange {
        request: HttpRequest {
            method: "GET".into(),
            url: settings.url(&format!("/v1/responses/{id}")),
            headers: settings.headers(),
            body: Vec::new(),
        },
        state: state.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_that_is_not_made_is_waited_for() {
        let background = state("/v1/responses", r#"{"background": true}"#);
        let found = |status, body: &str| {
            unfinished(
                &background,
                &HttpResponse { status, headers: Vec::new(), body: body.into() },
            )
        };
        let queued = r#"{"object":"response","status":"queued","id":"resp_1"}"#;
        assert_eq!(found(200, queued).as_deref(), Some("resp_1"));
        assert_eq!(found(200, &queued.replace("queued", "in_progress")).as_deref(), Some("resp_1"));
        assert_eq!(found(200, &queued.replace("queued", "completed")), None);
        assert_eq!(found(500, queued), None);
        assert_eq!(found(200, &queued.replace("resp_1", "../keys")), None);
        assert_eq!(found(200, &queued.replace("resp_1", "..")), None);
        assert_eq!(found(200, r#"{"object":"chat.completion","id":"x"}"#), None);
        assert!(
            state("/v1/responses", "{}").is_empty()
                && state("/v1/embeddings", "\"background\"").is_empty()
        );
        let Step::Send(exchange) = ask(b"resp_1", &Settings::default()) else { panic!("it asks") };
        assert_eq!(exchange.request.url, "https://api.openai.com/v1/responses/resp_1");
        assert_eq!(exchange.request.method, "GET");
    }
}
