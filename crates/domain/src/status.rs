//! Status of a batch.

/// Status of a batch, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Validation of the input file, or wait for it.
    Validating,
    /// End with errors of the batch.
    Failed,
    /// Execution of requests.
    InProgress,
    /// Copy of the results into the output and error files.
    Finalizing,
    /// End with a result for every request.
    Completed,
    /// End because the completion window ended.
    Expired,
    /// Cancellation by a client; the worker has not ended the batch yet.
    Cancelling,
    /// End after a cancellation by a client.
    Cancelled,
}

impl Status {
    /// All statuses.
    pub const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// Returns the name in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Parses the name in the database; the error names the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| format!("unknown status `{text}`"))
    }

    /// Returns true if the batch has ended.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}
