//! Tests of `admission`.

use futures_util::FutureExt;

use super::*;

fn batch(number: u64) -> QueueId {
    QueueId { tenant: "t".into(), batch: Some(number) }
}

fn admit_all(admission: &AdmissionQueue) -> Vec<Permit> {
    std::iter::from_fn(|| admission.admit(batch(1), Priority::default()).now_or_never()?.ok())
        .collect()
}

fn end(mut admitted: Permit, taken: LimitFeedback) {
    admitted.finish(taken, &mut Refusals::default());
}

/// Returns an admission whose slow start is complete.
fn open(max: usize) -> AdmissionQueue {
    let admission = AdmissionQueue::new((max, 10), ShareBy::Exchanges, &Arc::default());
    for _ in 0..max {
        admit_all(&admission)
            .into_iter()
            .for_each(|admitted| end(admitted, LimitFeedback::Accepted));
    }
    admission
}

#[tokio::test]
async fn permits_go_to_the_batch_with_the_fewest_exchanges_in_flight() {
    let admission = open(4);
    let mut large = admit_all(&admission);
    assert_eq!(large.len(), 4);
    let mut waiting: Vec<_> =
        (0..100).map(|_| Box::pin(admission.admit(batch(1), Priority::default()))).collect();
    for one in &mut waiting {
        assert!(one.now_or_never().is_none());
    }
    let mut small = Box::pin(admission.admit(batch(2), Priority::default()));
    assert!((&mut small).now_or_never().is_none());
    large.pop();
    let small = small.await.unwrap();
    assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
    drop(small);
    // Canceled requests leave no state.
    drop(waiting);
    assert!(!admission.0.lock().shares.has_waiting());
    assert!(admission.admit(batch(3), Priority::default()).now_or_never().is_some());
    large.clear();
    assert!(admission.0.lock().shares.is_empty());
    assert_eq!(admission.0.lock().in_flight, 0);
    assert_eq!(admission.0.lock().started_at.len(), 0);
}

#[tokio::test]
async fn permits_are_shared_by_tenant_before_they_are_shared_by_batch() {
    let admission = open(8);
    let of = |tenant: &str, batch| QueueId { tenant: tenant.into(), batch: Some(batch) };
    // Nine batches of one tenant hold and await everything, and then another tenant comes.
    let mut greedy = Vec::new();
    let mut waiting: Vec<_> = (0..90_u64)
        .map(|number| Box::pin(admission.admit(of("greedy", number % 9), Priority::default())))
        .filter_map(|mut one| match (&mut one).now_or_never() {
            Some(permit) => {
                greedy.push(permit.unwrap());
                None
            }
            None => Some(one),
        })
        .collect();
    assert_eq!((greedy.len(), waiting.len()), (8, 82));
    let mut modest: Vec<_> =
        (0..20).map(|_| Box::pin(admission.admit(of("modest", 10), Priority::default()))).collect();
    assert!(modest.iter_mut().all(|one| one.now_or_never().is_none()));
    let mut held = Vec::new();
    for freed in 1..=4 {
        greedy.pop();
        let granted = modest.iter_mut().find_map(|one| one.now_or_never());
        held.push(granted.expect("a freed permit goes to the modest tenant").unwrap());
        drop(modest.remove(0));
        assert_eq!(held.len(), freed);
    }
    // Both tenants have four now, and take turns from here on.
    greedy.pop();
    assert!(modest.iter_mut().all(|one| one.now_or_never().is_none()));
    greedy.extend(waiting.iter_mut().find_map(|one| one.now_or_never()?.ok()));
    assert_eq!(greedy.len(), 4);
    drop((waiting, modest, held, greedy));
    let state = admission.0.lock();
    assert!(state.shares.is_empty() && state.in_flight == 0);
}

#[tokio::test]
async fn hung_exchange_does_not_block_a_lowered_limit() {
    let admission = open(8);
    let began = Instant::now();
    // Refusals lower the limit to one.
    while admission.limit() > 1.0 {
        let mut state = admission.0.lock();
        let exchange = state.limit.begin(began);
        state.limit.ended(began, exchange, LimitFeedback::Refused(None), 1);
    }
    let later = Instant::now().checked_add(MIN_HANG_TIME * 2).unwrap();
    let hanging = admission.admit(batch(1), Priority::default()).await.unwrap();
    {
        let mut state = admission.0.lock();
        let soon = Instant::now().checked_add(MIN_HANG_TIME / 2).unwrap();
        assert_eq!(state.next(soon, 8), Next::Later);
        assert!(
            state.next_wakeup(Next::Later, 8).is_some_and(|at| at < later),
            "no wake-up is scheduled"
        );
        assert_eq!(state.next(later, 8), Next::Now);
        // The operator's limit still applies.
        assert_eq!(state.next(later, 1), Next::Later);
    }
    drop(hanging);
}

#[tokio::test]
async fn throttle_respects_reported_remaining_requests() {
    let admission = open(8);
    let first = admission.admit(batch(1), Priority::default()).await.unwrap();
    admission.update_remaining(&first, 2, Duration::from_millis(400));
    drop(first);
    let started = Instant::now();
    for _ in 0..2 {
        end(
            admission.admit(batch(1), Priority::default()).now_or_never().unwrap().unwrap(),
            LimitFeedback::Accepted,
        );
    }
    end(admission.admit(batch(1), Priority::default()).await.unwrap(), LimitFeedback::Accepted);
    assert!(started.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn admit_fails_during_a_long_pause() {
    let admission = open(4);
    let mut waiting = Box::pin(admission.admit(batch(2), Priority::default()));
    let mut in_flight = admit_all(&admission);
    assert!((&mut waiting).now_or_never().is_none());
    for admitted in &mut in_flight {
        admitted.finish(
            LimitFeedback::Refused(Some(Duration::from_secs(3600))),
            &mut Refusals::default(),
        );
    }
    let until = waiting.await.err().unwrap();
    let left = until.saturating_duration_since(Instant::now());
    assert!(left > MAX_QUEUE_WAIT && left <= Duration::from_secs(60), "{left:?}");
    assert!(admission.admit(batch(3), Priority::default()).await.is_err());
}

#[tokio::test]
async fn repeatedly_refused_request_does_not_slow_down_others() {
    let admission = open(8);
    let mut refusals = Refusals::default();
    for _ in 0..100 {
        end(admission.admit(batch(1), Priority::default()).await.unwrap(), LimitFeedback::Accepted);
        let mut alone = admission.admit(batch(1), Priority::default()).await.unwrap();
        alone.finish(LimitFeedback::Refused(Some(Duration::from_secs(60))), &mut refusals);
        drop(alone);
    }
    assert_eq!(admission.0.lock().limit.closed_until(Instant::now()), None);
    assert!(admission.limit() >= 8.0, "{}", admission.limit());
}

#[tokio::test]
async fn limit_of_a_tenant_holds_over_all_plugins_and_blocks_no_other_tenant() {
    let tenants = Arc::default();
    let plugins = [(); 2].map(|()| AdmissionQueue::new((8, 10), ShareBy::Exchanges, &tenants));
    let limited = Priority { max_in_flight: Some(2), ..Priority::default() };
    let of = |tenant: &str| QueueId { tenant: tenant.into(), batch: Some(1) };
    let first = plugins[0].admit(of("t"), limited).await.unwrap();
    let _second = plugins[1].admit(of("t"), limited).await.unwrap();
    let mut third = Box::pin(plugins[1].admit(of("t"), limited));
    assert!((&mut third).now_or_never().is_none());
    // A free permit goes to another tenant, although the first one has waited longer.
    let other = plugins[1].admit(of("other"), Priority::default()).now_or_never();
    assert!(other.is_some());
    // The end of an exchange of one plugin admits a request of another.
    drop(first);
    third.now_or_never().unwrap().unwrap();
}

#[tokio::test]
async fn batches_leave_a_share_free_while_there_are_online_requests() {
    let admission = open(20);
    let online = || QueueId { tenant: "t".into(), batch: None };
    assert_eq!(admit_all(&admission).len(), 20, "without online requests, batches have all");
    drop(admission.admit(online(), Priority::default()).now_or_never());
    let batches = admit_all(&admission);
    assert_eq!(batches.len(), 18);
    let first = admission.admit(online(), Priority::default()).now_or_never().unwrap().unwrap();
    let second = admission.admit(online(), Priority::default()).now_or_never().unwrap().unwrap();
    // The free places of online requests are theirs alone.
    drop((first, second));
    assert!(admit_all(&admission).is_empty());
    drop(batches);
    // The last online request is long ago.
    admission.0.lock().online_at = Instant::now().checked_sub(ONLINE_MEMORY);
    assert_eq!(admit_all(&admission).len(), 20);
}

#[tokio::test]
async fn batches_that_wait_for_a_held_permit_beside_online_requests_are_admitted() {
    let admission = open(2);
    drop(admission.admit(QueueId { tenant: "t".into(), batch: None }, Priority::default()).await);
    let mut batches = admit_all(&admission);
    assert_eq!(batches.len(), 1, "one place stays free");
    // The provider refuses, so the permit is held for a moment.
    let mut refused = batches.remove(0);
    refused.held = Instant::now().checked_add(Duration::from_millis(50));
    let waiting = admission.admit(batch(1), Priority::default());
    let mut waiting = Box::pin(waiting);
    assert!((&mut waiting).now_or_never().is_none());
    drop(refused);
    let admitted = tokio::time::timeout(Duration::from_secs(5), waiting).await;
    assert!(admitted.is_ok(), "the end of the hold wakes those who wait");
}

#[tokio::test]
async fn limits_of_an_own_credential_slow_nobody_else_down() {
    let admission = open(8);
    let before = admission.limit();
    for _ in 0..8 {
        let mut admitted = admission.admit(batch(1), Priority::default()).await.unwrap();
        admitted.set_own_credential(true);
        admission.update_remaining(&admitted, 0, Duration::from_secs(60));
        end(admitted, LimitFeedback::Refused(Some(Duration::from_secs(60))));
    }
    assert!(admission.limit() >= before, "{} {before}", admission.limit());
    assert!(admission.admit(batch(2), Priority::default()).now_or_never().is_some());
}
