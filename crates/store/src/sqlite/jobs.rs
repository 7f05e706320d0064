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
