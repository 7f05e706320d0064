//! Files, tombstones and registrations of objects.

use std::time::Duration;

use batchwright_domain::status::Status;

use super::*;
use crate::suite::Fixture;
use crate::{FileQuery, FileRecord, Lane, Order, Paged, Store, StoreError};

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
    let store = open(&fixture).await;
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
    let store = open(&fixture).await;
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
    let store = open(&fixture).await;
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

pub(crate) async fn object_without_registration_gets_no_record(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let refused = store.insert_file(&tenant(), file("a"), StorageBounds::default()).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    assert!(store.file(&tenant(), &"a".into(), NOW).await.unwrap().is_none());
    let refused = store.renew_object(&key("a"), LEASE).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    // The commit of a record consumes the registration.
    insert_file(&*store, file("a")).await;
    let again = store.insert_file(&tenant(), file("a"), StorageBounds::default()).await;
    assert!(matches!(again, Err(StoreError::Unregistered)));
    assert_eq!(store.take_abandoned_object(EXPIRY, EXPIRY).await.unwrap(), None);
    // A batch ends with all of its files or not at all.
    let held = executing(&*store, "b", 0).await;
    let refused = store.finish(&held, finish(Status::Completed, Some(file("out")))).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    assert_eq!(batch(&*store, "b").await.status, Status::InProgress);
}

pub(crate) async fn abandoned_object_is_taken_once_and_not_written_meanwhile(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    let take = async |now| store.take_abandoned_object(now, LEASE).await.unwrap();
    store.register_object(&key("a"), NOW, LEASE).await.unwrap();
    store.abandon_object(&key("a")).await.unwrap();
    assert_eq!(take(NOW).await, Some(key("a")));
    assert_eq!(take(NOW).await, None);
    let refused = store.register_object(&key("a"), NOW, LEASE).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    let refused = store.insert_file(&tenant(), file("a"), StorageBounds::default()).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    // A clock that jumps past the reservation lets nobody write an object that is being removed.
    let refused = store.register_object(&key("a"), LEASE, EXPIRY).await;
    assert!(matches!(refused, Err(StoreError::Unregistered)));
    // A removal that does not end is repeated.
    assert_eq!(take(LEASE).await, Some(key("a")));
    // After a removal that failed, the object may be written, and is removed later otherwise.
    store.postpone_removal(&key("a"), at(1_000_100)).await.unwrap();
    assert_eq!(take(NOW).await, None);
    assert_eq!(take(at(1_000_100)).await, Some(key("a")));
    store.postpone_removal(&key("a"), LEASE).await.unwrap();
    insert_file(&*store, file("a")).await;
    store.unregister_object(&key("a")).await.unwrap();
    store.register_object(&key("b"), NOW, LEASE).await.unwrap();
    // Only a removal unregisters.
    store.unregister_object(&key("b")).await.unwrap();
    store.renew_object(&key("b"), LEASE).await.unwrap();
    store.abandon_object(&key("b")).await.unwrap();
    assert_eq!(take(NOW).await, Some(key("b")));
    store.unregister_object(&key("b")).await.unwrap();
    // The record of a committed object is not abandoned by a writer that learns of it too late.
    store.abandon_object(&key("a")).await.unwrap();
    assert_eq!(take(EXPIRY).await, None);
}

pub(crate) async fn registration_in_time_keeps_its_object(fixture: impl Fixture) {
    let store = open(&fixture).await;
    store.register_object(&key("a"), NOW, at(1_000_100)).await.unwrap();
    store.renew_object(&key("a"), LEASE).await.unwrap();
    // Even a clock that jumps past the lease removes no object of its own writer.
    assert_eq!(store.take_abandoned_object(LEASE, EXPIRY).await.unwrap(), None);
    store.insert_file(&tenant(), file("a"), StorageBounds::default()).await.unwrap();
    store.register_object(&key("lost"), NOW, LEASE).await.unwrap();
    let days_later = LEASE.after(Duration::from_secs(2 * 86_400));
    let taken = store.take_abandoned_object(days_later, days_later).await.unwrap();
    assert_eq!(taken, Some(key("lost")));
}
