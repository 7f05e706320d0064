//! Rules: the required members of a line, and the required parameters of a body per endpoint.

use crate::line::{Body, Line, Object, Raw, parse};

/// Error of a line.
#[derive(Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

/// Accepted types of a body parameter.
enum Kind {
    Array,
    StringOrArray,
}

/// Required parameter of a body besides `model`: its name, its accessor and its type.
type Required = (&'static str, for<'a> fn(&Body<'a>) -> Option<Raw<'a>>, Kind);

/// API endpoint and the rules for its body.
pub(crate) struct Endpoint {
    pub(crate) path: &'static str,
    /// Name in error messages.
    name: &'static str,
    required: Required,
    /// Parameter that makes the required one optional.
    unless: Option<for<'a> fn(&Body<'a>) -> Option<Raw<'a>>>,
}

/// Endpoints and their required parameters, from the OpenAI API reference.
pub(crate) const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        path: "/v1/chat/completions",
        name: "Chat Completions",
        required: ("messages", |body| body.messages, Kind::Array),
        unless: None,
    },
    Endpoint {
        path: "/v1/completions",
        name: "Completions",
        required: ("prompt", |body| body.prompt, Kind::StringOrArray),
        unless: None,
    },
    Endpoint {
        path: "/v1/embeddings",
        name: "Embeddings",
        required: ("input", |body| body.input, Kind::StringOrArray),
        unless: None,
    },
    Endpoint {
        path: "/v1/responses",
        name: "Responses",
        required: ("input", |body| body.input, Kind::StringOrArray),
        // A stored prompt template can replace the input.
        unless: Some(|body| body.prompt),
    },
    Endpoint {
        path: "/v1/moderations",
        name: "Moderations",
        required: ("input", |body| body.input, Kind::StringOrArray),
        unless: None,
    },
];

/// Checks one line of a batch for this endpoint and reports every error.
pub(crate) fn check(endpoint: &str, text: &str, report: &mut dyn FnMut(Fault)) {
    match parse(text) {
        None => report(Fault {
            code: "invalid_json_line",
            message: "This line is not parseable as valid JSON.".into(),
            param: None,
        }),
        Some(Object::IsNot) => report(Fault {
            code: "invalid_request",
            message: "Each line must be a JSON dictionary object".into(),
            param: None,
        }),
        Some(Object::Is(line)) => check_line(endpoint, &line, report),
    }
}

fn check_line(endpoint: &str, line: &Line, report: &mut dyn FnMut(Fault)) {
    must_be_string("custom_id", "Custom_id", line.custom_id, report);
    must_be_string("method", "Method", line.method, report);
    must_be_string("url", "URL", line.url, report);
    match &line.body {
        None => report(missing("body")),
        Some(Object::IsNot) => {
            report(invalid("body", "Body must be a JSON dictionary object".into()))
        }
        Some(Object::Is(_)) => {}
    }
    if let Some(method) = line.method.filter(|method| method.is_string() && !method.is_text("POST"))
    {
        let method = method.to_text().unwrap_or_default();
        report(Fault {
            code: "invalid_method",
            message: format!("Invalid method: '{}'. Only 'POST' is allowed.", truncated(&method)),
            param: Some("method".into()),
        });
    }
    if let Some(url) = line.url.filter(|url| url.is_string() && !url.is_text(endpoint)) {
        let url = truncated(&url.to_text().unwrap_or_default());
        report(Fault {
            code: "invalid_url",
            message: format!(
                "The URL provided for this request does not match the batch endpoint. \
                 The line has '{url}', the batch '{endpoint}'."
            ),
            param: Some("url".into()),
        });
        return;
    }
    if let Some(Object::Is(body)) = &line.body {
        check_body(endpoint, body, report);
    }
}

fn check_body(endpoint: &str, body: &Body, report: &mut dyn FnMut(Fault)) {
    let Some(endpoint) = ENDPOINTS.iter().find(|known| known.path == endpoint) else {
        return;
    };
    match body.stream {
        Some(stream) if stream.as_bool() == Some(true) => report(Fault {
            code: "streaming_unsupported",
            message: format!("{}: Streaming is not supported in the Batch API.", endpoint.name),
            param: Some("body.stream".into()),
        }),
        Some(stream) if stream.as_bool().is_none() && !stream.is_null() => {
            report(invalid("body.stream", "Stream must be a boolean".into()));
        }
        _ => {}
    }
    match body.model {
        None => report(invalid("body.model", "Model parameter is required.".into())),
        Some(model) if !model.is_string() => {
            report(invalid("body.model", "Model must be a string".into()))
        }
        Some(_) => {}
    }
    let (name, value, kind) = &endpoint.required;
    let (fits, expected): (fn(Raw) -> bool, _) = match kind {
        Kind::Array => (|value| value.is_array(), "an array"),
        Kind::StringOrArray => {
            (|value| value.is_string() || value.is_array(), "a string or an array")
        }
    };
    match value(body) {
        None if endpoint.unless.is_some_and(|other| other(body).is_some()) => {}
        None => report(invalid(
            &format!("body.{name}"),
            format!("{} parameter is required.", capitalized(name)),
        )),
        Some(value) if !fits(value) => {
            report(invalid(
                &format!("body.{name}"),
                format!("{} must be {expected}", capitalized(name)),
            ));
        }
        Some(_) => {}
    }
}

fn must_be_string(param: &str, label: &str, value: Option<Raw>, report: &mut dyn FnMut(Fault)) {
    match value {
        None => report(missing(param)),
        Some(value) if !value.is_string() => {
            report(invalid(param, format!("{label} must be a string")))
        }
        Some(_) => {}
    }
}

fn missing(param: &str) -> Fault {
    Fault {
        code: "missing_required_parameter",
        message: format!("Missing required parameter: '{param}'."),
        param: Some(param.into()),
    }
}

fn invalid(param: &str, message: String) -> Fault {
    Fault { code: "invalid_request", message, param: Some(param.into()) }
}

fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect()
}

/// Truncates a client's value to 64 characters for a message.
fn truncated(value: &str) -> String {
    value.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "/v1/chat/completions";

    /// Returns one line per fault: `code param message`.
    fn faults(endpoint: &str, text: &str) -> String {
        let mut out = String::new();
        check(endpoint, text, &mut |fault| {
            let param = fault.param.unwrap_or_else(|| "-".into());
            out.push_str(&format!("{} {param} {}\n", fault.code, fault.message));
        });
        out
    }

    fn chat(body: &str) -> String {
        faults(
            CHAT,
            &format!(r#"{{"custom_id":"a","method":"POST","url":"{CHAT}","body":{body}}}"#),
        )
    }

    #[test]
    fn valid_line_of_every_endpoint_is_accepted() {
        for (endpoint, body) in [
            (CHAT, r#"{"model":"m","messages":[{"role":"user"}],"unknown":{"x":[1e999]}}"#),
            ("/v1/completions", r#"{"model":"m","prompt":"hi"}"#),
            ("/v1/completions", r#"{"model":"m","prompt":["hi"],"stream":false}"#),
            ("/v1/embeddings", r#"{"model":"m","input":["a","b"],"stream":null}"#),
            ("/v1/responses", r#"{"model":"m","input":"hi"}"#),
            ("/v1/responses", r#"{"model":"m","prompt":{"id":"p"}}"#),
            ("/v1/moderations", r#"{"model":"m","input":"hi"}"#),
        ] {
            let line = format!(
                r#"{{"custom_id":"","method":"P\u004fST","url":"{endpoint}","body":{body},"x":1}}"#
            );
            assert_eq!(faults(endpoint, &line), "", "{line}");
        }
    }

    #[test]
    fn line_that_is_not_a_json_object_has_one_fault() {
        for text in [
            "{",
            "nope",
            "{\"a\":1} x",
            "{\"a\":\"\u{1}\"}",
            "{'a':1}",
            "{\"body\":{\"model\":}}",
            "01",
        ] {
            assert_eq!(
                faults(CHAT, text),
                "invalid_json_line - This line is not parseable as valid JSON.\n",
                "{text}"
            );
        }
        for text in ["[]", "[\"a\",\"POST\",\"u\",{}]", "1", "1e999", "null", "true", "\"{}\""] {
            assert_eq!(
                faults(CHAT, text),
                "invalid_request - Each line must be a JSON dictionary object\n",
                "{text}"
            );
        }
    }

    #[test]
    fn faults_of_a_line_are_all_reported_in_order() {
        assert_eq!(
            faults(CHAT, "{}"),
            "missing_required_parameter custom_id Missing required parameter: 'custom_id'.\n\
             missing_required_parameter method Missing required parameter: 'method'.\n\
             missing_required_parameter url Missing required parameter: 'url'.\n\
             missing_required_parameter body Missing required parameter: 'body'.\n"
        );
        assert_eq!(
            faults(CHAT, r#"{"custom_id":1,"method":null,"url":[],"body":"x"}"#),
            "invalid_request custom_id Custom_id must be a string\n\
             invalid_request method Method must be a string\n\
             invalid_request url URL must be a string\n\
             invalid_request body Body must be a JSON dictionary object\n"
        );
        assert_eq!(
            chat(r#"{"stream":true}"#),
            "streaming_unsupported body.stream \
             Chat Completions: Streaming is not supported in the Batch API.\n\
             invalid_request body.model Model parameter is required.\n\
             invalid_request body.messages Messages parameter is required.\n"
        );
        assert_eq!(
            chat(r#"{"model":7,"messages":"hi","stream":"yes"}"#),
            "invalid_request body.stream Stream must be a boolean\n\
             invalid_request body.model Model must be a string\n\
             invalid_request body.messages Messages must be an array\n"
        );
        assert_eq!(
            faults(
                "/v1/embeddings",
                r#"{"custom_id":"a","method":"POST","url":"/v1/embeddings",
                "body":{"model":"m","input":3}}"#
            ),
            "invalid_request body.input Input must be a string or an array\n"
        );
    }

    #[test]
    fn body_is_checked_after_a_wrong_method_and_skipped_after_a_wrong_url() {
        assert_eq!(
            faults(CHAT, r#"{"custom_id":"a","method":"GET","url":"/v1/embeddings","body":{}}"#),
            "invalid_method method Invalid method: 'GET'. Only 'POST' is allowed.\n\
             invalid_url url The URL provided for this request does not match the batch endpoint. \
             The line has '/v1/embeddings', the batch '/v1/chat/completions'.\n"
        );
        assert_eq!(
            faults(
                CHAT,
                &format!(
                    r#"{{"custom_id":"a","method":"","url":"{CHAT}","body":{{"messages":[]}}}}"#
                )
            ),
            "invalid_method method Invalid method: ''. Only 'POST' is allowed.\n\
             invalid_request body.model Model parameter is required.\n"
        );
        assert_eq!(
            faults(CHAT, r#"{"custom_id":"a","method":"POST","url":"","body":{}}"#),
            "invalid_url url The URL provided for this request does not match the batch endpoint. \
             The line has '', the batch '/v1/chat/completions'.\n"
        );
    }

    #[test]
    fn last_duplicate_key_wins_and_huge_numbers_are_json() {
        assert_eq!(chat(r#"{"model":1,"model":"m","messages":[]}"#), "");
        assert_eq!(
            faults(
                CHAT,
                &format!(r#"{{"custom_id":1e999,"method":"POST","url":"{CHAT}","body":1e999}}"#)
            ),
            "invalid_request custom_id Custom_id must be a string\n\
             invalid_request body Body must be a JSON dictionary object\n"
        );
    }
}
