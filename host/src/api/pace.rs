//! How fast a client has to send the body of a request, and to take an answer: a piece within `client_timeout`, and 4 KiB/s on average once that
//! much time has been spent waiting for it. The streams of HTTP/2 are watched one by one ([`super::streams`]). Time in which the server itself does not read or write is not counted.

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

/// Bytes a second, on average.
pub const MIN_RATE: u64 = 4 << 10;

/// A client that sends too slowly.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly")]
pub struct TooSlow;

pub async fn pace(State(timeout): State<Duration>, request: Request, next: Next) -> Response {
    let request = request
        .map(|body| if body.is_end_stream() { body } else { Body::new(Paced::new(body, timeout)) });
    next.run(request).await
}

/// A connection whose client has to take what it asked for.
pub struct PacedStream<S> {
    stream: S,
    connection: Arc<Connection>,
    timeout: Duration,
    written: u64,
    /// Time spent waiting for the client to take something, and since when it is waited for now.
    waited: Duration,
    since: Option<Instant>,
}

impl<S> PacedStream<S> {
    pub fn new(stream: S, connection: Arc<Connection>, timeout: Duration) -> Self {
        Self { stream, connection, timeout, written: 0, waited: Duration::ZERO, since: None }
    }

    /// Takes note of a write.
    fn wrote(&mut self, polled: Poll<std::io::Result<usize>>) -> Poll<std::io::Result<usize>> {
        let Poll::Ready(Ok(written)) = polled else {
            if polled.is_pending() {
                self.since.get_or_insert_with(Instant::now);
            }
            return polled;
        };
        self.written = self.written.saturating_add(written as u64);
        if let Some(since) = self.since.take() {
            self.waited = self.waited.saturating_add(since.elapsed());
            if self.waited > Duration::from_secs(self.written / MIN_RATE).max(self.timeout) {
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
            self.connection.heard();
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
        self.wrote(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.wrote(polled)
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

struct Paced {
    body: Body,
    timeout: Duration,
    received: u64,
    /// Time spent waiting for the client so far, and since when it is waited for now.
    waited: Duration,
    since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(body: Body, timeout: Duration) -> Self {
        let timer = Box::pin(tokio::time::sleep(timeout));
        Self { body, timeout, received: 0, waited: Duration::ZERO, since: None, timer }
    }

    /// How long may be waited in all for more than what was received so far.
    fn allowance(&self) -> Duration {
        Duration::from_secs(self.received / MIN_RATE).max(self.timeout)
    }
}

impl HttpBody for Paced {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(polled) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(since) = self.since.take() {
                self.waited = self.waited.saturating_add(since.elapsed());
            }
            if let Some(Ok(frame)) = &polled {
                self.received =
                    self.received.saturating_add(frame.data_ref().map_or(0, Bytes::len) as u64);
                if self.waited > self.allowance() {
                    return Poll::Ready(Some(Err(axum::Error::new(TooSlow))));
                }
            }
            return Poll::Ready(polled);
        }
        if self.since.is_none() {
            let now = Instant::now();
            self.since = Some(now);
            let left = self.allowance().saturating_sub(self.waited).min(self.timeout);
            let at = now.checked_add(left).unwrap_or(now);
            self.timer.as_mut().reset(at);
        }
        match self.timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Some(Err(axum::Error::new(TooSlow)))),
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
