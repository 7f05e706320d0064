//! Response bodies over HTTP/2: timeout and minimum data rate of each stream.
//!
//! **Threat.** A client opens streams and never opens their flow-control windows. The responses
//! then stay in memory. The connection stays writable, so the check of the connection's data rate
//! ([`super::data_rate`]) cannot see it. Therefore a task monitors each stream: the client has to
//! take a chunk within `client_timeout`, and [`MIN_BYTES_PER_SECOND`] on average.
//!
//! **Chunks.** The HTTP library buffers a chunk until the client opens its window, so a chunk that
//! was passed to the library is not sent yet. [`Chunk`] reports when the library drops it. The
//! stream stays busy and monitored until the library has dropped its last chunk. Chunks are small
//! ([`CHUNK_BYTES`]), so that each window update of the client shows as progress.
//!
//! **Time.** The monitor counts only the time that the server waits for the client. It does not
//! count the time in which the body has no data and the library holds no chunk, because then the
//! client waits for the server.
//!
//! **On timeout.** The body of the stream fails, and its connection is asked to close. The other
//! streams of the connection have `client_timeout` to end. Then the connection is aborted, because
//! nothing else makes the library release the chunks that it holds.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::{Buf, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::connections::{Connection, RequestGuard};
use super::data_rate::MIN_BYTES_PER_SECOND;

/// Maximum size of a chunk that is passed to the HTTP library, in bytes.
const CHUNK_BYTES: usize = 16 << 10;

/// Minimum interval between two checks of a stream.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Response body of a stream.
pub(crate) struct StreamBody {
    body: Option<Body>,
    /// Data of the body that was not passed to the library yet.
    buffered: Bytes,
    stream: Arc<Stream>,
}

struct Stream {
    state: Mutex<State>,
    ended: Notify,
    timeout: Duration,
}

struct State {
    /// None once the client has the whole body.
    guard: Option<RequestGuard>,
    /// True once the body has ended, failed or been dropped.
    is_body_done: bool,
    /// True once the client exceeded its timeout: the body fails at the next poll.
    is_timed_out: bool,
    /// True if the body had no data at the last poll: the server makes the client wait.
    is_body_pending: bool,
    /// Number of chunks that the library holds.
    buffered_chunks: usize,
    /// Bytes passed to the library so far.
    passed_bytes: u64,
    /// Total time spent waiting for the client, without the current wait.
    waited: Duration,
    /// Start of the current wait for the client.
    waiting_since: Option<Instant>,
}

impl State {
    fn waits_for_client(&self) -> bool {
        self.buffered_chunks > 0 || (!self.is_body_done && !self.is_body_pending)
    }

    /// Ends the current wait after any progress, and begins another one if the client is still
    /// waited for.
    fn restart_wait(&mut self) {
        if let Some(since) = self.waiting_since.take() {
            self.waited = self.waited.saturating_add(since.elapsed());
        }
        if self.waits_for_client() {
            self.waiting_since = Some(Instant::now());
        } else if self.is_body_done {
            self.guard = None;
        }
    }

    /// Returns the time until the current wait exceeds the timeout or the minimum data rate.
    fn remaining(&self, timeout: Duration) -> Duration {
        let total = Duration::from_secs(self.passed_bytes / MIN_BYTES_PER_SECOND).max(timeout);
        let waiting = self.waiting_since.map(|since| since.elapsed()).unwrap_or_default();
        total.saturating_sub(self.waited).min(timeout).saturating_sub(waiting)
    }
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates the state, and notifies the monitor if the client has the whole body.
    fn update(&self, update: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        update(&mut state);
        state.restart_wait();
        let is_done = state.guard.is_none();
        drop(state);
        if is_done {
            self.ended.notify_one();
        }
    }

    /// Waits for the end of the stream. Returns true if the client has the whole body, false if the
    /// client was too slow.
    async fn monitor(&self) -> bool {
        loop {
            let (remaining, waits) = {
                let state = self.lock();
                if state.guard.is_none() {
                    return true;
                }
                (state.remaining(self.timeout), state.waiting_since.is_some())
            };
            if waits && remaining.is_zero() {
                return false;
            }
            tokio::select! {
                () = self.ended.notified() => {}
                () = tokio::time::sleep(remaining.max(MIN_CHECK_INTERVAL)) => {}
            }
        }
    }
}

/// Bytes that the library holds until they are sent. Dropping them counts as progress.
struct Chunk {
    bytes: Bytes,
    stream: Arc<Stream>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.stream.update(|state| state.buffered_chunks = state.buffered_chunks.saturating_sub(1));
    }
}

impl StreamBody {
    /// Wraps a response body, and starts the task that monitors the stream.
    pub(crate) fn new(
        body: Body,
        guard: RequestGuard,
        connection: Arc<Connection>,
        timeout: Duration,
    ) -> Self {
        let state = State {
            guard: Some(guard),
            is_body_done: false,
            is_timed_out: false,
            is_body_pending: false,
            buffered_chunks: 0,
            passed_bytes: 0,
            waited: Duration::ZERO,
            waiting_since: Some(Instant::now()),
        };
        let stream = Arc::new(Stream { state: Mutex::new(state), ended: Notify::new(), timeout });
        let monitored = stream.clone();
        tokio::spawn(async move {
            if monitored.monitor().await {
                return;
            }
            monitored.lock().is_timed_out = true;
            connection.close.cancel();
            tokio::select! {
                () = monitored.ended.notified() => {}
                () = tokio::time::sleep(monitored.timeout) => connection.abort.cancel(),
            }
        });
        Self { body: Some(body), buffered: Bytes::new(), stream }
    }

    /// Takes the next chunk from the buffered data.
    fn next_chunk(&mut self) -> Bytes {
        let bytes = self.buffered.split_to(self.buffered.len().min(CHUNK_BYTES));
        let length = bytes.len() as u64;
        self.stream.update(|state| {
            state.is_body_pending = false;
            state.buffered_chunks = state.buffered_chunks.saturating_add(1);
            state.passed_bytes = state.passed_bytes.saturating_add(length);
        });
        Bytes::from_owner(Chunk { bytes, stream: self.stream.clone() })
    }

    fn end(&mut self) {
        self.body = None;
        self.buffered = Bytes::new();
        self.stream.update(|state| state.is_body_done = true);
    }
}

impl HttpBody for StreamBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.stream.lock().is_timed_out {
            self.end();
            return Poll::Ready(Some(Err(axum::Error::new(std::io::Error::from(
                std::io::ErrorKind::TimedOut,
            )))));
        }
        loop {
            if self.buffered.has_remaining() {
                return Poll::Ready(Some(Ok(Frame::data(self.next_chunk()))));
            }
            let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
            match Pin::new(body).poll_frame(context) {
                Poll::Pending => {
                    self.stream.update(|state| state.is_body_pending = true);
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) => self.buffered = bytes,
                    // Responses have no trailers.
                    Err(_) => continue,
                },
                Poll::Ready(Some(Err(error))) => {
                    self.end();
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => {
                    self.end();
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.buffered.is_empty() && self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let buffered = self.buffered.len() as u64;
        let body = self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint);
        match body.exact() {
            Some(exact) => SizeHint::with_exact(exact.saturating_add(buffered)),
            None => SizeHint::default(),
        }
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        self.end();
    }
}
