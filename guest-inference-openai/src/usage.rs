//! Token usage in the forms that providers use: several names per number, and numbers as integers,
//! floats or strings.

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::bindings::exports::batchwright::plugin::inference::Usage;

/// Largest plausible number of tokens; larger numbers are ignored.
const MAX_TOKENS: u64 = 1_000_000_000_000_000;

/// Members of a good response that the adapter reads.
#[derive(Deserialize)]
pub(crate) struct Counted<'a> {
    /// Token usage; none if absent or malformed.
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) usage: Option<Tokens>,
    /// Raw text of `error`, which may be null.
    #[serde(default, borrow)]
    pub(crate) error: Option<&'a RawValue>,
}

/// Number of tokens, from a number or from a string with a number; none for any other value.
#[derive(Clone, Copy, Default)]
struct Number(Option<u64>);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct NumberVisitor;
        impl<'de> Visitor<'de> for NumberVisitor {
            type Value = Number;

            fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                formatter.write_str("anything")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Number, E> {
                Ok(Number((number <= MAX_TOKENS).then_some(number)))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Number, E> {
                Ok(Number(None))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Number, E> {
                let plausible = (0.0..=MAX_TOKENS as f64).contains(&number);
                Ok(Number(plausible.then_some(number.round() as u64)))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Number, E> {
                text.trim().parse().map_or(Ok(Number(None)), |number| self.visit_f64(number))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Number, E> {
                Ok(Number(None))
            }

            fn visit_unit<E>(self) -> Result<Number, E> {
                Ok(Number(None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Number, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Number(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Number, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Number(None))
            }
        }
        from.deserialize_any(NumberVisitor)
    }
}

/// Usage under the names of the Responses API, of the older endpoints and of other providers. Some
/// providers send several.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Tokens {
    input_tokens: Number,
    prompt_tokens: Number,
    #[serde(deserialize_with = "lenient")]
    input_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    prompt_tokens_details: Option<Details>,
    // Cached input tokens of DeepSeek, Anthropic and others.
    prompt_cache_hit_tokens: Number,
    cache_read_input_tokens: Number,
    cached_tokens: Number,
    output_tokens: Number,
    completion_tokens: Number,
    #[serde(deserialize_with = "lenient")]
    output_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    completion_tokens_details: Option<Details>,
    reasoning_tokens: Number,
}

/// Breakdown of input or output tokens.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Number,
    reasoning_tokens: Number,
}

impl Tokens {
    /// Converts to the contract's usage. Of several values for one number the largest counts,
    /// because providers often send 0 for a name that they do not use.
    pub(crate) fn into_usage(self) -> Usage {
        let max =
            |numbers: &[Number]| numbers.iter().filter_map(|number| number.0).max().unwrap_or(0);
        let details = |one: Option<Details>, other: Option<Details>| {
            [one.unwrap_or_default(), other.unwrap_or_default()]
        };
        let [input, prompt] = details(self.input_tokens_details, self.prompt_tokens_details);
        let [output, completion] =
            details(self.output_tokens_details, self.completion_tokens_details);
        Usage {
            input_tokens: max(&[self.input_tokens, self.prompt_tokens]),
            cached_input_tokens: max(&[
                input.cached_tokens,
                prompt.cached_tokens,
                self.prompt_cache_hit_tokens,
                self.cache_read_input_tokens,
                self.cached_tokens,
            ]),
            output_tokens: max(&[self.output_tokens, self.completion_tokens]),
            reasoning_tokens: max(&[
                output.reasoning_tokens,
                completion.reasoning_tokens,
                self.reasoning_tokens,
            ]),
        }
    }
}

/// Deserializes a value of the wrong type as none: a malformed `usage` must not lose a good
/// response.
fn lenient<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(
    from: D,
) -> Result<Option<T>, D::Error> {
    let raw = <&RawValue>::deserialize(from)?;
    Ok(serde_json::from_str(raw.get()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(usage: &str) -> Option<(u64, u64, u64, u64)> {
        let text = format!(r#"{{"usage":{usage}}}"#);
        let counted: Counted = serde_json::from_str(&text).unwrap();
        let usage = counted.usage?.into_usage();
        Some((
            usage.input_tokens,
            usage.cached_input_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
        ))
    }

    #[test]
    fn tokens_are_read_under_every_name_and_in_every_form() {
        for (usage, expected) in [
            (r#"{"input_tokens":0,"prompt_tokens":9,"completion_tokens":4}"#, (9, 0, 4, 0)),
            (r#"{"prompt_tokens":9.0,"completion_tokens":"4"}"#, (9, 0, 4, 0)),
            (r#"{"prompt_tokens":"9","completion_tokens":null}"#, (9, 0, 0, 0)),
            (r#"{"prompt_tokens":-1,"completion_tokens":1e300}"#, (0, 0, 0, 0)),
            (r#"{"prompt_tokens":[],"completion_tokens":{}}"#, (0, 0, 0, 0)),
            (
                r#"{"input_tokens":5,"input_tokens_details":{"cached_tokens":2},
                "output_tokens":3,"output_tokens_details":{"reasoning_tokens":1}}"#,
                (5, 2, 3, 1),
            ),
            (
                r#"{"prompt_tokens":5,"prompt_cache_hit_tokens":4,
                "completion_tokens":3,"reasoning_tokens":2}"#,
                (5, 4, 3, 2),
            ),
            (
                r#"{"input_tokens":5,"cache_read_input_tokens":3,
                "output_tokens":1,"input_tokens_details":7}"#,
                (5, 3, 1, 0),
            ),
            ("{}", (0, 0, 0, 0)),
        ] {
            assert_eq!(counted(usage), Some(expected), "{usage}");
        }
        assert_eq!(counted("null"), None);
        assert_eq!(counted("7"), None);
    }
}
