//! Batches that have not ended: their numbers, their deadlines and their cancellation.

use std::collections::HashMap;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::TenantId;
use batchwright_domain::status::Status;
use rusqlite::{Connection, Params, Row, params};

use super::super::{
    BatchProgress, Cancel, Counts, DatedBatch, MAX_ENDED, OpenBatches, Overview, Result,
};
use super::keys::BatchRow;
use super::{batches, database_error, tenant_key, timestamp, to_u64};

/// Returns the number of batches of a tenant that have not ended.
pub(super) fn count(connection: &Connection, tenant: i64) -> Result<u64> {
    let sql = "SELECT count(*) FROM batches WHERE tenant = ?1
        AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.query_row([tenant], |row| row.get(0)))
        .map(to_u64)
        .map_err(database_error)
}

/// Returns the numbers of open batches, and the first `limit` executing batches by deadline.
pub(super) fn overview(connection: &Connection, now: Timestamp, limit: usize) -> Result<Overview> {
    let sql = "SELECT status, count(*),
        sum(lease_until <= ?1 AND waits_since <= ?1), min(created_at),
        min(CASE WHEN lease_until <= ?1 AND waits_since <= ?1
            THEN waits_since END)
        FROM batches WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
        GROUP BY status";
    let open = query(connection, sql, params![now.as_millis()], |row| {
        Ok(OpenBatches {
            status: batches::status_from(row)?,
            number: to_u64(row.get(1)?),
            waiting: to_u64(row.get(2)?),
            oldest: timestamp(row.get(3)?),
            waiting_since: row.get::<_, Option<i64>>(4)?.map(timestamp),
        })
    })?;
    let sql = "SELECT tenant, key, coalesce(in_progress_at, created_at), expires_at, total,
        completed, failed FROM batches
        WHERE status = 'in_progress' AND expires_at < ?1 ORDER BY expires_at LIMIT ?2";
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let dated = query(connection, sql, params![Timestamp::NEVER.as_millis(), limit], |row| {
        Ok(DatedBatch {
            key: BatchRow { tenant: row.get(0)?, batch: row.get(1)? }.key(),
            started_at: timestamp(row.get(2)?),
            expires_at: timestamp(row.get(3)?),
            counts: Counts {
                total: to_u64(row.get(4)?),
                completed: to_u64(row.get(5)?),
                failed: to_u64(row.get(6)?),
            },
        })
    })?;
    Ok(Overview { open, dated })
}

/// Returns the progress of batches that have not ended, and of those that have ended since a time.
pub(super) fn progress(
    connection: &Connection,
    tenants: &[TenantId],
    ended_since: Option<Timestamp>,
    limit: usize,
) -> Result<Vec<BatchProgress>> {
    let open = "SELECT id, status, total, completed, failed FROM batches
        WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling') AND tenant = ?1
        ORDER BY key LIMIT ?2";
    let ended = "SELECT id, status, total, completed, failed, tenant FROM batches
        WHERE coalesce(completed_at, failed_at, expired_at, cancelled_at) >= ?1
        AND status NOT IN ('validating', 'in_progress', 'finalizing', 'cancelling')
        ORDER BY coalesce(completed_at, failed_at, expired_at, cancelled_at) DESC LIMIT ?2";
    let progress = |tenant: &TenantId, row: &Row<'_>| {
        Ok(BatchProgress {
            tenant: tenant.clone(),
            id: row.get::<_, String>(0)?.into(),
            status: batches::status_from(row)?,
            counts: Counts {
                total: to_u64(row.get(2)?),
                completed: to_u64(row.get(3)?),
                failed: to_u64(row.get(4)?),
            },
        })
    };
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let (mut found, mut names) = (Vec::new(), HashMap::new());
    // One state of the database, so that no batch is found both open and ended.
    let transaction = connection.unchecked_transaction().map_err(database_error)?;
    let connection = &*transaction;
    for tenant in tenants {
        let Some(key) = tenant_key(connection, tenant.as_str())? else { continue };
        names.insert(key, tenant);
        found.extend(query(connection, open, params![key, limit], |row| progress(tenant, row))?);
    }
    if let Some(since) = ended_since {
        let limit = i64::try_from(MAX_ENDED).unwrap_or(i64::MAX);
        let rows = query(connection, ended, params![since.as_millis(), limit], |row| {
            let tenant = names.get(&row.get::<_, i64>(5)?);
            tenant.map(|tenant| progress(tenant, row)).transpose()
        })?;
        found.extend(rows.into_iter().flatten());
    }
    Ok(found)
}

/// Returns all rows of a query.
fn query<T>(
    connection: &Connection,
    sql: &str,
    params: impl Params,
    from_row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>> {
    let rows = || {
        let mut statement = connection.prepare_cached(sql)?;
        statement.query_map(params, from_row)?.collect::<rusqlite::Result<_>>()
    };
    rows().map_err(database_error)
}

/// SQL that sets a batch that has not ended to `Cancelling` at the time `?2`; a condition follows.
const CANCEL_SQL: &str = "UPDATE batches SET status = 'cancelling', cancelling_at = ?2,
    waits_since = min(waits_since, ?2),
    lane = CASE status WHEN 'validating' THEN lane ELSE 'finish' END
    WHERE tenant = ?1 AND status IN ('validating', 'in_progress', 'finalizing')";

/// Sets all batches of a tenant that have not ended to `Cancelling`; returns their number.
pub(super) fn cancel_all(connection: &Connection, tenant: i64, now: Timestamp) -> Result<usize> {
    connection.execute(CANCEL_SQL, params![tenant, now.as_millis()]).map_err(database_error)
}

/// Sets a batch that has not ended to `Cancelling`.
pub(super) fn request_cancel(
    connection: &Connection,
    tenant: &str,
    id: &str,
    now: Timestamp,
) -> Result<Cancel> {
    let Some(key) = tenant_key(connection, tenant)? else { return Ok(Cancel::Unknown) };
    connection
        .execute(&format!("{CANCEL_SQL} AND id = ?3"), params![key, now.as_millis(), id])
        .map_err(database_error)?;
    Ok(match batches::get(connection, tenant, id)? {
        None => Cancel::Unknown,
        Some(record) if matches!(record.status, Status::Cancelling | Status::Cancelled) => {
            Cancel::Accepted(Box::new(record))
        }
        Some(record) => Cancel::TooLate(record.status),
    })
}
