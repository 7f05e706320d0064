//! Shares of a provider: which queue is next.
//!
//! **Tenants.** A tenant's share is its weight. The tenant with the fewest exchanges in flight for
//! its weight is next, so that slow requests cost those who send them. Equal tenants compare the
//! tokens that they have sent, in virtual time (start-time fair queueing): long prompts cost more
//! than short ones, and a tenant that was away has saved up nothing. With [`ShareBy::Tokens`] the
//! tokens alone count, for a provider whose limit is in tokens.
//!
//! **Classes.** Online requests go before lines of batches, and these before lines of batches
//! without a deadline. A class that waits is passed over a number of times, and then goes first, so
//! that no class starves another.
//!
//! **Queues of a tenant.** Those of an urgent batch are first. The others share as tenants do, with
//! the weight of their completion window: a batch that has an hour gets more than one that has a
//! day.

use std::collections::{HashMap, VecDeque};

use batchwright_domain::ids::TenantId;
use batchwright_domain::window::Urgency;

/// Virtual time of a token at the weight 1.
const TOKEN: u64 = 1000;

/// Scale of exchanges in flight before they are divided by a weight.
const EXCHANGE: u64 = 1_000_000;

/// Number of tenants beyond which those without exchanges and requests are forgotten.
const MAX_IDLE_TENANTS: usize = 1000;

/// Number of grants to higher classes after which waiting requests of each class go first: never
/// for online requests, every tenth for batches, every hundredth for those without a deadline.
const MAX_PASSED_OVER: [u32; CLASSES] = [u32::MAX, 9, 99];

/// Number of classes.
const CLASSES: usize = 3;

/// Key of a queue: requests of one batch have the same key, and so have a tenant's online requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueId {
    /// Tenant of the batch.
    pub tenant: TenantId,
    /// Number of the batch in this process; none for online requests.
    pub batch: Option<u64>,
}

/// Priority of a request among those that wait for a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Priority {
    /// Weight of the tenant.
    pub tenant_weight: u32,
    /// Maximum number of exchanges of the tenant in flight, over all plugins.
    pub max_in_flight: Option<u64>,
    /// Weight of the batch among those of its tenant.
    pub batch_weight: u32,
    /// Urgency of the batch.
    pub urgency: Urgency,
    /// Estimated tokens of the request.
    pub tokens: u64,
}

impl Default for Priority {
    fn default() -> Self {
        Self {
            tenant_weight: 1,
            max_in_flight: None,
            batch_weight: 1,
            urgency: Urgency::default(),
            tokens: 1,
        }
    }
}

/// What tenants share equally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShareBy {
    /// Exchanges in flight, then tokens.
    #[default]
    Exchanges,
    /// Tokens.
    Tokens,
}

/// Exchanges in flight and virtual time of a tenant or a queue.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    in_flight: u64,
    time: u64,
    weight: u32,
}

/// Queues of a provider, with waiting requests of the type `T`.
pub(super) struct Shares<T> {
    by: ShareBy,
    /// Virtual time.
    now: u64,
    /// Number of the tenant that came last.
    last_number: u64,
    tenants: HashMap<TenantId, Tenant>,
    queues: Vec<Queue<T>>,
    /// Grants to higher classes since each class was granted one.
    passed_over: [u32; CLASSES],
}

/// Share of a tenant, and the virtual time of its queues.
#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    share: Share,
    now: u64,
    /// Number that tells tenants with equal shares apart.
    number: u64,
    /// Maximum number of exchanges in flight, over all plugins.
    max_in_flight: Option<u64>,
}

struct Queue<T> {
    id: QueueId,
    share: Share,
    urgency: Urgency,
    /// Waiting requests, with their tokens.
    waiting: VecDeque<(u64, T)>,
}

impl Share {
    fn weight(&self) -> u64 {
        u64::from(self.weight.max(1))
    }

    /// Returns what orders shares: the smallest is next.
    fn order(&self, now: u64, by: ShareBy) -> (u64, u64) {
        let in_flight = match by {
            ShareBy::Exchanges => self.in_flight.saturating_mul(EXCHANGE) / self.weight(),
            ShareBy::Tokens => 0,
        };
        (in_flight, self.time.max(now))
    }

    /// Counts an exchange; returns its start in virtual time.
    fn begin(&mut self, now: u64, tokens: u64) -> u64 {
        let start = self.time.max(now);
        let cost = tokens.max(1).saturating_mul(TOKEN) / self.weight();
        self.time = start.saturating_add(cost.max(1));
        self.in_flight = self.in_flight.saturating_add(1);
        start
    }
}

impl<T> Queue<T> {
    /// Returns the class: 0 for online requests, 1 for batches, 2 for those without a deadline.
    fn class(&self) -> usize {
        match self.id.batch {
            None => 0,
            Some(_) if self.urgency != Urgency::Undated => 1,
            Some(_) => 2,
        }
    }
}

impl<T> Shares<T> {
    pub(super) fn new(by: ShareBy) -> Self {
        Self {
            by,
            now: 0,
            last_number: 0,
            tenants: HashMap::new(),
            queues: Vec::new(),
            passed_over: [0; CLASSES],
        }
    }

    /// Returns true if any request waits.
    pub(super) fn has_waiting(&self) -> bool {
        self.queues.iter().any(|queue| !queue.waiting.is_empty())
    }

    /// Sets the priority of a queue, and of its tenant.
    pub(super) fn set_priority(&mut self, id: &QueueId, priority: Priority) {
        let (weight, max_in_flight) = (priority.tenant_weight, priority.max_in_flight);
        match self.tenants.get_mut(&id.tenant) {
            Some(tenant) => {
                tenant.share.weight = weight;
                tenant.max_in_flight = max_in_flight;
            }
            None => {
                self.forget_idle();
                let share = Share { in_flight: 0, time: self.now, weight };
                self.last_number = self.last_number.wrapping_add(1);
                let number = self.last_number;
                let tenant = Tenant { share, now: 0, number, max_in_flight };
                self.tenants.insert(id.tenant.clone(), tenant);
            }
        }
        let queue = self.queue(id);
        queue.share.weight = priority.batch_weight;
        queue.urgency = priority.urgency;
    }

    /// Adds a waiting request.
    pub(super) fn wait(&mut self, id: &QueueId, priority: Priority, waiting: T) {
        self.set_priority(id, priority);
        self.queue(id).waiting.push_back((priority.tokens, waiting));
    }

    /// Removes a waiting request that has gone.
    pub(super) fn leave(&mut self, id: &QueueId, is_gone: impl Fn(&T) -> bool) {
        let Some(index) = self.queues.iter().position(|queue| queue.id == *id) else { return };
        let Some(queue) = self.queues.get_mut(index) else { return };
        queue.waiting.retain(|(_, waiting)| !is_gone(waiting));
        self.remove_if_idle(index);
    }

    /// Removes all waiting requests.
    pub(super) fn clear_waiting(&mut self) {
        for queue in &mut self.queues {
            queue.waiting.clear();
        }
        self.queues.retain(|queue| queue.share.in_flight > 0);
    }

    /// Removes the waiting request that is next and whose tenant may begin one, and returns its
    /// queue and its tokens. Without room for batches, only online requests are next.
    pub(super) fn take_next(
        &mut self,
        has_room_for_batches: bool,
        mut may_begin: impl FnMut(&TenantId, Option<u64>) -> bool,
    ) -> Option<(QueueId, u64, T)> {
        let mut waits = [false; CLASSES];
        for queue in self.queues.iter().filter(|queue| !queue.waiting.is_empty()) {
            if let Some(waits) = waits.get_mut(queue.class()) {
                *waits = true;
            }
        }
        let classes = if has_room_for_batches { CLASSES } else { 1 };
        let mut order: [usize; CLASSES] = std::array::from_fn(|class| class);
        let is_due = |class: &usize| {
            let (passed, max) = (self.passed_over.get(*class), MAX_PASSED_OVER.get(*class));
            waits.get(*class) == Some(&true) && passed >= max
        };
        // The sort is stable: among classes that are due, the higher one is first.
        order.sort_by_key(|class| !is_due(class));
        for class in order.into_iter().filter(|class| *class < classes) {
            if let Some(next) = self.take_next_of(class, &mut may_begin) {
                for (other, passed) in self.passed_over.iter_mut().enumerate() {
                    if other == class {
                        *passed = 0;
                    } else if other > class && waits.get(other) == Some(&true) {
                        *passed = passed.saturating_add(1);
                    }
                }
                return Some(next);
            }
        }
        None
    }

    fn take_next_of(
        &mut self,
        class: usize,
        may_begin: &mut impl FnMut(&TenantId, Option<u64>) -> bool,
    ) -> Option<(QueueId, u64, T)> {
        let mut passed_over: Vec<TenantId> = Vec::new();
        loop {
            let (by, now) = (self.by, self.now);
            let order = |queue: &&Queue<T>| {
                let tenant = self.tenants.get(&queue.id.tenant).copied().unwrap_or_default();
                let of_queue = queue.share.order(tenant.now, by);
                // The tenants of equal shares are told apart, so that their queues do not mix.
                (tenant.share.order(now, by), tenant.number, queue.urgency, of_queue)
            };
            let waiting = self.queues.iter().filter(|queue| {
                queue.class() == class
                    && !queue.waiting.is_empty()
                    && !passed_over.contains(&queue.id.tenant)
            });
            let next = waiting.min_by_key(order)?;
            let id = next.id.clone();
            let max = self.tenants.get(&id.tenant).and_then(|tenant| tenant.max_in_flight);
            if !may_begin(&id.tenant, max) {
                passed_over.push(id.tenant);
                continue;
            }
            let (tokens, waiting) = self.queue(&id).waiting.pop_front()?;
            return Some((id, tokens, waiting));
        }
    }

    /// Counts an exchange of a queue, which has some tokens.
    pub(super) fn begin(&mut self, id: &QueueId, tokens: u64) {
        let now = self.tenants.get(&id.tenant).map_or(0, |tenant| tenant.now);
        let queue_start = self.queue(id).share.begin(now, tokens);
        if let Some(tenant) = self.tenants.get_mut(&id.tenant) {
            tenant.now = queue_start;
            self.now = tenant.share.begin(self.now, tokens);
        }
    }

    /// Ends an exchange of a queue.
    pub(super) fn end(&mut self, id: &QueueId) {
        if let Some(Tenant { share, .. }) = self.tenants.get_mut(&id.tenant) {
            share.in_flight = share.in_flight.saturating_sub(1);
        }
        let Some(index) = self.queues.iter().position(|queue| queue.id == *id) else { return };
        if let Some(queue) = self.queues.get_mut(index) {
            queue.share.in_flight = queue.share.in_flight.saturating_sub(1);
        }
        self.remove_if_idle(index);
    }

    fn remove_if_idle(&mut self, index: usize) {
        let is_idle = |queue: &Queue<T>| queue.share.in_flight == 0 && queue.waiting.is_empty();
        if self.queues.get(index).is_some_and(is_idle) {
            self.queues.swap_remove(index);
        }
        if self.queues.is_empty() {
            // Nobody is ahead of anybody without competition.
            self.tenants.clear();
            self.now = 0;
            self.passed_over = [0; CLASSES];
        }
    }

    /// Forgets tenants that are not ahead and have nothing in flight, if there are many.
    fn forget_idle(&mut self) {
        if self.tenants.len() < MAX_IDLE_TENANTS {
            return;
        }
        let (now, queues) = (self.now, &self.queues);
        self.tenants.retain(|tenant, Tenant { share, .. }| {
            share.in_flight > 0
                || share.time > now
                || queues.iter().any(|queue| queue.id.tenant == *tenant)
        });
    }

    fn queue(&mut self, id: &QueueId) -> &mut Queue<T> {
        let now = self.tenants.get(&id.tenant).map_or(0, |tenant| tenant.now);
        let index = self.queues.iter().position(|queue| queue.id == *id).unwrap_or_else(|| {
            self.queues.push(Queue {
                id: id.clone(),
                share: Share { in_flight: 0, time: now, weight: 1 },
                urgency: Urgency::default(),
                waiting: VecDeque::new(),
            });
            self.queues.len().saturating_sub(1)
        });
        #[expect(clippy::indexing_slicing, reason = "the index was found or just pushed")]
        &mut self.queues[index]
    }

    /// Returns true if nothing is counted any more.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.tenants.is_empty()
    }
}

#[cfg(test)]
mod tests;
