//! Defaults of the server for the limits of projects.

use batchwright_domain::limits::{Limit, Limits};
use batchwright_domain::settings;
use batchwright_domain::settings::Value;
use batchwright_domain::units::{Count, Size};

settings! {
    /// Limits of every project that has no value of its own.
    pub struct TenantDefaults in "tenant_defaults" {
        /// Maximum total size of the stored files of a project; uploads beyond it are refused
        max_stored_bytes: Option<Size> = "" (shown "no limit"), "SIZE";
        /// Maximum number of stored files of a project; uploads beyond it are refused
        max_stored_files: Option<Count> = "" (shown "no limit"), "N";
        /// Maximum number of batches of a project that have not ended
        max_open_batches: Option<Count> = "" (shown "no limit"), "N";
        /// Maximum number of requests in a batch of a project, at most `max_requests_per_file`
        max_requests_per_batch: Option<Count> = "" (shown "max_requests_per_file"), "N";
        /// Maximum number of requests of a project in flight, over all plugins
        max_requests_in_flight: Option<Count> = "" (shown "no limit"), "N";
        /// What happens to a valid batch that would exceed `batch_1_day_max_input_tokens` of its
        /// project: `fail` ends it with the error `token_limit_exceeded`, `wait` lets it wait until
        /// other batches of the project have ended
        when_over_limit: WhenOverLimit = "fail", "ACTION";
    }
}

impl Default for TenantDefaults {
    /// Returns defaults without any limit.
    fn default() -> Self {
        Self {
            max_stored_bytes: None,
            max_stored_files: None,
            max_open_batches: None,
            max_requests_per_batch: None,
            max_requests_in_flight: None,
            when_over_limit: WhenOverLimit::Fail,
        }
    }
}

impl TenantDefaults {
    /// Returns the limits that hold for a project: its own values, else the defaults.
    pub fn fill(&self, own: Limits) -> Limits {
        let count = |count: Option<Count>| count.map(|count| count.get() as u64);
        let default = |limit| match limit {
            Limit::StoredBytes => self.max_stored_bytes.map(Size::bytes),
            Limit::StoredFiles => count(self.max_stored_files),
            Limit::OpenBatches => count(self.max_open_batches),
            Limit::RequestsPerBatch => count(self.max_requests_per_batch),
            Limit::RequestsInFlight => count(self.max_requests_in_flight),
            Limit::Weight
            | Limit::InputFileLifetime
            | Limit::OutputFileLifetime
            | Limit::ErrorFileLifetime
            | Limit::BatchLifetime => None,
        };
        let fill = |limits: Limits, limit| limits.with(limit, own.get(limit).or(default(limit)));
        Limit::ALL.into_iter().fold(own, fill)
    }
}

/// What happens to a batch that would exceed the enqueued tokens of its project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenOverLimit {
    /// The batch fails.
    Fail,
    /// The batch waits for its turn.
    Wait,
}

impl Value for WhenOverLimit {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "fail" => Ok(Self::Fail),
            "wait" => Ok(Self::Wait),
            text => Err(format!("`{text}` is not an action; write `fail` or `wait`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_limit_wins_over_the_default() {
        let defaults = TenantDefaults {
            max_open_batches: Some(Count::new(5)),
            max_stored_bytes: Some("1KiB".parse().unwrap()),
            ..TenantDefaults::default()
        };
        let own = defaults.fill(Limits::default().with(Limit::OpenBatches, Some(9)));
        for (limit, expected) in [
            (Limit::OpenBatches, Some(9)),
            (Limit::StoredBytes, Some(1024)),
            (Limit::StoredFiles, None),
            (Limit::Weight, None),
        ] {
            assert_eq!(own.get(limit), expected, "{limit:?}");
        }
    }
}
