//! Limits of projects, and what counts toward them.

use std::sync::Arc;

use super::*;
use batchwright_domain::limits::{Allowed, Limit, Limits, ModelRule, Permissions};

use crate::accounts::{LimitChanges, ProjectUse};

async fn used(store: &dyn Store) -> ProjectUse {
    store.policy_of(&project(&tenant())).await.unwrap().unwrap().1
}

pub(crate) async fn limits_and_models_of_a_project_are_changed_one_by_one(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let id = project(&tenant());
    let update = async |changes: LimitChanges| {
        store.update_limits(&id, changes, operator()).await.unwrap();
    };
    update([(Limit::OpenBatches, Some(2))].into()).await;
    update([(Limit::StoredFiles, Some(0)), (Limit::Weight, Some(7))].into()).await;
    let limits = Limits::default()
        .with(Limit::OpenBatches, Some(2))
        .with(Limit::StoredFiles, Some(0))
        .with(Limit::Weight, Some(7));
    assert_eq!(store.policy(&tenant()).await.unwrap().limits, limits);
    update([(Limit::OpenBatches, None)].into()).await;
    let limits = limits.with(Limit::OpenBatches, None);
    let policy = store.policy(&tenant()).await.unwrap();
    assert_eq!((policy.limits, policy.permissions), (limits, Permissions::default()));
    assert_eq!(store.policy(&"other".into()).await.unwrap().limits, Limits::default());
    assert_eq!(store.policy(&"nobody".into()).await.unwrap().limits, Limits::default());
    assert_eq!(store.policy_of(&"proj_x".into()).await.unwrap(), None);

    let windows: Option<BTreeSet<String>> = Some(["1h".to_owned(), "\"".to_owned()].into());
    let allowed = Permissions::default()
        .with(Allowed::CompletionWindows, windows.clone())
        .with(Allowed::Plugins, Some(BTreeSet::new()));
    let lists = [
        (Allowed::CompletionWindows, windows),
        (Allowed::Plugins, Some(BTreeSet::new())),
        (Allowed::Validators, None),
    ];
    update(LimitChanges { allowed: lists.into(), ..LimitChanges::default() }).await;
    assert_eq!(store.policy(&tenant()).await.unwrap().permissions, allowed);
    let rule = ModelRule::Allow(["a".to_owned(), "\"".to_owned()].into());
    store.set_models(&id, rule.clone(), operator()).await.unwrap();
    assert_eq!(store.policy(&tenant()).await.unwrap().permissions.models, rule);
    store.set_models(&id, ModelRule::default(), operator()).await.unwrap();
    assert_eq!(store.policy(&tenant()).await.unwrap().permissions, allowed);
    store.archive_project(&id, operator()).await.unwrap();
    let changed = store.update_limits(&id, LimitChanges::default(), operator()).await;
    assert_eq!(refusal(changed), Refusal::Archived);
}

pub(crate) async fn concurrent_creations_with_room_for_one_create_one(fixture: impl Fixture) {
    let store = open(&fixture).await;
    create(&*store, "first").await;
    let bounds = StorageBounds { bytes: Some(15), files: None };
    let (mut batches, mut files) = (Vec::new(), Vec::new());
    for number in 0..20 {
        let (shared, name) = (store.clone(), format!("batch {number}"));
        let new = new_batch(&name);
        batches.push(tokio::spawn(async move {
            shared.create_batch(&tenant(), new, None, Some(2)).await.map(drop)
        }));
        let (shared, name): (Arc<dyn Store>, _) = (store.clone(), format!("file {number}"));
        files.push(tokio::spawn(async move {
            shared.register_object(&key(&name), NOW, LEASE).await.unwrap();
            shared.insert_file(&tenant(), file(&name), bounds).await
        }));
    }
    let mut created = (0, 0);
    for (batch, file) in batches.into_iter().zip(files) {
        match batch.await.unwrap() {
            Ok(()) => created.0 += 1,
            refused => assert_eq!(refusal(refused), Refusal::OpenBatches(2)),
        }
        match file.await.unwrap() {
            Ok(()) => created.1 += 1,
            refused => assert_eq!(refusal(refused), Refusal::StoredBytes(15)),
        }
    }
    assert_eq!(created, (1, 1));
    let expected = ProjectUse { stored_bytes: 10, stored_files: 1, open_batches: 2 };
    assert_eq!(used(&*store).await, expected);
    // An idempotent repetition creates nothing, so it is not refused.
    let repeated = async |max| {
        let idempotency = crate::Idempotency { key: "key".into(), fingerprint: [1; 32] };
        store.create_batch(&tenant(), new_batch("repeated"), Some(idempotency), max).await
    };
    repeated(None).await.unwrap();
    assert!(matches!(repeated(Some(1)).await.unwrap(), Created::Existing(_)));
}

pub(crate) async fn stored_bytes_are_counted_until_their_object_is_removed(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let counted = async || {
        let used = used(&*store).await;
        (used.stored_bytes, used.stored_files)
    };
    for name in ["a", "b"] {
        insert_file(&*store, file(name)).await;
    }
    assert_eq!(counted().await, (20, 2));
    store.delete_file(&tenant(), &"a".into(), NOW).await.unwrap();
    assert_eq!(counted().await, (20, 2));
    for _ in 0..2 {
        store.mark_file_removed(&key("a")).await.unwrap();
        assert_eq!(counted().await, (10, 1));
    }
    store.purge_tombstones(at(NOW.as_millis() + 1), 10).await.unwrap();
    assert_eq!(counted().await, (10, 1));
    // Results of batches count, and are never refused.
    let held = executing(&*store, "batch", 1).await;
    let rows = Arc::new(vec![row(1, ResultKind::Completed, b"x")]);
    store.insert_results(&held, rows, Vec::new(), NOW).await.unwrap();
    store.start_finalizing(&held, NOW).await.unwrap();
    store.register_object(&key("out"), NOW, LEASE).await.unwrap();
    store.finish(&held, finish(Status::Completed, Some(file("out")))).await.unwrap();
    assert_eq!(counted().await, (20, 2));
    let check = async |bytes, files| {
        let bounds = StorageBounds { bytes, files };
        store.storage_room(&tenant(), bounds).await
    };
    assert_eq!(check(Some(21), Some(3)).await.unwrap(), Some(1));
    assert_eq!(check(None, Some(3)).await.unwrap(), None);
    assert_eq!(refusal(check(Some(20), None).await), Refusal::StoredBytes(20));
    assert_eq!(refusal(check(None, Some(2)).await), Refusal::StoredFiles(2));
    assert_eq!(refusal(check(Some(0), None).await), Refusal::StoredBytes(0));
}
