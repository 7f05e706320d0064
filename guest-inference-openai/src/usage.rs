//! Tokens, as providers count them: under several names, and not always as whole numbers.

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::bindings::exports::batchwright::plugin::inference::Usage;

/// The largest number of tokens that is believed.
const MOST: u64 = 1_000_000_000_000_000;

/// What is read of a good answer.
#[derive(Deserialize)]
pub(crate) struct Counted<'a> {
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) usage: Option<Tokens>,
    #[serde(default, borrow)]
    pub(crate) error: Option<&'a RawValue>,
}

/// A number of tokens: a number, or one in a string. What is no number of tokens is none.
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
                Ok(Number((number <= MOST).then_some(number)))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Number, E> {
                Ok(Number(None))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Number, E> {
                let believed = (0.0..=MOST as f64).contains(&number);
                Ok(Number(believed.then_some(number.round() as u64)))
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

/// Usage in the words of Responses, in those of the older endpoints, and in those of other providers; some send several.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Tokens {
    input_tokens: Number,
    prompt_tokens: Number,
    #[serde(deserialize_with = "lenient")]
    input_tokens_details: Option<Details>,
    #[serde(deserialize_with = "lenient")]
    prompt_tokens_details: Option<Details>,
    /// DeepSeek, Anthropic, and others.
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

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Number,
    reasoning_tokens: Number,
}

impl Tokens {
    /// Where a number is given twice, the larger one counts: the other is often a zero that stands for nothing.
    pub(crate) fn into_usage(self) -> Usage {
        let most =
            |numbers: &[Number]| numbers.iter().filter_map(|number| number.0).max().unwrap_or(0);
        let details = |one: Option<Details>, other: Option<Details>| {
            [one.unwrap_or_default(), other.unwrap_or_default()]
        };
        let [input, prompt] = details(self.input_tokens_details, self.prompt_tokens_details);
        let [output, completion] =
            details(self.output_tokens_details, self.completion_tokens_details);
        Usage {
            input_tokens: most(&[self.input_tokens, self.prompt_tokens]),
            cached_input_tokens: most(&[
                input.cached_tokens,
                prompt.cached_tokens,
                self.prompt_cache_hit_tokens,
                self.cache_read_input_tokens,
                self.cached_tokens,
            ]),
            output_tokens: most(&[self.output_tokens, self.completion_tokens]),
            reasoning_tokens: most(&[
                output.reasoning_tokens,
                completion.reasoning_tokens,
                self.reasoning_tokens,
            ]),
        }
    }
}

/// Reads a value of the wrong type as none: a provider's odd `usage` must not cost a good answer.
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
    fn tokens_are_found_under_every_name_and_in_every_form() {
        for (usage, expected) in [
            (r#"{"input_tokens":0,"prompt_tokens":9,"completion_tokens":4}"#, (9, 0, 4, 0)),
            (r#"{"prompt_tokens":9.0,"completion_tokens":"4"}"#, (9, 0, 4, 0)),
            (r#"{"prompt_tokens":"9","completion_tokens":null}"#, (9, 0, 0, 0)),
            (r#"{"prompt_tokens":-1,"completion_tokens":1e300}"#, (0, 0, 0, 0)),
            (r#"{"prompt_tokens":[],"completion_tokens":{}}"#, (0, 0, 0, 0)),
            (
                r#"{"input_tokens":5,"input_tokens_details":{"cached_tokens":2},"output_tokens":3,
                "output_tokens_details":{"reasoning_tokens":1}}"#,
                (5, 2, 3, 1),
            ),
            (
                r#"{"prompt_tokens":5,"prompt_cache_hit_tokens":4,"completion_tokens":3,"reasoning_tokens":2}"#,
                (5, 4, 3, 2),
            ),
            (
                r#"{"input_tokens":5,"cache_read_input_tokens":3,"output_tokens":1,"input_tokens_details":7}"#,
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
