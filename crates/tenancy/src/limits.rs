//! Defaults of the server for the limits of projects.

use batchwright_domain::limits::Limits;
use batchwright_domain::settings;
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
        }
    }
}

impl TenantDefaults {
    /// Returns the limits that hold for a project: its own values, else the defaults.
    pub fn fill(&self, own: Limits) -> Limits {
        let or = |own: Option<u64>, default: Option<Count>| {
            own.or_else(|| default.map(|count| count.get() as u64))
        };
        Limits {
            max_stored_bytes: own
                .max_stored_bytes
                .or_else(|| self.max_stored_bytes.map(Size::bytes)),
            max_stored_files: or(own.max_stored_files, self.max_stored_files),
            max_open_batches: or(own.max_open_batches, self.max_open_batches),
            max_requests_per_batch: or(own.max_requests_per_batch, self.max_requests_per_batch),
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
        let own = defaults.fill(Limits { max_open_batches: Some(9), ..Limits::default() });
        assert_eq!((own.max_open_batches, own.max_stored_bytes), (Some(9), Some(1024)));
        assert_eq!((own.max_stored_files, own.max_requests_per_batch), (None, None));
    }
}
