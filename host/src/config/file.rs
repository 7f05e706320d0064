//! Config file parser that takes one key at a time, so that one run reports every error.
//!
//! Each message names the line and the setting, not a Rust type.

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use toml::Table;
use toml::de::DeTable;

/// Parsed config file: the keys that are not taken yet, and the errors of the keys that are.
pub struct File {
    values: Table,
    /// Line number of each key, from 1.
    lines: HashMap<String, usize>,
    known: Vec<&'static str>,
    errors: Vec<(usize, String)>,
}

impl File {
    /// Parses TOML text; the error says where the text is not TOML.
    pub fn parse(text: &str) -> Result<Self, String> {
        let values =
            toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        let parsed =
            DeTable::parse(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        let line =
            |at: usize| text.get(..at).unwrap_or_default().matches('\n').count().saturating_add(1);
        let lines = parsed
            .get_ref()
            .iter()
            .map(|(key, _)| (key.get_ref().to_string(), line(key.span().start)));
        Ok(Self { values, lines: lines.collect(), known: Vec::new(), errors: Vec::new() })
    }

    /// Removes and returns the value of a key; records an error if the value is invalid.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str) -> Option<T> {
        self.known.push(name);
        match self.values.remove(name)?.try_into() {
            Ok(value) => Some(value),
            Err(error) => {
                let message = plain_message(error.to_string().lines().next().unwrap_or_default());
                self.add(name, &format!("{name}: {message}"));
                None
            }
        }
    }

    /// Returns all errors by line: invalid values, and keys that are not settings.
    pub fn finish(mut self) -> Vec<String> {
        for key in std::mem::take(&mut self.values).keys() {
            let hint = nearest(key, &self.known)
                .map_or_else(String::new, |name| format!("; did you mean {name}?"));
            self.add(key, &format!("there is no setting `{key}`{hint}"));
        }
        self.errors.sort();
        self.errors.into_iter().map(|(_, message)| message).collect()
    }

    fn add(&mut self, key: &str, message: &str) {
        let line = self.lines.get(key).copied().unwrap_or(1);
        self.errors.push((line, format!("line {line}: {message}")));
    }
}

/// Rewrites a message of the TOML library without Rust type names.
fn plain_message(message: &str) -> String {
    let Some((found, expected)) = message.split_once(", expected ") else {
        return message.replace(
            "invalid socket address syntax",
            "it is not an address; write it as 127.0.0.1:8080",
        );
    };
    let found = found.replace("unknown variant", "unknown value");
    let found = match found.strip_prefix("invalid type: ").or(found.strip_prefix("invalid value: "))
    {
        Some(found) => format!("{found} is not valid here"),
        None => found,
    };
    let wanted = match expected {
        "usize" | "u64" | "u32" | "i64" => "write a whole number, without quotes",
        "a string" | "path string" => "write it as text in quotes",
        "a sequence" => "write it as a list, [\"…\"]",
        "socket address" => "write it as \"127.0.0.1:8080\"",
        "a boolean" => "write true or false",
        other => return format!("{found}; it can be {other}"),
    };
    format!("{found}; {wanted}")
}

/// Returns the known name that is most similar to `given`, or none if none is similar enough.
pub fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let similarity = |name: &&str| strsim::jaro_winkler(given, name);
    let best = known.iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)))?;
    (similarity(best) > 0.8).then_some(best)
}
