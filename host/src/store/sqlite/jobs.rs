//! States of requests that a provider works on.

use rusqlite::{Connection, OptionalExtension, params};

use super::super::{Claim, Job, Result, StoreError};
use super::{explain, stored};

/// Keeps a state as long as the claim holds.
pub fn keep(connection: &Connection, claim: &Claim, line: u64, job: &Job) -> Result<()> {
    let kept = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO jobs (tenant, batch, line, plugin, state)
             SELECT tenant, key, ?4, ?5, ?6 FROM batches WHERE tenant = ?1 AND key = ?2 AND fence = ?3",
        )
        .and_then(|mut insert| {
            insert.execute(params![claim.tenant_key, claim.batch_key, claim.fence, stored(line), job.plugin, job.state])
        })
        .map_err(explain)?;
    if kept == 1 { Ok(()) } else { Err(StoreError::Fenced) }
}

pub fn get(connection: &Connection, claim: &Claim, line: u64) -> Result<Option<Job>> {
    connection
        .prepare_cached(
            "SELECT plugin, state FROM jobs WHERE tenant = ?1 AND batch = ?2 AND line = ?3",
        )
        .and_then(|mut select| {
            select
                .query_row(params![claim.tenant_key, claim.batch_key, stored(line)], |row| {
                    Ok(Job { plugin: row.get(0)?, state: row.get(1)? })
                })
                .optional()
        })
        .map_err(explain)
}

pub fn remove(connection: &Connection, claim: &Claim, line: u64) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM jobs WHERE tenant = ?1 AND batch = ?2 AND line = ?3")
        .and_then(|mut delete| {
            delete.execute(params![claim.tenant_key, claim.batch_key, stored(line)])
        })
        .map(drop)
        .map_err(explain)
}

pub fn any(connection: &Connection, claim: &Claim) -> Result<bool> {
    connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM jobs WHERE tenant = ?1 AND batch = ?2)")
        .and_then(|mut select| {
            select.query_row(params![claim.tenant_key, claim.batch_key], |row| row.get(0))
        })
        .map_err(explain)
}
