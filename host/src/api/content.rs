//! `/files/{id}/content`: the bytes of a file, or a range of them (RFC 9110, 14).

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;

use super::error::ApiError;
use super::files::no_file;
use super::lists::{FREE, held};
use super::openapi::Errors;
use super::{App, Tenant};
use crate::batch::Batches;
use crate::memory::Holder;
use crate::store::StoreError;

/// What is read of a file at a time while there is memory for it, in bytes.
const DOWNLOAD_PIECE: usize = 256 << 10;

/// Download a file's bytes, or a range of them
#[utoipa::path(get, path = "/files/{id}/content", tag = "Files",
    params(
        ("id" = String, Path, description = "Id of the file"),
        ("range" = Option<String>, Header, description = "One range, as in `bytes=0-99`; anything else is ignored"),
    ),
    responses(
        (status = 200, content_type = "application/octet-stream", description = "All bytes"),
        (status = 206, content_type = "application/octet-stream", description = "The bytes of the range"),
        Errors,
    ))]
pub async fn download(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Some(file) = batches.file(&tenant.0, &id).await? else { return Err(no_file(&id)) };
    let size = file.bytes;
    let asked = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map_or(Asked::All, |text| asked(text, size));
    let (status, range) = match asked {
        Asked::All => (StatusCode::OK, 0..size),
        Asked::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Asked::Nothing => {
            let mut refused =
                ApiError::range_not_satisfiable(format!("The file has {size} bytes."))
                    .into_response();
            put(refused.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{size}"));
            return Ok(refused);
        }
    };
    match batches.content_size(&tenant.0, &id).await {
        // It was deleted just now.
        Err(StoreError::Missing(_)) => return Err(no_file(&id)),
        found => found?,
    };
    let bytes = pieces(batches, tenant.0, id, range.clone());
    let mut response = (status, Body::from_stream(bytes)).into_response();
    let headers = response.headers_mut();
    put(headers, header::CONTENT_TYPE, "application/octet-stream");
    put(headers, header::CONTENT_LENGTH, &range.end.saturating_sub(range.start).to_string());
    put(headers, header::ACCEPT_RANGES, "bytes");
    put(headers, header::CONTENT_DISPOSITION, &disposition(&file.filename));
    if status == StatusCode::PARTIAL_CONTENT {
        let last = range.end.saturating_sub(1);
        put(headers, header::CONTENT_RANGE, &format!("bytes {}-{last}/{size}", range.start));
    }
    Ok(response)
}

/// The bytes of a file, each piece read when the client has the one before it: a larger one as long as there is memory for it.
fn pieces(
    batches: Arc<Batches>,
    tenant: String,
    id: String,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes, StoreError>> {
    let holder: Holder = tenant.as_str().into();
    futures_util::stream::try_unfold(range.start, move |at| {
        let (batches, tenant, id, holder) =
            (batches.clone(), tenant.clone(), id.clone(), holder.clone());
        async move {
            if at >= range.end {
                return Ok(None);
            }
            let share = batches.memory().clients.try_take(&holder, DOWNLOAD_PIECE);
            let piece = if share.is_some() { DOWNLOAD_PIECE } else { FREE };
            let next = at.saturating_add(piece as u64).min(range.end);
            let bytes = batches.content(&tenant, &id, at..next).await?;
            Ok(Some((held(bytes, share), next)))
        }
    })
}

fn put(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The name twice where it is not plain ASCII: once for any client, once as RFC 6266 has it.
fn disposition(filename: &str) -> String {
    let plain =
        |letter: char| letter.is_ascii_graphic() && !matches!(letter, '"' | '\\') || letter == ' ';
    let ascii: String =
        filename.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
    let mut value = format!("attachment; filename=\"{ascii}\"");
    if ascii != filename {
        value.push_str("; filename*=UTF-8''");
        for byte in filename.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_') {
                value.push(char::from(byte));
            } else {
                // Writing to a string does not fail.
                write!(value, "%{byte:02X}").ok();
            }
        }
    }
    value
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    All,
    Part(Range<u64>),
    Nothing,
}

/// One range; several at once, and what is no range, are ignored, as a server may.
fn asked(text: &str, size: u64) -> Asked {
    let Some((first, last)) =
        text.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-'))
    else {
        return Asked::All;
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(length)) if first.is_empty() => size.saturating_sub(length)..size,
        _ => return Asked::All,
    };
    if range.start < range.end { Asked::Part(range) } else { Asked::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_has_them() {
        for (text, range) in [
            ("bytes=0-0", Asked::Part(0..1)),
            ("bytes=2-", Asked::Part(2..10)),
            ("bytes=-3", Asked::Part(7..10)),
            ("bytes=-99", Asked::Part(0..10)),
            ("bytes=5-99", Asked::Part(5..10)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=3-2", Asked::All),
            ("bytes=0-1,3-4", Asked::All),
            ("lines=0-1", Asked::All),
            ("bytes=a-b", Asked::All),
        ] {
            assert_eq!(asked(text, 10), range, "{text}");
        }
    }

    #[test]
    fn a_name_cannot_break_out_of_its_header() {
        assert_eq!(disposition("a b.jsonl"), "attachment; filename=\"a b.jsonl\"");
        assert_eq!(
            disposition("a\"\r\nb"),
            "attachment; filename=\"a___b\"; filename*=UTF-8''a%22%0D%0Ab"
        );
        assert_eq!(disposition("ü"), "attachment; filename=\"_\"; filename*=UTF-8''%C3%BC");
    }
}
