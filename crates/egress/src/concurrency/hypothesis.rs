//! Test of a raised or lowered limit: whether refusals depend on the concurrency.

use std::time::Duration;

use tokio::time::Instant;

use crate::concurrency::{
    Limit, MAX_GAP, MAX_PATIENCE_ROUNDS, MAX_RANDOM_SHARE, MIN_SHARE_INCREASE, RANDOM_SHARE_WINDOW,
};

/// Evidence, for either hypothesis, that ends a test.
const DECISION_EVIDENCE: f64 = 2.5;

/// Minimum outcomes of a test that finds refusals random; the first outcomes after a change may
/// reflect the previous limit.
const MIN_RANDOM_OUTCOMES: u32 = 10;

/// Maximum outcomes of a test.
const MAX_TEST_OUTCOMES: u32 = 48;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(super) outcomes: u32,
    pub(super) refused: u32,
}

impl Counts {
    fn add(&mut self, refused: bool) {
        self.outcomes = self.outcomes.saturating_add(1);
        self.refused = self.refused.saturating_add(u32::from(refused));
    }

    pub(super) fn share(self) -> f64 {
        f64::from(self.refused) / f64::from(self.outcomes.max(1))
    }
}

/// Test in progress: compares a lowered limit with the limit before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Test {
    /// Limit before the first of consecutive lowerings.
    before: f64,
    /// Factor of the last lowering.
    lowered_to: f64,
    /// Outcomes before the last lowering.
    first: Counts,
    /// Outcomes since the last lowering.
    now: Counts,
    /// Log-likelihood ratio: positive for random refusals, negative for a limit.
    evidence: f64,
}

impl Test {
    /// Returns true if the evidence or the number of outcomes is sufficient.
    fn is_over(&self) -> bool {
        let random = self.evidence > DECISION_EVIDENCE && self.now.outcomes >= MIN_RANDOM_OUTCOMES;
        random || self.evidence < -DECISION_EVIDENCE || self.now.outcomes >= MAX_TEST_OUTCOMES
    }

    /// Returns the expected shares of refusals at the lower limit: if refusals are random, and if
    /// they are those of a limit.
    fn hypotheses(&self, known: f64) -> (f64, f64) {
        let share = self.first.share().clamp(0.03, 0.95);
        let limited =
            (1.0 - (1.0 - share) / self.lowered_to.max(0.01)).max(known).clamp(0.01, share * 0.9);
        (share, limited)
    }
}

impl Limit {
    /// Adds an outcome to the test in progress, or to the CUSUM sum.
    pub(super) fn count(&mut self, refused: bool) {
        if let Some(test) = &mut self.test {
            test.now.add(refused);
            let (random, limited) = test.hypotheses(self.random_share);
            test.evidence += if refused {
                (random / limited).ln()
            } else {
                ((1.0 - random) / (1.0 - limited)).ln()
            };
            let test = *test;
            if !refused && test.is_over() {
                self.end_test(test);
            }
            return;
        }
        // Without recent refusals, one more acceptance is no evidence.
        if !refused && self.evidence_of_change <= 0.0 && self.random_share <= 0.0 {
            return;
        }
        let known = self.random_share.clamp(0.01, 0.9);
        let more = known + MIN_SHARE_INCREASE * (1.0 - known);
        self.suspected.add(refused);
        self.evidence_of_change +=
            if refused { (more / known).ln() } else { ((1.0 - more) / (1.0 - known)).ln() };
        if self.evidence_of_change <= 0.0 {
            // No change: the refusals since then are random.
            let weight = f64::from(self.suspected.outcomes.min(RANDOM_SHARE_WINDOW))
                / f64::from(RANDOM_SHARE_WINDOW);
            self.random_share += (self.suspected.share() - self.random_share) * weight;
            self.evidence_of_change = 0.0;
            self.suspected = Counts::default();
        }
    }

    /// Lowers the limit further, or ends the test, after a refusal during a test.
    pub(super) fn decide(&mut self, now: Instant, test: Test, in_flight: usize) {
        let share = test.now.share();
        let worse = test.now.refused >= 3 && share > test.first.share() + 0.15;
        let hopeless = test.now.refused >= 3 && share > MAX_RANDOM_SHARE;
        if worse || hopeless {
            self.lower(now, test.now, share, in_flight);
        } else if test.is_over() {
            self.end_test(test);
        }
    }

    /// Ends a test: restores the limit if the refusals are random, otherwise confirms the ceiling.
    fn end_test(&mut self, test: Test) {
        self.test = None;
        self.evidence_of_change = 0.0;
        self.suspected = Counts::default();
        self.accepted_in_round = 0.0;
        let all = Counts {
            outcomes: test.first.outcomes.saturating_add(test.now.outcomes),
            refused: test.first.refused.saturating_add(test.now.refused),
        };
        let random = test.evidence > 0.0 && all.share() <= MAX_RANDOM_SHARE;
        if random {
            self.random_share = self.random_share.max(all.share());
            self.limit = self.limit.max(test.before);
            self.ceiling = None;
        } else {
            let known = self.ceiling.unwrap_or(self.limit);
            self.limit = self.limit.max(0.75 * known.min(test.before));
            self.patience = (self.patience * 2.0).min(MAX_PATIENCE_ROUNDS);
        }
    }

    /// Lowers the limit and starts a test.
    pub(super) fn lower(&mut self, now: Instant, first: Counts, share: f64, in_flight: usize) {
        let in_use = f64::from(u32::try_from(in_flight).unwrap_or(u32::MAX)).max(1.0);
        let before = if self.limit < 1.0 { self.limit } else { self.limit.min(in_use) };
        let factor = ((1.0 - share) * 0.85).max(0.5);
        let floor = self.usual_seconds.unwrap_or(0.1).max(0.001) / MAX_GAP.as_secs_f64();
        let to = (before * factor).max(floor.min(1.0));
        // Consecutive lowerings keep the limit before the first one.
        let original = self.test.map_or(before, |test| test.before);
        self.ceiling = Some(if self.test.is_some() {
            self.ceiling.unwrap_or(before).min(before.max(1.0))
        } else {
            before
        });
        self.test = Some(Test {
            before: original,
            lowered_to: to / before,
            first,
            now: Counts::default(),
            evidence: 0.0,
        });
        self.limit = to;
        self.recovering = false;
        self.step = 0.0;
        self.accepted_in_round = 0.0;
        self.rounds_at_ceiling = 0.0;
        self.has_grown = false;
        self.evidence_of_change = 0.0;
        self.suspected = Counts::default();
        self.epoch = self.epoch.wrapping_add(1);
        // A short pause lets the refusals of exchanges in flight arrive first.
        let pause = Duration::from_secs_f64((self.refusal_seconds * 2.0).clamp(0.002, 0.2));
        self.closed_until = self.closed_until.max(now.checked_add(pause));
    }
}
