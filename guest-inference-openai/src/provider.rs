//! From the provider's answer to the API's, and to the advice whether to try again.

use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::bindings::exports::batchwright::plugin::inference::{
    Advice, Answer, Failure, Header, HttpResponse, Response, Step, TransportError, TransportFault,
};
use crate::error_in_body::{MARK, status_of, without_mark};
use crate::failed;
use crate::header::header;
use crate::retry_after::retry_after_milliseconds;
use crate::usage::{Counted, Tokens};

/// How much of an answer that is no JSON a message quotes, in characters.
const QUOTED: usize = 500;

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
        let body = String::from_utf8_lossy(without_mark(&response.body));
        (response.status, error_body(response.status, &response.headers, &body))
    };
    let retriable = match status {
        429 => !is_quota(&error),
        // A lock that was not had in time, and the like.
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

/// What a 2xx turned out to be.
enum Success {
    Answer(Step),
    /// An error with the status that it stands for.
    Error(u16, Value),
}

fn success(status: u16, request_id: Option<&str>, body: Vec<u8>) -> Success {
    // It may have been cut short on the way, and the next one may be whole.
    let unreadable = |what: &str| {
        let message =
            format!("The provider answered {status} with {what} where a JSON object belongs.");
        let otherwise =
            Answer::Failure(Failure { code: "invalid_provider_response".into(), message });
        Success::Answer(Step::Retry(Advice { after_milliseconds: None, otherwise }))
    };
    let body = if body.starts_with(MARK) { without_mark(&body).to_vec() } else { body };
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
        return unreadable(&format!("what is not JSON ({error})"));
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

/// The provider's error in the API's form: as it is if it has that form, else wrapped.
fn error_body(status: u16, headers: &[Header], body: &str) -> Value {
    let parsed = serde_json::from_str::<Value>(body).ok();
    if let Some(body) = &parsed
        && body.get("error").is_some_and(Value::is_object)
    {
        return body.clone();
    }
    let said = parsed
        .as_ref()
        .and_then(|body| ["message", "detail", "error"].iter().find_map(|key| body.get(key)))
        .map_or_else(
            || body.trim().to_owned(),
            |said| said.as_str().map_or_else(|| said.to_string(), str::to_owned),
        );
    let said: String = said.chars().take(QUOTED).collect();
    let message = match header(headers, "location") {
        Some(location) if (300..400).contains(&status) => {
            format!(
                "The provider redirected with status {status} to {location}; set base_url to the place itself."
            )
        }
        _ if said.is_empty() => {
            format!("The provider answered with status {status} and no message.")
        }
        _ => said,
    };
    json!({"error": {"message": message, "type": "provider_error", "param": null, "code": null}})
}

/// An account without money answers 429 as well, and waiting does not help it.
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
    fn an_answer_comes_back_as_it_is_with_its_usage() {
        let body = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13,
            "prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}"#;
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
    fn an_odd_usage_does_not_cost_the_answer() {
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
    fn a_200_that_is_no_json_object_is_tried_again() {
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
            panic!("a mark")
        };
        assert_eq!(got.body, "{\"a\":1}");
    }

    #[test]
    fn an_error_in_a_200_is_what_it_stands_for() {
        for (body, expected, retried) in [
            (r#"{"error":{"code":429,"message":"slow down"}}"#, 429, true),
            (r#"{"error":{"code":"502","message":"bad gateway"}}"#, 502, true),
            (r#"{"error":{"message":"oops"}}"#, 500, true),
            (r#"{"error":{"code":400,"message":"bad"}}"#, 400, false),
            (
                r#"{"object":"response","status":"failed","error":{"code":"server_error","message":"m"}}"#,
                500,
                true,
            ),
            (
                r#"{"object":"response","status":"failed","error":{"code":"rate_limit_exceeded","message":"m"}}"#,
                429,
                true,
            ),
            (
                r#"{"object":"response","status":"failed","error":{"code":"invalid_prompt","message":"m"}}"#,
                400,
                false,
            ),
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
    fn rate_limits_and_server_errors_are_retried_and_an_empty_purse_is_not() {
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
    fn every_error_has_the_apis_form() {
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
            panic!("a redirect is an answer")
        };
        assert!(got.body.contains("https://x.example/"));
    }
}
