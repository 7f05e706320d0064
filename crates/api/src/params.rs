//! Parameters of a request, from a JSON body or a query. Each error names its parameter.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::body::HttpBody;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use batchwright_batch::BatchConfig;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use batchwright_memory::{Memory, Reservation};
use batchwright_store::Metadata;
use bytes::BytesMut;
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use super::MAX_JSON_BODY_BYTES;
use super::error::ApiError;
use super::json_response::{UNRESERVED_BYTES, reserve};
use crate::auth::holder;
use crate::state::ApiState;

/// Valid lifetimes of a file, in seconds.
const FILE_LIFETIME_SECONDS: RangeInclusive<u64> = 3600..=2_592_000;

/// Byte order mark, with which some editors and clients begin a text.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Parameters of a JSON object. Each method removes a parameter, so that the rest is unknown.
pub(crate) struct Params {
    values: Map<String, Value>,
    _reservation: Option<Reservation>,
}

/// Memory of a body that is larger than [`UNRESERVED_BYTES`], in bytes: the JSON and its parsed
/// values.
const BODY_MEMORY_BYTES: usize = 10 * MAX_JSON_BODY_BYTES;

impl<S: HasMemory + Send + Sync> FromRequest<S> for Params {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        Self::read(request, state.memory()).await.map_err(IntoResponse::into_response)
    }
}

/// State of handlers that has the memory pools of the server.
pub(crate) trait HasMemory {
    /// Returns the memory pools.
    fn memory(&self) -> &Memory;
}

impl HasMemory for Arc<ApiState> {
    fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Body without a meaning. If there is one, its content type has to be JSON.
pub(crate) struct AnyJson;

impl<S: Sync> FromRequest<S> for AnyJson {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        if !request.body().is_end_stream() {
            check_json(request.headers())?;
        }
        Ok(Self)
    }
}

/// Returns the error of a request body that could not be read.
pub(crate) fn unreadable_body(error: axum::Error) -> ApiError {
    let slow = ApiError::from_slow_body(&error);
    slow.unwrap_or_else(|| {
        ApiError::bad_request(format!("The request body could not be read: {error}."))
    })
}

/// Refuses a content type other than JSON.
///
/// A web page can send other types to any server without a preflight request (see [`super::web`]).
pub(crate) fn check_json(headers: &HeaderMap) -> Result<(), ApiError> {
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
        |given| format!("'{}' was given", truncate_for_message(&given)),
    );
    let message = format!(
        "Unsupported content type: this method needs 'Content-Type: application/json', but {given}."
    );
    let error = ApiError::client_error(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
    Err(error.with_code(ErrorCode::UnsupportedContentType))
}

impl Params {
    /// Reads and parses the body of a request.
    async fn read(request: Request, memory: &Memory) -> Result<Self, ApiError> {
        let holder = holder(request.extensions());
        check_json(request.headers())?;
        let mut body = request.into_body();
        let (mut bytes, mut reservation) = (BytesMut::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(unreadable_body)?;
            let Ok(data) = frame.into_data() else { continue };
            let length = bytes.len().saturating_add(data.len());
            if length > MAX_JSON_BODY_BYTES {
                let limit = MAX_JSON_BODY_BYTES >> 10;
                return Err(ApiError::too_large(format!(
                    "The request body is larger than {limit} KiB."
                )));
            }
            if reservation.is_none() && length > UNRESERVED_BYTES {
                let pool = &memory.clients;
                reservation = Some(reserve(pool, &holder, BODY_MEMORY_BYTES).await?);
            }
            bytes.extend_from_slice(&data);
        }
        match serde_json::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes)) {
            Ok(Value::Object(values)) => Ok(Self { values, _reservation: reservation }),
            Ok(other) => {
                let message = format!(
                    "The request body must be a JSON object, but it is {}.",
                    type_name(&other)
                );
                Err(ApiError::bad_request(message))
            }
            Err(error) => {
                let message = format!("We could not parse the JSON body of your request: {error}.");
                Err(ApiError::bad_request(message))
            }
        }
    }

    /// Returns a single parameter, whose value is JSON in a part of a form.
    pub(crate) fn from_json(name: &str, json: &str) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_str(json).map_err(|error| {
            ApiError::invalid(
                name,
                ErrorCode::InvalidValue,
                format!("The part '{name}' is not valid JSON: {error}."),
            )
        })?;
        Ok(Self { values: Map::from_iter([(name.to_owned(), value)]), _reservation: None })
    }

    /// Removes a parameter. None if it is absent or null.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.values.remove(name).filter(|value| !value.is_null())
    }

    /// Removes an optional string. Fails if it has another type.
    pub(crate) fn optional_string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    /// Removes a required string. Fails if it is absent or has another type.
    pub(crate) fn string(&mut self, name: &str) -> Result<String, ApiError> {
        self.optional_string(name)?.ok_or_else(|| missing_parameter(name))
    }

    /// Removes an optional integer. Fails if it is outside `range`.
    pub(crate) fn optional_integer(
        &mut self,
        name: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(value) if is_integer(&value) => as_integer(&value)
                .filter(|number| range.contains(number))
                .map(Some)
                .ok_or_else(|| out_of_range(name, &range, &value.to_string())),
            Some(other) => Err(wrong_type(name, "an integer", &other)),
        }
    }

    /// Removes a limit to change: none if it is absent, and an inner none if it is null.
    pub(crate) fn limit_change(
        &mut self,
        name: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<Option<u64>>, ApiError> {
        if self.values.get(name).is_some_and(Value::is_null) {
            self.values.remove(name);
            return Ok(Some(None));
        }
        Ok(self.optional_integer(name, range)?.map(Some))
    }

    /// Removes a list of names. The outer value is none if it is absent, and the inner one if it is
    /// null.
    pub(crate) fn list_change(
        &mut self,
        name: &str,
    ) -> Result<Option<Option<Vec<String>>>, ApiError> {
        if self.values.get(name).is_some_and(Value::is_null) {
            self.values.remove(name);
            return Ok(Some(None));
        }
        Ok(self.optional_strings(name)?.map(Some))
    }

    /// Removes an optional boolean. Fails if it has another type.
    pub(crate) fn optional_boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(name, "a boolean", &other)),
        }
    }

    /// Removes an optional array of strings. Fails if it has another type.
    pub(crate) fn optional_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let items = match self.take(name) {
            None => return Ok(None),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(wrong_type(name, "an array", &other)),
        };
        let text = |(index, item)| match item {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(&format!("{name}[{index}]"), "a string", &other)),
        };
        items.into_iter().enumerate().map(text).collect::<Result<_, _>>().map(Some)
    }

    /// Removes an optional object of strings. Fails if it exceeds the limits in the settings.
    pub(crate) fn metadata(
        &mut self,
        name: &str,
        settings: &BatchConfig,
    ) -> Result<Option<Metadata>, ApiError> {
        let max_pairs = settings.max_metadata_pairs;
        let pairs = match self.take(name) {
            None => return Ok(None),
            Some(Value::Object(pairs)) => pairs,
            Some(other) => return Err(wrong_type(name, "an object", &other)),
        };
        if pairs.len() > max_pairs {
            let message = format!(
                "Invalid '{name}': too many properties. \
                 Expected an object with at most {max_pairs} properties, \
                 but got an object with {} properties instead.",
                pairs.len()
            );
            return Err(ApiError::invalid(name, ErrorCode::ObjectAboveMaxProperties, message));
        }
        let mut metadata = Metadata::new();
        for (key, value) in pairs {
            let at = format!("{name}.{key}");
            let Value::String(value) = value else {
                return Err(wrong_type(&at, "a string", &value));
            };
            let max_key = settings.max_metadata_key;
            for (what, text, max) in
                [("key", &key, max_key), ("value", &value, settings.max_metadata_value)]
            {
                let length = text.chars().count();
                if length > max {
                    let shown: String = at.chars().take(name.len() + 1 + max_key).collect();
                    let message = format!(
                        "Invalid '{shown}': {what} too long. \
                         Expected a string with maximum length {max}, \
                         but got a string with length {length} instead."
                    );
                    return Err(ApiError::invalid(shown, ErrorCode::StringAboveMaxLength, message));
                }
            }
            metadata.insert(key, value);
        }
        Ok(Some(metadata))
    }

    /// Removes an optional lifetime: `{"anchor": "created_at", "seconds": …}`.
    pub(crate) fn lifetime(&mut self, name: &str) -> Result<Option<Duration>, ApiError> {
        let mut members = match self.take(name) {
            None => return Ok(None),
            Some(Value::Object(values)) => Self { values, _reservation: None },
            Some(other) => return Err(wrong_type(name, "an object", &other)),
        };
        let at = format!("{name}.anchor");
        match members.take("anchor") {
            Some(Value::String(anchor)) => check_anchor(&at, &anchor)?,
            Some(other) => return Err(wrong_type(&at, "a string", &other)),
            None => return Err(missing_parameter(&at)),
        }
        let at = format!("{name}.seconds");
        let lifetime = match members.take("seconds") {
            Some(value) if is_integer(&value) => {
                check_lifetime(&at, as_integer(&value), &value.to_string())?
            }
            Some(other) => return Err(wrong_type(&at, "an integer", &other)),
            None => return Err(missing_parameter(&at)),
        };
        match members.values.keys().next() {
            None => Ok(Some(lifetime)),
            Some(key) => Err(unknown_parameter(&format!("{name}.{key}"))),
        }
    }

    /// Fails if a parameter is left: it is unknown or misspelled.
    pub(crate) fn reject_unknown(self) -> Result<(), ApiError> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(name) => Err(unknown_parameter(name)),
        }
    }
}

/// Returns the 400 of a missing parameter.
pub(crate) fn missing_parameter(name: &str) -> ApiError {
    ApiError::invalid(
        name,
        ErrorCode::MissingRequiredParameter,
        format!("Missing required parameter: '{name}'."),
    )
}

/// Returns the 400 of an unknown parameter.
pub(crate) fn unknown_parameter(name: &str) -> ApiError {
    let shown = truncate_for_message(name);
    let message = format!("Unknown parameter: '{shown}'.");
    ApiError::invalid(shown, ErrorCode::UnknownParameter, message)
}

/// Returns true for a number without a fraction, in any notation: `3600`, `3600.0`, `3.6e3`.
fn is_integer(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number.fract() == 0.0)
}

/// Returns a number as an integer. None if it is negative, too large, or has a fraction.
fn as_integer(value: &Value) -> Option<u64> {
    let from_decimal =
        || value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..1e15).contains(number));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the number is an integer from 0 to 1e15"
    )]
    value.as_u64().or_else(|| from_decimal().map(|number| number as u64))
}

/// Checks the anchor of a lifetime: `created_at` is the only one.
pub(crate) fn check_anchor(name: &str, anchor: &str) -> Result<(), ApiError> {
    if anchor == "created_at" {
        return Ok(());
    }
    let anchor = truncate_for_message(anchor);
    let message = format!(
        "Invalid value: '{anchor}'. Supported values are: 'created_at'. \
         The parameter is '{name}'."
    );
    Err(ApiError::invalid(name, ErrorCode::InvalidValue, message))
}

/// Checks a lifetime. `seconds` is none if `text`, which the error quotes, is not an integer.
pub(crate) fn check_lifetime(
    name: &str,
    seconds: Option<u64>,
    text: &str,
) -> Result<Duration, ApiError> {
    let valid = seconds.filter(|seconds| FILE_LIFETIME_SECONDS.contains(seconds));
    valid
        .map(Duration::from_secs)
        .ok_or_else(|| out_of_range(name, &FILE_LIFETIME_SECONDS, &truncate_for_message(text)))
}

/// Returns the 400 of a number outside its range.
pub(crate) fn out_of_range(name: &str, range: &RangeInclusive<u64>, given: &str) -> ApiError {
    let (min, max) = (range.start(), range.end());
    let message = format!(
        "Invalid '{name}': expected an integer from {min} to {max}, but got '{given}' instead."
    );
    ApiError::invalid(name, ErrorCode::InvalidValue, message)
}

fn wrong_type(name: &str, expected: &str, got: &Value) -> ApiError {
    let shown = truncate_for_message(name);
    let message = format!(
        "Invalid type for '{shown}': expected {expected}, but got {} instead.",
        type_name(got)
    );
    ApiError::invalid(shown, ErrorCode::InvalidType, message)
}

/// Returns the JSON type of a value, with its article.
fn type_name(value: &Value) -> &'static str {
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
