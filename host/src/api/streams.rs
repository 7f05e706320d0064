//! Answers over HTTP/2. A client that does not take one leaves its connection writable, so each stream is watched by itself: a piece within
//! `client_timeout`, and 4 KiB/s on average.
//!
//! What was handed to the HTTP library is not sent yet, and is held until the client opens its window. So a stream is busy, and watched, until the
//! library has dropped its last piece, and pieces are small. One that is not taken in time ends its connection, once the others on it had
//! `client_timeout` to end: what the library holds cannot be taken back.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::{Buf, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::connections::{Busy, Connection};
use super::pace::MIN_RATE;

/// Largest piece that is handed over at a time, in bytes.
const PIECE_BYTES: usize = 16 << 10;

/// Least time between two looks at a stream.
const MIN_PAUSE: Duration = Duration::from_millis(100);

/// The body of an answer.
pub struct Watched {
    body: Option<Body>,
    /// What was got of the body and not handed over yet.
    rest: Bytes,
    stream: Arc<Stream>,
}

struct Stream {
    state: Mutex<State>,
    ended: Notify,
    timeout: Duration,
}

struct State {
    /// None once the client has all of it.
    busy: Option<Busy>,
    /// The body is gone: sent, broken off or given up.
    is_over: bool,
    is_cut: bool,
    /// The body had nothing when it was asked last: the server's own affair.
    is_pending: bool,
    /// Pieces that the library holds.
    held: usize,
    handed_bytes: u64,
    /// Time spent waiting for the client, and since when it is waited for now.
    waited: Duration,
    since: Option<Instant>,
}

impl State {
    fn waits_for_client(&self) -> bool {
        self.held > 0 || (!self.is_over && !self.is_pending)
    }

    /// Takes note of something that the client did, or that the server is waited for.
    fn moved(&mut self) {
        if let Some(since) = self.since.take() {
            self.waited = self.waited.saturating_add(since.elapsed());
        }
        if self.waits_for_client() {
            self.since = Some(Instant::now());
        } else if self.is_over {
            self.busy = None;
        }
    }

    /// How long the client may go on taking nothing.
    fn left(&self, timeout: Duration) -> Duration {
        let in_all = Duration::from_secs(self.handed_bytes / MIN_RATE).max(timeout);
        let waiting = self.since.map(|since| since.elapsed()).unwrap_or_default();
        in_all.saturating_sub(self.waited).min(timeout).saturating_sub(waiting)
    }
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and tells the watch if that was the end.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.moved();
        let is_done = state.busy.is_none();
        drop(state);
        if is_done {
            self.ended.notify_one();
        }
    }

    /// Returns when the client has all of it, or has taken too long; whether it has all.
    async fn watch(&self) -> bool {
        loop {
            let (left, waits) = {
                let state = self.lock();
                if state.busy.is_none() {
                    return true;
                }
                (state.left(self.timeout), state.since.is_some())
            };
            if waits && left.is_zero() {
                return false;
            }
            tokio::select! {
                () = self.ended.notified() => {}
                () = tokio::time::sleep(left.max(MIN_PAUSE)) => {}
            }
        }
    }
}

/// Bytes that the library holds until they are sent.
struct Piece {
    bytes: Bytes,
    stream: Arc<Stream>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.stream.change(|state| state.held = state.held.saturating_sub(1));
    }
}

impl Watched {
    pub fn new(body: Body, busy: Busy, connection: Arc<Connection>, timeout: Duration) -> Self {
        let state = State {
            busy: Some(busy),
            is_over: false,
            is_cut: false,
            is_pending: false,
            held: 0,
            handed_bytes: 0,
            waited: Duration::ZERO,
            since: Some(Instant::now()),
        };
        let stream = Arc::new(Stream { state: Mutex::new(state), ended: Notify::new(), timeout });
        let watched = stream.clone();
        tokio::spawn(async move {
            if watched.watch().await {
                return;
            }
            watched.lock().is_cut = true;
            connection.close.cancel();
            tokio::select! {
                () = watched.ended.notified() => {}
                () = tokio::time::sleep(watched.timeout) => connection.abort.cancel(),
            }
        });
        Self { body: Some(body), rest: Bytes::new(), stream }
    }

    /// The next piece of what is there.
    fn piece(&mut self) -> Bytes {
        let bytes = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        let length = bytes.len() as u64;
        self.stream.change(|state| {
            state.is_pending = false;
            state.held = state.held.saturating_add(1);
            state.handed_bytes = state.handed_bytes.saturating_add(length);
        });
        Bytes::from_owner(Piece { bytes, stream: self.stream.clone() })
    }

    fn end(&mut self) {
        self.body = None;
        self.rest = Bytes::new();
        self.stream.change(|state| state.is_over = true);
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.stream.lock().is_cut {
            self.end();
            return Poll::Ready(Some(Err(axum::Error::new(std::io::Error::from(
                std::io::ErrorKind::TimedOut,
            )))));
        }
        loop {
            if self.rest.has_remaining() {
                return Poll::Ready(Some(Ok(Frame::data(self.piece()))));
            }
            let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
            match Pin::new(body).poll_frame(context) {
                Poll::Pending => {
                    self.stream.change(|state| state.is_pending = true);
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) => self.rest = bytes,
                    // Answers have no trailers.
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
        self.rest.is_empty() && self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let body = self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint);
        match body.exact() {
            Some(exact) => SizeHint::with_exact(exact.saturating_add(rest)),
            None => SizeHint::default(),
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.end();
    }
}
