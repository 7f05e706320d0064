//! Request body for the provider: the client's text with the model name replaced.
//!
//! The body is not parsed and written again, because that would lose what a parser cannot hold:
//! huge numbers, halves of surrogate pairs, key order, white space. Instead, the places of the
//! `model` values are found in the text, and only those bytes change. All occurrences are
//! replaced, because parsers disagree about which of two equal keys counts.
//!
//! The same pass checks the role of each chat message.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Message roles that the API knows.
const ROLES: [&str; 6] = ["user", "system", "assistant", "tool", "developer", "function"];

/// Returns the body to send; an error refuses the request without an exchange.
pub(crate) fn prepare(endpoint: &str, model: &str, body: String) -> Result<String, String> {
    let parts: Parts = serde_json::from_str(&body)
        .map_err(|error| format!("The request body is not a JSON object: {error}"))?;
    if endpoint == "/v1/chat/completions" {
        check_roles(parts.messages)?;
    }
    let places: Vec<Range<usize>> =
        parts.models.iter().filter_map(|raw| place(&body, raw.get())).collect();
    let wanted = serde_json::Value::from(model).to_string();
    if !places.is_empty()
        && places.iter().all(|place| body.get(place.clone()) == Some(wanted.as_str()))
    {
        return Ok(body);
    }
    let mut sent = String::with_capacity(body.len().saturating_add(wanted.len()));
    let mut copied = 0;
    for place in places {
        sent.push_str(body.get(copied..place.start).unwrap_or_default());
        sent.push_str(&wanted);
        copied = place.end;
    }
    sent.push_str(body.get(copied..).unwrap_or_default());
    Ok(sent)
}

/// Returns the range of `part` in `whole`, of which it is a slice.
fn place(whole: &str, part: &str) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    Some(start..start.checked_add(part.len())?)
}

/// Returns an error that names the first unknown role.
fn check_roles(messages: Option<&RawValue>) -> Result<(), String> {
    let Some(messages) = messages else { return Ok(()) };
    let roles: Roles = serde_json::from_str(messages.get())
        .map_err(|_| String::from("Messages must be an array of objects."))?;
    match roles.unknown {
        None => Ok(()),
        Some((index, role)) => Err(format!(
            "Unknown message role: {role} (messages[{index}].role; known are {})",
            ROLES.join(", ")
        )),
    }
}

/// Members of a body that the adapter reads. A key may occur more than once.
struct Parts<'a> {
    models: Vec<&'a RawValue>,
    messages: Option<&'a RawValue>,
}

impl<'de> Deserialize<'de> for Parts<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PartsVisitor;
        impl<'de> Visitor<'de> for PartsVisitor {
            type Value = Parts<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut parts = Parts { models: Vec::with_capacity(1), messages: None };
                while let Some(key) = map.next_key::<Key>()? {
                    match key {
                        Key::Model => parts.models.push(map.next_value()?),
                        Key::Messages => parts.messages = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(parts)
            }
        }
        deserializer.deserialize_map(PartsVisitor)
    }
}

/// First message with an unknown role: its index and the role.
struct Roles {
    unknown: Option<(usize, String)>,
}

impl<'de> Deserialize<'de> for Roles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RolesVisitor;
        impl<'de> Visitor<'de> for RolesVisitor {
            type Value = Roles;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an array of messages")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut unknown = None;
                let mut index = 0;
                while let Some(message) = seq.next_element::<Message>()? {
                    if unknown.is_none() && !message.known {
                        unknown = Some((index, message.shown));
                    }
                    index += 1;
                }
                Ok(Roles { unknown })
            }
        }
        deserializer.deserialize_seq(RolesVisitor)
    }
}

/// Role of one message.
struct Message {
    known: bool,
    shown: String,
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MessageVisitor;
        impl<'de> Visitor<'de> for MessageVisitor {
            type Value = Message;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut role: Option<&RawValue> = None;
                while let Some(key) = map.next_key::<Key>()? {
                    match key {
                        Key::Role => role = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(check_role(role.map(RawValue::get)))
            }
        }
        deserializer.deserialize_map(MessageVisitor)
    }
}

/// Checks the raw text of a role.
fn check_role(role: Option<&str>) -> Message {
    let Some(raw) = role else {
        return Message { known: false, shown: "none given".into() };
    };
    let plain = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    if plain.is_some_and(|role| ROLES.contains(&role)) {
        return Message { known: true, shown: String::new() };
    }
    match serde_json::from_str::<String>(raw) {
        Ok(role) if ROLES.contains(&role.as_str()) => Message { known: true, shown: String::new() },
        Ok(role) => Message { known: false, shown: role.chars().take(64).collect() },
        Err(_) => Message { known: false, shown: raw.chars().take(64).collect() },
    }
}

enum Key {
    Model,
    Messages,
    Role,
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
                    b"model" => Key::Model,
                    b"messages" => Key::Messages,
                    b"role" => Key::Role,
                    _ => Key::Other,
                })
            }
        }
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "/v1/chat/completions";

    #[test]
    fn body_is_unchanged_except_for_the_model() {
        let body = r#"{ "model" : "gpt","messages":[{"role":"user","content":"ü","x":1}],
            "new_field":{"a":1e400} }"#;
        assert_eq!(prepare(CHAT, "gpt", body.into()).unwrap(), body);
        assert_eq!(
            prepare(CHAT, "llama \"3\"", body.into()).unwrap(),
            body.replace("\"gpt\"", r#""llama \"3\"""#)
        );
        let twice = r#"{"model":"a","input":"x","model":"gpt"}"#;
        assert_eq!(
            prepare("/v1/embeddings", "m", twice.into()).unwrap(),
            r#"{"model":"m","input":"x","model":"m"}"#
        );
    }

    #[test]
    fn unknown_role_is_refused_by_name() {
        let of = |messages: &str| {
            prepare(CHAT, "m", format!(r#"{{"model":"m","messages":{messages}}}"#))
        };
        for role in ROLES {
            assert!(of(&format!(r#"[{{"role":"{role}"}}]"#)).is_ok());
        }
        assert!(of(r#"[{"role":"us\u0065r"}]"#).is_ok());
        let error = of(r#"[{"role":"user"},{"role":"robot"},{}]"#).unwrap_err();
        assert!(error.starts_with("Unknown message role: robot (messages[1].role"), "{error}");
        assert!(
            of(r#"[{"content":"x"}]"#).unwrap_err().starts_with("Unknown message role: none given")
        );
        assert!(of(r#"[{"role":null}]"#).unwrap_err().starts_with("Unknown message role: null"));
        assert!(of(r#"["x"]"#).is_err());
        assert!(prepare("/v1/responses", "m", r#"{"model":"m","messages":[{}]}"#.into()).is_ok());
    }
}
