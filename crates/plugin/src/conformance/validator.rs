//! Checks of validators.

use super::inputs::{ENDPOINTS, INPUT_LINES};
use crate::conformance::{FIRST_TENANT, Report, SECOND_TENANT, check_equal, context};
use crate::contract::types::{BatchContext, Line, Violation};
use crate::plugin::Plugin;

impl Report {
    /// Runs the checks of a validator.
    pub(super) async fn validator(&mut self, plugin: &Plugin) {
        let numbered = |texts: &[&str]| -> Vec<Line> {
            (1..)
                .zip(texts)
                .map(|(number, text)| Line { number, text: (*text).to_owned() })
                .collect()
        };
        let lines = numbered(&INPUT_LINES);
        for (endpoint, _) in ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(*endpoint)) {
            let endpoint = endpoint.as_str();
            let batch = context(endpoint);
            let whole = self.validate(plugin, FIRST_TENANT, &batch, &lines).await;
            let again = self.validate(plugin, SECOND_TENANT, &batch, &lines).await;
            self.record(
                format!("{endpoint}: `validate` returns the same violations from every instance"),
                check_equal(&whole, &again),
            );
            let mut one_by_one = Ok(Vec::new());
            for line in &lines {
                let found =
                    self.validate(plugin, FIRST_TENANT, &batch, std::slice::from_ref(line)).await;
                one_by_one = one_by_one.and_then(|mut all: Vec<Violation>| {
                    all.extend(found?);
                    Ok(all)
                });
            }
            self.record(
                format!("{endpoint}: `validate` returns the same violations line by line"),
                check_equal(&whole, &one_by_one),
            );
            let bare =
                BatchContext { metadata: Vec::new(), first_model: None, ..context(endpoint) };
            let found = self.validate(plugin, FIRST_TENANT, &bare, &lines).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.record(
                format!("{endpoint}: a batch without metadata whose first line names no model"),
                found,
            );
            let none = self.validate(plugin, FIRST_TENANT, &batch, &[]).await;
            self.record(
                format!("{endpoint}: no violations without lines"),
                match none {
                    Ok(found) if found.is_empty() => Ok(()),
                    Ok(found) => Err(format!("found {found:?}")),
                    Err(error) => Err(error.detail()),
                },
            );
        }
        let batch = context("/v1/chat/completions");
        let long = format!(r#"{{"custom_id":"{}"}}"#, "x".repeat(1 << 20));
        let deep =
            format!(r#"{{"custom_id":"a","body":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        for (name, text) in
            [("a line of 1 MiB", &long), ("a line nested 10,000 levels deep", &deep)]
        {
            let found = self.validate(plugin, FIRST_TENANT, &batch, &numbered(&[text])).await;
            self.record(name, found.map(drop).map_err(|error| error.detail()));
        }
        let many: Vec<&str> = INPUT_LINES.iter().copied().cycle().take(1000).collect();
        let found = self.validate(plugin, FIRST_TENANT, &batch, &numbered(&many)).await;
        self.record("1,000 lines in one call", found.map(drop).map_err(|error| error.detail()));
    }
}
