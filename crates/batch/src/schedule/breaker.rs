//! Circuit breaker for each plugin, tenant and endpoint.
//!
//! **Problem.** A provider can be unavailable for minutes, a key can be rotated, an account can run
//! out of quota. Without a breaker, each line of a batch would spend all its attempts on a failure
//! that is not the fault of the line.
//!
//! **Fault of the line or of the provider.** A single refusal proves nothing: a flagged prompt gets
//! 403 while other requests succeed. So each failure adds to a suspicion score, and any success
//! resets the score. The failed line is held for a moment and tried again. If a refused line is
//! refused again although other lines have succeeded in between, the refusal is the fault of the
//! line, and the line fails.
//!
//! **Opening.** Two refusals in a row open the breaker. The second refusal comes from another line
//! if the batch has one. Server errors and requests without a response weigh less: the breaker
//! opens after five different lines. A missing or paused plugin opens the breaker at once.
//!
//! **Open.** No request is sent except one half-open probe at a time. The pauses between probes
//! grow exponentially, with jitter. Waiting lines stay in the input file and use no memory and no
//! task. Any success closes the breaker, unless the plugin is paused or missing. Each probe uses
//! another line, so that a line with a fault of its own cannot keep the breaker open. A reloaded
//! plugin, which may have a new key, is probed at once.
//!
//! **Only one line left.** A line that is the only one to fail has no other line to compare with.
//! If the provider has accepted the credential before, such a line fails after a few 403 responses.
//!
//! **Cost.** A closed breaker without suspicion costs one atomic load per line.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::BatchId;
use batchwright_plugin::types::Answer;

/// Suspicion score at which the breaker opens.
const OPEN_THRESHOLD: u32 = 5;

/// Suspicion score of a refusal: two refusals open the breaker.
const REFUSAL_WEIGHT: u32 = 3;

/// Suspicion score of a server error or of a missing response.
const FAILURE_WEIGHT: u32 = 1;

/// Hold time of a failed line that has not opened the breaker.
const HOLD_DURATION: Duration = Duration::from_secs(1);

/// Minimum wait of a line while a probe is in flight.
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// Number of 403 responses after which a line fails if no other line has failed and the credential
/// has worked before.
const MAX_FORBIDDEN_ATTEMPTS: u32 = 5;

/// Maximum number of entries in each collection of a breaker.
const MAX_TRACKED_ENTRIES: usize = 1024;

/// Kind of provider failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The request was not sent: DNS, connection or TLS failed.
    Unreachable,
    /// The provider refused the credential.
    Unauthorized,
    /// The provider refused the request, because of either the credential or the content.
    Forbidden,
    /// The account has no money or quota left.
    Quota,
    /// The provider reported a server error or sent no response.
    Failed,
    /// No plugin serves the model, or the plugin is paused.
    Plugin,
    /// The project has no credential for the plugin.
    Credential,
}

impl FailureKind {
    /// Returns true if the failure may be the fault of the line.
    fn may_be_fault_of_line(self) -> bool {
        matches!(self, Self::Unauthorized | Self::Forbidden | Self::Quota)
    }

    /// Returns the suspicion score of the failure.
    fn weight(self) -> u32 {
        if self == Self::Failed { FAILURE_WEIGHT } else { REFUSAL_WEIGHT }
    }
}

/// Failure of a provider.
#[derive(Clone, Debug)]
pub struct ProviderFailure {
    /// Kind of the failure.
    pub kind: FailureKind,
    /// Cause for the client: one sentence without hosts, addresses or paths.
    pub message: String,
    /// Cause for the operator, in full.
    pub detail: String,
    /// Answer for a line that has waited longer than [`ProbePauses::give_up_after`].
    pub answer: Answer,
}

/// Decision about a line before it is sent.
#[derive(Debug)]
pub(crate) enum BreakerDecision {
    /// The line may be sent.
    Allow,
    /// The line may be sent as the half-open probe.
    Probe,
    /// The line must wait until this time.
    Wait(Timestamp),
    /// The outage has exceeded [`ProbePauses::give_up_after`]. The line ends with this answer.
    GiveUp(Answer),
}

/// Decision about a line that failed.
#[derive(Debug)]
pub(crate) enum FailureVerdict {
    /// The fault is undecided. The line is tried again at this time.
    Hold(Timestamp),
    /// The breaker is open. The line waits until this time.
    Wait(Timestamp),
    /// The failure is the fault of the line, which ends with an error.
    LineAtFault,
}

/// Pauses between probes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbePauses {
    /// First pause.
    pub first: Duration,
    /// Upper limit of a pause.
    pub longest: Duration,
    /// Maximum wait of a line, or `None` for the completion window of its batch.
    pub give_up_after: Option<Duration>,
}

/// State of an open breaker, for status reports.
#[derive(Clone, Debug)]
pub struct Outage {
    /// Latest failure.
    pub trouble: ProviderFailure,
    /// Time of the first failure after the last success.
    pub since: Timestamp,
    /// Time of the next probe.
    pub next_probe: Timestamp,
    /// Number of waiting requests in parked batches.
    pub waiting: u64,
}

/// Circuit breaker of a plugin, tenant and endpoint.
pub(crate) struct Breaker {
    pauses: ProbePauses,
    /// Successes since the breaker was created.
    successes: AtomicU64,
    /// True if the breaker is closed and there is no suspicion. Read for every line.
    healthy: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Time of the first failure after the last success.
    since: Option<Timestamp>,
    suspicion: u32,
    /// Lines that have failed since then.
    failed_lines: HashSet<u64>,
    open: Option<Open>,
    /// Failed attempts of each line since then.
    attempts: HashMap<u64, u32>,
    /// Waiting requests of each parked batch.
    waiting_by_batch: HashMap<BatchId, u64>,
}

struct Open {
    trouble: ProviderFailure,
    pause: Duration,
    next: Timestamp,
    probing: bool,
    /// Identity of the loaded plugin. Failures of one identity do not delay probes of another.
    plugin: usize,
}

/// Guard of a probe in flight. Dropping the guard allows the next probe.
pub(crate) struct Probe(Arc<Breaker>);

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(open) = &mut self.0.lock().open {
            open.probing = false;
        }
    }
}

impl Breaker {
    /// Creates a closed breaker.
    pub(crate) fn new(pauses: ProbePauses) -> Self {
        Self {
            pauses,
            successes: AtomicU64::new(0),
            healthy: AtomicBool::new(true),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if the breaker is closed and there is no suspicion.
    pub(crate) fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    /// Decides whether this plugin may send a line now.
    pub(crate) fn check(&self, now: Timestamp, plugin: usize) -> BreakerDecision {
        if self.is_healthy() {
            return BreakerDecision::Allow;
        }
        self.lock().decide(now, plugin, self.pauses)
    }

    /// Decides like [`Self::check`] and reserves the probe if the decision is
    /// [`BreakerDecision::Probe`].
    pub(crate) fn enter(
        self: &Arc<Self>,
        now: Timestamp,
        plugin: usize,
    ) -> (BreakerDecision, Option<Probe>) {
        self.enter_with(now, plugin, self.pauses)
    }

    fn enter_with(
        self: &Arc<Self>,
        now: Timestamp,
        plugin: usize,
        pauses: ProbePauses,
    ) -> (BreakerDecision, Option<Probe>) {
        if self.is_healthy() {
            return (BreakerDecision::Allow, None);
        }
        let mut state = self.lock();
        let decision = state.decide(now, plugin, pauses);
        if matches!(decision, BreakerDecision::Probe)
            && let Some(open) = &mut state.open
        {
            open.probing = true;
            drop(state);
            return (decision, Some(Probe(self.clone())));
        }
        (decision, None)
    }

    /// Decides like [`Self::enter`] about a request whose client waits: however long the outage has
    /// lasted, a request is sent as a probe from time to time.
    pub(crate) fn enter_online(
        self: &Arc<Self>,
        now: Timestamp,
        plugin: usize,
    ) -> (BreakerDecision, Option<Probe>) {
        self.enter_with(now, plugin, ProbePauses { give_up_after: None, ..self.pauses })
    }

    /// Returns the number of failed attempts of a line.
    pub(crate) fn failed_attempts(&self, line: u64) -> u32 {
        if self.is_healthy() { 0 } else { self.lock().attempts.get(&line).copied().unwrap_or(0) }
    }

    /// Returns the number of successes so far. A refused line stores this number.
    pub(crate) fn successes(&self) -> u64 {
        self.successes.load(Ordering::Relaxed)
    }

    /// Records a success and returns the outage that the success has ended, if any.
    pub(crate) fn record_success(&self) -> Option<Outage> {
        self.successes.fetch_add(1, Ordering::Relaxed);
        if self.is_healthy() {
            return None;
        }
        // A request that was in flight when its plugin was paused does not end the pause.
        if self.lock().open.as_ref().is_some_and(|open| open.trouble.kind == FailureKind::Plugin) {
            return None;
        }
        self.close()
    }

    /// Closes the breaker if it is open because there was no credential.
    pub(crate) fn credential_found(&self) {
        let kind = || self.lock().open.as_ref().map(|open| open.trouble.kind);
        if !self.is_healthy() && kind() == Some(FailureKind::Credential) {
            self.close();
        }
    }

    /// Closes the breaker, resets the suspicion and returns the outage that has ended, if any.
    pub(crate) fn close(&self) -> Option<Outage> {
        let mut state = self.lock();
        let ended = state.outage();
        *state = State::default();
        self.healthy.store(true, Ordering::Relaxed);
        ended
    }

    /// Records a failed line and decides about the line.
    ///
    /// `refused_at` is the value of [`Self::successes`] when the line was refused before. The
    /// second value is true if this failure has opened the breaker.
    pub(crate) fn record_failure(
        &self,
        now: Timestamp,
        line: u64,
        plugin: usize,
        refused_at: Option<u64>,
        trouble: ProviderFailure,
        probe: bool,
    ) -> (FailureVerdict, bool) {
        let successes = self.successes();
        if trouble.kind.may_be_fault_of_line()
            && refused_at.is_some_and(|before| successes > before)
        {
            return (FailureVerdict::LineAtFault, false);
        }
        let mut state = self.lock();
        self.healthy.store(false, Ordering::Relaxed);
        state.since.get_or_insert(now);
        let is_new =
            state.failed_lines.len() < MAX_TRACKED_ENTRIES && state.failed_lines.insert(line);
        if state.attempts.len() < MAX_TRACKED_ENTRIES || state.attempts.contains_key(&line) {
            let attempts = state.attempts.entry(line).or_default();
            *attempts = attempts.saturating_add(1);
        }
        let attempts = state.attempts.get(&line).copied().unwrap_or(0);
        let is_only_line = state.failed_lines.len() == 1;
        if let Some(open) = &mut state.open {
            if probe {
                open.pause = open.pause.saturating_mul(2).min(self.pauses.longest);
                open.next = now.after(jittered(open.pause));
                open.probing = false;
                open.trouble = trouble;
            }
            let (kind, next) = (open.trouble.kind, open.next);
            if kind == FailureKind::Forbidden
                && is_only_line
                && successes > 0
                && attempts >= MAX_FORBIDDEN_ATTEMPTS
            {
                *state = State::default();
                self.healthy.store(true, Ordering::Relaxed);
                return (FailureVerdict::LineAtFault, false);
            }
            return (FailureVerdict::Wait(next), false);
        }
        if is_new || trouble.kind != FailureKind::Failed {
            state.suspicion = state.suspicion.saturating_add(trouble.kind.weight());
        }
        let is_certain = matches!(trouble.kind, FailureKind::Plugin | FailureKind::Credential);
        if state.suspicion < OPEN_THRESHOLD && !is_certain {
            return (
                FailureVerdict::Hold(
                    now.after(HOLD_DURATION.min(self.pauses.first.saturating_mul(2))),
                ),
                false,
            );
        }
        let next = now.after(jittered(self.pauses.first));
        state.open = Some(Open { trouble, pause: self.pauses.first, next, probing: false, plugin });
        (FailureVerdict::Wait(next), true)
    }

    /// Returns the outage if the breaker is open.
    pub(crate) fn outage(&self) -> Option<Outage> {
        if self.is_healthy() { None } else { self.lock().outage() }
    }

    /// Registers a parked batch and the number of its waiting requests.
    pub(crate) fn add_waiting(&self, batch: &BatchId, requests: u64) {
        let mut state = self.lock();
        if state.open.is_some() && state.waiting_by_batch.len() < MAX_TRACKED_ENTRIES {
            state.waiting_by_batch.insert(batch.clone(), requests);
        }
    }

    /// Returns true if a batch is registered as parked.
    pub(crate) fn has_waiting(&self, batch: &BatchId) -> bool {
        !self.is_healthy() && self.lock().waiting_by_batch.contains_key(batch)
    }

    /// Removes a batch from the parked batches.
    pub(crate) fn remove_waiting(&self, batch: &BatchId) {
        if !self.is_healthy() {
            self.lock().waiting_by_batch.remove(batch);
        }
    }
}

impl State {
    /// Decides whether a line may be sent now.
    fn decide(&self, now: Timestamp, plugin: usize, pauses: ProbePauses) -> BreakerDecision {
        let Some(open) = &self.open else { return BreakerDecision::Allow };
        let waited = self.since.map_or(Duration::ZERO, |since| since.until(now));
        if pauses.give_up_after.is_some_and(|longest| waited > longest) {
            return BreakerDecision::GiveUp(open.trouble.answer.clone());
        }
        if open.probing {
            return BreakerDecision::Wait(open.next.max(now.after(PROBE_WAIT)));
        }
        if open.next > now && open.plugin == plugin {
            return BreakerDecision::Wait(open.next);
        }
        BreakerDecision::Probe
    }

    fn outage(&self) -> Option<Outage> {
        let open = self.open.as_ref()?;
        Some(Outage {
            trouble: open.trouble.clone(),
            since: self.since.unwrap_or(open.next),
            next_probe: open.next,
            waiting: self.waiting_by_batch.values().fold(0, |sum, more| sum.saturating_add(*more)),
        })
    }
}

/// Shortens a pause by up to a fifth at random, so that servers do not probe at the same time.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.8 + fastrand::f64() / 5.0)
}

#[cfg(test)]
mod tests;
