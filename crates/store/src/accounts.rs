//! Projects, service accounts, keys and the audit log.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{KeyId, ProjectId, ServiceAccountId, TenantId};
use batchwright_domain::limits::{
    Allowed, Limit, Limits, ModelLimit, ModelLimits, ModelRule, Permissions,
};

use crate::usage::{Meters, UsagePage, UsageQuery};
use crate::{Paged, Result};

/// Project: a tenant as its administrators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProjectRecord {
    /// Id in the API.
    pub id: ProjectId,
    /// Slug, which is the tenant of its files and batches and never changes.
    pub slug: TenantId,
    /// Name, unique among the projects that are not archived.
    pub name: String,
    /// Time of creation.
    pub created_at: Timestamp,
    /// Time since when nothing can be created in the project.
    pub archived_at: Option<Timestamp>,
}

/// Project to create.
#[derive(Clone, Debug)]
pub struct NewProject {
    /// Id in the API.
    pub id: ProjectId,
    /// Wanted slug. If it was ever used, the store appends a number.
    pub slug: TenantId,
    /// Name.
    pub name: String,
}

/// Changes of limits; none removes the own value of the project.
#[derive(Clone, Debug, Default)]
pub struct LimitChanges {
    /// Numbers by limit.
    pub limits: BTreeMap<Limit, Option<u64>>,
    /// Names that are allowed, by their kind.
    pub allowed: BTreeMap<Allowed, Option<BTreeSet<String>>>,
}

impl<const N: usize> From<[(Limit, Option<u64>); N]> for LimitChanges {
    fn from(limits: [(Limit, Option<u64>); N]) -> Self {
        Self { limits: limits.into(), allowed: BTreeMap::new() }
    }
}

/// Changes of the limits for a model; none removes the limit.
pub type ModelLimitChanges = BTreeMap<ModelLimit, Option<u64>>;

/// Policy of a project: limits and models.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProjectPolicy {
    /// Own limits of the project.
    pub limits: Limits,
    /// What the project may use.
    pub permissions: Permissions,
    /// Limits for models, by the name that the provider knows.
    pub model_limits: BTreeMap<String, ModelLimits>,
    /// Budget of a month in cents.
    pub spend_limit: Option<u64>,
}

/// Maximum number of secrets that a project may set.
pub const MAX_SECRETS: usize = 1000;

/// Secret that a project has set for a credential of a plugin, sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRecord {
    /// Name of the plugin.
    pub plugin: String,
    /// Name of the credential.
    pub name: String,
    /// Sealed secret.
    pub sealed: Vec<u8>,
    /// Time of the first secret.
    pub created_at: Timestamp,
    /// Time of this secret.
    pub updated_at: Timestamp,
}

/// Usage of a project, by limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectUse {
    /// Total size of the files whose content is stored, in bytes.
    pub stored_bytes: u64,
    /// Number of files whose content is stored.
    pub stored_files: u64,
    /// Number of batches that have not ended.
    pub open_batches: u64,
}

/// Bounds of the stored files of a project; none is no bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct StorageBounds {
    /// Total size in bytes.
    pub bytes: Option<u64>,
    /// Number of files.
    pub files: Option<u64>,
}

/// Service account: named user of a project, which owns keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountRecord {
    /// Id in the API.
    pub id: ServiceAccountId,
    /// Name.
    pub name: String,
    /// True if the account was created as a member of its project.
    pub is_member: bool,
    /// Time of creation.
    pub created_at: Timestamp,
}

/// Service account to create.
#[derive(Clone, Debug)]
pub struct NewServiceAccount {
    /// Id in the API.
    pub id: ServiceAccountId,
    /// Name.
    pub name: String,
    /// True for a member of the project.
    pub is_member: bool,
}

/// Owner of a project's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyOwner {
    /// Project.
    pub project: ProjectRecord,
    /// Service account.
    pub account: ServiceAccountRecord,
}

/// Key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// Id.
    pub id: KeyId,
    /// Name.
    pub name: String,
    /// SHA-256 of the text of the key.
    pub digest: [u8; 32],
    /// Text that shows which key it is.
    pub redacted: String,
    /// Names of its scopes; none for an admin key that may do everything.
    pub scopes: Vec<String>,
    /// Time of creation.
    pub created_at: Timestamp,
    /// Time from which the key is refused.
    pub expires_at: Option<Timestamp>,
    /// Approximate time of its last use.
    pub last_used_at: Option<Timestamp>,
    /// Owner; none for an admin key.
    pub owner: Option<KeyOwner>,
}

/// Key to create.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Id.
    pub id: KeyId,
    /// Name.
    pub name: String,
    /// SHA-256 of the text of the key.
    pub digest: [u8; 32],
    /// Text that shows which key it is.
    pub redacted: String,
    /// Names of its scopes.
    pub scopes: Vec<String>,
    /// Time from which the key is refused.
    pub expires_at: Option<Timestamp>,
}

/// Changes of a key; none leaves a value as it is.
#[derive(Clone, Debug, Default)]
pub struct KeyChanges {
    /// Time from which the key is refused.
    pub expires_at: Option<Timestamp>,
    /// Names of its scopes.
    pub scopes: Option<Vec<String>>,
}

/// Holder of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyHolder {
    /// Keys of a project.
    Project(ProjectId),
    /// Admin keys.
    Organization,
}

/// Part of a list.
#[derive(Clone, Debug)]
pub struct ListQuery {
    /// Id of the entry before the page; also of an entry that was deleted since.
    pub after: Option<String>,
    /// Maximum number of entries.
    pub limit: usize,
    /// Order by creation.
    pub order: crate::Order,
}

/// Actor of a change, for the audit log.
#[derive(Clone, Debug)]
pub struct Actor {
    /// Admin key; none for an operator at the data folder.
    pub key: Option<KeyId>,
    /// Address of the client.
    pub address: Option<String>,
    /// Time of the change.
    pub at: Timestamp,
}

/// Entry of the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// Id.
    pub id: String,
    /// Time of the change.
    pub at: Timestamp,
    /// Kind of the change, such as `project.created`.
    pub event: String,
    /// Admin key; none for an operator at the data folder.
    pub key: Option<KeyId>,
    /// Address of the client.
    pub address: Option<String>,
    /// Project that was changed, and its name now.
    pub project: Option<(ProjectId, String)>,
    /// Id of what was changed.
    pub resource: String,
    /// New values as a JSON object.
    pub details: String,
}

/// Part of the audit log, newest first. An empty list selects everything.
#[derive(Clone, Debug, Default)]
pub struct AuditQuery {
    /// Id of the entry before the page.
    pub after: Option<String>,
    /// Maximum number of entries.
    pub limit: usize,
    /// Kinds of changes.
    pub events: Vec<String>,
    /// Projects.
    pub projects: Vec<String>,
    /// Admin keys.
    pub actors: Vec<String>,
    /// What was changed.
    pub resources: Vec<String>,
    /// First time of a change.
    pub from: Option<Timestamp>,
    /// Time after the last change.
    pub before: Option<Timestamp>,
}

/// Reason why a change is refused; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Unknown project.
    #[error("no such project")]
    UnknownProject,
    /// Unknown service account of a project.
    #[error("no such service account")]
    UnknownAccount,
    /// Key whose lifetime has ended.
    #[error("the key has expired")]
    ExpiredKey,
    /// Unknown key.
    #[error("no such key")]
    UnknownKey,
    /// Archived project.
    #[error("the project is archived")]
    Archived,
    /// Name that another project has.
    #[error("another project has this name")]
    NameTaken,
    /// Total size of the stored files, with its limit in bytes.
    #[error("the files of the project would exceed {0} bytes")]
    StoredBytes(u64),
    /// Number of stored files, with its limit.
    #[error("the project has reached its limit of {0} files")]
    StoredFiles(u64),
    /// Number of batches that have not ended, with its limit.
    #[error("the project has reached its limit of {0} open batches")]
    OpenBatches(u64),
    /// Number of models with limits, with its maximum.
    #[error("the project has limits for {0} models already")]
    ModelLimits(usize),
    /// Number of secrets of a project, with its maximum.
    #[error("the project has {0} secrets already")]
    Secrets(usize),
    /// Number of webhook endpoints of a project, with its maximum.
    #[error("the project has {0} webhook endpoints already")]
    Webhooks(u64),
    /// Webhook endpoint that is disabled.
    #[error("the webhook endpoint is disabled")]
    DisabledWebhook,
    /// Admin key without which nobody could administer the server.
    #[error("this is the last admin key")]
    LastAdminKey,
}

/// Database of projects, service accounts, keys and the audit log.
///
/// Each method is one transaction. A change of a project, an account, a key, limits or models
/// writes its entry of the audit log in the same transaction. A change that is refused fails with
/// [`StoreError::Refused`](crate::StoreError::Refused).
#[async_trait]
pub trait Accounts: Send + Sync {
    /// Returns true if the server ever had a key, also one that was deleted since.
    async fn had_key(&self) -> Result<bool>;
    /// Returns a key with its owner; none if it was deleted.
    async fn key(&self, id: &KeyId) -> Result<Option<KeyRecord>>;
    /// Records the last use of keys.
    async fn record_key_uses(&self, uses: Vec<(KeyId, Timestamp)>) -> Result<()>;

    /// Creates a project.
    async fn create_project(&self, new: NewProject, by: Actor) -> Result<ProjectRecord>;
    /// Returns a project.
    async fn project(&self, id: &ProjectId) -> Result<Option<ProjectRecord>>;
    /// Lists the projects.
    async fn projects(&self, query: ListQuery, archived: bool) -> Result<Paged<ProjectRecord>>;
    /// Changes the name of a project.
    async fn rename_project(
        &self,
        id: &ProjectId,
        name: String,
        by: Actor,
    ) -> Result<ProjectRecord>;
    /// Archives a project and cancels its batches.
    async fn archive_project(&self, id: &ProjectId, by: Actor) -> Result<ProjectRecord>;

    /// Returns the policy of a tenant; the default for an unknown tenant.
    async fn policy(&self, tenant: &TenantId) -> Result<ProjectPolicy>;
    /// Returns the bytes that a tenant can still store, or none without a bound. Fails if the
    /// tenant has reached a bound.
    async fn storage_room(&self, tenant: &TenantId, bounds: StorageBounds) -> Result<Option<u64>>;
    /// Returns the policy of a project and what the project uses.
    async fn policy_of(&self, id: &ProjectId) -> Result<Option<(ProjectPolicy, ProjectUse)>>;
    /// Changes limits of a project. A limit below what is used deletes nothing.
    async fn update_limits(&self, id: &ProjectId, changes: LimitChanges, by: Actor) -> Result<()>;
    /// Replaces the models that a project may use.
    async fn set_models(&self, id: &ProjectId, models: ModelRule, by: Actor) -> Result<()>;

    /// Changes the limits for a model, and returns them.
    async fn update_model_limits(
        &self,
        id: &ProjectId,
        model: &str,
        changes: ModelLimitChanges,
        by: Actor,
    ) -> Result<ModelLimits>;
    /// Sets a secret of a tenant, which replaces an earlier one; returns its record.
    async fn set_secret(
        &self,
        tenant: &TenantId,
        plugin: &str,
        name: &str,
        sealed: Vec<u8>,
        by: Actor,
    ) -> Result<SecretRecord>;
    /// Deletes a secret of a tenant; returns false if there is none.
    async fn delete_secret(
        &self,
        tenant: &TenantId,
        plugin: &str,
        name: &str,
        by: Actor,
    ) -> Result<bool>;
    /// Returns the secrets of a tenant, of one plugin if its name is given.
    async fn secrets(&self, tenant: &TenantId, plugin: Option<&str>) -> Result<Vec<SecretRecord>>;
    /// Replaces or removes the budget of a project; returns the budget before.
    async fn set_spend_limit(
        &self,
        id: &ProjectId,
        cents: Option<u64>,
        by: Actor,
    ) -> Result<Option<u64>>;
    /// Returns what a tenant has used of its budget and of its limits per day.
    async fn meters(&self, tenant: &TenantId, now: Timestamp) -> Result<Meters>;
    /// Returns usage by bucket and group.
    async fn usage(&self, query: UsageQuery) -> Result<UsagePage>;
    /// Merges up to `limit` rows of usage before a time into hours; returns true if more may
    /// remain.
    async fn merge_usage(&self, before: Timestamp, limit: usize) -> Result<bool>;

    /// Creates a service account, with a key if one is given.
    async fn create_account(
        &self,
        project: &ProjectId,
        new: NewServiceAccount,
        key: Option<NewKey>,
        by: Actor,
    ) -> Result<ServiceAccountRecord>;
    /// Returns a service account.
    async fn account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
    ) -> Result<Option<ServiceAccountRecord>>;
    /// Lists the service accounts of a project.
    async fn accounts(
        &self,
        project: &ProjectId,
        query: ListQuery,
    ) -> Result<Paged<ServiceAccountRecord>>;
    /// Changes the name of a service account.
    async fn rename_account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
        name: String,
        by: Actor,
    ) -> Result<ServiceAccountRecord>;
    /// Deletes a service account and its keys.
    async fn delete_account(
        &self,
        project: &ProjectId,
        id: &ServiceAccountId,
        by: Actor,
    ) -> Result<()>;

    /// Creates a key of a service account.
    async fn create_project_key(
        &self,
        project: &ProjectId,
        account: &ServiceAccountId,
        new: NewKey,
        by: Actor,
    ) -> Result<KeyRecord>;
    /// Creates an admin key.
    async fn create_admin_key(&self, new: NewKey, by: Actor) -> Result<KeyRecord>;
    /// Returns a key of a holder.
    async fn key_of(&self, holder: &KeyHolder, id: &KeyId) -> Result<Option<KeyRecord>>;
    /// Lists the keys of a holder.
    async fn keys(&self, holder: &KeyHolder, query: ListQuery) -> Result<Paged<KeyRecord>>;
    /// Changes a key of a holder.
    async fn update_key(
        &self,
        holder: &KeyHolder,
        id: &KeyId,
        changes: KeyChanges,
        by: Actor,
    ) -> Result<KeyRecord>;
    /// Deletes a key of a holder, which is refused from then on.
    async fn delete_key(&self, holder: &KeyHolder, id: &KeyId, by: Actor) -> Result<()>;

    /// Lists entries of the audit log, newest first.
    async fn audit_log(&self, query: AuditQuery) -> Result<Paged<AuditEntry>>;
    /// Removes up to `limit` entries of the audit log from before a time; returns true if more may
    /// remain.
    async fn purge_audit_log(&self, before: Timestamp, limit: usize) -> Result<bool>;
}
