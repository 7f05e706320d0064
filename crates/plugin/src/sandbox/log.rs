//! Log lines of plugins in the operator's log: truncated if long, dropped and counted if frequent.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchwright_domain::text::printable;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// Last lines that the guest of one instance wrote, mostly the message of a panic.
///
/// The lines explain a failed call to operators. Clients must not see them, as they may contain a
/// tenant's data.
#[derive(Clone, Default)]
pub(crate) struct RecentOutput(Arc<Mutex<VecDeque<String>>>);

impl RecentOutput {
    const MAX_LINES: usize = 3;
    const MAX_CHARS: usize = 300;

    /// Adds a line and drops the oldest one if there are too many.
    pub(crate) fn add(&self, line: &str) {
        let line: String = line.trim().chars().take(Self::MAX_CHARS).collect();
        if line.is_empty() {
            return;
        }
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= Self::MAX_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// Returns all lines, joined to one.
    pub(crate) fn joined(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join(" / ")
    }
}

/// Log of one plugin, with a rate limit.
pub(crate) struct PluginLog {
    plugin: String,
    rate: Option<DefaultDirectRateLimiter>,
    dropped: AtomicU64,
}

impl PluginLog {
    /// Longest line; the rest of a longer one is dropped.
    pub(crate) const MAX_LINE_CHARS: usize = 1000;

    /// Creates the log of the plugin with this name: ten lines a second, in bursts of up to 100.
    pub(crate) fn new(plugin: &str) -> Self {
        let quota = Quota::with_period(Duration::from_millis(100));
        let burst = std::num::NonZeroU32::new(100).unwrap_or(std::num::NonZeroU32::MIN);
        Self {
            plugin: plugin.to_owned(),
            rate: quota.map(|quota| RateLimiter::direct(quota.allow_burst(burst))),
            dropped: AtomicU64::new(0),
        }
    }

    /// Logs a line that the guest wrote.
    ///
    /// The text is a field and has no control characters, so a guest cannot forge an event, a line
    /// or a color of the host's log.
    pub(crate) fn write(&self, level: tracing::Level, text: &str) {
        if !self.admits() {
            return;
        }
        let plugin = self.plugin.as_str();
        let text = printable(text, Self::MAX_LINE_CHARS);
        let text = text.as_str();
        match level {
            tracing::Level::ERROR => tracing::error!(plugin, text, "plugin log line"),
            tracing::Level::WARN => tracing::warn!(plugin, text, "plugin log line"),
            tracing::Level::INFO => tracing::info!(plugin, text, "plugin log line"),
            _ => tracing::debug!(plugin, text, "plugin log line"),
        }
    }

    /// Logs a failed call, with the message for operators.
    pub(crate) fn write_call_error(&self, error: &str) {
        if !self.admits() {
            return;
        }
        let plugin = self.plugin.as_str();
        let error = printable(error, Self::MAX_LINE_CHARS);
        tracing::warn!(plugin, error = error.as_str(), "plugin call failed");
    }

    /// Returns true if the rate limit admits a line. Reports the lines that were dropped before it.
    fn admits(&self) -> bool {
        if self.rate.as_ref().is_some_and(|rate| rate.check().is_err()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            tracing::warn!(plugin = self.plugin.as_str(), dropped, "plugin log lines dropped");
        }
        true
    }
}
