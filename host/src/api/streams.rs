//! Answers over HTTP/2. A client that does not take one leaves its connection writable, so each stream is watched by itself: a piece within
//! `client_timeout`, and 4 KiB/s on average.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::HttpBody;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::connections::{Answer, Connection};
use super::pace::MIN_RATE;

/// Least time between two looks at a stream.
const MIN_PAUSE: Duration = Duration::from_millis(100);

/// The body of an answer, which is given up if the client takes it too slowly; its connection then closes once its other streams have ended.
pub struct Watched {
    state: Arc<Mutex<State>>,
    _watch: AbortOnDropHandle<()>,
}

struct State {
    /// None once it was given up.
    answer: Option<Answer>,
    timeout: Duration,
    handed: u64,
    /// Time spent waiting for the client, and since when it is waited for now.
    waited: Duration,
    since: Option<Instant>,
}

impl State {
    /// How long the client may go on taking nothing.
    fn left(&self) -> Duration {
        let in_all = Duration::from_secs(self.handed / MIN_RATE).max(self.timeout);
        let waiting = self.since.map(|since| since.elapsed()).unwrap_or_default();
        in_all.saturating_sub(self.waited).min(self.timeout).saturating_sub(waiting)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watched {
    pub fn new(answer: Answer, connection: Arc<Connection>, timeout: Duration) -> Self {
        let since = Some(Instant::now());
        let state = State { answer: Some(answer), timeout, handed: 0, waited: Duration::ZERO, since };
        let state = Arc::new(Mutex::new(state));
        let watched = state.clone();
        let watch = tokio::spawn(async move {
            loop {
                let (left, waits) = {
                    let state = lock(&watched);
                    (state.left(), state.since.is_some())
                };
                if waits && left.is_zero() {
                    // The lock is free again before the answer goes, which takes others.
                    let answer = lock(&watched).answer.take();
                    drop(answer);
                    connection.close.cancel();
                    return;
                }
                tokio::time::sleep(left.max(MIN_PAUSE)).await;
            }
        });
        Self { state, _watch: AbortOnDropHandle::new(watch) }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = lock(&self.state);
        if let Some(since) = state.since.take() {
            state.waited = state.waited.saturating_add(since.elapsed());
        }
        let Some(answer) = state.answer.as_mut() else {
            return Poll::Ready(Some(Err(axum::Error::new(std::io::Error::from(std::io::ErrorKind::TimedOut)))));
        };
        let polled = Pin::new(answer).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            state.handed = state.handed.saturating_add(frame.data_ref().map_or(0, Bytes::len) as u64);
            state.since = Some(Instant::now());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.state).answer.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.state).answer.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}
