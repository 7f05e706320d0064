//! Metrics: what a crate declares and counts, and the text that Prometheus reads.
//!
//! A crate declares each metric as a constant [`Metric`], from which both the registered metric and
//! its line in `docs/reference/metrics.md` are made. There are two kinds of them:
//!
//! - *Counted* metrics ([`Metrics::counter`], [`Metrics::histogram`]) change where something
//!   happens. Their labels have few values, all of which the program chooses.
//! - *Read* metrics ([`Metrics::read`]) are gauges that are read from the state of the server with
//!   each scrape. A plugin that is gone has no series in the next scrape.
//!
//! Architecture invariant: this crate imports no other crate of the project, so any may use it.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub use prometheus::Error;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
};

/// Content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Upper bounds of the buckets of durations, in seconds: requests may take minutes.
pub const DURATION_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0, 1800.0, 3600.0,
];

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Number that only grows.
    Counter,
    /// Number that rises and falls.
    Gauge,
    /// Distribution of durations in seconds, in [`DURATION_BUCKETS`].
    Histogram,
}

impl Kind {
    /// Returns the name of the type in the text format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Declaration of a metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Name, which begins with `batchwright_`.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Names of the labels.
    pub labels: &'static [&'static str],
    /// Meaning, as a sentence without its full stop.
    pub help: &'static str,
}

/// Values of the metrics that a scrape reads.
pub struct Values(Vec<GaugeVec>);

impl Values {
    /// Sets a metric that was declared for this reader, by the values of its labels.
    pub fn set(&self, metric: &Metric, labels: &[&str], value: f64) {
        if let Some(gauge) = self.gauge(metric, labels) {
            gauge.set(value);
        }
    }

    /// Adds to the value of a metric, which begins with 0.
    pub fn add(&self, metric: &Metric, labels: &[&str], value: f64) {
        if let Some(gauge) = self.gauge(metric, labels) {
            gauge.add(value);
        }
    }

    /// Adds one to the value of a metric.
    pub fn increment(&self, metric: &Metric, labels: &[&str]) {
        self.add(metric, labels, 1.0);
    }

    fn gauge(&self, metric: &Metric, labels: &[&str]) -> Option<Gauge> {
        let is_of = |gauge: &&GaugeVec| {
            gauge.desc().first().is_some_and(|desc| desc.fq_name == metric.name)
        };
        self.0.iter().find(is_of)?.get_metric_with_label_values(labels).ok()
    }
}

/// Gauges that are read from the state of the server.
struct Reader<F> {
    metrics: &'static [Metric],
    descriptions: Vec<Desc>,
    read: F,
}

impl<F: Fn(&Values) + Send + Sync> Collector for Reader<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // The names were checked when the reader was registered.
        let values = Values(self.metrics.iter().filter_map(|metric| gauge(metric).ok()).collect());
        (self.read)(&values);
        values.0.iter().flat_map(Collector::collect).collect()
    }
}

fn gauge(metric: &Metric) -> Result<GaugeVec, Error> {
    GaugeVec::new(Opts::new(metric.name, metric.help), metric.labels)
}

/// Counter by labels.
#[derive(Clone)]
pub struct Counter(IntCounterVec);

impl Counter {
    /// Adds one for the values of the labels.
    pub fn increment(&self, labels: &[&str]) {
        if let Ok(counter) = self.0.get_metric_with_label_values(labels) {
            counter.inc();
        }
    }
}

/// Distributions of durations by labels.
#[derive(Clone)]
pub struct Durations(HistogramVec);

impl Durations {
    /// Records a duration in seconds for the values of the labels.
    pub fn observe(&self, labels: &[&str], seconds: f64) {
        if let Ok(histogram) = self.0.get_metric_with_label_values(labels) {
            histogram.observe(seconds);
        }
    }
}

/// All metrics of a process.
#[derive(Clone)]
pub struct Metrics(Registry);

impl Metrics {
    /// Creates the metrics of the process itself: CPU time, memory, open files and threads.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        registry.register(Box::new(process))?;
        Ok(Self(registry))
    }

    /// Registers a counter.
    pub fn counter(&self, metric: &Metric) -> Result<Counter, Error> {
        let counter = IntCounterVec::new(Opts::new(metric.name, metric.help), metric.labels)?;
        self.0.register(Box::new(counter.clone()))?;
        Ok(Counter(counter))
    }

    /// Registers a histogram of durations.
    pub fn histogram(&self, metric: &Metric) -> Result<Durations, Error> {
        let options = HistogramOpts::new(metric.name, metric.help);
        let options = options.buckets(DURATION_BUCKETS.to_vec());
        let histogram = HistogramVec::new(options, metric.labels)?;
        self.0.register(Box::new(histogram.clone()))?;
        Ok(Durations(histogram))
    }

    /// Registers gauges that `read` sets with each scrape. It must not wait.
    pub fn read(
        &self,
        metrics: &'static [Metric],
        read: impl Fn(&Values) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let mut descriptions = Vec::new();
        for metric in metrics {
            descriptions.extend(gauge(metric)?.desc().into_iter().cloned());
        }
        self.0.register(Box::new(Reader { metrics, descriptions, read }))
    }

    /// Returns the current values in the text format of Prometheus.
    pub fn text(&self) -> Result<String, Error> {
        TextEncoder::new().encode_to_string(&self.0.gather())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    const PLUGINS: Metric = Metric {
        name: "batchwright_plugins",
        kind: Kind::Gauge,
        labels: &["plugin"],
        help: "Plugins",
    };
    const REQUESTS: Metric = Metric {
        name: "batchwright_requests_total",
        kind: Kind::Counter,
        labels: &["route"],
        help: "Requests",
    };

    #[test]
    fn counted_metrics_stay_and_read_metrics_follow_the_state() {
        let metrics = Metrics::new().unwrap();
        let requests = metrics.counter(&REQUESTS).unwrap();
        let plugins = Arc::new(Mutex::new(vec!["a\"\n", "b"]));
        let state = plugins.clone();
        let read = move |values: &Values| {
            state.lock().unwrap().iter().for_each(|plugin| values.set(&PLUGINS, &[plugin], 1.0));
        };
        metrics.read(&[PLUGINS], read).unwrap();
        requests.increment(&["/v1/files"]);
        let text = metrics.text().unwrap();
        assert!(text.contains("# TYPE batchwright_requests_total counter\n"), "{text}");
        assert!(text.contains("batchwright_requests_total{route=\"/v1/files\"} 1\n"), "{text}");
        assert!(text.contains(r#"batchwright_plugins{plugin="a\"\n"} 1"#), "{text}");
        assert!(text.contains("process_resident_memory_bytes "), "{text}");
        plugins.lock().unwrap().clear();
        requests.increment(&["/v1/files"]);
        let text = metrics.text().unwrap();
        assert!(!text.contains("batchwright_plugins"), "{text}");
        assert!(text.contains("batchwright_requests_total{route=\"/v1/files\"} 2\n"), "{text}");
        assert!(metrics.counter(&REQUESTS).is_err(), "a name was registered twice");
    }
}
