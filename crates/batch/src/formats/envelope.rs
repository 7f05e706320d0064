//! Parser of a line for validation: one parser and one meaning, before any rule sees the line.
//!
//! **Threat.** JSON allows duplicate keys in an object, and parsers differ in which value they use.
//! A client could write two keys `model`: the host and its rules check the first value, and the
//! provider executes the second. Each validator and each adapter has a JSON parser of its own, so
//! no rule can rely on the choice of its parser.
//!
//! **Rejection.** A line with a duplicate key at a place where rules look is rejected, and no
//! validator gets the line. These places are the top level, `body`, and the objects in
//! `body.messages` and `body.input`. Other objects, such as tool schemas and metadata, are opaque
//! to the host and are not checked.
//!
//! **Comparison.** Keys are compared after their escapes are resolved: `mod\u0065l` is `model`.
//! Keys that rules look at are also compared without case, because some parsers ignore case:
//! `MODEL` is a duplicate of `model`. Keys are compared as bytes, because a JSON key may have a
//! lone surrogate, which is not valid text.
//!
//! **Passes.** The first pass keeps only a 64-bit hash of each key of the open objects. Equal
//! hashes count as equal keys. The hasher is seeded for each line, which makes prepared collisions
//! impractical. If two hashes of an object
//! are equal, a second pass collects the paths of the duplicate keys for the error. A line without
//! duplicates, which is the usual case, is read once.
//!
//! **Numbers and surrogates.** JSON text may have numbers such as `1e999` and lone surrogates that
//! no Rust value can represent. Such a line is valid and must pass unchanged. If the first pass
//! fails, the line is read again with nested values as raw text, and an error of that pass is the
//! final one.
//!
//! **Recursion.** A line may nest a million arrays, and recursion would overflow the stack. Objects
//! are only entered at the places above. Arrays are entered up to [`MAX_ARRAY_DEPTH`]; deeper
//! values are skipped by the JSON parser without recursion. Duplicate keys below that depth are not
//! found, but no field of the API is that deep.

use std::borrow::Cow;
use std::fmt;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::formats::line::string;

/// Maximum number of reported duplicate keys of a line.
const MAX_REPORTED_DUPLICATES: usize = 3;

/// Maximum depth of nested arrays whose objects are checked. Deeper values are skipped without
/// recursion.
const MAX_ARRAY_DEPTH: usize = 8;

/// Maximum number of characters of a key in a reported path.
const MAX_KEY_CHARS: usize = 64;

/// Parts of a line that the host checks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Envelope<'a> {
    /// Value of `custom_id`, if it is a string.
    pub custom_id: Option<Cow<'a, str>>,
    /// JSON text of `url`, including the quotes.
    pub url: Option<&'a str>,
    /// True if `body` is an object.
    pub has_body: bool,
    /// True if `body.model` exists, with a value of any type.
    pub has_model: bool,
    /// Value of `body.model`, if it is a string.
    pub model: Option<Cow<'a, str>>,
    /// Paths of duplicate keys, up to a maximum number.
    pub duplicates: Vec<String>,
}

impl<'a> Envelope<'a> {
    /// Parses a line. A line that is JSON but not an object has no parts.
    ///
    /// The error has the position at which the line is not valid JSON.
    pub(crate) fn parse(text: &'a str) -> serde_json::Result<Self> {
        let mut state = State {
            hasher: RandomState::default(),
            raw_values: false,
            array_depth: 0,
            keys: Vec::new(),
            duplicates: Vec::new(),
            paths: None,
        };
        let found = match read_envelope(text, &mut state) {
            Ok(found) => found,
            // The line may have numbers or lone surrogates that no value can represent. These are
            // skipped as raw text.
            Err(_) => {
                state.raw_values = true;
                state.duplicates.clear();
                let raw: &RawValue = serde_json::from_str(text)?;
                if !raw.get().starts_with('{') {
                    return Ok(Self::default());
                }
                read_envelope(text, &mut state)?
            }
        };
        if state.duplicates.is_empty() {
            return Ok(found);
        }
        state.paths = Some(DuplicatePaths::default());
        read_envelope(text, &mut state)?;
        Ok(Self { duplicates: state.paths.map(|paths| paths.found).unwrap_or_default(), ..found })
    }
}

/// Runs one pass over a line.
fn read_envelope<'a>(text: &'a str, state: &mut State) -> serde_json::Result<Envelope<'a>> {
    state.keys.clear();
    state.array_depth = 0;
    let mut found = Envelope::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Object { state, members: Top(&mut found) }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

/// State of the passes over a line.
struct State {
    hasher: RandomState,
    /// True if nested values are read as raw text first.
    raw_values: bool,
    /// Number of open arrays.
    array_depth: usize,
    /// Hashes of the keys of all open objects.
    keys: Vec<u64>,
    /// Hashes of duplicate keys, up to [`MAX_REPORTED_DUPLICATES`].
    duplicates: Vec<u64>,
    /// Paths of duplicate keys. Set only in the pass that collects the paths.
    paths: Option<DuplicatePaths>,
}

/// Collector of the paths of keys whose hashes are duplicates.
#[derive(Default)]
struct DuplicatePaths {
    /// Path of the open value.
    current: Vec<String>,
    /// Paths of duplicate keys.
    found: Vec<String>,
}

impl State {
    /// Records a key of an open object. `from` is the index of the first key of the object.
    fn record_key(&mut self, from: usize, key: &[u8]) {
        let hash = self.hasher.hash_one(fold_case(key).as_ref());
        if let Some(paths) = &mut self.paths
            && self.duplicates.contains(&hash)
            && paths.found.len() < MAX_REPORTED_DUPLICATES
        {
            let key = String::from_utf8_lossy(key);
            let shown: String =
                key.chars().filter(|letter| !letter.is_control()).take(MAX_KEY_CHARS).collect();
            let path = paths
                .current
                .iter()
                .map(String::as_str)
                .chain([shown.as_str()])
                .collect::<Vec<_>>()
                .join(".");
            if !paths.found.contains(&path)
                && self.keys.get(from..).is_some_and(|keys| keys.contains(&hash))
            {
                paths.found.push(path);
            }
        }
        self.keys.push(hash);
    }

    /// Ends an object and records its duplicate keys. `from` is the index of its first key.
    fn end_object(&mut self, from: usize) {
        if self.paths.is_none() {
            let keys = self.keys.get_mut(from..).unwrap_or_default();
            keys.sort_unstable();
            for (one, next) in keys.iter().zip(keys.iter().skip(1)) {
                if one == next
                    && self.duplicates.len() < MAX_REPORTED_DUPLICATES
                    && !self.duplicates.contains(one)
                {
                    self.duplicates.push(*one);
                }
            }
        }
        self.keys.truncate(from);
    }
}

/// Keys that are compared without case, because rules look at them and some parsers ignore case.
const CASE_INSENSITIVE_KEYS: [&[u8]; 10] = [
    b"custom_id",
    b"method",
    b"url",
    b"body",
    b"model",
    b"messages",
    b"input",
    b"prompt",
    b"stream",
    b"role",
];

/// Normalizes a key for the comparison: `MODEL` becomes `model`.
fn fold_case(key: &[u8]) -> Cow<'_, [u8]> {
    match CASE_INSENSITIVE_KEYS.iter().find(|known| known.eq_ignore_ascii_case(key)) {
        Some(known) => Cow::Borrowed(known),
        None => Cow::Borrowed(key),
    }
}

/// Reader of the members of an object.
trait Members<'de> {
    /// Reads or skips the value of a key.
    fn read_value<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error>;
}

/// Key of a member, as far as the host reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    CustomId,
    Url,
    Body,
    Model,
    Messages,
    Input,
    Other,
}

impl Key {
    fn of(key: &[u8]) -> Self {
        match key {
            b"custom_id" => Self::CustomId,
            b"url" => Self::Url,
            b"body" => Self::Body,
            b"model" => Self::Model,
            b"messages" => Self::Messages,
            b"input" => Self::Input,
            _ => Self::Other,
        }
    }
}

/// Members of the whole line.
struct Top<'f, 'de>(&'f mut Envelope<'de>);

impl<'de> Members<'de> for Top<'_, 'de> {
    fn read_value<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error> {
        match key {
            Key::CustomId => self.0.custom_id = string(map.next_value::<&RawValue>()?.get()),
            Key::Url => self.0.url = Some(map.next_value::<&RawValue>()?.get()),
            Key::Body => {
                let body = Body { is_object: false, has_model: false, model: None };
                let body = read_nested(map, state, "body", body)?;
                (self.0.has_body, self.0.has_model, self.0.model) =
                    (body.is_object, body.has_model, body.model);
            }
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// Members of the body.
struct Body<'de> {
    is_object: bool,
    has_model: bool,
    model: Option<Cow<'de, str>>,
}

impl<'de> Members<'de> for Body<'de> {
    fn read_value<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error> {
        match key {
            Key::Model => {
                self.has_model = true;
                self.model = string(map.next_value::<&RawValue>()?.get());
            }
            Key::Messages => {
                read_nested(map, state, "messages", KeysOnly)?;
            }
            Key::Input => {
                read_nested(map, state, "input", KeysOnly)?;
            }
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// Object whose keys are checked and whose values are skipped.
struct KeysOnly;

impl<'de> Members<'de> for KeysOnly {
    fn read_value<A: MapAccess<'de>>(
        &mut self,
        _: Key,
        map: &mut A,
        _: &mut State,
    ) -> Result<(), A::Error> {
        map.next_value::<IgnoredAny>().map(drop)
    }
}

/// Reads a nested value whose objects are checked. `name` is its key in reported paths.
fn read_nested<'de, A: MapAccess<'de>, W: Members<'de> + OnObject>(
    map: &mut A,
    state: &mut State,
    name: &str,
    mut members: W,
) -> Result<W, A::Error> {
    if let Some(paths) = &mut state.paths {
        paths.current.push(name.to_owned());
    }
    if state.raw_values {
        let raw: &RawValue = map.next_value()?;
        if raw.get().starts_with(['{', '[']) {
            let object = Object { state, members: &mut members };
            object
                .deserialize(&mut serde_json::Deserializer::from_str(raw.get()))
                .map_err(A::Error::custom)?;
        }
    } else {
        map.next_value_seed(Object { state, members: &mut members })?;
    }
    if let Some(paths) = &mut state.paths {
        paths.current.pop();
    }
    Ok(members)
}

/// Observer of the start of an object.
trait OnObject {
    /// Called if the value is an object.
    fn on_object(&mut self) {}
}

impl OnObject for Body<'_> {
    fn on_object(&mut self) {
        self.is_object = true;
    }
}
impl OnObject for Top<'_, '_> {}
impl OnObject for KeysOnly {}
impl<W: OnObject> OnObject for &mut W {
    fn on_object(&mut self) {
        (**self).on_object();
    }
}
impl<'de, W: Members<'de>> Members<'de> for &mut W {
    fn read_value<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error> {
        (**self).read_value(key, map, state)
    }
}

/// Deserializer of a value that may be an object, an array of objects, or anything else.
struct Object<'s, W> {
    state: &'s mut State,
    members: W,
}

impl<'de, W: Members<'de> + OnObject> DeserializeSeed<'de> for Object<'_, W> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, W: Members<'de> + OnObject> Visitor<'de> for Object<'_, W> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.members.on_object();
        let from = self.state.keys.len();
        while let Some(key) = map.next_key_seed(KeySeed { state: self.state, from })? {
            self.members.read_value(key, &mut map, self.state)?;
        }
        self.state.end_object(from);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.state.array_depth >= MAX_ARRAY_DEPTH {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        self.state.array_depth = self.state.array_depth.saturating_add(1);
        let mut index = 0_usize;
        loop {
            let last = self.state.paths.as_mut().and_then(|paths| paths.current.last_mut());
            if let Some(last) = last {
                let name = last.split('[').next().unwrap_or_default();
                *last = format!("{name}[{index}]");
            }
            index = index.saturating_add(1);
            let object = Object { state: self.state, members: KeysOnly };
            let more = match object.state.raw_values {
                false => seq.next_element_seed(object)?.is_some(),
                true => match seq.next_element::<&RawValue>()? {
                    Some(raw) if raw.get().starts_with(['{', '[']) => {
                        let mut deserializer = serde_json::Deserializer::from_str(raw.get());
                        object.deserialize(&mut deserializer).map_err(A::Error::custom)?;
                        true
                    }
                    element => element.is_some(),
                },
            };
            if !more {
                self.state.array_depth = self.state.array_depth.saturating_sub(1);
                return Ok(());
            }
        }
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}

/// Deserializer of a key, which records the hash of the key.
struct KeySeed<'s> {
    state: &'s mut State,
    from: usize,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        // As bytes, because a JSON key may have a lone surrogate, which is not valid text.
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<Key, E> {
        self.state.record_key(self.from, key);
        Ok(Key::of(key))
    }
}

#[cfg(test)]
mod tests;
