//! Translation of the request body.
//!
//! Every parameter of a chat completion is translated, left out because the answer is the same
//! without it, or refused by its name. An unknown parameter is refused, because leaving it out
//! could change the answer.

use serde_json::{Map, Value, json};

use crate::exact;
use crate::messages::conversation;
use crate::refused::Refused;
use crate::tools;

/// Parameters that are translated.
const TRANSLATED: [&str; 14] = [
    "model",
    "messages",
    "max_completion_tokens",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "reasoning_effort",
    "service_tier",
];

/// Parameters that are left out. They affect cost, speed and storage, not the answer.
const IGNORED: [&str; 11] = [
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "stream_options",
    "seed",
    "stream",
];

/// Returns true if the value is the parameter's default. The Messages API does not have these
/// parameters, so any other value is refused.
fn is_default(name: &str, value: &Value) -> bool {
    match name {
        "n" => value.as_f64() == Some(1.0),
        "logprobs" => *value == Value::Bool(false),
        "top_logprobs" | "presence_penalty" | "frequency_penalty" => value.as_f64() == Some(0.0),
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "modalities" => *value == json!(["text"]),
        "verbosity" => *value == json!("medium"),
        _ => false,
    }
}

/// Returns the body to send, and the client's name of the model.
pub(crate) fn translate(
    body: &str,
    model: &str,
    max_tokens: u64,
) -> Result<(Value, String), Refused> {
    let unreadable = |why: String| Refused::invalid(format!("The body cannot be read: {why}."));
    let body = exact::read(body).map_err(|error| unreadable(error.to_string()))?;
    let Value::Object(body) = body else { return Err(unreadable("it is not an object".into())) };
    let given = Given(&body);
    for (name, value) in body.iter().filter(|(_, value)| !value.is_null()) {
        let known = TRANSLATED.contains(&name.as_str()) || IGNORED.contains(&name.as_str());
        if (name == "stream" && *value == Value::Bool(true)) || !(known || is_default(name, value))
        {
            return Err(Refused::unsupported(
                name,
                "Anthropic's Messages API has no such parameter; remove it.",
            ));
        }
    }
    let Some(Value::Array(messages)) = given.get("messages") else {
        return Err(Refused::invalid("Messages must be an array."));
    };
    let (system, turns) = conversation(messages)?;
    let tokens = given.get("max_completion_tokens").or(given.get("max_tokens")).cloned();
    if tokens.as_ref().is_some_and(|tokens| tokens.as_u64().is_none_or(|tokens| tokens == 0)) {
        return Err(Refused::invalid(
            "'max_completion_tokens' must be a whole number of at least 1.",
        ));
    }
    let mut sent = Map::new();
    sent.insert("model".into(), model.into());
    sent.insert("max_tokens".into(), tokens.unwrap_or_else(|| max_tokens.into()));
    if !system.is_empty() {
        sent.insert("system".into(), system.into());
    }
    sent.insert("messages".into(), turns.into());
    sampling(given, &mut sent)?;
    let user = given.get("safety_identifier").or(given.get("user")).and_then(Value::as_str);
    // The provider refuses email addresses here.
    if let Some(user) = user.filter(|user| !user.contains('@')) {
        sent.insert("metadata".into(), json!({"user_id": user}));
    }
    tools::translate(given, &mut sent)?;
    output(given, &mut sent)?;
    match given.get("service_tier").and_then(Value::as_str) {
        None | Some("auto") => {}
        Some("default") => drop(sent.insert("service_tier".into(), "standard_only".into())),
        Some(_) => return Err(Refused::unsupported("service_tier", "Use 'auto' or 'default'.")),
    }
    let client_model = given.get("model").and_then(Value::as_str).unwrap_or(model).to_owned();
    Ok((Value::Object(sent), client_model))
}

/// Parameters of a request. A parameter that is null counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Given<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Given<'a> {
    /// Returns a parameter; none if it is absent or null.
    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }
}

/// Translates the sampling parameters.
fn sampling(given: Given, sent: &mut Map<String, Value>) -> Result<(), Refused> {
    // Newer models refuse these parameters even with the default of 1.
    for name in ["temperature", "top_p"] {
        match given.get(name) {
            Some(value) if value.as_f64() == Some(1.0) => {}
            Some(value) if value.as_f64().is_some_and(|number| (0.0..1.0).contains(&number)) => {
                sent.insert(name.into(), value.clone());
            }
            Some(_) => {
                return Err(Refused::unsupported(name, "Anthropic accepts a number from 0 to 1."));
            }
            None => {}
        }
    }
    if let Some(value) = given.get("top_k") {
        sent.insert("top_k".into(), value.clone());
    }
    let stops = match given.get("stop") {
        None => return Ok(()),
        Some(Value::Array(stops)) => stops.clone(),
        Some(stop) => vec![stop.clone()],
    };
    if stops.iter().any(|stop| stop.as_str().is_none_or(|stop| stop.trim().is_empty())) {
        return Err(Refused::unsupported("stop", "Anthropic accepts strings that are not blank."));
    }
    if !stops.is_empty() {
        sent.insert("stop_sequences".into(), stops.into());
    }
    Ok(())
}

/// Translates the response format and the reasoning effort.
fn output(given: Given, sent: &mut Map<String, Value>) -> Result<(), Refused> {
    let mut config = Map::new();
    if let Some(format) = given.get("response_format") {
        match format.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some("json_schema") => {
                let Some(schema @ Value::Object(_)) = format.pointer("/json_schema/schema") else {
                    return Err(Refused::invalid(
                        "'response_format.json_schema.schema' must be an object.",
                    ));
                };
                let mut schema = schema.clone();
                close_objects(&mut schema)?;
                config.insert("format".into(), json!({"type": "json_schema", "schema": schema}));
            }
            _ => {
                let why =
                    "Anthropic supports structured output only with a schema; use 'json_schema'.";
                return Err(Refused::unsupported("response_format", why));
            }
        }
    }
    match given.get("reasoning_effort").and_then(Value::as_str) {
        None if given.get("reasoning_effort").is_none() => {}
        Some("none") => drop(sent.insert("thinking".into(), json!({"type": "disabled"}))),
        Some("minimal") => drop(config.insert("effort".into(), "low".into())),
        Some(effort @ ("low" | "medium" | "high" | "xhigh" | "max")) => {
            config.insert("effort".into(), effort.into());
        }
        _ => {
            return Err(Refused::unsupported(
                "reasoning_effort",
                "Use none, minimal, low, medium, high, xhigh or max.",
            ));
        }
    }
    if !config.is_empty() {
        sent.insert("output_config".into(), config.into());
    }
    Ok(())
}

/// Sets `additionalProperties: false` on every object of a schema, which the API requires.
fn close_objects(schema: &mut Value) -> Result<(), Refused> {
    match schema {
        Value::Object(object) => {
            let is_object =
                object.get("type") == Some(&json!("object")) || object.contains_key("properties");
            if is_object
                && object
                    .get("additionalProperties")
                    .is_some_and(|more| *more != Value::Bool(false))
            {
                let why = "Anthropic accepts only objects with additionalProperties false.";
                return Err(Refused::unsupported("response_format", why));
            }
            if is_object {
                object.insert("additionalProperties".into(), false.into());
            }
            object.values_mut().try_for_each(close_objects)
        }
        Value::Array(items) => items.iter_mut().try_for_each(close_objects),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(body: Value) -> Value {
        translate(&body.to_string(), "claude", 10).map(|(sent, _)| sent).unwrap()
    }

    fn refused(body: &Value) -> String {
        let refused = translate(&body.to_string(), "m", 1).unwrap_err();
        format!("{}: {}", refused.code, refused.message)
    }

    fn with(more: &Value) -> Value {
        let mut body = json!({"model": "small", "messages": [{"role": "user", "content": "hi"}]});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more.clone());
        }
        body
    }

    #[test]
    fn supported_parameters_are_translated() {
        for (more, expected) in [
            (
                json!({"stop": "END", "temperature": 0.5}),
                json!({"stop_sequences": ["END"], "temperature": 0.5}),
            ),
            (json!({"temperature": 1, "top_p": 1.0, "stop": []}), json!({})),
            (json!({"max_completion_tokens": 7, "max_tokens": 9}), json!({"max_tokens": 7})),
            (json!({"user": "u", "safety_identifier": "s"}), json!({"metadata": {"user_id": "s"}})),
            (json!({"user": "a@example.com"}), json!({})),
            (json!({"service_tier": "default"}), json!({"service_tier": "standard_only"})),
            (json!({"reasoning_effort": "none"}), json!({"thinking": {"type": "disabled"}})),
            (json!({"reasoning_effort": "minimal"}), json!({"output_config": {"effort": "low"}})),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n",
                    "schema": {"type": "object",
                        "properties": {"a": {"type": "array", "items": {"type": "object"}}}}}}}),
                json!({"output_config": {"format": {"type": "json_schema", "schema": {
                    "type": "object", "additionalProperties": false,
                    "properties": {"a": {"type": "array",
                        "items": {"type": "object", "additionalProperties": false}}}}}}}),
            ),
            (
                json!({"n": 1, "logprobs": false, "presence_penalty": 0.0, "logit_bias": {},
                    "seed": 7, "store": true, "modalities": ["text"],
                    "response_format": {"type": "text"}, "stream": false, "unknown": null}),
                json!({}),
            ),
        ] {
            let sent = sent(with(&more));
            let mut whole = json!({"model": "claude", "max_tokens": 10,
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]});
            if let (Value::Object(whole), Value::Object(expected)) = (&mut whole, expected) {
                whole.extend(expected);
            }
            assert_eq!(sent, whole, "{more}");
        }
    }

    #[test]
    fn unsupported_parameters_are_refused_by_name() {
        for (more, named) in [
            (json!({"n": 2}), "'n'"),
            (json!({"logprobs": true}), "'logprobs'"),
            (json!({"logit_bias": {"1": 2}}), "'logit_bias'"),
            (json!({"presence_penalty": 0.5}), "'presence_penalty'"),
            (json!({"audio": {}}), "'audio'"),
            (json!({"functions": []}), "'functions'"),
            (json!({"web_search_options": {}}), "'web_search_options'"),
            (json!({"nobody_knows": 1}), "'nobody_knows'"),
            (json!({"stream": true}), "'stream'"),
            (json!({"temperature": 1.5}), "'temperature'"),
            (json!({"stop": [" "]}), "'stop'"),
            (json!({"response_format": {"type": "json_object"}}), "'response_format'"),
            (json!({"reasoning_effort": "much"}), "'reasoning_effort'"),
            (json!({"service_tier": "flex"}), "'service_tier'"),
        ] {
            let refused = refused(&with(&more));
            assert!(
                refused.starts_with("unsupported_parameter: ") && refused.contains(named),
                "{more}: {refused}"
            );
        }
        assert!(
            refused(&json!({"messages": "hi"}))
                .starts_with("invalid_request: Messages must be an array.")
        );
        assert!(refused(&with(&json!({"max_tokens": 0}))).contains("at least 1"));
        assert!(translate("[]", "m", 1).unwrap_err().message.contains("cannot be read"));
    }

    #[test]
    fn numbers_in_tool_arguments_are_sent_exactly() {
        let body = r#"{"messages":[{"role":"user","content":"x"},
            {"role":"assistant","tool_calls":[{"id":"c","type":"function","function":{"name":"f",
            "arguments":"{\"a\":123456789012345678901234567890,\"b\":1e400,\"c\":1.10}"}}]},
            {"role":"tool","tool_call_id":"c","content":"y"}]}"#;
        let (sent, _) = translate(body, "m", 1).unwrap();
        let text = exact::write(&sent);
        assert!(
            text.contains(r#""input":{"a":123456789012345678901234567890,"b":1e400,"c":1.1}"#),
            "{text}"
        );
    }
}
