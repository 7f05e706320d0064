//! Enqueued tokens: input tokens of open batches, reserved when a batch starts and given back when
//! it ends.
//!
//! The rows of a batch exist from the transaction that starts the batch, or lets it wait, to the
//! transaction that ends it. What counts is their sum, so nothing can drift from the open batches.

use std::collections::BTreeMap;

use batchwright_domain::clock::Timestamp;
use rusqlite::{Connection, params};

use super::super::{Result, TokenLimit};
use super::keys::BatchRow;
use super::query::{execute, find};
use super::{database_error, to_i64, to_u64};

/// Returns the first limit that a batch would exceed.
///
/// Batches that have waited longer come first, so that small batches do not overtake a large one
/// for ever.
pub(super) fn exceeded(
    connection: &Connection,
    held: BatchRow,
    tokens: &BTreeMap<String, u64>,
) -> Result<Option<TokenLimit>> {
    for (model, estimated) in tokens {
        let sql = "SELECT batch_1_day_max_input_tokens FROM model_limits
            WHERE tenant = ?1 AND model = ?2";
        let limit =
            find(connection, sql, params![held.tenant, model], |row| row.get::<_, Option<i64>>(0))?;
        let Some(limit) = limit.flatten().map(to_u64) else { continue };
        let sql = "SELECT total(max(estimated - used, 0)) FROM batch_tokens
            WHERE tenant = ?1 AND model = ?2 AND batch != ?3 AND (admitted OR batch < ?3)";
        let values = params![held.tenant, model, held.batch];
        let enqueued = find(connection, sql, values, |row| row.get::<_, f64>(0))?;
        let enqueued = enqueued.unwrap_or_default() as u64;
        if enqueued.saturating_add(*estimated) > limit {
            let (model, estimated) = (model.clone(), *estimated);
            return Ok(Some(TokenLimit { model, limit, enqueued, estimated }));
        }
    }
    Ok(None)
}

/// Writes the tokens of a batch, which starts or waits.
pub(super) fn insert(
    connection: &Connection,
    held: BatchRow,
    tokens: &BTreeMap<String, u64>,
    admitted: bool,
) -> Result<()> {
    for (model, estimated) in tokens {
        let sql = "INSERT OR REPLACE INTO batch_tokens (tenant, batch, model, estimated, admitted)
            VALUES (?1, ?2, ?3, ?4, ?5)";
        let estimated = to_i64(*estimated);
        execute(connection, sql, params![held.tenant, held.batch, model, estimated, admitted])?;
    }
    Ok(())
}

/// Returns the tokens of a batch.
pub(super) fn of_batch(connection: &Connection, held: BatchRow) -> Result<BTreeMap<String, u64>> {
    let sql = "SELECT model, estimated FROM batch_tokens WHERE tenant = ?1 AND batch = ?2";
    let mut statement = connection.prepare_cached(sql).map_err(database_error)?;
    let rows = statement
        .query_map(params![held.tenant, held.batch], |row| Ok((row.get(0)?, to_u64(row.get(1)?))))
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Gives the tokens of a batch back, and lets the waiting batches of its tenant try again.
pub(super) fn give_back(connection: &Connection, held: BatchRow, now: Timestamp) -> Result<()> {
    let sql = "DELETE FROM batch_tokens WHERE tenant = ?1 AND batch = ?2";
    if execute(connection, sql, params![held.tenant, held.batch])? == 0 {
        return Ok(());
    }
    wake(connection, held.tenant, now)
}

/// Lets the waiting batches of a tenant try again.
pub(super) fn wake(connection: &Connection, tenant: i64, now: Timestamp) -> Result<()> {
    let sql = "UPDATE batches SET waits_since = min(waits_since, ?2)
        WHERE tenant = ?1 AND lane = 'admit'
        AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";
    execute(connection, sql, params![tenant, now.as_millis()]).map(drop)
}
