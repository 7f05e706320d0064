//! Config file: sections of settings, read so that one run reports every error with its line.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use batchwright_domain::settings::{Given, Setting};
use batchwright_domain::text::nearest;
use batchwright_tenancy::ModelPrice;
use toml::de::DeTable;
use toml::{Table, Value};

use super::{ConfigError, RENAMED, Settings, prices};

/// Size of a config file; a larger one is an error.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Adds the settings of a config file to what was given, with the errors in it, and returns its
/// prices.
pub fn read(path: &Path, given: &mut Given) -> Result<Vec<ModelPrice>, ConfigError> {
    let failed = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let invalid = |message| ConfigError::Invalid { path: path.to_owned(), message };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES.saturating_add(1)).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(invalid("larger than 1MiB, which no config file is".into()));
    }
    let parsed = Parsed::new(&text).map_err(invalid)?;
    let mut found = Vec::new();
    for (section, value) in &parsed.values {
        if section == prices::SECTION {
            let origin = |entry: usize| parsed.origin(path, section, &entry.to_string());
            found = prices::read(value, origin, given);
        } else {
            parsed.add_section(section, value, path, given);
        }
    }
    Ok(found)
}

/// TOML document and the line of each of its keys.
struct Parsed {
    values: Table,
    /// Line number from 1, by section and key; the key is empty for the section itself.
    lines: HashMap<(String, String), usize>,
}

impl Parsed {
    /// Parses a text; the error says where the text is not TOML.
    fn new(text: &str) -> Result<Self, String> {
        let message = |error: toml::de::Error| error.to_string().trim_end().to_owned();
        let values = toml::from_str(text).map_err(message)?;
        let spanned = DeTable::parse(text).map_err(message)?;
        let line =
            |at: usize| text.get(..at).unwrap_or_default().matches('\n').count().saturating_add(1);
        let mut lines = HashMap::new();
        for (section, value) in spanned.get_ref() {
            let name = section.get_ref().to_string();
            lines.insert((name.clone(), String::new()), line(section.span().start));
            for (key, _) in value.get_ref().as_table().into_iter().flatten() {
                let key_name = key.get_ref().to_string();
                lines.insert((name.clone(), key_name), line(key.span().start));
            }
            // Tables of an array, by their position.
            for (index, entry) in value.get_ref().as_array().into_iter().flatten().enumerate() {
                lines.insert((name.clone(), index.to_string()), line(entry.span().start));
            }
        }
        Ok(Self { values, lines })
    }

    /// Beginning of a message about a key, or about a section if the key is empty.
    fn origin(&self, path: &Path, section: &str, key: &str) -> String {
        let line = self.lines.get(&(section.to_owned(), key.to_owned())).copied().unwrap_or(1);
        format!("{}: line {line}", path.display())
    }

    fn add_section(&self, section: &str, value: &Value, path: &Path, given: &mut Given) {
        let origin = self.origin(path, section, "");
        let Value::Table(keys) = value else {
            given.add_error(format!("{origin}: {}", misplaced(section)));
            return;
        };
        let sections: Vec<_> = Settings::all().map(|setting| setting.section).collect();
        if !sections.contains(&section) {
            let hint = nearest(section, &sections)
                .map_or_else(String::new, |name| format!("; did you mean [{name}]?"));
            given.add_error(format!("{origin}: there is no section [{section}]{hint}"));
            return;
        }
        for (key, value) in keys {
            let origin = self.origin(path, section, key);
            let known = Settings::all().find(|known| known.section == section && known.name == key);
            match known.map(|setting| (setting, text_of(value))) {
                None => given.add_error(format!("{origin}: {}", misplaced(key))),
                Some((setting, Some(text))) => {
                    given.add(setting.name, text, format!("{origin}: {key}"));
                }
                Some((_, None)) => {
                    given.add_error(format!("{origin}: {key}: write one value or a list of texts"));
                }
            }
        }
    }
}

/// Message about a key that is not a setting of its section.
fn misplaced(key: &str) -> String {
    if let Some(Setting { section, .. }) = Settings::all().find(|setting| setting.name == key) {
        return format!("`{key}` belongs to the section [{section}]");
    }
    if let Some((_, name)) = RENAMED.iter().find(|(old, _)| *old == key) {
        return format!("`{key}` is called `{name}`");
    }
    let names: Vec<_> = Settings::all().map(|setting| setting.name).collect();
    let hint =
        nearest(key, &names).map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
    format!("there is no setting `{key}`{hint}")
}

/// Text of a value as a flag would have it, or none for a value that no flag has.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Array(entries) => {
            let texts: Option<Vec<_>> = entries.iter().map(Value::as_str).collect();
            Some(texts?.join(","))
        }
        Value::Datetime(_) | Value::Table(_) => None,
    }
}
