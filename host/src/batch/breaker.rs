//! When a provider is in trouble: a circuit breaker for each plugin, tenant and endpoint.
//!
//! **Threat.** A provider that is away for minutes, a key that is being changed, an account without money: each would cost every line of a
//! batch all its attempts, and none of it is a line's fault.
//!
//! **Whose fault.** One line may be refused for what it says: a flagged prompt gets 403 while others pass. So one refusal only raises
//! suspicion. A second one, of another line where there is one, with nothing passing in between, opens the breaker. Errors of a server and
//! exchanges without an answer count less: it takes five lines in a row. A line that is refused again although others have passed meanwhile
//! is refused for itself.
//!
//! **Open.** Nothing is sent but one probe at a time, after pauses that grow. Lines wait, in the input file alone. Whatever passes closes it.
//! Who is the probe changes, so that a line which is refused for itself does not keep the others from being tried.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::plugin::types::Answer;

/// Suspicion at which the breaker opens, and what each kind of trouble adds.
const OPENS_AT: u32 = 5;
const REFUSED: u32 = 3;
const FAILED: u32 = 1;

/// How long a line is held that only raised suspicion.
const HELD: Duration = Duration::from_secs(1);

/// How long somebody waits who finds a probe under way.
const PROBED: Duration = Duration::from_secs(1);

/// How often a line that is alone may be forbidden while it is known that the credential is good.
const FORBIDDEN: u32 = 5;

/// Lines that are remembered with how often each was tried.
const REMEMBERED: usize = 1024;

/// Kinds of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing was sent: no connection, no name, no TLS.
    Unreachable,
    /// The credential was refused.
    Unauthorized,
    /// The credential may not do this, or the request may not.
    Forbidden,
    /// The account has no money or quota left.
    Quota,
    /// The provider failed, or sent no answer.
    Failed,
    /// There is no plugin for the model, or it is paused.
    Plugin,
}

impl Kind {
    /// Whether it may be a line's own.
    fn may_be_own(self) -> bool {
        matches!(self, Self::Unauthorized | Self::Forbidden | Self::Quota)
    }

    fn weight(self) -> u32 {
        if self == Self::Failed { FAILED } else { REFUSED }
    }
}

/// What is the matter.
#[derive(Clone, Debug)]
pub struct Trouble {
    pub kind: Kind,
    /// One sentence for the client: without hosts, addresses and paths.
    pub message: String,
    /// The same for the operator.
    pub detail: String,
    /// How a line ends that is not let wait any longer.
    pub answer: Answer,
}

/// Whether a line may be sent.
#[derive(Debug)]
pub enum Gate {
    Go,
    /// As the one that finds out.
    Probe,
    Wait(Timestamp),
    /// It has lasted for longer than the operator lets lines wait.
    GiveUp(Answer),
}

/// What becomes of a line that was not answered.
#[derive(Debug)]
pub enum Verdict {
    /// It is not known yet whose fault it was.
    Hold(Timestamp),
    /// The provider is in trouble.
    Wait(Timestamp),
    /// It is the line's own.
    Own,
}

/// Pauses between probes.
#[derive(Clone, Copy, Debug)]
pub struct Pauses {
    pub first: Duration,
    pub longest: Duration,
    /// How long lines wait at most; for as long as their batch's window if there is none.
    pub give_up_after: Option<Duration>,
}

/// What others see of an open breaker.
#[derive(Clone, Debug)]
pub struct Outage {
    pub trouble: Trouble,
    pub since: Timestamp,
    pub next_probe: Timestamp,
    /// Requests that wait, of batches that rest.
    pub waiting: u64,
}

pub struct Breaker {
    pauses: Pauses,
    /// Answers since it was made.
    passes: AtomicU64,
    /// There is neither trouble nor suspicion: what is asked at every line.
    calm: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When the first of the failures came since the last answer.
    since: Option<Timestamp>,
    suspicion: u32,
    /// Lines that failed since then.
    lines: HashSet<u64>,
    open: Option<Open>,
    /// Lines tried without an answer, and how often.
    tried: HashMap<u64, u32>,
    /// Batches that rest, each with its requests that wait.
    resting: HashMap<String, u64>,
}

struct Open {
    trouble: Trouble,
    pause: Duration,
    next: Timestamp,
    probing: bool,
    /// The plugin as it was loaded then: once it is another, what was found out does not count.
    plugin: usize,
}

/// A probe under way; given up if it is dropped without a result.
pub struct Probe(Arc<Breaker>);

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(open) = &mut self.0.lock().open {
            open.probing = false;
        }
    }
}

impl Breaker {
    pub fn new(pauses: Pauses) -> Self {
        Self {
            pauses,
            passes: AtomicU64::new(0),
            calm: AtomicBool::new(true),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is nothing to ask.
    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Whether a line may be sent by this plugin.
    pub fn check(&self, now: Timestamp, plugin: usize) -> Gate {
        if self.is_calm() {
            return Gate::Go;
        }
        self.lock().gate(now, plugin, self.pauses)
    }

    /// The same, and takes the place of the probe if there is one.
    pub fn enter(self: &Arc<Self>, now: Timestamp, plugin: usize) -> (Gate, Option<Probe>) {
        if self.is_calm() {
            return (Gate::Go, None);
        }
        let mut state = self.lock();
        let gate = state.gate(now, plugin, self.pauses);
        if matches!(gate, Gate::Probe)
            && let Some(open) = &mut state.open
        {
            open.probing = true;
            drop(state);
            return (gate, Some(Probe(self.clone())));
        }
        (gate, None)
    }

    /// How often a line was tried in vain.
    pub fn tries(&self, line: u64) -> u32 {
        if self.is_calm() { 0 } else { self.lock().tried.get(&line).copied().unwrap_or(0) }
    }

    /// Answers so far: a line that is refused remembers them.
    pub fn passes(&self) -> u64 {
        self.passes.load(Ordering::Relaxed)
    }

    /// Takes note of an answer; returns what it ended, if it ended an outage.
    pub fn passed(&self) -> Option<Outage> {
        self.passes.fetch_add(1, Ordering::Relaxed);
        if self.is_calm() {
            return None;
        }
        // What was under way when its plugin was paused says nothing.
        if self.lock().open.as_ref().is_some_and(|open| open.trouble.kind == Kind::Plugin) {
            return None;
        }
        self.close()
    }

    /// Ends trouble and suspicion.
    pub fn close(&self) -> Option<Outage> {
        let mut state = self.lock();
        let ended = state.outage();
        *state = State::default();
        self.calm.store(true, Ordering::Relaxed);
        ended
    }

    /// Takes note of a line that was not answered. `refused_at` is what [`Self::passes`] was when it was refused before. The second value
    /// says whether this opened the breaker.
    pub fn failed(
        &self,
        now: Timestamp,
        line: u64,
        plugin: usize,
        refused_at: Option<u64>,
        trouble: Trouble,
        probe: bool,
    ) -> (Verdict, bool) {
        let passes = self.passes();
        if trouble.kind.may_be_own() && refused_at.is_some_and(|before| passes > before) {
            return (Verdict::Own, false);
        }
        let mut state = self.lock();
        self.calm.store(false, Ordering::Relaxed);
        state.since.get_or_insert(now);
        let is_new = state.lines.len() < REMEMBERED && state.lines.insert(line);
        if state.tried.len() < REMEMBERED || state.tried.contains_key(&line) {
            let tries = state.tried.entry(line).or_default();
            *tries = tries.saturating_add(1);
        }
        let tries = state.tried.get(&line).copied().unwrap_or(0);
        let alone = state.lines.len() == 1;
        if let Some(open) = &mut state.open {
            if probe {
                open.pause = open.pause.saturating_mul(2).min(self.pauses.longest);
                open.next = now.after(jittered(open.pause));
                open.probing = false;
                open.trouble = trouble;
            }
            let (kind, next) = (open.trouble.kind, open.next);
            if kind == Kind::Forbidden && alone && passes > 0 && tries >= FORBIDDEN {
                *state = State::default();
                self.calm.store(true, Ordering::Relaxed);
                return (Verdict::Own, false);
            }
            return (Verdict::Wait(next), false);
        }
        if is_new || trouble.kind != Kind::Failed {
            state.suspicion = state.suspicion.saturating_add(trouble.kind.weight());
        }
        if state.suspicion < OPENS_AT && trouble.kind != Kind::Plugin {
            return (
                Verdict::Hold(now.after(HELD.min(self.pauses.first.saturating_mul(2)))),
                false,
            );
        }
        let next = now.after(jittered(self.pauses.first));
        state.open = Some(Open { trouble, pause: self.pauses.first, next, probing: false, plugin });
        (Verdict::Wait(next), true)
    }

    /// What is the matter, if something is.
    pub fn outage(&self) -> Option<Outage> {
        if self.is_calm() { None } else { self.lock().outage() }
    }

    /// A batch rests because of this, with so many requests that wait.
    pub fn rests(&self, batch: &str, requests: u64) {
        let mut state = self.lock();
        if state.open.is_some() && state.resting.len() < REMEMBERED {
            state.resting.insert(batch.to_owned(), requests);
        }
    }

    /// Whether a batch is among those that wait because of this.
    pub fn holds(&self, batch: &str) -> bool {
        !self.is_calm() && self.lock().resting.contains_key(batch)
    }

    /// A batch rests no more.
    pub fn wakes(&self, batch: &str) {
        if !self.is_calm() {
            self.lock().resting.remove(batch);
        }
    }
}

impl State {
    fn gate(&self, now: Timestamp, plugin: usize, pauses: Pauses) -> Gate {
        let Some(open) = &self.open else { return Gate::Go };
        let waited = self.since.map_or(Duration::ZERO, |since| since.until(now));
        if pauses.give_up_after.is_some_and(|longest| waited > longest) {
            return Gate::GiveUp(open.trouble.answer.clone());
        }
        if open.probing {
            return Gate::Wait(open.next.max(now.after(PROBED)));
        }
        if open.next > now && open.plugin == plugin {
            return Gate::Wait(open.next);
        }
        Gate::Probe
    }

    fn outage(&self) -> Option<Outage> {
        let open = self.open.as_ref()?;
        Some(Outage {
            trouble: open.trouble.clone(),
            since: self.since.unwrap_or(open.next),
            next_probe: open.next,
            waiting: self.resting.values().fold(0, |sum, more| sum.saturating_add(*more)),
        })
    }
}

/// A pause of which up to a fifth is left out by chance, so that hosts do not probe together.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.8 + fastrand::f64() / 5.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::types::Failure;

    const PAUSES: Pauses = Pauses {
        first: Duration::from_secs(1),
        longest: Duration::from_secs(60),
        give_up_after: None,
    };

    fn trouble(kind: Kind) -> Trouble {
        let answer = Answer::Failure(Failure { code: "x".into(), message: "x".into() });
        Trouble { kind, message: "refused".into(), detail: "refused by 192.0.2.1".into(), answer }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    fn fail(
        breaker: &Breaker,
        now: i64,
        line: u64,
        kind: Kind,
        refused_at: Option<u64>,
    ) -> Verdict {
        breaker.failed(at(now), line, 1, refused_at, trouble(kind), false).0
    }

    /// Tries a line as a probe, once that is allowed; returns how long that took.
    fn probe(breaker: &Arc<Breaker>, now: i64, line: u64, kind: Kind) -> (i64, Verdict) {
        for second in now..now + 100 {
            if let (Gate::Probe, Some(_guard)) = breaker.enter(at(second), 1) {
                assert!(
                    matches!(breaker.check(at(second), 1), Gate::Wait(_)),
                    "one probe at a time"
                );
                return (
                    second - now,
                    breaker.failed(at(second), line, 1, None, trouble(kind), true).0,
                );
            }
        }
        panic!("no probe is let out");
    }

    #[test]
    fn one_refused_line_is_held_and_a_second_one_opens() {
        let breaker = Arc::new(Breaker::new(PAUSES));
        assert!(matches!(fail(&breaker, 0, 1, Kind::Unauthorized, None), Verdict::Hold(_)));
        assert!(matches!(breaker.check(at(0), 1), Gate::Go), "others go on");
        assert!(matches!(fail(&breaker, 0, 2, Kind::Unauthorized, None), Verdict::Wait(_)));
        assert!(matches!(breaker.check(at(0), 1), Gate::Wait(_)));
        // Another plugin of this name, with a new key say, is tried at once.
        assert!(matches!(breaker.check(at(0), 2), Gate::Probe));
        let pauses: Vec<i64> = (0..8)
            .scan(0, |now, line| {
                let (waited, verdict) = probe(&breaker, *now, 10 + line, Kind::Unauthorized);
                assert!(matches!(verdict, Verdict::Wait(_)));
                *now += waited;
                Some(waited)
            })
            .collect();
        assert!(
            pauses.windows(2).all(|pair| pair[0] <= pair[1] + 12)
                && pauses.iter().all(|pause| *pause <= 60)
        );
        assert!(*pauses.last().unwrap() >= 48, "{pauses:?}");
        let ended = breaker.passed().unwrap();
        assert_eq!(ended.trouble.detail, "refused by 192.0.2.1");
        assert!(breaker.is_calm() && breaker.outage().is_none());
    }

    #[test]
    fn a_line_that_is_refused_while_others_pass_is_refused_for_itself() {
        let breaker = Arc::new(Breaker::new(PAUSES));
        breaker.passed();
        let before = breaker.passes();
        assert!(matches!(fail(&breaker, 0, 1, Kind::Forbidden, None), Verdict::Hold(_)));
        breaker.passed();
        assert!(matches!(fail(&breaker, 1, 1, Kind::Forbidden, Some(before)), Verdict::Own));
        assert!(breaker.is_calm());
        // Alone, with nobody to compare it with, it ends after a few tries; a refused key does not.
        for (kind, ends) in [(Kind::Forbidden, true), (Kind::Unauthorized, false)] {
            let before = breaker.passes();
            fail(&breaker, 0, 1, kind, None);
            assert!(matches!(fail(&breaker, 1, 1, kind, Some(before)), Verdict::Wait(_)));
            let mut now = 1;
            let owned = (0..20).any(|_| {
                let (waited, verdict) = probe(&breaker, now, 1, kind);
                now += waited;
                matches!(verdict, Verdict::Own)
            });
            assert_eq!(owned, ends);
            breaker.close();
        }
    }

    #[test]
    fn errors_open_it_after_five_lines_in_a_row_and_one_line_never_does() {
        let breaker = Arc::new(Breaker::new(PAUSES));
        for _ in 0..20 {
            assert!(matches!(fail(&breaker, 0, 1, Kind::Failed, None), Verdict::Hold(_)));
        }
        for line in 2..5 {
            assert!(matches!(fail(&breaker, 0, line, Kind::Failed, None), Verdict::Hold(_)));
        }
        breaker.passed();
        for line in 1..5 {
            assert!(matches!(fail(&breaker, 0, line, Kind::Failed, None), Verdict::Hold(_)));
        }
        assert!(matches!(fail(&breaker, 0, 5, Kind::Failed, None), Verdict::Wait(_)));
        assert_eq!(breaker.tries(1), 1);
        assert_eq!(breaker.tries(9), 0);
    }

    #[test]
    fn lines_are_given_up_after_the_time_that_the_operator_sets() {
        let breaker = Arc::new(Breaker::new(Pauses {
            give_up_after: Some(Duration::from_secs(10)),
            ..PAUSES
        }));
        fail(&breaker, 0, 1, Kind::Unreachable, None);
        fail(&breaker, 0, 2, Kind::Unreachable, None);
        assert!(matches!(breaker.check(at(9), 1), Gate::Probe));
        assert!(matches!(breaker.check(at(11), 1), Gate::GiveUp(_)));
    }

    #[test]
    fn a_probe_that_is_given_up_makes_room_for_the_next() {
        let breaker = Arc::new(Breaker::new(PAUSES));
        fail(&breaker, 0, 1, Kind::Unreachable, None);
        fail(&breaker, 0, 2, Kind::Unreachable, None);
        drop(breaker.enter(at(5), 1));
        assert!(matches!(breaker.enter(at(5), 1), (Gate::Probe, Some(_))));
        breaker.rests("batch_1", 7);
        assert_eq!(breaker.outage().unwrap().waiting, 7);
        breaker.wakes("batch_1");
        assert_eq!(breaker.outage().unwrap().waiting, 0);
    }
}
