//! Creating a batch: what can be refused at once is refused here, the rest is found by validation.

use std::time::Duration;

use uuid::Uuid;

use super::{Batches, ENDPOINTS};
use crate::store::{BatchRecord, Counts, Metadata, NewBatch, Status, StoreError, Times, TokenUsage};

/// A batch as a client asks for it.
#[derive(Debug)]
pub struct Request {
    pub input_file_id: String,
    pub endpoint: String,
    pub completion_window: String,
    pub metadata: Option<Metadata>,
    /// How long the output files are kept.
    pub output_lifetime: Option<Duration>,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("Invalid value: '{0}'. Supported values are: {supported}.", supported = quoted(&ENDPOINTS))]
    Endpoint(String),
    #[error("Invalid value: '{given}'. Supported values are: {supported}.")]
    CompletionWindow { given: String, supported: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn quoted(values: &[&str]) -> String {
    values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ")
}

impl Batches {
    pub async fn create(&self, tenant: &str, request: Request) -> Result<BatchRecord, CreateError> {
        if !ENDPOINTS.contains(&request.endpoint.as_str()) {
            return Err(CreateError::Endpoint(request.endpoint));
        }
        let Some(window) = self.settings.completion_window(&request.completion_window) else {
            let supported = self.settings.completion_windows.to_string();
            return Err(CreateError::CompletionWindow { given: request.completion_window, supported });
        };
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
        self.store.create_batch(tenant, new.clone()).await?;
        self.work.notify_one();
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
        })
    }
}
