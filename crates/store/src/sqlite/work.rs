//! Operations of workers on claimed batches, and claims themselves.
//!
//! Each update of a batch compares the fence of the claim (`update_claimed`).

use std::collections::BTreeSet;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::status::Status;
use batchwright_domain::window::{MAX_URGENT_REST, URGENT_SHARE, Urgency};
use rusqlite::{Connection, OptionalExtension, params};

use super::super::{
    BatchError, Claim, Finish, Lane, Orders, PluginVersion, Release, Result, StoreError, Waiting,
};
use super::keys::BatchRow;
use super::{database_error, enqueued, files, timestamp, to_i64, webhooks};

/// Maximum number of pairs of a lane and a tenant that are looked at.
const MAX_WAITING: i64 = 100_000;

/// Maximum number of batches whose window ends soon.
const MAX_URGENT: i64 = 64;

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

/// Returns the oldest waiting batch of each tenant in each lane, the batches whose window ends
/// soonest, and the batch that expired first.
///
/// An expired lease may be taken over, but never by its own holder: a clock that jumps must not
/// make one process work on a batch twice.
pub(super) fn waiting(
    connection: &Connection,
    owner: &str,
    now: Timestamp,
) -> Result<Vec<Waiting>> {
    // The recursive query seeks from one pair of a lane and a tenant to the next in the index, so
    // its cost does not depend on the number of batches that a tenant has.
    let mut statement = connection
        .prepare_cached(
            "WITH RECURSIVE pairs (key) AS (
                 SELECT (
                     SELECT key FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                     ORDER BY lane, tenant LIMIT 1
                 )
                 UNION ALL
                 SELECT (
                     SELECT batches.key FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                     AND (batches.lane, batches.tenant) > (before.lane, before.tenant)
                     ORDER BY batches.lane, batches.tenant LIMIT 1
                 ) FROM pairs JOIN batches AS before USING (key)
                 LIMIT ?3
             ),
             found (key, is_urgent) AS (
                 SELECT (
                     SELECT batches.key FROM batches
                     WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
                     AND batches.lane = pair.lane AND batches.tenant = pair.tenant
                     AND lease_until <= ?1 AND owner IS NOT ?2 AND waits_since <= ?1
                     ORDER BY waits_since, batches.key LIMIT 1
                 ), 0 FROM pairs JOIN batches AS pair USING (key)
                 UNION ALL
                 SELECT * FROM (
                     SELECT key, 1 FROM batches
                     WHERE status = 'in_progress' AND expires_at > ?1 AND expires_at <= ?1 + ?4
                     AND (expires_at - ?1) * ?5 <= expires_at - created_at
                     AND lease_until <= ?1 AND owner IS NOT ?2 AND waits_since <= ?1
                     ORDER BY expires_at LIMIT ?6
                 )
                 UNION ALL
                 SELECT * FROM (
                     SELECT key, 0 FROM batches WHERE status = 'in_progress' AND expires_at <= ?1
                     AND lease_until <= ?1 AND owner IS NOT ?2 ORDER BY expires_at LIMIT 1
                 )
             )
             SELECT tenant, batches.key, waits_since,
             CASE WHEN status = 'in_progress' AND expires_at <= ?1 THEN 'finish' ELSE lane END,
             tenants.name, coalesce(tenants.weight, 1), max(is_urgent), expires_at
             FROM found JOIN batches USING (key) JOIN tenants ON tenants.key = batches.tenant
             GROUP BY batches.key",
        )
        .map_err(database_error)?;
    let max_rest = to_i64(u64::try_from(MAX_URGENT_REST.as_millis()).unwrap_or(u64::MAX));
    let values = params![now.as_millis(), owner, MAX_WAITING, max_rest, URGENT_SHARE, MAX_URGENT];
    let rows = statement
        .query_map(values, |row| {
            Ok(Waiting {
                key: BatchRow { tenant: row.get(0)?, batch: row.get(1)? }.key(),
                since: timestamp(row.get(2)?),
                lane: parse_lane(&row.get::<_, String>(3)?),
                tenant: row.get::<_, String>(4)?.into(),
                weight: row.get(5)?,
                urgency: match (row.get(6)?, timestamp(row.get(7)?)) {
                    (_, Timestamp::NEVER) => Urgency::Undated,
                    (true, _) => Urgency::Urgent,
                    (false, _) => Urgency::Dated,
                },
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

/// Prefix of the execution lane of a batch without a deadline, which waits apart from those that
/// have one.
pub(super) const UNDATED: &str = "undated ";

/// Parses a lane from its text in the database.
fn parse_lane(text: &str) -> Lane {
    let text = text.strip_prefix(UNDATED).unwrap_or(text);
    match (text, text.strip_prefix("execute ")) {
        ("validate", _) => Lane::Validate,
        ("admit", _) => Lane::Admit,
        (_, Some(plugins)) => {
            Lane::Execute(plugins.split_whitespace().map(str::to_owned).collect())
        }
        _ => Lane::Finish,
    }
}

/// Formats the execution lane of these plugins for the database.
pub(super) fn execution_lane(plugins: &BTreeSet<String>) -> String {
    format!("execute {}", plugins.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
}

/// Updates the row of a claimed batch, or fails with `Fenced` if the batch was claimed again.
///
/// The first three parameters of the statement are those of the claim.
pub(crate) fn update_claimed(
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
pub(crate) fn insert_plugins(
    connection: &Connection,
    claim: &Claim,
    by: &[PluginVersion],
) -> Result<()> {
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
    enqueued::give_back(connection, BatchRow::of(&claim.key), at)?;
    webhooks::insert_events(connection, BatchRow::of(&claim.key), at)?;
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
    enqueued::give_back(connection, held, finish.at)?;
    webhooks::insert_events(connection, held, finish.at)?;
    insert_errors(connection, claim, &finish.errors)
}
