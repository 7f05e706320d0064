//! Admission of connections: bounds on their number, eviction of idle ones, idle timeouts.
//!
//! **Threat.** A client opens every connection that the server accepts, and then sends nothing,
//! reads nothing, or is slow. Without bounds, no other client is served. A supervisor that gets no
//! response from `/health` even restarts the server.
//!
//! **States.** A connection is *busy* from the head of a request to the end of the response, and
//! *idle* otherwise. A [`RequestGuard`] marks a request in flight.
//!
//! **Layers.**
//!
//! 1. Eviction. When only [`EVICTION_HEADROOM`] connections are left, each new connection evicts
//!    the one that has been idle for longest. A busy connection is never evicted.
//! 2. Load shedding. If more than `max_connections` requests are in flight, a new request gets 503
//!    at once, and its connection closes. Requests to `/health` are always served.
//! 3. Reserve. The server accepts [`RESERVED_CONNECTIONS`] connections beyond `max_connections`, so
//!    that health checks and 503 responses always find one. Beyond the reserve, a new connection
//!    waits some milliseconds for an evicted one to close, and is dropped if none does.
//! 4. Bound per address. The setting `max_connections_per_address` bounds what one client can
//!    occupy.
//! 5. HTTP/2. Each stream counts like a connection of HTTP/1, toward both bounds. So a client gains
//!    nothing by opening streams instead of connections.
//! 6. Timeouts. A head has to arrive within `request_head_timeout`, counted from its first byte, so
//!    that a client that sends it byte by byte gains no time. After a response, a connection may be
//!    idle for `idle_timeout`. HTTP/2 frames that belong to no request extend no timeout.
//!
//! Slow bodies and slow readers are the concern of [`super::data_rate`] and
//! [`super::http2_streams`].

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

/// Number of connections beyond `max_connections`, for health checks and 503 responses.
const RESERVED_CONNECTIONS: usize = 64;

/// Number of free connections at which the eviction of idle connections begins.
const EVICTION_HEADROOM: usize = RESERVED_CONNECTIONS / 2;

/// Poll interval of a new connection that waits for an evicted one to close.
const EVICTION_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Maximum number of polls of one new connection.
const MAX_EVICTION_POLLS: u32 = 20;

/// Open connections of a listener, and the bounds on their number.
pub(crate) struct Connections {
    max: usize,
    /// Maximum number of connections and additional streams of one address; 0 means no bound.
    max_per_address: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    open: HashMap<u64, OpenConnection>,
    by_address: HashMap<IpAddr, usize>,
    /// Number of requests in flight.
    in_flight: usize,
}

impl State {
    fn decrement(&mut self, address: IpAddr) {
        if let Some(count) = self.by_address.get_mut(&address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

struct OpenConnection {
    address: IpAddr,
    /// None while the connection is busy.
    idle_since: Option<Instant>,
    close: CancellationToken,
}

/// Open connection, counted until dropped.
pub(crate) struct Connection {
    connections: Arc<Connections>,
    id: u64,
    activity: Mutex<Activity>,
    address: IpAddr,
    /// Cancelled to request a graceful close.
    pub close: CancellationToken,
    /// Cancelled to end the connection at once, with the requests in flight.
    pub abort: CancellationToken,
}

struct Activity {
    /// Number of requests in flight; more than one over HTTP/2.
    requests: usize,
    idle_since: Instant,
    /// Time of the first byte of the head that is being received. Not set on a connection that is
    /// known to be HTTP/2, where bytes may belong to frames without a head.
    head_since: Option<Instant>,
    /// True after the first request.
    was_served: bool,
    /// True for HTTP/2.
    is_multiplexed: bool,
}

/// Maximum times that a connection may be without a request.
#[derive(Clone, Copy)]
pub(crate) struct IdleTimeouts {
    /// Timeout of a head: from its first byte to its last byte. Also from a new connection to its
    /// first byte.
    pub head: Duration,
    /// Timeout from a response to the first byte of the next head.
    pub keep_alive: Duration,
}

/// Request in flight on a connection, counted until dropped.
pub(crate) struct RequestGuard {
    connection: Arc<Connection>,
    /// True if the connection had other requests in flight: then the request counts like another
    /// connection of its address.
    is_extra: bool,
    /// True if the request exceeds a bound: it gets 503, unless it is a health check.
    pub over_limit: bool,
}

impl Connections {
    /// Creates the bounds of a listener. A `max_per_address` of 0 means no bound per address.
    pub(crate) fn new(max: usize, max_per_address: usize) -> Arc<Self> {
        Arc::new(Self { max, max_per_address, state: Mutex::default() })
    }

    /// Admits a connection, or returns none if a bound is reached.
    ///
    /// If `evicts`, and few connections are left, the longest idle connection is asked to close.
    fn try_admit(self: &Arc<Self>, address: IpAddr, evicts: bool) -> Option<Connection> {
        let mut state = self.lock();
        let of_address = state.by_address.get(&address).copied().unwrap_or(0);
        if self.max_per_address > 0 && of_address >= self.max_per_address {
            return None;
        }
        if evicts && state.open.len() >= self.max.saturating_add(EVICTION_HEADROOM) {
            let idle = state.open.values().filter(|open| !open.close.is_cancelled());
            let longest_idle = idle
                .filter_map(|open| Some((open.idle_since?, &open.close)))
                .min_by_key(|(since, _)| *since);
            if let Some((_, close)) = longest_idle {
                close.cancel();
            }
        }
        if state.open.len() >= self.max.saturating_add(RESERVED_CONNECTIONS) {
            return None;
        }
        let (id, close) = (state.next_id, CancellationToken::new());
        state.next_id = id.wrapping_add(1);
        state.open.insert(
            id,
            OpenConnection { address, idle_since: Some(Instant::now()), close: close.clone() },
        );
        state.by_address.insert(address, of_address.saturating_add(1));
        let activity = Activity {
            requests: 0,
            idle_since: Instant::now(),
            head_since: None,
            was_served: false,
            is_multiplexed: false,
        };
        Some(Connection {
            connections: self.clone(),
            id,
            activity: Mutex::new(activity),
            address,
            close,
            abort: CancellationToken::new(),
        })
    }

    /// Admits a connection, or returns none if a bound is reached. Waits some milliseconds for
    /// evicted connections to close.
    pub(crate) async fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Connection> {
        for poll in 0..MAX_EVICTION_POLLS {
            // Each new connection evicts at most one idle connection.
            let admitted = self.try_admit(address, poll == 0);
            if admitted.is_some() || !self.is_evicting() {
                return admitted;
            }
            tokio::time::sleep(EVICTION_POLL_INTERVAL).await;
        }
        None
    }

    /// Returns the number of open connections and of requests in flight, and the bound on both.
    pub(crate) fn numbers(&self) -> (usize, usize, usize) {
        let state = self.lock();
        (state.open.len(), state.in_flight, self.max)
    }

    /// Returns true if all connections are in use and an evicted one is about to close.
    fn is_evicting(&self) -> bool {
        let state = self.lock();
        let is_full = state.open.len() >= self.max.saturating_add(RESERVED_CONNECTIONS);
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
    /// Registers a request whose head has arrived. Over HTTP/2, others may be in flight on the same
    /// connection.
    pub(crate) fn begin_request(self: &Arc<Self>, is_multiplexed: bool) -> RequestGuard {
        let mut activity = self.activity();
        activity.requests = activity.requests.saturating_add(1);
        activity.head_since = None;
        activity.was_served = true;
        activity.is_multiplexed = is_multiplexed;
        let is_extra = activity.requests > 1;
        drop(activity);
        let mut state = self.connections.lock();
        state.in_flight = state.in_flight.saturating_add(1);
        if let Some(open) = state.open.get_mut(&self.id) {
            open.idle_since = None;
        }
        let mut over_limit = state.in_flight > self.connections.max;
        if is_extra {
            let of_address = state.by_address.entry(self.address).or_default();
            *of_address = of_address.saturating_add(1);
            let max = self.connections.max_per_address;
            over_limit |= max > 0 && *of_address > max;
        }
        RequestGuard { connection: self.clone(), is_extra, over_limit }
    }

    /// Returns true if no request is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.activity().requests == 0
    }

    /// Records that bytes of the client were read. On an idle connection of HTTP/1, the first ones
    /// begin a head.
    pub(crate) fn record_read(&self) {
        let mut activity = self.activity();
        if activity.requests == 0 && !activity.is_multiplexed {
            activity.head_since.get_or_insert_with(Instant::now);
        }
    }

    /// Returns when the idle timeout expires, or none while a request is in flight.
    pub(crate) fn idle_deadline(&self, timeouts: IdleTimeouts) -> Option<Instant> {
        let activity = self.activity();
        if activity.requests > 0 {
            return None;
        }
        match activity.head_since {
            Some(since) => since.checked_add(timeouts.head),
            None if activity.was_served => activity.idle_since.checked_add(timeouts.keep_alive),
            None => activity.idle_since.checked_add(timeouts.head),
        }
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.connections.lock();
        let Some(open) = state.open.remove(&self.id) else { return };
        state.decrement(open.address);
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let mut activity = self.connection.activity();
        activity.requests = activity.requests.saturating_sub(1);
        activity.idle_since = Instant::now();
        let idle_since = (activity.requests == 0).then_some(activity.idle_since);
        drop(activity);
        let mut state = self.connection.connections.lock();
        state.in_flight = state.in_flight.saturating_sub(1);
        if self.is_extra {
            state.decrement(self.connection.address);
        }
        if let Some(open) = state.open.get_mut(&self.connection.id) {
            open.idle_since = idle_since;
        }
    }
}

/// Response body over HTTP/1. The connection is busy until the body has been passed to the library.
pub(crate) struct ResponseBody {
    body: Body,
    guard: Option<RequestGuard>,
}

impl ResponseBody {
    /// Wraps a response body.
    pub(crate) fn new(body: Body, guard: RequestGuard) -> Self {
        Self { body, guard: Some(guard) }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.guard = None;
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

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn longest_idle_connection_is_evicted_and_requests_in_flight_are_bounded() {
        let connections = Connections::new(2, 0);
        let admit = || connections.try_admit(CLIENT, true).map(Arc::new);
        let mut open: Vec<_> = (0..2 + EVICTION_HEADROOM).map(|_| admit().unwrap()).collect();
        assert!(open.iter().all(|connection| !connection.close.is_cancelled()));
        let first = open[0].begin_request(false);
        assert!(!first.over_limit && !open[0].is_idle());
        open.push(admit().unwrap());
        assert!(!open[0].close.is_cancelled(), "the connection is busy");
        assert!(open[1].close.is_cancelled(), "the connection is the longest idle one");
        let (second, third) = (open[2].begin_request(false), open[3].begin_request(false));
        assert!(third.over_limit);
        drop((first, second, third));
        assert!(open[0].is_idle() && !open[4].begin_request(false).over_limit);
        while let Some(connection) = admit() {
            open.push(connection);
        }
        assert_eq!(open.len(), 2 + RESERVED_CONNECTIONS);
        open.clear();
        assert!(connections.lock().open.is_empty());
        assert!(connections.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn idle_deadline_uses_head_timeout_before_first_request_and_keep_alive_after_response() {
        let timeouts =
            IdleTimeouts { head: Duration::from_secs(10), keep_alive: Duration::from_secs(75) };
        let connections = Connections::new(2, 0);
        let connection = Arc::new(connections.try_admit(CLIENT, true).unwrap());
        let deadline = || connection.idle_deadline(timeouts);
        // The clock has moved on at the next look, so that two deadlines never agree by chance.
        let look_later = || {
            std::thread::sleep(Duration::from_millis(2));
            connection.record_read();
            deadline()
        };
        let opened = Instant::now();
        let in_head = |found: Option<Instant>| {
            found.is_some_and(|found| found < opened + Duration::from_secs(30))
        };
        let first = deadline();
        assert!(in_head(first));
        let second = look_later();
        assert!(in_head(second) && second > first, "the head begins with its first byte");
        assert_eq!(look_later(), second, "a head that arrives byte by byte has one deadline");
        let guard = connection.begin_request(false);
        assert_eq!(look_later(), None);
        drop(guard);
        assert!(deadline().is_some_and(|found| found > opened + Duration::from_secs(70)));
        assert!(in_head(look_later()));
        let (one, two) = (connection.begin_request(true), connection.begin_request(true));
        drop(one);
        assert!(!connection.is_idle() && deadline().is_none());
        drop(two);
        let idle = deadline();
        assert_eq!(look_later(), idle, "HTTP/2 frames start no head");
        assert!(!in_head(idle));
    }

    #[tokio::test]
    async fn http2_streams_count_toward_the_bound_of_their_address() {
        let connections = Connections::new(10, 3);
        let connection = Arc::new(connections.try_admit(CLIENT, true).unwrap());
        let streams = [(); 3].map(|()| connection.begin_request(true));
        assert!(streams.iter().all(|stream| !stream.over_limit));
        assert!(connection.begin_request(true).over_limit);
        assert!(connections.try_admit(CLIENT, true).is_none());
        drop(streams);
        assert!(connections.try_admit(CLIENT, true).is_some());
        drop(connection);
        assert!(connections.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn connections_per_address_are_bounded_if_configured() {
        let connections = Connections::new(10, 2);
        let open = [(); 2].map(|()| connections.try_admit(CLIENT, true));
        assert!(open.iter().all(Option::is_some));
        assert!(connections.try_admit(CLIENT, true).is_none());
        assert!(connections.try_admit("10.0.0.1".parse().unwrap(), true).is_some());
        drop(open);
        assert!(connections.try_admit(CLIENT, true).is_some());
    }
}
