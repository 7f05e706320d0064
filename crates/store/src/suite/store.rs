//! Suite of stores.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, FileId, ObjectKey, TenantId};
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;

use super::Fixture;
use crate::{
    BatchError, BatchRecord, Cancel, Claim, Created, FileQuery, FileRecord, Finish, Idempotency,
    Job, Lane, NewBatch, Order, Orders, Paged, PluginVersion, Release, ResultKind, ResultRow,
    Store, StoreError, Validated, WaitCause,
};

/// Start of every test.
const NOW: Timestamp = at(1_000_000);

/// End of leases that no test reaches.
const LEASE: Timestamp = at(2_000_000);

/// End of the completion window of every batch.
const EXPIRY: Timestamp = at(80_000_000);

const fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn tenant() -> TenantId {
    "t".into()
}

fn key(file: &str) -> ObjectKey {
    ObjectKey { tenant: tenant(), file: file.into() }
}

fn file(id: &str) -> FileRecord {
    FileRecord {
        id: id.into(),
        bytes: 10,
        created_at: NOW,
        expires_at: None,
        filename: "in.jsonl".into(),
        purpose: "batch".into(),
    }
}

fn query(after: Option<&str>, order: Order, limit: usize) -> FileQuery {
    FileQuery { purpose: None, order, after: after.map(Into::into), limit, now: NOW }
}

async fn insert_file(store: &dyn Store, file: FileRecord) {
    store.register_object(&key(file.id.as_str()), NOW, LEASE).await.unwrap();
    store.insert_file(&tenant(), file).await.unwrap();
}

fn new_batch(id: &str) -> NewBatch {
    NewBatch {
        id: id.into(),
        endpoint: Endpoint::Embeddings,
        input_file_id: "file-in".into(),
        completion_window: "24h".into(),
        metadata: Some([("project".to_owned(), "night".to_owned())].into()),
        created_at: NOW,
        expires_at: EXPIRY,
        output_lifetime: Some(Duration::from_secs(60)),
    }
}

async fn create(store: &dyn Store, id: &str) {
    let created = store.create_batch(&tenant(), new_batch(id), None).await.unwrap();
    assert!(matches!(created, Created::New));
}

async fn batch(store: &dyn Store, id: &str) -> BatchRecord {
    store.batch(&tenant(), &id.into()).await.unwrap().unwrap()
}

async fn cancel(store: &dyn Store, id: &str) -> Cancel {
    store.request_cancel(&tenant(), &id.into(), NOW).await.unwrap()
}

/// Claims the batch that waits in a lane, if any.
async fn claim_at(store: &dyn Store, lane: &Lane, now: Timestamp) -> Option<Claim> {
    let waiting = store.waiting(now).await.unwrap();
    let first = waiting.iter().find(|waiting| waiting.lane == *lane)?;
    let claim = store.claim(first, now, LEASE).await.unwrap().unwrap();
    assert!(store.claim(first, now, LEASE).await.unwrap().is_none(), "claimed twice");
    Some(claim)
}

async fn claim(store: &dyn Store, lane: &Lane) -> Claim {
    claim_at(store, lane, NOW).await.unwrap()
}

fn execution() -> Lane {
    Lane::Execute(["fast".to_owned(), "slow".to_owned()].into())
}

fn validated(total: u64) -> Validated {
    let plugins: BTreeSet<_> = ["fast".to_owned(), "slow".to_owned()].into();
    Validated { total, model: Some("m".into()), plugins, judged_by: vec![version("standard")] }
}

fn version(name: &str) -> PluginVersion {
    PluginVersion {
        name: name.into(),
        kind: "adapter".into(),
        version: "1.0.0".into(),
        sha256: "00".into(),
    }
}

/// Creates a batch, validates it and claims it for its execution.
async fn executing(store: &dyn Store, id: &str, total: u64) -> Claim {
    create(store, id).await;
    let validating = claim(store, &Lane::Validate).await;
    store.start_execution(&validating, validated(total), NOW).await.unwrap();
    claim(store, &execution()).await
}

fn row(line: u64, kind: ResultKind, payload: &[u8]) -> ResultRow {
    let usage = TokenUsage { input: 2, cached_input: 1, output: 3, reasoning: 1 };
    ResultRow { line, kind, payload: payload.to_vec(), usage }
}

fn finish(status: Status, output: Option<FileRecord>) -> Finish {
    Finish { status, errors: Vec::new(), output, error: None, at: NOW }
}

async fn listed(store: &dyn Store, query: FileQuery) -> (Vec<String>, bool) {
    match store.files(&tenant(), query).await.unwrap() {
        Paged::Page(page) => {
            (page.items.iter().map(|file| file.id.to_string()).collect(), page.has_more)
        }
        Paged::UnknownAfter => panic!("the page starts after an unknown file"),
    }
}

pub(crate) async fn files_are_listed_in_order_and_pages_continue_after_an_id(
    fixture: impl Fixture,
) {
    let store = fixture.open();
    for id in ["a", "b", "c"] {
        insert_file(&*store, file(id)).await;
    }
    insert_file(&*store, FileRecord { expires_at: Some(NOW), ..file("expired") }).await;
    let newest = |after, limit| query(after, Order::NewestFirst, limit);
    assert_eq!(listed(&*store, newest(None, 2)).await, (vec!["c".into(), "b".into()], true));
    assert_eq!(listed(&*store, newest(Some("b"), 2)).await, (vec!["a".into()], false));
    let oldest = query(Some("a"), Order::OldestFirst, 9);
    assert_eq!(listed(&*store, oldest).await, (vec!["b".into(), "c".into()], false));
    let unknown = store.files(&tenant(), newest(Some("x"), 2)).await.unwrap();
    assert!(matches!(unknown, Paged::UnknownAfter));
    let other = FileQuery { purpose: Some("batch_output".into()), ..newest(None, 9) };
    assert!(listed(&*store, other).await.0.is_empty());
    assert_eq!(store.file(&tenant(), &"a".into(), NOW).await.unwrap(), Some(file("a")));
    assert_eq!(store.file(&tenant(), &"expired".into(), NOW).await.unwrap(), None);
}

pub(crate) async fn deleted_file_is_removable_once_no_batch_reads_it(fixture: impl Fixture) {
    let store = fixture.open();
    insert_file(&*store, file("file-in")).await;
    create(&*store, "b").await;
    let delete = async || store.delete_file(&tenant(), &"file-in".into(), NOW).await.unwrap();
    assert!(delete().await && !delete().await);
    assert!(store.removable_files(NOW, 9).await.unwrap().is_empty());
    let held = claim(&*store, &Lane::Validate).await;
    assert_eq!(store.input_file(&held).await.unwrap(), Some(file("file-in")));
    store.fail(&held, Vec::new(), Vec::new(), NOW).await.unwrap();
    assert_eq!(store.removable_files(NOW, 9).await.unwrap(), [key("file-in")]);
}

pub(crate) async fn tombstone_keeps_the_place_of_a_removed_file_until_it_is_purged(
    fixture: impl Fixture,
) {
    let store = fixture.open();
    for id in ["a", "b", "c"] {
        insert_file(&*store, file(id)).await;
    }
    store.delete_file(&tenant(), &"b".into(), NOW).await.unwrap();
    store.mark_file_removed(&key("b")).await.unwrap();
    assert!(store.removable_files(NOW, 9).await.unwrap().is_empty());
    let after = query(Some("b"), Order::NewestFirst, 9);
    assert_eq!(listed(&*store, after.clone()).await.0, ["a"]);
    assert!(!store.purge_tombstones(NOW, 9).await.unwrap());
    assert_eq!(listed(&*store, after.clone()).await.0, ["a"]);
    store.purge_tombstones(at(1_000_001), 9).await.unwrap();
    assert!(matches!(store.files(&tenant(), after).await.unwrap(), Paged::UnknownAfter));
    assert_eq!(store.newest_files(NOW, 1).await.unwrap(), [key("c")]);
}

pub(crate) async fn foreign_ids_are_unknown(fixture: impl Fixture) {
    let store = fixture.open();
    insert_file(&*store, file("file-in")).await;
    create(&*store, "b").await;
    for other in ["other", "t2", ""] {
        let (other, id): (TenantId, BatchId) = (other.into(), "b".into());
        let file: FileId = "file-in".into();
        assert!(store.batch(&other, &id).await.unwrap().is_none());
        assert!(store.batch_errors(&other, &id).await.unwrap().is_empty());
        assert!(store.plugin_versions(&other, &id).await.unwrap().is_none());
        let cancelled = store.request_cancel(&other, &id, NOW).await.unwrap();
        assert!(matches!(cancelled, Cancel::Unknown));
        let page = store.batches(&other, Some(id), 9, 9).await.unwrap();
        assert!(matches!(page, Paged::UnknownAfter));
        assert!(store.file(&other, &file, NOW).await.unwrap().is_none());
        assert!(!store.delete_file(&other, &file, NOW).await.unwrap());
        let page = store.files(&other, query(Some("file-in"), Order::OldestFirst, 9)).await;
        assert!(matches!(page.unwrap(), Paged::UnknownAfter));
        // A batch of the other tenant with this file has no input.
        store.create_batch(&other, new_batch("theirs"), None).await.unwrap();
        let held = claim_at(&*store, &Lane::Validate, NOW).await.unwrap();
        if held.tenant == other {
            assert!(store.input_file(&held).await.unwrap().is_none());
        }
    }
    assert_eq!(batch(&*store, "b").await.status, Status::Validating);
}

pub(crate) async fn object_without_registration_gets_no_record(fixture: impl Fixture) {
    let store = fixture.open();
    let refused = store.insert_file(&tenant(), file("a")).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    assert!(store.file(&tenant(), &"a".into(), NOW).await.unwrap().is_none());
    let refused = store.renew_object(&key("a"), LEASE).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    // The commit of a record consumes the registration.
    insert_file(&*store, file("a")).await;
    let again = store.insert_file(&tenant(), file("a")).await;
    assert!(matches!(again, Err(StoreError::Unregistered)));
    assert!(store.take_abandoned_objects(EXPIRY, EXPIRY, 9).await.unwrap().is_empty());
    // A batch ends with all of its files or not at all.
    let held = executing(&*store, "b", 0).await;
    let refused = store.finish(&held, finish(Status::Completed, Some(file("out")))).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    assert_eq!(batch(&*store, "b").await.status, Status::InProgress);
}

pub(crate) async fn abandoned_object_is_taken_once_and_not_written_meanwhile(
    fixture: impl Fixture,
) {
    let store = fixture.open();
    let take = async |now| store.take_abandoned_objects(now, LEASE, 9).await.unwrap();
    store.register_object(&key("a"), NOW, LEASE).await.unwrap();
    store.abandon_object(&key("a")).await.unwrap();
    assert_eq!(take(NOW).await, [key("a")]);
    assert!(take(NOW).await.is_empty());
    let refused = store.register_object(&key("a"), NOW, LEASE).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    let refused = store.insert_file(&tenant(), file("a")).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    // A removal that does not end is repeated.
    assert_eq!(take(LEASE).await, [key("a")]);
    store.unregister_object(&key("a")).await.unwrap();
    insert_file(&*store, file("a")).await;
    // The record of a committed object is not abandoned by a writer that learns of it too late.
    store.abandon_object(&key("a")).await.unwrap();
    assert!(take(EXPIRY).await.is_empty());
}

pub(crate) async fn registration_in_time_keeps_its_object(fixture: impl Fixture) {
    let store = fixture.open();
    store.register_object(&key("a"), NOW, at(1_000_100)).await.unwrap();
    store.renew_object(&key("a"), LEASE).await.unwrap();
    // Even a clock that jumps past the lease removes no object of its own writer.
    assert!(store.take_abandoned_objects(LEASE, EXPIRY, 9).await.unwrap().is_empty());
    store.insert_file(&tenant(), file("a")).await.unwrap();
    store.register_object(&key("lost"), NOW, LEASE).await.unwrap();
    let days_later = LEASE.after(Duration::from_secs(2 * 86_400));
    let taken = store.take_abandoned_objects(days_later, days_later, 9).await.unwrap();
    assert_eq!(taken, [key("lost")]);
}

pub(crate) async fn reopened_store_ends_the_registrations_and_claims_of_its_owner(
    fixture: impl Fixture,
) {
    let store = fixture.open();
    store.register_object(&key("a"), NOW, LEASE).await.unwrap();
    create(&*store, "b").await;
    let before = claim(&*store, &Lane::Validate).await;
    store.close().await;
    drop(store);
    let store = fixture.open();
    assert_eq!(store.take_abandoned_objects(NOW, LEASE, 9).await.unwrap(), [key("a")]);
    let after = claim(&*store, &Lane::Validate).await;
    assert!(after.fence > before.fence);
}

pub(crate) async fn idempotency_key_creates_one_batch(fixture: impl Fixture) {
    let store = fixture.open();
    let create = async |tenant: &str, id, fingerprint| {
        let idempotency = Idempotency { key: "key".into(), fingerprint: [fingerprint; 32] };
        store.create_batch(&tenant.into(), new_batch(id), Some(idempotency)).await.unwrap()
    };
    assert!(matches!(create("t", "one", 1).await, Created::New));
    match create("t", "two", 1).await {
        Created::Existing(found) => assert_eq!(found.new.id.as_str(), "one"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(create("t", "three", 2).await, Created::Conflict));
    assert!(matches!(create("other", "four", 2).await, Created::New));
    let concurrent = (0..8).map(|number| {
        let store = store.clone();
        tokio::spawn(async move {
            let idempotency = Idempotency { key: "same".into(), fingerprint: [0; 32] };
            let new = new_batch(&format!("c{number}"));
            store.create_batch(&tenant(), new, Some(idempotency)).await.unwrap()
        })
    });
    let mut created = 0;
    for task in concurrent.collect::<Vec<_>>() {
        created += usize::from(matches!(task.await.unwrap(), Created::New));
    }
    assert_eq!(created, 1);
}

pub(crate) async fn batch_pages_end_at_a_number_and_at_a_size(fixture: impl Fixture) {
    let store = fixture.open();
    for id in ["a", "b", "c"] {
        create(&*store, id).await;
    }
    let page = async |after: Option<&str>, limit, bytes| match store
        .batches(&tenant(), after.map(Into::into), limit, bytes)
        .await
        .unwrap()
    {
        Paged::Page(page) => {
            let ids = page.items.iter().map(|batch| batch.new.id.to_string());
            (ids.collect::<Vec<_>>(), page.has_more)
        }
        Paged::UnknownAfter => panic!("the page starts after an unknown batch"),
    };
    assert_eq!(page(None, 2, 1 << 20).await, (vec!["c".into(), "b".into()], true));
    assert_eq!(page(Some("b"), 2, 1 << 20).await, (vec!["a".into()], false));
    // A page has at least one entry.
    assert_eq!(page(None, 9, 1).await, (vec!["c".into()], true));
    let unknown = store.batches(&tenant(), Some("x".into()), 2, 1 << 20).await.unwrap();
    assert!(matches!(unknown, Paged::UnknownAfter));
    let found = batch(&*store, "a").await.new;
    assert_eq!((found.metadata, found.endpoint), (new_batch("a").metadata, Endpoint::Embeddings));
    assert_eq!(found.output_lifetime, Some(Duration::from_secs(60)));
}

pub(crate) async fn claim_succeeds_once_and_returns_in_the_order_of_the_lane(
    fixture: impl Fixture,
) {
    let store = fixture.open();
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
    store.start_execution(&other, validated(1), NOW).await.unwrap();
    assert!(claim_at(&*store, &execution(), NOW).await.is_some());
    // An expired batch waits in the finish lane and not for its provider.
    let last = claim_at(&*store, &Lane::Validate, later).await.unwrap();
    store.start_execution(&last, validated(1), NOW).await.unwrap();
    assert!(claim_at(&*store, &Lane::Finish, later).await.is_none());
    assert!(claim_at(&*store, &Lane::Finish, EXPIRY).await.is_some());
    assert!(store.waiting(EXPIRY).await.unwrap().is_empty());
}

pub(crate) async fn expired_lease_is_not_taken_over_by_its_own_holder(fixture: impl Fixture) {
    let store = fixture.open();
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
    let store = fixture.open();
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
        store.start_execution(&stale, validated(9), NOW).await,
        store.insert_results(&stale, rows, vec![version("stale")]).await,
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
    let store = fixture.open();
    let held = executing(&*store, "b", 1).await;
    assert_eq!(store.renew(&held, LEASE).await.unwrap(), Orders { cancel: false });
    assert!(matches!(cancel(&*store, "b").await, Cancel::Accepted(_)));
    assert_eq!(store.renew(&held, LEASE).await.unwrap(), Orders { cancel: true });
}

pub(crate) async fn backoff_delays_a_batch_until_it_ends_or_is_ended(fixture: impl Fixture) {
    let store = fixture.open();
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
    store.insert_results(&held, rows, Vec::new()).await.unwrap();
    assert_eq!(batch(&*store, "b").await.waits_for, None);
    // A cancelled batch has no backoff.
    store.release(&held, backoff()).await.unwrap();
    cancel(&*store, "b").await;
    assert!(claim_at(&*store, &Lane::Finish, NOW).await.is_some());
}

pub(crate) async fn cancelled_batch_ends_as_cancelled_whatever_its_worker_says(
    fixture: impl Fixture,
) {
    let store = fixture.open();
    create(&*store, "invalid").await;
    let held = claim(&*store, &Lane::Validate).await;
    cancel(&*store, "invalid").await;
    let error = BatchError { code: "c".into(), message: "m".into(), param: None, line: Some(7) };
    let errors = vec![error; 7];
    store.fail(&held, errors.clone(), vec![version("standard")], NOW).await.unwrap();
    let found = batch(&*store, "invalid").await;
    assert_eq!((found.status, found.times.cancelled_at), (Status::Cancelled, Some(NOW)));
    assert_eq!(found.times.failed_at, None);
    // The record has the first errors, and a notice.
    assert!(found.has_more_errors());
    let all = store.batch_errors(&tenant(), &"invalid".into()).await.unwrap();
    assert_eq!(all, errors);

    let held = executing(&*store, "late", 0).await;
    store.start_finalizing(&held, NOW).await.unwrap();
    assert_eq!(batch(&*store, "late").await.status, Status::Finalizing);
    cancel(&*store, "late").await;
    let expired = store.finish(&held, finish(Status::Expired, None)).await;
    assert!(matches!(expired, Err(StoreError::CancelledFirst)));
    store.finish(&held, finish(Status::Completed, None)).await.unwrap();
    assert_eq!(batch(&*store, "late").await.status, Status::Cancelled);
    assert!(matches!(cancel(&*store, "late").await, Cancel::Accepted(_)));
    let held = executing(&*store, "done", 0).await;
    store.finish(&held, finish(Status::Completed, None)).await.unwrap();
    assert!(matches!(cancel(&*store, "done").await, Cancel::TooLate(Status::Completed)));
    assert!(matches!(cancel(&*store, "unknown").await, Cancel::Unknown));
}

pub(crate) async fn line_keeps_its_first_result_and_counts_once(fixture: impl Fixture) {
    let store = fixture.open();
    let held = executing(&*store, "b", 3).await;
    let first = vec![row(1, ResultKind::Completed, b"1"), row(3, ResultKind::Failed, b"3")];
    let again = vec![row(1, ResultKind::Failed, b"x"), row(2, ResultKind::Completed, b"2")];
    for rows in [first, again] {
        store.insert_results(&held, Arc::new(rows), vec![version("p")]).await.unwrap();
    }
    let found = batch(&*store, "b").await;
    assert_eq!((found.counts.completed, found.counts.failed), (2, 1));
    assert!(found.counts.is_whole());
    assert_eq!(found.usage, TokenUsage { input: 6, cached_input: 3, output: 9, reasoning: 3 });
    assert_eq!(store.recorded_lines(&held, 1, 9).await.unwrap(), [2, 3]);
    let results = store.results(&held, 0, 1 << 20).await.unwrap().rows;
    assert_eq!(results.iter().map(|row| &*row.payload).collect::<Vec<_>>(), [b"1", b"2", b"3"]);
    let versions = store.plugin_versions(&tenant(), &"b".into()).await.unwrap().unwrap();
    assert_eq!(versions, [version("standard"), version("p")]);
    // Sums of what guests report stop at the largest number.
    let usage = TokenUsage { input: u64::MAX, ..TokenUsage::default() };
    let huge = |line| ResultRow { usage, ..row(line, ResultKind::Completed, b"") };
    store.insert_results(&held, Arc::new(vec![huge(8), huge(9)]), Vec::new()).await.unwrap();
    assert!(batch(&*store, "b").await.usage.input >= i64::MAX as u64);
}

pub(crate) async fn results_are_read_in_order_within_a_size(fixture: impl Fixture) {
    let store = fixture.open();
    let held = executing(&*store, "b", 4).await;
    let payload = vec![b'x'; 1000];
    let rows = [4, 2, 1].map(|line| row(line, ResultKind::Completed, &payload)).to_vec();
    let large = row(3, ResultKind::Failed, &vec![b'y'; 5000]);
    let rows = rows.into_iter().chain([large]).collect();
    store.insert_results(&held, Arc::new(rows), Vec::new()).await.unwrap();
    let page = store.results(&held, 0, 2500).await.unwrap();
    assert_eq!(page.rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2]);
    let page = store.results(&held, 2, 2500).await.unwrap();
    assert!(page.rows.is_empty());
    let size = page.too_large.unwrap();
    let page = store.results(&held, 2, size).await.unwrap();
    let [found] = &page.rows[..] else { panic!("{page:?}") };
    assert_eq!((found.line, found.kind, found.payload.len()), (3, ResultKind::Failed, 5000));
    assert_eq!(store.results(&held, 4, 2500).await.unwrap().rows.len(), 0);
}

pub(crate) async fn saved_job_is_replaced_and_deleted(fixture: impl Fixture) {
    let store = fixture.open();
    let held = executing(&*store, "b", 2).await;
    assert!(!store.has_jobs(&held).await.unwrap());
    let job = |state: &[u8]| Job { plugin: "p".into(), state: state.to_vec() };
    for state in [b"one", b"two"] {
        store.save_job(&held, 2, job(state)).await.unwrap();
    }
    assert!(store.has_jobs(&held).await.unwrap());
    assert_eq!(store.job(&held, 2).await.unwrap(), Some(job(b"two")));
    assert_eq!(store.job(&held, 1).await.unwrap(), None);
    store.delete_job(&held, 2).await.unwrap();
    assert!(!store.has_jobs(&held).await.unwrap());
}

pub(crate) async fn finished_batch_has_its_files_and_discards_its_results(fixture: impl Fixture) {
    let store = fixture.open();
    let held = executing(&*store, "b", 3).await;
    let rows = [1, 2, 3].map(|line| row(line, ResultKind::Completed, b"x")).to_vec();
    store.insert_results(&held, Arc::new(rows), Vec::new()).await.unwrap();
    store.start_finalizing(&held, NOW).await.unwrap();
    store.register_object(&key("out"), NOW, LEASE).await.unwrap();
    assert!(!store.discard_results(2).await.unwrap());
    store.finish(&held, finish(Status::Completed, Some(file("out")))).await.unwrap();
    let found = batch(&*store, "b").await;
    assert_eq!((found.status, found.times.completed_at), (Status::Completed, Some(NOW)));
    assert_eq!(found.output_file_id, Some("out".into()));
    assert_eq!(store.file(&tenant(), &"out".into(), NOW).await.unwrap(), Some(file("out")));
    assert!(store.waiting(EXPIRY).await.unwrap().is_empty());
    let mut steps = 0;
    while store.discard_results(2).await.unwrap() {
        steps += 1;
        assert!(steps < 9, "discarding does not end");
    }
    assert!(store.recorded_lines(&held, 0, 9).await.unwrap().is_empty());
    assert!(batch(&*store, "b").await.counts.is_whole());
}

pub(crate) async fn ended_batch_is_deleted_once_its_files_are_gone(fixture: impl Fixture) {
    let store = fixture.open();
    let held = executing(&*store, "b", 0).await;
    store.register_object(&key("out"), NOW, LEASE).await.unwrap();
    store.finish(&held, finish(Status::Completed, Some(file("out")))).await.unwrap();
    while store.discard_results(9).await.unwrap() {}
    let removable = async || store.removable_batches(LEASE, 9).await.unwrap();
    assert!(removable().await.is_empty());
    store.delete_file(&tenant(), &"out".into(), NOW).await.unwrap();
    store.mark_file_removed(&key("out")).await.unwrap();
    assert!(store.removable_batches(NOW, 9).await.unwrap().is_empty());
    let found = removable().await;
    assert_eq!(found.len(), 1);
    store.delete_batches(found).await.unwrap();
    assert!(store.batch(&tenant(), &"b".into()).await.unwrap().is_none());
    while store.compact().await.unwrap() {}
}

pub(crate) async fn closed_store_refuses_writes(fixture: impl Fixture) {
    let store = fixture.open();
    create(&*store, "b").await;
    store.probe(NOW).await.unwrap();
    store.probe_read().await.unwrap();
    store.close().await;
    let refused = store.create_batch(&tenant(), new_batch("c"), None).await;
    assert!(matches!(refused, Err(StoreError::Closed)));
    assert!(matches!(store.probe(NOW).await, Err(StoreError::Closed)));
    drop(store);
    let store = fixture.open();
    assert_eq!(batch(&*store, "b").await.status, Status::Validating);
}
