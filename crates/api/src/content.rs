//! `/files/{id}/content`: content of a file, or a range of it (RFC 9110, section 14).

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use batchwright_domain::ids::{FileId, TenantId};
use batchwright_memory::Holder;
use batchwright_store::StoreError;
use bytes::Bytes;
use futures_util::Stream;

use super::App;
use super::error::ApiError;
use super::files::file_not_found;
use super::json_response::{UNRESERVED_BYTES, with_reservation};
use super::openapi::Errors;
use crate::auth::{ReadFiles, Tenant};
use crate::state::ApiState;

/// Chunk size of a download if memory can be reserved, in bytes.
const DOWNLOAD_CHUNK_BYTES: usize = 256 << 10;

/// Downloads the content of a file, or a range of it
#[utoipa::path(get, path = "/files/{id}/content", tag = "Files",
    params(
        ("id" = String, Path, description = "Id of the file"),
        ("range" = Option<String>, Header,
            description = "A single range such as `bytes=0-99`; other values are ignored"),
    ),
    responses(
        (status = 200, content_type = "application/octet-stream",
            description = "Content of the file"),
        (status = 206, content_type = "application/octet-stream",
            description = "Content of the range"),
        Errors,
    ))]
pub(crate) async fn download(
    State(app): App,
    tenant: Tenant<ReadFiles>,
    Path(id): Path<FileId>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Some(file) = app.service.file(&tenant.0, &id).await? else {
        return Err(file_not_found(id.as_str()));
    };
    let size = file.bytes;
    let requested = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map_or(RequestedRange::All, |text| parse_range(text, size));
    let (status, range) = match requested {
        RequestedRange::All => (StatusCode::OK, 0..size),
        RequestedRange::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        RequestedRange::Unsatisfiable => {
            let mut refused = ApiError::range_not_satisfiable(format!(
                "The range is outside the file, which has {size} bytes."
            ))
            .into_response();
            set_header(refused.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{size}"));
            return Ok(refused);
        }
    };
    match app.service.content_size(&tenant.0, &id).await {
        // The file was deleted after its record was read.
        Err(StoreError::Missing(_)) => return Err(file_not_found(id.as_str())),
        found => found?,
    };
    let chunks = read_chunks(app, tenant.0, id, range.clone());
    let mut response = (status, Body::from_stream(chunks)).into_response();
    let headers = response.headers_mut();
    set_header(headers, header::CONTENT_TYPE, "application/octet-stream");
    let length = range.end.saturating_sub(range.start);
    set_header(headers, header::CONTENT_LENGTH, &length.to_string());
    set_header(headers, header::ACCEPT_RANGES, "bytes");
    set_header(headers, header::CONTENT_DISPOSITION, &disposition(&file.filename));
    if status == StatusCode::PARTIAL_CONTENT {
        let last = range.end.saturating_sub(1);
        let range = format!("bytes {}-{last}/{size}", range.start);
        set_header(headers, header::CONTENT_RANGE, &range);
    }
    Ok(response)
}

/// Streams the content of a file. Each chunk is read when the client has read the one before it.
///
/// Chunks are large if memory can be reserved, and small otherwise.
fn read_chunks(
    app: Arc<ApiState>,
    tenant: TenantId,
    id: FileId,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes, StoreError>> {
    let holder: Holder = tenant.as_str().into();
    futures_util::stream::try_unfold(range.start, move |at| {
        let (app, tenant, id, holder) = (app.clone(), tenant.clone(), id.clone(), holder.clone());
        async move {
            if at >= range.end {
                return Ok(None);
            }
            let reservation = app.memory.clients.try_reserve(&holder, DOWNLOAD_CHUNK_BYTES);
            let length =
                if reservation.is_some() { DOWNLOAD_CHUNK_BYTES } else { UNRESERVED_BYTES };
            let next = at.saturating_add(length as u64).min(range.end);
            let bytes = app.service.content(&tenant, &id, at..next).await?;
            Ok(Some((with_reservation(bytes, reservation), next)))
        }
    })
}

fn set_header(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Returns the `Content-Disposition` of a download.
///
/// A name that is not plain ASCII is sent twice: as ASCII for any client, and encoded as in RFC
/// 6266.
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
                // A write to a string cannot fail.
                write!(value, "%{byte:02X}").ok();
            }
        }
    }
    value
}

/// Range that a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum RequestedRange {
    All,
    Part(Range<u64>),
    Unsatisfiable,
}

/// Parses a `Range` header for a file of `size` bytes.
///
/// Several ranges, and values that are not valid, mean the whole file: RFC 9110 permits a server to
/// ignore the header.
fn parse_range(text: &str, size: u64) -> RequestedRange {
    let Some((first, last)) =
        text.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-'))
    else {
        return RequestedRange::All;
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(length)) if first.is_empty() => size.saturating_sub(length)..size,
        _ => return RequestedRange::All,
    };
    if range.start < range.end {
        RequestedRange::Part(range)
    } else {
        RequestedRange::Unsatisfiable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_header_is_parsed_as_in_rfc_9110() {
        for (text, range) in [
            ("bytes=0-0", RequestedRange::Part(0..1)),
            ("bytes=2-", RequestedRange::Part(2..10)),
            ("bytes=-3", RequestedRange::Part(7..10)),
            ("bytes=-99", RequestedRange::Part(0..10)),
            ("bytes=5-99", RequestedRange::Part(5..10)),
            ("bytes=10-", RequestedRange::Unsatisfiable),
            ("bytes=-0", RequestedRange::Unsatisfiable),
            ("bytes=3-2", RequestedRange::All),
            ("bytes=0-1,3-4", RequestedRange::All),
            ("lines=0-1", RequestedRange::All),
            ("bytes=a-b", RequestedRange::All),
        ] {
            assert_eq!(parse_range(text, 10), range, "{text}");
        }
    }

    #[test]
    fn content_disposition_escapes_file_names() {
        assert_eq!(disposition("a b.jsonl"), "attachment; filename=\"a b.jsonl\"");
        assert_eq!(
            disposition("a\"\r\nb"),
            "attachment; filename=\"a___b\"; filename*=UTF-8''a%22%0D%0Ab"
        );
        assert_eq!(disposition("ü"), "attachment; filename=\"_\"; filename*=UTF-8''%C3%BC");
    }
}
