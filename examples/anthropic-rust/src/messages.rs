//! Translation of the messages.
//!
//! System messages become the system prompt. The other messages become turns that alternate
//! between user and assistant: consecutive messages of one side are joined. Blank texts are left
//! out, because the provider refuses them.

use serde_json::{Value, json};

use crate::exact;
use crate::refused::Refused;

/// Image types that the API accepts.
const IMAGE_TYPES: [&str; 4] = ["image/jpeg", "image/png", "image/gif", "image/webp"];

/// Returns the blocks of the system prompt, and the turns.
pub(crate) fn conversation(messages: &[Value]) -> Result<(Vec<Value>, Vec<Value>), Refused> {
    let mut system = Vec::new();
    let mut turns: Vec<Value> = Vec::new();
    for message in messages {
        let given = message.get("content");
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer") => {
                let blocks = content(given)?;
                if blocks.iter().any(|block| block.get("type") != Some(&"text".into())) {
                    return Err(Refused::unsupported(
                        "messages",
                        "Anthropic's system prompt must be text.",
                    ));
                }
                system.extend(blocks);
            }
            Some("user") => add(&mut turns, "user", content(given)?),
            Some("assistant") => add(&mut turns, "assistant", assistant_blocks(message)?),
            Some("tool") => add(&mut turns, "user", vec![tool_result(message)?]),
            other => {
                return Err(Refused::invalid(format!(
                    "Unknown message role: {}",
                    other.unwrap_or("none")
                )));
            }
        }
    }
    trim_last(&mut turns);
    if turns.is_empty() {
        return Err(Refused::invalid(
            "Messages must have a text of the user: Anthropic refuses an empty conversation.",
        ));
    }
    Ok((system, turns))
}

/// Appends blocks: to the last turn if it has the same role, else as a new turn.
fn add(turns: &mut Vec<Value>, role: &str, mut blocks: Vec<Value>) {
    if blocks.is_empty() {
        return;
    }
    if let Some(last) = turns.last_mut()
        && last.get("role") == Some(&role.into())
        && let Some(Value::Array(content)) = last.get_mut("content")
    {
        content.append(&mut blocks);
    } else {
        turns.push(json!({"role": role, "content": blocks}));
    }
}

/// Trims white space at the end of a last turn of the assistant: the provider refuses it there.
fn trim_last(turns: &mut [Value]) {
    let Some(last) = turns.last_mut().filter(|turn| turn.get("role") == Some(&"assistant".into()))
    else {
        return;
    };
    let block =
        last.get_mut("content").and_then(Value::as_array_mut).and_then(|blocks| blocks.last_mut());
    if let Some(Value::String(text)) = block.and_then(|block| block.get_mut("text")) {
        text.truncate(text.trim_end().len());
    }
}

/// Returns a text block; none if the text is blank.
fn text(text: &str) -> Option<Value> {
    (!text.trim().is_empty()).then(|| json!({"type": "text", "text": text}))
}

/// Translates the content of a message into blocks.
fn content(content: Option<&Value>) -> Result<Vec<Value>, Refused> {
    match content {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(string)) => Ok(text(string).into_iter().collect()),
        Some(Value::Array(parts)) => parts.iter().filter_map(|one| part(one).transpose()).collect(),
        Some(_) => {
            Err(Refused::invalid("A message's content must be a string or an array of parts."))
        }
    }
}

/// Translates one part of a content; none if it is blank.
fn part(part: &Value) -> Result<Option<Value>, Refused> {
    match part.get("type").and_then(Value::as_str) {
        Some("text" | "refusal") => {
            let string = part
                .get("text")
                .or(part.get("refusal"))
                .and_then(Value::as_str)
                .unwrap_or_default();
            Ok(text(string))
        }
        Some("image_url") => {
            image(part.pointer("/image_url/url").and_then(Value::as_str).unwrap_or_default())
                .map(Some)
        }
        other => {
            let kind = other.unwrap_or("none");
            let why = format!("This provider accepts no message part of type '{kind}'.");
            Err(Refused::unsupported("messages", &why))
        }
    }
}

/// Translates an image.
fn image(url: &str) -> Result<Value, Refused> {
    let source = match url.strip_prefix("data:").map(|data| data.split_once(";base64,")) {
        Some(Some((kind, data))) if IMAGE_TYPES.contains(&kind) => {
            json!({"type": "base64", "media_type": kind, "data": data})
        }
        Some(_) => {
            let why = format!("Images must be base64 and of the types {}.", IMAGE_TYPES.join(", "));
            return Err(Refused::unsupported("messages", &why));
        }
        None if url.starts_with("https://") => json!({"type": "url", "url": url}),
        None => {
            return Err(Refused::unsupported(
                "messages",
                "The URL of an image must begin with https:// or data:.",
            ));
        }
    };
    Ok(json!({"type": "image", "source": source}))
}

/// Translates a message of the assistant, with its tool calls.
fn assistant_blocks(message: &Value) -> Result<Vec<Value>, Refused> {
    for name in ["audio", "function_call"] {
        if message.get(name).is_some_and(|value| !value.is_null()) {
            return Err(Refused::unsupported(
                "messages",
                &format!("This provider accepts no '{name}' of the assistant."),
            ));
        }
    }
    let mut blocks = content(message.get("content"))?;
    if blocks.is_empty() {
        blocks.extend(message.get("refusal").and_then(Value::as_str).and_then(text));
    }
    for call in message.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
        let string =
            |path: &str| call.pointer(path).and_then(Value::as_str).filter(|text| !text.is_empty());
        let (Some(id), Some(name)) = (string("/id"), string("/function/name")) else {
            return Err(Refused::invalid(
                "A tool call of the assistant must have an 'id' and a 'function' with a 'name'.",
            ));
        };
        let input = match call.pointer("/function/arguments") {
            // Some models write an empty string for no arguments.
            None | Some(Value::Null) => json!({}),
            Some(Value::String(arguments)) if arguments.trim().is_empty() => json!({}),
            Some(Value::String(arguments)) => exact::read(arguments).map_err(|error| {
                Refused::invalid(format!(
                    "The arguments of the tool call '{id}' are not JSON: {error}."
                ))
            })?,
            Some(other) => other.clone(),
        };
        let input = if input.is_null() { json!({}) } else { input };
        if !input.is_object() {
            return Err(Refused::invalid(format!(
                "The arguments of the tool call '{id}' must be a JSON object."
            )));
        }
        blocks.push(json!({"type": "tool_use", "id": id, "name": name, "input": input}));
    }
    Ok(blocks)
}

/// Translates a message of a tool.
fn tool_result(message: &Value) -> Result<Value, Refused> {
    let Some(id) = message.get("tool_call_id").and_then(Value::as_str).filter(|id| !id.is_empty())
    else {
        return Err(Refused::invalid("A message with the role 'tool' must have a 'tool_call_id'."));
    };
    let blocks = content(message.get("content"))?;
    let mut result = json!({"type": "tool_result", "tool_use_id": id});
    if let (false, Value::Object(result)) = (blocks.is_empty(), &mut result) {
        result.insert("content".into(), blocks.into());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(messages: Value) -> Value {
        let Value::Array(messages) = messages else { unreachable!() };
        conversation(&messages).map(|(_, turns)| turns.into()).unwrap()
    }

    fn refused(message: Value) -> String {
        conversation(&[message]).unwrap_err().message
    }

    #[test]
    fn conversation_with_tools_becomes_alternating_turns() {
        let call = |arguments: Value| {
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function",
                    "function": {"name": "look", "arguments": arguments}}]})
        };
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"}, {"type": "text", "text": " "},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
            call(json!("{\"x\":1}")),
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "It is  "},
        ]);
        assert_eq!(
            turns(messages),
            json!([
                {"role": "user", "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "c1"}, {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "It is"}]},
            ])
        );
        for arguments in [json!(""), json!(null), json!("null"), json!("{}")] {
            let turns = turns(json!([{"role": "user", "content": "x"}, call(arguments)]));
            assert_eq!(turns.pointer("/1/content/0/input"), Some(&json!({})));
        }
    }

    #[test]
    fn blank_texts_are_left_out_and_unsupported_parts_are_refused() {
        assert_eq!(
            turns(json!([
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "y"},
            ])),
            json!([{"role": "user", "content": [
                {"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}])
        );
        let call = |call: Value| json!({"role": "assistant", "tool_calls": [call]});
        let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
        let user = |part: Value| json!({"role": "user", "content": [part]});
        for (message, expected) in [
            (json!({"role": "robot"}), "Unknown message role: robot"),
            (json!({"role": "function", "content": "x"}), "Unknown message role: function"),
            (json!({}), "Unknown message role: none"),
            (json!({"role": "user", "content": " "}), "a text of the user"),
            (json!({"role": "user", "content": 7}), "a string or an array of parts"),
            (user(json!({"type": "input_audio"})), "no message part of type 'input_audio'"),
            (user(image("http://x")), "https:// or data:"),
            (user(image("data:image/bmp;base64,A")), "of the types image/jpeg"),
            (json!({"role": "system", "content": [image("https://x")]}), "must be text"),
            (json!({"role": "assistant", "audio": {"id": "a"}}), "'audio'"),
            (call(json!({"function": {"name": "f"}})), "must have an 'id'"),
            (
                call(json!({"id": "c", "function": {"name": "f", "arguments": "[1]"}})),
                "JSON object",
            ),
            (call(json!({"id": "c", "function": {"name": "f", "arguments": "{"}})), "not JSON"),
            (json!({"role": "tool", "content": "x"}), "'tool_call_id'"),
        ] {
            let refused = refused(message.clone());
            assert!(refused.contains(expected), "{message}: {refused}");
        }
    }
}
