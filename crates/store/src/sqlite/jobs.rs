//! Saved states of requests in progress at a provider.

use rusqlite::{Connection, OptionalExtension, params};

use super::super::{Claim, Job, Result, StoreError};
use super::keys::BatchRow;
use super::{database_error, to_i64};

/// Saves a state, or fails with `Fenced` if the batch was claimed again.
pub(super) fn save(connection: &Connection, claim: &Claim, line: u64, job: &Job) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    let inserted = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO jobs (tenant, batch, line, plugin, state)
             SELECT tenant, key, ?4, ?5, ?6 FROM batches
             WHERE tenant = ?1 AND key = ?2 AND fence = ?3",
        )
        .and_then(|mut insert| {
            insert.execute(params![
                held.tenant,
                held.batch,
                claim.fence,
                to_i64(line),
                job.plugin,
                job.state
            ])
        })
        .map_err(database_error)?;
    if inserted == 1 { Ok(()) } else { Err(StoreError::Fenced) }
}

/// Returns the saved state of a line.
pub(super) fn get(connection: &Connection, claim: &Claim, line: u64) -> Result<Option<Job>> {
    let held = BatchRow::of(&claim.key);
    connection
        .prepare_cached(
            "SELECT plugin, state FROM jobs WHERE tenant = ?1 AND batch = ?2 AND line = ?3",
        )
        .and_then(|mut select| {
            select
                .query_row(params![held.tenant, held.batch, to_i64(line)], |row| {
                    Ok(Job { plugin: row.get(0)?, state: row.get(1)? })
                })
                .optional()
        })
        .map_err(database_error)
}

/// Deletes the saved state of a line.
pub(super) fn delete(connection: &Connection, claim: &Claim, line: u64) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    connection
        .prepare_cached(
            "DELETE FROM jobs WHERE tenant = ?1 AND batch = ?2 AND line = ?3
             AND EXISTS (SELECT 1 FROM batches WHERE tenant = ?1 AND key = ?2 AND fence = ?4)",
        )
        .and_then(|mut delete| {
            delete.execute(params![held.tenant, held.batch, to_i64(line), claim.fence])
        })
        .map(drop)
        .map_err(database_error)
}

/// Returns true if the batch has any saved state.
pub(super) fn exist(connection: &Connection, claim: &Claim) -> Result<bool> {
    let held = BatchRow::of(&claim.key);
    connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM jobs WHERE tenant = ?1 AND batch = ?2)")
        .and_then(|mut select| select.query_row(params![held.tenant, held.batch], |row| row.get(0)))
        .map_err(database_error)
}

#[cfg(test)]
mod tests {
    use batchwright_domain::clock::Timestamp;

    use super::super::SqliteStore;
    use crate::{Job, Release, Store};

    #[tokio::test]
    async fn earlier_holder_of_a_batch_deletes_no_job_of_the_next() {
        let folder = tempfile::TempDir::new().unwrap();
        let store = SqliteStore::open(folder.path()).unwrap();
        rusqlite::Connection::open(folder.path().join("batchwright.db"))
            .unwrap()
            .execute_batch(
                "INSERT INTO tenants VALUES (1, 't');
                 INSERT INTO batches (tenant, id, endpoint, input_file_id, completion_window,
                     created_at, expires_at, status, lane)
                 VALUES (1, 'b', 'e', 'f', '24h', 0, 1000, 'in_progress', 'execute p');",
            )
            .unwrap();
        let [now, until] = [10, 1000].map(Timestamp::from_millis);
        let claim = async || {
            let waiting = store.waiting(now).await.unwrap();
            store.claim(&waiting[0], now, until).await.unwrap().unwrap()
        };
        let first = claim().await;
        store.release(&first, Release::AsItWas).await.unwrap();
        let second = claim().await;
        let job = Job { plugin: "p".into(), state: b"state".to_vec() };
        store.keep_job(&second, 1, job.clone()).await.unwrap();
        store.drop_job(&first, 1).await.unwrap();
        assert_eq!(store.job(&second, 1).await.unwrap(), Some(job));
        store.drop_job(&second, 1).await.unwrap();
        assert_eq!(store.job(&second, 1).await.unwrap(), None);
    }
}
