//! Parser for the parts of a line that the host needs: the custom_id, the unchanged body and its
//! model.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Parsed parts of a line.
///
/// A part that is missing or has the wrong type is `None`. Validators report errors of the line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestLine<'a> {
    /// Value of `custom_id`.
    pub custom_id: Option<Cow<'a, str>>,
    /// JSON text of `body`, if `body` is an object.
    pub body: Option<&'a str>,
    /// Value of `body.model`.
    pub model: Option<Cow<'a, str>>,
}

impl<'a> RequestLine<'a> {
    /// Parses a line. A line that is not a JSON object has no parts.
    pub(crate) fn parse(text: &'a str) -> Self {
        let Ok(Members::<Top>(found, _)) = serde_json::from_str(text) else {
            return Self::default();
        };
        let [custom_id, body] = found;
        let body = body.filter(|body| body.starts_with('{'));
        let model = body.and_then(|body| {
            let Members::<InBody>([model, _], _) = serde_json::from_str(body).ok()?;
            string(model?)
        });
        Self { custom_id: custom_id.and_then(string), body, model }
    }
}

/// Parses a JSON string, or returns `None` for other JSON. A string without escapes is not copied.
pub(crate) fn string(raw: &str) -> Option<Cow<'_, str>> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Some(Cow::Borrowed(inner));
    }
    serde_json::from_str(raw).ok().map(Cow::Owned)
}

/// Selection of the members that are read from an object.
trait Wanted {
    /// Keys of the selected members.
    const KEYS: [&'static str; 2];
}

/// Members of the whole line.
struct Top;

/// Members of the body.
struct InBody;

impl Wanted for Top {
    const KEYS: [&'static str; 2] = ["custom_id", "body"];
}

impl Wanted for InBody {
    const KEYS: [&'static str; 2] = ["model", "model"];
}

/// JSON texts of the selected members of an object. For a duplicate key, the last value counts.
struct Members<'a, W>([Option<&'a str>; 2], PhantomData<W>);

impl<'de, W: Wanted> Deserialize<'de> for Members<'de, W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor<W>(PhantomData<W>);
        impl<'de, W: Wanted> Visitor<'de> for MembersVisitor<W> {
            type Value = Members<'de, W>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let [mut first, mut second] = [None, None];
                while let Some(KeyIndex(index, _)) = map.next_key::<KeyIndex<W>>()? {
                    match index {
                        Some(0) => first = Some(map.next_value::<&RawValue>()?.get()),
                        Some(_) => second = Some(map.next_value::<&RawValue>()?.get()),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Members([first, second], PhantomData))
            }
        }
        deserializer.deserialize_map(MembersVisitor(PhantomData))
    }
}

/// Index of a key in the selection, or `None` for other keys.
struct KeyIndex<W>(Option<usize>, PhantomData<W>);

impl<'de, W: Wanted> Deserialize<'de> for KeyIndex<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyIndexVisitor<W>(PhantomData<W>);
        impl<W: Wanted> Visitor<'_> for KeyIndexVisitor<W> {
            type Value = KeyIndex<W>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a key")
            }

            fn visit_bytes<E>(self, key: &[u8]) -> Result<Self::Value, E> {
                Ok(KeyIndex(
                    W::KEYS.iter().position(|wanted| wanted.as_bytes() == key),
                    PhantomData,
                ))
            }
        }
        // As bytes, because a JSON key may have a lone surrogate, which is not valid text.
        deserializer.deserialize_bytes(KeyIndexVisitor(PhantomData))
    }
}

/// Adds a model to the JSON text of an object that has no model.
pub(crate) fn with_model(body: &str, model: &str) -> String {
    let rest = body.strip_prefix('{').unwrap_or(body);
    let comma = if rest.trim_start().starts_with('}') { "" } else { "," };
    // The serialization of a string cannot fail.
    let model = serde_json::to_string(model).unwrap_or_default();
    format!("{{\"model\":{model}{comma}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_line_reads_known_members_and_the_last_duplicate_key_counts() {
        let line = RequestLine::parse(
            r#"{"custom_id":"x","a":[1e999],"body":{"model":"m","n":{}},"custom_id":"\u0061"}"#,
        );
        assert_eq!(line.custom_id.as_deref(), Some("a"));
        assert_eq!(
            (line.body, line.model.as_deref()),
            (Some(r#"{"model":"m","n":{}}"#), Some("m"))
        );
        for nothing in [
            "",
            "[]",
            "{",
            "null",
            r#"{"custom_id":1,"body":[]}"#,
            r#"{"custom_id":"\ud800"}"#,
            "{} {}",
        ] {
            assert_eq!(RequestLine::parse(nothing), RequestLine::default(), "{nothing}");
        }
        assert_eq!(RequestLine::parse(r#"{"body":{"model":7}}"#).model, None);
        assert_eq!(with_model(r#"{"input":"x"}"#, "a\"b"), r#"{"model":"a\"b","input":"x"}"#);
        assert_eq!(with_model("{ }", "m"), r#"{"model":"m" }"#);
    }
}
