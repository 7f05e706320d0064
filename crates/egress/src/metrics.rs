//! Metrics of exchanges with providers.

use std::time::Instant;

use batchwright_memory::Holder;
use batchwright_telemetry::{Counter, DURATION_BUCKETS, Error, Histogram, Kind, Metric, Metrics};

use crate::{TransportError, TransportErrorKind};

const EXCHANGES: Metric = Metric {
    name: "batchwright_provider_exchanges_total",
    kind: Kind::Counter,
    labels: &["plugin", "status"],
    help: "HTTP exchanges with the provider of a plugin, by HTTP status (rare ones as `2xx` to \
           `5xx`), or by the failure: `name_resolution`, `connection`, `tls`, `timeout`, \
           `protocol`, `too_large`, `not_allowed`, or `abandoned` if the host ended it",
};
const DURATION: Metric = Metric {
    name: "batchwright_provider_exchange_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["plugin"],
    help: "Time from the start of an exchange to the end of the response",
};
const FIRST_BYTE: Metric = Metric {
    name: "batchwright_provider_first_byte_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["plugin"],
    help: "Time from the start of an exchange to the head of the response",
};

/// Declarations of the metrics of exchanges.
pub const METRICS: &[Metric] = &[EXCHANGES, DURATION, FIRST_BYTE];

/// Metrics of the exchanges of all plugins.
#[derive(Clone)]
pub struct ExchangeMetrics {
    exchanges: Counter,
    duration: Histogram,
    first_byte: Histogram,
}

impl ExchangeMetrics {
    /// Registers the metrics.
    pub fn register(metrics: &Metrics) -> Result<Self, Error> {
        Ok(Self {
            exchanges: metrics.counter(&EXCHANGES)?,
            duration: metrics.histogram(&DURATION)?,
            first_byte: metrics.histogram(&FIRST_BYTE)?,
        })
    }

    /// Starts to measure an exchange.
    pub(crate) fn start(&self, plugin: &Holder) -> Measured {
        Measured {
            metrics: self.clone(),
            plugin: plugin.clone(),
            started: Instant::now(),
            status: "abandoned",
        }
    }
}

/// Exchange that is measured until dropped.
pub(crate) struct Measured {
    metrics: ExchangeMetrics,
    plugin: Holder,
    started: Instant,
    status: &'static str,
}

impl Measured {
    /// Records that the head of the response has arrived.
    pub(crate) fn head_arrived(&self) {
        self.metrics.first_byte.observe(&[&self.plugin], self.started.elapsed().as_secs_f64());
    }

    /// Records the status of a response that has arrived as far as it is wanted.
    pub(crate) fn answered(&mut self, status: u16) {
        self.status = label_of(status);
    }

    /// Records the failure of the exchange.
    pub(crate) fn failed(&mut self, error: &TransportError) {
        self.status = match error.fault {
            TransportErrorKind::NameResolution => "name_resolution",
            TransportErrorKind::Connection => "connection",
            TransportErrorKind::Tls => "tls",
            TransportErrorKind::Timeout => "timeout",
            TransportErrorKind::Protocol => "protocol",
            TransportErrorKind::TooLarge => "too_large",
            TransportErrorKind::NotAllowed => "not_allowed",
        };
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.metrics.exchanges.increment(&[&self.plugin, self.status]);
        self.metrics.duration.observe(&[&self.plugin], self.started.elapsed().as_secs_f64());
    }
}

/// Returns the label of an HTTP status. A provider may send any number, so only common ones have a
/// label of their own.
fn label_of(status: u16) -> &'static str {
    match status {
        200 => "200",
        201 => "201",
        202 => "202",
        400 => "400",
        401 => "401",
        402 => "402",
        403 => "403",
        404 => "404",
        408 => "408",
        409 => "409",
        413 => "413",
        422 => "422",
        429 => "429",
        500 => "500",
        502 => "502",
        503 => "503",
        504 => "504",
        529 => "529",
        _ => match status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        },
    }
}
