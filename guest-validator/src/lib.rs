//! Standard rules for the lines of a batch's input file. Component of world `validator`.
//!
//! The component has no settings, imports nothing, and reports every error of every line. The host
//! checks rules across lines (unique ids) and rules that depend on other plugins (known models).

mod bindings;
mod line;
mod rules;

use bindings::exports::batchwright::plugin::{plugin, validation};

struct Component;

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "standard".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "The rules of the OpenAI Batch API for each line of an input file".into(),
            endpoints: rules::ENDPOINTS.iter().map(|rule| rule.path.into()).collect(),
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
        let mut violations = Vec::new();
        for line in &lines {
            rules::check(&batch.endpoint, &line.text, &mut |fault| {
                violations.push(validation::Violation {
                    line: line.number,
                    code: fault.code.into(),
                    message: fault.message,
                    param: fault.param,
                });
            });
        }
        violations
    }
}
