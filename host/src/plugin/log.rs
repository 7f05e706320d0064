//! Lines of a plugin in the operator's log: cut when long, dropped and counted when many.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// The log of one plugin.
pub struct PluginLog {
    plugin: String,
    rate: Option<DefaultDirectRateLimiter>,
    dropped: AtomicU64,
}

impl PluginLog {
    /// Characters of a line that are kept.
    pub const LONGEST: usize = 1000;

    pub fn new(plugin: &str) -> Self {
        // Ten lines a second, a hundred at once.
        let quota = Quota::with_period(Duration::from_millis(100));
        let burst = std::num::NonZeroU32::new(100).unwrap_or(std::num::NonZeroU32::MIN);
        Self {
            plugin: plugin.to_owned(),
            rate: quota.map(|quota| RateLimiter::direct(quota.allow_burst(burst))),
            dropped: AtomicU64::new(0),
        }
    }

    pub fn write(&self, level: tracing::Level, message: &str) {
        if self.rate.as_ref().is_some_and(|rate| rate.check().is_err()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let plugin = self.plugin.as_str();
        if dropped > 0 {
            tracing::warn!(plugin, "{dropped} log lines of the plugin were dropped");
        }
        // A plugin's text must not forge lines or colours of the log.
        let shown: String =
            message.chars().take(Self::LONGEST).map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        match level {
            tracing::Level::ERROR => tracing::error!(plugin, "{shown}"),
            tracing::Level::WARN => tracing::warn!(plugin, "{shown}"),
            tracing::Level::INFO => tracing::info!(plugin, "{shown}"),
            _ => tracing::debug!(plugin, "{shown}"),
        }
    }
}
