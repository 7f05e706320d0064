//! Places and turns: how many batches of each lane run at a time, and which batch runs next.
//!
//! **Problem.** Without a limit per plugin, one stuck provider blocks the batches of all others.
//! With a limit per combination of plugins, each new combination would get extra capacity. Without
//! turns, sixteen long batches would keep a short batch waiting for hours.
//!
//! **Lanes.** A lane is the queue of batches that need the same: validation, finishing, a limit of
//! their project, or execution with one set of plugins. Batches in different lanes do not compete
//! unless the lanes share a plugin. The store returns the oldest waiting batch of each tenant in
//! each lane.
//!
//! **Places.** A place is a permit to run. Validation and finishing have `max_concurrent_batches`
//! places each; a batch that waits for a limit takes a place of finishing for a moment. An
//! executing batch holds one place of every plugin that its requests go to. Each plugin has
//! `max_concurrent_batches` places, and all plugins together have `max_executing_batches`. A plugin
//! without an executing batch always gets a place, even beyond that total. Combinations of plugins
//! have no places of their own.
//!
//! **Turns.** Tenants take turns by their weights; see [`turns`](crate::schedule::turns). The
//! batches of a tenant run in the order of their last turn, and those whose window is about to end
//! run first. Batches without a deadline come after all others, but get one in a hundred places. A
//! batch that is next and cannot get all its places yet reserves these places against
//! the others. So a batch that needs many plugins does not starve.
//!
//! **Stints.** A stint is the time slice of a turn: one second or 1,000 lines. If another batch
//! waits, an executing batch releases its place after a stint. The batch then takes no new lines,
//! and its requests in flight continue. A batch with requests in flight waits for its next turn in
//! this process. A batch without requests in flight waits in the store.
//!
//! **Active batches.** An executing batch is active from its claim to its release or end, with or
//! without a place. The number of active batches is limited to twice the number of places. If a
//! waiting batch would exceed this limit, the active batch with the oldest turn is evicted. An
//! evicted batch sends no new requests and returns to the store when its requests in flight have
//! finished. At most one batch is evicted during the length of a stint.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::TenantId;
use batchwright_domain::window::Urgency;
use batchwright_store::{Lane, Waiting};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::schedule::turns::Turns;

/// Duration after which a turn may end.
const STINT_DURATION: Duration = Duration::from_secs(1);

/// Number of lines after which a turn may end.
const STINT_LINES: usize = 1000;

/// Number of places given to other batches after which a waiting batch without a deadline is next.
const MAX_PASSED_OVER: u32 = 99;

/// Names of the plugins that the requests of a batch go to.
pub(crate) type Plugins = BTreeSet<String>;

/// Places of all lanes, and the batches that wait for a place in this process.
pub(crate) struct Lanes {
    /// Number of places of validation, of finishing, and of each plugin.
    max: usize,
    /// Number of places of all plugins together.
    max_executing: usize,
    state: Mutex<State>,
    /// Notified when a place may have become free.
    freed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    validating: usize,
    finishing: usize,
    executing: usize,
    /// Occupied places of each plugin.
    places: HashMap<String, usize>,
    /// Active batches of each plugin, with or without a place.
    active: HashMap<String, usize>,
    /// Active batches of all plugins together.
    all_active: usize,
    returning: Vec<Returning>,
    running: Vec<Weak<Turn>>,
    /// Turns of the tenants.
    turns: Turns,
    /// Places given to other batches since a batch without a deadline got one.
    passed_over: u32,
    /// Time of the last eviction.
    last_eviction: Option<Instant>,
}

/// Active batch that waits in this process for its next turn.
struct Returning {
    tenant: TenantId,
    urgency: Urgency,
    since: Timestamp,
    plugins: Arc<Plugins>,
    /// Receives a place, or `None` if the batch is evicted.
    granted: oneshot::Sender<Option<Place>>,
}

/// Turn of an executing batch, with the request to end the turn.
#[derive(Default)]
struct Turn {
    plugins: Arc<Plugins>,
    /// True if another batch waits for this place.
    end_requested: AtomicBool,
    /// Notified when the end of the turn is requested.
    requested: Notify,
}

/// Permit to run in a lane, released when it is dropped.
pub(crate) struct Place {
    lanes: Arc<Lanes>,
    lane: Lane,
    turn: Arc<Turn>,
    /// Time of the first line. The search for this line may take long and does not count.
    started_at: Option<Instant>,
    lines: usize,
}

/// Guard that counts a batch as active until the guard is dropped.
pub(crate) struct ActiveGuard {
    lanes: Arc<Lanes>,
    plugins: Plugins,
}

/// Next action of the scheduler.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Claim the batch with this index in the list.
    Claim(usize),
    /// An active batch got a place or was evicted, so the lists have changed.
    Returned,
    /// No batch can get a place.
    Nothing,
}

impl Lanes {
    /// Creates the lanes. `freed` is notified when a place may have become free.
    pub(crate) fn new(max: usize, max_executing: usize, freed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { max, max_executing, state: Mutex::default(), freed })
    }

    /// Selects the batch that runs next.
    ///
    /// The candidates are the batches in `waiting`, which are the oldest of each lane in the store,
    /// and the active batches that wait for their next turn.
    pub(crate) fn next(self: &Arc<Self>, waiting: &[Waiting]) -> Next {
        let mut state = self.lock();
        state.returning.retain(|returning| !returning.granted.is_closed());
        for found in waiting {
            state.turns.set_weight(&found.tenant, found.weight);
        }
        let can_wait =
            |urgency: Urgency| urgency == Urgency::Undated && state.passed_over < MAX_PASSED_OVER;
        let mut queue: Vec<(bool, u64, Urgency, Timestamp, bool, usize)> = waiting
            .iter()
            .enumerate()
            .map(|(index, found)| {
                let lead = state.turns.lead(&found.tenant, &found.lane);
                (can_wait(found.urgency), lead, found.urgency, found.since, false, index)
            })
            .collect();
        queue.extend(state.returning.iter().enumerate().map(|(index, returning)| {
            let lead = state.turns.lead_at(&returning.tenant, &returning.plugins);
            let urgency = returning.urgency;
            (can_wait(urgency), lead, urgency, returning.since, true, index)
        }));
        queue.sort_unstable();
        let undated_waits = queue.iter().any(|(_, _, urgency, ..)| *urgency == Urgency::Undated);
        // Plugins whose next place is reserved for a batch that has waited longer.
        let mut reserved: HashSet<String> = HashSet::new();
        let mut next = Next::Nothing;
        for (_, _, urgency, _, is_active, index) in queue {
            if is_active {
                let Some(plugins) =
                    state.returning.get(index).map(|returning| returning.plugins.clone())
                else {
                    continue;
                };
                if next == Next::Nothing && state.has_room(&plugins, &reserved, self) {
                    state.count_grant(urgency, undated_waits);
                    let returning = state.returning.remove(index);
                    let lane = Lane::Execute((*plugins).clone());
                    let place = self.enter(&mut state, lane, &returning.tenant);
                    drop(state);
                    // If the receiver is gone, the place is dropped and thereby released.
                    returning.granted.send(Some(place)).ok();
                    return Next::Returned;
                }
                reserved.extend(plugins.iter().cloned());
                continue;
            }
            let Some(found) = waiting.get(index) else { continue };
            let (room, may_activate) = match &found.lane {
                Lane::Validate => (state.validating < self.max, true),
                Lane::Finish | Lane::Admit => (state.finishing < self.max, true),
                Lane::Execute(plugins) => {
                    (state.has_room(plugins, &reserved, self), state.may_activate(plugins, self))
                }
            };
            if room && may_activate && next == Next::Nothing {
                next = Next::Claim(index);
                state.count_grant(urgency, undated_waits);
            } else if let Lane::Execute(plugins) = &found.lane {
                // A batch that cannot become active yet must not reserve places, because active
                // batches need these places to make progress.
                if may_activate {
                    reserved.extend(plugins.iter().cloned());
                } else if state.evict_oldest(plugins) {
                    return Next::Returned;
                }
            }
        }
        let full = state.executing >= self.max_executing;
        state.running.retain(|turn| turn.strong_count() > 0);
        for turn in state.running.iter().filter_map(Weak::upgrade) {
            let end_requested = !reserved.is_empty()
                && (full || turn.plugins.iter().any(|name| reserved.contains(name)));
            turn.end_requested.store(end_requested, Ordering::Relaxed);
            if end_requested {
                turn.requested.notify_waiters();
            }
        }
        next
    }

    /// Takes a place without a check. [`Self::next`] checks that the place is free.
    pub(crate) fn take(self: &Arc<Self>, lane: &Lane, tenant: &TenantId) -> Place {
        let mut state = self.lock();
        self.enter(&mut state, lane.clone(), tenant)
    }

    fn enter(self: &Arc<Self>, state: &mut State, lane: Lane, tenant: &TenantId) -> Place {
        state.turns.count(tenant, &lane);
        let plugins = match &lane {
            Lane::Execute(plugins) => Arc::new(plugins.clone()),
            Lane::Validate | Lane::Finish | Lane::Admit => Arc::default(),
        };
        let turn = Arc::new(Turn { plugins, ..Turn::default() });
        state.change(&lane, |number| number.saturating_add(1));
        if matches!(lane, Lane::Execute(_)) {
            state.running.push(Arc::downgrade(&turn));
        }
        Place { lanes: self.clone(), lane, turn, started_at: None, lines: 0 }
    }

    /// Counts an executing batch as active until the returned guard is dropped.
    ///
    /// Returns `None` for the other lanes, which have no limit on active batches.
    pub(crate) fn work_on(self: &Arc<Self>, lane: &Lane) -> Option<ActiveGuard> {
        let Lane::Execute(plugins) = lane else { return None };
        let mut state = self.lock();
        state.all_active = state.all_active.saturating_add(1);
        for name in plugins {
            let number = state.active.entry(name.clone()).or_default();
            *number = number.saturating_add(1);
        }
        Some(ActiveGuard { lanes: self.clone(), plugins: plugins.clone() })
    }

    /// Waits for the next turn of an active batch.
    ///
    /// Returns `None` if the batch is evicted. `since` is the time of its last turn.
    pub(crate) async fn come_back(
        self: &Arc<Self>,
        (plugins, tenant): (&Plugins, &TenantId),
        since: Timestamp,
        urgency: Urgency,
    ) -> Option<Place> {
        let plugins = Arc::new(plugins.clone());
        loop {
            let (granted, place) = oneshot::channel();
            let (tenant, plugins) = (tenant.clone(), plugins.clone());
            self.lock().returning.push(Returning { tenant, urgency, since, plugins, granted });
            self.freed.notify_one();
            if let Ok(place) = place.await {
                return place;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the count of a plugin, or 0.
fn count(counts: &HashMap<String, usize>, name: &str) -> usize {
    counts.get(name).copied().unwrap_or(0)
}

impl State {
    /// Counts how often batches without a deadline were passed over.
    fn count_grant(&mut self, urgency: Urgency, undated_waits: bool) {
        self.passed_over = match urgency {
            Urgency::Undated => 0,
            Urgency::Urgent | Urgency::Dated if undated_waits => self.passed_over.saturating_add(1),
            Urgency::Urgent | Urgency::Dated => self.passed_over,
        };
    }

    /// Returns true if each of the plugins has a free place that is not reserved.
    fn has_room(&self, plugins: &Plugins, reserved: &HashSet<String>, lanes: &Lanes) -> bool {
        let free =
            |name: &String| count(&self.places, name) < lanes.max && !reserved.contains(name);
        let is_new = |name: &String| count(&self.places, name) == 0;
        // A batch without plugins comes from a database of an older version.
        plugins.iter().all(free)
            && (self.executing < lanes.max_executing
                || plugins.iter().any(is_new)
                || plugins.is_empty())
    }

    /// Evicts a returning batch that shares one of the plugins: of the tenant that is furthest
    /// ahead of its share, the batch with the oldest turn.
    ///
    /// Returns false if there is no such batch or a batch was evicted less than a stint ago.
    fn evict_oldest(&mut self, plugins: &Plugins) -> bool {
        if self.last_eviction.is_some_and(|at| at.elapsed() < STINT_DURATION) {
            return false;
        }
        let shares =
            |returning: &Returning| returning.plugins.iter().any(|name| plugins.contains(name));
        let oldest = self.returning.iter().enumerate().filter(|(_, returning)| shares(returning));
        let order = |returning: &Returning| {
            let lead = self.turns.lead_at(&returning.tenant, &returning.plugins);
            (Reverse(lead), returning.since)
        };
        let Some(index) =
            oldest.min_by_key(|(_, returning)| order(returning)).map(|(index, _)| index)
        else {
            return false;
        };
        self.last_eviction = Some(Instant::now());
        self.returning.remove(index).granted.send(None).ok();
        true
    }

    /// Returns true if one more batch may become active.
    fn may_activate(&self, plugins: &Plugins, lanes: &Lanes) -> bool {
        let is_new = |name: &String| count(&self.active, name) == 0;
        plugins.iter().all(|name| count(&self.active, name) < lanes.max.saturating_mul(2))
            && (self.all_active < lanes.max_executing.saturating_mul(2)
                || plugins.iter().any(is_new))
    }

    /// Changes the number of occupied places of a lane.
    fn change(&mut self, lane: &Lane, by: impl Fn(usize) -> usize) {
        match lane {
            Lane::Validate => self.validating = by(self.validating),
            Lane::Finish | Lane::Admit => self.finishing = by(self.finishing),
            Lane::Execute(plugins) => {
                self.executing = by(self.executing);
                for name in plugins {
                    let number = by(count(&self.places, name));
                    if number == 0 {
                        self.places.remove(name);
                    } else {
                        self.places.insert(name.clone(), number);
                    }
                }
            }
        }
    }
}

impl Place {
    /// Starts the stint when the first line is found. Later calls have no effect.
    pub(crate) fn start(&mut self) {
        self.started_at.get_or_insert_with(Instant::now);
    }

    /// Counts a taken line.
    pub(crate) fn took_line(&mut self) {
        self.lines = self.lines.saturating_add(1);
    }

    /// Returns true if the stint has ended and another batch waits for this place.
    pub(crate) fn is_over(&self) -> bool {
        let long = self.started_at.is_some_and(|at| at.elapsed() >= STINT_DURATION);
        self.turn.end_requested.load(Ordering::Relaxed) && (self.lines >= STINT_LINES || long)
    }

    /// Waits until the stint has ended and another batch waits for this place.
    pub(crate) async fn over(&self) {
        let end = self.started_at.unwrap_or_else(Instant::now).checked_add(STINT_DURATION);
        while !self.is_over() {
            let requested = self.turn.requested.notified();
            let mut requested = std::pin::pin!(requested);
            requested.as_mut().enable();
            if self.turn.end_requested.load(Ordering::Relaxed) {
                tokio::time::sleep_until(end.unwrap_or_else(Instant::now)).await;
                if !self.is_over() {
                    // The request has been withdrawn.
                    requested.await;
                }
            } else {
                requested.await;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.lanes.lock().change(&self.lane, |number| number.saturating_sub(1));
        self.lanes.freed.notify_one();
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        let mut state = self.lanes.lock();
        state.all_active = state.all_active.saturating_sub(1);
        for name in &self.plugins {
            if let Some(number) = state.active.get_mut(name) {
                *number = number.saturating_sub(1);
                if *number == 0 {
                    state.active.remove(name);
                }
            }
        }
        drop(state);
        self.lanes.freed.notify_one();
    }
}

#[cfg(test)]
mod tests;
