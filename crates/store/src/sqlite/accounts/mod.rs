//! Projects, service accounts, keys and the audit log in SQLite.

mod audit;
mod keys;
mod policies;
mod projects;
mod service_accounts;

pub(super) use projects::creating_tenant;

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{KeyId, ProjectId, ServiceAccountId, TenantId};
use batchwright_domain::limits::ModelRule;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Params, Row, params_from_iter};

use super::{SqliteStore, database_error, to_i64};
use crate::accounts::{
    Accounts, Actor, AuditEntry, AuditQuery, KeyChanges, KeyHolder, KeyRecord, LimitChanges,
    ListQuery, NewKey, NewProject, NewServiceAccount, ProjectPolicy, ProjectRecord, ProjectUse,
    Refusal, ServiceAccountRecord, StorageBounds,
};
use crate::{Order, Page, Paged, Result, StoreError};

fn refused<T>(refusal: Refusal) -> Result<T> {
    Err(StoreError::Refused(refusal))
}

fn execute(connection: &Connection, sql: &str, params: impl Params) -> Result<usize> {
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.execute(params))
        .map_err(database_error)
}

fn find<T>(
    connection: &Connection,
    sql: &str,
    params: impl Params,
    from_row: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Option<T>> {
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| statement.query_row(params, from_row).optional())
        .map_err(database_error)
}

/// Rows that a list shows.
struct Listing<'a> {
    columns: &'a str,
    /// Tables, joined.
    from: &'a str,
    /// Condition of every row that ever was in the list.
    condition: String,
    /// Further condition of the rows that are shown.
    visible: &'a str,
    /// Column by which the list is ordered.
    key: &'a str,
    /// Column of the ids after which a page can begin.
    id: &'a str,
    /// Values of `condition`.
    values: Vec<Value>,
}

/// Returns a page of a list.
fn list<T>(
    connection: &Connection,
    listing: Listing<'_>,
    query: &ListQuery,
    from_row: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Paged<T>> {
    let Listing { columns, from, condition, visible, key, id, mut values } = listing;
    let mut sql = format!("SELECT {columns} FROM {from} WHERE {condition} AND {visible}");
    let (compare, direction) = match query.order {
        Order::NewestFirst => ("<", "DESC"),
        Order::OldestFirst => (">", "ASC"),
    };
    if let Some(after) = &query.after {
        let cursor = format!("SELECT {key} FROM {from} WHERE {condition} AND {id} = ?");
        let of_cursor = values.iter().cloned().chain([Value::from(after.clone())]);
        let found = find(connection, &cursor, params_from_iter(of_cursor), |row| row.get(0))?;
        let Some(found) = found else { return Ok(Paged::UnknownAfter) };
        sql.push_str(&format!(" AND {key} {compare} ?"));
        values.push(Value::Integer(found));
    }
    sql.push_str(&format!(" ORDER BY {key} {direction} LIMIT ?"));
    values.push(Value::from(to_i64(query.limit as u64).saturating_add(1)));
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement.query_map(params_from_iter(values), from_row).map_err(database_error)?;
    let mut items = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(database_error)?;
    let has_more = items.len() > query.limit;
    items.truncate(query.limit);
    Ok(Paged::Page(Page { items, has_more }))
}

#[async_trait]
impl Accounts for SqliteStore {
    async fn had_key(&self) -> Result<bool> {
        self.readers.read(keys::any).await
    }

    async fn key(&self, id: &KeyId) -> Result<Option<KeyRecord>> {
        let id = id.clone();
        self.readers.read(move |connection| keys::get(connection, &id)).await
    }

    async fn record_key_uses(&self, uses: Vec<(KeyId, Timestamp)>) -> Result<()> {
        self.writer.write(move |connection| keys::record_uses(connection, &uses)).await
    }

    async fn create_project(&self, new: NewProject, by: Actor) -> Result<ProjectRecord> {
        self.writer.write(move |connection| projects::create(connection, &new, &by)).await
    }

    async fn project(&self, id: &ProjectId) -> Result<Option<ProjectRecord>> {
        let id = id.clone();
        self.readers.read(move |connection| projects::get(connection, &id)).await
    }

    async fn projects(&self, query: ListQuery, archived: bool) -> Result<Paged<ProjectRecord>> {
        self.readers.read(move |connection| projects::page(connection, &query, archived)).await
    }

    async fn rename_project(
        &self,
        id: &ProjectId,
        name: String,
        by: Actor,
    ) -> Result<ProjectRecord> {
        let id = id.clone();
        self.writer.write(move |connection| projects::rename(connection, &id, &name, &by)).await
    }

    async fn archive_project(&self, id: &ProjectId, by: Actor) -> Result<ProjectRecord> {
        let id = id.clone();
        self.writer.write(move |connection| projects::archive(connection, &id, &by)).await
    }

    async fn policy(&self, tenant: &TenantId) -> Result<ProjectPolicy> {
        let tenant = tenant.clone();
        self.readers.read(move |connection| policies::of_tenant(connection, &tenant)).await
    }

    async fn storage_room(&self, tenant: &TenantId, bounds: StorageBounds) -> Result<Option<u64>> {
        let tenant = tenant.clone();
        self.readers
            .read(move |connection| policies::storage_room(connection, &tenant, bounds))
            .await
    }

    async fn policy_of(&self, id: &ProjectId) -> Result<Option<(ProjectPolicy, ProjectUse)>> {
        let id = id.clone();
        self.readers.read(move |connection| policies::of_project(connection, &id)).await
    }

    async fn update_limits(&self, id: &ProjectId, changes: LimitChanges, by: Actor) -> Result<()> {
        let id = id.clone();
        self.writer
            .write(move |connection| policies::update_limits(connection, &id, &changes, &by))
            .await
    }

    async fn set_models(&self, id: &ProjectId, models: ModelRule, by: Actor) -> Result<()> {
        let id = id.clone();
        self.writer
            .write(move |connection| policies::set_models(connection, &id, &models, &by))
            .await
    }

    async fn create_account(
        &self,
        project: &ProjectId,
        new: NewServiceAccount,
        key: Option<NewKey>,
        by: Actor,
    ) -> Result<ServiceAccountRecord> {
        let project = project.clone();
        self.writer
            .write(move |connection| {
                let account = service_accounts::create(connection, &project, &new, &by)?;
                if let Some(key) = &key {
                    keys::create_for_project(connection, &project, &new.id, key, &by)?;
                }
                Ok(account)
            })
            .await
    }

    async fn account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
    ) -> Result<Option<ServiceAccountRecord>> {
        let (project, id) = (project.clone(), id.clone());
        self.readers.read(move |connection| service_accounts::get(connection, &project, &id)).await
    }

    async fn accounts(
        &self,
        project: &ProjectId,
        query: ListQuery,
    ) -> Result<Paged<ServiceAccountRecord>> {
        let project = project.clone();
        self.readers
            .read(move |connection| service_accounts::page(connection, &project, &query))
            .await
    }

    async fn rename_account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
        name: String,
        by: Actor,
    ) -> Result<ServiceAccountRecord> {
        let (project, id) = (project.clone(), id.clone());
        self.writer
            .write(move |connection| {
                service_accounts::rename(connection, &project, &id, &name, &by)
            })
            .await
    }

    async fn delete_account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
        by: Actor,
    ) -> Result<()> {
        let (project, id) = (project.clone(), id.clone());
        self.writer
            .write(move |connection| service_accounts::delete(connection, &project, &id, &by))
            .await
    }

    async fn create_project_key(
        &self,
        project: &ProjectId,
        account: &ServiceAccountId,
        new: NewKey,
        by: Actor,
    ) -> Result<KeyRecord> {
        let (project, account) = (project.clone(), account.clone());
        self.writer
            .write(move |connection| {
                keys::create_for_project(connection, &project, &account, &new, &by)
            })
            .await
    }

    async fn create_admin_key(&self, new: NewKey, by: Actor) -> Result<KeyRecord> {
        self.writer.write(move |connection| keys::create_for_admin(connection, &new, &by)).await
    }

    async fn key_of(&self, holder: &KeyHolder, id: &KeyId) -> Result<Option<KeyRecord>> {
        let (holder, id) = (holder.clone(), id.clone());
        self.readers.read(move |connection| keys::get_of(connection, &holder, &id)).await
    }

    async fn keys(&self, holder: &KeyHolder, query: ListQuery) -> Result<Paged<KeyRecord>> {
        let holder = holder.clone();
        self.readers.read(move |connection| keys::page(connection, &holder, &query)).await
    }

    async fn update_key(
        &self,
        holder: &KeyHolder,
        id: &KeyId,
        changes: KeyChanges,
        by: Actor,
    ) -> Result<KeyRecord> {
        let (holder, id) = (holder.clone(), id.clone());
        self.writer
            .write(move |connection| keys::update(connection, &holder, &id, &changes, &by))
            .await
    }

    async fn delete_key(&self, holder: &KeyHolder, id: &KeyId, by: Actor) -> Result<()> {
        let (holder, id) = (holder.clone(), id.clone());
        self.writer.write(move |connection| keys::delete(connection, &holder, &id, &by)).await
    }

    async fn audit_log(&self, query: AuditQuery) -> Result<Paged<AuditEntry>> {
        self.readers.read(move |connection| audit::page(connection, &query)).await
    }
}
