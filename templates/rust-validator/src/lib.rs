//! Validator that rejects requests for more tokens than the setting `max_tokens`.

use std::cell::Cell;

use serde_json::{Value, json};

wit_bindgen::generate!({ path: "wit", world: "validator" });

use exports::batchwright::plugin::{plugin, validation::*};

struct Component;
export!(Component);

thread_local! {
    static MAX_TOKENS: Cell<u64> = const { Cell::new(u64::MAX) };
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "{{name}}".into(),
            version: "0.1.0".into(),
            summary: "Limits the tokens of a request".into(),
            endpoints: Vec::new(),
            credentials: Vec::new(),
            settings_schema: json!({
                "type": "object",
                "properties": {"max_tokens": {
                    "type": "integer",
                    "minimum": 1,
                    "default": 4096,
                    "description": "Maximum number of tokens of a request",
                }},
                "additionalProperties": false,
            })
            .to_string(),
        }
    }

    fn configure(settings: String) -> Result<(), String> {
        let settings: Value = serde_json::from_str(&settings).map_err(|error| error.to_string())?;
        // The host fills in the schema's defaults.
        MAX_TOKENS.set(settings["max_tokens"].as_u64().ok_or("max_tokens is missing")?);
        Ok(())
    }
}

impl Guest for Component {
    fn validate(_batch: Batch, lines: Vec<Line>) -> Vec<Violation> {
        lines.iter().flat_map(check).collect()
    }
}

/// Returns the violations of one line.
fn check(line: &Line) -> Vec<Violation> {
    let request = match serde_json::from_str::<Value>(&line.text) {
        Ok(request) => request,
        // Another parser may accept what this one rejects (half a surrogate pair, a huge number),
        // so an unreadable line must not pass.
        Err(error) => {
            let message = format!("This line cannot be read: {error}.");
            return vec![Violation {
                line: line.number,
                code: "unreadable_line".into(),
                message,
                param: None,
            }];
        }
    };
    let max_tokens = MAX_TOKENS.get();
    let is_too_many = |name: &&str| {
        request["body"][*name].as_f64().is_some_and(|tokens| tokens > max_tokens as f64)
    };
    ["max_tokens", "max_completion_tokens"]
        .into_iter()
        .filter(is_too_many)
        .map(|name| Violation {
            line: line.number,
            code: "too_many_tokens".into(),
            message: format!("At most {max_tokens} tokens may be asked for."),
            param: Some(format!("body.{name}")),
        })
        .collect()
}
