//! Parser of one input line: a single pass that copies nothing and keeps only the members that the
//! rules need.
//!
//! The host has already rejected lines that are not JSON and lines with duplicate keys. This
//! parser still handles both, so that the component is safe on its own: `parse` returns none for
//! invalid JSON, and the last of two equal keys wins, as in most parsers.
//!
//! Two kinds of valid JSON break ordinary deserializers, and both must reach the rules:
//!
//! - Numbers beyond the range of a float (`1e999`). Members are kept as raw text, so such a number
//!   is never converted. Where an object is expected, serde converts anyway and fails; then
//!   `parse_by_parts` reads the line again, member by member.
//! - Half a surrogate pair in a key. Keys are compared as bytes, not as text.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// JSON value as its raw text in the line. The first byte tells its type.
#[derive(Clone, Copy)]
pub(crate) struct Raw<'a>(&'a str);

impl<'a> Raw<'a> {
    /// Returns true if the value is a string.
    pub(crate) fn is_string(self) -> bool {
        self.0.starts_with('"')
    }

    /// Returns true if the value is an array.
    pub(crate) fn is_array(self) -> bool {
        self.0.starts_with('[')
    }

    /// Returns true if the value is `null`.
    pub(crate) fn is_null(self) -> bool {
        self.0 == "null"
    }

    /// Returns the boolean; none for any other type.
    pub(crate) fn as_bool(self) -> Option<bool> {
        match self.0 {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// Returns the string with its escapes decoded; none if the value is not a string or has half a
    /// surrogate pair.
    pub(crate) fn to_text(self) -> Option<String> {
        serde_json::from_str(self.0).ok()
    }

    /// Returns true if the value is this string. Strings without escapes are compared in place.
    pub(crate) fn is_text(self, text: &str) -> bool {
        match self.0.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            Some(inner) if !inner.contains('\\') => inner == text,
            _ => self.to_text().is_some_and(|value| value == text),
        }
    }
}

/// Members of a request body that the rules check.
#[derive(Default)]
pub(crate) struct Body<'a> {
    pub(crate) model: Option<Raw<'a>>,
    pub(crate) messages: Option<Raw<'a>>,
    pub(crate) prompt: Option<Raw<'a>>,
    pub(crate) input: Option<Raw<'a>>,
    pub(crate) stream: Option<Raw<'a>>,
}

/// Members of a line that the rules check.
#[derive(Default)]
pub(crate) struct Line<'a> {
    pub(crate) custom_id: Option<Raw<'a>>,
    pub(crate) method: Option<Raw<'a>>,
    pub(crate) url: Option<Raw<'a>>,
    pub(crate) body: Option<Object<Body<'a>>>,
}

/// JSON object parsed into a `T`, or a value of another type.
pub(crate) enum Object<T> {
    /// An object.
    Is(T),
    /// Any other JSON value.
    IsNot,
}

/// Parses a line; none if it is not JSON.
pub(crate) fn parse(text: &str) -> Option<Object<Line<'_>>> {
    serde_json::from_str(text).ok().or_else(|| parse_by_parts(text))
}

/// Parses a line member by member: slower, but accepts a number beyond the range of a float where
/// an object is expected.
fn parse_by_parts(text: &str) -> Option<Object<Line<'_>>> {
    let raw: &RawValue = serde_json::from_str(text).ok()?;
    if !raw.get().starts_with('{') {
        return Some(Object::IsNot);
    }
    let Parts(parts) = serde_json::from_str(raw.get()).ok()?;
    let mut line = Line::default();
    for (key, value) in parts {
        let kept = Some(Raw(value.get()));
        match key {
            Key::CustomId => line.custom_id = kept,
            Key::Method => line.method = kept,
            Key::Url => line.url = kept,
            Key::Body => {
                line.body = Some(serde_json::from_str(value.get()).unwrap_or(Object::IsNot))
            }
            _ => {}
        }
    }
    Some(Object::Is(line))
}

/// Members of an object, in order.
struct Parts<'a>(Vec<(Key, &'a RawValue)>);

impl<'de> Deserialize<'de> for Parts<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PartsVisitor;
        impl<'de> Visitor<'de> for PartsVisitor {
            type Value = Parts<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut parts = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    parts.push(entry);
                }
                Ok(Parts(parts))
            }
        }
        deserializer.deserialize_map(PartsVisitor)
    }
}

/// Type that is filled field by field from an object. The last of two equal keys wins.
trait Fields<'de>: Default {
    fn take<A: MapAccess<'de>>(&mut self, key: Key, map: &mut A) -> Result<(), A::Error>;
}

/// Reads the next value as raw text.
fn raw<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Raw<'de>>, A::Error> {
    map.next_value::<&RawValue>().map(|value| Some(Raw(value.get())))
}

impl<'de> Fields<'de> for Line<'de> {
    fn take<A: MapAccess<'de>>(&mut self, key: Key, map: &mut A) -> Result<(), A::Error> {
        match key {
            Key::CustomId => self.custom_id = raw(map)?,
            Key::Method => self.method = raw(map)?,
            Key::Url => self.url = raw(map)?,
            Key::Body => self.body = Some(map.next_value()?),
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

impl<'de> Fields<'de> for Body<'de> {
    fn take<A: MapAccess<'de>>(&mut self, key: Key, map: &mut A) -> Result<(), A::Error> {
        match key {
            Key::Model => self.model = raw(map)?,
            Key::Messages => self.messages = raw(map)?,
            Key::Prompt => self.prompt = raw(map)?,
            Key::Input => self.input = raw(map)?,
            Key::Stream => self.stream = raw(map)?,
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// Known key of a line or of a body.
enum Key {
    CustomId,
    Method,
    Url,
    Body,
    Model,
    Messages,
    Prompt,
    Input,
    Stream,
    Other,
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a key")
            }

            fn visit_bytes<E>(self, key: &[u8]) -> Result<Key, E> {
                Ok(match key {
                    b"custom_id" => Key::CustomId,
                    b"method" => Key::Method,
                    b"url" => Key::Url,
                    b"body" => Key::Body,
                    b"model" => Key::Model,
                    b"messages" => Key::Messages,
                    b"prompt" => Key::Prompt,
                    b"input" => Key::Input,
                    b"stream" => Key::Stream,
                    _ => Key::Other,
                })
            }
        }
        // Bytes, because a key with half a surrogate pair is valid JSON but not valid UTF-8.
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

impl<'de, T: Fields<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor(std::marker::PhantomData))
    }
}

struct ObjectVisitor<T>(std::marker::PhantomData<T>);

impl<'de, T: Fields<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = T::default();
        while let Some(key) = map.next_key::<Key>()? {
            fields.take(key, &mut map)?;
        }
        Ok(Object::Is(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Object::IsNot)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Object::IsNot)
    }
}
