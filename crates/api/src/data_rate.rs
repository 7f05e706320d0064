//! Minimum data rate of clients, for request bodies and for responses.
//!
//! **Threat.** A client sends a request body, or reads a response, a few bytes at a time. A timeout
//! for each read or write does not help: with one byte per timeout, the client occupies a
//! connection, and the memory of its request, for days.
//!
//! **Rules.** A client is cut off by the first rule that it breaks:
//!
//! 1. A single wait for the client lasts at most `client_timeout`.
//! 2. All waits together last at most as long as the bytes so far take at [`MIN_BYTES_PER_SECOND`],
//!    but `client_timeout` is always allowed. So short bodies and short pauses are never too slow.
//!
//! Only the time in which the server waits for the client counts. The time in which the server
//! itself does not read or write, for example because it waits for memory or for the disk, does not
//! count.
//!
//! **Where.**
//!
//! - Request bodies: the middleware [`pace`] wraps them. The handler sees [`BodyTooSlow`], and the
//!   client gets 408.
//! - Responses: [`PacedStream`] applies the second rule to the writes to a connection. The stream
//!   below [`PacedStream`] has a timeout for each write, which is the first rule.
//! - Streams of HTTP/2: a client that reads no stream leaves its connection writable, so
//!   [`super::http2_streams`] monitors each stream.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::connections::Connection;

/// Minimum average data rate of a client, in bytes per second.
pub(crate) const MIN_BYTES_PER_SECOND: u64 = 4 << 10;

/// Error of a request body that the client sends too slowly.
#[derive(Debug, thiserror::Error)]
#[error("the request body arrived too slowly")]
pub(crate) struct BodyTooSlow;

/// Middleware that applies the minimum data rate to request bodies. The state is `client_timeout`.
pub(crate) async fn pace(
    State(timeout): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    let request = request.map(|body| {
        if body.is_end_stream() { body } else { Body::new(PacedBody::new(body, timeout)) }
    });
    next.run(request).await
}

/// Connection that fails if its client reads responses too slowly.
pub(crate) struct PacedStream<S> {
    stream: S,
    connection: Arc<Connection>,
    timeout: Duration,
    written_bytes: u64,
    /// Total time spent waiting for the client to read, without the current wait.
    waited: Duration,
    /// Start of the current wait for the client.
    waiting_since: Option<Instant>,
}

impl<S> PacedStream<S> {
    /// Wraps the stream of a connection.
    pub(crate) fn new(stream: S, connection: Arc<Connection>, timeout: Duration) -> Self {
        Self {
            stream,
            connection,
            timeout,
            written_bytes: 0,
            waited: Duration::ZERO,
            waiting_since: None,
        }
    }

    /// Records the result of a write, and returns a timeout error if the client was too slow.
    fn record_write(
        &mut self,
        polled: Poll<std::io::Result<usize>>,
    ) -> Poll<std::io::Result<usize>> {
        let Poll::Ready(Ok(written)) = polled else {
            if polled.is_pending() {
                self.waiting_since.get_or_insert_with(Instant::now);
            }
            return polled;
        };
        self.written_bytes = self.written_bytes.saturating_add(written as u64);
        if let Some(since) = self.waiting_since.take() {
            self.waited = self.waited.saturating_add(since.elapsed());
            if self.waited > max_wait(self.written_bytes, self.timeout) {
                return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
            }
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PacedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.connection.record_read();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PacedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.record_write(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.record_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Total time that the server waits for a client that has transferred `bytes`.
fn max_wait(bytes: u64, timeout: Duration) -> Duration {
    Duration::from_secs(bytes / MIN_BYTES_PER_SECOND).max(timeout)
}

/// Request body that fails if its client sends it too slowly.
struct PacedBody {
    body: Body,
    timeout: Duration,
    received_bytes: u64,
    /// Total time spent waiting for the client, without the current wait.
    waited: Duration,
    /// Start of the current wait for the client.
    waiting_since: Option<Instant>,
    /// Deadline of the current wait.
    timer: Pin<Box<Sleep>>,
}

impl PacedBody {
    fn new(body: Body, timeout: Duration) -> Self {
        let timer = Box::pin(tokio::time::sleep(timeout));
        Self {
            body,
            timeout,
            received_bytes: 0,
            waited: Duration::ZERO,
            waiting_since: None,
            timer,
        }
    }

    fn max_wait(&self) -> Duration {
        max_wait(self.received_bytes, self.timeout)
    }
}

impl HttpBody for PacedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(polled) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(since) = self.waiting_since.take() {
                self.waited = self.waited.saturating_add(since.elapsed());
            }
            if let Some(Ok(frame)) = &polled {
                let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                self.received_bytes = self.received_bytes.saturating_add(length);
                if self.waited > self.max_wait() {
                    return Poll::Ready(Some(Err(axum::Error::new(BodyTooSlow))));
                }
            }
            return Poll::Ready(polled);
        }
        if self.waiting_since.is_none() {
            let now = Instant::now();
            self.waiting_since = Some(now);
            let remaining = self.max_wait().saturating_sub(self.waited).min(self.timeout);
            let deadline = now.checked_add(remaining).unwrap_or(now);
            self.timer.as_mut().reset(deadline);
        }
        match self.timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Some(Err(axum::Error::new(BodyTooSlow)))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
