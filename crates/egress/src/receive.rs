//! Response of a provider: received as a whole, or as server-sent events while they arrive.

use std::sync::Arc;
use std::time::Duration;

use batchwright_memory::Reservation;
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Response, header, response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::explain::explain;
use super::metrics::Measured;
use super::{HttpResponse, SecretTexts, Secrets, TransportError, TransportErrorKind};

/// Granularity in which an exchange's memory reservation grows.
const RESERVATION_STEP_BYTES: usize = 64 << 10;

/// Media type of server-sent events.
const EVENT_STREAM: &[u8] = b"text/event-stream";

/// Response of a provider that may be a stream.
pub enum Received {
    /// Whole response.
    Whole(HttpResponse),
    /// Successful response of events, which arrive one after the other.
    Events(Events),
}

/// Deadline of an exchange. The time that the exchange waits for memory is not the fault of the
/// provider, so that time extends the deadline.
struct Deadline(Instant);

impl Deadline {
    /// Grows `reservation` to `bytes`, and extends the deadline by the time that this takes.
    async fn reserve(&mut self, reservation: &mut Reservation, bytes: usize) {
        if reservation.try_grow_to(bytes) {
            return;
        }
        let started = Instant::now();
        reservation.grow_to(bytes).await;
        self.0 = self.0.checked_add(started.elapsed()).unwrap_or(self.0);
    }
}

/// Response whose body has not arrived yet.
pub(crate) struct Incomplete {
    status: u16,
    is_success: bool,
    headers: Vec<(String, String)>,
    has_events: bool,
    body: Body,
    /// Size of the request body, which counts toward the reservation until the response is
    /// complete.
    sent: usize,
}

/// Body of a response, with what is needed to read it.
struct Body {
    incoming: Incoming,
    secrets: Arc<Secrets>,
    end: Deadline,
    exchange_timeout: Duration,
}

impl Body {
    /// Returns the next bytes, or none at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, TransportError> {
        loop {
            let frame = tokio::time::timeout_at(self.end.0, self.incoming.frame()).await;
            let frame = frame.map_err(|_| {
                let limit = self.exchange_timeout;
                TransportError::new(
                    TransportErrorKind::Timeout,
                    format!("The exchange took longer than {limit:?} ([limits] exchange_timeout)."),
                )
                .after_sending()
            })?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| explain(&self.secrets, &error))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

impl Incomplete {
    /// Returns a response whose head has arrived; fails if its body is encoded.
    pub(crate) fn new(
        response: Response<Incoming>,
        secrets: Arc<Secrets>,
        (end, exchange_timeout): (Instant, Duration),
        sent: usize,
    ) -> Result<Self, TransportError> {
        let (head, incoming) = response.into_parts();
        if let Some(coding) =
            head.headers.get(header::CONTENT_ENCODING).filter(|coding| is_encoded(coding))
        {
            let coding = String::from_utf8_lossy(coding.as_bytes());
            return Err(TransportError::new(
                TransportErrorKind::Protocol,
                format!(
                    "The provider sent a response with Content-Encoding `{}`, although the \
                     request asked for `identity`.",
                    coding.escape_debug()
                ),
            )
            .after_sending());
        }
        let headers = headers_of(&head, &secrets);
        let has_events = head.headers.get(header::CONTENT_TYPE).is_some_and(is_event_stream);
        let body = Body { incoming, secrets, end: Deadline(end), exchange_timeout };
        let (status, is_success) = (head.status.as_u16(), head.status.is_success());
        Ok(Self { status, is_success, headers, has_events, body, sent })
    }

    /// Returns true if the body is a stream of events that is no error.
    pub(crate) fn has_events(&self) -> bool {
        self.is_success && self.has_events
    }

    /// Returns the body as events of at most `max` bytes each.
    pub(crate) fn into_events(self, max: usize, measured: Measured) -> Events {
        let Self { status, headers, body, .. } = self;
        Events { status, headers, body, buffer: BytesMut::new(), searched: 0, max, measured }
    }

    /// Receives the whole body, of at most `max` bytes.
    pub(crate) async fn receive(
        self,
        max: usize,
        reservation: &mut Reservation,
    ) -> Result<HttpResponse, TransportError> {
        let Self { mut body, sent, .. } = self;
        let mut bytes = Vec::new();
        while let Some(data) = body.next().await? {
            let size = bytes.len().saturating_add(data.len());
            if size > max {
                return Err(too_large("response", max));
            }
            if size > bytes.capacity() {
                // A growth of a quarter copies seldom, and reserves little memory in excess.
                let capacity = size.saturating_add((size / 4).max(1024)).min(max);
                if sent.saturating_add(capacity) > reservation.bytes() {
                    body.end
                        .reserve(
                            reservation,
                            sent.saturating_add(capacity).next_multiple_of(RESERVATION_STEP_BYTES),
                        )
                        .await;
                }
                bytes.reserve_exact(capacity.saturating_sub(bytes.len()));
            }
            bytes.extend_from_slice(&data);
        }
        // Redaction and the guest each make a copy of the body.
        body.end.reserve(reservation, bytes.len().saturating_mul(2)).await;
        body.secrets.redact_body(&mut bytes, !self.is_success);
        Ok(HttpResponse { status: self.status, headers: self.headers, body: bytes })
    }
}

/// Server-sent events of a response, each as the provider wrote it, with its secrets redacted.
pub struct Events {
    /// Status of the response.
    pub status: u16,
    /// Header names in lower case, and values.
    pub headers: Vec<(String, String)>,
    body: Body,
    /// Bytes that have arrived and belong to no complete event.
    buffer: BytesMut,
    /// Length of the beginning of the buffer that has no end of an event.
    searched: usize,
    max: usize,
    measured: Measured,
}

impl Events {
    /// Returns the next event with the empty line at its end, or none at the end of the stream.
    ///
    /// The bytes of an incomplete event are reserved in `reservation`.
    pub async fn next(
        &mut self,
        reservation: &mut Reservation,
    ) -> Result<Option<Vec<u8>>, TransportError> {
        loop {
            if let Some(end) = end_of_event(&self.buffer, self.searched) {
                let mut event = self.buffer.split_to(end).to_vec();
                self.searched = 0;
                self.body.secrets.redact_body(&mut event, false);
                return Ok(Some(event));
            }
            self.searched = self.buffer.len();
            let data = self.body.next().await.inspect_err(|error| self.measured.failed(error))?;
            let Some(data) = data else {
                self.measured.answered(self.status);
                let mut event = std::mem::take(&mut self.buffer).to_vec();
                self.searched = 0;
                if event.trim_ascii().is_empty() {
                    return Ok(None);
                }
                // The provider has left out the empty line after its last event.
                event.extend_from_slice(b"\n\n");
                self.body.secrets.redact_body(&mut event, false);
                return Ok(Some(event));
            };
            let size = self.buffer.len().saturating_add(data.len());
            if size > self.max {
                return Err(too_large("event", self.max))
                    .inspect_err(|error| self.measured.failed(error));
            }
            // The event, its redacted copy, and what is read of it.
            let bytes = size.saturating_mul(3).next_multiple_of(RESERVATION_STEP_BYTES);
            self.body.end.reserve(reservation, bytes).await;
            self.buffer.extend_from_slice(&data);
        }
    }

    /// Returns the secrets that the text of the stream must not contain.
    pub fn secrets(&self) -> &Arc<SecretTexts> {
        self.body.secrets.texts()
    }
}

/// Returns the end of the first event: after an empty line, whose line ends may be `\n`, `\r\n` or
/// `\r`. The bytes before `searched` are known to have no end.
fn end_of_event(bytes: &[u8], searched: usize) -> Option<usize> {
    let ends = [&b"\n\n"[..], b"\r\n\r\n", b"\r\r", b"\n\r\n"];
    let from = searched.saturating_sub(3);
    let mut line_ends = memchr::memchr2_iter(b'\n', b'\r', bytes.get(from..)?);
    line_ends.find_map(|at| {
        let at = from.saturating_add(at);
        let rest = bytes.get(at..)?;
        let end = ends.iter().find(|end| rest.starts_with(end))?;
        Some(at.saturating_add(end.len()))
    })
}

fn headers_of(head: &response::Parts, secrets: &Secrets) -> Vec<(String, String)> {
    let headers = head.headers.iter().map(|(name, value)| {
        let mut value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        secrets.redact(&mut value);
        let mut name = name.as_str().to_owned();
        secrets.redact(&mut name);
        (name, value)
    });
    headers.collect()
}

fn too_large(what: &str, max: usize) -> TransportError {
    TransportError::new(
        TransportErrorKind::TooLarge,
        format!("The {what} is larger than {max} bytes ([limits] max_response_body)."),
    )
    .after_sending()
}

fn is_event_stream(kind: &HeaderValue) -> bool {
    let kind = kind.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(EVENT_STREAM)
}

/// Returns true if a `Content-Encoding` is a real one; some providers send `none` or a charset.
fn is_encoded(coding: &HeaderValue) -> bool {
    let coding = coding.as_bytes().trim_ascii();
    !["", "identity", "none", "utf-8", "utf8"]
        .iter()
        .any(|known| coding.eq_ignore_ascii_case(known.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_ends_after_an_empty_line_of_any_kind() {
        for (bytes, end) in [
            ("data: a\n\ndata: b\n\n", Some(9)),
            ("data: a\r\n\r\nx", Some(11)),
            ("data: a\r\rx", Some(9)),
            ("data: a\n\r\nx", Some(10)),
            ("data: a\ndata: b\n", None),
            ("", None),
        ] {
            for searched in 0..=end.map_or(bytes.len(), |end| end - 1) {
                assert_eq!(end_of_event(bytes.as_bytes(), searched), end, "{bytes:?} {searched}");
            }
        }
    }

    #[test]
    fn media_type_of_events_may_have_parameters() {
        let is_stream = |kind| is_event_stream(&HeaderValue::from_static(kind));
        assert!(is_stream("text/event-stream") && is_stream("Text/Event-Stream; charset=utf-8"));
        assert!(!is_stream("application/json") && !is_stream("text/event-streams"));
    }
}
