//! JSON objects of credentials.

use batchwright_store::accounts::SecretRecord;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /credentials`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct SetCredential {
    /// Name of the plugin.
    #[schema(min_length = 1, max_length = 64)]
    plugin: String,
    /// Name of the credential, as the component declares it.
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    /// Secret.
    #[schema(min_length = 1, max_length = 4096, pattern = "^[!-~]+$")]
    value: String,
}

/// Credential that a project has set. Its secret is never shown.
#[derive(Serialize, ToSchema)]
pub(crate) struct Credential {
    #[schema(pattern = "^credential$")]
    object: &'static str,
    /// Name of the plugin.
    plugin: String,
    /// Name of the credential.
    name: String,
    /// Time of the first secret, in Unix seconds.
    created_at: i64,
    /// Time of this secret, in Unix seconds.
    updated_at: i64,
}

impl From<SecretRecord> for Credential {
    fn from(record: SecretRecord) -> Self {
        Self {
            object: "credential",
            plugin: record.plugin,
            name: record.name,
            created_at: record.created_at.as_seconds(),
            updated_at: record.updated_at.as_seconds(),
        }
    }
}

/// Confirmation that a credential is deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeletedCredential {
    #[schema(pattern = "^credential.deleted$")]
    object: &'static str,
    plugin: String,
    name: String,
    /// Always true.
    deleted: bool,
}

impl DeletedCredential {
    pub(crate) fn new(plugin: String, name: String) -> Self {
        Self { object: "credential.deleted", plugin, name, deleted: true }
    }
}
