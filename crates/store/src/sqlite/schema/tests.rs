//! Tests of `schema`.

use std::collections::BTreeSet;

use batchwright_domain::clock::Timestamp;

use super::super::super::{Lane, Release, Store};
use super::super::SqliteStore;

#[test]
fn migrations_are_valid() {
    super::migrations().validate().unwrap();
}

#[tokio::test]
async fn first_version_database_migrates_and_its_batches_continue() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("batchwright.db");
    let mut old = rusqlite::Connection::open(&path).unwrap();
    old.pragma_update(None, "journal_mode", "WAL").unwrap();
    super::migrations().to_version(&mut old, 1).unwrap();
    old.execute_batch(
        "INSERT INTO tenants VALUES (1, 'default');
         INSERT INTO files (tenant, id, bytes, created_at, filename, purpose, deleted_at)
         VALUES (1, 'file-a', 3, 10, 'a', 'batch', 30),
                (1, 'file-b', 3, 10, 'b', 'batch', 15);
         INSERT INTO batches
             (tenant, id, endpoint, input_file_id, completion_window, created_at, expires_at,
              status, owner, lease_until)
         VALUES (1, 'batch_a', 'e', 'file-a', '24h', 20, 1000, 'in_progress', 'gone', 900),
                (1, 'batch_b', 'e', 'file-b', '24h', 20, 1000, 'validating', NULL, 0),
                (1, 'batch_c', 'e', 'file-a', '24h', 20, 1000, 'cancelling', NULL, 0);
         UPDATE batches SET endpoint = '/v1/embeddings';
         INSERT INTO results VALUES (1, 1, 1, 0, x'78');",
    )
    .unwrap();
    drop(old);
    let store = SqliteStore::open(folder.path()).unwrap();
    let mut found = Vec::new();
    let (now, until) = (Timestamp::from_millis(100), Timestamp::from_millis(200));
    for waiting in store.waiting(now).await.unwrap() {
        let claim = store.claim(&waiting, now, until).await.unwrap().unwrap();
        let input = store.input_file(&claim).await.unwrap();
        let input = input.map(|file| file.id.to_string());
        found.push((claim.batch_id.to_string(), claim.lane.clone(), input));
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    // The input of `batch_b` was deleted before the batch was created, that of `batch_a` later.
    assert_eq!(
        found,
        [
            ("batch_a".to_owned(), Lane::Execute(BTreeSet::new()), Some("file-a".to_owned())),
            ("batch_b".to_owned(), Lane::Validate, None),
            ("batch_c".to_owned(), Lane::Finish, Some("file-a".to_owned())),
        ]
    );
    drop(store);
    let mode = |db: &rusqlite::Connection| {
        db.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0))
    };
    assert_eq!(mode(&rusqlite::Connection::open(&path).unwrap()).unwrap(), 2);
}

#[tokio::test]
async fn waiting_returns_the_oldest_batch_per_lane_and_claim_succeeds_once() {
    let folder = tempfile::TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path()).unwrap();
    let database = rusqlite::Connection::open(folder.path().join("batchwright.db")).unwrap();
    database
        .execute_batch(
            "INSERT INTO tenants (key, name, project_id, title) VALUES (9, 't', 'proj_t', 't');
             INSERT INTO batches
                 (tenant, id, endpoint, input_file_id, completion_window, created_at,
                  expires_at, status, lane, waits_since)
             VALUES (9, 'slow 1', 'e', 'f', '24h', 0, 1000, 'in_progress', 'execute slow', 3),
                    (9, 'slow 2', 'e', 'f', '24h', 0, 500, 'in_progress', 'execute slow', 1),
                    (9, 'ended', 'e', 'f', '24h', 0, 500, 'completed', 'finish', 0),
                    (9, 'new', 'e', 'f', '24h', 0, 1000, 'validating', 'validate', 0),
                    (9, 'both', 'e', 'f', '24h', 0, 1000, 'in_progress',
                     'execute fast slow', 0),
                    (9, 'cancelled', 'e', 'f', '24h', 0, 1000, 'cancelling', 'finish', 0);
             UPDATE batches SET endpoint = '/v1/embeddings';",
        )
        .unwrap();
    let (now, until) = (Timestamp::from_millis(100), Timestamp::from_millis(2000));
    let claim = async |lane: &Lane, now| {
        let waiting =
            store.waiting(now).await.unwrap().into_iter().find(|waiting| waiting.lane == *lane)?;
        let claim = store.claim(&waiting, now, until).await.unwrap().unwrap();
        assert!(
            store.claim(&waiting, now, until).await.unwrap().is_none(),
            "the batch is claimed twice"
        );
        Some((claim.batch_id.to_string(), claim))
    };
    let slow = Lane::Execute(["slow".to_owned()].into());
    let both = Lane::Execute(["fast".to_owned(), "slow".to_owned()].into());
    assert_eq!(store.waiting(now).await.unwrap().len(), 4);
    assert_eq!(claim(&both, now).await.unwrap().0, "both");
    assert_eq!(claim(&Lane::Finish, now).await.unwrap().0, "cancelled");
    assert!(claim(&Lane::Finish, now).await.is_none());
    let (id, held) = claim(&slow, now).await.unwrap();
    assert_eq!(id, "slow 2");
    // A batch that had its turn is behind the other one.
    store.release(&held, Release::Requeue(Timestamp::from_millis(50))).await.unwrap();
    assert_eq!(claim(&slow, now).await.unwrap().0, "slow 1");
    // An expired batch waits in the finish lane and not for its provider.
    let later = Timestamp::from_millis(500);
    assert_eq!(claim(&Lane::Finish, later).await.unwrap().0, "slow 2");
    assert_eq!(claim(&Lane::Validate, later).await.unwrap().0, "new");
    assert!(store.waiting(later).await.unwrap().is_empty());
}
