//! How many exchanges of a plugin may be under way: found out from what the provider accepts and refuses.
//!
//! **A refusal says little.** Some providers refuse a few requests in a hundred at random, however few are sent: to send fewer then is to
//! lose speed for nothing. Others refuse what is beyond a limit, and everything above it is wasted. What tells them apart is what happens
//! at a lower speed: random refusals stay as frequent, those of a limit go away.
//!
//! **So it tests.** Normally it counts evidence that more is refused than the share that is known to be random (a CUSUM test). When there
//! is enough, it lowers the limit for a moment and compares two guesses (a sequential probability ratio test): that the share stays, or
//! that what is accepted stays. If the share stays, it is random: it is remembered and the old limit comes back. If not, the limit was the
//! provider's: it stays low and grows from there, quickly to where it was refused and slowly beyond.
//!
//! **Below one.** A limit below one is a rate: one exchange at a time with gaps between. A place whose exchange was refused stays taken for as
//! long as an exchange takes, so that refusals do not make requests come faster.
//!
//! Nothing here waits or looks at a clock, so that a simulation can drive it; see `docs/providers.md` for what it measures.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Evidence at which a change is acted on: the logarithm of how much likelier it is than no change.
const ALARM: f64 = 6.0;

/// Evidence at which a test ends.
const DECISION: f64 = 2.5;

/// Answers before refusals can be found random: the first ones after a change may still be of the time before.
const LEAST_RANDOM: u32 = 10;

/// Answers after which a test ends in any case.
const LONGEST_TEST: u32 = 48;

/// The largest share of refusals that is taken for random.
const MOST_RANDOM: f64 = 0.4;

/// Answers over which the random share is averaged.
const MEMORY: u32 = 512;

/// By how much a share of refusals has to exceed the known one to matter.
const CHANGE: f64 = 0.15;

/// The longest gap between two exchanges, unless the provider asks for a longer one.
const LONGEST_GAP: Duration = Duration::from_secs(3);

/// The longest that everybody waits as the provider asked some to. It may mean one model of several; who was asked waits for longer.
const LONGEST_CLOSED: Duration = Duration::from_secs(60);

/// The longest that a refused exchange keeps its place.
const LONGEST_HOLD: Duration = Duration::from_millis(500);

/// Refusals in a row, at less than one exchange at a time, that are no limit but an outage.
const OUTAGE: u32 = 8;

/// Rounds just below a ceiling before more is tried.
const PATIENCE_AT_FIRST: f64 = 4.0;
const MOST_PATIENCE: f64 = 32.0;

/// Exchanges let out before anything is known of the provider, and how soon further ones follow.
const AT_FIRST: f64 = 8.0;
const PACE_AT_FIRST: Duration = Duration::from_micros(2500);

/// How the provider took a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was answered, in whatever way.
    Accepted,
    /// It was refused for now, with the time that the provider asks for.
    Refused(Option<Duration>),
    /// It was refused as often before while others were accepted: that says something of the request, not of the provider.
    RefusedAlone,
    /// There was no answer, which says nothing of limits.
    Unknown,
}

/// When the next exchange may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Now,
    At(Instant),
    /// When another one has ended.
    Later,
}

/// When an exchange began, and at which limit.
#[derive(Clone, Copy, Debug)]
pub struct Began {
    pub at: Instant,
    number: u64,
    epoch: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    answers: u32,
    refused: u32,
}

impl Counts {
    fn add(&mut self, refused: bool) {
        self.answers = self.answers.saturating_add(1);
        self.refused = self.refused.saturating_add(u32::from(refused));
    }

    fn share(self) -> f64 {
        f64::from(self.refused) / f64::from(self.answers.max(1))
    }
}

/// A lower limit being compared with the one before.
#[derive(Clone, Copy, Debug)]
struct Test {
    before: f64,
    lowered_to: f64,
    first: Counts,
    now: Counts,
    evidence: f64,
}

pub struct Limit {
    max: f64,
    /// Exchanges under way at a time; below one, a rate.
    limit: f64,
    /// How many of these have been opened: it starts low, so that a provider that refuses most refuses few of them.
    opened: f64,
    opened_at: Option<Instant>,
    /// Where the provider refused last.
    ceiling: Option<f64>,
    /// What grows a round beyond the ceiling.
    step: f64,
    /// Accepted since the limit was changed.
    good: f64,
    /// Rounds to stay just below the ceiling before more is tried: longer each time that the ceiling was found to be where it was.
    patience: f64,
    /// Whether a round was accepted since it was lowered.
    has_grown: bool,
    stayed: f64,
    /// After a time in which everything was refused, which says nothing of how much is accepted now.
    recovering: bool,
    /// The share of refusals that is random.
    random: f64,
    suspicion: f64,
    /// Answers since suspicion began.
    suspected: Counts,
    test: Option<Test>,
    /// Counts the lowerings: an answer to what was let out before the last one says nothing new.
    epoch: u32,
    /// Refused in a row.
    in_a_row: u32,
    /// How long an accepted exchange takes, and how soon a refusal comes, in seconds.
    takes: Option<f64>,
    refuses_after: f64,
    last_began: Option<Instant>,
    /// Exchanges begun so lately that they may still be refused, the oldest first.
    fresh: VecDeque<Began>,
    begun: u64,
    closed_until: Option<Instant>,
    /// What the provider said is left, until when.
    left: Option<(u64, Instant)>,
    told_by: Option<u64>,
}

impl Limit {
    pub fn new(max: usize) -> Self {
        let max = f64::from(u32::try_from(max.max(1)).unwrap_or(u32::MAX));
        Self {
            max,
            limit: max,
            opened: AT_FIRST.min(max),
            opened_at: None,
            ceiling: None,
            step: 0.0,
            good: 0.0,
            patience: PATIENCE_AT_FIRST,
            has_grown: true,
            stayed: 0.0,
            recovering: false,
            random: 0.0,
            suspicion: 0.0,
            suspected: Counts::default(),
            test: None,
            epoch: 0,
            in_a_row: 0,
            takes: None,
            refuses_after: 0.0,
            last_began: None,
            fresh: VecDeque::new(),
            begun: 0,
            closed_until: None,
            left: None,
            told_by: None,
        }
    }

    /// The limit as it is, for people.
    pub fn current(&self) -> f64 {
        self.limit
    }

    /// How long an exchange usually takes, once that is known.
    pub fn usual_time(&self) -> Option<Duration> {
        self.takes.map(Duration::from_secs_f64)
    }

    /// Whether everything waits for a time that the provider gave, and until when.
    pub fn closed_until(&self, now: Instant) -> Option<Instant> {
        let spent =
            self.left.filter(|(left, until)| *left == 0 && *until > now).map(|(_, until)| until);
        self.closed_until.filter(|until| *until > now).max(spent)
    }

    /// Whether one more exchange may begin beside so many.
    pub fn next(&mut self, now: Instant, under_way: usize) -> Next {
        if let Some(until) = self.closed_until(now) {
            return Next::At(until);
        }
        let under_way = f64::from(u32::try_from(under_way).unwrap_or(u32::MAX));
        if under_way >= self.limit.max(1.0).floor() {
            return Next::Later;
        }
        if self.limit < 1.0
            && let Some(last) = self.last_began
        {
            let next = last.checked_add(self.gap()).unwrap_or(last);
            return if next > now { Next::At(next) } else { Next::Now };
        }
        if under_way >= self.opened.floor() {
            // Slow providers are not waited for: more is opened as time goes by.
            let opened_at = *self.opened_at.get_or_insert(now);
            let next = opened_at.checked_add(PACE_AT_FIRST).unwrap_or(now);
            if next > now {
                return Next::At(next);
            }
            self.opened_at = Some(now);
            self.opened += 1.0;
        }
        Next::Now
    }

    pub fn begin(&mut self, now: Instant) -> Began {
        self.last_began = Some(now);
        if let Some((left, _)) = &mut self.left {
            *left = left.saturating_sub(1);
        }
        self.begun = self.begun.wrapping_add(1);
        let began = Began { at: now, number: self.begun, epoch: self.epoch };
        self.presume(now);
        self.fresh.push_back(began);
        began
    }

    /// Refusals come sooner than answers, so that answers alone would show too many of them: what has not been refused by the time at which
    /// refusals come is taken for accepted.
    fn presume(&mut self, now: Instant) {
        let soon = Duration::from_secs_f64((self.refuses_after * 3.0).clamp(0.005, 1.0));
        while let Some(first) = self.fresh.front()
            && now.saturating_duration_since(first.at) > soon
        {
            let accepted = first.epoch == self.epoch;
            self.fresh.pop_front();
            if accepted {
                self.count(false);
            }
        }
    }

    /// Whether it was not counted yet; it is counted now.
    fn settle(&mut self, began: Began) -> bool {
        let place = self.fresh.binary_search_by_key(&began.number, |fresh| fresh.number);
        place.is_ok_and(|place| self.fresh.remove(place).is_some())
    }

    /// Takes note of what the provider says is left until then, as an answer to this exchange. Those begun after it are not counted there.
    pub fn told(&mut self, remaining: u64, until: Instant, answered: Began) {
        // Answers may come in another order than they were made in.
        if self.told_by.is_some_and(|last| last > answered.number) {
            return;
        }
        self.told_by = Some(answered.number);
        let since = self.begun.wrapping_sub(answered.number);
        self.left = Some((remaining.saturating_sub(since), until));
    }

    /// Takes note of how a request was taken, with so many under way, this one included; returns how long its place stays taken.
    pub fn ended(
        &mut self,
        now: Instant,
        began: Began,
        taken: Taken,
        under_way: usize,
    ) -> Option<Instant> {
        let took = now.saturating_duration_since(began.at).as_secs_f64();
        self.presume(now);
        let uncounted = self.settle(began);
        match taken {
            Taken::Unknown | Taken::RefusedAlone => None,
            Taken::Accepted => {
                let known = self.takes.unwrap_or(took);
                self.takes = Some(known + (took - known) / 16.0);
                self.opened = (self.opened + 1.0).min(self.max);
                if began.epoch == self.epoch {
                    self.accepted(uncounted);
                }
                None
            }
            Taken::Refused(asked) => {
                self.refuses_after += (took - self.refuses_after) / 4.0;
                if began.epoch == self.epoch {
                    self.refused(now, asked, under_way);
                }
                let hold = Duration::from_secs_f64((self.takes.unwrap_or(0.0) - took).max(0.0))
                    .min(LONGEST_HOLD);
                now.checked_add(hold)
            }
        }
    }

    fn gap(&self) -> Duration {
        let takes = self.takes.unwrap_or(0.1).max(0.001);
        Duration::from_secs_f64((takes / self.limit.max(1e-6)).min(LONGEST_GAP.as_secs_f64()))
    }

    fn accepted(&mut self, uncounted: bool) {
        if self.in_a_row >= OUTAGE && self.limit < 1.0 {
            self.recovering = true;
            self.ceiling = None;
            self.test = None;
            self.limit = (self.limit * 4.0).min(1.0);
        }
        self.in_a_row = 0;
        if uncounted {
            self.count(false);
        }
        if self.test.is_some() {
            return;
        }
        self.good += 1.0;
        if self.limit < self.max && self.good >= self.limit.max(1.0) {
            self.good = 0.0;
            self.grow();
        }
    }

    /// After a round in which all was accepted.
    fn grow(&mut self) {
        self.has_grown = true;
        let factor = match self.ceiling {
            _ if self.recovering => 2.0,
            Some(ceiling) if self.limit < 0.93 * ceiling => {
                (0.95 * ceiling / self.limit).min(1.0 + 1.0 / 16.0)
            }
            Some(_) if self.stayed < self.patience => {
                self.stayed += 1.0;
                1.0
            }
            Some(ceiling) => {
                if self.limit > 1.3 * ceiling {
                    // It is not where it was.
                    self.patience = PATIENCE_AT_FIRST;
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

    fn refused(&mut self, now: Instant, asked: Option<Duration>, under_way: usize) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        // All are refused: the time that is asked for is everybody's.
        if self.in_a_row >= 3
            && let Some(asked) = asked
        {
            let until = now.checked_add(asked.min(LONGEST_CLOSED)).unwrap_or(now);
            self.closed_until = self.closed_until.max(Some(until));
        }
        self.count(true);
        if let Some(test) = self.test {
            self.decide(now, test, under_way);
        } else if self.suspicion > ALARM {
            // What is under way for longer than a refusal takes has been accepted. Where lowering has just been too little, that is no guide.
            let accepted =
                u32::try_from(under_way).unwrap_or(u32::MAX).saturating_sub(self.suspected.refused);
            let answers =
                self.suspected.answers.max(self.suspected.refused.saturating_add(accepted));
            let all = Counts { answers, ..self.suspected };
            let share = if self.has_grown { all.share() } else { self.suspected.share() };
            self.lower(now, self.suspected, share, under_way);
        }
    }

    fn count(&mut self, refused: bool) {
        if let Some(test) = &mut self.test {
            test.now.add(refused);
            let (random, limited) = test.guesses(self.random);
            test.evidence += if refused {
                (random / limited).ln()
            } else {
                ((1.0 - random) / (1.0 - limited)).ln()
            };
            let test = *test;
            if !refused && test.is_over() {
                self.end(test);
            }
            return;
        }
        // Nothing was refused lately: one more that is not says nothing new.
        if !refused && self.suspicion <= 0.0 && self.random <= 0.0 {
            return;
        }
        let known = self.random.clamp(0.01, 0.9);
        let more = known + CHANGE * (1.0 - known);
        self.suspected.add(refused);
        self.suspicion +=
            if refused { (more / known).ln() } else { ((1.0 - more) / (1.0 - known)).ln() };
        if self.suspicion <= 0.0 {
            // Nothing was the matter: what was refused meanwhile is of the random kind.
            let weight = f64::from(self.suspected.answers.min(MEMORY)) / f64::from(MEMORY);
            self.random += (self.suspected.share() - self.random) * weight;
            self.suspicion = 0.0;
            self.suspected = Counts::default();
        }
    }

    /// After a refusal during a test.
    fn decide(&mut self, now: Instant, test: Test, under_way: usize) {
        let share = test.now.share();
        let worse = test.now.refused >= 3 && share > test.first.share() + 0.15;
        let hopeless = test.now.refused >= 3 && share > MOST_RANDOM;
        if worse || hopeless {
            self.lower(now, test.now, share, under_way);
        } else if test.is_over() {
            self.end(test);
        }
    }

    fn end(&mut self, test: Test) {
        self.test = None;
        self.suspicion = 0.0;
        self.suspected = Counts::default();
        self.good = 0.0;
        let all = Counts {
            answers: test.first.answers.saturating_add(test.now.answers),
            refused: test.first.refused.saturating_add(test.now.refused),
        };
        let random = test.evidence > 0.0 && all.share() <= MOST_RANDOM;
        if random {
            self.random = self.random.max(all.share());
            self.limit = self.limit.max(test.before);
            self.ceiling = None;
        } else {
            let known = self.ceiling.unwrap_or(self.limit);
            self.limit = self.limit.max(0.75 * known.min(test.before));
            self.patience = (self.patience * 2.0).min(MOST_PATIENCE);
        }
    }

    /// Lowers the limit, to see whether that helps.
    fn lower(&mut self, now: Instant, first: Counts, share: f64, under_way: usize) {
        let in_use = f64::from(u32::try_from(under_way).unwrap_or(u32::MAX)).max(1.0);
        let before = if self.limit < 1.0 { self.limit } else { self.limit.min(in_use) };
        let factor = ((1.0 - share) * 0.85).max(0.5);
        let floor = self.takes.unwrap_or(0.1).max(0.001) / LONGEST_GAP.as_secs_f64();
        let to = (before * factor).max(floor.min(1.0));
        // Lowered again and again, it remembers where it all began.
        let began = self.test.map_or(before, |test| test.before);
        self.ceiling = Some(if self.test.is_some() {
            self.ceiling.unwrap_or(before).min(before.max(1.0))
        } else {
            before
        });
        self.test = Some(Test {
            before: began,
            lowered_to: to / before,
            first,
            now: Counts::default(),
            evidence: 0.0,
        });
        self.limit = to;
        self.recovering = false;
        self.step = 0.0;
        self.good = 0.0;
        self.stayed = 0.0;
        self.has_grown = false;
        self.suspicion = 0.0;
        self.suspected = Counts::default();
        self.epoch = self.epoch.wrapping_add(1);
        // The refusals that are on their way come first.
        let settle = Duration::from_secs_f64((self.refuses_after * 2.0).clamp(0.002, 0.2));
        self.closed_until = self.closed_until.max(now.checked_add(settle));
    }
}

impl Test {
    fn is_over(&self) -> bool {
        let random = self.evidence > DECISION && self.now.answers >= LEAST_RANDOM;
        random || self.evidence < -DECISION || self.now.answers >= LONGEST_TEST
    }

    /// Shares of refusals to expect at the lower limit: if they are random, and if there is a limit.
    fn guesses(&self, known: f64) -> (f64, f64) {
        let share = self.first.share().clamp(0.03, 0.95);
        let limited =
            (1.0 - (1.0 - share) / self.lowered_to.max(0.01)).max(known).clamp(0.01, share * 0.9);
        (share, limited)
    }
}

#[cfg(test)]
mod simulation;
