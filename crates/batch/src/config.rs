//! Settings of batches: what clients may ask for, how long data is kept, how requests are executed.

use std::fmt;
use std::time::Duration;

use batchwright_domain::limits::{Limit, Limits, lifetime_seconds};
use batchwright_domain::settings;
use batchwright_domain::settings::{Positive, Value};
use batchwright_domain::units::{Count, Size, Span};
use batchwright_domain::window::NO_WINDOW;
use batchwright_plugin::RequiredPlugins;
use batchwright_tenancy::{Prices, TenantDefaults};

/// Everything that batches are configured by.
#[derive(Clone, Debug)]
pub struct Config {
    /// Limits of what clients may ask for.
    pub batch: BatchConfig,
    /// Lifetimes of files and batches.
    pub retention: RetentionConfig,
    /// Concurrency, retries and waiting.
    pub execution: ExecutionConfig,
    /// Online requests.
    pub online: OnlineConfig,
    /// Limits of projects without a value of their own.
    pub tenant_defaults: TenantDefaults,
    /// Prices of models.
    pub prices: Prices,
    /// Plugins without which no batch is created.
    pub required_plugins: RequiredPlugins,
}

settings! {
    /// Limits of what clients may ask for.
    pub struct BatchConfig in "batch" {
        /// Maximum size of an input file
        max_file_size: Positive<Size> = "200MiB", "SIZE";
        /// Maximum number of requests in an input file
        max_requests_per_file: Positive<u64> = "50000", "N";
        /// Maximum size of a line in an input file
        max_line_size: Positive<Size> = "16MiB", "SIZE";
        /// Maximum number of errors listed for a rejected file; a last entry counts the rest
        max_reported_errors: Count = "1000", "N";
        /// Completion windows that a client may request, separated by commas; batches with the
        /// window `none` have no deadline, and run when nothing else waits
        completion_windows: CompletionWindows = "24h", "LIST";
        /// Maximum number of metadata pairs of a batch
        max_metadata_pairs: usize = "16", "N";
        /// Maximum length of a metadata key, in characters
        max_metadata_key: usize = "64", "N";
        /// Maximum length of a metadata value, in characters
        max_metadata_value: usize = "512", "N";
        /// Maximum number of batches in one page of a list
        max_batches_per_page: Count = "100", "N";
        /// Maximum number of files in one page of a list
        max_files_per_page: Count = "10000", "N";
        /// Maximum number of open streams of events, but never more than half of
        /// `max_connections`; a project may have about as many as it leaves free
        max_event_streams: Count = "512", "N";
    }
}

settings! {
    /// Lifetimes of files and batches.
    pub struct RetentionConfig in "retention" {
        /// Lifetime of an input file whose upload sets none
        input_file_lifetime: Positive<Span> = "30d", "TIME";
        /// Lifetime of an output file whose batch sets none; 0s keeps the file forever; a change
        /// applies to new files
        output_file_lifetime: Span = "0s", "TIME";
        /// Lifetime of an error file whose batch sets none; 0s keeps the file forever; a change
        /// applies to new files
        error_file_lifetime: Span = "0s", "TIME";
        /// Time that entries of the audit log are kept; 0s keeps them forever
        audit_lifetime: Span = "0s", "TIME";
        /// Time that a batch is kept after its end; a batch with a result file is kept until the
        /// file is deleted
        batch_lifetime: Positive<Span> = "90d", "TIME";
    }
}

impl RetentionConfig {
    /// Returns the lifetimes that hold for a project, given its own.
    pub fn fill(&self, own: Limits) -> Limits {
        let fill = |limits: Limits, (limit, span): (Limit, Span)| {
            limits.with(limit, own.get(limit).or(Some(lifetime_seconds(span.duration()))))
        };
        [
            (Limit::InputFileLifetime, *self.input_file_lifetime),
            (Limit::OutputFileLifetime, self.output_file_lifetime),
            (Limit::ErrorFileLifetime, self.error_file_lifetime),
            (Limit::BatchLifetime, *self.batch_lifetime),
        ]
        .into_iter()
        .fold(own, fill)
    }
}

settings! {
    /// Concurrency, retries and waiting.
    pub struct ExecutionConfig in "execution" {
        /// Maximum number of batches that execute at a time per provider; the same limit applies
        /// to batches that are validated, and to batches that are finalized
        max_concurrent_batches: Count = "16", "N";
        /// Maximum number of batches that execute at a time for all providers together; each
        /// provider has at least one
        max_executing_batches: Count = "64", "N";
        /// Maximum number of requests in flight per batch
        max_concurrent_requests_per_batch: Count = "256", "N";
        /// Maximum time for requests in flight to finish after their batch is cancelled or expires
        stop_grace: Span = "10s", "TIME";
        /// Maximum time for requests in flight to finish at shutdown
        shutdown_grace: Span = "30s", "TIME";
        /// Maximum number of attempts per request, including the first
        max_attempts: Count = "10", "N";
        /// Maximum number of attempts per request that may have reached the provider and got no
        /// response; the provider may charge for each
        max_unanswered_attempts: Count = "3", "N";
        /// Maximum time to retry a request, not counting time that the request waits for an
        /// unavailable provider or for a rate limit
        max_retry_time: Positive<Span> = "1h", "TIME";
        /// Backoff before the first retry of a request; it doubles with each further retry
        retry_backoff: Span = "500ms", "TIME";
        /// Maximum backoff between two attempts, unless the provider asks for more
        max_retry_backoff: Span = "1m", "TIME";
        /// Backoff before the first probe of an unavailable provider; it doubles with each further
        /// probe
        outage_backoff: Positive<Span> = "1s", "TIME";
        /// Maximum backoff between two probes of an unavailable provider
        max_outage_backoff: Positive<Span> = "1m", "TIME";
        /// Maximum time that requests wait for an unavailable provider before they fail; 0s lets
        /// them wait until their batch expires. `run` has no completion window: it stops after
        /// this time, by default 10m, and keeps its state
        max_outage: Span = "0s", "TIME";
    }
}

settings! {
    /// Online requests.
    pub struct OnlineConfig in "online" {
        /// Maximum time until an online request is answered, or until its stream begins
        online_timeout: Positive<Span> = "10m", "TIME";
        /// Maximum time that an online request waits for a free place at its provider
        online_queue_timeout: Positive<Span> = "10s", "TIME";
    }
}

/// Completion windows that a client may request, each a name and its length.
#[derive(Clone, Debug)]
pub struct CompletionWindows(Vec<(String, Duration)>);

impl CompletionWindows {
    /// Returns the names of the windows.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the length of a window, or none if a client may not request the window.
    pub fn length(&self, name: &str) -> Option<Duration> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, length)| *length)
    }
}

impl Value for CompletionWindows {
    fn parse(text: &str) -> Result<Self, String> {
        let names = Vec::<String>::parse(text)?;
        let windows = names
            .into_iter()
            .map(|name| {
                let length = match name.as_str() {
                    NO_WINDOW => Duration::MAX,
                    name => name.parse::<Span>()?.duration(),
                };
                Ok((name, length))
            })
            .collect::<Result<Vec<_>, String>>()?;
        if windows.is_empty() {
            return Err("name at least one window, such as 24h".into());
        }
        Ok(Self(windows))
    }
}

impl fmt::Display for CompletionWindows {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|(name, _)| format!("'{name}'")).collect();
        formatter.write_str(&names.join(", "))
    }
}
