//! Errors of the store.

/// Error of the database or the object store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Unusable data folder.
    #[error("the data folder {folder}: {message}")]
    Folder {
        /// Path of the folder.
        folder: String,
        /// Cause and remedy.
        message: String,
    },
    /// Full disk; message of the database or the object store.
    #[error("the disk is full; free some space and try again ({0})")]
    Full(String),
    /// Failure of the database; its message.
    #[error("the database failed: {0}")]
    Database(String),
    /// Failure of the object store; its message.
    #[error("the object store failed: {0}")]
    Objects(String),
    /// Missing object, or object that is shorter than its record says; its description.
    #[error("data is missing from the object store: {0}")]
    Missing(String),
    /// Obsolete claim: the batch was claimed again.
    #[error("another worker has claimed this batch")]
    Fenced,
    /// Cancellation by a client before the batch could end as expired.
    #[error("the batch was cancelled meanwhile")]
    CancelledFirst,
    /// Object without a registration: its writer took too long and the object was removed, or the
    /// object is being removed now.
    #[error("the object is being removed, because its writer took too long; write it again")]
    Unregistered,
    /// Request without a result in a batch that is about to end; nothing was written.
    #[error("not every line has a result")]
    Incomplete,
    /// Change that is refused; nothing was written.
    #[error("{0}")]
    Refused(crate::accounts::Refusal),
    /// Closed store.
    #[error("the server is shutting down")]
    Closed,
    /// Unavailable dependency other than the store; the cause.
    #[error("the server is not ready: {0}")]
    NotReady(String),
}

/// Result of an operation of the store.
pub type Result<T> = std::result::Result<T, StoreError>;
