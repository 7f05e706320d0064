//! Creating a batch: what can be refused at once is refused here, the rest is found by validation.

use std::time::Duration;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{Batches, ENDPOINTS};
use crate::store::{
    BatchRecord, Counts, Created, Idempotency, Metadata, NewBatch, Status, StoreError, Times,
    TokenUsage,
};

/// A batch as a client asks for it.
#[derive(Debug)]
pub struct Request {
    pub input_file_id: String,
    pub endpoint: String,
    pub completion_window: String,
    pub metadata: Option<Metadata>,
    /// How long the output files are kept.
    pub output_lifetime: Option<Duration>,
    /// The same key with the same parameters is the same batch.
    pub idempotency_key: Option<String>,
}

impl Request {
    /// A digest of everything but the key.
    fn fingerprint(&self) -> [u8; 32] {
        let lifetime = self.output_lifetime.map(|lifetime| lifetime.as_millis().to_string());
        let parameters = serde_json::json!([
            self.input_file_id,
            self.endpoint,
            self.completion_window,
            self.metadata,
            lifetime
        ]);
        Sha256::digest(parameters.to_string()).into()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("Invalid value: '{0}'. Supported values are: {supported}. The parameter is 'endpoint'.", supported = quoted(&ENDPOINTS))]
    Endpoint(String),
    #[error(
        "Invalid value: '{given}'. Supported values are: {supported}. The parameter is 'completion_window'; the server's setting completion_windows allows others."
    )]
    CompletionWindow { given: String, supported: String },
    #[error(
        "Conflict: the idempotency key '{0}' was used before with other parameters; a new batch needs a new key."
    )]
    Conflict(String),
    #[error(
        "The server takes no batches now, as its rules are not complete; try again in a while."
    )]
    NotReady,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// As much of what a client sent as a message can hold.
pub fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

fn quoted(values: &[&str]) -> String {
    values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ")
}

impl Batches {
    pub async fn create(
        &self,
        tenant: &str,
        mut request: Request,
    ) -> Result<BatchRecord, CreateError> {
        // Tools for Azure write it without.
        let long = format!("/v1{}", request.endpoint);
        if ENDPOINTS.contains(&long.as_str()) {
            request.endpoint = long;
        }
        if !ENDPOINTS.contains(&request.endpoint.as_str()) {
            return Err(CreateError::Endpoint(shortened(&request.endpoint)));
        }
        let Some(window) = self.settings.completion_window(&request.completion_window) else {
            let supported = self.settings.completion_windows.to_string();
            return Err(CreateError::CompletionWindow {
                given: shortened(&request.completion_window),
                supported,
            });
        };
        if let Err(why) = self.registry.current().check_required(
            &self.settings.required_plugins,
            tenant,
            &ENDPOINTS,
        ) {
            tracing::warn!(tenant, "no batch is created: {why}");
            return Err(CreateError::NotReady);
        }
        let fingerprint = request.fingerprint();
        let idempotency = request.idempotency_key.map(|key| Idempotency { key, fingerprint });
        let created_at = self.clock.now();
        let new = NewBatch {
            id: format!("batch_{}", Uuid::new_v4().simple()),
            endpoint: request.endpoint,
            input_file_id: request.input_file_id,
            completion_window: request.completion_window,
            metadata: request.metadata,
            created_at,
            expires_at: created_at.after(window),
            output_lifetime: request.output_lifetime,
        };
        let key = idempotency.as_ref().map(|idempotency| idempotency.key.clone());
        match self.store.create_batch(tenant, new.clone(), idempotency).await? {
            Created::New => self.work.notify_one(),
            Created::Before(batch) => return Ok(*batch),
            Created::Conflict => return Err(CreateError::Conflict(key.unwrap_or_default())),
        }
        Ok(BatchRecord {
            new,
            status: Status::Validating,
            model: None,
            errors: Vec::new(),
            output_file_id: None,
            error_file_id: None,
            times: Times::default(),
            counts: Counts::default(),
            usage: TokenUsage::default(),
            waits_for: None,
        })
    }
}
