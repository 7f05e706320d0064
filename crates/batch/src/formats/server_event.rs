//! Server-sent events (HTML standard, section 9.2) in the form of the OpenAI API.
//!
//! An event goes to the client as its provider wrote it. This module only reads it: errors, usage
//! and text.

use batchwright_domain::usage::TokenUsage;
use serde_json::{Value, json};

/// Last event of a stream of the older endpoints.
const DONE: &str = "[DONE]";

/// What an event says.
pub(crate) enum Event {
    /// The stream is complete.
    Done,
    /// JSON object.
    Data(Value),
    /// Comment, or data that is no JSON object.
    Other,
}

/// Parses an event.
pub(crate) fn parse(event: &[u8]) -> Event {
    let Ok(text) = std::str::from_utf8(event) else { return Event::Other };
    let data = data(text);
    if data.trim() == DONE {
        return Event::Done;
    }
    match serde_json::from_str(&data) {
        Ok(value @ Value::Object(_)) => Event::Data(value),
        _ => Event::Other,
    }
}

/// Returns the `data` lines of an event, joined by line ends.
fn data(event: &str) -> String {
    let lines = event.split(['\n', '\r']).filter_map(|line| line.strip_prefix("data:"));
    let lines: Vec<_> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    lines.join("\n")
}

/// Returns the error of an event as the body of a response, or none if the event is no error.
pub(crate) fn error_of(event: &[u8]) -> Option<Vec<u8>> {
    let Event::Data(mut data) = parse(event) else { return None };
    is_error(&data).then(|| {
        let body = match data.get("error") {
            Some(Value::Object(_)) => data,
            Some(Value::String(message)) => json!({"error": {"message": message}}),
            _ => json!({"error": data.take()}),
        };
        body.to_string().into_bytes()
    })
}

/// Returns true if the data of an event is an error.
pub(crate) fn is_error(data: &Value) -> bool {
    matches!(data.get("error"), Some(Value::Object(_) | Value::String(_)))
        || data.get("type").and_then(Value::as_str) == Some("error")
}

/// Returns the usage that an event reports.
pub(crate) fn usage(data: &Value) -> Option<TokenUsage> {
    let usage = data.get("usage").filter(|usage| usage.is_object());
    let of_response = || data.get("response")?.get("usage").filter(|usage| usage.is_object());
    let usage = usage.or_else(of_response)?;
    let number = |value: Option<&Value>| value.and_then(Value::as_u64).unwrap_or(0);
    let largest = |names: [&str; 2]| names.map(|name| number(usage.get(name)));
    let detail = |names: [&str; 2], key: &str| {
        names.map(|name| number(usage.get(name).and_then(|details| details.get(key))))
    };
    let max = |numbers: [u64; 2]| numbers.into_iter().max().unwrap_or(0);
    let inputs = ["input_tokens_details", "prompt_tokens_details"];
    let outputs = ["output_tokens_details", "completion_tokens_details"];
    Some(TokenUsage {
        input: max(largest(["input_tokens", "prompt_tokens"])),
        cached_input: max(detail(inputs, "cached_tokens")),
        output: max(largest(["output_tokens", "completion_tokens"])),
        reasoning: max(detail(outputs, "reasoning_tokens")),
    })
}

/// Returns true if an event has usage and nothing else, as `include_usage` asks for.
pub(crate) fn is_usage_alone(data: &Value) -> bool {
    let choices = data.get("choices").and_then(Value::as_array);
    choices.is_some_and(Vec::is_empty) && data.get("usage").is_some_and(Value::is_object)
}

/// Returns true for the last event of a response, which has its usage.
pub(crate) fn is_last(data: &Value) -> bool {
    let kind = data.get("type").and_then(Value::as_str);
    matches!(kind, Some("response.completed" | "response.incomplete" | "response.failed"))
}

/// Removes the probabilities of tokens, which repeat the text.
pub(crate) fn remove_logprobs(data: &mut Value) {
    let choices = data.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten();
    for choice in choices.filter_map(Value::as_object_mut) {
        choice.remove("logprobs");
    }
    if let Some(data) = data.as_object_mut() {
        data.remove("logprobs");
    }
}

/// Returns each text that an event adds to an answer, with the name of what it continues.
pub(crate) fn texts(data: &mut Value) -> Vec<(String, &mut String)> {
    let mut found = Vec::new();
    let Value::Object(members) = data else { return found };
    let text = |name: &str| members.get(name).and_then(Value::as_str).unwrap_or_default();
    // Events of responses: the place is in members beside the text.
    let place = format!("{}/{}", text("type"), text("item_id"));
    for (name, value) in members {
        match (name.as_str(), value) {
            ("delta", Value::String(text)) => found.push((place.clone(), text)),
            ("choices", Value::Array(choices)) => {
                for choice in choices {
                    let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
                    let members = choice.as_object_mut().into_iter().flatten();
                    for (key, value) in members.filter(|(key, _)| *key == "delta" || *key == "text")
                    {
                        collect(value, format!("{index}/{key}"), &mut found);
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// Collects the strings of a value, each with its path.
fn collect<'a>(value: &'a mut Value, path: String, found: &mut Vec<(String, &'a mut String)>) {
    match value {
        Value::String(text) => found.push((path, text)),
        Value::Array(values) => {
            for (index, value) in values.iter_mut().enumerate() {
                let index = value.get("index").and_then(Value::as_u64).unwrap_or(index as u64);
                collect(value, format!("{path}/{index}"), found);
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                collect(value, format!("{path}/{name}"), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Returns the lines of an event before its data, such as `event: …`.
fn head(event: &[u8]) -> String {
    let text = String::from_utf8_lossy(event);
    let lines = text.split(['\n', '\r']);
    let head = lines.filter(|line| !line.is_empty() && !line.starts_with("data:"));
    head.map(|line| format!("{line}\n")).collect()
}

/// Returns an event with other data.
pub(crate) fn with_data(event: &[u8], data: &Value) -> Vec<u8> {
    format!("{}data: {data}\n\n", head(event)).into_bytes()
}

/// Returns the event of an error that ends a stream.
pub(crate) fn error_event(code: &str, message: &str) -> Vec<u8> {
    let error = json!({"message": message, "type": "server_error", "param": null, "code": code});
    format!("event: error\ndata: {}\n\n", json!({"error": error})).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_of(event: &str) -> Value {
        match parse(event.as_bytes()) {
            Event::Data(data) => data,
            _ => panic!("{event}"),
        }
    }

    #[test]
    fn events_are_parsed_whatever_their_line_ends_and_spaces() {
        for event in
            ["data: {\"a\":1}\n\n", "data:{\"a\":1}\r\n\r\n", "id: 1\rdata: {\ndata: \"a\":1}\n\n"]
        {
            assert_eq!(data_of(event), json!({"a": 1}), "{event:?}");
        }
        assert!(matches!(parse(b"data: [DONE]\n\n"), Event::Done));
        for other in [": ping\n\n", "data: text\n\n", "data: 1\n\n", "\n\n"] {
            assert!(matches!(parse(other.as_bytes()), Event::Other), "{other:?}");
        }
    }

    #[test]
    fn errors_are_found_in_the_forms_of_both_apis() {
        let error =
            |event: &str| error_of(event.as_bytes()).map(|body| String::from_utf8(body).unwrap());
        assert_eq!(
            error("data: {\"error\":{\"message\":\"m\"}}\n\n").unwrap(),
            r#"{"error":{"message":"m"}}"#
        );
        let of_responses =
            error("event: error\ndata: {\"type\":\"error\",\"message\":\"m\"}\n\n").unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&of_responses).unwrap()["error"]["message"],
            json!("m")
        );
        assert_eq!(error("data: {\"error\":null,\"choices\":[]}\n\n"), None);
    }

    #[test]
    fn usage_is_read_in_the_forms_of_both_apis() {
        let usage =
            |data: Value| usage(&data).map(|usage| (usage.input, usage.output, usage.cached_input));
        let chat = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 1}}});
        assert!(is_usage_alone(&chat));
        assert_eq!(usage(chat), Some((3, 4, 1)));
        let response = json!({"type": "response.completed",
            "response": {"usage": {"input_tokens": 5, "output_tokens": 6}}});
        assert_eq!(usage(response), Some((5, 6, 0)));
        assert_eq!(usage(json!({"choices": [{}], "usage": null})), None);
    }

    #[test]
    fn texts_are_named_by_what_they_continue() {
        let mut chat = json!({"choices": [
            {"index": 1, "delta": {"content": "a",
                "tool_calls": [{"index": 2, "function": {"arguments": "b"}}]}},
            {"index": 0, "text": "c"}]});
        let names: Vec<_> =
            texts(&mut chat).into_iter().map(|(name, text)| (name, text.clone())).collect();
        let expected = [
            ("1/delta/content", "a"),
            ("1/delta/tool_calls/2/function/arguments", "b"),
            ("0/text", "c"),
        ];
        assert_eq!(names, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
        let mut response =
            json!({"type": "response.output_text.delta", "item_id": "i", "delta": "x"});
        assert_eq!(texts(&mut response).len(), 1);
    }

    #[test]
    fn data_is_replaced_and_the_other_lines_stay() {
        let event = with_data(b"event: x\nid: 1\ndata: {}\n\n", &json!({"a": "b"}));
        assert_eq!(String::from_utf8(event).unwrap(), "event: x\nid: 1\ndata: {\"a\":\"b\"}\n\n");
    }
}
