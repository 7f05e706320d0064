//! Metrics of webhooks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_store::webhooks::WebhookCounts;
use batchwright_telemetry::{Counter, DURATION_BUCKETS, Error, Histogram, Kind, Metric, Metrics};

const ATTEMPTS: Metric = Metric {
    name: "batchwright_webhook_attempts_total",
    kind: Kind::Counter,
    labels: &["outcome"],
    help: "Attempts to deliver an event: `delivered`, `refused` (an answer that is no 2xx), or \
           `failed` (no answer)",
};
const DURATION: Metric = Metric {
    name: "batchwright_webhook_attempt_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &[],
    help: "Time of an attempt to deliver an event",
};
const PENDING: Metric = Metric {
    name: "batchwright_webhook_pending_deliveries",
    kind: Kind::Gauge,
    labels: &[],
    help: "Events that are not delivered yet and are attempted again",
};
const OLDEST: Metric = Metric {
    name: "batchwright_webhook_oldest_delivery_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "Age of the oldest event that is not delivered yet",
};
const DISABLED: Metric = Metric {
    name: "batchwright_webhook_endpoints_disabled",
    kind: Kind::Gauge,
    labels: &[],
    help: "Endpoints that the server has disabled because deliveries failed for too long",
};

/// Declarations of the metrics of webhooks.
pub const METRICS: &[Metric] = &[ATTEMPTS, DURATION, PENDING, OLDEST, DISABLED];

/// Metrics of webhooks.
pub(crate) struct WebhookMetrics {
    attempts: Counter,
    duration: Histogram,
    counts: Arc<Mutex<Option<(Timestamp, WebhookCounts)>>>,
}

impl WebhookMetrics {
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, Error> {
        let counts: Arc<Mutex<Option<(Timestamp, WebhookCounts)>>> = Arc::default();
        let shown = counts.clone();
        metrics.read(&[PENDING, OLDEST, DISABLED], move |values| {
            let counts = *shown.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((at, counts)) = counts else { return };
            values.set_number(&PENDING, &[], counts.pending);
            values.set_number(&DISABLED, &[], counts.disabled);
            let age = counts.oldest.map_or(Duration::ZERO, |oldest| oldest.until(at));
            values.set(&OLDEST, &[], age.as_secs_f64());
        })?;
        Ok(Self {
            attempts: metrics.counter(&ATTEMPTS)?,
            duration: metrics.histogram(&DURATION)?,
            counts,
        })
    }

    /// Counts an attempt.
    pub(crate) fn attempted(&self, outcome: &'static str, took: Duration) {
        self.attempts.increment(&[outcome]);
        self.duration.observe(&[], took.as_secs_f64());
    }

    /// Records what was read last.
    pub(crate) fn counted(&self, at: Timestamp, counts: WebhookCounts) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = Some((at, counts));
    }
}
