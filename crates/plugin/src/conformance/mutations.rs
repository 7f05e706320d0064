//! Mutations of recorded responses: each changes one value, as a future or a hostile provider may.

use serde_json::Value;

/// Maximum number of mutations of one response.
const MAX_MUTATIONS: usize = 100;

/// Replacement of an id. An adapter that puts the id into a URL must encode it.
pub(crate) const HOSTILE_ID: &str = "../../x?y=1#z";

/// Changed response body.
pub(crate) struct Mutation {
    /// Description of the change.
    pub change: String,
    /// Response body as JSON text.
    pub body: String,
}

/// Returns the replacements of a value, as JSON text; None removes the key.
fn replacements(key: &str, value: &Value) -> Vec<Option<String>> {
    let json =
        |texts: &[&str]| texts.iter().map(|text| Some((*text).to_owned())).collect::<Vec<_>>();
    let mut new = match value {
        Value::Number(_) => json(&["-1", "18446744073709551616", "1.5", "1e400", "\"7\"", "null"]),
        Value::String(_) => json(&["7", "null", "{}", "\"\""]),
        Value::Bool(_) => json(&["null", "\"true\""]),
        Value::Array(_) => json(&["null", "[]", "{}", "[null]"]),
        Value::Object(_) => json(&["null", "[]", "\"x\""]),
        Value::Null => json(&["0", "{}"]),
    };
    if value.is_string() && (key == "id" || key.ends_with("_id")) {
        new.push(Some(format!("\"{HOSTILE_ID}\"")));
    }
    new.push(None);
    new
}

/// Placeholder of a new value until the body is text. A [`Value`] cannot hold every JSON number.
const VALUE_PLACEHOLDER: &str = "@@batchwright@@";

/// Returns the mutations of a response body, up to a maximum number.
pub(crate) fn generate(body: &Value) -> Vec<Mutation> {
    let mut paths = Vec::new();
    walk(body, &mut String::new(), &mut paths);
    let mut mutations = Vec::new();
    for path in paths {
        let Some(value) = body.pointer(&path) else { continue };
        let key = path.rsplit('/').next().unwrap_or_default();
        for new in replacements(key, value) {
            if mutations.len() >= MAX_MUTATIONS {
                return mutations;
            }
            let mut changed = body.clone();
            let place = path.replace('/', ".");
            let change = match &new {
                Some(new) => {
                    if let Some(value) = changed.pointer_mut(&path) {
                        *value = VALUE_PLACEHOLDER.into();
                    }
                    format!("{} as {new}", place.trim_start_matches('.'))
                }
                None => {
                    let parent =
                        path.get(..path.len().saturating_sub(key.len() + 1)).unwrap_or_default();
                    let Some(Value::Object(object)) = changed.pointer_mut(parent) else { continue };
                    object.shift_remove(key);
                    format!("without {}", place.trim_start_matches('.'))
                }
            };
            let text = changed
                .to_string()
                .replace(&format!("\"{VALUE_PLACEHOLDER}\""), new.as_deref().unwrap_or_default());
            mutations.push(Mutation { change, body: text });
        }
    }
    mutations
}

/// Collects the JSON pointers of all values below the root. Keys that a pointer would escape are
/// skipped.
fn walk(value: &Value, path: &mut String, paths: &mut Vec<String>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(object) => object.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(array) => {
            array.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        _ => return,
    };
    for (key, value) in inner.into_iter().filter(|(key, _)| !key.contains(['/', '~'])) {
        let length = path.len();
        path.push('/');
        path.push_str(&key);
        paths.push(path.clone());
        walk(value, path, paths);
        path.truncate(length);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn mutations_cover_every_value_with_every_replacement() {
        let mutations = generate(&json!({"id": "x", "usage": {"tokens": 3}, "list": [true]}));
        let bodies: Vec<&str> = mutations.iter().map(|mutation| mutation.body.as_str()).collect();
        for expected in [
            r#"{"id":"../../x?y=1#z","usage":{"tokens":3},"list":[true]}"#,
            r#"{"id":"x","usage":{"tokens":-1},"list":[true]}"#,
            r#"{"id":"x","usage":{"tokens":1e400},"list":[true]}"#,
            r#"{"id":"x","usage":{},"list":[true]}"#,
            r#"{"usage":{"tokens":3},"list":[true]}"#,
            r#"{"id":"x","usage":null,"list":[true]}"#,
            r#"{"id":"x","usage":{"tokens":3},"list":["true"]}"#,
        ] {
            assert!(bodies.contains(&expected), "{expected} is not among {bodies:#?}");
        }
        assert!(
            mutations
                .iter()
                .any(|mutation| mutation.change == "usage.tokens as 18446744073709551616")
        );
        let large: Value = (0..1000).collect();
        assert_eq!(generate(&large).len(), MAX_MUTATIONS);
    }
}
