//! Usage of projects: counts by minute, money spent in a month, and input tokens of open batches.
//!
//! Usage is counted in the transaction that records a result, so it is exact across crashes.

use std::collections::BTreeMap;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{KeyId, TenantId};
use batchwright_domain::money::{Cost, Money};
use batchwright_domain::usage::{TokenUsage, UsageKind};
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params, params_from_iter};

use super::super::usage::{Meters, UsageCounts, UsagePage, UsageQuery, UsageRow};
use super::super::{Charge, OnlineUsage, Result};
use super::keys::BatchRow;
use super::query::{execute, find};
use super::{database_error, tenant_key, timestamp, to_i64, to_u64};

/// Length of a minute.
const MILLIS_PER_MINUTE: i64 = 60_000;

/// Length of a day.
const MILLIS_PER_DAY: i64 = 86_400_000;

/// Minutes of an hour, to which old usage is merged, as the index of unmerged rows has it.
const MINUTES_PER_HOUR: i64 = 60;

/// Maximum of a sum, so that two of them can be added.
const MAX_SUM: u64 = i64::MAX as u64 / 2;

// A budget that could not be reached would be none.
const _: () = assert!(Money::from_cents(Money::MAX_CENTS).units() < MAX_SUM);

/// Charges of a group of results, by model.
#[derive(Default)]
pub(super) struct Charges<'a>(BTreeMap<&'a str, UsageCounts>);

impl<'a> Charges<'a> {
    /// Adds a request.
    pub(super) fn add(&mut self, charge: &'a Charge, usage: TokenUsage) {
        let usage = usage.plausible();
        let counts = self.0.entry(&charge.model).or_default();
        counts.requests = counts.requests.saturating_add(1);
        counts.tokens = counts.tokens.plus(usage);
        let Some(price) = charge.price else {
            counts.unpriced = counts.unpriced.saturating_add(1);
            return;
        };
        counts.cost = counts.cost.plus(price.cost(usage));
    }

    /// Counts the charges of results of a batch.
    pub(super) fn record_batch(
        &self,
        connection: &Connection,
        held: BatchRow,
        at: Timestamp,
    ) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let sql = "SELECT endpoint, coalesce(api_key, 0) FROM batches
            WHERE tenant = ?1 AND key = ?2";
        let found = find(connection, sql, params![held.tenant, held.batch], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?))
        })?;
        let Some((endpoint, key)) = found else { return Ok(()) };
        let kind = Endpoint::parse(&endpoint).map_or(UsageKind::Completions, UsageKind::of);
        for (model, counts) in &self.0 {
            let used = "UPDATE batch_tokens SET used = min(used + ?4, ?5)
                WHERE tenant = ?1 AND batch = ?2 AND model = ?3";
            let input = sum(counts.tokens.input);
            execute(
                connection,
                used,
                params![held.tenant, held.batch, model, input, sum(MAX_SUM)],
            )?;
            add(connection, held.tenant, (kind, model, key, true), counts, at)?;
        }
        Ok(())
    }
}

/// Counts requests that belong to no batch.
pub(super) fn record_online(
    connection: &Connection,
    tenant: &TenantId,
    usage: &[OnlineUsage],
    at: Timestamp,
) -> Result<()> {
    let Some(tenant) = tenant_key(connection, tenant.as_str())? else { return Ok(()) };
    let mut groups = BTreeMap::<_, Charges<'_>>::new();
    for OnlineUsage { endpoint, key, charge, tokens } in usage {
        groups.entry((UsageKind::of(*endpoint), key.as_ref())).or_default().add(charge, *tokens);
    }
    for ((kind, key), charges) in groups {
        let sql = "SELECT key FROM api_keys WHERE id = ?1";
        let find_key = |key: &KeyId| find(connection, sql, [key.as_str()], |row| row.get(0));
        let key: i64 = key.map(find_key).transpose()?.flatten().unwrap_or(0);
        for (model, counts) in &charges.0 {
            add(connection, tenant, (kind, model, key, false), counts, at)?;
        }
    }
    Ok(())
}

/// Converts a sum to its value in the database.
fn sum(number: u64) -> i64 {
    to_i64(number.min(MAX_SUM))
}

/// Returns the clause with which an insert adds its sums to those of the row that exists.
fn adding_sums() -> String {
    let sums = [
        "requests",
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "input_cost",
        "cached_input_cost",
        "output_cost",
        "unpriced",
    ];
    let assignments =
        sums.map(|column| format!("{column} = min({column} + excluded.{column}, {MAX_SUM})"));
    format!("ON CONFLICT DO UPDATE SET {}", assignments.join(", "))
}

/// Adds counts to the minute and to the money spent in the month.
fn add(
    connection: &Connection,
    tenant: i64,
    (kind, model, key, is_batch): (UsageKind, &str, i64, bool),
    counts: &UsageCounts,
    at: Timestamp,
) -> Result<()> {
    let cost = counts.cost;
    let upsert = "INSERT INTO usage (tenant, minute, kind, model, api_key, is_batch, requests,
            input_tokens, cached_input_tokens, output_tokens, input_cost, cached_input_cost,
            output_cost, unpriced)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)";
    let values = params![
        tenant,
        at.as_millis().div_euclid(MILLIS_PER_MINUTE),
        kind.as_str(),
        model,
        key,
        is_batch,
        sum(counts.requests),
        sum(counts.tokens.input),
        sum(counts.tokens.cached_input),
        sum(counts.tokens.output),
        sum(cost.input.units()),
        sum(cost.cached_input.units()),
        sum(cost.output.units()),
        sum(counts.unpriced),
    ];
    execute(connection, &format!("{upsert} {}", adding_sums()), values)?;
    let day = at.as_millis().div_euclid(MILLIS_PER_DAY);
    let of_day = "INSERT INTO model_days (tenant, model, day, requests) VALUES (?1, ?2, ?3, ?4)
        ON CONFLICT DO UPDATE SET
            requests = CASE WHEN day BETWEEN ?3 AND ?3 + 1 THEN min(requests + ?4, ?5) ELSE ?4 END,
            day = CASE WHEN day BETWEEN ?3 AND ?3 + 1 THEN day ELSE ?3 END";
    let requests = sum(counts.requests);
    execute(connection, of_day, params![tenant, model, day, requests, sum(MAX_SUM)])?;
    // A clock that goes back over the end of a month or a day gives nothing back. A time that is
    // further ahead was wrong.
    let spend = "UPDATE tenants SET
            spent = CASE WHEN spent_month BETWEEN ?2 AND ?2 + 1
                THEN min(spent + ?3, ?4) ELSE ?3 END,
            spent_month = CASE WHEN spent_month BETWEEN ?2 AND ?2 + 1 THEN spent_month ELSE ?2 END
        WHERE key = ?1";
    let values = params![tenant, at.month(), sum(cost.total().units()), sum(MAX_SUM)];
    execute(connection, spend, values).map(drop)
}

/// Returns what a tenant has used of limits that are counted here.
pub(super) fn meters(connection: &Connection, tenant: &TenantId, now: Timestamp) -> Result<Meters> {
    let Some(key) = tenant_key(connection, tenant.as_str())? else { return Ok(Meters::default()) };
    let spent = "SELECT CASE WHEN spent_month BETWEEN ?2 AND ?2 + 1 THEN spent ELSE 0 END
        FROM tenants WHERE key = ?1";
    let spent = find(connection, spent, params![key, now.month()], |row| row.get(0))?;
    let today = "SELECT limits.model, days.requests FROM model_limits AS limits
        JOIN model_days AS days ON days.tenant = limits.tenant AND days.model = limits.model
        WHERE limits.tenant = ?1 AND limits.max_requests_per_1_day IS NOT NULL
        AND days.day BETWEEN ?2 AND ?2 + 1";
    let day = now.as_millis().div_euclid(MILLIS_PER_DAY);
    let mut statement = connection.prepare_cached(today).map_err(database_error)?;
    let rows = statement
        .query_map(params![key, day], |row| Ok((row.get(0)?, to_u64(row.get(1)?))))
        .map_err(database_error)?;
    Ok(Meters {
        spent: Money::from_units(spent.map_or(0, to_u64)),
        requests_today: rows.collect::<rusqlite::Result<_>>().map_err(database_error)?,
    })
}

/// Returns the condition on the rows that a query selects, with its values.
fn selection(query: &UsageQuery) -> (String, Vec<Value>) {
    let minute = |at: Timestamp| at.as_millis().div_euclid(MILLIS_PER_MINUTE);
    // A minute that has begun before the end belongs to the report.
    let end = query.before.as_millis().saturating_add(MILLIS_PER_MINUTE).saturating_sub(1);
    let mut condition = "minute >= ? AND minute < ?".to_owned();
    let mut values =
        vec![Value::from(minute(query.from)), Value::from(end.div_euclid(MILLIS_PER_MINUTE))];
    let mut restrict = |text: String, more: Vec<Value>| {
        condition.push_str(&format!(" AND {text}"));
        values.extend(more);
    };
    if let Some(kind) = query.kind {
        restrict("kind = ?".into(), vec![kind.as_str().to_owned().into()]);
    }
    if let Some(tenant) = &query.tenant {
        let tenant = vec![tenant.to_string().into()];
        restrict("tenant = (SELECT key FROM tenants WHERE name = ?)".into(), tenant);
    }
    if let Some(is_batch) = query.is_batch {
        restrict("is_batch = ?".into(), vec![Value::from(i64::from(is_batch))]);
    }
    let projects = query.projects.iter().map(ToString::to_string).collect::<Vec<_>>();
    let keys = query.keys.iter().map(ToString::to_string).collect::<Vec<_>>();
    let subquery = |table: &str, id: &str| format!("(SELECT key FROM {table} WHERE {id} IN");
    for (column, select, end, wanted) in [
        ("tenant", subquery("tenants", "project_id"), ")", projects),
        ("api_key", subquery("api_keys", "id"), ")", keys),
        ("model", String::new(), "", query.models.clone()),
    ] {
        if !wanted.is_empty() {
            let marks = vec!["?"; wanted.len()].join(", ");
            let values = wanted.into_iter().map(Value::from).collect();
            restrict(format!("{column} IN {select} ({marks}){end}"), values);
        }
    }
    (condition, values)
}

/// Returns usage by bucket and group.
pub(super) fn usage(connection: &Connection, query: &UsageQuery) -> Result<UsagePage> {
    let width = i64::try_from(query.width.as_millis()).unwrap_or(i64::MAX);
    let width = width.div_euclid(MILLIS_PER_MINUTE).max(1);
    let (condition, mut values) = selection(query);
    let group = query.group;
    let column = |is_wanted: bool, column: &str| {
        if is_wanted { column.to_owned() } else { "NULL".to_owned() }
    };
    let sql = format!(
        "SELECT minute / {width} * {width} AS bucket, {}, {}, {}, {}, total(requests),
             total(input_tokens), total(cached_input_tokens), total(output_tokens),
             total(input_cost), total(cached_input_cost), total(output_cost), total(unpriced)
         FROM usage WHERE {condition} GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5 LIMIT ?",
        column(group.project, "(SELECT project_id FROM tenants WHERE key = usage.tenant)"),
        column(group.key, "(SELECT id FROM api_keys WHERE key = usage.api_key)"),
        column(group.model, "model"),
        column(group.batch, "is_batch"),
    );
    values.push(Value::from(to_i64((query.max_rows as u64).saturating_add(1))));
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement.query_map(params_from_iter(values), from_row).map_err(database_error)?;
    let mut rows: Vec<UsageRow> = rows.collect::<rusqlite::Result<_>>().map_err(database_error)?;
    let is_whole = rows.len() <= query.max_rows;
    if !is_whole && let Some(last) = rows.last().map(|row| row.start) {
        // The last bucket may lack groups.
        rows.retain(|row| row.start < last);
    }
    Ok(UsagePage { rows, is_whole })
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<UsageRow> {
    // A sum of integers could overflow; a total is exact up to 2^53.
    let total = |index| Ok::<_, rusqlite::Error>(row.get::<_, f64>(index)?.round() as u64);
    let money = |index| total(index).map(Money::from_units);
    Ok(UsageRow {
        start: timestamp(row.get::<_, i64>(0)?.saturating_mul(MILLIS_PER_MINUTE)),
        project: row.get::<_, Option<String>>(1)?.map(Into::into),
        key: row.get::<_, Option<String>>(2)?.map(Into::into),
        model: row.get(3)?,
        is_batch: row.get(4)?,
        counts: UsageCounts {
            requests: total(5)?,
            tokens: TokenUsage {
                input: total(6)?,
                cached_input: total(7)?,
                output: total(8)?,
                reasoning: 0,
            },
            cost: Cost { input: money(9)?, cached_input: money(10)?, output: money(11)? },
            unpriced: total(12)?,
        },
    })
}

/// Merges up to `limit` rows of usage before a time into hours; returns true if more may remain.
pub(super) fn merge(connection: &Connection, before: Timestamp, limit: usize) -> Result<bool> {
    let before = before.as_millis().div_euclid(MILLIS_PER_MINUTE);
    let sql = format!(
        "SELECT tenant, minute, kind, model, api_key, is_batch FROM usage
         WHERE minute < ?1 AND minute % {MINUTES_PER_HOUR} != 0 LIMIT ?2"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let limit = to_i64(limit as u64);
    let rows = statement
        .query_map(params![before, limit], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, i64>(1)?,
                row.get::<_, String>(2)?,
                row.get::<_, String>(3)?,
                row.get::<_, i64>(4)?,
                row.get::<_, bool>(5)?,
            ))
        })
        .map_err(database_error)?;
    let found = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(database_error)?;
    for (tenant, minute, kind, model, key, is_batch) in &found {
        let same = "tenant = ?1 AND minute = ?2 AND kind = ?3 AND model = ?4 AND api_key = ?5
            AND is_batch = ?6";
        let values = params![tenant, minute, kind, model, key, is_batch];
        let merged = format!(
            "INSERT INTO usage SELECT minute - minute % {MINUTES_PER_HOUR}, tenant, kind, model,
                 api_key, is_batch, requests, input_tokens, cached_input_tokens, output_tokens,
                 input_cost, cached_input_cost, output_cost, unpriced
             FROM usage WHERE {same} {}",
            adding_sums()
        );
        execute(connection, &merged, values)?;
        execute(connection, &format!("DELETE FROM usage WHERE {same}"), values)?;
    }
    Ok(to_i64(found.len() as u64) >= limit)
}
