//! A line as validation reads it: one parser with one meaning, before any rule looks.
//!
//! JSON lets a key stand twice in an object, and readers differ in which value they take: a rule could judge one `model` and a provider be
//! sent the other. So a line with such a key where rules look (in the envelope, in `body`, in the objects of `body.messages` and
//! `body.input`) is refused, and no validator is given it. Keys are compared as they are read, without their escapes.

use std::borrow::Cow;
use std::fmt;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::line::string;

/// Duplicate keys that are named of one line.
const MAX_NAMED: usize = 3;

/// Arrays in arrays whose objects are looked at. Beyond, a line is passed over without recursion, however deep it is.
const MAX_ARRAYS: usize = 8;

/// Characters of a key in the path that names it.
const MAX_KEY_CHARS: usize = 64;

/// What the host looks at in a line.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub custom_id: Option<Cow<'a, str>>,
    /// Its text, quotes included.
    pub url: Option<&'a str>,
    /// The body is an object.
    pub has_body: bool,
    /// The body has a model, of whatever type.
    pub has_model: bool,
    pub model: Option<Cow<'a, str>>,
    /// The paths of keys that stand twice in an object.
    pub duplicates: Vec<String>,
}

impl<'a> Envelope<'a> {
    /// Reads a line; what is no JSON object has nothing in it. An error is where the line stops being JSON.
    pub fn parse(text: &'a str) -> serde_json::Result<Self> {
        let mut state = State {
            hasher: RandomState::default(),
            by_parts: false,
            arrays: 0,
            keys: Vec::new(),
            twice: Vec::new(),
            naming: None,
        };
        let found = match read(text, &mut state) {
            Ok(found) => found,
            // JSON may hold numbers and halves of surrogate pairs that no value can: they are passed over as text.
            Err(_) => {
                state.by_parts = true;
                state.twice.clear();
                let raw: &RawValue = serde_json::from_str(text)?;
                if !raw.get().starts_with('{') {
                    return Ok(Self::default());
                }
                read(text, &mut state)?
            }
        };
        if state.twice.is_empty() {
            return Ok(found);
        }
        state.naming = Some(Naming::default());
        read(text, &mut state)?;
        Ok(Self {
            duplicates: state.naming.map(|naming| naming.found).unwrap_or_default(),
            ..found
        })
    }
}

fn read<'a>(text: &'a str, state: &mut State) -> serde_json::Result<Envelope<'a>> {
    state.keys.clear();
    state.arrays = 0;
    let mut found = Envelope::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Object { state, wanted: Top(&mut found) }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

struct State {
    hasher: RandomState,
    /// Nested values are found as texts before they are read.
    by_parts: bool,
    /// Arrays that are open.
    arrays: usize,
    /// Hashes of the keys of the objects that are open.
    keys: Vec<u64>,
    /// Hashes of keys that stand twice, as many as are named.
    twice: Vec<u64>,
    naming: Option<Naming>,
}

/// A second reading, for the names of keys whose hashes were met twice.
#[derive(Default)]
struct Naming {
    path: Vec<String>,
    found: Vec<String>,
}

impl State {
    /// Takes note of a key of the object whose first key has this place.
    fn key(&mut self, from: usize, key: &[u8]) {
        let hash = self.hasher.hash_one(folded(key).as_ref());
        if let Some(naming) = &mut self.naming
            && self.twice.contains(&hash)
            && naming.found.len() < MAX_NAMED
        {
            let key = String::from_utf8_lossy(key);
            let shown: String =
                key.chars().filter(|letter| !letter.is_control()).take(MAX_KEY_CHARS).collect();
            let path = naming
                .path
                .iter()
                .map(String::as_str)
                .chain([shown.as_str()])
                .collect::<Vec<_>>()
                .join(".");
            if !naming.found.contains(&path)
                && self.keys.get(from..).is_some_and(|keys| keys.contains(&hash))
            {
                naming.found.push(path);
            }
        }
        self.keys.push(hash);
    }

    /// The object whose first key has this place has ended.
    fn end(&mut self, from: usize) {
        if self.naming.is_none() {
            let keys = self.keys.get_mut(from..).unwrap_or_default();
            keys.sort_unstable();
            for (one, next) in keys.iter().zip(keys.iter().skip(1)) {
                if one == next && self.twice.len() < MAX_NAMED && !self.twice.contains(one) {
                    self.twice.push(*one);
                }
            }
        }
        self.keys.truncate(from);
    }
}

/// Keys that rules look at, and that some readers find in any case.
const CASELESS: [&[u8]; 10] = [
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

/// A key as it is compared: `MODEL` is another `model`, for readers that ignore the case of letters.
fn folded(key: &[u8]) -> Cow<'_, [u8]> {
    match CASELESS.iter().find(|known| known.eq_ignore_ascii_case(key)) {
        Some(known) => Cow::Borrowed(known),
        None => Cow::Borrowed(key),
    }
}

/// What is taken of an object: the value of a key is read here, or passed over.
trait Wanted<'de> {
    fn take<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error>;
}

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

struct Top<'f, 'de>(&'f mut Envelope<'de>);

impl<'de> Wanted<'de> for Top<'_, 'de> {
    fn take<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error> {
        match key {
            Key::CustomId => self.0.custom_id = string(map.next_value::<&RawValue>()?.get()),
            Key::Url => self.0.url = Some(map.next_value::<&RawValue>()?.get()),
            Key::Body => {
                let body = Body { has: false, has_model: false, model: None };
                let body = nested(map, state, "body", body)?;
                (self.0.has_body, self.0.has_model, self.0.model) =
                    (body.has, body.has_model, body.model);
            }
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

struct Body<'de> {
    has: bool,
    has_model: bool,
    model: Option<Cow<'de, str>>,
}

impl<'de> Wanted<'de> for Body<'de> {
    fn take<A: MapAccess<'de>>(
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
                nested(map, state, "messages", Nothing)?;
            }
            Key::Input => {
                nested(map, state, "input", Nothing)?;
            }
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// Keys alone.
struct Nothing;

impl<'de> Wanted<'de> for Nothing {
    fn take<A: MapAccess<'de>>(
        &mut self,
        _: Key,
        map: &mut A,
        _: &mut State,
    ) -> Result<(), A::Error> {
        map.next_value::<IgnoredAny>().map(drop)
    }
}

/// Reads the value of a key that may hold objects which matter; one that begins in another way does not.
fn nested<'de, A: MapAccess<'de>, W: Wanted<'de> + Present>(
    map: &mut A,
    state: &mut State,
    name: &str,
    mut wanted: W,
) -> Result<W, A::Error> {
    if let Some(naming) = &mut state.naming {
        naming.path.push(name.to_owned());
    }
    if state.by_parts {
        let raw: &RawValue = map.next_value()?;
        if raw.get().starts_with(['{', '[']) {
            let object = Object { state, wanted: &mut wanted };
            object
                .deserialize(&mut serde_json::Deserializer::from_str(raw.get()))
                .map_err(A::Error::custom)?;
        }
    } else {
        map.next_value_seed(Object { state, wanted: &mut wanted })?;
    }
    if let Some(naming) = &mut state.naming {
        naming.path.pop();
    }
    Ok(wanted)
}

/// Told that the value is an object.
trait Present {
    fn present(&mut self) {}
}

impl Present for Body<'_> {
    fn present(&mut self) {
        self.has = true;
    }
}
impl Present for Top<'_, '_> {}
impl Present for Nothing {}
impl<W: Present> Present for &mut W {
    fn present(&mut self) {
        (**self).present();
    }
}
impl<'de, W: Wanted<'de>> Wanted<'de> for &mut W {
    fn take<A: MapAccess<'de>>(
        &mut self,
        key: Key,
        map: &mut A,
        state: &mut State,
    ) -> Result<(), A::Error> {
        (**self).take(key, map, state)
    }
}

/// An object whose keys are compared and of which something is wanted; an array of such; or anything else.
struct Object<'s, W> {
    state: &'s mut State,
    wanted: W,
}

impl<'de, W: Wanted<'de> + Present> DeserializeSeed<'de> for Object<'_, W> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, W: Wanted<'de> + Present> Visitor<'de> for Object<'_, W> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.wanted.present();
        let from = self.state.keys.len();
        while let Some(key) = map.next_key_seed(KeySeed { state: self.state, from })? {
            self.wanted.take(key, &mut map, self.state)?;
        }
        self.state.end(from);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.state.arrays >= MAX_ARRAYS {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        self.state.arrays = self.state.arrays.saturating_add(1);
        let mut index = 0_usize;
        loop {
            let last = self.state.naming.as_mut().and_then(|naming| naming.path.last_mut());
            if let Some(last) = last {
                let name = last.split('[').next().unwrap_or_default();
                *last = format!("{name}[{index}]");
            }
            index = index.saturating_add(1);
            let object = Object { state: self.state, wanted: Nothing };
            let more = match object.state.by_parts {
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
                self.state.arrays = self.state.arrays.saturating_sub(1);
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

struct KeySeed<'s> {
    state: &'s mut State,
    from: usize,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        // As bytes: half a surrogate pair is JSON, though no text.
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<Key, E> {
        self.state.key(self.from, key);
        Ok(Key::of(key))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Envelope<'_> {
        Envelope::parse(text).unwrap()
    }

    #[test]
    fn what_the_host_looks_at_is_read_whatever_else_is_in_the_line() {
        for odd in ["", r#","odd":[1e999,"\ud800",123456789012345678901234567890]"#] {
            let text = format!(
                r#"{{"custom_id":"\u0061","url":"/v1/x","body":{{"model":"m","n":{{}}{odd}}}{odd}}}"#
            );
            let line = parse(&text);
            assert_eq!(
                (line.custom_id.as_deref(), line.url),
                (Some("a"), Some(r#""/v1/x""#)),
                "{text}"
            );
            assert_eq!(
                (line.has_body, line.has_model, line.model.as_deref()),
                (true, true, Some("m")),
                "{text}"
            );
            assert_eq!(line.duplicates, [""; 0]);
        }
        for nothing in ["[]", "null", "1e999", r#""\ud800""#, "{}", r#"[{"a":1,"a":2}]"#] {
            assert_eq!(parse(nothing).model, None, "{nothing}");
            assert!(!parse(nothing).has_body, "{nothing}");
        }
        for no_body in [r#"{"body":1e999}"#, r#"{"body":"\ud800"}"#, r#"{"body":[{"model":"m"}]}"#]
        {
            assert!(!parse(no_body).has_body && parse(no_body).model.is_none(), "{no_body}");
        }
        assert!(parse(r#"{"body":{"model":7}}"#).has_model);
        for bad in ["", "{", "{} {}", r#"{"a":}"#, "nope", r#"{"body":{"model":}}"#, "01"] {
            assert!(Envelope::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_that_stand_twice_are_named_with_their_paths() {
        for (text, paths) in [
            (r#"{"custom_id":"a","custom_id":"b"}"#, vec!["custom_id"]),
            (r#"{"body":{"model":"a","mod\u0065l":"b"}}"#, vec!["body.model"]),
            (
                r#"{"body":{"messages":[{"role":"user"},{"role":"user","role":"system","a":1,"a":2}]}}"#,
                vec!["body.messages[1].role", "body.messages[1].a"],
            ),
            (r#"{"body":{"input":[[],{"x":1e999,"x":1}]}}"#, vec!["body.input[1].x"]),
            (r#"{"body":{"model":"a","MODEL":"b"}}"#, vec!["body.MODEL"]),
            (r#"{"body":{"input":[[{"x":1,"x":2}],1e400]}}"#, vec!["body.input[0].x"]),
            (r#"{"x":1,"body":{"x":1,"messages":[{"x":1},{"x":1}]}}"#, vec![]),
            (r#"{"body":{"tools":[{"a":1,"a":2}],"metadata":{"b":1,"b":2}}}"#, vec![]),
            (r#"{"\ud800":1,"\ud800":2}"#, vec!["\u{fffd}\u{fffd}\u{fffd}"]),
            (
                r#"{"body":{"model":"a"},"body":{"model":"a","model":"b"}}"#,
                vec!["body", "body.model"],
            ),
        ] {
            assert_eq!(parse(text).duplicates, paths, "{text}");
        }
        let many: String =
            (0..50).map(|number| format!(r#""k{number}":1,"k{number}":2,"#)).collect();
        assert_eq!(parse(&format!(r#"{{{many}"body":{{}}}}"#)).duplicates.len(), MAX_NAMED);
    }

    #[test]
    fn a_line_of_a_million_arrays_is_read() {
        for bad in [false, true] {
            let (open, close) =
                ("[".repeat(1_000_000), "]".repeat(if bad { 999_999 } else { 1_000_000 }));
            for text in [
                format!("{open}{close}"),
                format!(r#"{{"body":{open}{close}}}"#),
                format!(r#"{{"body":{{"model":"m","input":{open}{close}}}}}"#),
                format!(r#"{{"body":{{"messages":[1e999,{open}{close}],"model":"m"}}}}"#),
                format!(
                    r#"{{"body":{{"messages":[{{"role":{open}{close}}}]}},"x":{open}{close}}}"#
                ),
            ] {
                assert_eq!(Envelope::parse(&text).is_err(), bad, "{}", text.get(..40).unwrap());
            }
        }
        let deep = format!(
            r#"{{"body":{{"input":{}{{"x":1,"x":1}}{}}}}}"#,
            "[".repeat(200),
            "]".repeat(200)
        );
        assert_eq!(parse(&deep).duplicates, [""; 0]);
    }

    proptest! {
        #[test]
        fn a_key_is_found_twice_if_and_only_if_it_is_there_twice(keys in prop::collection::vec("[a-c]{1,2}", 0..6)) {
            let members: Vec<String> = keys.iter().map(|key| format!(r#""{key}":1"#)).collect();
            let text = format!(r#"{{"body":{{"messages":[{{{}}}]}}}}"#, members.join(","));
            let unique: std::collections::BTreeSet<_> = keys.iter().collect();
            prop_assert_eq!(parse(&text).duplicates.is_empty(), unique.len() == keys.len());
        }
    }
}
