//! Operations of clients on batches: create, get, list, cancel.

use std::fmt::Display;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::KeyId;
use batchwright_domain::limits::lifetime_seconds;
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::super::accounts::Refusal;
use super::super::{
    BatchError, BatchKey, BatchRecord, Counts, Created, FIRST_ERRORS, Idempotency, NewBatch, Page,
    Paged, PluginVersion, Result, StatusTimes, StoreError, WaitCause,
};
use super::keys::BatchRow;
use super::{database_error, open_batches, tenant_key, timestamp, to_i64, to_u64};

/// Columns that `from_row` reads.
const COLUMNS: &str = "key, id, endpoint, input_file_id, completion_window, metadata, \
    created_at, expires_at, output_lifetime, status, model, output_file_id, error_file_id, \
    in_progress_at, finalizing_at, completed_at, failed_at, expired_at, cancelling_at, \
    cancelled_at, total, completed, failed, input_tokens, cached_input_tokens, output_tokens, \
    reasoning_tokens, waits_for, waits_for_since, waits_since";

/// Returns the key of a batch and the batch without its errors.
fn from_row(row: &Row) -> rusqlite::Result<(i64, BatchRecord)> {
    let time =
        |column: &str| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(timestamp));
    let number = |column: &str| Ok::<_, rusqlite::Error>(to_u64(row.get(column)?));
    let metadata: Option<String> = row.get("metadata")?;
    let endpoint: String = row.get("endpoint")?;
    let record = BatchRecord {
        new: NewBatch {
            id: row.get::<_, String>("id")?.into(),
            endpoint: Endpoint::parse(&endpoint)
                .ok_or_else(|| damaged(row, "endpoint", &"unknown endpoint"))?,
            input_file_id: row.get::<_, String>("input_file_id")?.into(),
            completion_window: row.get("completion_window")?,
            metadata: metadata
                .map(|text| {
                    serde_json::from_str(&text).map_err(|error| damaged(row, "metadata", &error))
                })
                .transpose()?,
            created_at: timestamp(row.get("created_at")?),
            expires_at: timestamp(row.get("expires_at")?),
            output_lifetime: row
                .get::<_, Option<i64>>("output_lifetime")?
                .map(|millis| Duration::from_millis(to_u64(millis))),
            api_key: None,
        },
        status: status_from(row)?,
        model: row.get("model")?,
        errors: Vec::new(),
        output_file_id: row.get::<_, Option<String>>("output_file_id")?.map(Into::into),
        error_file_id: row.get::<_, Option<String>>("error_file_id")?.map(Into::into),
        times: StatusTimes {
            in_progress_at: time("in_progress_at")?,
            finalizing_at: time("finalizing_at")?,
            completed_at: time("completed_at")?,
            failed_at: time("failed_at")?,
            expired_at: time("expired_at")?,
            cancelling_at: time("cancelling_at")?,
            cancelled_at: time("cancelled_at")?,
        },
        counts: Counts {
            total: number("total")?,
            completed: number("completed")?,
            failed: number("failed")?,
        },
        usage: TokenUsage {
            input: number("input_tokens")?,
            cached_input: number("cached_input_tokens")?,
            output: number("output_tokens")?,
            reasoning: number("reasoning_tokens")?,
        },
        waits_for: match (row.get("waits_for")?, time("waits_for_since")?) {
            (Some(cause), Some(since)) => {
                Some(WaitCause { cause, since, next: timestamp(row.get("waits_since")?) })
            }
            _ => None,
        },
    };
    Ok((row.get("key")?, record))
}

/// Reads the column `status`.
pub(super) fn status_from(row: &Row<'_>) -> rusqlite::Result<Status> {
    let status: String = row.get("status")?;
    Status::parse(&status).map_err(|error| damaged(row, "status", &error))
}

/// Returns the error of a column whose text is not what this program writes.
fn damaged(row: &Row<'_>, column: &str, cause: &dyn Display) -> rusqlite::Error {
    let id = row.get::<_, String>("id").unwrap_or_default();
    let message = format!("the {column} of {id} is damaged: {cause}");
    let index = row.as_ref().column_index(column).unwrap_or_default();
    rusqlite::Error::FromSqlConversionFailure(index, Type::Text, message.into())
}

/// Returns the first errors of a batch, followed by a notice if there are more.
fn first_errors(connection: &Connection, tenant: i64, batch: i64) -> Result<Vec<BatchError>> {
    let mut found = errors(connection, tenant, batch, FIRST_ERRORS.saturating_add(1))?;
    if found.len() > FIRST_ERRORS {
        found.truncate(FIRST_ERRORS);
        let message = format!(
            "Only the first {FIRST_ERRORS} errors are listed here; \
             retrieve the batch to get all of them."
        );
        found.push(BatchError {
            code: ErrorCode::TooManyErrors.into(),
            message,
            param: None,
            line: None,
        });
    }
    Ok(found)
}

/// Returns up to `limit` errors of a batch, in order.
fn errors(
    connection: &Connection,
    tenant: i64,
    batch: i64,
    limit: usize,
) -> Result<Vec<BatchError>> {
    let mut statement = connection
        .prepare_cached(
            "SELECT code, message, param, line FROM batch_errors
             WHERE tenant = ?1 AND batch = ?2 ORDER BY place LIMIT ?3",
        )
        .map_err(database_error)?;
    let rows = statement
        .query_map(params![tenant, batch, to_i64(limit as u64)], |row| {
            Ok(BatchError {
                code: row.get(0)?,
                message: row.get(1)?,
                param: row.get(2)?,
                line: row.get::<_, Option<i64>>(3)?.map(to_u64),
            })
        })
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Returns all errors of a batch.
pub(super) fn all_errors(
    connection: &Connection,
    tenant: &str,
    id: &str,
) -> Result<Vec<BatchError>> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(Vec::new()) };
    let batch = connection
        .query_row(
            "SELECT key FROM batches WHERE tenant = ?1 AND id = ?2",
            params![tenant, id],
            |row| row.get(0),
        )
        .optional()
        .map_err(database_error)?;
    batch.map_or(Ok(Vec::new()), |batch| errors(connection, tenant, batch, usize::MAX))
}

/// Inserts a batch, unless an earlier batch has the same idempotency key.
///
/// The unique index on keys decides between concurrent requests.
pub(super) fn create(
    connection: &Connection,
    tenant: i64,
    new: &NewBatch,
    idempotency: Option<&Idempotency>,
    max_open: Option<u64>,
) -> Result<Created> {
    if insert(connection, tenant, new, idempotency)? {
        // The refusal undoes the insertion.
        return match max_open {
            Some(max) if open_batches::count(connection, tenant)? > max => {
                Err(StoreError::Refused(Refusal::OpenBatches(max)))
            }
            _ => Ok(Created::New),
        };
    }
    let key = idempotency.map(|idempotency| &idempotency.key);
    let sql = format!(
        "SELECT {COLUMNS}, fingerprint FROM batches WHERE tenant = ?1 AND idempotency_key = ?2"
    );
    let (batch, mut record, fingerprint) = connection
        .query_row(&sql, params![tenant, key], |row| {
            let (batch, record) = from_row(row)?;
            Ok((batch, record, row.get::<_, Vec<u8>>("fingerprint")?))
        })
        .map_err(database_error)?;
    if idempotency.is_none_or(|idempotency| idempotency.fingerprint.as_slice() != fingerprint) {
        return Ok(Created::Conflict);
    }
    record.errors = first_errors(connection, tenant, batch)?;
    Ok(Created::Existing(Box::new(record)))
}

/// Inserts a batch and returns true, or returns false if its idempotency key was used before.
fn insert(
    connection: &Connection,
    tenant: i64,
    new: &NewBatch,
    idempotency: Option<&Idempotency>,
) -> Result<bool> {
    let metadata = new
        .metadata
        .as_ref()
        .map(serde_json::to_string)
        .transpose()
        .map_err(|error| StoreError::Database(error.to_string()))?;
    let lifetime =
        new.output_lifetime.map(|span| i64::try_from(span.as_millis()).unwrap_or(i64::MAX));
    let (key, fingerprint) = idempotency.map(|given| (&given.key, given.fingerprint)).unzip();
    let inserted = connection
        .execute(
            "INSERT INTO batches (tenant, id, endpoint, input_file_id, completion_window, metadata,
             created_at, expires_at, output_lifetime, status, waits_since, idempotency_key,
             fingerprint, api_key, input_file)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'validating', ?7, ?10, ?11,
             (SELECT key FROM api_keys WHERE id = ?12), (
                 SELECT key FROM files WHERE tenant = ?1 AND id = ?4
                 AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > ?7)
             ))
             ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING",
            params![
                tenant,
                new.id.as_str(),
                new.endpoint.as_str(),
                new.input_file_id.as_str(),
                new.completion_window,
                metadata,
                new.created_at.as_millis(),
                new.expires_at.as_millis(),
                lifetime,
                key,
                fingerprint,
                new.api_key.as_ref().map(KeyId::as_str)
            ],
        )
        .map_err(database_error)?;
    Ok(inserted == 1)
}

/// Returns a batch with its first errors.
pub(super) fn get(connection: &Connection, tenant: &str, id: &str) -> Result<Option<BatchRecord>> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(None) };
    let found = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM batches WHERE tenant = ?1 AND id = ?2"))
        .and_then(|mut statement| statement.query_row(params![tenant, id], from_row).optional())
        .map_err(database_error)?;
    let Some((key, mut record)) = found else { return Ok(None) };
    record.errors = first_errors(connection, tenant, key)?;
    Ok(Some(record))
}

/// Returns the approximate size of a batch in memory and in a response, in bytes.
fn approximate_bytes(record: &BatchRecord) -> usize {
    let metadata = record
        .new
        .metadata
        .iter()
        .flatten()
        .map(|(key, value)| key.len().saturating_add(value.len()));
    let errors = record.errors.iter().map(|error| error.message.len().saturating_add(200));
    metadata.chain(errors).fold(1500, usize::saturating_add)
}

/// Lists batches, newest first; ends the page at `limit` entries or at about `bytes` bytes.
pub(super) fn list(
    connection: &Connection,
    tenant: &str,
    after: Option<&str>,
    limit: usize,
    bytes: usize,
) -> Result<Paged<BatchRecord>> {
    let tenant = tenant_key(connection, tenant)?.unwrap_or(0);
    let before = match after {
        None => i64::MAX,
        Some(id) => {
            let found = connection
                .query_row(
                    "SELECT key FROM batches WHERE tenant = ?1 AND id = ?2",
                    params![tenant, id],
                    |row| row.get(0),
                )
                .optional()
                .map_err(database_error)?;
            let Some(key) = found else { return Ok(Paged::UnknownAfter) };
            key
        }
    };
    let mut statement = connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM batches WHERE tenant = ?1 AND key < ?2 ORDER BY key DESC"
        ))
        .map_err(database_error)?;
    let mut rows = statement.query(params![tenant, before]).map_err(database_error)?;
    let (mut items, mut page_bytes, mut has_more) = (Vec::new(), 0_usize, false);
    while let Some(row) = rows.next().map_err(database_error)? {
        has_more = items.len() >= limit || (page_bytes >= bytes && !items.is_empty());
        if has_more {
            break;
        }
        let (key, mut record) = from_row(row).map_err(database_error)?;
        record.errors = first_errors(connection, tenant, key)?;
        page_bytes = page_bytes.saturating_add(approximate_bytes(&record));
        items.push(record);
    }
    Ok(Paged::Page(Page { items, has_more }))
}

/// Condition on `batches`: at the first parameter, the batch has ended longer ago than the lifetime
/// of its project in seconds, or if that has none, than the second parameter.
///
/// The first line alone bounds the part of the index that is read.
pub(super) const OUTLIVED: &str = "(
    coalesce(completed_at, failed_at, expired_at, cancelled_at) < ?1 - 1000 *
        min(?2, (SELECT coalesce(min(batch_lifetime_seconds), ?2) FROM tenants))
    AND coalesce(completed_at, failed_at, expired_at, cancelled_at) < ?1 - 1000 * coalesce(
        (SELECT batch_lifetime_seconds FROM tenants WHERE tenants.key = batches.tenant), ?2)
    AND status IN ('completed', 'failed', 'expired', 'cancelled'))";

/// Condition on `files` in a query over `batches`: the file has results of the batch.
pub(super) const RESULT_FILE: &str = "(files.tenant = batches.tenant AND NOT files.removed
    AND files.id IN (batches.output_file_id, batches.error_file_id))";

/// Returns up to `limit` batches that outlived `lifetime` or that of their project, with files
/// removed and results discarded.
pub(super) fn removable(
    connection: &Connection,
    now: Timestamp,
    lifetime: Duration,
    limit: usize,
) -> Result<Vec<BatchKey>> {
    let sql = format!(
        "SELECT tenant, key FROM batches WHERE {OUTLIVED} AND has_results = 0
         AND NOT EXISTS (SELECT 1 FROM files WHERE {RESULT_FILE}) LIMIT ?3"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement
        .query_map(
            params![now.as_millis(), to_i64(lifetime_seconds(lifetime)), to_i64(limit as u64)],
            |row| Ok(BatchRow { tenant: row.get(0)?, batch: row.get(1)? }.key()),
        )
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Deletes batches with their errors and plugins.
pub(super) fn delete(connection: &Connection, batches: &[BatchKey]) -> Result<()> {
    for BatchRow { tenant, batch } in batches.iter().map(BatchRow::of) {
        for sql in [
            "DELETE FROM batch_errors WHERE tenant = ?1 AND batch = ?2",
            "DELETE FROM batch_tokens WHERE tenant = ?1 AND batch = ?2",
            "DELETE FROM batch_plugins WHERE tenant = ?1 AND batch = ?2",
            "DELETE FROM batches WHERE tenant = ?1 AND key = ?2",
        ] {
            connection
                .prepare_cached(sql)
                .and_then(|mut statement| statement.execute(params![tenant, batch]))
                .map_err(database_error)?;
        }
    }
    Ok(())
}

/// Returns the plugins that a batch used, in order of first use.
pub(super) fn plugin_versions(
    connection: &Connection,
    tenant: &str,
    id: &str,
) -> Result<Option<Vec<PluginVersion>>> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(None) };
    let batch: Option<i64> = connection
        .query_row(
            "SELECT key FROM batches WHERE tenant = ?1 AND id = ?2",
            params![tenant, id],
            |row| row.get(0),
        )
        .optional()
        .map_err(database_error)?;
    let Some(batch) = batch else { return Ok(None) };
    let sql = "SELECT name, kind, version, sha256 FROM batch_plugins
        WHERE tenant = ?1 AND batch = ?2 ORDER BY rowid";
    let mut statement = connection.prepare_cached(sql).map_err(database_error)?;
    let rows = statement
        .query_map(params![tenant, batch], |row| {
            Ok(PluginVersion {
                name: row.get(0)?,
                kind: row.get(1)?,
                version: row.get(2)?,
                sha256: row.get(3)?,
            })
        })
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map(Some).map_err(database_error)
}

#[cfg(test)]
mod tests {
    use super::super::SqliteStore;
    use crate::Store;

    #[tokio::test]
    async fn damaged_status_and_metadata_are_errors_and_no_other_values() {
        let folder = tempfile::TempDir::new().unwrap();
        let store = SqliteStore::open(folder.path()).unwrap();
        let path = folder.path().join("batchwright.db");
        rusqlite::Connection::open(path)
            .unwrap()
            .execute_batch(
                "INSERT INTO tenants (key, name, project_id, title) VALUES (9, 't', 'proj_t', 't');
                 INSERT INTO batches (tenant, id, endpoint, input_file_id, completion_window,
                     created_at, expires_at, status, metadata)
                 VALUES (9, 'good', 'e', 'f', '24h', 0, 1000, 'completed', '{\"a\":\"b\"}'),
                        (9, 'state', 'e', 'f', '24h', 0, 1000, 'sleeping', NULL),
                        (9, 'pairs', 'e', 'f', '24h', 0, 1000, 'completed', '[');
                 UPDATE batches SET endpoint = '/v1/embeddings';",
            )
            .unwrap();
        assert!(
            store.batch(&"t".into(), &"good".into()).await.unwrap().unwrap().new.metadata.is_some()
        );
        for (id, cause) in [("state", "unknown status `sleeping`"), ("pairs", "metadata of pairs")]
        {
            let error = store.batch(&"t".into(), &id.into()).await.unwrap_err().to_string();
            assert!(error.contains(id) && error.contains(cause), "{error}");
        }
    }
}
