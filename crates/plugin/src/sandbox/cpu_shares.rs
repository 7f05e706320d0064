//! Shares of CPU time: which tenant's call of a guest is next.
//!
//! **Threat.** A tenant sends lines that a guest works on for a hundred milliseconds each. Calls
//! run on the threads of the server, so without shares the calls of all other tenants would wait
//! behind them.
//!
//! **Shares.** Few calls run at a time. If more calls are waiting, the next one is of the tenant
//! that has used the least CPU time, in virtual time (start-time fair queueing): a tenant that was
//! away has saved up nothing. The time of a call is known at its end; until then an estimate
//! counts.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use batchwright_domain::ids::TenantId;
use tokio::sync::oneshot;

/// CPU time that counts for a call until it ends.
const ESTIMATE: Duration = Duration::from_micros(100);

/// Number of tenants beyond which those without calls are forgotten.
const MAX_IDLE_TENANTS: usize = 1000;

/// Calls of guests in progress and waiting, by tenant.
pub(crate) struct CpuShares(Mutex<State<oneshot::Sender<Turn>>>);

/// Right to call a guest. Dropping it ends the call.
pub(crate) struct Turn {
    /// None once the turn has ended.
    shares: Option<Arc<CpuShares>>,
    tenant: TenantId,
    started: Instant,
    /// Time that the call has waited for memory, which nobody else could use.
    waited: Duration,
}

/// Calls in progress and waiting, with the waiting calls as values of the type `T`.
struct State<T> {
    /// Maximum number of calls at a time, and of one tenant.
    max: (usize, usize),
    running: usize,
    /// Virtual time in microseconds.
    now: u64,
    tenants: HashMap<TenantId, Tenant<T>>,
    /// Number of waiting calls of all tenants.
    waiting: usize,
}

struct Tenant<T> {
    running: usize,
    time: u64,
    waiting: VecDeque<T>,
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl<T> State<T> {
    fn new(max: (usize, usize)) -> Self {
        Self { max, running: 0, now: 0, tenants: HashMap::new(), waiting: 0 }
    }

    fn tenant(&mut self, id: &TenantId) -> &mut Tenant<T> {
        let now = self.now;
        if self.tenants.len() >= MAX_IDLE_TENANTS && !self.tenants.contains_key(id) {
            self.tenants.retain(|_, tenant| {
                tenant.running > 0 || !tenant.waiting.is_empty() || tenant.time > now
            });
        }
        self.tenants.entry(id.clone()).or_insert_with(|| Tenant {
            running: 0,
            time: now,
            waiting: VecDeque::new(),
        })
    }

    /// Adds a waiting call.
    fn wait(&mut self, id: &TenantId, waiting: T) {
        self.tenant(id).waiting.push_back(waiting);
        self.waiting = self.waiting.saturating_add(1);
    }

    /// Begins a call if nobody waits and a place is free.
    fn begin(&mut self, id: &TenantId) -> bool {
        let (max, max_of_tenant) = self.max;
        let is_free = self.running < max
            && self.waiting == 0
            && self.tenants.get(id).is_none_or(|tenant| tenant.running < max_of_tenant);
        if is_free {
            self.start(id);
        }
        is_free
    }

    fn start(&mut self, id: &TenantId) {
        let now = self.now;
        let tenant = self.tenant(id);
        let start = tenant.time.max(now);
        tenant.time = start.saturating_add(micros(ESTIMATE));
        tenant.running = tenant.running.saturating_add(1);
        self.now = start;
        self.running = self.running.saturating_add(1);
    }

    /// Ends a call that took some CPU time.
    fn end(&mut self, id: &TenantId, took: Duration) {
        self.running = self.running.saturating_sub(1);
        let tenant = self.tenant(id);
        tenant.running = tenant.running.saturating_sub(1);
        let estimate = micros(ESTIMATE);
        tenant.time = tenant.time.saturating_add(micros(took)).saturating_sub(estimate);
    }

    /// Begins the waiting call that is next.
    fn next(&mut self) -> Option<(TenantId, T)> {
        let (max, max_of_tenant) = self.max;
        if self.running >= max {
            return None;
        }
        let now = self.now;
        let waiting = self
            .tenants
            .iter_mut()
            .filter(|(_, tenant)| !tenant.waiting.is_empty() && tenant.running < max_of_tenant);
        let (id, tenant) =
            waiting.min_by_key(|(_, tenant)| (tenant.time.max(now), tenant.running))?;
        let (id, waiting) = (id.clone(), tenant.waiting.pop_front()?);
        self.waiting = self.waiting.saturating_sub(1);
        self.start(&id);
        Some((id, waiting))
    }
}

impl CpuShares {
    /// Creates shares for calls on the threads of this machine.
    ///
    /// A call can wait for memory, so there are more calls than threads. One tenant has at most a
    /// quarter of them.
    pub(crate) fn new() -> Arc<Self> {
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let max = threads.saturating_mul(8);
        Arc::new(Self(Mutex::new(State::new((max, max / 4)))))
    }

    fn lock(&self) -> MutexGuard<'_, State<oneshot::Sender<Turn>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a tenant may call a guest.
    pub(crate) async fn turn(self: &Arc<Self>, tenant: &TenantId) -> Turn {
        loop {
            let granted = {
                let mut state = self.lock();
                if state.begin(tenant) {
                    return self.begun(tenant.clone());
                }
                let (sender, granted) = oneshot::channel();
                state.wait(tenant, sender);
                granted
            };
            // Those who wait may have no right to a free place.
            self.grant();
            if let Ok(turn) = granted.await {
                return turn;
            }
        }
    }

    fn begun(self: &Arc<Self>, tenant: TenantId) -> Turn {
        Turn { shares: Some(self.clone()), tenant, started: Instant::now(), waited: Duration::ZERO }
    }

    /// Begins waiting calls while places are free.
    fn grant(self: &Arc<Self>) {
        loop {
            let Some((tenant, waiting)) = self.lock().next() else { return };
            if let Err(unused) = waiting.send(self.begun(tenant)) {
                // The caller has gone. Its turn ends here and not in `Drop`, which would call this
                // function again, once for each caller that has gone.
                unused.end(Duration::ZERO);
            }
        }
    }
}

impl Turn {
    /// Counts time that the call has waited for memory.
    pub(crate) fn excuse(&mut self, waited: Duration) {
        self.waited = self.waited.saturating_add(waited);
    }

    /// Returns the time of the call so far, without its waits for memory.
    pub(crate) fn took(&self) -> Duration {
        self.started.elapsed().saturating_sub(self.waited)
    }

    /// Ends the turn without giving its place to the next call.
    fn end(mut self, took: Duration) {
        if let Some(shares) = self.shares.take() {
            shares.lock().end(&self.tenant, took);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(shares) = self.shares.take() else { return };
        let took = self.took();
        shares.lock().end(&self.tenant, took);
        shares.grant();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn tenant_whose_calls_take_long_waits_for_the_others() {
        let mut state = State::new((1, 1));
        let (slow, fast) = (TenantId::from("slow"), TenantId::from("fast"));
        for _ in 0..1000 {
            state.wait(&slow, ());
            state.wait(&fast, ());
        }
        let (mut calls, mut time) = ([0_u32; 2], [Duration::ZERO; 2]);
        for _ in 0..1000 {
            let (id, ()) = state.next().unwrap();
            let index = usize::from(id == fast);
            let took = if id == slow { 50 * MILLISECOND } else { MILLISECOND };
            state.end(&id, took);
            calls[index] += 1;
            time[index] += took;
        }
        assert!(calls[1] >= 950, "{calls:?}");
        assert!(time[0] <= time[1] + 50 * MILLISECOND, "{time:?}");
    }

    #[test]
    fn tenant_has_at_most_its_part_of_the_places_and_saves_up_nothing() {
        let mut state = State::<()>::new((4, 2));
        let (a, b) = (TenantId::from("a"), TenantId::from("b"));
        assert!(state.begin(&a) && state.begin(&a) && !state.begin(&a));
        assert!(state.begin(&b) && state.begin(&b) && !state.begin(&b));
        for id in [&a, &a, &b, &b] {
            state.end(id, 100 * MILLISECOND);
        }
        // A tenant that was away is next, for as long as the others are ahead.
        let c = TenantId::from("c");
        for _ in 0..300 {
            for id in [&a, &c] {
                state.wait(id, ());
            }
        }
        let of_c = (0..200).filter(|_| {
            let (id, ()) = state.next().unwrap();
            state.end(&id, MILLISECOND);
            id == c
        });
        let of_c = of_c.count();
        assert!((100..=200).contains(&of_c), "{of_c}");
        assert!(state.running == 0 && state.tenants.values().all(|tenant| tenant.running == 0));
    }

    #[tokio::test]
    async fn place_of_a_caller_that_has_gone_is_given_to_the_next() {
        let shares = Arc::new(CpuShares(Mutex::new(State::new((1, 1)))));
        let tenant = TenantId::from("t");
        let first = shares.turn(&tenant).now_or_never().unwrap();
        let mut gone = Box::pin(shares.turn(&tenant));
        let mut next = Box::pin(shares.turn(&tenant));
        assert!((&mut gone).now_or_never().is_none() && (&mut next).now_or_never().is_none());
        drop(gone);
        drop(first);
        drop(next.now_or_never().unwrap());
        let state = shares.lock();
        assert_eq!((state.running, state.waiting), (0, 0));
    }
}
