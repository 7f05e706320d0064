//! What a component says its settings look like: a JSON Schema from a stranger, so bounded before anything is done with it.

use std::collections::HashMap;

use jsonschema::{PatternOptions, Validator};
use serde_json::{Map, Value};

/// Longest schema, in bytes, and the most it may come to with its references followed.
const LONGEST: usize = 64 << 10;
const MOST_NODES: usize = 10_000;

/// Regular expressions in a schema, and what each may come to, in bytes. They are of the kind that never backtracks.
const MOST_PATTERNS: usize = 100;
const PATTERN_SIZE: usize = 256 << 10;

/// Reads a schema and checks that it is one, and that using it costs little.
pub fn parse(text: &str) -> Result<Value, String> {
    if text.len() > LONGEST {
        return Err(format!("settings-schema has {} bytes; it may have {LONGEST}", text.len()));
    }
    let schema: Value = serde_json::from_str(text)
        .map_err(|error| format!("settings-schema is not JSON: {error}"))?;
    let mut costs = Costs { root: &schema, patterns: 0, of_refs: HashMap::new() };
    let nodes = costs.of(&schema)?;
    if nodes > MOST_NODES || costs.patterns > MOST_PATTERNS {
        return Err(format!(
            "settings-schema comes to {nodes} parts and {} patterns; it may have {MOST_NODES} and {MOST_PATTERNS}",
            costs.patterns
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
            PatternOptions::regex().size_limit(PATTERN_SIZE).dfa_size_limit(PATTERN_SIZE),
        )
        .build(schema)
        .map_err(|error| format!("settings-schema is not usable: {error}"))
}

/// How much there is to a schema when its references are followed.
struct Costs<'a> {
    root: &'a Value,
    patterns: usize,
    /// None while it is being counted: to come back to it is to go round in a circle.
    of_refs: HashMap<&'a str, Option<usize>>,
}

impl<'a> Costs<'a> {
    fn of(&mut self, value: &'a Value) -> Result<usize, String> {
        let mut nodes = 1_usize;
        match value {
            Value::Array(values) => {
                for value in values {
                    nodes = nodes.saturating_add(self.of(value)?);
                }
            }
            Value::Object(members) => {
                for (name, value) in members {
                    match (name.as_str(), value) {
                        ("$ref", Value::String(place)) => {
                            nodes = nodes.saturating_add(self.of_reference(place)?)
                        }
                        (
                            "$dynamicRef" | "$id" | "$anchor" | "$dynamicAnchor",
                            Value::String(_),
                        ) => {
                            return Err(format!(
                                "settings-schema uses {name}; refer to its parts as in `#/$defs/name`"
                            ));
                        }
                        ("pattern", Value::String(_)) => {
                            self.patterns = self.patterns.saturating_add(1)
                        }
                        ("patternProperties", Value::Object(found)) => {
                            self.patterns = self.patterns.saturating_add(found.len());
                            nodes = nodes.saturating_add(self.of(value)?);
                        }
                        _ => nodes = nodes.saturating_add(self.of(value)?),
                    }
                }
            }
            _ => {}
        }
        Ok(nodes)
    }

    fn of_reference(&mut self, place: &'a str) -> Result<usize, String> {
        match self.of_refs.get(place) {
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
                "settings-schema refers to `{place}`, which is no part of it, such as `#/$defs/name`"
            ));
        };
        self.of_refs.insert(place, None);
        let cost = self.of(target)?;
        self.of_refs.insert(place, Some(cost));
        Ok(cost)
    }
}

/// Puts in what the schema says of absent settings.
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

/// What is wrong with settings: the place, with its dots, and what and how to mend it.
pub fn check(settings: &Value, schema: &Value) -> Result<(), (String, String)> {
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
    fn a_schema_that_would_take_for_ever_is_refused_at_once() {
        let mut definitions = json!({"d0": {"type": "object"}});
        for number in 1..40 {
            let before = json!({"$ref": format!("#/$defs/d{}", number - 1)});
            definitions[format!("d{number}")] = json!({"allOf": [before, before]});
        }
        let error =
            parse(&json!({"$ref": "#/$defs/d39", "$defs": definitions}).to_string()).unwrap_err();
        assert!(error.contains("it may have 10000"), "{error}");
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
    fn settings_are_held_against_references_and_patterns() {
        let schema = json!({
            "type": "object", "additionalProperties": false,
            "$defs": {"url": {"type": "string", "pattern": "^https?://"}},
            "properties": {"base_url": {"$ref": "#/$defs/url"}, "more": {"type": "array", "items": {"$ref": "#/$defs/url"}}},
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
