//! Claims, leases and fences.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::ids::TenantId;
use batchwright_domain::status::Status;
use batchwright_domain::window::{self, Urgency};

use super::*;
use crate::suite::Fixture;
use crate::{
    Cancel, Counts, Job, Lane, OpenBatches, Orders, Overview, Release, ResultKind, StoreError,
    WaitCause,
};

pub(crate) async fn reopened_store_ends_the_registrations_and_claims_of_its_owner(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    store.register_object(&key("a"), NOW, LEASE).await.unwrap();
    create(&*store, "b").await;
    let before = claim(&*store, &Lane::Validate).await;
    store.close().await;
    drop(store);
    let store = open(&fixture).await;
    assert_eq!(store.take_abandoned_object(NOW, LEASE).await.unwrap(), Some(key("a")));
    let after = claim(&*store, &Lane::Validate).await;
    assert!(after.fence > before.fence);
}

pub(crate) async fn claim_succeeds_once_and_returns_in_the_order_of_the_lane(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    for id in ["a", "b"] {
        create(&*store, id).await;
    }
    let first = claim(&*store, &Lane::Validate).await;
    assert_eq!((first.batch_id.as_str(), first.tenant.as_str()), ("a", "t"));
    // A batch that keeps its position is the next again; one that had its turn is the last.
    store.release(&first, Release::KeepPosition).await.unwrap();
    let again = claim(&*store, &Lane::Validate).await;
    assert_eq!(again.batch_id, first.batch_id);
    store.release(&again, Release::Requeue(NOW.after(Duration::from_secs(1)))).await.unwrap();
    let later = NOW.after(Duration::from_secs(2));
    let other = claim_at(&*store, &Lane::Validate, later).await.unwrap();
    assert_eq!(other.batch_id.as_str(), "b");
    store.start_execution(&other, validated(1), NOW, false).await.unwrap();
    assert!(claim_at(&*store, &execution(), NOW).await.is_some());
    // An expired batch waits in the finish lane and not for its provider.
    let last = claim_at(&*store, &Lane::Validate, later).await.unwrap();
    store.start_execution(&last, validated(1), NOW, false).await.unwrap();
    assert!(claim_at(&*store, &Lane::Finish, later).await.is_none());
    assert!(claim_at(&*store, &Lane::Finish, EXPIRY).await.is_some());
    assert!(store.waiting(EXPIRY).await.unwrap().is_empty());
}

pub(crate) async fn batch_whose_window_is_about_to_end_is_found_behind_older_ones(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    let window = window::MAX_URGENT_REST;
    for (id, window) in [("long", 9 * window), ("short", window), ("shorter", window / 2)] {
        let new = NewBatch { expires_at: NOW.after(window), ..new_batch(id) };
        store.create_batch(&tenant(), new, None, None).await.unwrap();
    }
    let mut claims = Vec::new();
    while let Some(claim) = claim_at(&*store, &Lane::Validate, NOW).await {
        store.start_execution(&claim, validated(1), NOW, false).await.unwrap();
        claims.push(claim);
    }
    assert_eq!(claims.len(), 3);
    let found = async |at: Timestamp| {
        let waiting = store.waiting(at).await.unwrap().into_iter();
        waiting
            .filter(|waiting| waiting.lane == execution())
            .map(|waiting| (waiting.key, waiting.urgency))
            .collect::<Vec<_>>()
    };
    let early = found(NOW).await;
    assert!(matches!(early[..], [(_, Urgency::Dated)]), "{early:?}");
    // A tenth of half a window is left, and less than a tenth of nothing else.
    let late = NOW.after(window / 2 - window / 20);
    let late = found(late).await;
    assert_eq!(late.len(), 2, "{late:?}");
    assert_eq!(
        late.iter().filter(|(_, urgency)| *urgency == Urgency::Urgent).count(),
        1,
        "{late:?}"
    );
    assert!(late.contains(&early[0]), "{late:?}");
}

pub(crate) async fn batch_without_a_deadline_hides_no_other_and_never_expires(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    let windows = [("undated", Timestamp::NEVER), ("dated", NOW.after(window::MAX_URGENT_REST))];
    for (id, expires_at) in windows {
        let new = NewBatch { expires_at, ..new_batch(id) };
        store.create_batch(&tenant(), new, None, None).await.unwrap();
    }
    for at in [NOW, at(NOW.as_millis() + 1)] {
        let validating = claim_at(&*store, &Lane::Validate, at).await.unwrap();
        store.start_execution(&validating, validated(1), at, false).await.unwrap();
    }
    let waiting = store.waiting(at(NOW.as_millis() + 1)).await.unwrap();
    let mut found: Vec<_> = waiting.iter().map(|found| (&found.lane, found.urgency)).collect();
    found.sort_by_key(|(_, urgency)| *urgency);
    let lane = execution();
    assert_eq!(found, [(&lane, Urgency::Dated), (&lane, Urgency::Undated)]);
    // Long after every other window.
    let waiting = store.waiting(at(i64::MAX - 1)).await.unwrap();
    let undated = waiting.iter().find(|found| found.urgency == Urgency::Undated).unwrap();
    assert_eq!(undated.lane, lane);
    let claimed = store.claim(undated, at(i64::MAX - 1), at(i64::MAX)).await.unwrap().unwrap();
    assert_eq!(claimed.lane, lane);
}

pub(crate) async fn expired_lease_is_not_taken_over_by_its_own_holder(fixture: impl Fixture) {
    let store = open(&fixture).await;
    create(&*store, "b").await;
    let held = claim(&*store, &Lane::Validate).await;
    assert!(store.waiting(EXPIRY).await.unwrap().is_empty());
    assert_eq!(store.renew(&held, EXPIRY).await.unwrap(), Orders::default());
    store.release(&held, Release::KeepPosition).await.unwrap();
    // A renewal that arrives late does not claim a released batch.
    store.renew(&held, EXPIRY).await.unwrap();
    assert!(claim_at(&*store, &Lane::Validate, NOW).await.is_some());
}

pub(crate) async fn stale_claim_changes_nothing(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let stale = executing(&*store, "b", 1).await;
    store.release(&stale, Release::KeepPosition).await.unwrap();
    let held = claim(&*store, &execution()).await;
    let job = Job { plugin: "p".into(), state: b"state".to_vec() };
    store.save_job(&held, 1, job.clone()).await.unwrap();
    store.register_object(&key("out"), NOW, LEASE).await.unwrap();
    let rows = Arc::new(vec![row(1, ResultKind::Completed, b"stale")]);
    let stale_calls = [
        store.renew(&stale, LEASE).await.map(drop),
        store.release(&stale, Release::KeepPosition).await,
        store.save_job(&stale, 1, Job { plugin: "p".into(), state: b"other".to_vec() }).await,
        store.fail(&stale, Vec::new(), Vec::new(), NOW).await,
        store.start_execution(&stale, validated(9), NOW, false).await.map(drop),
        store.insert_results(&stale, rows, vec![version("stale")], NOW).await,
        store.start_finalizing(&stale, NOW).await,
        store.finish(&stale, finish(Status::Completed, Some(file("out")))).await,
    ];
    for (place, refused) in stale_calls.into_iter().enumerate() {
        assert!(matches!(refused, Err(StoreError::Fenced)), "call {place}: {refused:?}");
    }
    store.delete_job(&stale, 1).await.ok();
    assert_eq!(store.job(&held, 1).await.unwrap(), Some(job));
    let found = batch(&*store, "b").await;
    assert_eq!((found.status, found.counts.total), (Status::InProgress, 1));
    assert_eq!(found.counts.completed, 0);
    assert!(store.recorded_lines(&held, 0, 9).await.unwrap().is_empty());
    assert!(store.file(&tenant(), &"out".into(), NOW).await.unwrap().is_none());
    let versions = store.plugin_versions(&tenant(), &"b".into()).await.unwrap();
    assert_eq!(versions, Some(vec![version("standard")]));
    // The registration of the object is still there for the holder of the batch.
    store.finish(&held, finish(Status::Completed, Some(file("out")))).await.unwrap();
}

pub(crate) async fn renewal_returns_the_order_to_cancel(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 1).await;
    assert_eq!(store.renew(&held, LEASE).await.unwrap(), Orders { cancel: false });
    assert!(matches!(cancel(&*store, "b").await, Cancel::Accepted(_)));
    assert_eq!(store.renew(&held, LEASE).await.unwrap(), Orders { cancel: true });
}

pub(crate) async fn backoff_delays_a_batch_until_it_ends_or_is_ended(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 1).await;
    let until = NOW.after(Duration::from_secs(60));
    let cause = WaitCause { cause: "The provider is down.".into(), since: NOW, next: until };
    let backoff = || Release::Backoff(until, Some(cause.clone()));
    store.release(&held, backoff()).await.unwrap();
    assert_eq!(batch(&*store, "b").await.waits_for, Some(cause.clone()));
    assert!(claim_at(&*store, &execution(), NOW).await.is_none());
    let held = claim_at(&*store, &execution(), until).await.unwrap();
    store.release(&held, backoff()).await.unwrap();
    store.end_backoff(NOW).await.unwrap();
    let held = claim_at(&*store, &execution(), NOW).await.unwrap();
    // A result shows that the wait is over.
    let rows = Arc::new(vec![row(1, ResultKind::Completed, b"x")]);
    store.insert_results(&held, rows, Vec::new(), NOW).await.unwrap();
    assert_eq!(batch(&*store, "b").await.waits_for, None);
    // A cancelled batch has no backoff.
    store.release(&held, backoff()).await.unwrap();
    cancel(&*store, "b").await;
    assert!(claim_at(&*store, &Lane::Finish, NOW).await.is_some());
}

pub(crate) async fn overview_counts_open_batches_and_orders_them_by_deadline(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    assert_eq!(store.overview(NOW, 9).await.unwrap().open, []);
    let first = executing(&*store, "first", 3).await;
    let row = row(1, ResultKind::Completed, b"{}");
    store.insert_results(&first, Arc::new(vec![row]), vec![], NOW).await.unwrap();
    let mut sooner = new_batch("sooner");
    sooner.expires_at = at(70_000_000);
    store.create_batch(&tenant(), sooner, None, None).await.unwrap();
    let validating = claim(&*store, &Lane::Validate).await;
    store.start_execution(&validating, validated(5), NOW, false).await.unwrap();
    create(&*store, "third").await;
    let Overview { open, dated } = store.overview(at(1_000_001), 9).await.unwrap();
    let of = |status| open.iter().find(|found| found.status == status).copied();
    let expected = |status, number, waiting| OpenBatches {
        status,
        number,
        waiting,
        oldest: NOW,
        waiting_since: Some(NOW),
    };
    assert_eq!(of(Status::Validating), Some(expected(Status::Validating, 1, 1)));
    assert_eq!(of(Status::InProgress), Some(expected(Status::InProgress, 2, 1)));
    assert_eq!(open.len(), 2);
    let counts: Vec<_> = dated.iter().map(|found| (found.counts, found.expires_at)).collect();
    let counted = |total, completed| Counts { total, completed, failed: 0 };
    assert_eq!(counts, [(counted(5, 0), at(70_000_000)), (counted(3, 1), EXPIRY)]);
    assert_eq!(store.overview(NOW, 1).await.unwrap().dated, dated[..1]);
    let disk = store.disk().await.unwrap();
    assert!(disk.database > 0 && disk.free <= disk.size, "{disk:?}");
}

pub(crate) async fn progress_has_open_batches_and_those_that_ended_since(fixture: impl Fixture) {
    let store = open(&fixture).await;
    insert_file(&*store, file("file-in")).await;
    create(&*store, "waits").await;
    let other = store.create_batch(&"other".into(), new_batch("theirs"), None, None).await;
    assert!(other.is_ok());
    let held = claim(&*store, &Lane::Validate).await;
    store.fail(&held, Vec::new(), Vec::new(), NOW).await.unwrap();
    let all = || vec![tenant(), "other".into(), "unknown".into()];
    let found = async |tenants: Vec<TenantId>, since: Option<Timestamp>| {
        let progress = store.batch_progress(tenants, since, 9).await.unwrap();
        let mut facts: Vec<_> =
            progress.iter().map(|one| format!("{} {:?}", one.id, one.status)).collect();
        facts.sort();
        facts
    };
    let ended = format!("{} Failed", held.batch_id);
    let open = if held.batch_id.as_str() == "waits" { "theirs" } else { "waits" };
    let open = format!("{open} Validating");
    assert_eq!(found(all(), None).await, std::slice::from_ref(&open));
    let mut both = [open.clone(), ended.clone()];
    both.sort();
    assert_eq!(found(all(), Some(NOW)).await, both);
    assert_eq!(found(all(), Some(at(NOW.as_millis() + 1))).await, std::slice::from_ref(&open));
    assert_eq!(found(vec![held.tenant.clone()], Some(NOW)).await, [ended]);
    // The limit is one of open batches of each tenant, the oldest.
    create(&*store, "later").await;
    create(&*store, "latest").await;
    let progress = store.batch_progress(all(), None, 1).await.unwrap();
    let ids: Vec<_> = progress.iter().map(|one| one.id.as_str()).collect();
    assert!(!ids.contains(&"latest") && ids.len() == if open.starts_with("waits") { 1 } else { 2 });
}
