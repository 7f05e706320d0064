//! Results of requests until the files of their batch contain them.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::usage::TokenUsage;
use rusqlite::{Connection, OptionalExtension, params};

use super::super::{Claim, PluginVersion, Result, ResultKind, ResultRow, Results};
use super::keys::BatchRow;
use super::{database_error, to_i64, to_u64};
use crate::sqlite::usage::Charges;
use crate::sqlite::work::{insert_plugins, update_claimed};

/// Memory of a result row besides its payload, in bytes.
const ROW_OVERHEAD_BYTES: usize = 64;

/// Inserts results that are new, their counts and the plugins that served them.
pub(super) fn insert_results(
    connection: &Connection,
    claim: &Claim,
    rows: &[ResultRow],
    by: &[PluginVersion],
    at: Timestamp,
) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    insert_plugins(connection, claim, by)?;
    let mut insert = connection
        .prepare_cached(
            "INSERT OR IGNORE INTO results (tenant, batch, line, ending, payload)
             VALUES (?1, ?2, ?3, ?4, ?5)",
        )
        .map_err(database_error)?;
    let (mut completed, mut failed, mut usage) = (0_u64, 0_u64, TokenUsage::default());
    let mut charges = Charges::default();
    for row in rows {
        let kind = match row.kind {
            ResultKind::Completed => 0,
            ResultKind::Failed => 1,
        };
        let added = insert
            .execute(params![held.tenant, held.batch, to_i64(row.line), kind, row.payload])
            .map_err(database_error)?;
        if added == 0 {
            continue;
        }
        match row.kind {
            ResultKind::Completed => completed = completed.saturating_add(1),
            ResultKind::Failed => failed = failed.saturating_add(1),
        }
        usage = usage.plus(row.usage);
        if let Some(charge) = &row.charge {
            charges.add(charge, row.usage);
        }
    }
    charges.record_batch(connection, held, at)?;
    // A guest can report any number of tokens, and SQLite turns an overflowing sum into a float.
    update_claimed(
        connection,
        claim,
        "waits_for = NULL, waits_for_since = NULL,
         completed = completed + ?4, failed = failed + ?5,
         input_tokens = min(input_tokens, 9223372036854775807 - ?6) + ?6,
         cached_input_tokens = min(cached_input_tokens, 9223372036854775807 - ?7) + ?7,
         output_tokens = min(output_tokens, 9223372036854775807 - ?8) + ?8,
         reasoning_tokens = min(reasoning_tokens, 9223372036854775807 - ?9) + ?9",
        &[
            &to_i64(completed),
            &to_i64(failed),
            &to_i64(usage.input),
            &to_i64(usage.cached_input),
            &to_i64(usage.output),
            &to_i64(usage.reasoning),
        ],
    )
}

/// Returns up to `limit` lines after `after` that have a result, in order.
pub(super) fn recorded_lines(
    connection: &Connection,
    claim: &Claim,
    after: u64,
    limit: usize,
) -> Result<Vec<u64>> {
    let held = BatchRow::of(&claim.key);
    let mut statement = connection
        .prepare_cached(
            "SELECT line FROM results
             WHERE tenant = ?1 AND batch = ?2 AND line > ?3 ORDER BY line LIMIT ?4",
        )
        .map_err(database_error)?;
    let rows = statement
        .query_map(params![held.tenant, held.batch, to_i64(after), to_i64(limit as u64)], |row| {
            row.get(0).map(to_u64)
        })
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Returns the results of the lines after `after`, of up to `bytes` bytes in total.
pub(super) fn results(
    connection: &Connection,
    claim: &Claim,
    after: u64,
    bytes: usize,
) -> Result<Results> {
    let held = BatchRow::of(&claim.key);
    let mut statement = connection
        .prepare_cached(
            // Tests the length first, so that a payload that is too large is never read.
            "SELECT line, ending, length(payload),
             CASE WHEN length(payload) <= ?4 THEN payload END FROM results
             WHERE tenant = ?1 AND batch = ?2 AND line > ?3 ORDER BY line",
        )
        .map_err(database_error)?;
    let max_bytes = to_i64(bytes as u64);
    let mut found = statement
        .query(params![held.tenant, held.batch, to_i64(after), max_bytes])
        .map_err(database_error)?;
    let mut results = Results::default();
    let mut total_bytes = 0_usize;
    while let Some(row) = found.next().map_err(database_error)? {
        let size =
            usize::try_from(to_u64(row.get(2).map_err(database_error)?)).unwrap_or(usize::MAX);
        total_bytes = total_bytes.saturating_add(size).saturating_add(ROW_OVERHEAD_BYTES);
        if total_bytes > bytes {
            if results.rows.is_empty() {
                results.too_large = Some(size.saturating_add(ROW_OVERHEAD_BYTES));
            }
            break;
        }
        results.rows.push(ResultRow {
            line: to_u64(row.get(0).map_err(database_error)?),
            kind: if row.get::<_, i64>(1).map_err(database_error)? == 0 {
                ResultKind::Completed
            } else {
                ResultKind::Failed
            },
            payload: row.get(3).map_err(database_error)?,
            usage: TokenUsage::default(),
            charge: None,
        });
        // The next step would load one payload beyond the limit.
        if total_bytes == bytes {
            break;
        }
    }
    Ok(results)
}

/// Deletes up to `limit` results of an ended batch, then its saved states; returns true if more may
/// remain.
pub(super) fn discard_results(connection: &Connection, limit: usize) -> Result<bool> {
    let ended = connection
        .query_row(
            "SELECT tenant, key FROM batches WHERE has_results = 1
             AND status IN ('completed', 'failed', 'cancelled', 'expired') LIMIT 1",
            [],
            |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)),
        )
        .optional()
        .map_err(database_error)?;
    let Some((tenant, batch)) = ended else { return Ok(false) };
    let removed = connection
        .execute(
            "DELETE FROM results WHERE tenant = ?1 AND batch = ?2 AND line IN (
                 SELECT line FROM results WHERE tenant = ?1 AND batch = ?2 ORDER BY line LIMIT ?3
             )",
            params![tenant, batch, to_i64(limit as u64)],
        )
        .map_err(database_error)?;
    if removed < limit {
        connection
            .execute("DELETE FROM jobs WHERE tenant = ?1 AND batch = ?2", params![tenant, batch])
            .map_err(database_error)?;
        connection
            .execute(
                "UPDATE batches SET has_results = 0 WHERE tenant = ?1 AND key = ?2",
                params![tenant, batch],
            )
            .map_err(database_error)?;
    }
    Ok(true)
}
