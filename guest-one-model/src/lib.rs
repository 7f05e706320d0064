//! One model for all requests of a batch, as a component of world `validator`. Off unless an operator turns it on.

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
        lines.iter().filter_map(|line| judge(&first, line)).collect()
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

/// What has no model is for other rules to say.
fn judge(first: &str, line: &validation::Line) -> Option<validation::Violation> {
    let Request { body: Body { model } } = serde_json::from_str(&line.text).ok()?;
    let shown = |model: &str| model.chars().take(100).collect::<String>();
    (model != first).then(|| validation::Violation {
        line: line.number,
        code: "mismatched_model".into(),
        message: format!(
            "The model '{}' is not that of the first request, '{}': all requests of a batch must name the same.",
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
    fn another_model_than_the_first_is_named_and_what_has_none_is_left_to_others() {
        let line = |text: &str| validation::Line { number: 7, text: text.into() };
        let found = judge("a", &line(r#"{"body":{"model":"b","x":[1e999]}}"#)).unwrap();
        assert_eq!(
            (found.line, found.code.as_str(), found.param.as_deref()),
            (7, "mismatched_model", Some("body.model"))
        );
        for fine in [
            r#"{"body":{"model":"a"}}"#,
            "{}",
            "no json",
            r#"{"body":{"model":1}}"#,
            r#"{"body":{}}"#,
        ] {
            assert!(judge("a", &line(fine)).is_none(), "{fine}");
        }
    }
}
