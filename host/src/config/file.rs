//! The config file, key by key, so that everything that is wrong with it is told at once and in words of settings.

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use toml::Table;
use toml::de::DeTable;

/// The keys of a file that were not taken yet, and what was wrong with those that were.
pub struct File {
    values: Table,
    /// The line of each key, from 1.
    lines: HashMap<String, usize>,
    known: Vec<&'static str>,
    wrong: Vec<(usize, String)>,
}

impl File {
    /// Reads a file; an error is where it is not TOML.
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
        Ok(Self { values, lines: lines.collect(), known: Vec::new(), wrong: Vec::new() })
    }

    /// The value of a key, if it is there and as it should be.
    pub fn take<T: DeserializeOwned>(&mut self, name: &'static str) -> Option<T> {
        self.known.push(name);
        match self.values.remove(name)?.try_into() {
            Ok(value) => Some(value),
            Err(error) => {
                let message = in_words(error.to_string().lines().next().unwrap_or_default());
                self.add(name, &format!("{name}: {message}"));
                None
            }
        }
    }

    /// What is wrong with the file: values, and keys that no setting has.
    pub fn end(mut self) -> Vec<String> {
        for key in std::mem::take(&mut self.values).keys() {
            let hint = nearest(key, &self.known)
                .map_or_else(String::new, |near| format!("; did you mean {near}?"));
            self.add(key, &format!("there is no setting `{key}`{hint}"));
        }
        self.wrong.sort();
        self.wrong.into_iter().map(|(_, message)| message).collect()
    }

    fn add(&mut self, key: &str, message: &str) {
        let line = self.lines.get(key).copied().unwrap_or(1);
        self.wrong.push((line, format!("line {line}: {message}")));
    }
}

/// The library's complaint without the names of types.
fn in_words(message: &str) -> String {
    let Some((found, expected)) = message.split_once(", expected ") else {
        return message.replace(
            "invalid socket address syntax",
            "it is no address; write it as 127.0.0.1:8080",
        );
    };
    let found = found.replace("unknown variant", "unknown value");
    let found = match found.strip_prefix("invalid type: ").or(found.strip_prefix("invalid value: "))
    {
        Some(found) => format!("{found} does not belong here"),
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

/// The name that somebody may have meant.
pub fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = |name: &&str| strsim::jaro_winkler(given, name);
    let best = known.iter().max_by(|one, other| likeness(one).total_cmp(&likeness(other)))?;
    (likeness(best) > 0.8).then_some(best)
}
