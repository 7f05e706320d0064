//! Rule that all requests of a batch name the same model. Component of world `validator`; off by
//! default.

mod bindings;

use bindings::exports::batchwright::plugin::{plugin, validation};
use serde::Deserialize;

struct Component;

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "one-model".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "All requests of a batch name the same model".into(),
            endpoints: Vec::new(),
            credentials: Vec::new(),
            settings_schema: r#"{"type":"object","properties":{},"additionalProperties":false}"#
                .into(),
        }
    }

    fn configure(_settings: String) -> Result<(), String> {
        Ok(())
    }
}

impl validation::Guest for Component {
    fn validate(
        batch: validation::Batch,
        lines: Vec<validation::Line>,
    ) -> Vec<validation::Violation> {
        let Some(first) = batch.first_model else { return Vec::new() };
        lines.iter().filter_map(|line| check(&first, line)).collect()
    }
}

#[derive(Deserialize)]
struct Request {
    body: Body,
}

#[derive(Deserialize)]
struct Body {
    model: String,
}

/// Compares the model of a line with the first one. A line without a model passes: the standard
/// rules report it.
fn check(first: &str, line: &validation::Line) -> Option<validation::Violation> {
    let Request { body: Body { model } } = serde_json::from_str(&line.text).ok()?;
    let shown = |model: &str| model.chars().take(100).collect::<String>();
    (model != first).then(|| validation::Violation {
        line: line.number,
        code: "mismatched_model".into(),
        message: format!(
            "The model '{}' is not that of the first request, '{}': \
             all requests of a batch must name the same.",
            shown(&model),
            shown(first)
        ),
        param: Some("body.model".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_rejects_another_model_and_accepts_lines_without_a_model() {
        let line = |text: &str| validation::Line { number: 7, text: text.into() };
        let found = check("a", &line(r#"{"body":{"model":"b","x":[1e999]}}"#)).unwrap();
        assert_eq!(
            (found.line, found.code.as_str(), found.param.as_deref()),
            (7, "mismatched_model", Some("body.model"))
        );
        for accepted in [
            r#"{"body":{"model":"a"}}"#,
            "{}",
            "no json",
            r#"{"body":{"model":1}}"#,
            r#"{"body":{}}"#,
        ] {
            assert!(check("a", &line(accepted)).is_none(), "{accepted}");
        }
    }
}
