//! Which connections there are, and which of them make way.
//!
//! **Threat.** Somebody opens all connections that the server has and says nothing, reads nothing, or is slow; then nobody else is served,
//! and a supervisor that gets no answer from `/health` restarts the server.
//!
//! **Layers.** A connection is *busy* from the head of a request to the end of its answer, and *idle* otherwise. Idle ones close first,
//! the one that is idle for longest before the others. Beyond `max_connections` busy ones a request is refused at once with 503, so
//! that the connection is free again; requests for health are never refused. A bound for each address is a setting.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Connections beyond the bound: for health, and for refusals.
const RESERVE: usize = 64;

/// How many of these are left when idle connections begin to be closed.
const SPARE: usize = RESERVE / 2;

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
    /// Asked to close.
    pub close: CancellationToken,
}

/// A request under way on a connection, until it is dropped.
pub struct Busy {
    all: Arc<Connections>,
    id: u64,
    /// There are more of them than there should be.
    pub over_limit: bool,
}

impl Connections {
    pub fn new(max: usize, max_per_address: usize) -> Arc<Self> {
        Arc::new(Self { max, max_per_address, state: Mutex::default() })
    }

    /// Lets a connection in, and asks an idle one to close if there are many; none if there is no room at all.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Connection> {
        let mut state = self.lock();
        let of_address = state.by_address.get(&address).copied().unwrap_or(0);
        if self.max_per_address > 0 && of_address >= self.max_per_address {
            return None;
        }
        if state.open.len() >= self.max.saturating_add(SPARE) {
            let idle = state.open.values().filter(|open| !open.close.is_cancelled());
            let longest = idle.filter_map(|open| Some((open.idle_since?, &open.close))).min_by_key(|(since, _)| *since);
            if let Some((_, close)) = longest {
                close.cancel();
            }
        }
        if state.open.len() >= self.max.saturating_add(RESERVE) {
            return None;
        }
        let (id, close) = (state.next_id, CancellationToken::new());
        state.next_id = id.wrapping_add(1);
        state.open.insert(id, Open { address, idle_since: Some(Instant::now()), close: close.clone() });
        state.by_address.insert(address, of_address.saturating_add(1));
        Some(Connection { all: self.clone(), id, close })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// A request has come.
    pub fn begin(&self) -> Busy {
        let mut state = self.all.lock();
        state.busy = state.busy.saturating_add(1);
        if let Some(open) = state.open.get_mut(&self.id) {
            open.idle_since = None;
        }
        Busy { all: self.all.clone(), id: self.id, over_limit: state.busy > self.all.max }
    }

    pub fn is_idle(&self) -> bool {
        self.all.lock().open.get(&self.id).is_some_and(|open| open.idle_since.is_some())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        let Some(open) = state.open.remove(&self.id) else { return };
        if let Some(number) = state.by_address.get_mut(&open.address) {
            *number = number.saturating_sub(1);
            if *number == 0 {
                state.by_address.remove(&open.address);
            }
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        state.busy = state.busy.saturating_sub(1);
        if let Some(open) = state.open.get_mut(&self.id) {
            open.idle_since = Some(Instant::now());
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
        let mut open: Vec<_> = (0..2 + SPARE).map(|_| all.enter(HERE).unwrap()).collect();
        assert!(open.iter().all(|connection| !connection.close.is_cancelled()));
        let first = open[0].begin();
        assert!(!first.over_limit && !open[0].is_idle());
        open.push(all.enter(HERE).unwrap());
        assert!(!open[0].close.is_cancelled(), "it is busy");
        assert!(open[1].close.is_cancelled(), "it is idle for longest");
        let (_second, third) = (open[2].begin(), open[3].begin());
        assert!(third.over_limit);
        drop((first, third));
        assert!(open[0].is_idle() && !open[4].begin().over_limit);
        while let Some(connection) = all.enter(HERE) {
            open.push(connection);
        }
        assert_eq!(open.len(), 2 + RESERVE);
        open.clear();
        assert!(all.lock().open.is_empty() && all.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn an_address_has_a_bound_if_the_settings_say_so() {
        let all = Connections::new(10, 2);
        let open = [all.enter(HERE), all.enter(HERE)];
        assert!(open.iter().all(Option::is_some) && all.enter(HERE).is_none());
        assert!(all.enter("10.0.0.1".parse().unwrap()).is_some());
        drop(open);
        assert!(all.enter(HERE).is_some());
    }
}
