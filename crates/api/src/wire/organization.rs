//! Objects of the administration, as in `openai.types.admin.organization` of the official SDK.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::limits::{Allowed, Limit, Limits, ModelRule, Permissions};
use batchwright_store::accounts::{
    AuditEntry, KeyOwner, KeyRecord, NewKey, ProjectRecord, ProjectUse, ServiceAccountRecord,
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::Identified;

macro_rules! identified {
    ($($name:ident)+) => {
        $(impl Identified for $name {
            fn id(&self) -> &str {
                &self.id
            }
        })+
    };
}

identified! { Project ServiceAccount ProjectKey AdminKey AuditLog }

/// Project.
#[derive(Serialize, ToSchema)]
pub(crate) struct Project {
    id: String,
    #[schema(pattern = "^organization.project$")]
    object: &'static str,
    name: String,
    /// Name of the project in files of the operator. It never changes.
    #[schema(pattern = "^[a-z0-9-]{1,63}$")]
    slug: String,
    created_at: i64,
    #[schema(required)]
    archived_at: Option<i64>,
    /// `active` or `archived`.
    #[schema(pattern = "^(active|archived)$")]
    status: &'static str,
}

impl From<ProjectRecord> for Project {
    fn from(project: ProjectRecord) -> Self {
        Self {
            id: project.id.to_string(),
            object: "organization.project",
            name: project.name,
            slug: project.slug.to_string(),
            created_at: project.created_at.as_seconds(),
            archived_at: project.archived_at.map(Timestamp::as_seconds),
            status: if project.archived_at.is_some() { "archived" } else { "active" },
        }
    }
}

/// Service account: named user of a project, which owns keys.
#[derive(Serialize, ToSchema)]
pub(crate) struct ServiceAccount {
    id: String,
    #[schema(pattern = "^organization.project.service_account$")]
    object: &'static str,
    name: String,
    /// `member`, or `none` for an account that was created without a key. What a key may do depends
    /// on its scopes alone.
    #[schema(pattern = "^(member|none)$")]
    role: &'static str,
    created_at: i64,
}

impl From<ServiceAccountRecord> for ServiceAccount {
    fn from(account: ServiceAccountRecord) -> Self {
        Self {
            id: account.id.to_string(),
            object: "organization.project.service_account",
            name: account.name,
            role: role(account.is_member),
            created_at: account.created_at.as_seconds(),
        }
    }
}

fn role(is_member: bool) -> &'static str {
    if is_member { "member" } else { "none" }
}

/// New service account, with its key.
#[derive(Serialize, ToSchema)]
pub(crate) struct NewServiceAccountObject {
    #[serde(flatten)]
    account: ServiceAccount,
    #[schema(required)]
    api_key: Option<NewKeyObject>,
}

impl NewServiceAccountObject {
    /// Returns the account with its key.
    pub(crate) fn new(account: ServiceAccountRecord, api_key: Option<NewKeyObject>) -> Self {
        Self { account: account.into(), api_key }
    }
}

/// New key of a service account, with its complete text.
#[derive(Serialize, ToSchema)]
pub(crate) struct NewKeyObject {
    id: String,
    #[schema(pattern = "^organization.project.service_account.api_key$")]
    object: &'static str,
    name: String,
    /// Complete key. No later response has it.
    value: String,
    created_at: i64,
    #[schema(required)]
    expires_at: Option<i64>,
    scopes: Vec<String>,
}

impl NewKeyObject {
    /// Returns the key with its complete text.
    pub(crate) fn new(key: NewKey, value: String, now: Timestamp) -> Self {
        Self {
            id: key.id.to_string(),
            object: "organization.project.service_account.api_key",
            name: key.name,
            value,
            created_at: now.as_seconds(),
            expires_at: key.expires_at.map(Timestamp::as_seconds),
            scopes: key.scopes,
        }
    }
}

/// Key of a project, without its secret.
#[derive(Serialize, ToSchema)]
pub(crate) struct ProjectKey {
    id: String,
    #[schema(pattern = "^organization.project.api_key$")]
    object: &'static str,
    name: String,
    redacted_value: String,
    created_at: i64,
    #[schema(required)]
    expires_at: Option<i64>,
    /// Approximate time of the last use.
    #[schema(required)]
    last_used_at: Option<i64>,
    #[schema(required)]
    owner: Option<Owner>,
    /// `inactive` if the project is archived.
    #[schema(pattern = "^(active|inactive)$")]
    owner_project_access: &'static str,
    scopes: Vec<String>,
}

/// Owner of a key.
#[derive(Serialize, ToSchema)]
struct Owner {
    #[serde(rename = "type")]
    #[schema(pattern = "^service_account$")]
    kind: &'static str,
    service_account: OwnerAccount,
}

#[derive(Serialize, ToSchema)]
struct OwnerAccount {
    id: String,
    name: String,
    role: &'static str,
    created_at: i64,
}

impl From<KeyOwner> for Owner {
    fn from(owner: KeyOwner) -> Self {
        let service_account = OwnerAccount {
            id: owner.account.id.to_string(),
            name: owner.account.name,
            role: role(owner.account.is_member),
            created_at: owner.account.created_at.as_seconds(),
        };
        Self { kind: "service_account", service_account }
    }
}

impl From<KeyRecord> for ProjectKey {
    fn from(key: KeyRecord) -> Self {
        let is_archived =
            key.owner.as_ref().is_some_and(|owner| owner.project.archived_at.is_some());
        Self {
            id: key.id.to_string(),
            object: "organization.project.api_key",
            name: key.name,
            redacted_value: key.redacted,
            created_at: key.created_at.as_seconds(),
            expires_at: key.expires_at.map(Timestamp::as_seconds),
            last_used_at: key.last_used_at.map(Timestamp::as_seconds),
            owner: key.owner.map(Owner::from),
            owner_project_access: if is_archived { "inactive" } else { "active" },
            scopes: key.scopes,
        }
    }
}

/// Admin key, without its secret.
#[derive(Serialize, ToSchema)]
pub(crate) struct AdminKey {
    id: String,
    #[schema(pattern = "^organization.admin_api_key$")]
    object: &'static str,
    name: String,
    redacted_value: String,
    created_at: i64,
    #[schema(required)]
    expires_at: Option<i64>,
    /// Approximate time of the last use.
    #[schema(required)]
    last_used_at: Option<i64>,
    owner: AdminOwner,
    /// Scopes of a key that may not do everything.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    scopes: Vec<String>,
}

/// Owner of an admin key: the key itself, because the server has no users.
#[derive(Serialize, ToSchema)]
struct AdminOwner {
    #[serde(rename = "type")]
    #[schema(pattern = "^user$")]
    kind: &'static str,
    #[schema(pattern = "^organization.user$")]
    object: &'static str,
    id: String,
    name: String,
    created_at: i64,
    #[schema(pattern = "^owner$")]
    role: &'static str,
}

impl From<KeyRecord> for AdminKey {
    fn from(key: KeyRecord) -> Self {
        let owner = AdminOwner {
            kind: "user",
            object: "organization.user",
            id: key.id.to_string(),
            name: key.name.clone(),
            created_at: key.created_at.as_seconds(),
            role: "owner",
        };
        Self {
            id: key.id.to_string(),
            object: "organization.admin_api_key",
            name: key.name,
            redacted_value: key.redacted,
            created_at: key.created_at.as_seconds(),
            expires_at: key.expires_at.map(Timestamp::as_seconds),
            last_used_at: key.last_used_at.map(Timestamp::as_seconds),
            owner,
            scopes: key.scopes,
        }
    }
}

/// New admin key, with its complete text.
#[derive(Serialize, ToSchema)]
pub(crate) struct NewAdminKeyObject {
    #[serde(flatten)]
    key: AdminKey,
    /// Complete key. No later response has it.
    value: String,
}

impl NewAdminKeyObject {
    /// Returns the key with its complete text.
    pub(crate) fn new(key: KeyRecord, value: String) -> Self {
        Self { key: key.into(), value }
    }
}

/// Confirmation that a resource of the administration is deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeletedResource {
    pub id: String,
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

/// Entry of the audit log. A further key, the value of `type`, has an object with the new values.
#[derive(Serialize, ToSchema)]
pub(crate) struct AuditLog {
    id: String,
    /// Kind of the change, such as `project.created`.
    #[serde(rename = "type")]
    kind: String,
    effective_at: i64,
    actor: AuditActor,
    #[schema(required)]
    project: Option<AuditProject>,
    #[serde(flatten)]
    #[schema(ignore)]
    change: Map<String, Value>,
}

/// Who made a change: an admin key, or an operator with access to the data folder.
#[derive(Serialize, ToSchema)]
struct AuditActor {
    /// `api_key` or `operator`.
    #[serde(rename = "type")]
    #[schema(pattern = "^(api_key|operator)$")]
    kind: &'static str,
    #[schema(required)]
    api_key: Option<AuditKey>,
    /// Address of the client.
    #[schema(required)]
    ip_address: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct AuditKey {
    id: String,
    #[serde(rename = "type")]
    #[schema(pattern = "^user$")]
    kind: &'static str,
}

#[derive(Serialize, ToSchema)]
struct AuditProject {
    id: String,
    name: String,
}

impl From<AuditEntry> for AuditLog {
    fn from(entry: AuditEntry) -> Self {
        let is_update = entry.event.ends_with(".updated");
        let values = if is_update { "changes_requested" } else { "data" };
        let details: Value = serde_json::from_str(&entry.details).unwrap_or_default();
        let change = json!({"id": entry.resource, values: details});
        Self {
            change: Map::from_iter([(entry.event.clone(), change)]),
            id: entry.id,
            kind: entry.event,
            effective_at: entry.at.as_seconds(),
            actor: AuditActor {
                kind: if entry.key.is_some() { "api_key" } else { "operator" },
                api_key: entry.key.map(|id| AuditKey { id: id.to_string(), kind: "user" }),
                ip_address: entry.address,
            },
            project: entry.project.map(|(id, name)| AuditProject { id: id.to_string(), name }),
        }
    }
}

/// Limits of a project; null is no limit.
#[derive(Serialize, ToSchema)]
pub(crate) struct ProjectLimitsObject {
    #[schema(pattern = "^project.limits$")]
    object: &'static str,
    /// Total size of the stored files, in bytes.
    #[schema(required)]
    max_stored_bytes: Option<u64>,
    /// Number of stored files.
    #[schema(required)]
    max_stored_files: Option<u64>,
    /// Number of batches that have not ended.
    #[schema(required)]
    max_open_batches: Option<u64>,
    /// Number of requests in a batch; null is the server's `max_requests_per_file`.
    #[schema(required)]
    max_requests_per_batch: Option<u64>,
    /// Number of requests in flight, over all plugins.
    #[schema(required)]
    max_requests_in_flight: Option<u64>,
    /// Weight in the shares of providers; null is 1.
    #[schema(required)]
    weight: Option<u64>,
    /// Lifetime of an input file whose upload sets none, in seconds.
    #[schema(required)]
    input_file_lifetime_seconds: Option<u64>,
    /// Lifetime of an output file whose batch sets none, in seconds; 0 is forever.
    #[schema(required)]
    output_file_lifetime_seconds: Option<u64>,
    /// Lifetime of an error file whose batch sets none, in seconds; 0 is forever.
    #[schema(required)]
    error_file_lifetime_seconds: Option<u64>,
    /// Time that a batch is kept after its end, in seconds; a batch with a result file is kept
    /// until the file is deleted.
    #[schema(required)]
    batch_lifetime_seconds: Option<u64>,
    /// Adapters whose models the project may use; null is all.
    #[schema(required)]
    allowed_plugins: Option<Vec<String>>,
    /// Validators that judge the requests of the project; null is all that serve it.
    #[schema(required)]
    allowed_validators: Option<Vec<String>>,
    /// Completion windows of the project's batches, among those of the server; null is all.
    #[schema(required)]
    allowed_completion_windows: Option<Vec<String>>,
    /// Names of the limits that the project has a value of its own for.
    own: Vec<&'static str>,
    usage: LimitsUsage,
}

/// What a project uses of its limits.
#[derive(Serialize, ToSchema)]
struct LimitsUsage {
    stored_bytes: u64,
    stored_files: u64,
    open_batches: u64,
}

impl ProjectLimitsObject {
    /// Returns the limits that hold, given the own ones of the project, and what it uses.
    pub(crate) fn new(
        limits: Limits,
        (own, permissions): (Limits, &Permissions),
        used: ProjectUse,
    ) -> Self {
        let own = Limit::ALL.into_iter().filter(|limit| own.get(*limit).is_some());
        let lists = Allowed::ALL.into_iter().filter(|kind| permissions.list(*kind).is_some());
        let list =
            |kind| permissions.list(kind).map(|names| names.iter().cloned().collect::<Vec<_>>());
        Self {
            object: "project.limits",
            max_stored_bytes: limits.get(Limit::StoredBytes),
            max_stored_files: limits.get(Limit::StoredFiles),
            max_open_batches: limits.get(Limit::OpenBatches),
            max_requests_per_batch: limits.get(Limit::RequestsPerBatch),
            max_requests_in_flight: limits.get(Limit::RequestsInFlight),
            weight: limits.get(Limit::Weight),
            input_file_lifetime_seconds: limits.get(Limit::InputFileLifetime),
            output_file_lifetime_seconds: limits.get(Limit::OutputFileLifetime),
            error_file_lifetime_seconds: limits.get(Limit::ErrorFileLifetime),
            batch_lifetime_seconds: limits.get(Limit::BatchLifetime),
            allowed_plugins: list(Allowed::Plugins),
            allowed_validators: list(Allowed::Validators),
            allowed_completion_windows: list(Allowed::CompletionWindows),
            own: own.map(Limit::name).chain(lists.map(Allowed::name)).collect(),
            usage: LimitsUsage {
                stored_bytes: used.stored_bytes,
                stored_files: used.stored_files,
                open_batches: used.open_batches,
            },
        }
    }
}

/// Models that a project may use.
#[derive(Serialize, ToSchema)]
pub(crate) struct ModelPermissionsObject {
    #[schema(pattern = "^project.model_permissions$")]
    object: &'static str,
    /// `allow_list` or `deny_list`. A project without a rule denies nothing.
    #[schema(pattern = "^(allow_list|deny_list)$")]
    mode: &'static str,
    model_ids: Vec<String>,
}

impl ModelPermissionsObject {
    /// Returns the rule of a project.
    pub(crate) fn new(rule: &ModelRule) -> Self {
        let (mode, models) = rule.parts();
        let model_ids = models.iter().cloned().collect();
        Self { object: "project.model_permissions", mode, model_ids }
    }
}

/// Confirmation that a project may use every model.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeletedModelPermissions {
    #[schema(pattern = "^project.model_permissions.deleted$")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

impl DeletedModelPermissions {
    /// Returns the confirmation.
    pub(crate) fn new() -> Self {
        Self { object: "project.model_permissions.deleted", deleted: true }
    }
}
