//! Operations of workers on claimed batches, and claims themselves.
//!
//! Each update of a batch compares the fence of the claim (`update_claimed`).

use std::collections::BTreeSet;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;
use rusqlite::{Connection, OptionalExtension, params};

use super::super::{
    BatchError, Claim, Finish, Lane, Orders, PluginVersion, Release, Result, ResultKind, ResultRow,
    Results, StoreError, Validated, Waiting,
};
use super::keys::BatchRow;
use super::{database_error, files, timestamp, to_i64, to_u64};

/// Memory of a result row besides its payload, in bytes.
const ROW_OVERHEAD_BYTES: usize = 64;

/// Ends the leases of an owner that is gone: its claims, and its registrations of objects.
pub(super) fn end_leases(connection: &Connection, owner: &str) -> Result<()> {
    for sql in [
        "UPDATE batches SET lease_until = 0, owner = NULL WHERE owner = ?1
         AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')",
        "UPDATE pending_objects SET lease_until = 0 WHERE owner = ?1",
    ] {
        connection.execute(sql, [owner]).map_err(database_error)?;
    }
    Ok(())
}

/// Returns the oldest waiting batch of each lane, and the batch that expired first.
///
/// An expired lease may be taken over, but never by its own holder: a clock that jumps must not
/// make one process work on a batch twice.
pub(super) fn waiting(
    connection: &Connection,
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Waiting>> {
    // The recursive query seeks lane by lane in the index, so its cost does not depend on the
    // number of batches that wait in a lane.
    let mut statement = connection
        .prepare_cached(
            "WITH RECURSIVE lanes (lane) AS (
                 SELECT min(lane) FROM batches
                 WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                 UNION ALL
                 SELECT (
                     SELECT min(batches.lane) FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                     AND batches.lane > lanes.lane
                 ) FROM lanes WHERE lanes.lane IS NOT NULL
             ),
             oldest (key) AS (
                 SELECT (
                     SELECT key FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                     AND batches.lane = lanes.lane
                     AND lease_until <= ?1 AND owner IS NOT ?2 AND waits_since <= ?1
                     ORDER BY waits_since, key LIMIT 1
                 ) FROM lanes
                 UNION
                 SELECT * FROM (
                     SELECT key FROM batches WHERE status = 'in_progress' AND expires_at <= ?1
                     AND lease_until <= ?1 AND owner IS NOT ?2 ORDER BY expires_at LIMIT 1
                 )
             )
             SELECT tenant, key, waits_since,
             CASE WHEN status = 'in_progress' AND expires_at <= ?1 THEN 'finish' ELSE lane END
             FROM oldest JOIN batches USING (key)",
        )
        .map_err(database_error)?;
    let rows = statement
        .query_map(params![now.as_millis(), owner], |row| {
            Ok(Waiting {
                key: BatchRow { tenant: row.get(0)?, batch: row.get(1)? }.key(),
                since: timestamp(row.get(2)?),
                lane: parse_lane(&row.get::<_, String>(3)?),
            })
        })
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Claims a batch and increments its fence, or returns `None` if it was claimed meanwhile.
pub(super) fn claim(
    connection: &Connection,
    owner: &str,
    row: BatchRow,
    now: Timestamp,
    until: Timestamp,
) -> Result<Option<Claim>> {
    let mut statement = connection
        .prepare_cached(
            "UPDATE batches SET owner = ?4, lease_until = ?5, fence = fence + 1
             WHERE tenant = ?1 AND key = ?2 AND lease_until <= ?3 AND owner IS NOT ?4
             AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
             RETURNING tenant, key, fence, id,
             (SELECT name FROM tenants WHERE tenants.key = batches.tenant),
             CASE WHEN status = 'in_progress' AND expires_at <= ?3 THEN 'finish' ELSE lane END",
        )
        .map_err(database_error)?;
    statement
        .query_row(
            params![row.tenant, row.batch, now.as_millis(), owner, until.as_millis()],
            |row| {
                Ok(Claim {
                    key: BatchRow { tenant: row.get(0)?, batch: row.get(1)? }.key(),
                    fence: row.get(2)?,
                    batch_id: row.get::<_, String>(3)?.into(),
                    tenant: row.get::<_, String>(4)?.into(),
                    lane: parse_lane(&row.get::<_, String>(5)?),
                })
            },
        )
        .optional()
        .map_err(database_error)
}

/// Parses a lane from its text in the database.
fn parse_lane(text: &str) -> Lane {
    match (text, text.strip_prefix("execute ")) {
        ("validate", _) => Lane::Validate,
        (_, Some(plugins)) => {
            Lane::Execute(plugins.split_whitespace().map(str::to_owned).collect())
        }
        _ => Lane::Finish,
    }
}

/// Formats the execution lane of these plugins for the database.
fn execution_lane(plugins: &BTreeSet<String>) -> String {
    format!("execute {}", plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
}

/// Updates the row of a claimed batch, or fails with `Fenced` if the batch was claimed again.
///
/// The first three parameters of the statement are those of the claim.
fn update_claimed(
    connection: &Connection,
    claim: &Claim,
    sql: &str,
    more: &[&dyn rusqlite::ToSql],
) -> Result<()> {
    let BatchRow { tenant, batch } = BatchRow::of(&claim.key);
    let mut values: Vec<&dyn rusqlite::ToSql> = vec![&tenant, &batch, &claim.fence];
    values.extend(more);
    let mut statement = connection
        .prepare_cached(&format!(
            "UPDATE batches SET {sql} WHERE tenant = ?1 AND key = ?2 AND fence = ?3"
        ))
        .map_err(database_error)?;
    match statement.execute(values.as_slice()).map_err(database_error)? {
        1 => Ok(()),
        _ => Err(StoreError::Fenced),
    }
}

/// Extends the lease of a claim and returns the orders to its worker.
pub(super) fn renew(connection: &Connection, claim: &Claim, until: Timestamp) -> Result<Orders> {
    let BatchRow { tenant, batch } = BatchRow::of(&claim.key);
    // A batch that was released meanwhile stays released.
    connection
        .prepare_cached(
            "UPDATE batches SET lease_until = CASE WHEN owner IS NULL THEN 0 ELSE ?4 END
             WHERE tenant = ?1 AND key = ?2 AND fence = ?3 RETURNING status = 'cancelling'",
        )
        .and_then(|mut statement| {
            let values = params![tenant, batch, claim.fence, until.as_millis()];
            statement.query_row(values, |row| Ok(Orders { cancel: row.get(0)? })).optional()
        })
        .map_err(database_error)?
        .ok_or(StoreError::Fenced)
}

/// Releases a claimed batch.
pub(super) fn release(connection: &Connection, claim: &Claim, how: &Release) -> Result<()> {
    let (since, waits_for) = match how {
        Release::KeepPosition => (None, None),
        Release::Requeue(at) => (Some(at.as_millis()), None),
        Release::Backoff(until, waits_for) => (Some(until.as_millis()), waits_for.as_ref()),
    };
    let waits_for = waits_for.map(|known| (&known.cause, known.since.as_millis()));
    let (cause, waits_for_since) = waits_for.unzip();
    // A batch in `cancelling` has no backoff.
    update_claimed(
        connection,
        claim,
        "owner = NULL, lease_until = 0,
         waits_since =
             CASE status WHEN 'cancelling' THEN waits_since ELSE coalesce(?4, waits_since) END,
         waits_for = coalesce(?5, waits_for), waits_for_since = coalesce(?6, waits_for_since)",
        &[&since, &cause, &waits_for_since],
    )
}

/// Ends the backoff of all batches.
pub(super) fn end_backoff(connection: &Connection, now: Timestamp) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE batches SET waits_since = ?1
             WHERE status = 'in_progress' AND waits_since > ?1",
        )
        .and_then(|mut update| update.execute([now.as_millis()]))
        .map(drop)
        .map_err(database_error)
}

/// Inserts plugins that the batch uses, each version once.
fn insert_plugins(connection: &Connection, claim: &Claim, by: &[PluginVersion]) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    for PluginVersion { name, kind, version, sha256 } in by {
        connection
            .prepare_cached(
                "INSERT OR IGNORE INTO batch_plugins
                 (tenant, batch, name, sha256, version, kind) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )
            .and_then(|mut insert| {
                insert.execute(params![held.tenant, held.batch, name, sha256, version, kind])
            })
            .map_err(database_error)?;
    }
    Ok(())
}

/// Fails a batch in validation with errors.
pub(super) fn fail(
    connection: &Connection,
    claim: &Claim,
    errors: &[BatchError],
    by: &[PluginVersion],
    at: Timestamp,
) -> Result<()> {
    insert_plugins(connection, claim, by)?;
    // A batch reported to a client as `cancelling` must end as `cancelled`.
    update_claimed(
        connection,
        claim,
        "failed_at = CASE status WHEN 'cancelling' THEN NULL ELSE ?4 END,
         cancelled_at = CASE status WHEN 'cancelling' THEN ?4 END,
         status = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE 'failed' END",
        &[&at.as_millis()],
    )?;
    insert_errors(connection, claim, errors)
}

/// Inserts the errors of a batch, in order.
fn insert_errors(connection: &Connection, claim: &Claim, errors: &[BatchError]) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    let mut statement = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO batch_errors (tenant, batch, place, code, message, param, line)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .map_err(database_error)?;
    for (place, error) in errors.iter().enumerate() {
        let line = error.line.map(to_i64);
        let place = to_i64(place as u64);
        statement
            .execute(params![
                held.tenant,
                held.batch,
                place,
                error.code,
                error.message,
                error.param,
                line
            ])
            .map_err(database_error)?;
    }
    Ok(())
}

/// Stores the results of validation and releases the batch into its next lane.
pub(super) fn start_execution(
    connection: &Connection,
    claim: &Claim,
    found: &Validated,
    at: Timestamp,
) -> Result<()> {
    insert_plugins(connection, claim, &found.judged_by)?;
    update_claimed(
        connection,
        claim,
        "in_progress_at = coalesce(in_progress_at, ?4),
         status = CASE status WHEN 'validating' THEN 'in_progress' ELSE status END,
         lane = CASE status WHEN 'validating' THEN ?7 ELSE 'finish' END,
         total = ?5, model = ?6, has_results = 1, owner = NULL, lease_until = 0",
        &[&at.as_millis(), &to_i64(found.total), &found.model, &execution_lane(&found.plugins)],
    )
}

/// Inserts results that are new, their counts and the plugins that served them.
pub(super) fn insert_results(
    connection: &Connection,
    claim: &Claim,
    rows: &[ResultRow],
    by: &[PluginVersion],
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
        usage.input = usage.input.saturating_add(row.usage.input);
        usage.cached_input = usage.cached_input.saturating_add(row.usage.cached_input);
        usage.output = usage.output.saturating_add(row.usage.output);
        usage.reasoning = usage.reasoning.saturating_add(row.usage.reasoning);
    }
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

/// Changes `InProgress` to `Finalizing`.
pub(super) fn start_finalizing(
    connection: &Connection,
    claim: &Claim,
    at: Timestamp,
) -> Result<()> {
    update_claimed(
        connection,
        claim,
        "finalizing_at = coalesce(finalizing_at, ?4),
         status = CASE status WHEN 'in_progress' THEN 'finalizing' ELSE status END,
         lane = 'finish'",
        &[&at.as_millis()],
    )
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
        });
        // The next step would load one payload beyond the limit.
        if total_bytes == bytes {
            break;
        }
    }
    Ok(results)
}

/// Ends a batch and inserts its result files.
pub(super) fn finish(connection: &Connection, claim: &Claim, finish: &Finish) -> Result<()> {
    let held = BatchRow::of(&claim.key);
    for file in finish.output.iter().chain(&finish.error) {
        files::insert(connection, held.tenant, file)?;
    }
    let output = finish.output.as_ref().map(|file| file.id.as_str());
    let error = finish.error.as_ref().map(|file| file.id.as_str());
    let cancelling = "SELECT status = 'cancelling' FROM batches WHERE tenant = ?1 AND key = ?2";
    let cancelling: bool = connection
        .query_row(cancelling, params![held.tenant, held.batch], |row| row.get(0))
        .map_err(database_error)?;
    if cancelling && finish.status == Status::Expired {
        return Err(StoreError::CancelledFirst);
    }
    // A batch reported to a client as `cancelling` must end as `cancelled`.
    update_claimed(
        connection,
        claim,
        "status = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE ?4 END,
         output_file_id = ?5, error_file_id = ?6",
        &[&finish.status.as_str(), &output, &error],
    )?;
    update_claimed(
        connection,
        claim,
        "completed_at = CASE status WHEN 'completed' THEN ?4 END,
         cancelled_at = CASE status WHEN 'cancelled' THEN ?4 END,
         expired_at = CASE status WHEN 'expired' THEN ?4 END,
         failed_at = CASE status WHEN 'failed' THEN ?4 END",
        &[&finish.at.as_millis()],
    )?;
    insert_errors(connection, claim, &finish.errors)
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
