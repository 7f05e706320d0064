//! JSON Schema of a component's settings.
//!
//! The schema comes from an untrusted component. Nested references and large regular expressions
//! make validation expensive, so a schema is bounded before it is used:
//! - in bytes;
//! - in nodes, counted with all references expanded, and without cycles;
//! - in the number and the compiled size of regular expressions, which never backtrack.

use std::collections::HashMap;

use jsonschema::{PatternOptions, Validator};
use serde_json::{Map, Value};

/// Maximum size of a schema, in bytes.
const MAX_SCHEMA_BYTES: usize = 64 << 10;

/// Maximum number of nodes of a schema with its references expanded.
const MAX_SCHEMA_NODES: usize = 10_000;

/// Maximum number of regular expressions in a schema.
const MAX_PATTERNS: usize = 100;

/// Maximum size of a compiled regular expression, in bytes.
const MAX_PATTERN_BYTES: usize = 256 << 10;

/// Parses a schema, and checks that it is valid and within its limits.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    if text.len() > MAX_SCHEMA_BYTES {
        return Err(format!(
            "settings-schema has {} bytes; the limit is {MAX_SCHEMA_BYTES}",
            text.len()
        ));
    }
    let schema: Value = serde_json::from_str(text)
        .map_err(|error| format!("settings-schema is not JSON: {error}"))?;
    let mut cost = Cost { root: &schema, patterns: 0, references: HashMap::new() };
    let nodes = cost.nodes(&schema)?;
    if nodes > MAX_SCHEMA_NODES || cost.patterns > MAX_PATTERNS {
        return Err(format!(
            "settings-schema expands to {nodes} nodes and {} patterns; the limits are \
             {MAX_SCHEMA_NODES} and {MAX_PATTERNS}",
            cost.patterns
        ));
    }
    jsonschema::draft202012::meta::validate(&schema)
        .map_err(|error| format!("settings-schema is not a JSON Schema: {error}"))?;
    validator(&schema)?;
    Ok(schema)
}

fn validator(schema: &Value) -> Result<Validator, String> {
    jsonschema::options()
        .with_draft(jsonschema::Draft::Draft202012)
        .with_pattern_options(
            PatternOptions::regex().size_limit(MAX_PATTERN_BYTES).dfa_size_limit(MAX_PATTERN_BYTES),
        )
        .build(schema)
        .map_err(|error| format!("settings-schema is not usable: {error}"))
}

/// Counter of the nodes and patterns of a schema with its references expanded.
struct Cost<'a> {
    root: &'a Value,
    patterns: usize,
    /// Nodes of each reference; None while they are counted, which detects a cycle.
    references: HashMap<&'a str, Option<usize>>,
}

impl<'a> Cost<'a> {
    fn nodes(&mut self, value: &'a Value) -> Result<usize, String> {
        let mut nodes = 1_usize;
        match value {
            Value::Array(values) => {
                for value in values {
                    nodes = nodes.saturating_add(self.nodes(value)?);
                }
            }
            Value::Object(members) => {
                for (name, value) in members {
                    match (name.as_str(), value) {
                        ("$ref", Value::String(place)) => {
                            nodes = nodes.saturating_add(self.reference_nodes(place)?)
                        }
                        (
                            "$dynamicRef" | "$id" | "$anchor" | "$dynamicAnchor",
                            Value::String(_),
                        ) => {
                            return Err(format!(
                                "settings-schema uses {name}; refer to its parts as in \
                                 `#/$defs/name`"
                            ));
                        }
                        ("pattern", Value::String(_)) => {
                            self.patterns = self.patterns.saturating_add(1)
                        }
                        ("patternProperties", Value::Object(found)) => {
                            self.patterns = self.patterns.saturating_add(found.len());
                            nodes = nodes.saturating_add(self.nodes(value)?);
                        }
                        _ => nodes = nodes.saturating_add(self.nodes(value)?),
                    }
                }
            }
            _ => {}
        }
        Ok(nodes)
    }

    fn reference_nodes(&mut self, place: &'a str) -> Result<usize, String> {
        match self.references.get(place) {
            Some(Some(known)) => return Ok(*known),
            Some(None) => {
                return Err(format!("settings-schema refers to itself through `{place}`"));
            }
            None => {}
        }
        let pointer = place.strip_prefix('#').filter(|pointer| pointer.starts_with('/'));
        let target = pointer.and_then(|pointer| self.root.pointer(pointer));
        let Some(target) = target else {
            return Err(format!(
                "settings-schema refers to `{place}`, which is no part of it; refer to a part as \
                 in `#/$defs/name`"
            ));
        };
        self.references.insert(place, None);
        let nodes = self.nodes(target)?;
        self.references.insert(place, Some(nodes));
        Ok(nodes)
    }
}

/// Adds the schema's defaults for absent settings.
pub fn add_defaults(settings: &mut Map<String, Value>, schema: &Value) {
    for (name, property) in
        schema.get("properties").and_then(Value::as_object).into_iter().flatten()
    {
        if let Some(default) = property.get("default")
            && !settings.contains_key(name)
        {
            settings.insert(name.clone(), default.clone());
        }
    }
}

/// Checks settings against a schema. The error is the dotted path and a message with a remedy.
pub(crate) fn check(settings: &Value, schema: &Value) -> Result<(), (String, String)> {
    let validator = validator(schema).map_err(|message| (String::new(), message))?;
    let Some(error) = validator.iter_errors(settings).next() else { return Ok(()) };
    let place = error.instance_path().to_string().replace('/', ".");
    let known: Vec<&str> = schema
        .get("properties")
        .and_then(Value::as_object)
        .map(|known| known.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let hint = if known.is_empty() {
        "this plugin has no settings".into()
    } else {
        format!("known settings are {}", known.join(", "))
    };
    Err((place, format!("{error}; {hint}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schema_parse_refuses_schemas_that_are_expensive_to_use() {
        let mut definitions = json!({"d0": {"type": "object"}});
        for number in 1..40 {
            let before = json!({"$ref": format!("#/$defs/d{}", number - 1)});
            definitions[format!("d{number}")] = json!({"allOf": [before, before]});
        }
        let error =
            parse(&json!({"$ref": "#/$defs/d39", "$defs": definitions}).to_string()).unwrap_err();
        assert!(error.contains("the limits are 10000"), "{error}");
        let many: Map<String, Value> =
            (0..101).map(|number| (format!("\\p{{L}}{{{number}}}"), json!(true))).collect();
        for (schema, part) in [
            (json!({"patternProperties": many}), "101 patterns"),
            (json!({"properties": {"a": {"pattern": "(\\p{L}{1000}){1000}"}}}), "not usable"),
            (
                json!({"$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}),
                "refers to itself",
            ),
            (json!({"$ref": "#"}), "no part of it"),
            (json!({"$ref": "https://example.com/schema.json"}), "no part of it"),
            (json!({"$dynamicRef": "#x"}), "$dynamicRef"),
            (json!({"description": "x".repeat(70_000)}), "bytes"),
            (json!({"type": 7}), "not a JSON Schema"),
        ] {
            let error = parse(&schema.to_string()).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn settings_check_follows_references_and_patterns() {
        let schema = json!({
            "type": "object", "additionalProperties": false,
            "$defs": {"url": {"type": "string", "pattern": "^https?://"}},
            "properties": {
                "base_url": {"$ref": "#/$defs/url"},
                "more": {"type": "array", "items": {"$ref": "#/$defs/url"}},
            },
        });
        let schema = parse(&schema.to_string()).unwrap();
        assert_eq!(check(&json!({"base_url": "http://a", "more": ["https://b"]}), &schema), Ok(()));
        let (place, message) =
            check(&json!({"more": ["https://b", "ftp://c"]}), &schema).unwrap_err();
        assert!(
            place == ".more.1" && message.contains("known settings are base_url, more"),
            "{place}: {message}"
        );
    }
}
