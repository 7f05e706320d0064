//! Projects, service accounts, keys and the audit log in SQLite.

pub(super) mod audit;
mod keys;
mod policies;
mod projects;
mod secrets;
mod service_accounts;

pub(super) use projects::{creating_tenant, project_of_tenant};

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{KeyId, ProjectId, ServiceAccountId, TenantId};
use batchwright_domain::limits::{ModelLimits, ModelRule};

use super::{SqliteStore, usage};
use crate::accounts::{
    Accounts, Actor, AuditEntry, AuditQuery, KeyChanges, KeyHolder, KeyRecord, LimitChanges,
    ListQuery, ModelLimitChanges, NewKey, NewProject, NewServiceAccount, ProjectPolicy,
    ProjectRecord, ProjectUse, Refusal, SecretRecord, ServiceAccountRecord, StorageBounds,
};
use crate::usage::{Meters, UsagePage, UsageQuery};
use crate::{Paged, Result, StoreError};

fn refused<T>(refusal: Refusal) -> Result<T> {
    Err(StoreError::Refused(refusal))
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

    async fn update_model_limits(
        &self,
        id: &ProjectId,
        model: &str,
        changes: ModelLimitChanges,
        by: Actor,
    ) -> Result<ModelLimits> {
        let (id, model) = (id.clone(), model.to_owned());
        self.writer
            .write(move |connection| {
                policies::update_model_limits(connection, &id, &model, &changes, &by)
            })
            .await
    }

    async fn set_spend_limit(
        &self,
        id: &ProjectId,
        cents: Option<u64>,
        by: Actor,
    ) -> Result<Option<u64>> {
        let id = id.clone();
        self.writer
            .write(move |connection| policies::set_spend_limit(connection, &id, cents, &by))
            .await
    }

    async fn set_secret(
        &self,
        tenant: &TenantId,
        plugin: &str,
        name: &str,
        sealed: Vec<u8>,
        by: Actor,
    ) -> Result<SecretRecord> {
        let (tenant, plugin, name) = (tenant.clone(), plugin.to_owned(), name.to_owned());
        self.writer
            .write(move |connection| {
                secrets::set(connection, &tenant, (&plugin, &name), &sealed, &by)
            })
            .await
    }

    async fn delete_secret(
        &self,
        tenant: &TenantId,
        plugin: &str,
        name: &str,
        by: Actor,
    ) -> Result<bool> {
        let (tenant, plugin, name) = (tenant.clone(), plugin.to_owned(), name.to_owned());
        self.writer
            .write(move |connection| secrets::delete(connection, &tenant, (&plugin, &name), &by))
            .await
    }

    async fn secrets(&self, tenant: &TenantId, plugin: Option<&str>) -> Result<Vec<SecretRecord>> {
        let (tenant, plugin) = (tenant.clone(), plugin.map(str::to_owned));
        self.readers
            .read(move |connection| secrets::list(connection, &tenant, plugin.as_deref()))
            .await
    }

    async fn meters(&self, tenant: &TenantId, now: Timestamp) -> Result<Meters> {
        let tenant = tenant.clone();
        self.readers.read(move |connection| usage::meters(connection, &tenant, now)).await
    }

    async fn usage(&self, query: UsageQuery) -> Result<UsagePage> {
        self.readers.read(move |connection| usage::usage(connection, &query)).await
    }

    async fn merge_usage(&self, before: Timestamp, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| usage::merge(connection, before, limit)).await
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

    async fn purge_audit_log(&self, before: Timestamp, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| audit::purge(connection, before, limit)).await
    }

    async fn audit_log(&self, query: AuditQuery) -> Result<Paged<AuditEntry>> {
        self.readers.read(move |connection| audit::page(connection, &query)).await
    }
}
