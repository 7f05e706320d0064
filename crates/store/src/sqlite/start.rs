//! Start of a batch: from its validation, or from its wait for a limit, to its execution.

use std::collections::BTreeSet;

use batchwright_domain::clock::Timestamp;
use rusqlite::{Connection, params};
use serde_json::{Value, json};

use super::super::{Claim, Release, Result, Started, StoreError, Validated};
use super::keys::BatchRow;
use super::query::{execute, find};
use super::work::{UNDATED, execution_lane, insert_plugins, release, update_claimed};
use super::{enqueued, to_i64};

/// Stores the results of validation and releases the batch into its next lane.
pub(super) fn start(
    connection: &Connection,
    claim: &Claim,
    found: &Validated,
    at: Timestamp,
    may_wait: bool,
) -> Result<Started> {
    let held = BatchRow::of(&claim.key);
    if may_execute(connection, held, at)?
        && let Some(exceeded) = enqueued::exceeded(connection, held, &found.tokens)?
    {
        if !may_wait || exceeded.estimated > exceeded.limit {
            return Ok(Started::OverLimit(exceeded));
        }
        insert_plugins(connection, claim, &found.judged_by)?;
        enqueued::insert(connection, held, &found.tokens, false)?;
        let admission = json!({
            "total": found.total,
            "model": found.model,
            "plugins": found.plugins,
        });
        update_claimed(
            connection,
            claim,
            "lane = 'admit', admission = ?4, waits_since = ?5, owner = NULL, lease_until = 0,
             waits_for = ?6, waits_for_since = ?5",
            &[&admission.to_string(), &at.as_millis(), &exceeded.to_string()],
        )?;
        return Ok(Started::Queued);
    }
    insert_plugins(connection, claim, &found.judged_by)?;
    enqueued::insert(connection, held, &found.tokens, true)?;
    execute_batch(connection, claim, (found.total, found.model.as_deref(), &found.plugins), at)?;
    Ok(Started::Begun)
}

/// Starts a batch that waits, or releases it until `retry_at`.
pub(super) fn admit(
    connection: &Connection,
    claim: &Claim,
    at: Timestamp,
    retry_at: Timestamp,
) -> Result<Started> {
    let held = BatchRow::of(&claim.key);
    let tokens = enqueued::of_batch(connection, held)?;
    if may_execute(connection, held, at)?
        && let Some(exceeded) = enqueued::exceeded(connection, held, &tokens)?
    {
        // The limit may have been lowered.
        if exceeded.estimated > exceeded.limit {
            return Ok(Started::OverLimit(exceeded));
        }
        release(connection, claim, &Release::Backoff(retry_at, None))?;
        return Ok(Started::Queued);
    }
    let damaged = || StoreError::Database("the admission of a batch is damaged".into());
    let sql = "SELECT admission FROM batches WHERE tenant = ?1 AND key = ?2";
    let text = find(connection, sql, params![held.tenant, held.batch], |row| {
        row.get::<_, Option<String>>(0)
    })?;
    let text = text.flatten().ok_or_else(damaged)?;
    let admission: Value = serde_json::from_str(&text).map_err(|_| damaged())?;
    let total = admission.get("total").and_then(Value::as_u64).ok_or_else(damaged)?;
    let plugins = admission.get("plugins").and_then(Value::as_array).ok_or_else(damaged)?;
    let plugins =
        plugins.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<_>>();
    let plugins: BTreeSet<String> = plugins.ok_or_else(damaged)?;
    let model = admission.get("model").and_then(Value::as_str);
    let admitted = "UPDATE batch_tokens SET admitted = 1 WHERE tenant = ?1 AND batch = ?2";
    execute(connection, admitted, params![held.tenant, held.batch])?;
    execute_batch(connection, claim, (total, model, &plugins), at)?;
    Ok(Started::Begun)
}

/// Returns true if a batch was neither cancelled nor has expired.
fn may_execute(connection: &Connection, held: BatchRow, at: Timestamp) -> Result<bool> {
    let sql = "SELECT status = 'validating' AND expires_at > ?3 FROM batches
        WHERE tenant = ?1 AND key = ?2";
    let values = params![held.tenant, held.batch, at.as_millis()];
    Ok(find(connection, sql, values, |row| row.get(0))?.unwrap_or_default())
}

/// Changes `Validating` to `InProgress` and releases the batch into its next lane.
fn execute_batch(
    connection: &Connection,
    claim: &Claim,
    (total, model, plugins): (u64, Option<&str>, &BTreeSet<String>),
    at: Timestamp,
) -> Result<()> {
    update_claimed(
        connection,
        claim,
        "in_progress_at = coalesce(in_progress_at, ?4),
         status = CASE status WHEN 'validating' THEN 'in_progress' ELSE status END,
         lane = CASE status WHEN 'validating'
             THEN CASE expires_at WHEN ?8 THEN ?9 ELSE '' END || ?7 ELSE 'finish' END,
         admission = NULL,
         waits_for = NULL, waits_for_since = NULL,
         total = ?5, model = ?6, has_results = 1, owner = NULL, lease_until = 0",
        &[
            &at.as_millis(),
            &to_i64(total),
            &model,
            &execution_lane(plugins),
            &Timestamp::NEVER.as_millis(),
            &UNDATED,
        ],
    )
}
