//! One input line, read in a single pass that copies nothing and keeps only what the rules look at.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A value whose kind is known and whose text is kept, as it stands in the line.
#[derive(Clone, Copy)]
pub(crate) struct Raw<'a>(&'a str);

impl<'a> Raw<'a> {
    pub(crate) fn is_string(self) -> bool {
        self.0.starts_with('"')
    }

    pub(crate) fn is_array(self) -> bool {
        self.0.starts_with('[')
    }

    pub(crate) fn is_null(self) -> bool {
        self.0 == "null"
    }

    pub(crate) fn as_bool(self) -> Option<bool> {
        match self.0 {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// The string it holds, escapes resolved; none if it is no string or holds half a surrogate pair.
    pub(crate) fn to_text(self) -> Option<String> {
        serde_json::from_str(self.0).ok()
    }

    /// Whether it is this very string. The common case, without escapes, is compared in place.
    pub(crate) fn is_text(self, text: &str) -> bool {
        match self.0.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            Some(inner) if !inner.contains('\\') => inner == text,
            _ => self.to_text().is_some_and(|value| value == text),
        }
    }
}

/// What the rules look at in a request's body.
#[derive(Default)]
pub(crate) struct Body<'a> {
    pub(crate) model: Option<Raw<'a>>,
    pub(crate) messages: Option<Raw<'a>>,
    pub(crate) prompt: Option<Raw<'a>>,
    pub(crate) input: Option<Raw<'a>>,
    pub(crate) stream: Option<Raw<'a>>,
}

/// What the rules look at in a line.
#[derive(Default)]
pub(crate) struct Line<'a> {
    pub(crate) custom_id: Option<Raw<'a>>,
    pub(crate) method: Option<Raw<'a>>,
    pub(crate) url: Option<Raw<'a>>,
    pub(crate) body: Option<Object<Body<'a>>>,
}

/// A JSON object read into a `T`, or anything else.
pub(crate) enum Object<T> {
    Is(T),
    IsNot,
}

/// Reads a line; none if it is not JSON.
pub(crate) fn parse(text: &str) -> Option<Object<Line<'_>>> {
    serde_json::from_str(text).ok().or_else(|| parse_by_parts(text))
}

/// The slow way, for JSON that is in order but holds, in a place where an object belongs, a number too large for a float.
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

/// Types filled field by field from an object; of a key given twice the last one counts.
trait Fields<'de>: Default {
    fn take<A: MapAccess<'de>>(&mut self, key: Key, map: &mut A) -> Result<(), A::Error>;
}

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
        // As bytes: half a surrogate pair is JSON, though no text.
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
