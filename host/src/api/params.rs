//! Parameters of a request, from a JSON body or a query, with errors that name them.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::lists::{FREE, room_for};
use super::{MOST_JSON, Tenant};
use crate::batch::{Batches, shortened};
use crate::config::Settings;
use crate::memory::Share;
use crate::store::Metadata;

/// How long files may be kept that say so themselves, in seconds.
const LIFETIME: RangeInclusive<u64> = 3600..=2_592_000;

/// Some editors and clients begin a text with it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A JSON object, from which parameters are taken one by one; what is left at the end is unknown.
pub struct Params {
    given: Map<String, Value>,
    _share: Option<Share>,
}

/// What a body takes once it is more than what every connection has: as bytes, and as values.
const MEMORY: usize = 10 * MOST_JSON;

impl FromRequest<Arc<Batches>> for Params {
    type Rejection = Response;

    async fn from_request(request: Request, batches: &Arc<Batches>) -> Result<Self, Response> {
        Self::read(request, batches).await.map_err(IntoResponse::into_response)
    }
}

/// A body that means nothing here, which is JSON if it is there at all.
pub struct AnyJson;

impl<S: Sync> FromRequest<S> for AnyJson {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        if !request.body().is_end_stream() {
            check_json(request.headers())?;
        }
        Ok(Self)
    }
}

/// Refuses what says that it is no JSON: a web page can send other types to any server without being asked (see [`super::web`]).
fn check_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let given =
        headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let kind = given
        .as_deref()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json") {
        return Ok(());
    }
    let given = given.map_or_else(
        || "none was given".into(),
        |given| format!("'{}' was given", shortened(&given)),
    );
    let message = format!(
        "Unsupported content type: this method needs 'Content-Type: application/json', but {given}."
    );
    let error = ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
    Err(error.with_code("unsupported_content_type"))
}

impl Params {
    async fn read(request: Request, batches: &Batches) -> Result<Self, ApiError> {
        let tenant = Tenant::of(&request);
        check_json(request.headers())?;
        let mut body = request.into_body();
        let (mut bytes, mut share) = (BytesMut::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                let late = ApiError::of_late_body(&error);
                late.unwrap_or_else(|| {
                    ApiError::bad_request(format!("The request body could not be read: {error}."))
                })
            })?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len().saturating_add(data.len()) > MOST_JSON {
                let limit = MOST_JSON >> 10;
                return Err(ApiError::too_large(format!(
                    "The request body is larger than {limit} KiB."
                )));
            }
            if share.is_none() && bytes.len().saturating_add(data.len()) > FREE {
                share = Some(
                    room_for(&batches.memory().clients, &tenant.0.as_str().into(), MEMORY).await?,
                );
            }
            bytes.extend_from_slice(&data);
        }
        match serde_json::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes)) {
            Ok(Value::Object(given)) => Ok(Self { given, _share: share }),
            Ok(other) => {
                let message =
                    format!("The request body must be a JSON object, but it is {}.", kind(&other));
                Err(ApiError::bad_request(message))
            }
            Err(error) => {
                let message = format!("We could not parse the JSON body of your request: {error}.");
                Err(ApiError::bad_request(message))
            }
        }
    }

    /// One parameter, whose value a part of a form has as JSON.
    pub fn of_json(name: &str, json: &str) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_str(json).map_err(|error| {
            ApiError::invalid(
                name,
                "invalid_value",
                format!("The part '{name}' is not valid JSON: {error}."),
            )
        })?;
        Ok(Self { given: Map::from_iter([(name.to_owned(), value)]), _share: None })
    }

    /// A value that is neither absent nor null.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.given.remove(name).filter(|value| !value.is_null())
    }

    pub fn optional_string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    pub fn string(&mut self, name: &str) -> Result<String, ApiError> {
        self.optional_string(name)?.ok_or_else(|| missing(name))
    }

    /// Pairs of strings, as many and as long as the settings allow.
    pub fn metadata(
        &mut self,
        name: &str,
        settings: &Settings,
    ) -> Result<Option<Metadata>, ApiError> {
        let most = settings.max_metadata_pairs;
        let pairs = match self.take(name) {
            None => return Ok(None),
            Some(Value::Object(pairs)) => pairs,
            Some(other) => return Err(wrong_type(name, "an object", &other)),
        };
        if pairs.len() > most {
            let message = format!(
                "Invalid '{name}': too many properties. Expected an object with at most {most} properties, but got an object with {} properties instead.",
                pairs.len()
            );
            return Err(ApiError::invalid(name, "object_above_max_properties", message));
        }
        let mut metadata = Metadata::new();
        for (key, value) in pairs {
            let at = format!("{name}.{key}");
            let Value::String(value) = value else {
                return Err(wrong_type(&at, "a string", &value));
            };
            let longest_key = settings.max_metadata_key;
            for (what, text, longest) in
                [("key", &key, longest_key), ("value", &value, settings.max_metadata_value)]
            {
                let length = text.chars().count();
                if length > longest {
                    let shown: String = at.chars().take(name.len() + 1 + longest_key).collect();
                    let message = format!(
                        "Invalid '{shown}': {what} too long. Expected a string with maximum length {longest}, but got a string with length {length} instead."
                    );
                    return Err(ApiError::invalid(shown, "string_above_max_length", message));
                }
            }
            metadata.insert(key, value);
        }
        Ok(Some(metadata))
    }

    /// `{"anchor": "created_at", "seconds": …}`.
    pub fn lifetime(&mut self, name: &str) -> Result<Option<Duration>, ApiError> {
        let mut given = match self.take(name) {
            None => return Ok(None),
            Some(Value::Object(given)) => Self { given, _share: None },
            Some(other) => return Err(wrong_type(name, "an object", &other)),
        };
        let at = format!("{name}.anchor");
        match given.take("anchor") {
            Some(Value::String(anchor)) => check_anchor(&at, &anchor)?,
            Some(other) => return Err(wrong_type(&at, "a string", &other)),
            None => return Err(missing(&at)),
        }
        let at = format!("{name}.seconds");
        let lifetime = match given.take("seconds") {
            Some(value) if is_whole(&value) => {
                check_lifetime(&at, whole_number(&value), &value.to_string())?
            }
            Some(other) => return Err(wrong_type(&at, "an integer", &other)),
            None => return Err(missing(&at)),
        };
        match given.given.keys().next() {
            None => Ok(Some(lifetime)),
            Some(key) => Err(unknown_parameter(&format!("{name}.{key}"))),
        }
    }

    /// Refuses what was not taken: it is misspelt, or meant for something else.
    pub fn end(self) -> Result<(), ApiError> {
        match self.given.keys().next() {
            None => Ok(()),
            Some(name) => Err(unknown_parameter(name)),
        }
    }
}

pub fn missing(name: &str) -> ApiError {
    ApiError::invalid(
        name,
        "missing_required_parameter",
        format!("Missing required parameter: '{name}'."),
    )
}

pub fn unknown_parameter(name: &str) -> ApiError {
    let shown = shortened(name);
    let message = format!("Unknown parameter: '{shown}'.");
    ApiError::invalid(shown, "unknown_parameter", message)
}

/// A number without a fraction is an integer however it is written.
fn is_whole(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number.fract() == 0.0)
}

fn whole_number(value: &Value) -> Option<u64> {
    let written_as_decimal =
        || value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..1e15).contains(number));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is whole, positive and small"
    )]
    value.as_u64().or_else(|| written_as_decimal().map(|number| number as u64))
}

pub fn check_anchor(name: &str, anchor: &str) -> Result<(), ApiError> {
    if anchor == "created_at" {
        return Ok(());
    }
    let anchor = shortened(anchor);
    let message = format!(
        "Invalid value: '{anchor}'. Supported values are: 'created_at'. The parameter is '{name}'."
    );
    Err(ApiError::invalid(name, "invalid_value", message))
}

/// Seconds, if they are a number, and as the client wrote them.
pub fn check_lifetime(
    name: &str,
    seconds: Option<u64>,
    written: &str,
) -> Result<Duration, ApiError> {
    let fitting = seconds.filter(|seconds| LIFETIME.contains(seconds));
    fitting
        .map(Duration::from_secs)
        .ok_or_else(|| out_of_range(name, &LIFETIME, &shortened(written)))
}

fn out_of_range(name: &str, range: &RangeInclusive<u64>, given: &str) -> ApiError {
    let (least, most) = (range.start(), range.end());
    let message = format!(
        "Invalid '{name}': expected an integer from {least} to {most}, but got '{given}' instead."
    );
    ApiError::invalid(name, "invalid_value", message)
}

fn wrong_type(name: &str, expected: &str, got: &Value) -> ApiError {
    let shown = shortened(name);
    let message =
        format!("Invalid type for '{shown}': expected {expected}, but got {} instead.", kind(got));
    ApiError::invalid(shown, "invalid_type", message)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a decimal",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The query of a URL. What is not known is ignored: proxies and SDKs add things.
pub struct QueryParams(HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for QueryParams {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => {
                Err(ApiError::bad_request(format!("The query could not be read: {rejection}.")))
            }
        }
    }
}

impl QueryParams {
    /// None if it is empty, too: some clients send every parameter.
    pub fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).filter(|value| !value.is_empty())
    }

    pub fn limit(&mut self, range: RangeInclusive<u64>, default: u64) -> Result<usize, ApiError> {
        let number = match self.text("limit") {
            None => default,
            Some(text) => match text.parse() {
                Ok(number) if range.contains(&number) => number,
                _ => return Err(out_of_range("limit", &range, &text)),
            },
        };
        Ok(usize::try_from(number).unwrap_or(usize::MAX))
    }
}
