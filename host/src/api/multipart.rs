//! Bodies of `multipart/form-data`, read as they come.
//!
//! The reader of the library holds what lies between two parts, a part's headers above all, until it has found their end. So what it is
//! given while it looks for that is bounded here. Headers are read as those of a mail (RFC 2183, RFC 2231, RFC 2047): clients of several
//! languages write names in each of these ways.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use mail_parser::{ContentType, MessageParser, MimeHeaders};
use multer::Multipart;

use super::error::ApiError;
use crate::batch::shortened;

/// Longest part that is no file, in bytes.
const LONGEST_TEXT: usize = 1024;

/// What may lie between the end of a part and the end of the next one's headers, in bytes; it comes in pieces of up to as much again.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// What parts that nobody asked for may have in all, in bytes; each counts as this much at least.
const MAX_IGNORED_BYTES: usize = 1 << 20;
const MIN_IGNORED_BYTES: usize = 1 << 10;

/// Longest boundary: RFC 2046, 5.1.1 allows 70 characters, some clients send 80.
const LONGEST_BOUNDARY: usize = 200;

pub struct Form {
    multipart: Multipart<'static>,
    allowance: Arc<AtomicUsize>,
    ignored: usize,
}

/// A part of a form: what its headers say, and its content, which is not bounded here.
pub struct Part {
    pub name: String,
    pub filename: Option<String>,
    field: multer::Field<'static>,
}

/// The headers of a part do not end.
#[derive(Debug, thiserror::Error)]
#[error("the headers of a part are longer than {MAX_HEAD_BYTES} bytes")]
struct HeadTooLong;

impl Form {
    pub fn read(request: Request) -> Result<Self, ApiError> {
        let boundary = boundary(request.headers())?;
        let allowance = Arc::new(AtomicUsize::new(MAX_HEAD_BYTES));
        let body =
            Metered { body: request.into_body(), allowance: allowance.clone(), yielded: false };
        let multipart = Multipart::new(Body::new(body).into_data_stream(), boundary);
        Ok(Self { multipart, allowance, ignored: 0 })
    }

    pub async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        self.allowance.store(MAX_HEAD_BYTES, Ordering::Relaxed);
        let field = self.multipart.next_field().await.map_err(|error| broken(&error))?;
        self.allowance.store(usize::MAX, Ordering::Relaxed);
        Ok(field.map(|field| {
            let disposition =
                field.headers().get(header::CONTENT_DISPOSITION).map(|value| value.as_bytes());
            let (name, filename) = names(disposition.unwrap_or_default());
            Part { name, filename, field }
        }))
    }

    /// Reads past a part that means nothing here.
    pub async fn ignore(&mut self, mut part: Part) -> Result<(), ApiError> {
        self.ignored = self.ignored.saturating_add(MIN_IGNORED_BYTES);
        while let Some(bytes) = part.chunk().await? {
            self.ignored = self.ignored.saturating_add(bytes.len());
            if self.ignored > MAX_IGNORED_BYTES {
                return Err(ApiError::too_large(
                    "The form has more in parts other than 'file' than the server reads past (1 MiB).",
                ));
            }
        }
        Ok(())
    }
}

impl Part {
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ApiError> {
        self.field.chunk().await.map_err(|error| broken(&error))
    }

    /// The text of a short part.
    pub async fn text(mut self) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(bytes) = self.chunk().await? {
            if text.len().saturating_add(bytes.len()) > LONGEST_TEXT {
                return Err(self.invalid("is too long"));
            }
            text.extend_from_slice(&bytes);
        }
        String::from_utf8(text).map_err(|_| self.invalid("is not UTF-8"))
    }

    fn invalid(&self, why: &str) -> ApiError {
        let name = shortened(&self.name);
        ApiError::invalid(&name, "invalid_value", format!("The part '{name}' {why}."))
    }
}

fn boundary(headers: &HeaderMap) -> Result<String, ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes()).unwrap_or_default();
    let parsed = parsed("Content-Type", given);
    let kind = parsed.as_ref().and_then(|message| message.content_type());
    let is_form = |kind: &&ContentType| {
        kind.ctype().eq_ignore_ascii_case("multipart")
            && kind.subtype().is_some_and(|subtype| subtype.eq_ignore_ascii_case("form-data"))
    };
    let Some(kind) = kind.filter(is_form) else {
        let given = shortened(&String::from_utf8_lossy(given));
        let message = format!(
            "Unsupported content type: '{given}'. A file is uploaded as multipart/form-data."
        );
        let error = ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message);
        return Err(error.with_code("unsupported_content_type"));
    };
    let fits = |boundary: &&str| (1..=LONGEST_BOUNDARY).contains(&boundary.len());
    match kind.attribute("boundary").filter(fits) {
        Some(boundary) => Ok(boundary.to_owned()),
        None => Err(ApiError::bad_request(
            "The Content-Type multipart/form-data needs a boundary; most clients set it by themselves if the header is left to them.",
        )),
    }
}

/// A header as the library reads it in a mail.
fn parsed<'a>(name: &str, value: &[u8]) -> Option<mail_parser::Message<'a>> {
    let text = match std::str::from_utf8(value) {
        Ok(text) => text.to_owned(),
        Err(_) => value.iter().map(|&byte| char::from(byte)).collect(),
    };
    let text = format!("{name}: {}\r\n\r\n", with_plain_backslashes(&text));
    MessageParser::new().parse(text.as_bytes()).map(mail_parser::Message::into_owned)
}

/// Browsers write a backslash as it is; the library takes each for an escape. Only those before a quote or another backslash are one.
fn with_plain_backslashes(header: &str) -> String {
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

/// The name of a part, and that of its file.
fn names(disposition: &[u8]) -> (String, Option<String>) {
    let Some(message) = parsed("Content-Disposition", disposition) else {
        return Default::default();
    };
    let Some(parsed) = message.content_disposition() else { return Default::default() };
    let name = parsed.attribute("name").unwrap_or_default().to_owned();
    let mut filenames =
        parsed.attributes().into_iter().flatten().filter(|attribute| attribute.name == "filename");
    // `filename*` goes before `filename` (RFC 6266, 4.3), wherever it stands.
    let written = String::from_utf8_lossy(disposition).to_ascii_lowercase();
    let plain = ["filename=", "filename ="].iter().filter_map(|key| written.find(key)).min();
    let extended_first =
        written.find("filename*").is_some_and(|at| plain.is_none_or(|plain| at < plain));
    let found = if extended_first { filenames.next() } else { filenames.next_back() };
    // Browsers write a quote so (WHATWG HTML, multipart form data). Other letters with a percent sign may stand for themselves.
    let filename = found.map(|attribute| attribute.value.replace("%22", "\""));
    (name, filename.filter(|filename| !filename.is_empty()))
}

fn broken(error: &multer::Error) -> ApiError {
    if let Some(late) = ApiError::of_late_body(error) {
        return late;
    }
    let causes =
        std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |cause| {
            cause.source()
        });
    if causes.into_iter().any(<dyn std::error::Error>::is::<HeadTooLong>) {
        return ApiError::bad_request(format!(
            "The multipart body could not be read: the headers of a part are longer than {MAX_HEAD_BYTES} bytes."
        ));
    }
    ApiError::bad_request(format!("The multipart body could not be read: {error}."))
}

/// A body that gives no more than its allowance, a piece at a time: whoever reads it looks at each piece before it gets the next.
struct Metered {
    body: Body,
    allowance: Arc<AtomicUsize>,
    yielded: bool,
}

impl HttpBody for Metered {
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
    fn names_are_read_however_a_client_writes_them() {
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
            assert_eq!(names(header.as_bytes()), (name.to_owned(), filename), "{header}");
        }
        assert_eq!(names(b"form-data; name=file; filename=\"\xfc\"").1.as_deref(), Some("ü"));
    }

    #[test]
    fn boundaries_are_read_with_and_without_quotes() {
        let read = |kind: &str| {
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
            assert_eq!(read(kind).as_deref(), Ok(expected), "{kind}");
        }
        for kind in [
            "multipart/form-data",
            "multipart/form-data; boundary=\"\"",
            "multipart/mixed; boundary=x",
            "text/plain",
        ] {
            assert!(read(kind).is_err(), "{kind}");
        }
    }
}
