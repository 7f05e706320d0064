//! Responses like recorded ones, with one value changed: what a provider may send some day, and a hostile one on purpose.

use serde_json::Value;

/// Changes of one response that are tried.
const MAX_MUTATIONS: usize = 100;

/// What an id is changed to: it must not lead elsewhere where an adapter puts it into a URL.
pub const HOSTILE_ID: &str = "../../x?y=1#z";

/// A changed response, and what was changed, in words.
pub struct Mutation {
    pub change: String,
    pub body: String,
}

/// What takes the place of a value, as JSON; none takes its key away.
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

/// Stands for a new value until the whole is text: no value can hold every number that JSON can.
const MARK: &str = "@@batchwright@@";

pub fn of(body: &Value) -> Vec<Mutation> {
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
                        *value = MARK.into();
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
                .replace(&format!("\"{MARK}\""), new.as_deref().unwrap_or_default());
            mutations.push(Mutation { change, body: text });
        }
    }
    mutations
}

/// The paths of all values but the outermost, as JSON pointers; keys with signs of their own are left out.
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
    fn each_value_is_changed_in_each_way() {
        let mutations = of(&json!({"id": "x", "usage": {"tokens": 3}, "list": [true]}));
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
        assert_eq!(of(&large).len(), MAX_MUTATIONS);
    }
}
