//! Translation of the provider's response, or of a transport error, into an answer or a retry.
//!
//! Responses fall into three groups:
//!
//! - 2xx with a JSON object is the answer, unchanged, except for a byte order mark, which is
//!   removed.
//! - 2xx without a JSON object was probably cut off on the way and is retried. 2xx with an `error`
//!   object is treated like the status that the error is equivalent to.
//! - Any other status is an error. It gets the API's form, and is retried if a retry can succeed.
//!
//! An account without quota also answers with 429. A retry of that request cannot succeed, so it
//! ends here; the host holds back further requests until the account has quota.

use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::bindings::exports::batchwright::plugin::inference::{
    Advice, Answer, Failure, Header, HttpResponse, Response, Step, TransportError, TransportFault,
};
use crate::error_in_body::{BYTE_ORDER_MARK, status_of, strip_mark};
use crate::failed;
use crate::header::header;
use crate::retry_after::retry_after_milliseconds;
use crate::usage::{Counted, Tokens};

/// Maximum length of the provider's text in an error message, in characters.
const MAX_QUOTED_CHARS: usize = 500;

/// Returns the step after a response of the provider.
pub(crate) fn answer(response: HttpResponse) -> Step {
    let request_id = ["x-request-id", "request-id", "apim-request-id"]
        .iter()
        .find_map(|name| header(&response.headers, name))
        .map(str::to_owned);
    let after_milliseconds = retry_after_milliseconds(&response.headers);
    let (status, error) = if (200..300).contains(&response.status) {
        match success(response.status, request_id.as_deref(), response.body) {
            Success::Answer(step) => return step,
            Success::Error(status, error) => (status, error),
        }
    } else {
        let body = String::from_utf8_lossy(strip_mark(&response.body));
        (response.status, error_body(response.status, &response.headers, &body))
    };
    let retriable = match status {
        429 => !is_quota(&error),
        // Request timeout, lock conflict, replayed early data: transient.
        408 | 409 | 425 => true,
        status => status >= 500,
    };
    let answer =
        Answer::Response(Response { status, request_id, body: error.to_string(), usage: None });
    if retriable {
        Step::Retry(Advice { after_milliseconds, otherwise: answer })
    } else {
        Step::Done(answer)
    }
}

/// Returns the step after an exchange without a response.
pub(crate) fn no_answer(error: TransportError) -> Step {
    let code = match error.fault {
        TransportFault::NotAllowed => return failed("egress_refused", error.message),
        TransportFault::TooLarge => return failed("provider_answer_too_large", error.message),
        TransportFault::Timeout => "provider_timeout",
        TransportFault::Protocol => "provider_protocol_error",
        TransportFault::NameResolution | TransportFault::Connection | TransportFault::Tls => {
            "provider_unreachable"
        }
    };
    let otherwise = Answer::Failure(Failure { code: code.into(), message: error.message });
    Step::Retry(Advice { after_milliseconds: None, otherwise })
}

/// Meaning of a 2xx response.
enum Success {
    /// A step that ends or retries the request.
    Answer(Step),
    /// An error body and the status that it is equivalent to.
    Error(u16, Value),
}

/// Interprets a 2xx response.
fn success(status: u16, request_id: Option<&str>, body: Vec<u8>) -> Success {
    // The body may have been cut off on the way, so a retry can succeed.
    let unreadable = |what: &str| {
        let message =
            format!("The provider answered {status} with {what} where a JSON object belongs.");
        let otherwise =
            Answer::Failure(Failure { code: "invalid_provider_response".into(), message });
        Success::Answer(Step::Retry(Advice { after_milliseconds: None, otherwise }))
    };
    let body = if body.starts_with(BYTE_ORDER_MARK) { strip_mark(&body).to_vec() } else { body };
    let Ok(body) = String::from_utf8(body) else { return unreadable("text that is not UTF-8") };
    if !body.trim_ascii_start().starts_with('{') {
        return unreadable(&format!(
            "`{}`",
            body.chars().take(80).collect::<String>().escape_debug()
        ));
    }
    let counted = serde_json::from_str::<Counted>(&body);
    if counted.is_err()
        && let Err(error) = serde_json::from_str::<IgnoredAny>(&body)
    {
        return unreadable(&format!("invalid JSON ({error})"));
    }
    let counted = counted.ok();
    if let Some(error) = counted
        .as_ref()
        .and_then(|counted| counted.error)
        .filter(|error| error.get().starts_with('{'))
        && let Ok(error) = serde_json::from_str::<Value>(error.get())
    {
        let error = json!({"error": error});
        return Success::Error(status_of(&error).unwrap_or(500), error);
    }
    let usage = counted.and_then(|counted| counted.usage).map(Tokens::into_usage);
    let request_id = request_id.map(str::to_owned);
    Success::Answer(Step::Done(Answer::Response(Response { status, request_id, body, usage })))
}

/// Returns the provider's error in the API's form: unchanged if it has that form, else wrapped.
fn error_body(status: u16, headers: &[Header], body: &str) -> Value {
    let parsed = serde_json::from_str::<Value>(body).ok();
    if let Some(body) = &parsed
        && body.get("error").is_some_and(Value::is_object)
    {
        return body.clone();
    }
    let text = parsed
        .as_ref()
        .and_then(|body| ["message", "detail", "error"].iter().find_map(|key| body.get(key)))
        .map_or_else(
            || body.trim().to_owned(),
            |text| text.as_str().map_or_else(|| text.to_string(), str::to_owned),
        );
    let text: String = text.chars().take(MAX_QUOTED_CHARS).collect();
    let message = match header(headers, "location") {
        Some(location) if (300..400).contains(&status) => {
            format!(
                "The provider redirected with status {status} to {location}; \
                 set base_url to that address."
            )
        }
        _ if text.is_empty() => {
            format!("The provider answered with status {status} and no message.")
        }
        _ => text,
    };
    json!({"error": {"message": message, "type": "provider_error", "param": null, "code": null}})
}

/// Returns true if a 429 means that the account has no quota left.
fn is_quota(body: &Value) -> bool {
    ["code", "type"]
        .iter()
        .any(|key| body.pointer(&format!("/error/{key}")) == Some(&"insufficient_quota".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)], body: &str) -> Step {
        let headers = headers
            .iter()
            .map(|(name, value)| Header { name: (*name).into(), value: (*value).into() })
            .collect();
        answer(HttpResponse { status, headers, body: body.into() })
    }

    #[test]
    fn answer_is_returned_unchanged_with_its_usage() {
        let body = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,
            "total_tokens":13,"prompt_tokens_details":{"cached_tokens":3},
            "completion_tokens_details":{"reasoning_tokens":2}}}"#;
        let Step::Done(Answer::Response(got)) = response(200, &[("X-Request-Id", "r1")], body)
        else {
            panic!("expected a response")
        };
        assert_eq!(
            (got.status, got.body.as_str(), got.request_id.as_deref()),
            (200, body, Some("r1"))
        );
        let usage = got.usage.unwrap();
        let counts = (
            usage.input_tokens,
            usage.cached_input_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
        );
        assert_eq!(counts, (9, 3, 4, 2));
    }

    #[test]
    fn malformed_usage_is_ignored() {
        for usage in [
            "null",
            "7",
            "{}",
            r#"{"prompt_tokens":-1,"prompt_tokens_details":[]}"#,
            r#"{"input_tokens":null}"#,
        ] {
            let step = response(200, &[], &format!(r#"{{"usage":{usage}}}"#));
            assert!(matches!(step, Step::Done(Answer::Response(_))), "{usage}");
        }
        assert!(matches!(
            response(200, &[], r#"{"usage":1,"usage":2}"#),
            Step::Done(Answer::Response(_))
        ));
    }

    #[test]
    fn status_200_without_a_json_object_is_retried() {
        for body in [
            "",
            "<html>",
            "[1]",
            "\"x\"",
            "{",
            "{} {}",
            r#"{"choices":[{"message":{"content":"cut o"#,
        ] {
            let Step::Retry(Advice { otherwise: Answer::Failure(failure), .. }) =
                response(200, &[], body)
            else {
                panic!("{body}")
            };
            assert_eq!(failure.code, "invalid_provider_response");
        }
        let Step::Done(Answer::Response(got)) = response(200, &[], "\u{feff}{\"a\":1}") else {
            panic!("a byte order mark was not accepted")
        };
        assert_eq!(got.body, "{\"a\":1}");
    }

    #[test]
    fn error_in_a_200_is_treated_like_its_status() {
        let failed = |code: &str| {
            let error = format!(r#"{{"code":"{code}","message":"m"}}"#);
            format!(r#"{{"object":"response","status":"failed","error":{error}}}"#)
        };
        for (body, expected, retried) in [
            (r#"{"error":{"code":429,"message":"slow down"}}"#, 429, true),
            (r#"{"error":{"code":"502","message":"bad gateway"}}"#, 502, true),
            (r#"{"error":{"message":"oops"}}"#, 500, true),
            (r#"{"error":{"code":400,"message":"bad"}}"#, 400, false),
            (&failed("server_error"), 500, true),
            (&failed("rate_limit_exceeded"), 429, true),
            (&failed("invalid_prompt"), 400, false),
        ] {
            let answer = match response(200, &[], body) {
                Step::Retry(advice) if retried => advice.otherwise,
                Step::Done(answer) if !retried => answer,
                step => panic!("{body}: {step:?}"),
            };
            let Answer::Response(got) = answer else { panic!("{body}") };
            assert_eq!(got.status, expected, "{body}");
            assert!(got.body.starts_with("{\"error\":{"), "{}", got.body);
        }
        for body in [
            r#"{"object":"response","status":"completed","error":null}"#,
            r#"{"choices":[],"error":"none"}"#,
        ] {
            assert!(matches!(
                response(200, &[], body),
                Step::Done(Answer::Response(Response { status: 200, .. }))
            ));
        }
    }

    #[test]
    fn rate_limits_and_server_errors_are_retried_and_exhausted_quota_is_not() {
        let error =
            |code: &str| format!(r#"{{"error":{{"message":"m","type":"t","code":"{code}"}}}}"#);
        let Step::Retry(advice) =
            response(429, &[("Retry-After", "7")], &error("rate_limit_exceeded"))
        else {
            panic!("429 is retried")
        };
        assert_eq!(advice.after_milliseconds, Some(7000));
        assert!(matches!(advice.otherwise, Answer::Response(Response { status: 429, .. })));
        assert!(matches!(response(429, &[], &error("insufficient_quota")), Step::Done(_)));
        assert!(matches!(response(503, &[], "<html>busy</html>"), Step::Retry(_)));
        assert!(matches!(response(400, &[], &error("bad")), Step::Done(_)));
        for status in [408, 409, 425, 500, 502, 503, 504, 529] {
            assert!(matches!(response(status, &[], &error("x")), Step::Retry(_)), "{status}");
        }
    }

    #[test]
    fn errors_have_the_form_of_the_api() {
        for (status, body, message) in [
            (404, r#"{"detail":"Not Found"}"#, "Not Found"),
            (400, r#"{"object":"error","message":"too long"}"#, "too long"),
            (400, r#"{"detail":[{"loc":["body"]}]}"#, r#"[{"loc":["body"]}]"#),
            (401, "denied\n", "denied"),
            (403, "", "The provider answered with status 403 and no message."),
        ] {
            let Step::Done(Answer::Response(got)) = response(status, &[], body) else {
                panic!("{body}")
            };
            let got: Value = serde_json::from_str(&got.body).unwrap();
            assert_eq!(got.pointer("/error/message"), Some(&message.into()), "{body}");
        }
        let Step::Done(Answer::Response(got)) =
            response(308, &[("location", "https://x.example/")], "")
        else {
            panic!("expected the redirect as the answer")
        };
        assert!(got.body.contains("https://x.example/"));
    }
}
