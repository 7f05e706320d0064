//! What the host itself reads of a line: the custom_id, the body as it stands, and the model the body names.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A line, as far as it could be read: validators say what is wrong with the rest.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RequestLine<'a> {
    pub custom_id: Option<Cow<'a, str>>,
    /// The text of a JSON object.
    pub body: Option<&'a str>,
    pub model: Option<Cow<'a, str>>,
}

impl<'a> RequestLine<'a> {
    /// Reads a line; what is no JSON object has nothing in it.
    pub fn parse(text: &'a str) -> Self {
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

/// The string that a JSON text is, if it is one. One without escapes is not copied.
pub fn string(raw: &str) -> Option<Cow<'_, str>> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Some(Cow::Borrowed(inner));
    }
    serde_json::from_str(raw).ok().map(Cow::Owned)
}

/// Which members of an object are wanted.
trait Wanted {
    const KEYS: [&'static str; 2];
}

struct Top;
struct InBody;

impl Wanted for Top {
    const KEYS: [&'static str; 2] = ["custom_id", "body"];
}

impl Wanted for InBody {
    const KEYS: [&'static str; 2] = ["model", "model"];
}

/// The texts of the wanted members of an object; of a key given twice the last one counts.
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
                while let Some(Place(place, _)) = map.next_key::<Place<W>>()? {
                    match place {
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

/// Which of the wanted members a key names.
struct Place<W>(Option<usize>, PhantomData<W>);

impl<'de, W: Wanted> Deserialize<'de> for Place<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PlaceVisitor<W>(PhantomData<W>);
        impl<W: Wanted> Visitor<'_> for PlaceVisitor<W> {
            type Value = Place<W>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a key")
            }

            fn visit_bytes<E>(self, key: &[u8]) -> Result<Self::Value, E> {
                Ok(Place(W::KEYS.iter().position(|wanted| wanted.as_bytes() == key), PhantomData))
            }
        }
        // As bytes: half a surrogate pair is JSON, though no text.
        deserializer.deserialize_bytes(PlaceVisitor(PhantomData))
    }
}

/// The text of an object that has no model, with one.
pub fn with_model(body: &str, model: &str) -> String {
    let rest = body.strip_prefix('{').unwrap_or(body);
    let comma = if rest.trim_start().starts_with('}') { "" } else { "," };
    // A string is always JSON.
    let model = serde_json::to_string(model).unwrap_or_default();
    format!("{{\"model\":{model}{comma}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_read_is_read_and_the_last_of_a_key_counts() {
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
