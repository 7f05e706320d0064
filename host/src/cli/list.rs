//! Lists of a server: the path of a page, and a page as text or as the JSON of the server.

use serde_json::Value;

use super::terminal::{errln, one_line, outln};

/// Returns the path of a page, with the parameters that have a value.
pub fn page(path: &str, limit: u32, parameters: &[(&str, Option<String>)]) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", &limit.to_string());
    for (name, value) in parameters {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    format!("{path}?{}", query.finish())
}

/// Returns the entries of a page.
pub fn entries(list: &Value) -> impl Iterator<Item = &Value> {
    list.get("data").and_then(Value::as_array).into_iter().flatten()
}

/// Prints a page; `kind` is the plural of its entries, and `show` prints one as text.
pub fn show(list: &Value, as_json: bool, kind: &str, show: impl FnMut(&Value)) {
    if as_json {
        outln!("{list:#}");
        return;
    }
    entries(list).for_each(show);
    if list.get("has_more") == Some(&Value::Bool(true)) {
        let last = list.get("last_id").and_then(Value::as_str).unwrap_or_default();
        errln!("more {kind} follow: --after {}", one_line(last));
    }
}
