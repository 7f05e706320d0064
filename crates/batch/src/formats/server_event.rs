//! Server-sent events (HTML standard, section 9.2) in the form of the OpenAI API.
//!
//! An event goes to the client as its provider wrote it. This module only reads it: errors, usage
//! and text. The members of a large event are read without its values, which would need many times
//! the memory of their text.

use std::borrow::Cow;

use batchwright_domain::usage::TokenUsage;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::formats::line::string;

/// Last event of a stream of the older endpoints.
const DONE: &str = "[DONE]";

/// Maximum size of an event whose values are read.
const MAX_VALUES_BYTES: usize = 64 << 10;

/// Maximum size of a usage.
const MAX_USAGE_BYTES: usize = 4 << 10;

/// What an event says.
pub(crate) enum Event {
    /// The stream is complete.
    Done,
    /// JSON object.
    Data(Data),
    /// Comment, or data that is no JSON object.
    Other,
}

/// What the data of an event says.
pub(crate) struct Data {
    /// True for an error.
    pub is_error: bool,
    /// Usage that the event reports.
    pub usage: Option<TokenUsage>,
    /// True if the event has usage and nothing else, as `include_usage` asks for.
    pub is_usage_alone: bool,
    /// True for the last event of a response, which has its usage.
    pub is_last: bool,
    /// Values; none if the event is too large.
    pub values: Option<Value>,
}

/// Members of an event as JSON texts.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    choices: Option<&'a RawValue>,
}

/// Usage within the response of an event.
#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
}

impl<'a> Members<'a> {
    fn parse(data: &'a str) -> Option<Self> {
        if data.trim_start().starts_with('{') { serde_json::from_str(data).ok() } else { None }
    }

    fn kind(&self) -> Option<Cow<'a, str>> {
        string(self.kind?.get())
    }

    fn is_error(&self) -> bool {
        self.error.is_some_and(|error| error.get().starts_with(['{', '"']))
            || self.kind().as_deref() == Some("error")
    }

    fn usage(&self) -> Option<TokenUsage> {
        let of_response = || {
            let response = self.response?.get();
            if !response.starts_with('{') {
                return None;
            }
            serde_json::from_str::<Response<'_>>(response).ok()?.usage
        };
        let usage = self.usage.or_else(of_response)?.get();
        if usage.len() > MAX_USAGE_BYTES {
            return None;
        }
        let usage = serde_json::from_str::<Value>(usage).ok()?;
        usage.is_object().then(|| tokens(&usage))
    }
}

/// Parses an event.
pub(crate) fn parse(event: &[u8]) -> Event {
    let Ok(text) = std::str::from_utf8(event) else { return Event::Other };
    let data = data(text);
    if data.trim() == DONE {
        return Event::Done;
    }
    let Some(members) = Members::parse(&data) else { return Event::Other };
    let usage = members.usage();
    let inside = members.choices.and_then(|choices| choices.get().strip_prefix('['));
    let has_no_choice = inside.is_some_and(|choices| choices.trim_start() == "]");
    let kind = members.kind();
    let is_small = data.len() <= MAX_VALUES_BYTES;
    Event::Data(Data {
        is_error: members.is_error(),
        is_usage_alone: has_no_choice && members.usage.is_some_and(|_| usage.is_some()),
        usage,
        is_last: matches!(
            kind.as_deref(),
            Some("response.completed" | "response.incomplete" | "response.failed")
        ),
        values: is_small.then(|| serde_json::from_str(&data).ok()).flatten(),
    })
}

/// Returns the `data` lines of an event, joined by line ends.
fn data(event: &str) -> String {
    let lines = event.split(['\n', '\r']).filter_map(|line| line.strip_prefix("data:"));
    let lines: Vec<_> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    lines.join("\n")
}

/// Returns the error of an event as the body of a response, or none if the event is no error.
pub(crate) fn error_of(event: &[u8]) -> Option<Vec<u8>> {
    let data = data(std::str::from_utf8(event).ok()?);
    let members = Members::parse(&data)?;
    if !members.is_error() {
        return None;
    }
    let body = match members.error.map(RawValue::get) {
        Some(error) if error.starts_with('{') => format!(r#"{{"error":{error}}}"#),
        Some(message) if message.starts_with('"') => {
            format!(r#"{{"error":{{"message":{message}}}}}"#)
        }
        _ => format!(r#"{{"error":{data}}}"#),
    };
    Some(body.into_bytes())
}

/// Returns the tokens of a usage.
fn tokens(usage: &Value) -> TokenUsage {
    let number = |value: Option<&Value>| value.and_then(Value::as_u64).unwrap_or(0);
    let largest = |names: [&str; 2]| names.map(|name| number(usage.get(name)));
    let detail = |names: [&str; 2], key: &str| {
        names.map(|name| number(usage.get(name).and_then(|details| details.get(key))))
    };
    let max = |numbers: [u64; 2]| numbers.into_iter().max().unwrap_or(0);
    let inputs = ["input_tokens_details", "prompt_tokens_details"];
    let outputs = ["output_tokens_details", "completion_tokens_details"];
    TokenUsage {
        input: max(largest(["input_tokens", "prompt_tokens"])),
        cached_input: max(detail(inputs, "cached_tokens")),
        output: max(largest(["output_tokens", "completion_tokens"])),
        reasoning: max(detail(outputs, "reasoning_tokens")),
    }
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

    fn data_of(event: &str) -> Data {
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
            assert_eq!(data_of(event).values, Some(json!({"a": 1})), "{event:?}");
        }
        assert!(matches!(parse(b"data: [DONE]\n\n"), Event::Done));
        for other in [": ping\n\n", "data: text\n\n", "data: 1\n\n", "data: [{}]\n\n", "\n\n"] {
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
        let read = |data: Value| data_of(&format!("data: {data}\n\n"));
        let usage = |data: Value| {
            read(data).usage.map(|usage| (usage.input, usage.output, usage.cached_input))
        };
        let chat = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 1}}});
        assert!(read(chat.clone()).is_usage_alone);
        assert_eq!(usage(chat), Some((3, 4, 1)));
        let response = json!({"type": "response.completed",
            "response": {"usage": {"input_tokens": 5, "output_tokens": 6}}});
        assert!(read(response.clone()).is_last && !read(response.clone()).is_usage_alone);
        assert_eq!(usage(response), Some((5, 6, 0)));
        for nothing in
            [json!({"choices": [{}], "usage": null}), json!({"usage": [1], "response": 1})]
        {
            assert_eq!(usage(nothing), None);
        }
    }

    #[test]
    fn large_event_has_its_usage_and_no_values() {
        let zeros = vec![0; MAX_VALUES_BYTES];
        let response = json!({"type": "response.completed",
            "response": {"output": zeros, "usage": {"input_tokens": 5, "output_tokens": 6}}});
        let data = data_of(&format!("data: {response}\n\n"));
        assert!(data.is_last && data.values.is_none());
        assert_eq!(data.usage.map(|usage| usage.input), Some(5));
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
