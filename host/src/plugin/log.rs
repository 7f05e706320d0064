//! Lines of a plugin in the operator's log: cut when long, dropped and counted when many.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// The last lines that the guest of one instance wrote, for the report of its end: the message of a panic, mostly. They are the operator's, as
/// they may hold what a tenant sent.
#[derive(Clone, Default)]
pub struct Said(Arc<Mutex<VecDeque<String>>>);

impl Said {
    const MAX_LINES: usize = 3;
    const MAX_CHARS: usize = 300;

    pub fn add(&self, line: &str) {
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

    /// All of it on one line.
    pub fn in_words(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join(" / ")
    }
}

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
        let shown: String = message
            .chars()
            .take(Self::LONGEST)
            .map(|letter| if letter.is_control() { ' ' } else { letter })
            .collect();
        match level {
            tracing::Level::ERROR => tracing::error!(plugin, "{shown}"),
            tracing::Level::WARN => tracing::warn!(plugin, "{shown}"),
            tracing::Level::INFO => tracing::info!(plugin, "{shown}"),
            _ => tracing::debug!(plugin, "{shown}"),
        }
    }
}
