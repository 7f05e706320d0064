//! Translation of tools, of the choice among them, and of parallel calls.

use serde_json::{Map, Value, json};

use crate::refused::Refused;
use crate::request::Given;

/// Translates `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn translate(given: Given, sent: &mut Map<String, Value>) -> Result<(), Refused> {
    let mut tools = match given.get("tools") {
        Some(Value::Array(tools)) => tools.iter().map(tool).collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err(Refused::invalid("'tools' must be an array.")),
        None => Vec::new(),
    };
    let mut choice =
        given.get("tool_choice").map(|choice| tool_choice(choice, &mut tools)).transpose()?;
    if tools.is_empty() {
        let needs_one = choice
            .as_ref()
            .and_then(|choice| choice.get("type"))
            .is_some_and(|kind| kind == "any" || kind == "tool");
        return if needs_one {
            Err(Refused::invalid("'tool_choice' requires a tool, but 'tools' is empty."))
        } else {
            Ok(())
        };
    }
    if given.get("parallel_tool_calls") == Some(&Value::Bool(false)) {
        let choice = choice.get_or_insert_with(|| json!({"type": "auto"}));
        if let Value::Object(choice) = choice
            && choice.get("type") != Some(&json!("none"))
        {
            choice.insert("disable_parallel_tool_use".into(), true.into());
        }
    }
    sent.insert("tools".into(), tools.into());
    if let Some(choice) = choice {
        sent.insert("tool_choice".into(), choice);
    }
    Ok(())
}

/// Translates one tool.
fn tool(tool: &Value) -> Result<Value, Refused> {
    let unsupported = || {
        Refused::unsupported(
            "tools",
            "This provider accepts tools of type 'function', each with a name.",
        )
    };
    if tool.get("type").is_some_and(|kind| kind != "function") {
        return Err(unsupported());
    }
    let function = tool.get("function").ok_or_else(unsupported)?;
    let name = function
        .get("name")
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty())
        .ok_or_else(unsupported)?;
    let mut schema = match function.get("parameters") {
        Some(Value::Object(schema)) => schema.clone(),
        None | Some(Value::Null) => Map::new(),
        Some(_) => {
            return Err(Refused::invalid(format!(
                "The parameters of the tool '{name}' must be an object."
            )));
        }
    };
    schema.entry("type").or_insert_with(|| "object".into());
    let mut named = Map::from_iter([
        ("name".to_owned(), name.into()),
        ("input_schema".to_owned(), schema.into()),
    ]);
    for key in ["description", "strict"] {
        if let Some(value) = function.get(key).filter(|value| !value.is_null()) {
            named.insert(key.into(), value.clone());
        }
    }
    Ok(named.into())
}

/// Translates the choice. `allowed_tools` removes all other tools.
fn tool_choice(choice: &Value, tools: &mut Vec<Value>) -> Result<Value, Refused> {
    let unsupported = || {
        Refused::unsupported(
            "tool_choice",
            "Use auto, none, required, a named function, or allowed_tools.",
        )
    };
    let by_mode = |mode: Option<&str>| match mode {
        Some("required") => Ok(json!({"type": "any"})),
        Some("none") => Ok(json!({"type": "none"})),
        Some("auto") => Ok(json!({"type": "auto"})),
        _ => Err(unsupported()),
    };
    if choice.is_string() {
        return by_mode(choice.as_str());
    }
    match choice.get("type").and_then(Value::as_str) {
        Some("function") => match choice.pointer("/function/name").and_then(Value::as_str) {
            Some(name) => Ok(json!({"type": "tool", "name": name})),
            None => Err(unsupported()),
        },
        Some("allowed_tools") => {
            let allowed = choice
                .pointer("/allowed_tools/tools")
                .and_then(Value::as_array)
                .ok_or_else(unsupported)?;
            let names: Vec<&Value> =
                allowed.iter().filter_map(|tool| tool.pointer("/function/name")).collect();
            tools.retain(|tool| tool.get("name").is_some_and(|name| names.contains(&name)));
            by_mode(choice.pointer("/allowed_tools/mode").and_then(Value::as_str))
        }
        _ => Err(unsupported()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(body: &Value) -> Result<Value, String> {
        let mut sent = Map::new();
        let Value::Object(body) = body else { unreachable!() };
        translate(Given(body), &mut sent).map_err(|refused| refused.message)?;
        Ok(sent.into())
    }

    #[test]
    fn tools_and_choices_are_translated() {
        let function = |function: Value| json!({"type": "function", "function": function});
        let look = function(
            json!({"name": "look", "description": "d", "strict": true, "parameters": null}),
        );
        let find = function(json!({"name": "find", "parameters": {"properties": {}}}));
        let looks = json!({"name": "look", "input_schema": {"type": "object"}, "description": "d",
            "strict": true});
        let finds = json!({"name": "find", "input_schema": {"properties": {}, "type": "object"}});
        for (choice, parallel, tools, sent) in [
            (json!(null), json!(null), json!([looks, finds]), json!(null)),
            (json!("required"), json!(true), json!([looks, finds]), json!({"type": "any"})),
            (
                json!(null),
                json!(false),
                json!([looks, finds]),
                json!({"type": "auto", "disable_parallel_tool_use": true}),
            ),
            (json!("none"), json!(false), json!([looks, finds]), json!({"type": "none"})),
            (
                json!({"type": "function", "function": {"name": "find"}}),
                json!(false),
                json!([looks, finds]),
                json!({"type": "tool", "name": "find", "disable_parallel_tool_use": true}),
            ),
            (
                json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto",
                    "tools": [function(json!({"name": "find"}))]}}),
                json!(null),
                json!([finds]),
                json!({"type": "auto"}),
            ),
        ] {
            let body = json!({"tools": [look, find], "tool_choice": choice,
                "parallel_tool_calls": parallel});
            let mut expected = json!({"tools": tools});
            if !sent.is_null() {
                expected["tool_choice"] = sent;
            }
            assert_eq!(translated(&body), Ok(expected), "{body}");
        }
        assert_eq!(
            translated(&json!({"tools": [], "tool_choice": "auto", "parallel_tool_calls": false})),
            Ok(json!({}))
        );
    }

    #[test]
    fn unsupported_tools_are_refused() {
        for body in [
            json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
            json!({"tools": [{"type": "function", "function": {}}]}),
            json!({"tool_choice": "required"}),
            json!({"tool_choice": {"type": "custom"},
                "tools": [{"type": "function", "function": {"name": "f"}}]}),
            json!({"tool_choice": "sometimes"}),
        ] {
            assert!(translated(&body).is_err(), "{body}");
        }
    }
}
