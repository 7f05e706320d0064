//! Body of an online request: read once, and split into what validators see and what is sent.

use std::fmt;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::formats::line::string;
use crate::online::OnlineError;

/// Key that asks for a stream.
const STREAM: &str = "stream";

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

/// Members of an object, as JSON texts.
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(MembersVisitor)
    }
}

impl OnlineBody {
    /// Parses the body of a request to an endpoint.
    pub(super) fn parse(text: &str, endpoint: Endpoint) -> Result<Self, OnlineError> {
        let Members(members) = serde_json::from_str(text).map_err(|error| {
            let message = format!("The request body is not a JSON object: {error}.");
            OnlineError::invalid(ErrorCode::InvalidRequest, message, None)
        })?;
        let value = |key: &str| {
            let mut found =
                members.iter().filter(|(name, _)| string(name.get()).as_deref() == Some(key));
            found.next_back().map(|(_, value)| value.get())
        };
        let wants_stream = match value(STREAM) {
            None | Some("null" | "false") => false,
            Some("true") => true,
            Some(_) => {
                let message = "Invalid type for 'stream': expected a boolean.";
                return Err(OnlineError::invalid(ErrorCode::InvalidType, message, Some(STREAM)));
            }
        };
        let options = value(STREAM_OPTIONS).filter(|options| *options != "null");
        let about = About {
            user: value("user").and_then(string).map(|user| truncate_for_message(&user)),
            metadata: value("metadata").map(truncate_for_message),
        };
        if value(STREAM).is_none() && options.is_none() {
            return Ok(Self { plain: text.to_owned(), streamed: None, wants_usage: false, about });
        }
        let plain: Vec<_> = members
            .iter()
            .filter(|(name, _)| {
                !matches!(string(name.get()).as_deref(), Some(STREAM | STREAM_OPTIONS))
            })
            .map(|(name, value)| format!("{}:{}", name.get(), value.get()))
            .collect();
        let plain = plain.join(",");
        let (streamed, wants_usage) = if wants_stream {
            let (options, wants_usage) = stream_options(options, endpoint)?;
            let options = options.map(|options| format!(",\"{STREAM_OPTIONS}\":{options}"));
            let comma = if plain.is_empty() { "" } else { "," };
            let options = options.unwrap_or_default();
            (Some(format!("{{{plain}{comma}\"{STREAM}\":true{options}}}")), wants_usage)
        } else {
            (None, false)
        };
        Ok(Self { plain: format!("{{{plain}}}"), streamed, wants_usage, about })
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
        assert_eq!(body.plain, r#"{"a":1e999}"#);
        assert_eq!(
            body.streamed.unwrap(),
            r#"{"a":1e999,"stream":true,"stream_options":{"x":1,"include_usage":true}}"#
        );
        assert!(!body.wants_usage);
        assert!(parse(r#"{"stream":true,"stream_options":{"include_usage":true}}"#).wants_usage);
        let body = OnlineBody::parse(r#"{"str\u0065am":true}"#, Endpoint::Responses).unwrap();
        assert_eq!(
            (body.plain.as_str(), body.streamed.as_deref()),
            ("{}", Some(r#"{"stream":true}"#))
        );
        assert_eq!(parse(r#"{"stream":false,"m":2}"#).plain, r#"{"m":2}"#);
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        let error =
            |text| OnlineBody::parse(text, Endpoint::ChatCompletions).unwrap_err().to_string();
        assert!(error("[]").contains("not a JSON object"));
        assert!(error("{").contains("not a JSON object"));
        assert!(error(r#"{"stream":1}"#).contains("'stream'"));
        assert!(error(r#"{"stream":true,"stream_options":[]}"#).contains("'stream_options'"));
    }
}
