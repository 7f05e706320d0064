//! Tests of `breaker`.

use batchwright_plugin::types::Failure;

use super::*;

const PAUSES: ProbePauses = ProbePauses {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(60),
    give_up_after: None,
};

fn trouble(kind: FailureKind) -> ProviderFailure {
    let answer = Answer::Failure(Failure { code: "x".into(), message: "x".into() });
    ProviderFailure {
        kind,
        message: "refused".into(),
        detail: "refused by 192.0.2.1".into(),
        answer,
    }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds * 1000)
}

fn fail(
    breaker: &Breaker,
    now: i64,
    line: u64,
    kind: FailureKind,
    refused_at: Option<u64>,
) -> FailureVerdict {
    breaker.record_failure(at(now), line, 1, refused_at, trouble(kind), false).0
}

/// Sends a line as a probe as soon as possible and returns the seconds until then.
fn probe(breaker: &Arc<Breaker>, now: i64, line: u64, kind: FailureKind) -> (i64, FailureVerdict) {
    for second in now..now + 100 {
        if let (BreakerDecision::Probe, Some(_guard)) = breaker.enter(at(second), 1) {
            assert!(
                matches!(breaker.check(at(second), 1), BreakerDecision::Wait(_)),
                "one probe at a time"
            );
            return (
                second - now,
                breaker.record_failure(at(second), line, 1, None, trouble(kind), true).0,
            );
        }
    }
    panic!("no probe was allowed");
}

#[test]
fn first_refusal_holds_the_line_and_second_refusal_opens_the_breaker() {
    let breaker = Arc::new(Breaker::new(PAUSES));
    assert!(matches!(
        fail(&breaker, 0, 1, FailureKind::Unauthorized, None),
        FailureVerdict::Hold(_)
    ));
    assert!(matches!(breaker.check(at(0), 1), BreakerDecision::Allow), "other lines are sent");
    assert!(matches!(
        fail(&breaker, 0, 2, FailureKind::Unauthorized, None),
        FailureVerdict::Wait(_)
    ));
    assert!(matches!(breaker.check(at(0), 1), BreakerDecision::Wait(_)));
    // A reloaded plugin, which may have a new key, is probed at once.
    assert!(matches!(breaker.check(at(0), 2), BreakerDecision::Probe));
    let pauses: Vec<i64> = (0..8)
        .scan(0, |now, line| {
            let (waited, verdict) = probe(&breaker, *now, 10 + line, FailureKind::Unauthorized);
            assert!(matches!(verdict, FailureVerdict::Wait(_)));
            *now += waited;
            Some(waited)
        })
        .collect();
    assert!(
        pauses.windows(2).all(|pair| pair[0] <= pair[1] + 12)
            && pauses.iter().all(|pause| *pause <= 60)
    );
    assert!(*pauses.last().unwrap() >= 48, "{pauses:?}");
    let ended = breaker.record_success().unwrap();
    assert_eq!(ended.trouble.detail, "refused by 192.0.2.1");
    assert!(breaker.is_healthy() && breaker.outage().is_none());
}

#[test]
fn line_refused_while_others_succeed_is_at_fault() {
    let breaker = Arc::new(Breaker::new(PAUSES));
    breaker.record_success();
    let before = breaker.successes();
    assert!(matches!(fail(&breaker, 0, 1, FailureKind::Forbidden, None), FailureVerdict::Hold(_)));
    breaker.record_success();
    assert!(matches!(
        fail(&breaker, 1, 1, FailureKind::Forbidden, Some(before)),
        FailureVerdict::LineAtFault
    ));
    assert!(breaker.is_healthy());
    // Without another failed line, a forbidden line fails after a few attempts. A refused key
    // waits.
    for (kind, ends) in [(FailureKind::Forbidden, true), (FailureKind::Unauthorized, false)] {
        let before = breaker.successes();
        fail(&breaker, 0, 1, kind, None);
        assert!(matches!(fail(&breaker, 1, 1, kind, Some(before)), FailureVerdict::Wait(_)));
        let mut now = 1;
        let at_fault = (0..20).any(|_| {
            let (waited, verdict) = probe(&breaker, now, 1, kind);
            now += waited;
            matches!(verdict, FailureVerdict::LineAtFault)
        });
        assert_eq!(at_fault, ends);
        breaker.close();
    }
}

#[test]
fn server_errors_open_the_breaker_after_five_different_lines() {
    let breaker = Arc::new(Breaker::new(PAUSES));
    for _ in 0..20 {
        assert!(matches!(fail(&breaker, 0, 1, FailureKind::Failed, None), FailureVerdict::Hold(_)));
    }
    for line in 2..5 {
        assert!(matches!(
            fail(&breaker, 0, line, FailureKind::Failed, None),
            FailureVerdict::Hold(_)
        ));
    }
    breaker.record_success();
    for line in 1..5 {
        assert!(matches!(
            fail(&breaker, 0, line, FailureKind::Failed, None),
            FailureVerdict::Hold(_)
        ));
    }
    assert!(matches!(fail(&breaker, 0, 5, FailureKind::Failed, None), FailureVerdict::Wait(_)));
    assert_eq!(breaker.failed_attempts(1), 1);
    assert_eq!(breaker.failed_attempts(9), 0);
}

#[test]
fn lines_fail_after_max_outage() {
    let breaker = Arc::new(Breaker::new(ProbePauses {
        give_up_after: Some(Duration::from_secs(10)),
        ..PAUSES
    }));
    fail(&breaker, 0, 1, FailureKind::Unreachable, None);
    fail(&breaker, 0, 2, FailureKind::Unreachable, None);
    assert!(matches!(breaker.check(at(9), 1), BreakerDecision::Probe));
    assert!(matches!(breaker.check(at(11), 1), BreakerDecision::GiveUp(_)));
}

#[test]
fn dropped_probe_allows_the_next_probe() {
    let breaker = Arc::new(Breaker::new(PAUSES));
    fail(&breaker, 0, 1, FailureKind::Unreachable, None);
    fail(&breaker, 0, 2, FailureKind::Unreachable, None);
    drop(breaker.enter(at(5), 1));
    assert!(matches!(breaker.enter(at(5), 1), (BreakerDecision::Probe, Some(_))));
    breaker.add_waiting(&"batch_1".into(), 7);
    assert_eq!(breaker.outage().unwrap().waiting, 7);
    breaker.remove_waiting(&"batch_1".into());
    assert_eq!(breaker.outage().unwrap().waiting, 0);
}
