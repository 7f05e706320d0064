//! Responses of the provider: a job in one of its states, or an error.
//!
//! The id of a job comes from the provider and becomes a part of a URL. Only ids that cannot change
//! the path are accepted: letters, digits, `-` and `_`.

use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::bindings::exports::batchwright::plugin::inference::{
    Advice, Answer, Failure, HttpResponse, Pause, Response, Step, TransportError, TransportFault,
    Usage,
};
use crate::{State, failed};

/// Maximum length of a job id, in bytes.
const MAX_ID_BYTES: usize = 256;

/// Maximum pause between two polls, in seconds. A longer `wait` exceeds the host's default limit.
const MAX_PAUSE_SECONDS: u64 = 3600;

/// Job as the provider reports it.
#[derive(Deserialize)]
struct Job<'a> {
    id: Option<String>,
    status: String,
    /// Chat completion of a job that succeeded.
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    /// Error of a job that failed.
    error: Option<ProviderError>,
}

/// Error of a job or of an exchange.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ProviderError {
    code: Option<String>,
    message: Option<String>,
    /// True if another job may succeed.
    retryable: bool,
}

/// Body of a response with an error status.
#[derive(Deserialize)]
struct ErrorBody {
    error: ProviderError,
}

/// Member of a chat completion that the host needs.
#[derive(Deserialize)]
struct Completion {
    usage: Option<CompletionUsage>,
}

#[derive(Deserialize)]
struct CompletionUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// Returns the step after a response to a submission or to a poll.
pub(crate) fn read(state: &State, response: &HttpResponse, interval_seconds: u64) -> Step {
    if !(200..300).contains(&response.status) {
        return refused(state, response);
    }
    let body = std::str::from_utf8(&response.body).unwrap_or_default();
    let Ok(job) = serde_json::from_str::<Job<'_>>(body) else {
        return invalid("The provider's response is not a job.");
    };
    // The id of the first response counts.
    let id = state.job.clone().or(job.id).filter(|id| is_id(id));
    match (job.status.as_str(), id) {
        ("queued" | "running", Some(id)) => wait(id, interval_seconds.max(retry_after(response))),
        ("queued" | "running", None) => invalid("The provider's job has no usable id."),
        ("succeeded", id) => succeeded(id, job.output),
        ("failed", id) => job_failed(id, job.error.unwrap_or_default()),
        _ => invalid("The provider's job has an unknown status."),
    }
}

/// Returns the step after an exchange without a response.
pub(crate) fn no_response(error: TransportError) -> Step {
    match error.fault {
        TransportFault::NotAllowed => failed("egress_refused", error.message),
        TransportFault::TooLarge => failed("provider_answer_too_large", error.message),
        _ => {
            let code = "provider_unreachable".into();
            retry(0, Answer::Failure(Failure { code, message: error.message }))
        }
    }
}

/// Pauses before the next poll. The host stores the state.
fn wait(id: String, seconds: u64) -> Step {
    Step::Wait(Pause {
        milliseconds: seconds.clamp(1, MAX_PAUSE_SECONDS) * 1000,
        state: State { job: Some(id) }.write(),
    })
}

/// Ends the request with the job's output.
fn succeeded(id: Option<String>, output: Option<&RawValue>) -> Step {
    let Some(output) = output.map(RawValue::get).filter(|output| output.starts_with('{')) else {
        return invalid("The provider's job has no output.");
    };
    let usage = serde_json::from_str::<Completion>(output).ok().and_then(|found| found.usage);
    Step::Done(Answer::Response(Response {
        status: 200,
        request_id: id,
        body: output.to_owned(),
        usage: usage.map(|usage| Usage {
            input_tokens: usage.prompt_tokens,
            cached_input_tokens: 0,
            output_tokens: usage.completion_tokens,
            reasoning_tokens: 0,
        }),
    }))
}

/// Returns the step after a job that failed: a new job if that may help, otherwise the error.
fn job_failed(id: Option<String>, error: ProviderError) -> Step {
    if error.retryable {
        // The exchange itself succeeded, so the host begins the request again.
        retry(0, error_response(500, id, error))
    } else {
        Step::Done(error_response(400, id, error))
    }
}

/// Returns the step after a response with an error status.
///
/// After a `wait`, the host repeats the poll for `retry`. The exception is a status that says
/// nothing about the provider's health, such as 404: then the host begins the request again, which
/// submits a new job.
fn refused(state: &State, response: &HttpResponse) -> Step {
    let status = response.status;
    let error = serde_json::from_slice::<ErrorBody>(&response.body).ok().map(|body| body.error);
    let answer = error_response(status, None, error.unwrap_or_default());
    let is_lost = status == 404 && state.job.is_some();
    if is_lost || matches!(status, 401..=403 | 408 | 409 | 425 | 429 | 500..) {
        retry(retry_after(response), answer)
    } else {
        Step::Done(answer)
    }
}

/// Returns an error in the form of the OpenAI API.
fn error_response(status: u16, request_id: Option<String>, error: ProviderError) -> Answer {
    let message =
        error.message.unwrap_or_else(|| format!("The provider answered with status {status}."));
    let kind = if status >= 500 { "server_error" } else { "invalid_request_error" };
    let body =
        json!({"error": {"message": message, "type": kind, "param": null, "code": error.code}});
    Answer::Response(Response { status, request_id, body: body.to_string(), usage: None })
}

fn retry(after_seconds: u64, otherwise: Answer) -> Step {
    let after_milliseconds = Some(after_seconds.saturating_mul(1000)).filter(|after| *after > 0);
    Step::Retry(Advice { after_milliseconds, otherwise })
}

fn invalid(message: &str) -> Step {
    failed("invalid_provider_response", message.into())
}

/// Returns true if an id can be a segment of a URL's path.
fn is_id(id: &str) -> bool {
    let fits = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    !id.is_empty() && id.len() <= MAX_ID_BYTES && id.chars().all(fits)
}

/// Returns the seconds of `Retry-After`; 0 if the header is absent or a date.
fn retry_after(response: &HttpResponse) -> u64 {
    let header =
        response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("retry-after"));
    header.and_then(|header| header.value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bindings::exports::batchwright::plugin::inference::Header;

    fn response(status: u16, body: &str) -> HttpResponse {
        HttpResponse { status, headers: Vec::new(), body: body.into() }
    }

    fn polled(status: u16, body: &str) -> Step {
        read(&State { job: Some("j1".into()) }, &response(status, body), 10)
    }

    #[test]
    fn unfinished_job_is_polled_under_its_first_id() {
        for body in [r#"{"id": "j2", "status": "running"}"#, r#"{"status": "queued"}"#] {
            let Step::Wait(pause) = polled(200, body) else { panic!("expected a wait: {body}") };
            assert_eq!(pause.state, State { job: Some("j1".into()) }.write());
            assert_eq!(pause.milliseconds, 10_000);
        }
    }

    #[test]
    fn retry_after_lengthens_a_pause_up_to_an_hour() {
        for (value, milliseconds) in [("60", 60_000), ("1", 10_000), ("9999999", 3_600_000)] {
            let header = Header { name: "Retry-After".into(), value: value.into() };
            let body = r#"{"id": "j1", "status": "queued"}"#.into();
            let response = HttpResponse { status: 202, headers: vec![header], body };
            let Step::Wait(pause) = read(&State::default(), &response, 10) else {
                panic!("expected a wait")
            };
            assert_eq!(pause.milliseconds, milliseconds, "{value}");
        }
    }

    #[test]
    fn id_that_would_change_the_url_is_refused() {
        for id in ["..", "../keys", "a/b", "a?b", "a#b", ""] {
            let body = format!(r#"{{"id": "{id}", "status": "queued"}}"#);
            let step = read(&State::default(), &response(201, &body), 10);
            assert!(matches!(step, Step::Done(Answer::Failure(_))), "{id}");
        }
    }

    #[test]
    fn output_is_returned_unchanged_with_its_usage() {
        let usage = r#"{"prompt_tokens": 3, "completion_tokens": 2}"#;
        let output = format!(r#"{{"x": 12345678901234567890123, "usage": {usage}}}"#);
        let body = format!(r#"{{"id": "j1", "status": "succeeded", "output": {output}}}"#);
        let Step::Done(Answer::Response(answer)) = polled(200, &body) else {
            panic!("expected a response")
        };
        assert_eq!((answer.status, answer.body.as_str()), (200, output.as_str()));
        assert_eq!(answer.request_id.as_deref(), Some("j1"));
        let usage = answer.usage.unwrap();
        assert_eq!((usage.input_tokens, usage.output_tokens), (3, 2));
    }

    #[test]
    fn failed_job_is_retried_only_if_the_provider_says_so() {
        let failed = |retryable: bool| {
            let body = r#"{"status": "failed", "error": {"message": "m", "retryable": false}}"#;
            polled(200, &body.replace("false", &retryable.to_string()))
        };
        assert!(matches!(failed(true), Step::Retry(_)));
        let Step::Done(Answer::Response(answer)) = failed(false) else {
            panic!("expected a response")
        };
        assert_eq!(answer.status, 400);
    }

    #[test]
    fn missing_job_is_retried_but_a_missing_route_is_not() {
        assert!(matches!(polled(404, "{}"), Step::Retry(_)));
        let step = read(&State::default(), &response(404, "{}"), 10);
        assert!(matches!(step, Step::Done(Answer::Response(_))));
    }

    #[test]
    fn malformed_job_ends_the_request() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"id": "j1", "status": 7}"#,
            r#"{"id": "j1", "status": "gone"}"#,
            r#"{"id": "j1", "status": "succeeded"}"#,
            r#"{"id": "j1", "status": "succeeded", "output": [1]}"#,
        ] {
            assert!(matches!(polled(200, body), Step::Done(Answer::Failure(_))), "{body}");
        }
    }
}
