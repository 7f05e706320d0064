//! Batch creation: checks the parameters at once. Validation checks the input file later.

use std::time::Duration;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{FileId, KeyId, TenantId};
use batchwright_domain::limits::{Allowed, Limit};
use batchwright_domain::status::Status;
use batchwright_domain::text::truncate_for_message;
use batchwright_domain::usage::TokenUsage;
use batchwright_store::{
    BatchRecord, Counts, Created, Idempotency, Metadata, NewBatch, StatusTimes, StoreError,
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::service::Service;

/// Parameters of a new batch.
#[derive(Debug)]
pub struct NewBatchRequest {
    /// Id of the uploaded input file.
    pub input_file_id: FileId,
    /// Path of the API endpoint, with or without the prefix `/v1`.
    pub endpoint: String,
    /// Completion window, such as `24h`.
    pub completion_window: String,
    /// Key-value pairs of the client.
    pub metadata: Option<Metadata>,
    /// Lifetime of the output files.
    pub output_lifetime: Option<Duration>,
    /// Idempotency key. The same key with the same parameters returns the same batch.
    pub idempotency_key: Option<String>,
    /// Key of the client, for the usage by key; none without keys.
    pub api_key: Option<KeyId>,
}

impl NewBatchRequest {
    /// Returns a digest of all parameters except the idempotency key.
    fn fingerprint(&self, endpoint: Endpoint) -> [u8; 32] {
        let lifetime = self.output_lifetime.map(|lifetime| lifetime.as_millis().to_string());
        let parameters = serde_json::json!([
            self.input_file_id.as_str(),
            endpoint.as_str(),
            self.completion_window,
            self.metadata,
            lifetime
        ]);
        Sha256::digest(parameters.to_string()).into()
    }
}

/// Error of a batch creation. The texts are shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The endpoint is not supported.
    #[error(
        "Invalid value: '{0}'. Supported values are: {supported}. The parameter is 'endpoint'.",
        supported = quoted(&Endpoint::ALL.map(Endpoint::as_str))
    )]
    Endpoint(String),
    /// The settings do not allow the completion window.
    #[error(
        "Invalid value: '{given}'. Supported values are: {supported}. The parameter is \
         'completion_window'; the server's setting completion_windows allows others."
    )]
    CompletionWindow {
        /// Value that the client sent, truncated.
        given: String,
        /// Allowed values, as a list in quotes.
        supported: String,
    },
    /// The project may not use the completion window.
    #[error(
        "Invalid value: '{given}'. This project may use: {supported}. The parameter is \
         'completion_window'."
    )]
    WindowNotAllowed {
        /// Value that the client sent, truncated.
        given: String,
        /// Allowed values, as a list in quotes.
        supported: String,
    },
    /// The idempotency key was used before with other parameters.
    #[error(
        "Conflict: the idempotency key '{0}' was used before with other parameters; a new batch \
         needs a new key."
    )]
    Conflict(String),
    /// A required plugin is not loaded.
    #[error(
        "The server accepts no batches now, because a required plugin is not loaded; try again \
         later."
    )]
    NotReady,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Returns the values in quotes, separated by commas.
fn quoted(values: &[&str]) -> String {
    values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ")
}

impl Service {
    /// Creates a batch, or returns the batch that was created before with the same idempotency key.
    pub async fn create(
        &self,
        tenant: &TenantId,
        request: NewBatchRequest,
    ) -> Result<BatchRecord, CreateError> {
        let Some(endpoint) = Endpoint::parse(&request.endpoint) else {
            return Err(CreateError::Endpoint(truncate_for_message(&request.endpoint)));
        };
        let Some(window) = self.config.batch.completion_windows.length(&request.completion_window)
        else {
            let supported = self.config.batch.completion_windows.to_string();
            return Err(CreateError::CompletionWindow {
                given: truncate_for_message(&request.completion_window),
                supported,
            });
        };
        let plugins = self.registry.current();
        if let Err(error) = plugins.check_required(&self.config.required_plugins, tenant) {
            tracing::warn!(%tenant, %error, "batch creation refused");
            return Err(CreateError::NotReady);
        }
        let policy = self.policy(tenant).await?;
        let windows = policy.permissions.list(Allowed::CompletionWindows);
        if let Some(windows) = windows.filter(|names| !names.contains(&request.completion_window)) {
            let names = self.config.batch.completion_windows.names();
            let supported: Vec<_> = names.filter(|name| windows.contains(*name)).collect();
            return Err(CreateError::WindowNotAllowed {
                given: truncate_for_message(&request.completion_window),
                supported: quoted(&supported),
            });
        }
        let fingerprint = request.fingerprint(endpoint);
        let idempotency = request.idempotency_key.map(|key| Idempotency { key, fingerprint });
        let created_at = self.clock.now();
        let new = NewBatch {
            id: format!("batch_{}", Uuid::new_v4().simple()).into(),
            endpoint,
            input_file_id: request.input_file_id,
            completion_window: request.completion_window,
            metadata: request.metadata,
            created_at,
            expires_at: created_at.after(window),
            output_lifetime: request.output_lifetime,
            api_key: request.api_key,
        };
        let max_open = policy.limits.get(Limit::OpenBatches);
        let key = idempotency.as_ref().map(|idempotency| idempotency.key.clone());
        match self.store.create_batch(tenant, new.clone(), idempotency, max_open).await? {
            Created::New => self.work_available.notify_one(),
            Created::Existing(batch) => return Ok(*batch),
            Created::Conflict => return Err(CreateError::Conflict(key.unwrap_or_default())),
        }
        Ok(BatchRecord {
            new,
            status: Status::Validating,
            model: None,
            errors: Vec::new(),
            output_file_id: None,
            error_file_id: None,
            times: StatusTimes::default(),
            counts: Counts::default(),
            usage: TokenUsage::default(),
            waits_for: None,
        })
    }
}
