//! Which connections there are, and which of them make way.
//!
//! **Threat.** Somebody opens all connections that the server has and says nothing, reads nothing, or is slow; then nobody else is served,
//! and a supervisor that gets no answer from `/health` restarts the server.
//!
//! **Layers.** A connection is *busy* from the head of a request to the end of its answer, and *idle* otherwise. Idle ones close first,
//! the one that is idle for longest before the others. Beyond `max_connections` busy ones a request is refused at once with 503, so
//! that the connection is free again; requests for health are never refused. A bound for each address is a setting. A connection of HTTP/2
//! is as busy as it has streams: each counts like a connection of HTTP/1.
//!
//! A head has to come within `request_head_timeout`; a connection that was served once may be idle for `keep_alive_timeout`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Connections beyond the bound: for health, and for refusals.
const RESERVE: usize = 64;

/// How many of these are left when idle connections begin to be closed.
const SPARE: usize = RESERVE / 2;

/// How long a new connection waits for those that were asked to close, and how often it looks.
const MAKING_WAY: Duration = Duration::from_millis(2);
const MAKING_WAY_TRIES: u32 = 20;

pub struct Connections {
    max: usize,
    /// Zero is no bound.
    max_per_address: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    open: HashMap<u64, Open>,
    by_address: HashMap<IpAddr, usize>,
    busy: usize,
}

impl State {
    fn leave(&mut self, address: IpAddr) {
        if let Some(number) = self.by_address.get_mut(&address) {
            *number = number.saturating_sub(1);
            if *number == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

struct Open {
    address: IpAddr,
    /// None while it is busy.
    idle_since: Option<Instant>,
    close: CancellationToken,
}

/// A connection, until it is dropped.
pub struct Connection {
    all: Arc<Connections>,
    id: u64,
    activity: Mutex<Activity>,
    address: IpAddr,
    /// Asked to close.
    pub close: CancellationToken,
    /// Ended, whatever is under way.
    pub abort: CancellationToken,
}

struct Activity {
    /// Requests under way: several at a time over HTTP/2.
    requests: usize,
    idle_since: Instant,
    /// When the head that is being received began; over HTTP/2, frames come without one.
    head_since: Option<Instant>,
    was_served: bool,
    is_multiplexed: bool,
}

/// How long a connection may be without a request.
#[derive(Clone, Copy)]
pub struct Patience {
    /// From the first byte of a head to its last one, and to the first head.
    pub head: Duration,
    /// From an answer to the next head.
    pub keep_alive: Duration,
}

/// A request under way on a connection, until it is dropped.
pub struct Busy {
    connection: Arc<Connection>,
    /// It is not the only one of its connection, and counts like another connection of its address.
    is_extra: bool,
    /// There are more of them than there should be.
    pub over_limit: bool,
}

impl Connections {
    pub fn new(max: usize, max_per_address: usize) -> Arc<Self> {
        Arc::new(Self { max, max_per_address, state: Mutex::default() })
    }

    /// Lets a connection in, and asks an idle one to close if there are many; none if there is no room at all.
    fn enter_asking(self: &Arc<Self>, address: IpAddr, asks_others: bool) -> Option<Connection> {
        let mut state = self.lock();
        let of_address = state.by_address.get(&address).copied().unwrap_or(0);
        if self.max_per_address > 0 && of_address >= self.max_per_address {
            return None;
        }
        if asks_others && state.open.len() >= self.max.saturating_add(SPARE) {
            let idle = state.open.values().filter(|open| !open.close.is_cancelled());
            let longest = idle
                .filter_map(|open| Some((open.idle_since?, &open.close)))
                .min_by_key(|(since, _)| *since);
            if let Some((_, close)) = longest {
                close.cancel();
            }
        }
        if state.open.len() >= self.max.saturating_add(RESERVE) {
            return None;
        }
        let (id, close) = (state.next_id, CancellationToken::new());
        state.next_id = id.wrapping_add(1);
        state
            .open
            .insert(id, Open { address, idle_since: Some(Instant::now()), close: close.clone() });
        state.by_address.insert(address, of_address.saturating_add(1));
        let activity = Activity {
            requests: 0,
            idle_since: Instant::now(),
            head_since: None,
            was_served: false,
            is_multiplexed: false,
        };
        Some(Connection {
            all: self.clone(),
            id,
            activity: Mutex::new(activity),
            address,
            close,
            abort: CancellationToken::new(),
        })
    }

    /// The same, waiting a moment for those that were asked to close.
    pub async fn enter_soon(self: &Arc<Self>, address: IpAddr) -> Option<Connection> {
        for tried in 0..MAKING_WAY_TRIES {
            // One makes way for one.
            let entered = self.enter_asking(address, tried == 0);
            if entered.is_some() || !self.is_making_way() {
                return entered;
            }
            tokio::time::sleep(MAKING_WAY).await;
        }
        None
    }

    fn is_making_way(&self) -> bool {
        let state = self.lock();
        let is_full = state.open.len() >= self.max.saturating_add(RESERVE);
        is_full
            && state
                .open
                .values()
                .any(|open| open.close.is_cancelled() && open.idle_since.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// A request has come, beside which there may be others on the same connection.
    pub fn begin(self: &Arc<Self>, is_multiplexed: bool) -> Busy {
        let mut activity = self.activity();
        activity.requests = activity.requests.saturating_add(1);
        activity.head_since = None;
        activity.was_served = true;
        activity.is_multiplexed = is_multiplexed;
        let is_extra = activity.requests > 1;
        drop(activity);
        let mut state = self.all.lock();
        state.busy = state.busy.saturating_add(1);
        if let Some(open) = state.open.get_mut(&self.id) {
            open.idle_since = None;
        }
        let mut over_limit = state.busy > self.all.max;
        if is_extra {
            let of_address = state.by_address.entry(self.address).or_default();
            *of_address = of_address.saturating_add(1);
            over_limit |= self.all.max_per_address > 0 && *of_address > self.all.max_per_address;
        }
        Busy { connection: self.clone(), is_extra, over_limit }
    }

    pub fn is_idle(&self) -> bool {
        self.activity().requests == 0
    }

    /// Takes note that the client sent something.
    pub fn heard(&self) {
        let mut activity = self.activity();
        if activity.requests == 0 && !activity.is_multiplexed {
            activity.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// When it has been without a request for too long; none while it has one.
    pub fn deadline(&self, patience: Patience) -> Option<Instant> {
        let activity = self.activity();
        if activity.requests > 0 {
            return None;
        }
        match activity.head_since {
            Some(since) => since.checked_add(patience.head),
            None if activity.was_served => activity.idle_since.checked_add(patience.keep_alive),
            None => activity.idle_since.checked_add(patience.head),
        }
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        let Some(open) = state.open.remove(&self.id) else { return };
        state.leave(open.address);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut activity = self.connection.activity();
        activity.requests = activity.requests.saturating_sub(1);
        activity.idle_since = Instant::now();
        let idle_since = (activity.requests == 0).then_some(activity.idle_since);
        drop(activity);
        let mut state = self.connection.all.lock();
        state.busy = state.busy.saturating_sub(1);
        if self.is_extra {
            state.leave(self.connection.address);
        }
        if let Some(open) = state.open.get_mut(&self.connection.id) {
            open.idle_since = idle_since;
        }
    }
}

/// The body of an answer; its connection is busy until it has been handed over.
pub struct Answer {
    body: Body,
    busy: Option<Busy>,
}

impl Answer {
    pub fn new(body: Body, busy: Busy) -> Self {
        Self { body, busy: Some(busy) }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.busy = None;
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

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn idle_connections_close_first_and_busy_ones_are_bounded() {
        let all = Connections::new(2, 0);
        let enter = || all.enter_asking(HERE, true).map(Arc::new);
        let mut open: Vec<_> = (0..2 + SPARE).map(|_| enter().unwrap()).collect();
        assert!(open.iter().all(|connection| !connection.close.is_cancelled()));
        let first = open[0].begin(false);
        assert!(!first.over_limit && !open[0].is_idle());
        open.push(enter().unwrap());
        assert!(!open[0].close.is_cancelled(), "it is busy");
        assert!(open[1].close.is_cancelled(), "it is idle for longest");
        let (second, third) = (open[2].begin(false), open[3].begin(false));
        assert!(third.over_limit);
        drop((first, second, third));
        assert!(open[0].is_idle() && !open[4].begin(false).over_limit);
        while let Some(connection) = enter() {
            open.push(connection);
        }
        assert_eq!(open.len(), 2 + RESERVE);
        open.clear();
        assert!(all.lock().open.is_empty() && all.lock().by_address.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn patience_is_for_heads_first_and_for_keep_alive_after_an_answer() {
        let patience =
            Patience { head: Duration::from_secs(10), keep_alive: Duration::from_secs(75) };
        let all = Connections::new(2, 0);
        let connection = Arc::new(all.enter_asking(HERE, true).unwrap());
        let left = || {
            connection
                .deadline(patience)
                .map(|at| at.saturating_duration_since(Instant::now()).as_secs())
        };
        assert_eq!(left(), Some(10));
        tokio::time::advance(Duration::from_secs(4)).await;
        connection.heard();
        assert_eq!(left(), Some(10));
        tokio::time::advance(Duration::from_secs(4)).await;
        connection.heard();
        assert_eq!(left(), Some(6), "a head that comes byte by byte is one head");
        let busy = connection.begin(false);
        connection.heard();
        assert_eq!(left(), None);
        drop(busy);
        assert_eq!(left(), Some(75));
        connection.heard();
        assert_eq!(left(), Some(10));
        let (one, two) = (connection.begin(true), connection.begin(true));
        drop(one);
        assert!(!connection.is_idle() && left().is_none());
        drop(two);
        connection.heard();
        assert_eq!(left(), Some(75), "frames of HTTP/2 are no head");
    }

    #[tokio::test]
    async fn streams_count_toward_the_bound_of_their_address() {
        let all = Connections::new(10, 3);
        let connection = Arc::new(all.enter_asking(HERE, true).unwrap());
        let streams = [connection.begin(true), connection.begin(true), connection.begin(true)];
        assert!(streams.iter().all(|stream| !stream.over_limit));
        assert!(connection.begin(true).over_limit && all.enter_asking(HERE, true).is_none());
        drop(streams);
        assert!(all.enter_asking(HERE, true).is_some());
        drop(connection);
        assert!(all.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn an_address_has_a_bound_if_the_settings_say_so() {
        let all = Connections::new(10, 2);
        let open = [all.enter_asking(HERE, true), all.enter_asking(HERE, true)];
        assert!(open.iter().all(Option::is_some) && all.enter_asking(HERE, true).is_none());
        assert!(all.enter_asking("10.0.0.1".parse().unwrap(), true).is_some());
        drop(open);
        assert!(all.enter_asking(HERE, true).is_some());
    }
}
