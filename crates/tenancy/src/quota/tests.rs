use proptest::prelude::*;

use super::*;

const MINUTE: i64 = 60_000;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_000_000_000 + millis)
}

fn quota(limits: ModelLimits, budget: Option<u64>) -> Quota {
    let mut quota = Quota::default();
    let models = [("m".to_owned(), limits)].into();
    let allowance = Allowance { models, budget: budget.map(Money::from_units) };
    let mark = quota.begin_refresh();
    quota.refresh(&mark, allowance, Money::default(), &BTreeMap::new(), at(0));
    quota
}

fn per_minute(requests: u64) -> ModelLimits {
    ModelLimits { requests_per_minute: Some(requests), ..ModelLimits::default() }
}

#[test]
fn request_that_one_limit_refuses_uses_up_no_other() {
    let limits = ModelLimits {
        requests_per_minute: Some(2),
        tokens_per_minute: Some(100),
        requests_per_day: Some(9),
        ..ModelLimits::default()
    };
    let mut quota = quota(limits, Some(1000));
    let free = Money::default();
    quota.reserve("m", 60, free, at(0)).unwrap();
    for _ in 0..5 {
        let refused = quota.reserve("m", 60, free, at(0)).unwrap_err();
        assert_eq!(refused.limit, Exhausted::TokensPerMinute("m".into(), 100));
    }
    quota.reserve("m", 40, free, at(0)).unwrap();
    let refused = quota.reserve("m", 0, free, at(0)).unwrap_err();
    assert_eq!(refused.limit, Exhausted::RequestsPerMinute("m".into(), 2));
    assert!(refused.until >= at(MINUTE) && refused.until <= at(MINUTE + 2000), "{refused:?}");
    quota.reserve("other", 1_000_000, free, at(0)).unwrap();
}

#[test]
fn minutes_of_a_clock_that_was_wrong_are_forgotten_and_a_small_step_back_gives_nothing_back() {
    let mut quota = quota(per_minute(1), None);
    let free = Money::default();
    let ahead = quota.reserve("m", 1, free, at(60 * MINUTE)).unwrap();
    // A step back within a window of sixty seconds does not begin a new one.
    let refused = quota.reserve("m", 1, free, at(60 * MINUTE - 30_000)).unwrap_err();
    assert!(refused.until <= at(61 * MINUTE + 2000), "{refused:?}");
    // A clock that is set right by an hour must not close the minute for an hour.
    let right = quota.reserve("m", 1, free, at(0)).unwrap();
    assert!(quota.reserve("m", 1, free, at(1000)).is_err());
    for reserved in [ahead, right] {
        quota.release(reserved);
    }
    assert!(quota.is_idle() && quota.reserve("m", 1, free, at(1000)).is_ok());
}

#[test]
fn request_larger_than_the_limit_of_tokens_begins_in_an_empty_window() {
    let limits = ModelLimits { tokens_per_minute: Some(100), ..ModelLimits::default() };
    let mut quota = quota(limits, None);
    let large = quota.reserve("m", 1000, Money::default(), at(0)).unwrap();
    quota.reserve("m", 1, Money::default(), at(0)).unwrap_err();
    quota.record(large, 30, 10, Money::default());
    quota.reserve("m", 70, Money::default(), at(0)).unwrap();
    // A limit of zero allows nothing.
    let limits = ModelLimits { tokens_per_minute: Some(0), ..ModelLimits::default() };
    let mut none = self::quota(limits, None);
    none.reserve("m", 1, Money::default(), at(0)).unwrap_err();
    self::quota(per_minute(0), None).reserve("m", 1, Money::default(), at(0)).unwrap_err();
}

#[test]
fn waiting_request_larger_than_the_limit_of_tokens_gets_its_turn() {
    let limits = ModelLimits { tokens_per_minute: Some(100), ..ModelLimits::default() };
    let mut quota = quota(limits, None);
    let free = Money::default();
    let (mut small, mut large_at, mut due) = (0, None, 0);
    // Small requests come every second; the large one comes back when it is told to.
    for second in 0..300 {
        let now = at(second * 1000);
        if large_at.is_none() && second >= due {
            match quota.reserve("m", 150, free, now) {
                Ok(reserved) => {
                    large_at = Some(second);
                    quota.record(reserved, 150, 1, free);
                }
                Err(blocked) => {
                    quota.wait("m", 150, &blocked);
                    due = (blocked.until.as_millis() - at(0).as_millis()) / 1000 + 1;
                }
            }
        }
        if quota.reserve("m", 1, free, now).is_ok() {
            small += 1;
        }
    }
    assert!(large_at.is_some_and(|second| second <= 130), "{large_at:?}");
    assert!(small >= 100, "{small}");
    // A request that does not come back keeps the others for a moment alone.
    let blocked = quota.reserve("m", 150, free, at(300_000)).unwrap_err();
    quota.wait("m", 150, &blocked);
    assert!(quota.reserve("m", 1, free, at(301_000)).is_err());
    assert!(quota.reserve("m", 1, free, blocked.until.after(TURN)).is_ok());
}

#[test]
fn budget_counts_what_is_in_flight_and_ends_with_the_month() {
    let mut quota = quota(ModelLimits::default(), Some(100));
    let cost = Money::from_units(60);
    let first = quota.reserve("m", 1, cost, at(0)).unwrap();
    let second = quota.reserve("unpriced", 1, Money::default(), at(0)).unwrap();
    let third = quota.reserve("m", 1, cost, at(0)).unwrap();
    let refused = quota.reserve("unpriced", 1, Money::default(), at(0)).unwrap_err();
    assert_eq!(refused.limit, Exhausted::Budget(Money::from_units(100)));
    assert_eq!(refused.until, at(0).after(PENDING_INTERVAL));
    quota.release(third);
    quota.release(second);
    quota.record(first, 1, 1, Money::from_units(99));
    quota.reserve("m", 1, Money::default(), at(0)).unwrap();
    // The store may not know yet what was recorded while it was read.
    let mark = quota.begin_refresh();
    let fourth = quota.reserve("m", 1, Money::default(), at(0)).unwrap();
    quota.record(fourth, 1, 1, Money::from_units(1));
    let allowance = Allowance { budget: Some(Money::from_units(100)), ..Allowance::default() };
    quota.refresh(&mark, allowance.clone(), Money::from_units(99), &BTreeMap::new(), at(0));
    assert_eq!(quota.check("m", at(0)).unwrap_err().until, at(0).next_month());
    let mark = quota.begin_refresh();
    quota.refresh(&mark, allowance, Money::default(), &BTreeMap::new(), at(0).next_month());
    quota.check("m", at(0).next_month()).unwrap();
}

#[test]
fn requests_of_a_day_count_in_flight_and_end_at_midnight() {
    let limits = ModelLimits { requests_per_day: Some(2), ..ModelLimits::default() };
    let mut quota = quota(limits, None);
    let free = Money::default();
    let first = quota.reserve("m", 1, free, at(0)).unwrap();
    let second = quota.reserve("m", 1, free, at(0)).unwrap();
    let refused = quota.reserve("m", 1, free, at(0)).unwrap_err();
    assert_eq!(refused.until, at(0).after(PENDING_INTERVAL));
    quota.release(second);
    quota.record(first, 1, 1, free);
    quota.reserve("m", 1, free, at(0)).map(|third| quota.record(third, 1, 1, free)).unwrap();
    assert_eq!(quota.reserve("m", 1, free, at(0)).unwrap_err().until, at(0).next_day());
    quota.check("m", at(0).next_day()).unwrap();
    // A clock that goes back gives nothing back.
    quota.check("m", Timestamp::from_millis(0)).unwrap_err();
}

#[test]
fn request_that_has_begun_counts_as_in_flight_and_not_in_another_minute() {
    let limits = ModelLimits {
        requests_per_minute: Some(1),
        requests_per_day: Some(1),
        ..ModelLimits::default()
    };
    let mut quota = quota(limits, None);
    let resumed = quota.resume("m", Money::default());
    let refused = quota.reserve("m", 1, Money::default(), at(0)).unwrap_err();
    assert_eq!(refused.limit, Exhausted::RequestsPerDay("m".into(), 1));
    quota.release(resumed);
    quota.reserve("m", 1, Money::default(), at(0)).unwrap();
}

#[test]
fn expected_output_follows_what_was_measured() {
    let mut quota = quota(ModelLimits::default(), Some(u64::MAX));
    assert_eq!(quota.expected_output("m"), FIRST_OUTPUT_TOKENS);
    let mut record = |output| {
        let reserved = quota.reserve("m", 1, Money::default(), at(0)).unwrap();
        quota.record(reserved, 1, output, Money::default());
        quota.expected_output("m")
    };
    assert_eq!(record(10), 10);
    let last = (0..200).map(|_| record(1000)).last().unwrap();
    assert!((900..=1000).contains(&last), "{last}");
    let last = (0..300).map(|_| record(0)).last().unwrap();
    assert!(last < 20, "{last}");
}

proptest! {
    /// No span of sixty seconds has more than the limit, and what was released counts no more.
    #[test]
    fn window_never_exceeds_its_limit(
        steps in proptest::collection::vec((0_i64..20_000, any::<bool>()), 1..200),
    ) {
        let mut quota = quota(per_minute(5), None);
        let (mut now, mut begun, mut held) = (0, Vec::new(), Vec::new());
        for (pause, is_released) in steps {
            now += pause;
            match quota.reserve("m", 1, Money::default(), at(now)) {
                Ok(reserved) if is_released => quota.release(reserved),
                Ok(reserved) => {
                    begun.push(now);
                    held.push(reserved);
                }
                Err(blocked) => prop_assert!(blocked.until > at(now)),
            }
            let recent = begun.iter().filter(|begun| now - **begun < MINUTE).count();
            prop_assert!(recent <= 5, "{} requests within a minute", recent);
        }
        for reserved in held {
            quota.release(reserved);
        }
        prop_assert!(quota.is_idle());
    }

    /// A request that was refused until a time is admitted at that time.
    #[test]
    fn refused_request_is_admitted_at_the_time_that_was_named(
        pauses in proptest::collection::vec(0_i64..9000, 1..50),
    ) {
        let mut quota = quota(per_minute(3), None);
        let mut now = at(0);
        for pause in pauses {
            now = Timestamp::from_millis(now.as_millis() + pause);
            let reserved = match quota.reserve("m", 1, Money::default(), now) {
                Ok(reserved) => reserved,
                Err(blocked) => {
                    now = blocked.until;
                    quota.reserve("m", 1, Money::default(), now).unwrap()
                }
            };
            quota.record(reserved, 1, 1, Money::default());
        }
    }
}
