//! Places: how many batches of each lane are worked on at a time, and whose turn it is.
//!
//! **Threat.** A stuck provider holds up the batches of others, a combination of many plugins gets places for each combination, or sixteen
//! long batches keep a short one waiting for hours.
//!
//! **Places.** Validation and finishing have places of their own. For execution a batch needs a place of every plugin that its requests
//! go to. Each plugin has `max_concurrent_batches` places, and all plugins together `max_executing_batches`; a plugin none of whose
//! batches is executed always gets one.
//!
//! **Turns.** Batches wait in the order of their last turn. An older one that does not get its places yet keeps them from younger ones,
//! so that one which needs many plugins is not passed by for ever. A batch that executes gives its place back after a *stint* of a second
//! or 1,000 lines, if another one waits: it takes no new lines then, while its requests under way go on. It waits for its next turn
//! here as long as it has requests under way, and in the store when it has none.
//!
//! **Worked on.** Batches with or without a place, at most twice as many as have one. When another one waits that could have a place, the one
//! whose last turn is longest ago is asked to leave: it sends nothing new, and goes back to the store when what it has sent is answered.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::store::{Lane, Waiting};

/// What a batch may take before another one has its turn.
const STINT: Duration = Duration::from_secs(1);
const STINT_LINES: usize = 1000;

pub type Plugins = BTreeSet<String>;

pub struct Lanes {
    /// Of validation, of finishing, and of each plugin.
    max: usize,
    /// Of all plugins together.
    max_executing: usize,
    state: Mutex<State>,
    /// Told whenever a place may have become free.
    freed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    validating: usize,
    finishing: usize,
    executing: usize,
    /// Places that are taken.
    places: HashMap<String, usize>,
    /// Batches worked on, with or without a place: at most twice as many as have places.
    worked_on: HashMap<String, usize>,
    all_worked_on: usize,
    returning: Vec<Returning>,
    running: Vec<Weak<Turn>>,
    /// When a batch was last asked to leave for another one.
    asked_to_leave: Option<Instant>,
}

/// A batch that waits here for its next turn.
struct Returning {
    since: Timestamp,
    plugins: Arc<Plugins>,
    /// A place, or none if it is to leave.
    granted: oneshot::Sender<Option<Place>>,
}

/// Whether a batch that executes is asked to let another one have its place.
#[derive(Default)]
struct Turn {
    plugins: Arc<Plugins>,
    asked: AtomicBool,
    told: Notify,
}

/// A place, given back when it is dropped.
pub struct Place {
    lanes: Arc<Lanes>,
    lane: Lane,
    turn: Arc<Turn>,
    /// When there was a first line to take: to find it may take long.
    begun: Option<Instant>,
    lines: usize,
}

/// The fact that a batch of a plugin is worked on.
pub struct WorkedOn {
    lanes: Arc<Lanes>,
    plugins: Plugins,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Claim the batch at this place of the list.
    Claim(usize),
    /// A batch that waited here goes on.
    Returned,
    Nothing,
}

impl Lanes {
    pub fn new(max: usize, max_executing: usize, freed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { max, max_executing, state: Mutex::default(), freed })
    }

    /// Whose turn it is: of the batches waiting in the store, the oldest of each lane, and of those waiting here.
    pub fn next(self: &Arc<Self>, waiting: &[Waiting]) -> Next {
        let mut state = self.lock();
        state.returning.retain(|returning| !returning.granted.is_closed());
        let mut queue: Vec<(Timestamp, bool, usize)> = waiting
            .iter()
            .enumerate()
            .map(|(place, waiting)| (waiting.since, false, place))
            .collect();
        queue.extend(
            state
                .returning
                .iter()
                .enumerate()
                .map(|(place, returning)| (returning.since, true, place)),
        );
        queue.sort_unstable();
        // Plugins whose next place is somebody's who waits for longer.
        let mut reserved: HashSet<String> = HashSet::new();
        let mut next = Next::Nothing;
        for (_, is_here, place) in queue {
            if is_here {
                let Some(plugins) =
                    state.returning.get(place).map(|returning| returning.plugins.clone())
                else {
                    continue;
                };
                if next == Next::Nothing && state.has_room(&plugins, &reserved, self) {
                    let returning = state.returning.remove(place);
                    let place = self.enter(&mut state, Lane::Execute((*plugins).clone()));
                    drop(state);
                    // One that has gone gives its place back.
                    returning.granted.send(Some(place)).ok();
                    return Next::Returned;
                }
                reserved.extend(plugins.iter().cloned());
                continue;
            }
            let Some(found) = waiting.get(place) else { continue };
            let (room, may_begin) = match &found.lane {
                Lane::Validate => (state.validating < self.max, true),
                Lane::Finish => (state.finishing < self.max, true),
                Lane::Execute(plugins) => {
                    (state.has_room(plugins, &reserved, self), state.may_work_on(plugins, self))
                }
            };
            if room && may_begin && next == Next::Nothing {
                next = Next::Claim(place);
            } else if let Lane::Execute(plugins) = &found.lane {
                // One that only waits for another one to leave must not keep those from their places that do the work.
                if may_begin {
                    reserved.extend(plugins.iter().cloned());
                } else if state.ask_to_leave(plugins) {
                    return Next::Returned;
                }
            }
        }
        let full = state.executing >= self.max_executing;
        state.running.retain(|turn| turn.strong_count() > 0);
        for turn in state.running.iter().filter_map(Weak::upgrade) {
            let asked = !reserved.is_empty()
                && (full || turn.plugins.iter().any(|name| reserved.contains(name)));
            turn.asked.store(asked, Ordering::Relaxed);
            if asked {
                turn.told.notify_waiters();
            }
        }
        next
    }

    /// Takes a place, whether there is one or not: [`Self::next`] says so.
    pub fn take(self: &Arc<Self>, lane: &Lane) -> Place {
        let mut state = self.lock();
        self.enter(&mut state, lane.clone())
    }

    fn enter(self: &Arc<Self>, state: &mut State, lane: Lane) -> Place {
        let plugins = match &lane {
            Lane::Execute(plugins) => Arc::new(plugins.clone()),
            Lane::Validate | Lane::Finish => Arc::default(),
        };
        let turn = Arc::new(Turn { plugins, ..Turn::default() });
        state.change(&lane, |number| number.saturating_add(1));
        if matches!(lane, Lane::Execute(_)) {
            state.running.push(Arc::downgrade(&turn));
        }
        Place { lanes: self.clone(), lane, turn, begun: None, lines: 0 }
    }

    /// Counts a batch that executes as worked on until what this returns is dropped.
    pub fn work_on(self: &Arc<Self>, lane: &Lane) -> Option<WorkedOn> {
        let Lane::Execute(plugins) = lane else { return None };
        let mut state = self.lock();
        state.all_worked_on = state.all_worked_on.saturating_add(1);
        for name in plugins {
            let number = state.worked_on.entry(name.clone()).or_default();
            *number = number.saturating_add(1);
        }
        Some(WorkedOn { lanes: self.clone(), plugins: plugins.clone() })
    }

    /// Waits for the next turn of a batch that is worked on; none if it is to leave, so that another one can be worked on.
    pub async fn come_back(self: &Arc<Self>, plugins: &Plugins, since: Timestamp) -> Option<Place> {
        let plugins = Arc::new(plugins.clone());
        loop {
            let (granted, place) = oneshot::channel();
            self.lock().returning.push(Returning { since, plugins: plugins.clone(), granted });
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

fn count(counts: &HashMap<String, usize>, name: &str) -> usize {
    counts.get(name).copied().unwrap_or(0)
}

impl State {
    /// Whether each of the plugins has a place that nobody else is to have.
    fn has_room(&self, plugins: &Plugins, reserved: &HashSet<String>, lanes: &Lanes) -> bool {
        let free =
            |name: &String| count(&self.places, name) < lanes.max && !reserved.contains(name);
        let is_new = |name: &String| count(&self.places, name) == 0;
        // A batch of no plugin comes from a database of an older version.
        plugins.iter().all(free)
            && (self.executing < lanes.max_executing
                || plugins.iter().any(is_new)
                || plugins.is_empty())
    }

    /// Asks the batch to leave whose last turn is longest ago, of those for one of these plugins; not more than one in a while.
    fn ask_to_leave(&mut self, plugins: &Plugins) -> bool {
        if self.asked_to_leave.is_some_and(|at| at.elapsed() < STINT) {
            return false;
        }
        let shares =
            |returning: &Returning| returning.plugins.iter().any(|name| plugins.contains(name));
        let oldest = self.returning.iter().enumerate().filter(|(_, returning)| shares(returning));
        let Some(place) =
            oldest.min_by_key(|(_, returning)| returning.since).map(|(place, _)| place)
        else {
            return false;
        };
        self.asked_to_leave = Some(Instant::now());
        self.returning.remove(place).granted.send(None).ok();
        true
    }

    /// Whether one more batch may be worked on.
    fn may_work_on(&self, plugins: &Plugins, lanes: &Lanes) -> bool {
        let is_new = |name: &String| count(&self.worked_on, name) == 0;
        plugins.iter().all(|name| count(&self.worked_on, name) < lanes.max.saturating_mul(2))
            && (self.all_worked_on < lanes.max_executing.saturating_mul(2)
                || plugins.iter().any(is_new))
    }

    fn change(&mut self, lane: &Lane, by: impl Fn(usize) -> usize) {
        match lane {
            Lane::Validate => self.validating = by(self.validating),
            Lane::Finish => self.finishing = by(self.finishing),
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
    /// There is a first line to take: its time begins.
    pub fn begins(&mut self) {
        self.begun.get_or_insert_with(Instant::now);
    }

    /// Counts a line that was taken.
    pub fn took_line(&mut self) {
        self.lines = self.lines.saturating_add(1);
    }

    /// Whether another batch is to have this place now.
    pub fn is_over(&self) -> bool {
        let long = self.begun.is_some_and(|begun| begun.elapsed() >= STINT);
        self.turn.asked.load(Ordering::Relaxed) && (self.lines >= STINT_LINES || long)
    }

    /// Returns when another batch is to have this place.
    pub async fn over(&self) {
        let end = self.begun.unwrap_or_else(Instant::now).checked_add(STINT);
        while !self.is_over() {
            let told = self.turn.told.notified();
            let mut told = std::pin::pin!(told);
            told.as_mut().enable();
            if self.turn.asked.load(Ordering::Relaxed) {
                tokio::time::sleep_until(end.unwrap_or_else(Instant::now)).await;
                if !self.is_over() {
                    // Asked no more.
                    told.await;
                }
            } else {
                told.await;
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

impl Drop for WorkedOn {
    fn drop(&mut self) {
        let mut state = self.lanes.lock();
        state.all_worked_on = state.all_worked_on.saturating_sub(1);
        for name in &self.plugins {
            if let Some(number) = state.worked_on.get_mut(name) {
                *number = number.saturating_sub(1);
                if *number == 0 {
                    state.worked_on.remove(name);
                }
            }
        }
        drop(state);
        self.lanes.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn plugins(names: &str) -> Plugins {
        names.split(' ').map(str::to_owned).collect()
    }

    fn waiting(lanes: &[(&str, i64)]) -> Vec<Waiting> {
        let lane = |name: &str| match name {
            "validate" => Lane::Validate,
            "finish" => Lane::Finish,
            names => Lane::Execute(plugins(names)),
        };
        lanes
            .iter()
            .map(|(name, since)| Waiting::of(lane(name), Timestamp::from_millis(*since)))
            .collect()
    }

    #[test]
    fn a_full_plugin_leaves_the_others_their_places() {
        let lanes = Lanes::new(2, 100, Arc::default());
        let slow = Lane::Execute(plugins("slow"));
        let first = lanes.take(&slow);
        let _second = lanes.take(&slow);
        assert_eq!(lanes.next(&waiting(&[("slow", 1)])), Next::Nothing);
        assert_eq!(lanes.next(&waiting(&[("slow", 1), ("fast", 2)])), Next::Claim(1));
        assert_eq!(lanes.next(&waiting(&[("slow", 1), ("validate", 3)])), Next::Claim(1));
        // One that needs both waits for the one that is full, and keeps the other for itself.
        assert_eq!(lanes.next(&waiting(&[("fast slow", 1), ("fast", 2)])), Next::Nothing);
        assert_eq!(lanes.next(&waiting(&[("fast slow", 2), ("fast", 1)])), Next::Claim(1));
        drop(first);
        assert_eq!(lanes.next(&waiting(&[("fast slow", 1), ("fast", 2)])), Next::Claim(0));
    }

    #[test]
    fn the_bound_on_the_whole_leaves_each_plugin_one() {
        let lanes = Lanes::new(16, 2, Arc::default());
        let _places =
            [lanes.take(&Lane::Execute(plugins("a"))), lanes.take(&Lane::Execute(plugins("b")))];
        assert_eq!(lanes.next(&waiting(&[("a", 1), ("a b", 1)])), Next::Nothing);
        assert_eq!(lanes.next(&waiting(&[("a", 1), ("c", 2)])), Next::Claim(1));
    }

    #[tokio::test]
    async fn a_batch_gives_its_place_back_after_a_stint_if_another_waits() {
        let lanes = Lanes::new(1, 100, Arc::default());
        let (ours, theirs) = (plugins("p"), waiting(&[("p", 5)]));
        let _worked_on = lanes.work_on(&Lane::Execute(ours.clone()));
        let mut place = lanes.take(&Lane::Execute(ours.clone()));
        place.begun = Instant::now().checked_sub(STINT);
        assert!(!place.is_over(), "nobody waits");
        assert_eq!(lanes.next(&theirs), Next::Nothing);
        assert!(place.is_over());
        place = {
            drop(place);
            lanes.take(&Lane::Execute(ours.clone()))
        };
        assert_eq!(lanes.next(&theirs), Next::Nothing);
        assert!(!place.is_over(), "it has just begun");
        for _ in 0..STINT_LINES {
            place.took_line();
        }
        assert!(place.is_over() && place.over().now_or_never().is_some());
        drop(place);
        // The other has waited for longer; then it is our turn again.
        let mut back = Box::pin(lanes.come_back(&ours, Timestamp::from_millis(6)));
        assert!((&mut back).now_or_never().is_none());
        assert_eq!(lanes.next(&theirs), Next::Claim(0));
        let other = lanes.take(&Lane::Execute(ours.clone()));
        assert_eq!(lanes.next(&[]), Next::Nothing);
        drop(other);
        assert_eq!(lanes.next(&[]), Next::Returned);
        assert!((&mut back).now_or_never().unwrap().is_some());
    }

    #[tokio::test]
    async fn one_leaves_when_another_waits_to_be_worked_on_and_keeps_nobody_from_its_place() {
        let lanes = Lanes::new(1, 100, Arc::default());
        let ours = plugins("p");
        let worked_on = [(); 2].map(|()| lanes.work_on(&Lane::Execute(ours.clone())));
        let mut first = Box::pin(lanes.come_back(&ours, Timestamp::from_millis(1)));
        let mut second = Box::pin(lanes.come_back(&ours, Timestamp::from_millis(2)));
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        let third = waiting(&[("p", 0), ("p q", 0)]);
        // The one whose last turn is longest ago is to leave; the other has its turn though somebody waits since before.
        assert_eq!(lanes.next(&third), Next::Returned);
        assert!(first.await.is_none());
        assert_eq!(lanes.next(&third), Next::Returned);
        let place = second.await;
        assert!(place.is_some());
        drop((place, worked_on));
        assert_eq!(lanes.next(&third), Next::Claim(0));
    }
}
