//! Errors that come with status 200: some gateways put them there, and the Responses API has a status of its own.

use serde_json::Value;

use crate::bindings::exports::batchwright::plugin::classification::{Head, Standing};

/// The status that an error in a 200 stands for; none if there is no error.
pub(crate) fn status_of(body: &Value) -> Option<u16> {
    let error = body.get("error").filter(|error| error.is_object())?;
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let told = ["code", "status"].iter().find_map(|key| error.get(key).and_then(number));
    if let Some(status) = told
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

/// Whose affair an error in a 200 is. Other responses say it by their status.
pub(crate) fn standing(head: &Head) -> Option<Standing> {
    if !(200..300).contains(&head.status) {
        return None;
    }
    let body: Value = serde_json::from_slice(without_mark(&head.beginning)).ok()?;
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

/// The byte order mark in UTF-8.
pub(crate) const MARK: &[u8] = b"\xef\xbb\xbf";

/// A body without its byte order mark.
pub(crate) fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(MARK).unwrap_or(body)
}
