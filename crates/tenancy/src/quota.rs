//! Quota of a project: how much it may send now, by its limits for models and by its budget.
//!
//! **Problem.** Many requests of a project are decided on at the same time. A limit that is checked
//! first and counted later lets all of them pass, a request that one limit refuses must not use up
//! another, and what a request reserved must come back however the request ends.
//!
//! **Reservation.** [`Quota::reserve`] checks all limits and reserves from all of them in one step,
//! or from none. The tokens and the cost of a request are estimated. [`Quota::record`] replaces the
//! estimate by what the request has used, and [`Quota::release`] gives everything back for a
//! request that no model answered.
//!
//! **Minutes.** Requests and tokens per minute are counted in memory, in a window of sixty
//! seconds. In no span of sixty seconds are more requests reserved than the limit. Tokens are
//! estimated at first, so that they can exceed their limit by the error of the estimates. A request
//! that is larger than the limit of tokens may begin in an empty window. While such a request
//! waits, no smaller one begins, because the window would never be empty.
//!
//! **Days and months.** Requests per day and the budget are counted in the store. The quota adds
//! what is in flight, and what was recorded since the store was read, so that it may count a
//! request twice for a moment, and never too few times.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::limits::ModelLimits;
use batchwright_domain::money::Money;

/// Length of the window of the limits per minute.
const WINDOW_SECONDS: i64 = 60;

/// Time after which a request is checked again that only requests in flight leave no room for.
const PENDING_INTERVAL: Duration = Duration::from_secs(1);

/// Time that a request that is larger than the limit of tokens has to begin once the window is
/// empty.
const TURN: Duration = Duration::from_secs(5);

/// Output tokens that a request is expected to have before any was measured.
const FIRST_OUTPUT_TOKENS: u64 = 256;

/// Part of a new measurement in the expected output tokens: one of this number.
const OUTPUT_SMOOTHING: u64 = 16;

/// What a project may send. None is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// Limits by model.
    pub models: BTreeMap<String, ModelLimits>,
    /// Budget of a month.
    pub budget: Option<Money>,
}

impl Allowance {
    /// Returns true if there is no limit.
    pub fn is_unlimited(&self) -> bool {
        self.models.is_empty() && self.budget.is_none()
    }
}

/// Limit that is used up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// Requests per minute of a model.
    RequestsPerMinute(String, u64),
    /// Tokens per minute of a model.
    TokensPerMinute(String, u64),
    /// Requests per day of a model.
    RequestsPerDay(String, u64),
    /// Budget of the month.
    Budget(Money),
}

impl fmt::Display for Exhausted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RequestsPerMinute(model, limit) => write!(
                formatter,
                "The project has reached its limit of {limit} requests per minute for the model \
                 '{model}' (max_requests_per_1_minute)."
            ),
            Self::TokensPerMinute(model, limit) => write!(
                formatter,
                "The project has reached its limit of {limit} tokens per minute for the model \
                 '{model}' (max_tokens_per_1_minute)."
            ),
            Self::RequestsPerDay(model, limit) => write!(
                formatter,
                "The project has reached its limit of {limit} requests per day (UTC) for the \
                 model '{model}' (max_requests_per_1_day)."
            ),
            Self::Budget(budget) => write!(
                formatter,
                "The project has spent its budget of {budget} for this month, or requests in \
                 flight may spend the rest (billing_hard_limit_reached)."
            ),
        }
    }
}

/// Limit per minute of a model, and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// Limit.
    pub limit: u64,
    /// What is left of the limit.
    pub left: u64,
    /// Time until the whole limit is left again, if nothing is sent meanwhile.
    pub reset: Duration,
}

/// Limits per minute of a model, and what is left of them. None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests.
    pub requests: Option<Remaining>,
    /// Tokens.
    pub tokens: Option<Remaining>,
}

/// Refusal of a request for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Limit that is used up.
    pub limit: Exhausted,
    /// Time at which the limit may have room again.
    pub until: Timestamp,
}

/// Reservation of a request. It must be recorded or released.
#[derive(Debug)]
pub struct Reserved {
    model: String,
    second: i64,
    tokens: u64,
    cost: Money,
}

/// Quota of one project.
#[derive(Debug, Default)]
pub struct Quota {
    allowance: Allowance,
    is_known: bool,
    /// Money spent, as the store knew it, and what was recorded since.
    spent: Money,
    /// Expected cost of what is in flight.
    pending_cost: Money,
    /// Money recorded since the start.
    recorded_cost: Money,
    models: HashMap<String, ModelQuota>,
}

#[derive(Debug, Default)]
struct ModelQuota {
    window: Window,
    /// Requests of the day as the store knew it, and what was recorded since.
    today: u64,
    /// Beginning of the day.
    day: Option<Timestamp>,
    /// Requests in flight.
    pending: u64,
    /// Requests recorded since the start.
    recorded: u64,
    /// Average of the output tokens.
    output_tokens: Option<u64>,
    /// End of the turn of a waiting request that is larger than the limit of tokens.
    turn_until: Option<Timestamp>,
}

/// Requests and tokens of the last sixty seconds, by second.
#[derive(Debug, Default)]
struct Window(VecDeque<(i64, u64, u64)>);

/// State before a read of the store.
#[derive(Debug)]
pub struct RefreshMark {
    recorded_cost: Money,
    recorded: HashMap<String, u64>,
}

impl Quota {
    /// Returns true if limits and counts were read at least once.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// Returns true if the project has no limit that is counted here.
    pub fn is_unlimited(&self) -> bool {
        self.allowance.is_unlimited()
    }

    /// Returns true if nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.models.values().all(|model| model.pending == 0)
    }

    /// Returns the output tokens that a request of a model is expected to have.
    pub fn expected_output(&self, model: &str) -> u64 {
        let known = self.models.get(model).and_then(|model| model.output_tokens);
        known.unwrap_or(FIRST_OUTPUT_TOKENS)
    }

    /// Checks whether a request of a model could begin now.
    pub fn check(&self, model: &str, now: Timestamp) -> Result<(), Blocked> {
        self.check_size(model, 1, now)
    }

    /// Reserves a request with an estimate of its tokens and of its cost, or nothing.
    pub fn reserve(
        &mut self,
        model: &str,
        tokens: u64,
        cost: Money,
        now: Timestamp,
    ) -> Result<Reserved, Blocked> {
        self.check_size(model, tokens, now)?;
        let limits = self.allowance.models.get(model);
        let limit = limits.and_then(|limits| limits.tokens_per_minute);
        let quota = self.models.entry(model.to_owned()).or_default();
        if let Some(limit) = limit {
            if tokens > limit {
                quota.turn_until = None;
            } else if let Some(until) = quota.turn_until.filter(|until| *until > now) {
                let limit = Exhausted::TokensPerMinute(model.to_owned(), limit);
                return Err(Blocked { limit, until });
            }
        }
        quota.pending = quota.pending.saturating_add(1);
        let second = quota.window.add(now, tokens);
        self.pending_cost = self.pending_cost.plus(cost);
        Ok(Reserved { model: model.to_owned(), second, tokens, cost })
    }

    /// Gives a refused request that waits a turn, if it is larger than the limit of tokens.
    pub fn wait(&mut self, model: &str, tokens: u64, blocked: &Blocked) {
        let Exhausted::TokensPerMinute(_, limit) = blocked.limit else { return };
        if tokens > limit {
            let quota = self.models.entry(model.to_owned()).or_default();
            quota.turn_until = Some(blocked.until.after(TURN));
        }
    }

    /// Reserves a request that has begun before, whatever the limits: a provider works on it. It is
    /// not in the window of a minute again.
    pub fn resume(&mut self, model: &str, cost: Money) -> Reserved {
        let quota = self.models.entry(model.to_owned()).or_default();
        quota.pending = quota.pending.saturating_add(1);
        self.pending_cost = self.pending_cost.plus(cost);
        Reserved { model: model.to_owned(), second: i64::MIN, tokens: 0, cost }
    }

    fn check_size(&self, model: &str, tokens: u64, now: Timestamp) -> Result<(), Blocked> {
        let blocked = |limit, until| Err(Blocked { limit, until });
        if let Some(budget) = self.allowance.budget
            && self.spent.plus(self.pending_cost) >= budget
        {
            let is_spent = self.spent >= budget;
            let until = if is_spent { now.next_month() } else { now.after(PENDING_INTERVAL) };
            return blocked(Exhausted::Budget(budget), until);
        }
        let Some(limits) = self.allowance.models.get(model) else { return Ok(()) };
        let quota = self.models.get(model);
        let name = || model.to_owned();
        if let Some(limit) = limits.requests_per_day {
            let (done, pending) = quota.map_or((0, 0), |quota| (quota.of_day(now), quota.pending));
            if done.saturating_add(pending) >= limit {
                let is_used_up = done >= limit;
                let until = if is_used_up { now.next_day() } else { now.after(PENDING_INTERVAL) };
                return blocked(Exhausted::RequestsPerDay(name(), limit), until);
            }
        }
        let empty = Window::default();
        let window = quota.map_or(&empty, |quota| &quota.window);
        if let Some(limit) = limits.requests_per_minute
            && let Some(until) = window.full_until(now, 1, limit, |(_, requests, _)| *requests)
        {
            return blocked(Exhausted::RequestsPerMinute(name(), limit), until);
        }
        if let Some(limit) = limits.tokens_per_minute
            && let Some(until) = window.full_until(now, tokens, limit, |(_, _, tokens)| *tokens)
        {
            return blocked(Exhausted::TokensPerMinute(name(), limit), until);
        }
        Ok(())
    }

    /// Returns the limits per minute of a model, and what is left of them.
    pub fn standing(&self, model: &str, now: Timestamp) -> Standing {
        let Some(limits) = self.allowance.models.get(model) else { return Standing::default() };
        let empty = Window::default();
        let window = self.models.get(model).map_or(&empty, |quota| &quota.window);
        let remaining = |limit: Option<u64>, of_slot: fn(&(i64, u64, u64)) -> u64| {
            limit.map(|limit| window.remaining(now, limit, of_slot))
        };
        Standing {
            requests: remaining(limits.requests_per_minute, |(_, requests, _)| *requests),
            tokens: remaining(limits.tokens_per_minute, |(_, _, tokens)| *tokens),
        }
    }

    /// Replaces the estimate of a request by what it has used. The store counts the request too.
    pub fn record(&mut self, reserved: Reserved, tokens: u64, output: u64, cost: Money) {
        let quota = self.end(&reserved);
        quota.window.replace(reserved.second, reserved.tokens, tokens);
        quota.today = quota.today.saturating_add(1);
        quota.recorded = quota.recorded.saturating_add(1);
        let before = quota.output_tokens.unwrap_or(output);
        let kept = before.saturating_sub(before / OUTPUT_SMOOTHING);
        // Rounded up, so that the average reaches small numbers.
        let average = kept.saturating_add(output.div_ceil(OUTPUT_SMOOTHING));
        quota.output_tokens = Some(if before == output { output } else { average });
        self.spent = self.spent.plus(cost);
        self.recorded_cost = self.recorded_cost.plus(cost);
    }

    /// Gives a reservation back.
    pub fn release(&mut self, reserved: Reserved) {
        let quota = self.end(&reserved);
        quota.window.remove(reserved.second, reserved.tokens);
    }

    fn end(&mut self, reserved: &Reserved) -> &mut ModelQuota {
        let left = self.pending_cost.units().saturating_sub(reserved.cost.units());
        self.pending_cost = Money::from_units(left);
        let quota = self.models.entry(reserved.model.clone()).or_default();
        quota.pending = quota.pending.saturating_sub(1);
        quota
    }

    /// Begins to read the store. What is recorded from now on may be missing in what is read.
    pub fn begin_refresh(&self) -> RefreshMark {
        let recorded = self.models.iter().map(|(name, quota)| (name.clone(), quota.recorded));
        RefreshMark { recorded_cost: self.recorded_cost, recorded: recorded.collect() }
    }

    /// Takes over what the store knows.
    pub fn refresh(
        &mut self,
        mark: &RefreshMark,
        allowance: Allowance,
        spent: Money,
        requests_today: &BTreeMap<String, u64>,
        now: Timestamp,
    ) {
        self.allowance = allowance;
        self.is_known = true;
        let since = self.recorded_cost.units().saturating_sub(mark.recorded_cost.units());
        self.spent = spent.plus(Money::from_units(since));
        self.models.retain(|name, quota| {
            quota.window.forget(now);
            let is_used = quota.pending > 0 || !quota.window.0.is_empty();
            is_used || self.allowance.models.contains_key(name)
        });
        for name in self.allowance.models.keys() {
            let quota = self.models.entry(name.clone()).or_default();
            let before = mark.recorded.get(name).copied().unwrap_or_default();
            let since = quota.recorded.saturating_sub(before);
            quota.today = requests_today.get(name).copied().unwrap_or(0).saturating_add(since);
            quota.day = Some(now.start_of_day());
        }
    }
}

impl ModelQuota {
    /// Returns the recorded requests of the day of a time.
    fn of_day(&self, now: Timestamp) -> u64 {
        // A clock that goes back does not give requests back.
        if self.day.is_some_and(|day| now.start_of_day() > day) { 0 } else { self.today }
    }
}

impl Window {
    /// Counts a request; returns the second that it counts in.
    fn add(&mut self, now: Timestamp, tokens: u64) -> i64 {
        self.forget(now);
        // A clock that goes back counts in the latest second.
        let second = self.0.back().map_or(now.as_seconds(), |last| last.0.max(now.as_seconds()));
        match self.0.back_mut() {
            Some((last, requests, sum)) if *last == second => {
                *requests = requests.saturating_add(1);
                *sum = sum.saturating_add(tokens);
            }
            _ => self.0.push_back((second, 1, tokens)),
        }
        second
    }

    fn slot(&mut self, second: i64) -> Option<&mut (i64, u64, u64)> {
        self.0.iter_mut().find(|slot| slot.0 == second)
    }

    fn replace(&mut self, second: i64, before: u64, tokens: u64) {
        if let Some((_, _, sum)) = self.slot(second) {
            *sum = sum.saturating_sub(before).saturating_add(tokens);
        }
    }

    fn remove(&mut self, second: i64, tokens: u64) {
        if let Some((_, requests, sum)) = self.slot(second) {
            *requests = requests.saturating_sub(1);
            *sum = sum.saturating_sub(tokens);
        }
    }

    /// Removes the seconds that have left the window.
    fn forget(&mut self, now: Timestamp) {
        let oldest = now.as_seconds().saturating_sub(WINDOW_SECONDS);
        while self.0.front().is_some_and(|(second, ..)| *second < oldest) {
            self.0.pop_front();
        }
        // Seconds that lie further ahead than the window are of a clock that was wrong.
        let latest = now.as_seconds().saturating_add(WINDOW_SECONDS);
        while self.0.back().is_some_and(|(second, ..)| *second > latest) {
            self.0.pop_back();
        }
    }

    fn current(&self, now: Timestamp) -> impl Iterator<Item = &(i64, u64, u64)> {
        let oldest = now.as_seconds().saturating_sub(WINDOW_SECONDS);
        let latest = now.as_seconds().saturating_add(WINDOW_SECONDS);
        self.0.iter().filter(move |(second, ..)| (oldest..=latest).contains(second))
    }

    /// Returns what is left of a limit.
    fn remaining(
        &self,
        now: Timestamp,
        limit: u64,
        of_slot: impl Fn(&(i64, u64, u64)) -> u64,
    ) -> Remaining {
        let used = self.current(now).map(&of_slot).fold(0, u64::saturating_add);
        let last = self.current(now).filter(|slot| of_slot(slot) > 0).last();
        let reset = last.map_or(Duration::ZERO, |slot| now.until(left_at(slot.0)));
        Remaining { limit, left: limit.saturating_sub(used), reset }
    }

    /// Returns the time at which `size` more fit into a limit; none if they fit now.
    fn full_until(
        &self,
        now: Timestamp,
        size: u64,
        limit: u64,
        of_slot: impl Fn(&(i64, u64, u64)) -> u64,
    ) -> Option<Timestamp> {
        let mut used = self.current(now).map(&of_slot).fold(0, u64::saturating_add);
        let fits = |used: u64| used.saturating_add(size) <= limit || (used == 0 && limit > 0);
        if fits(used) {
            return None;
        }
        for slot in self.current(now) {
            used = used.saturating_sub(of_slot(slot));
            if fits(used) {
                return Some(left_at(slot.0));
            }
        }
        // A limit of zero never has room.
        Some(now.next_day())
    }
}

/// Returns the time at which a second has left the window.
fn left_at(second: i64) -> Timestamp {
    let second = second.saturating_add(WINDOW_SECONDS).saturating_add(1);
    Timestamp::from_millis(second.saturating_mul(1000))
}

#[cfg(test)]
mod tests;
