//! Polling of responses that the provider makes in the background (`"background": true`).
//!
//! The provider answers such a request at once, with an id and the status `queued` or
//! `in_progress`. The adapter then waits `POLL_INTERVAL_MS`, asks for the response with that id,
//! and repeats both until the status is another one.
//!
//! The state of a request is one of three byte strings. It is empty if the request cannot run in
//! the background, `PENDING` before the first answer, and the response's id afterwards. The host
//! stores the state of a pause, so polling continues after a restart and the work is not started
//! twice.
//!
//! The id comes from the provider and becomes a part of a URL. `unfinished` accepts only ids that
//! cannot change the path: letters, digits, `-`, `_` and `.`, and not dots alone.

use serde::Deserialize;

use crate::bindings::exports::batchwright::plugin::inference::{
    Exchange, HttpRequest, HttpResponse, Pause, Step,
};
use crate::failed;
use crate::settings::Settings;

/// Pause between two polls, in milliseconds.
const POLL_INTERVAL_MS: u64 = 5000;
/// Maximum length of a response id, in bytes.
const MAX_ID_BYTES: usize = 256;

/// Members of a response that tell whether it is finished.
#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    object: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    id: String,
}

/// State of a request before its first answer.
const PENDING: &[u8] = b"begun";

/// Returns the first state of a request; empty if the request cannot run in the background, so that
/// its answer is not searched.
pub(crate) fn state(endpoint: &str, body: &str) -> Vec<u8> {
    if endpoint == "/v1/responses" && body.contains("\"background\"") {
        PENDING.to_vec()
    } else {
        Vec::new()
    }
}

/// Returns the id of a response that is not finished; none if it is finished.
pub(crate) fn unfinished(state: &[u8], response: &HttpResponse) -> Option<String> {
    if state.is_empty() || !(200..300).contains(&response.status) {
        return None;
    }
    let found: Response = serde_json::from_slice(&response.body).ok()?;
    let unfinished =
        found.object == "response" && matches!(found.status.as_str(), "queued" | "in_progress");
    // The id becomes a part of a URL.
    let fits = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    // Dots alone would name the parent path.
    let is_name = found.id.chars().any(|letter| letter.is_ascii_alphanumeric());
    (unfinished && is_name && found.id.len() <= MAX_ID_BYTES && found.id.chars().all(fits))
        .then_some(found.id)
}

/// Pauses before the next poll. The state is the response's id.
pub(crate) fn wait(id: String) -> Step {
    Step::Wait(Pause { milliseconds: POLL_INTERVAL_MS, state: id.into_bytes() })
}

/// Polls the response whose id is the state.
pub(crate) fn poll(state: &[u8], settings: &Settings) -> Step {
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
    fn unfinished_response_is_polled() {
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
        let Step::Send(exchange) = poll(b"resp_1", &Settings::default()) else {
            panic!("expected an exchange")
        };
        assert_eq!(exchange.request.url, "https://api.openai.com/v1/responses/resp_1");
        assert_eq!(exchange.request.method, "GET");
    }
}
