//! Body of an online request: read once, and split into what validators see and what is sent.

use std::fmt;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::formats::line::string;
use crate::online::OnlineError;

/// Key that asks for a stream.
const STREAM: &str = "stream";

/// Number of equal keys that are kept, to find that there are too many.
const MAX_TWICE: usize = 2;

/// Key of the options of a stream.
const STREAM_OPTIONS: &str = "stream_options";

/// Parsed body.
#[derive(Debug)]
pub(super) struct OnlineBody {
    /// JSON object without what concerns streams, which validators do not know.
    pub plain: String,
    /// JSON object to send for a stream; none if the client asks for no stream.
    pub streamed: Option<String>,
    /// True if the client asks for the event with the usage of a stream.
    pub wants_usage: bool,
    /// What the client says about the request, for the log.
    pub about: About,
}

/// What a client says about a request, truncated.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct About {
    /// Text of `user`.
    pub user: Option<String>,
    /// JSON text of `metadata`.
    pub metadata: Option<String>,
}

/// Members that concern the server, in the text of a body.
#[derive(Default)]
struct Members<'a> {
    stream: Vec<Member<'a>>,
    options: Vec<Member<'a>>,
    user: Option<&'a str>,
    metadata: Option<&'a str>,
}

/// Member of an object: JSON texts of its key and its value.
struct Member<'a> {
    key: &'a str,
    value: &'a str,
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Members::default();
                while let Some(key) = map.next_key::<&RawValue>()? {
                    let key = key.get();
                    match string(key).as_deref() {
                        // A key that is there twice is refused later, so few are kept.
                        Some(STREAM) if members.stream.len() < MAX_TWICE => {
                            let value = map.next_value::<&RawValue>()?.get();
                            members.stream.push(Member { key, value });
                        }
                        Some(STREAM_OPTIONS) if members.options.len() < MAX_TWICE => {
                            let value = map.next_value::<&RawValue>()?.get();
                            members.options.push(Member { key, value });
                        }
                        Some("user") => members.user = Some(map.next_value::<&RawValue>()?.get()),
                        Some("metadata") => {
                            members.metadata = Some(map.next_value::<&RawValue>()?.get());
                        }
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(MembersVisitor)
    }
}

/// Returns the text of an object without some of its members, which are in the order of the text.
fn without(text: &str, members: &[Member<'_>]) -> String {
    let offset = |part: &str| (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
    let mut rest = text.to_owned();
    for member in members.iter().rev() {
        let mut start = offset(member.key);
        let mut end = offset(member.value).saturating_add(member.value.len());
        let after = rest.get(end..).unwrap_or_default();
        let spaces = after.len().saturating_sub(after.trim_start().len());
        if after.trim_start().starts_with(',') {
            end = end.saturating_add(spaces).saturating_add(1);
        } else if let Some(before) =
            rest.get(..start).unwrap_or_default().trim_end().strip_suffix(',')
        {
            start = before.len();
        }
        rest.replace_range(start..end, "");
    }
    rest
}

impl OnlineBody {
    /// Parses the body of a request to an endpoint.
    pub(super) fn parse(text: &str, endpoint: Endpoint) -> Result<Self, OnlineError> {
        let text = text.trim();
        let members: Members<'_> = serde_json::from_str(text).map_err(|error| {
            let message = format!("The request body is not a JSON object: {error}.");
            OnlineError::invalid(ErrorCode::InvalidRequest, message, None)
        })?;
        for (name, found) in [(STREAM, &members.stream), (STREAM_OPTIONS, &members.options)] {
            if found.len() > 1 {
                let message = format!("The key '{name}' occurs more than once; keep one of them.");
                return Err(OnlineError::invalid(ErrorCode::DuplicateKey, message, Some(name)));
            }
        }
        let wants_stream = match members.stream.first().map(|member| member.value) {
            None | Some("null" | "false") => false,
            Some("true") => true,
            Some(_) => {
                let message = "Invalid type for 'stream': expected a boolean.";
                return Err(OnlineError::invalid(ErrorCode::InvalidType, message, Some(STREAM)));
            }
        };
        let options = members.options.first().map(|member| member.value);
        let options = options.filter(|options| *options != "null");
        let about = About {
            user: members.user.and_then(string).map(|user| truncate_for_message(&user)),
            metadata: members.metadata.map(truncate_for_message),
        };
        let stream_options = stream_options(options, endpoint)?;
        let mut removed: Vec<Member<'_>> =
            members.stream.into_iter().chain(members.options).collect();
        removed.sort_by_key(|member| member.key.as_ptr() as usize);
        let plain = without(text, &removed);
        let (streamed, wants_usage) = match wants_stream {
            true => {
                let (options, wants_usage) = stream_options;
                let options = options.map(|options| format!(",\"{STREAM_OPTIONS}\":{options}"));
                let begin = plain.strip_suffix('}').unwrap_or(&plain).trim_end();
                let comma = if begin.ends_with('{') { "" } else { "," };
                let options = options.unwrap_or_default();
                (Some(format!("{begin}{comma}\"{STREAM}\":true{options}}}")), wants_usage)
            }
            false => (None, false),
        };
        Ok(Self { plain, streamed, wants_usage, about })
    }
}

/// Returns the options to send, which ask for the usage, and true if the client asks for it too.
fn stream_options(
    options: Option<&str>,
    endpoint: Endpoint,
) -> Result<(Option<Value>, bool), OnlineError> {
    let mut options = match options.map(serde_json::from_str) {
        None => Map::new(),
        Some(Ok(Value::Object(options))) => options,
        Some(_) => {
            let message = "Invalid type for 'stream_options': expected an object.";
            let param = Some(STREAM_OPTIONS);
            return Err(OnlineError::invalid(ErrorCode::InvalidType, message, param));
        }
    };
    if endpoint == Endpoint::Responses {
        // The last event of a response has its usage.
        return Ok(((!options.is_empty()).then_some(options.into()), true));
    }
    let asked = options.insert("include_usage".into(), true.into());
    Ok((Some(options.into()), asked == Some(true.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> OnlineBody {
        OnlineBody::parse(text, Endpoint::ChatCompletions).unwrap()
    }

    #[test]
    fn body_without_a_stream_is_unchanged() {
        let text = r#"{ "model":"m", "x":1e999, "y":"\ud800", "user":"u" }"#;
        let body = parse(text);
        assert_eq!((body.plain.as_str(), body.streamed), (text, None));
        assert_eq!(body.about.user.as_deref(), Some("u"));
    }

    #[test]
    fn validators_see_no_stream_and_the_provider_is_asked_for_the_usage() {
        let body = parse(r#"{"a": 1e999, "stream": true,"stream_options":{"x":1}}"#);
        assert_eq!(body.plain, r#"{"a": 1e999}"#);
        assert_eq!(
            body.streamed.unwrap(),
            r#"{"a": 1e999,"stream":true,"stream_options":{"x":1,"include_usage":true}}"#
        );
        assert!(!body.wants_usage);
        assert!(parse(r#"{"stream":true,"stream_options":{"include_usage":true}}"#).wants_usage);
        let body = OnlineBody::parse(r#"{"str\u0065am":true}"#, Endpoint::Responses).unwrap();
        assert_eq!(
            (body.plain.as_str(), body.streamed.as_deref()),
            ("{}", Some(r#"{"stream":true}"#))
        );
    }

    #[test]
    fn members_are_cut_out_wherever_they_are() {
        let options = r#""stream_options":{"a":[",","}"]}"#;
        for (text, plain) in [
            (r#"{"stream":false,"m":2}"#.to_owned(), r#"{"m":2}"#),
            (format!(r#"{{ {options} , "m" : 2, "stream" : null }}"#), r#"{  "m" : 2 }"#),
            (format!(r#"{{"m":2 , "stream":true,{options} }}"#), r#"{"m":2  }"#),
            (format!(r#" {{"stream":true,{options},"m":2}} "#), r#"{"m":2}"#),
            (format!(r#"{{"a":1,{options},"b":2,"stream":true,"m":2}}"#), r#"{"a":1,"b":2,"m":2}"#),
        ] {
            let body = parse(&text);
            assert_eq!(body.plain, plain, "{text}");
            if let Some(streamed) = body.streamed {
                let value: Value = serde_json::from_str(&streamed).unwrap();
                assert_eq!(value["stream"], true, "{streamed}");
                assert_eq!(value["m"], 2, "{streamed}");
            }
        }
        // What is not kept is skipped, whatever there is of it.
        let many = format!("{{{}\"m\":2}}", "\"\":0,".repeat(100_000));
        assert_eq!(parse(&many).plain.len(), many.len());
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        let error =
            |text| OnlineBody::parse(text, Endpoint::ChatCompletions).unwrap_err().to_string();
        assert!(error("[]").contains("not a JSON object"));
        assert!(error("{").contains("not a JSON object"));
        assert!(error(r#"{"stream":1}"#).contains("'stream'"));
        assert!(error(r#"{"stream":true,"str\u0065am":true}"#).contains("more than once"));
        assert!(error(r#"{"stream":true,"stream_options":[]}"#).contains("'stream_options'"));
    }
}
