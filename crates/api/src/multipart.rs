//! Parser of `multipart/form-data` bodies, as a stream.
//!
//! **Memory.** The multipart library buffers the data between two parts, mainly the headers of the
//! next part, until it finds the end of the headers, without a bound. [`MeteredBody`]
//! therefore bounds the data that the library gets while it searches.
//!
//! **Headers.** The headers of a part are parsed like those of a mail (RFC 2183, RFC 2231, RFC
//! 2047). Clients of different languages use each of these encodings for names.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use mail_parser::{ContentType, MessageParser, MimeHeaders};
use multer::Multipart;

use super::error::ApiError;

/// Maximum size of a text part, in bytes.
const MAX_TEXT_PART_BYTES: usize = 1024;

/// Maximum distance from the end of a part to the end of the next part's headers, in bytes. The
/// last chunk may exceed the bound by up to the same amount.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Maximum total size of the unknown parts of a form, in bytes.
const MAX_IGNORED_BYTES: usize = 1 << 20;

/// Size that each unknown part counts for beside its content, in bytes. So the number of empty
/// parts is bounded too.
const PART_OVERHEAD_BYTES: usize = 1 << 10;

/// Maximum length of a boundary, in bytes. RFC 2046, 5.1.1 allows 70 characters, some clients send
/// 80.
const MAX_BOUNDARY_BYTES: usize = 200;

/// Form that is being read, part by part.
pub(crate) struct Form {
    multipart: Multipart<'static>,
    /// Bytes that the library may still read before the next part begins.
    allowance: Arc<AtomicUsize>,
    ignored_bytes: usize,
}

/// Part of a form. The size of its content has no bound here.
pub(crate) struct Part {
    /// Name of the part; empty if its headers have none.
    pub name: String,
    /// Name of the uploaded file, if the part has one.
    pub filename: Option<String>,
    field: multer::Field<'static>,
}

/// Error of a part whose headers exceed their bound.
#[derive(Debug, thiserror::Error)]
#[error("the headers of a part are longer than {MAX_HEAD_BYTES} bytes")]
struct HeadTooLong;

impl Form {
    /// Starts to read the form in a request. Fails with 415 if the body is not a form.
    pub(crate) fn read(request: Request) -> Result<Self, ApiError> {
        let boundary = boundary(request.headers())?;
        let allowance = Arc::new(AtomicUsize::new(MAX_HEAD_BYTES));
        let body =
            MeteredBody { body: request.into_body(), allowance: allowance.clone(), yielded: false };
        let multipart = Multipart::new(Body::new(body).into_data_stream(), boundary);
        Ok(Self { multipart, allowance, ignored_bytes: 0 })
    }

    /// Returns the next part, or none at the end of the form.
    pub(crate) async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        self.allowance.store(MAX_HEAD_BYTES, Ordering::Relaxed);
        let field = self.multipart.next_field().await.map_err(|error| read_error(&error))?;
        self.allowance.store(usize::MAX, Ordering::Relaxed);
        Ok(field.map(|field| {
            let disposition =
                field.headers().get(header::CONTENT_DISPOSITION).map(|value| value.as_bytes());
            let (name, filename) = part_names(disposition.unwrap_or_default());
            Part { name, filename, field }
        }))
    }

    /// Reads and discards an unknown part.
    pub(crate) async fn ignore(&mut self, mut part: Part) -> Result<(), ApiError> {
        self.ignored_bytes = self.ignored_bytes.saturating_add(PART_OVERHEAD_BYTES);
        while let Some(bytes) = part.chunk().await? {
            self.ignored_bytes = self.ignored_bytes.saturating_add(bytes.len());
            if self.ignored_bytes > MAX_IGNORED_BYTES {
                return Err(ApiError::too_large(
                    "The unknown parts of the form are larger than 1 MiB in total; omit them.",
                ));
            }
        }
        Ok(())
    }
}

impl Part {
    /// Returns the next chunk of the content, or none at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, ApiError> {
        self.field.chunk().await.map_err(|error| read_error(&error))
    }

    /// Returns the content of a short text part.
    pub(crate) async fn text(mut self) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(bytes) = self.chunk().await? {
            if text.len().saturating_add(bytes.len()) > MAX_TEXT_PART_BYTES {
                let why = format!("is longer than {MAX_TEXT_PART_BYTES} bytes");
                return Err(self.invalid(&why));
            }
            text.extend_from_slice(&bytes);
        }
        String::from_utf8(text).map_err(|_| self.invalid("is not UTF-8"))
    }

    fn invalid(&self, why: &str) -> ApiError {
        let name = truncate_for_message(&self.name);
        ApiError::invalid(&name, ErrorCode::InvalidValue, format!("The part '{name}' {why}."))
    }
}

/// Returns the boundary of a form from its `Content-Type`.
fn boundary(headers: &HeaderMap) -> Result<String, ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes()).unwrap_or_default();
    let parsed = parse_header("Content-Type", given);
    let kind = parsed.as_ref().and_then(|message| message.content_type());
    let is_form = |kind: &&ContentType| {
        kind.ctype().eq_ignore_ascii_case("multipart")
            && kind.subtype().is_some_and(|subtype| subtype.eq_ignore_ascii_case("form-data"))
    };
    let Some(kind) = kind.filter(is_form) else {
        let given = truncate_for_message(&String::from_utf8_lossy(given));
        let message =
            format!("Unsupported content type: '{given}'. Upload a file as multipart/form-data.");
        let error = ApiError::client_error(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
        return Err(error.with_code(ErrorCode::UnsupportedContentType));
    };
    let fits = |boundary: &&str| (1..=MAX_BOUNDARY_BYTES).contains(&boundary.len());
    match kind.attribute("boundary").filter(fits) {
        Some(boundary) => Ok(boundary.to_owned()),
        None => Err(ApiError::bad_request(
            "The Content-Type multipart/form-data needs a boundary. \
             Most clients add one automatically if you do not set the header.",
        )),
    }
}

/// Parses a header as a header of a mail.
fn parse_header<'a>(name: &str, value: &[u8]) -> Option<mail_parser::Message<'a>> {
    let text = match std::str::from_utf8(value) {
        Ok(text) => text.to_owned(),
        Err(_) => value.iter().map(|&byte| char::from(byte)).collect(),
    };
    let text = format!("{name}: {}\r\n\r\n", escape_single_backslashes(&text));
    MessageParser::new().parse(text.as_bytes()).map(mail_parser::Message::into_owned)
}

/// Doubles each backslash that escapes nothing.
///
/// Browsers write a backslash without an escape, but the mail library treats each backslash as an
/// escape. Here, a backslash is an escape only before a quote or another backslash.
fn escape_single_backslashes(header: &str) -> String {
    let mut text = String::with_capacity(header.len());
    let mut letters = header.chars().peekable();
    while let Some(letter) = letters.next() {
        text.push(letter);
        if letter == '\\' {
            text.push(letters.next_if(|next| matches!(next, '"' | '\\')).unwrap_or('\\'));
        }
    }
    text
}

/// Returns the name of a part and the name of its file, from its `Content-Disposition`.
fn part_names(disposition: &[u8]) -> (String, Option<String>) {
    let Some(message) = parse_header("Content-Disposition", disposition) else {
        return Default::default();
    };
    let Some(parsed) = message.content_disposition() else { return Default::default() };
    let name = parsed.attribute("name").unwrap_or_default().to_owned();
    let mut filenames =
        parsed.attributes().into_iter().flatten().filter(|attribute| attribute.name == "filename");
    // `filename*` overrides `filename`, in any order (RFC 6266, 4.3).
    let lowercase = String::from_utf8_lossy(disposition).to_ascii_lowercase();
    let plain = ["filename=", "filename ="].iter().filter_map(|key| lowercase.find(key)).min();
    let extended_first =
        lowercase.find("filename*").is_some_and(|at| plain.is_none_or(|plain| at < plain));
    let found = if extended_first { filenames.next() } else { filenames.next_back() };
    // Browsers encode a quote as `%22` (WHATWG HTML, multipart form data). Other percent signs may
    // be part of the name.
    let filename = found.map(|attribute| attribute.value.replace("%22", "\""));
    (name, filename.filter(|filename| !filename.is_empty()))
}

/// Returns the error for a body that could not be read: 408 or 400.
fn read_error(error: &multer::Error) -> ApiError {
    if let Some(slow) = ApiError::from_slow_body(error) {
        return slow;
    }
    let causes =
        std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |cause| {
            cause.source()
        });
    if causes.into_iter().any(<dyn std::error::Error>::is::<HeadTooLong>) {
        return ApiError::bad_request(format!(
            "The multipart body could not be read: \
             the headers of a part are longer than {MAX_HEAD_BYTES} bytes."
        ));
    }
    ApiError::bad_request(format!("The multipart body could not be read: {error}."))
}

/// Body that yields no more bytes than its allowance, one chunk at a time.
///
/// The body is pending after each chunk, so that the library parses each chunk before it gets the
/// next.
struct MeteredBody {
    body: Body,
    allowance: Arc<AtomicUsize>,
    /// True if the last poll returned a chunk.
    yielded: bool,
}

impl HttpBody for MeteredBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if std::mem::take(&mut self.yielded) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let left = self.allowance.load(Ordering::Relaxed);
        if left == 0 {
            return Poll::Ready(Some(Err(axum::Error::new(HeadTooLong))));
        }
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.yielded = true;
            if left != usize::MAX {
                let size = frame.data_ref().map_or(0, Bytes::len);
                self.allowance.store(left.saturating_sub(size), Ordering::Relaxed);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_names_are_parsed_in_every_encoding_that_clients_use() {
        for (header, name, filename) in [
            (r#"form-data; name="file"; filename="a;b.jsonl""#, "file", "a;b.jsonl"),
            (r#"form-data; filename="x = y"; name=file"#, "file", "x = y"),
            (
                r#"form-data; name="file"; filename="a.jsonl"; filename*=utf-8''%C3%BC%20x.jsonl"#,
                "file",
                "ü x.jsonl",
            ),
            (
                r#"form-data; name="file"; filename*=utf-8''%C3%BC%20x.jsonl; filename="a.jsonl""#,
                "file",
                "ü x.jsonl",
            ),
            (
                r#"form-data; name="file"; FILENAME*=UTF-8''plain%20x.jsonl; filename="a.jsonl""#,
                "file",
                "plain x.jsonl",
            ),
            (r#"form-data; name="file"; filename*=UTF-8'en'%C3%BC.jsonl"#, "file", "ü.jsonl"),
            (r#"form-data; name="file"; filename*=iso-8859-1''%FC.jsonl"#, "file", "ü.jsonl"),
            (r#"form-data; name=file; filename="=?utf-8?B?w7wuanNvbmw=?=""#, "file", "ü.jsonl"),
            (r#"form-data; name=file; filename="=?utf-8?Q?=C3=BC.jsonl?=""#, "file", "ü.jsonl"),
            (r#"form-data; name="file"; filename="a\"b\\c.jsonl""#, "file", "a\"b\\c.jsonl"),
            (r#"form-data; name="file"; filename="a%22b.jsonl""#, "file", "a\"b.jsonl"),
            (r#"form-data; name="file"; filename="ü.jsonl""#, "file", "ü.jsonl"),
            (r#"form-data; name="file"; filename="C:\dir\new.jsonl""#, "file", r"C:\dir\new.jsonl"),
            ("form-data;name=file;filename=plain.jsonl", "file", "plain.jsonl"),
            (r#"form-data; name="file"; filename="""#, "file", ""),
            (r#"form-data; name="expires_after[anchor]""#, "expires_after[anchor]", ""),
            ("form-data", "", ""),
            ("", "", ""),
        ] {
            let filename = Some(filename.to_owned()).filter(|filename| !filename.is_empty());
            assert_eq!(part_names(header.as_bytes()), (name.to_owned(), filename), "{header}");
        }
        assert_eq!(part_names(b"form-data; name=file; filename=\"\xfc\"").1.as_deref(), Some("ü"));
    }

    #[test]
    fn boundary_is_parsed_with_and_without_quotes() {
        let parse = |kind: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
            boundary(&headers).map_err(|error| error.to_string())
        };
        for (kind, expected) in [
            ("multipart/form-data; boundary=abc", "abc"),
            ("multipart/form-data; boundary=\"abc\"", "abc"),
            ("Multipart/Form-Data;BOUNDARY=abc", "abc"),
            ("multipart/form-data; charset=utf-8; boundary=\"a b:c/d=e?f\"", "a b:c/d=e?f"),
            (
                "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
                "----WebKitFormBoundary7MA4YWxkTrZu0gW",
            ),
            ("multipart/form-data; boundary=a=b+c'd", "a=b+c'd"),
        ] {
            assert_eq!(parse(kind).as_deref(), Ok(expected), "{kind}");
        }
        for kind in [
            "multipart/form-data",
            "multipart/form-data; boundary=\"\"",
            "multipart/mixed; boundary=x",
            "text/plain",
        ] {
            assert!(parse(kind).is_err(), "{kind}");
        }
    }
}
