//! What whoever works on a batch does to it. Each operation checks that the claim still holds.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, params};

use super::super::{
    BatchError, BatchKey, Claim, Ending, Finish, Lane, Release, Result, ResultRow, Results,
    ServedBy, Status, StoreError, TokenUsage, Validated, Waiting,
};
use super::{explain, files, loaded, stored, timestamp};
use crate::clock::Timestamp;

/// Batches that have not ended, and a lane's oldest of those that nobody holds. A lease that has lapsed may be taken over, but never by its
/// own holder: a clock that jumps must not make one process work on a batch twice.
pub fn waiting(connection: &Connection, owner: &str, now: Timestamp) -> Result<Vec<Waiting>> {
    // The lanes are looked up one by one in the index, so that a full one costs nothing however many wait in it.
    let mut statement = connection
        .prepare_cached(
            "WITH RECURSIVE lanes (lane) AS (
                 SELECT min(lane) FROM batches WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                 UNION ALL
                 SELECT (
                     SELECT min(batches.lane) FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling') AND batches.lane > lanes.lane
                 ) FROM lanes WHERE lanes.lane IS NOT NULL
             ),
             oldest (key) AS (
                 SELECT (
                     SELECT key FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling') AND batches.lane = lanes.lane
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
        .map_err(explain)?;
    let rows = statement
        .query_map(params![now.as_millis(), owner], |row| {
            Ok(Waiting {
                key: BatchKey { tenant: row.get(0)?, batch: row.get(1)? },
                since: timestamp(row.get(2)?),
                lane: lane(&row.get::<_, String>(3)?),
            })
        })
        .map_err(explain)?;
    rows.collect::<rusqlite::Result<_>>().map_err(explain)
}

pub fn claim(
    connection: &Connection,
    owner: &str,
    key: BatchKey,
    now: Timestamp,
    until: Timestamp,
) -> Result<Option<Claim>> {
    let mut statement = connection
        .prepare_cached(
            "UPDATE batches SET owner = ?4, lease_until = ?5, fence = fence + 1
             WHERE tenant = ?1 AND key = ?2 AND lease_until <= ?3 AND owner IS NOT ?4
             AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
             RETURNING tenant, key, fence, id, (SELECT name FROM tenants WHERE tenants.key = batches.tenant),
             CASE WHEN status = 'in_progress' AND expires_at <= ?3 THEN 'finish' ELSE lane END",
        )
        .map_err(explain)?;
    statement
        .query_row(
            params![key.tenant, key.batch, now.as_millis(), owner, until.as_millis()],
            |row| {
                Ok(Claim {
                    tenant_key: row.get(0)?,
                    batch_key: row.get(1)?,
                    fence: row.get(2)?,
                    batch_id: row.get(3)?,
                    tenant: row.get(4)?,
                    lane: lane(&row.get::<_, String>(5)?),
                })
            },
        )
        .optional()
        .map_err(explain)
}

/// A lane from its form in the database.
fn lane(text: &str) -> Lane {
    match (text, text.strip_prefix("execute ")) {
        ("validate", _) => Lane::Validate,
        (_, Some(plugins)) => {
            Lane::Execute(plugins.split_whitespace().map(str::to_owned).collect())
        }
        _ => Lane::Finish,
    }
}

/// The lane of a batch whose requests go to these plugins, as the database has it.
fn execution(plugins: &BTreeSet<String>) -> String {
    format!("execute {}", plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
}

/// Runs a statement whose first three parameters are the claim's; it must change the batch's row.
fn change(
    connection: &Connection,
    claim: &Claim,
    sql: &str,
    more: &[&dyn rusqlite::ToSql],
) -> Result<()> {
    let mut values: Vec<&dyn rusqlite::ToSql> =
        vec![&claim.tenant_key, &claim.batch_key, &claim.fence];
    values.extend(more);
    let mut statement = connection
        .prepare_cached(&format!(
            "UPDATE batches SET {sql} WHERE tenant = ?1 AND key = ?2 AND fence = ?3"
        ))
        .map_err(explain)?;
    match statement.execute(values.as_slice()).map_err(explain)? {
        1 => Ok(()),
        _ => Err(StoreError::Fenced),
    }
}

pub fn renew(connection: &Connection, claim: &Claim, until: Timestamp) -> Result<()> {
    // What was given back meanwhile stays so.
    change(
        connection,
        claim,
        "lease_until = CASE WHEN owner IS NULL THEN 0 ELSE ?4 END",
        &[&until.as_millis()],
    )
}

pub fn release(connection: &Connection, claim: &Claim, how: &Release) -> Result<()> {
    let (since, waits_for) = match how {
        Release::AsItWas => (None, None),
        Release::Turn(at) => (Some(at.as_millis()), None),
        Release::Rest(until, waits_for) => (Some(until.as_millis()), waits_for.as_ref()),
    };
    let waits_for = waits_for.map(|known| (&known.cause, known.since.as_millis()));
    let (cause, waits_for_since) = waits_for.unzip();
    // One that is to be cancelled does not rest.
    change(
        connection,
        claim,
        "owner = NULL, lease_until = 0,
         waits_since = CASE status WHEN 'cancelling' THEN waits_since ELSE coalesce(?4, waits_since) END,
         waits_for = coalesce(?5, waits_for), waits_for_since = coalesce(?6, waits_for_since)",
        &[&since, &cause, &waits_for_since],
    )
}

pub fn wake(connection: &Connection, now: Timestamp) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE batches SET waits_since = ?1 WHERE status = 'in_progress' AND waits_since > ?1",
        )
        .and_then(|mut update| update.execute([now.as_millis()]))
        .map(drop)
        .map_err(explain)
}

/// Remembers plugins that have a part in the batch, each once.
fn serve(connection: &Connection, claim: &Claim, by: &[ServedBy]) -> Result<()> {
    for ServedBy { name, kind, version, sha256 } in by {
        connection
            .prepare_cached(
                "INSERT OR IGNORE INTO batch_plugins (tenant, batch, name, sha256, version, kind) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )
            .and_then(|mut insert| {
                insert.execute(params![claim.tenant_key, claim.batch_key, name, sha256, version, kind])
            })
            .map_err(explain)?;
    }
    Ok(())
}

pub fn fail(
    connection: &Connection,
    claim: &Claim,
    errors: &[BatchError],
    by: &[ServedBy],
    at: Timestamp,
) -> Result<()> {
    serve(connection, claim, by)?;
    // A client who was told that the batch is being cancelled sees it cancelled.
    change(
        connection,
        claim,
        "failed_at = CASE status WHEN 'cancelling' THEN NULL ELSE ?4 END,
         cancelled_at = CASE status WHEN 'cancelling' THEN ?4 END,
         status = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE 'failed' END",
        &[&at.as_millis()],
    )?;
    insert_errors(connection, claim, errors)
}

fn insert_errors(connection: &Connection, claim: &Claim, errors: &[BatchError]) -> Result<()> {
    let mut statement = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO batch_errors (tenant, batch, place, code, message, param, line)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .map_err(explain)?;
    for (place, error) in errors.iter().enumerate() {
        let line = error.line.map(stored);
        let place = stored(place as u64);
        statement
            .execute(params![
                claim.tenant_key,
                claim.batch_key,
                place,
                error.code,
                error.message,
                error.param,
                line
            ])
            .map_err(explain)?;
    }
    Ok(())
}

pub fn start_execution(
    connection: &Connection,
    claim: &Claim,
    found: &Validated,
    at: Timestamp,
) -> Result<()> {
    serve(connection, claim, &found.judged_by)?;
    change(
        connection,
        claim,
        "in_progress_at = coalesce(in_progress_at, ?4),
         status = CASE status WHEN 'validating' THEN 'in_progress' ELSE status END,
         lane = CASE status WHEN 'validating' THEN ?7 ELSE 'finish' END,
         total = ?5, model = ?6, has_results = 1, owner = NULL, lease_until = 0",
        &[&at.as_millis(), &stored(found.total), &found.model, &execution(&found.plugins)],
    )
}

pub fn record(
    connection: &Connection,
    claim: &Claim,
    rows: &[ResultRow],
    by: &[ServedBy],
) -> Result<()> {
    serve(connection, claim, by)?;
    let mut insert = connection
        .prepare_cached(
            "INSERT OR IGNORE INTO results (tenant, batch, line, ending, payload) VALUES (?1, ?2, ?3, ?4, ?5)",
        )
        .map_err(explain)?;
    let (mut completed, mut failed, mut usage) = (0_u64, 0_u64, TokenUsage::default());
    for row in rows {
        let ending = match row.ending {
            Ending::Completed => 0,
            Ending::Failed => 1,
        };
        let added = insert
            .execute(params![
                claim.tenant_key,
                claim.batch_key,
                stored(row.line),
                ending,
                row.payload
            ])
            .map_err(explain)?;
        if added == 0 {
            continue;
        }
        match row.ending {
            Ending::Completed => completed = completed.saturating_add(1),
            Ending::Failed => failed = failed.saturating_add(1),
        }
        usage.input = usage.input.saturating_add(row.usage.input);
        usage.cached_input = usage.cached_input.saturating_add(row.usage.cached_input);
        usage.output = usage.output.saturating_add(row.usage.output);
        usage.reasoning = usage.reasoning.saturating_add(row.usage.reasoning);
    }
    // A sum past the largest integer would become a float; a guest can claim any number of tokens.
    change(
        connection,
        claim,
        "waits_for = NULL, waits_for_since = NULL, completed = completed + ?4, failed = failed + ?5,
         input_tokens = min(input_tokens, 9223372036854775807 - ?6) + ?6,
         cached_input_tokens = min(cached_input_tokens, 9223372036854775807 - ?7) + ?7,
         output_tokens = min(output_tokens, 9223372036854775807 - ?8) + ?8,
         reasoning_tokens = min(reasoning_tokens, 9223372036854775807 - ?9) + ?9",
        &[
            &stored(completed),
            &stored(failed),
            &stored(usage.input),
            &stored(usage.cached_input),
            &stored(usage.output),
            &stored(usage.reasoning),
        ],
    )
}

pub fn recorded_lines(
    connection: &Connection,
    claim: &Claim,
    after: u64,
    limit: usize,
) -> Result<Vec<u64>> {
    let mut statement = connection
        .prepare_cached(
            "SELECT line FROM results WHERE tenant = ?1 AND batch = ?2 AND line > ?3 ORDER BY line LIMIT ?4",
        )
        .map_err(explain)?;
    let rows = statement
        .query_map(
            params![claim.tenant_key, claim.batch_key, stored(after), stored(limit as u64)],
            |row| row.get(0).map(loaded),
        )
        .map_err(explain)?;
    rows.collect::<rusqlite::Result<_>>().map_err(explain)
}

pub fn start_finalizing(connection: &Connection, claim: &Claim, at: Timestamp) -> Result<()> {
    change(
        connection,
        claim,
        "finalizing_at = coalesce(finalizing_at, ?4),
         status = CASE status WHEN 'in_progress' THEN 'finalizing' ELSE status END, lane = 'finish'",
        &[&at.as_millis()],
    )
}

pub fn results(
    connection: &Connection,
    claim: &Claim,
    after: u64,
    bytes: usize,
) -> Result<Results> {
    let mut statement = connection
        .prepare_cached(
            // The size is known before the payload is read, and one that is too large is not read.
            "SELECT line, ending, length(payload), CASE WHEN length(payload) <= ?4 THEN payload END FROM results
             WHERE tenant = ?1 AND batch = ?2 AND line > ?3 ORDER BY line",
        )
        .map_err(explain)?;
    let most = stored(bytes as u64);
    let mut found = statement
        .query(params![claim.tenant_key, claim.batch_key, stored(after), most])
        .map_err(explain)?;
    let mut results = Results::default();
    let mut held = 0_usize;
    while let Some(row) = found.next().map_err(explain)? {
        let size = usize::try_from(loaded(row.get(2).map_err(explain)?)).unwrap_or(usize::MAX);
        held = held.saturating_add(size).saturating_add(64);
        if held > bytes {
            if results.rows.is_empty() {
                results.too_large = Some(size.saturating_add(64));
            }
            break;
        }
        results.rows.push(ResultRow {
            line: loaded(row.get(0).map_err(explain)?),
            ending: if row.get::<_, i64>(1).map_err(explain)? == 0 {
                Ending::Completed
            } else {
                Ending::Failed
            },
            payload: row.get(3).map_err(explain)?,
            usage: TokenUsage::default(),
        });
        // A step further would hold the next payload beside these.
        if held == bytes {
            break;
        }
    }
    Ok(results)
}

pub fn finish(connection: &Connection, claim: &Claim, finish: &Finish) -> Result<()> {
    for file in finish.output.iter().chain(&finish.error) {
        files::insert(connection, claim.tenant_key, file)?;
    }
    let output = finish.output.as_ref().map(|file| &file.id);
    let error = finish.error.as_ref().map(|file| &file.id);
    let cancelling = "SELECT status = 'cancelling' FROM batches WHERE tenant = ?1 AND key = ?2";
    let cancelling: bool = connection
        .query_row(cancelling, params![claim.tenant_key, claim.batch_key], |row| row.get(0))
        .map_err(explain)?;
    if cancelling && finish.status == Status::Expired {
        return Err(StoreError::Overtaken);
    }
    // As in `fail`.
    change(
        connection,
        claim,
        "status = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE ?4 END,
         output_file_id = ?5, error_file_id = ?6",
        &[&finish.status.as_str(), &output, &error],
    )?;
    change(
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

pub fn discard_results(connection: &Connection, limit: usize) -> Result<bool> {
    let ended = connection
        .query_row(
            "SELECT tenant, key FROM batches WHERE has_results = 1
             AND status IN ('completed', 'failed', 'cancelled', 'expired') LIMIT 1",
            [],
            |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)),
        )
        .optional()
        .map_err(explain)?;
    let Some((tenant, batch)) = ended else { return Ok(false) };
    let removed = connection
        .execute(
            "DELETE FROM results WHERE tenant = ?1 AND batch = ?2 AND line IN (
                 SELECT line FROM results WHERE tenant = ?1 AND batch = ?2 ORDER BY line LIMIT ?3
             )",
            params![tenant, batch, stored(limit as u64)],
        )
        .map_err(explain)?;
    if removed < limit {
        connection
            .execute("DELETE FROM jobs WHERE tenant = ?1 AND batch = ?2", params![tenant, batch])
            .map_err(explain)?;
        connection
            .execute(
                "UPDATE batches SET has_results = 0 WHERE tenant = ?1 AND key = ?2",
                params![tenant, batch],
            )
            .map_err(explain)?;
    }
    Ok(true)
}
