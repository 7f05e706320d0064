//! Batches as clients see them, and their results.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, FileId, TenantId};
use batchwright_domain::limits::Limit;
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;

use super::*;
use crate::accounts::Refusal;
use crate::suite::Fixture;
use crate::{
    BatchError, Cancel, Created, Idempotency, Job, Lane, Order, Paged, ResultKind, ResultRow,
    StoreError,
};

pub(crate) async fn foreign_ids_are_unknown(fixture: impl Fixture) {
    let store = open(&fixture).await;
    insert_file(&*store, file("file-in")).await;
    create(&*store, "b").await;
    for other in ["other", "nobody", ""] {
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
        let created = store.create_batch(&other, new_batch("theirs"), None, None).await;
        if other.as_str() != "other" {
            assert_eq!(refusal(created), Refusal::UnknownProject);
            continue;
        }
        let held = claim_at(&*store, &Lane::Validate, NOW).await.unwrap();
        if held.tenant == other {
            assert!(store.input_file(&held).await.unwrap().is_none());
        }
    }
    assert_eq!(batch(&*store, "b").await.status, Status::Validating);
}

pub(crate) async fn idempotency_key_creates_one_batch(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let create = async |tenant: &str, id, fingerprint| {
        let idempotency = Idempotency { key: "key".into(), fingerprint: [fingerprint; 32] };
        store.create_batch(&tenant.into(), new_batch(id), Some(idempotency), None).await.unwrap()
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
            store.create_batch(&tenant(), new, Some(idempotency), None).await.unwrap()
        })
    });
    let mut created = 0;
    for task in concurrent.collect::<Vec<_>>() {
        created += usize::from(matches!(task.await.unwrap(), Created::New));
    }
    assert_eq!(created, 1);
}

pub(crate) async fn batch_pages_end_at_a_number_and_at_a_size(fixture: impl Fixture) {
    let store = open(&fixture).await;
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

pub(crate) async fn cancelled_batch_ends_as_cancelled_whatever_its_worker_says(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
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
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 3).await;
    let first = vec![row(1, ResultKind::Completed, b"1"), row(3, ResultKind::Failed, b"3")];
    let again = vec![row(1, ResultKind::Failed, b"x"), row(2, ResultKind::Completed, b"2")];
    for rows in [first, again] {
        store.insert_results(&held, Arc::new(rows), vec![version("p")], NOW).await.unwrap();
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
    store.insert_results(&held, Arc::new(vec![huge(8), huge(9)]), Vec::new(), NOW).await.unwrap();
    assert!(batch(&*store, "b").await.usage.input >= i64::MAX as u64);
}

pub(crate) async fn results_are_read_in_order_within_a_size(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 4).await;
    let payload = vec![b'x'; 1000];
    let rows = [4, 2, 1].map(|line| row(line, ResultKind::Completed, &payload)).to_vec();
    let large = row(3, ResultKind::Failed, &vec![b'y'; 5000]);
    let rows = rows.into_iter().chain([large]).collect();
    store.insert_results(&held, Arc::new(rows), Vec::new(), NOW).await.unwrap();
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
    let store = open(&fixture).await;
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
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 3).await;
    let rows = [1, 2, 3].map(|line| row(line, ResultKind::Completed, b"x")).to_vec();
    store.insert_results(&held, Arc::new(rows), Vec::new(), NOW).await.unwrap();
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

pub(crate) async fn batch_has_the_lifetime_of_its_project(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 0).await;
    store.finish(&held, finish(Status::Completed, None)).await.unwrap();
    while store.discard_results(9).await.unwrap() {}
    let removable = async |age: Duration, by_default: Duration| {
        let found = store.removable_batches(NOW.after(age), by_default, 9).await.unwrap();
        found.len() == 1
    };
    let lifetime = async |seconds| {
        let changes = [(Limit::BatchLifetime, seconds)].into();
        store.update_limits(&project(&tenant()), changes, operator()).await.unwrap();
    };
    assert!(removable(HOUR * 3, HOUR * 2).await && !removable(HOUR, HOUR * 2).await);
    // Shorter than that of the server, and longer.
    lifetime(Some(1800)).await;
    assert!(removable(HOUR, HOUR * 2).await);
    lifetime(Some(4 * 3600)).await;
    assert!(!removable(HOUR * 3, HOUR * 2).await && removable(HOUR * 5, HOUR * 2).await);
    lifetime(None).await;
    assert!(removable(HOUR * 3, HOUR * 2).await);
}

pub(crate) async fn ended_batch_is_deleted_once_its_files_are_gone(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let held = executing(&*store, "b", 0).await;
    store.register_object(&key("out"), NOW, LEASE).await.unwrap();
    store.finish(&held, finish(Status::Completed, Some(file("out")))).await.unwrap();
    while store.discard_results(9).await.unwrap() {}
    let removable = async || store.removable_batches(LEASE.after(HOUR), HOUR, 9).await.unwrap();
    assert!(removable().await.is_empty());
    store.delete_file(&tenant(), &"out".into(), NOW).await.unwrap();
    store.mark_file_removed(&key("out")).await.unwrap();
    assert!(store.removable_batches(NOW.after(HOUR), HOUR, 9).await.unwrap().is_empty());
    let found = removable().await;
    assert_eq!(found.len(), 1);
    store.delete_batches(found).await.unwrap();
    assert!(store.batch(&tenant(), &"b".into()).await.unwrap().is_none());
    while store.compact().await.unwrap() {}
}

pub(crate) async fn closed_store_refuses_writes(fixture: impl Fixture) {
    let store = open(&fixture).await;
    create(&*store, "b").await;
    store.probe(NOW).await.unwrap();
    store.probe_read().await.unwrap();
    store.close().await;
    let refused = store.create_batch(&tenant(), new_batch("c"), None, None).await;
    assert!(matches!(refused, Err(StoreError::Closed)));
    assert!(matches!(store.probe(NOW).await, Err(StoreError::Closed)));
    drop(store);
    let store = open(&fixture).await;
    assert_eq!(batch(&*store, "b").await.status, Status::Validating);
}
