//! Errors in responses with status 200. Some gateways send them, and the Responses API reports a
//! failed response this way.

use serde_json::Value;

use crate::bindings::exports::batchwright::plugin::classification::{Head, Standing};

/// Returns the status that an error in a 200 is equivalent to; none if there is no error.
pub(crate) fn status_of(body: &Value) -> Option<u16> {
    let error = body.get("error").filter(|error| error.is_object())?;
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let code = ["code", "status"].iter().find_map(|key| error.get(key).and_then(number));
    if let Some(status) = code
        .and_then(|status| u16::try_from(status).ok())
        .filter(|status| (400..600).contains(status))
    {
        return Some(status);
    }
    let word = error.get("code").and_then(Value::as_str).unwrap_or_default();
    Some(match word {
        "rate_limit_exceeded" => 429,
        "server_error" | "" => 500,
        _ => 400,
    })
}

/// Classifies an error in a 200; none for other responses, which the host classifies by their
/// status.
pub(crate) fn standing(head: &Head) -> Option<Standing> {
    if !(200..300).contains(&head.status) {
        return None;
    }
    let body: Value = serde_json::from_slice(strip_mark(&head.beginning)).ok()?;
    Some(match status_of(&body)? {
        401 => Standing::Unauthorized,
        402 => Standing::Quota,
        403 => Standing::Forbidden,
        429 | 529 => Standing::Busy,
        409 | 425 => Standing::Passing,
        408 | 500..=599 => Standing::Failed,
        _ => Standing::Answered,
    })
}

/// Byte order mark in UTF-8.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns a body without its byte order mark.
pub(crate) fn strip_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body)
}
