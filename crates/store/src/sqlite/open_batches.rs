//! Batches that have not ended: their number and their cancellation.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::status::Status;
use rusqlite::{Connection, params};

use super::super::{Cancel, Result};
use super::{batches, database_error, tenant_key, to_u64};

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
