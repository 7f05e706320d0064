//! From a chat completion's request to a message's.

use serde_json::{Map, Value, json};

/// The body to send, and the model as the client named it. An error is a sentence for whoever wrote the request.
pub(crate) fn translate(body: &str, model: &str, max_tokens: u64) -> Result<(Value, String), String> {
    let body: Map<String, Value> =
        serde_json::from_str(body).map_err(|error| format!("The body cannot be read: {error}."))?;
    let given = |name: &str| body.get(name).filter(|value| !value.is_null());
    let Some(Value::Array(messages)) = given("messages") else { return Err("Messages must be an array.".into()) };
    if given("n").is_some_and(|n| *n != json!(1)) {
        return Err("This provider gives one choice for a request: 'n' must be 1.".into());
    }
    let mut system = Vec::new();
    let mut turns: Vec<Value> = Vec::new();
    for message in messages {
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer") => system.extend(content(message.get("content"))?),
            Some("user") => add(&mut turns, "user", content(message.get("content"))?),
            Some("assistant") => add(&mut turns, "assistant", said_by_assistant(message)?),
            Some("tool") => {
                let id = message.get("tool_call_id").cloned().unwrap_or_default();
                let result =
                    json!({"type": "tool_result", "tool_use_id": id, "content": content(message.get("content"))?});
                add(&mut turns, "user", vec![result]);
            }
            other => return Err(format!("Unknown message role: {}", other.unwrap_or("none"))),
        }
    }
    let asked_tokens = given("max_completion_tokens").or(given("max_tokens")).cloned();
    let mut sent = json!({
        "model": model,
        "max_tokens": asked_tokens.unwrap_or_else(|| max_tokens.into()),
        "messages": turns,
    });
    let mut set = |name: &str, value: Value| {
        if let Value::Object(sent) = &mut sent {
            sent.insert(name.into(), value);
        }
    };
    if !system.is_empty() {
        set("system", system.into());
    }
    for (theirs, ours) in [("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")] {
        if let Some(value) = given(theirs) {
            set(ours, value.clone());
        }
    }
    match given("stop") {
        Some(Value::String(stop)) => set("stop_sequences", json!([stop])),
        Some(stops) => set("stop_sequences", stops.clone()),
        None => {}
    }
    if let Some(user) = given("user") {
        set("metadata", json!({"user_id": user}));
    }
    if let Some(Value::Array(tools)) = given("tools") {
        set("tools", tools.iter().filter_map(tool).collect());
    }
    if let Some(choice) = given("tool_choice") {
        set("tool_choice", tool_choice(choice));
    }
    let asked_model = given("model").and_then(Value::as_str).unwrap_or(model).to_owned();
    Ok((sent, asked_model))
}

/// Adds to the last turn if it is the same side's: turns alternate.
fn add(turns: &mut Vec<Value>, role: &str, mut blocks: Vec<Value>) {
    if let Some(last) = turns.last_mut()
        && last.get("role") == Some(&role.into())
        && let Some(Value::Array(content)) = last.get_mut("content")
    {
        content.append(&mut blocks);
    } else {
        turns.push(json!({"role": role, "content": blocks}));
    }
}

fn content(content: Option<&Value>) -> Result<Vec<Value>, String> {
    match content {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![json!({"type": "text", "text": text})]),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        Some(_) => Err("A message's content must be a string or an array of parts.".into()),
    }
}

fn part(part: &Value) -> Result<Value, String> {
    match part.get("type").and_then(Value::as_str) {
        Some("text" | "refusal") => {
            let text = part.get("text").or(part.get("refusal")).cloned().unwrap_or_default();
            Ok(json!({"type": "text", "text": text}))
        }
        Some("image_url") => {
            let url = part.pointer("/image_url/url").and_then(Value::as_str).unwrap_or_default();
            Ok(match url.strip_prefix("data:").and_then(|data| data.split_once(";base64,")) {
                Some((media, data)) => {
                    json!({"type": "image", "source": {"type": "base64", "media_type": media, "data": data}})
                }
                None => json!({"type": "image", "source": {"type": "url", "url": url}}),
            })
        }
        other => Err(format!("This provider takes no message part of type '{}'.", other.unwrap_or("none"))),
    }
}

fn said_by_assistant(message: &Value) -> Result<Vec<Value>, String> {
    let mut blocks = content(message.get("content"))?;
    for call in message.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
        let arguments = call.pointer("/function/arguments").and_then(Value::as_str).unwrap_or("{}");
        let input: Value = serde_json::from_str(arguments)
            .map_err(|error| format!("A tool call's arguments are not JSON: {error}."))?;
        let (id, name) = (call.get("id"), call.pointer("/function/name"));
        blocks.push(json!({"type": "tool_use", "id": id, "name": name, "input": input}));
    }
    Ok(blocks)
}

fn tool(tool: &Value) -> Option<Value> {
    let function = tool.get("function")?;
    let mut named = json!({
        "name": function.get("name")?,
        "input_schema": function.get("parameters").cloned().unwrap_or_else(|| json!({"type": "object"})),
    });
    if let (Some(description), Value::Object(named)) = (function.get("description"), &mut named) {
        named.insert("description".into(), description.clone());
    }
    Some(named)
}

fn tool_choice(choice: &Value) -> Value {
    match choice.as_str() {
        Some("required") => json!({"type": "any"}),
        Some("none") => json!({"type": "none"}),
        Some(_) => json!({"type": "auto"}),
        None => json!({"type": "tool", "name": choice.pointer("/function/name")}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_with_tools_becomes_alternating_turns() {
        let body = json!({
            "model": "small", "stop": "END", "temperature": 0.5, "tool_choice": "required",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\"x\":1}"}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
                {"role": "user", "content": "So?"},
            ],
            "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}],
        });
        let (sent, model) = translate(&body.to_string(), "claude", 10).unwrap();
        assert_eq!(model, "small");
        assert_eq!(
            sent,
            json!({
                "model": "claude", "max_tokens": 10, "temperature": 0.5, "stop_sequences": ["END"],
                "system": [{"type": "text", "text": "Be brief."}], "tool_choice": {"type": "any"},
                "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What is this?"},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}}]},
                    {"role": "user", "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a cat"}]},
                        {"type": "text", "text": "So?"}]},
                ],
            })
        );
    }

    #[test]
    fn what_the_provider_cannot_do_is_said_before_anything_is_sent() {
        for (body, said) in [
            (r#"{"messages":[{"role":"robot"}]}"#, "Unknown message role: robot"),
            (r#"{"messages":[{}]}"#, "Unknown message role: none"),
            (r#"{"messages":"hi"}"#, "Messages must be an array."),
            (r#"{"messages":[],"n":2}"#, "'n' must be 1"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"input_audio"}]}]}"#,
                "no message part of type 'input_audio'",
            ),
            (r#"{"messages":[{"role":"user","content":7}]}"#, "a string or an array of parts"),
            ("[]", "cannot be read"),
        ] {
            assert!(translate(body, "m", 1).unwrap_err().contains(said), "{body}");
        }
    }
}
