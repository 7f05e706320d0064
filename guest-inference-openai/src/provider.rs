//! From the provider's answer to the API's, and to the advice whether to try again.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::bindings::exports::batchwright::plugin::inference::{
    Advice, Answer, Failure, Header, HttpResponse, Response, Step, TransportError, TransportFault, Usage,
};
use crate::failed;
use crate::header::header;
use crate::retry_after::retry_after_milliseconds;

/// How much of an answer that is no JSON a message quotes, in characters.
const QUOTED: usize = 500;

pub(crate) fn answer(response: HttpResponse) -> Step {
    let request_id = header(&response.headers, "x-request-id").map(str::to_owned);
    let text = String::from_utf8(response.body);
    if (200..300).contains(&response.status) {
        return success(response.status, request_id, text);
    }
    let body = text.unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    let error = error_body(response.status, &response.headers, &body);
    let retriable = match response.status {
        429 => !is_quota(&error),
        status => status >= 500,
    };
    let answer =
        Answer::Response(Response { status: response.status, request_id, body: error.to_string(), usage: None });
    if retriable {
        Step::Retry(Advice { after_milliseconds: retry_after_milliseconds(&response.headers), otherwise: answer })
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
        TransportFault::NameResolution | TransportFault::Connection | TransportFault::Tls => "provider_unreachable",
    };
    let otherwise = Answer::Failure(Failure { code: code.into(), message: error.message });
    Step::Retry(Advice { after_milliseconds: None, otherwise })
}

fn success(status: u16, request_id: Option<String>, text: Result<String, std::string::FromUtf8Error>) -> Step {
    let unreadable = |what: &str| {
        let message = format!("The provider answered {status} with {what} where a JSON object belongs.");
        failed("invalid_provider_response", message)
    };
    let Ok(body) = text else { return unreadable("text that is not UTF-8") };
    if !body.trim_ascii_start().starts_with('{') {
        return unreadable(&format!("`{}`", body.chars().take(80).collect::<String>().escape_debug()));
    }
    let counted = serde_json::from_str::<Counted>(&body);
    if counted.is_err()
        && let Err(error) = serde_json::from_str::<IgnoredAny>(&body)
    {
        return unreadable(&format!("what is not JSON ({error})"));
    }
    let usage = counted.ok().and_then(|counted| counted.usage).map(Tokens::into_usage);
    Step::Done(Answer::Response(Response { status, request_id, body, usage }))
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
        .map_or_else(|| body.trim().to_owned(), |said| said.as_str().map_or_else(|| said.to_string(), str::to_owned));
    let said: String = said.chars().take(QUOTED).collect();
    let message = match header(headers, "location") {
        Some(location) if (300..400).contains(&status) => {
            format!("The provider redirected with status {status} to {location}; set base_url to the place itself.")
        }
        _ if said.is_empty() => format!("The provider answered with status {status} and no message."),
        _ => said,
    };
    json!({"error": {"message": message, "type": "provider_error", "param": null, "code": null}})
}

/// An account without money answers 429 as well, and waiting does not help it.
fn is_quota(body: &Value) -> bool {
    ["code", "type"].iter().any(|key| body.pointer(&format!("/error/{key}")) == Some(&"insufficient_quota".into()))
}

#[derive(Deserialize)]
struct Counted {
    #[serde(default, deserialize_with = "lenient")]
    usage: Option<Tokens>,
}

/// Usage in the words of Responses, or in those of the older endpoints; some providers send both.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Tokens {
    #[serde(deserialize_with = "lenient")]
    input_tokens: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    prompt_tokens: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    input_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    prompt_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    output_tokens: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    completion_tokens: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    output_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    completion_tokens_details: Option<Details>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    #[serde(deserialize_with = "lenient")]
    cached_tokens: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    reasoning_tokens: Option<u64>,
}

impl Tokens {
    fn into_usage(self) -> Usage {
        let input_details = self.input_tokens_details.or(self.prompt_tokens_details);
        let output_details = self.output_tokens_details.or(self.completion_tokens_details);
        Usage {
            input_tokens: self.input_tokens.or(self.prompt_tokens).unwrap_or(0),
            cached_input_tokens: input_details.and_then(|of| of.cached_tokens).unwrap_or(0),
            output_tokens: self.output_tokens.or(self.completion_tokens).unwrap_or(0),
            reasoning_tokens: output_details.and_then(|of| of.reasoning_tokens).unwrap_or(0),
        }
    }
}

/// Reads a value of the wrong type as none: a provider's odd `usage` must not cost a good answer.
fn lenient<'de, D: serde::Deserializer<'de>, T: serde::de::DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    let raw = <&serde_json::value::RawValue>::deserialize(from)?;
    Ok(serde_json::from_str(raw.get()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)], body: &str) -> Step {
        let headers =
            headers.iter().map(|(name, value)| Header { name: (*name).into(), value: (*value).into() }).collect();
        answer(HttpResponse { status, headers, body: body.into() })
    }

    #[test]
    fn an_answer_comes_back_as_it_is_with_its_usage() {
        let body = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13,
            "prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}"#;
        let Step::Done(Answer::Response(got)) = response(200, &[("X-Request-Id", "r1")], body) else {
            panic!("expected a response")
        };
        assert_eq!((got.status, got.body.as_str(), got.request_id.as_deref()), (200, body, Some("r1")));
        let usage = got.usage.unwrap();
        let counts = (usage.input_tokens, usage.cached_input_tokens, usage.output_tokens, usage.reasoning_tokens);
        assert_eq!(counts, (9, 3, 4, 2));
    }

    #[test]
    fn an_odd_usage_does_not_cost_the_answer() {
        for usage in
            ["null", "7", "{}", r#"{"prompt_tokens":-1,"prompt_tokens_details":[]}"#, r#"{"input_tokens":null}"#]
        {
            let step = response(200, &[], &format!(r#"{{"usage":{usage}}}"#));
            assert!(matches!(step, Step::Done(Answer::Response(_))), "{usage}");
        }
        assert!(matches!(response(200, &[], r#"{"usage":1,"usage":2}"#), Step::Done(Answer::Response(_))));
    }

    #[test]
    fn a_200_that_is_no_json_object_is_a_failure() {
        for body in ["", "<html>", "[1]", "\"x\"", "{", "{} {}"] {
            let Step::Done(Answer::Failure(failure)) = response(200, &[], body) else { panic!("{body}") };
            assert_eq!(failure.code, "invalid_provider_response");
        }
    }

    #[test]
    fn rate_limits_and_server_errors_are_retried_and_an_empty_purse_is_not() {
        let error = |code: &str| format!(r#"{{"error":{{"message":"m","type":"t","code":"{code}"}}}}"#);
        let Step::Retry(advice) = response(429, &[("Retry-After", "7")], &error("rate_limit_exceeded")) else {
            panic!("429 is retried")
        };
        assert_eq!(advice.after_milliseconds, Some(7000));
        assert!(matches!(advice.otherwise, Answer::Response(Response { status: 429, .. })));
        assert!(matches!(response(429, &[], &error("insufficient_quota")), Step::Done(_)));
        assert!(matches!(response(503, &[], "<html>busy</html>"), Step::Retry(_)));
        assert!(matches!(response(400, &[], &error("bad")), Step::Done(_)));
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
            let Step::Done(Answer::Response(got)) = response(status, &[], body) else { panic!("{body}") };
            let got: Value = serde_json::from_str(&got.body).unwrap();
            assert_eq!(got.pointer("/error/message"), Some(&message.into()), "{body}");
        }
        let Step::Done(Answer::Response(got)) = response(308, &[("location", "https://x.example/")], "") else {
            panic!("a redirect is an answer")
        };
        assert!(got.body.contains("https://x.example/"));
    }
}
