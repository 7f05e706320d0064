//! Estimate of a provider's concurrency limit, from the requests that it accepts and refuses.
//!
//! **Problem.** A single refusal carries little information. Some providers refuse a few percent of
//! all requests at random, at any load; a lower rate then only costs throughput. Other providers
//! refuse everything beyond a limit, and every request beyond it is wasted. The two cases differ
//! only at a lower rate: the share of random refusals stays, and the refusals of a limit disappear.
//! Additive-increase, multiplicative-decrease control does not make this distinction.
//!
//! **Detection.** Normally the limit accumulates evidence that the share of refusals exceeds the
//! known random share. This is a CUSUM test: each outcome adds its log-likelihood ratio, and a sum
//! that falls to zero starts again. A sum above [`ALARM_EVIDENCE`] is an alarm.
//!
//! **Test.** An alarm lowers the limit for a short time, and a sequential probability ratio test
//! (SPRT) compares two hypotheses: the share of refusals stays, or the number of accepted requests
//! stays. If the share stays, the refusals are random: the share is remembered, and the old limit
//! returns. Otherwise the limit is the provider's: the lower limit stays as a starting point. It
//! grows quickly to just below the ceiling, where refusals began, and slowly beyond the ceiling.
//!
//! **Bias.** A refusal arrives sooner than a response, so a count of arrivals alone would overstate
//! refusals. An exchange that has no refusal by the usual time of refusals counts as accepted.
//! Outcomes of exchanges that started before the limit was lowered (an earlier epoch) are ignored.
//!
//! **Limits below one.** A limit below one is a rate: one exchange in flight, with gaps between
//! starts. A refused exchange holds its permit for the usual time of an exchange, at most
//! [`MAX_HOLD`], so that quick refusals do not raise the rate of requests.
//!
//! **Start.** A new limit opens slowly, so that a provider that refuses most requests refuses few.
//!
//! This module neither waits nor reads a clock, so that a simulation can drive it;
//! `docs/operating/providers.md` has the results.

mod hypothesis;

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::concurrency::hypothesis::{Counts, Test};

/// Evidence that raises an alarm: the log-likelihood ratio of a change against no change.
const ALARM_EVIDENCE: f64 = 6.0;

/// Maximum share of refusals that counts as random.
pub(crate) const MAX_RANDOM_SHARE: f64 = 0.4;

/// Number of outcomes over which the random share is averaged.
pub(crate) const RANDOM_SHARE_WINDOW: u32 = 512;

/// Minimum increase of the share of refusals that the CUSUM test detects.
pub(crate) const MIN_SHARE_INCREASE: f64 = 0.15;

/// Maximum gap between two exchanges, unless the provider asks for a longer gap.
pub(crate) const MAX_GAP: Duration = Duration::from_secs(3);

/// Maximum pause of all requests when a provider asks some requests to wait. `Retry-After` may
/// apply to one of several models; the refused requests themselves wait longer.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Maximum time that a refused exchange holds its permit.
const MAX_HOLD: Duration = Duration::from_millis(500);

/// Consecutive refusals at a limit below one that indicate an outage instead of a limit.
const OUTAGE_REFUSALS: u32 = 8;

/// Initial number of rounds just below a ceiling before the limit grows beyond it.
const INITIAL_PATIENCE_ROUNDS: f64 = 4.0;
/// Maximum number of rounds just below a ceiling before the limit grows beyond it.
pub(crate) const MAX_PATIENCE_ROUNDS: f64 = 32.0;

/// Number of exchanges that may start before anything is known about the provider.
const SLOW_START_EXCHANGES: f64 = 8.0;
/// Interval at which the slow start opens one more exchange.
const SLOW_START_INTERVAL: Duration = Duration::from_micros(2500);

/// Outcome of a request, as evidence about the provider's limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitFeedback {
    /// The provider responded, with success or an error.
    Accepted,
    /// The provider refused the request for now, with the wait that it asks for.
    Refused(Option<Duration>),
    /// The provider refused this request repeatedly while it accepted others, so the refusal is no
    /// evidence about the provider's limit.
    RefusedAlone,
    /// The provider sent no response, which is no evidence about its limit.
    Unknown,
}

/// Time at which the next exchange may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Immediately.
    Now,
    /// At this time.
    At(Instant),
    /// After another exchange has ended.
    Later,
}

/// Start of an exchange: its time, number and epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Began {
    /// Time at which the exchange started.
    pub at: Instant,
    number: u64,
    epoch: u32,
}

/// Estimator of the concurrency limit of one plugin's provider.
pub(crate) struct Limit {
    /// Operator's limit.
    max: f64,
    /// Estimated maximum of exchanges in flight; below one, a rate.
    limit: f64,
    /// Slow start: number of exchanges that are open so far.
    slow_start: f64,
    /// Time at which the slow start last opened one more exchange.
    slow_start_at: Option<Instant>,
    /// Limit at which the provider last refused.
    ceiling: Option<f64>,
    /// Growth per round beyond the ceiling.
    step: f64,
    /// Requests accepted in this round; a round is as many requests as the limit.
    accepted_in_round: f64,
    /// Rounds just below the ceiling before the limit grows beyond it; doubles each time that a
    /// test confirms the ceiling.
    patience: f64,
    /// True if a round was accepted since the limit was lowered.
    has_grown: bool,
    /// Rounds spent just below the ceiling.
    rounds_at_ceiling: f64,
    /// True after an outage, which is no evidence about the current limit: the limit then doubles.
    recovering: bool,
    /// Share of refusals that is random.
    random_share: f64,
    /// CUSUM sum: log-likelihood ratio of more refusals than the random share.
    evidence_of_change: f64,
    /// Outcomes since the CUSUM sum was last zero.
    suspected: Counts,
    test: Option<Test>,
    /// Number of lowerings; an outcome of an exchange from before the last lowering is ignored.
    epoch: u32,
    /// Consecutive refusals.
    consecutive_refusals: u32,
    /// Moving average of the duration of accepted exchanges, in seconds.
    usual_seconds: Option<f64>,
    /// Moving average of the time until a refusal, in seconds.
    refusal_seconds: f64,
    /// Start of the last exchange.
    last_started: Option<Instant>,
    /// Exchanges so recent that a refusal is still possible, oldest first.
    undecided: VecDeque<Began>,
    /// Number of exchanges started.
    started: u64,
    /// End of a pause of all requests.
    closed_until: Option<Instant>,
    /// Remaining requests that the provider reported, and their reset.
    remaining: Option<(u64, Instant)>,
    /// Number of the exchange whose response reported `remaining`.
    reported_by: Option<u64>,
}

impl Limit {
    /// Returns a limit that never exceeds `max` exchanges in flight.
    pub(crate) fn new(max: usize) -> Self {
        let max = f64::from(u32::try_from(max.max(1)).unwrap_or(u32::MAX));
        Self {
            max,
            limit: max,
            slow_start: SLOW_START_EXCHANGES.min(max),
            slow_start_at: None,
            ceiling: None,
            step: 0.0,
            accepted_in_round: 0.0,
            patience: INITIAL_PATIENCE_ROUNDS,
            has_grown: true,
            rounds_at_ceiling: 0.0,
            recovering: false,
            random_share: 0.0,
            evidence_of_change: 0.0,
            suspected: Counts::default(),
            test: None,
            epoch: 0,
            consecutive_refusals: 0,
            usual_seconds: None,
            refusal_seconds: 0.0,
            last_started: None,
            undecided: VecDeque::new(),
            started: 0,
            closed_until: None,
            remaining: None,
            reported_by: None,
        }
    }

    /// Returns the current estimate; below one, a rate.
    pub(crate) fn current(&self) -> f64 {
        self.limit
    }

    /// Returns the average duration of accepted exchanges, once known.
    pub(crate) fn usual_time(&self) -> Option<Duration> {
        self.usual_seconds.map(Duration::from_secs_f64)
    }

    /// Returns the end of a pause of all requests, if one is in effect at `now`.
    pub(crate) fn closed_until(&self, now: Instant) -> Option<Instant> {
        let spent = self
            .remaining
            .filter(|(left, until)| *left == 0 && *until > now)
            .map(|(_, until)| until);
        self.closed_until.filter(|until| *until > now).max(spent)
    }

    /// Returns when one more exchange may start, with `in_flight` exchanges in flight.
    pub(crate) fn next(&mut self, now: Instant, in_flight: usize) -> Next {
        if let Some(until) = self.closed_until(now) {
            return Next::At(until);
        }
        let in_flight = f64::from(u32::try_from(in_flight).unwrap_or(u32::MAX));
        if in_flight >= self.limit.max(1.0).floor() {
            return Next::Later;
        }
        if self.limit < 1.0
            && let Some(last) = self.last_started
        {
            let next = last.checked_add(self.gap()).unwrap_or(last);
            return if next > now { Next::At(next) } else { Next::Now };
        }
        if in_flight >= self.slow_start.floor() {
            // Time also opens the slow start, because a slow provider would keep it closed.
            let slow_start_at = *self.slow_start_at.get_or_insert(now);
            let next = slow_start_at.checked_add(SLOW_START_INTERVAL).unwrap_or(now);
            if next > now {
                return Next::At(next);
            }
            self.slow_start_at = Some(now);
            self.slow_start += 1.0;
        }
        Next::Now
    }

    /// Records the start of an exchange.
    pub(crate) fn begin(&mut self, now: Instant) -> Began {
        self.last_started = Some(now);
        if let Some((left, _)) = &mut self.remaining {
            *left = left.saturating_sub(1);
        }
        self.started = self.started.wrapping_add(1);
        let began = Began { at: now, number: self.started, epoch: self.epoch };
        self.assume_accepted(now);
        self.undecided.push_back(began);
        began
    }

    /// Counts exchanges as accepted if no refusal has arrived by the usual time of refusals.
    /// Refusals arrive sooner than responses, so a count of arrivals alone would overstate
    /// refusals.
    fn assume_accepted(&mut self, now: Instant) {
        let refusal_window =
            Duration::from_secs_f64((self.refusal_seconds * 3.0).clamp(0.005, 1.0));
        while let Some(first) = self.undecided.front()
            && now.saturating_duration_since(first.at) > refusal_window
        {
            let accepted = first.epoch == self.epoch;
            self.undecided.pop_front();
            if accepted {
                self.count(false);
            }
        }
    }

    /// Removes an exchange from the undecided ones; returns false if it was already counted.
    fn take_undecided(&mut self, began: Began) -> bool {
        let index =
            self.undecided.binary_search_by_key(&began.number, |undecided| undecided.number);
        index.is_ok_and(|index| self.undecided.remove(index).is_some())
    }

    /// Records the remaining requests that a response to the exchange `answered` reported. The
    /// report does not include exchanges that started later, so the remainder shrinks by their
    /// number.
    pub(crate) fn update_remaining(&mut self, remaining: u64, until: Instant, answered: Began) {
        // Responses may arrive out of order.
        if self.reported_by.is_some_and(|last| last > answered.number) {
            return;
        }
        self.reported_by = Some(answered.number);
        let since = self.started.wrapping_sub(answered.number);
        self.remaining = Some((remaining.saturating_sub(since), until));
    }

    /// Records the outcome of an exchange. `in_flight` includes that exchange. Returns the time
    /// until which the exchange holds its permit.
    pub(crate) fn ended(
        &mut self,
        now: Instant,
        began: Began,
        taken: LimitFeedback,
        in_flight: usize,
    ) -> Option<Instant> {
        let took = now.saturating_duration_since(began.at).as_secs_f64();
        self.assume_accepted(now);
        let uncounted = self.take_undecided(began);
        match taken {
            LimitFeedback::Unknown | LimitFeedback::RefusedAlone => None,
            LimitFeedback::Accepted => {
                let known = self.usual_seconds.unwrap_or(took);
                self.usual_seconds = Some(known + (took - known) / 16.0);
                self.slow_start = (self.slow_start + 1.0).min(self.max);
                if began.epoch == self.epoch {
                    self.on_accepted(uncounted);
                }
                None
            }
            LimitFeedback::Refused(asked) => {
                self.refusal_seconds += (took - self.refusal_seconds) / 4.0;
                if began.epoch == self.epoch {
                    self.on_refused(now, asked, in_flight);
                }
                let hold =
                    Duration::from_secs_f64((self.usual_seconds.unwrap_or(0.0) - took).max(0.0))
                        .min(MAX_HOLD);
                now.checked_add(hold)
            }
        }
    }

    /// Returns the gap between two starts at a limit below one.
    fn gap(&self) -> Duration {
        let usual_seconds = self.usual_seconds.unwrap_or(0.1).max(0.001);
        Duration::from_secs_f64((usual_seconds / self.limit.max(1e-6)).min(MAX_GAP.as_secs_f64()))
    }

    fn on_accepted(&mut self, uncounted: bool) {
        if self.consecutive_refusals >= OUTAGE_REFUSALS && self.limit < 1.0 {
            self.recovering = true;
            self.ceiling = None;
            self.test = None;
            self.limit = (self.limit * 4.0).min(1.0);
        }
        self.consecutive_refusals = 0;
        if uncounted {
            self.count(false);
        }
        if self.test.is_some() {
            return;
        }
        self.accepted_in_round += 1.0;
        if self.limit < self.max && self.accepted_in_round >= self.limit.max(1.0) {
            self.accepted_in_round = 0.0;
            self.grow();
        }
    }

    /// Raises the limit after a round of accepted requests.
    fn grow(&mut self) {
        self.has_grown = true;
        let factor = match self.ceiling {
            _ if self.recovering => 2.0,
            Some(ceiling) if self.limit < 0.93 * ceiling => {
                (0.95 * ceiling / self.limit).min(1.0 + 1.0 / 16.0)
            }
            Some(_) if self.rounds_at_ceiling < self.patience => {
                self.rounds_at_ceiling += 1.0;
                1.0
            }
            Some(ceiling) => {
                if self.limit > 1.3 * ceiling {
                    // The provider's limit has moved.
                    self.patience = INITIAL_PATIENCE_ROUNDS;
                }
                self.step = (self.step * 1.5).clamp(1.0 / 32.0, 0.25);
                1.0 + self.step
            }
            None => 1.25,
        };
        self.limit = (self.limit * factor).min(self.max);
        if self.limit >= self.max {
            self.ceiling = None;
            self.recovering = false;
        }
    }

    fn on_refused(&mut self, now: Instant, asked: Option<Duration>, in_flight: usize) {
        self.consecutive_refusals = self.consecutive_refusals.saturating_add(1);
        // All requests are refused, so the wait applies to all requests.
        if self.consecutive_refusals >= 3
            && let Some(asked) = asked
        {
            let until = now.checked_add(asked.min(MAX_PAUSE)).unwrap_or(now);
            self.closed_until = self.closed_until.max(Some(until));
        }
        self.count(true);
        if let Some(test) = self.test {
            self.decide(now, test, in_flight);
        } else if self.evidence_of_change > ALARM_EVIDENCE {
            // Exchanges in flight for longer than a refusal takes count as accepted. Directly after
            // a lowering, those exchanges started at the higher limit, and do not count.
            let accepted =
                u32::try_from(in_flight).unwrap_or(u32::MAX).saturating_sub(self.suspected.refused);
            let outcomes =
                self.suspected.outcomes.max(self.suspected.refused.saturating_add(accepted));
            let all = Counts { outcomes, ..self.suspected };
            let share = if self.has_grown { all.share() } else { self.suspected.share() };
            self.lower(now, self.suspected, share, in_flight);
        }
    }
}

#[cfg(test)]
mod simulation;
