//! Metrics: what a crate declares and counts, and the text that Prometheus reads.
//!
//! A crate declares each metric as a constant [`Metric`], from which both the registered metric and
//! its line in `docs/reference/metrics.md` are made. There are two kinds of them:
//!
//! - *Counted* metrics ([`Metrics::counter`], [`Metrics::histogram`]) change where something
//!   happens. Their labels have few values, which the program and its operator choose. The series
//!   of what is gone end with the next scrape ([`Metrics::keep`]).
//! - *Read* metrics ([`Metrics::read`]) are read from the state of the server with each scrape. A
//!   plugin that is gone has no series in the next scrape.
//!
//! [`Metrics::disabled`] counts nothing and costs nothing.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

pub use prometheus::Error;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{
    CounterVec, Gauge, GaugeVec, HistogramOpts, HistogramVec, Opts, Registry, TextEncoder,
};

/// Content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Upper bounds of the buckets of durations, in seconds: requests may take minutes.
pub const DURATION_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0, 1800.0, 3600.0,
];

/// Upper bounds of the buckets of long durations, in seconds: a batch may wait for days.
pub const LONG_DURATION_BUCKETS: &[f64] = &[
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0,
    43200.0, 64800.0, 86400.0, 172_800.0, 604_800.0,
];

/// Upper bounds of the buckets of small numbers.
pub const NUMBER_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Number that only grows.
    Counter,
    /// Number that rises and falls.
    Gauge,
    /// Distribution, in buckets with these upper bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Returns the name of the type in the text format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
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

    /// Sets a metric to a number of things.
    pub fn set_number(&self, metric: &Metric, labels: &[&str], value: u64) {
        self.set(metric, labels, number(value));
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

/// Converts a number of things to the value of a metric.
#[expect(clippy::cast_precision_loss, reason = "a metric is a floating point number")]
pub fn number(value: u64) -> f64 {
    value as f64
}

/// Values that are read from the state of the server.
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
        let families = values.0.iter().zip(self.metrics);
        families.flat_map(|(gauge, metric)| as_declared(gauge.collect(), metric.kind)).collect()
    }
}

/// Turns the gauges of a counter that is read from elsewhere into counters.
fn as_declared(mut families: Vec<MetricFamily>, kind: Kind) -> Vec<MetricFamily> {
    if kind == Kind::Counter {
        for family in &mut families {
            family.set_field_type(MetricType::COUNTER);
            for metric in family.mut_metric() {
                let mut counter = prometheus::proto::Counter::default();
                counter.set_value(metric.get_gauge().get_value());
                metric.set_counter(counter);
            }
        }
    }
    families
}

fn gauge(metric: &Metric) -> Result<GaugeVec, Error> {
    GaugeVec::new(Opts::new(metric.name, metric.help), metric.labels)
}

/// Counter by labels.
#[derive(Clone)]
pub struct Counter(Option<CounterVec>);

impl Counter {
    /// Creates a series at 0: an alert sees its first increase.
    pub fn prepare(&self, labels: &[&str]) {
        self.add(labels, 0.0);
    }

    /// Adds one for the values of the labels.
    pub fn increment(&self, labels: &[&str]) {
        self.add(labels, 1.0);
    }

    /// Adds a value, which is not negative, for the values of the labels.
    pub fn add(&self, labels: &[&str], value: f64) {
        let Some(counter) = &self.0 else { return };
        if let Ok(counter) = counter.get_metric_with_label_values(labels) {
            counter.inc_by(value);
        }
    }
}

/// Distributions by labels.
#[derive(Clone)]
pub struct Histogram(Option<HistogramVec>);

impl Histogram {
    /// Creates a series without a value: an alert sees its first increase.
    pub fn prepare(&self, labels: &[&str]) {
        if let Some(histogram) = &self.0 {
            histogram.get_metric_with_label_values(labels).ok();
        }
    }

    /// Records a value, such as a duration in seconds, for the values of the labels.
    pub fn observe(&self, labels: &[&str], value: f64) {
        let Some(histogram) = &self.0 else { return };
        if let Ok(histogram) = histogram.get_metric_with_label_values(labels) {
            histogram.observe(value);
        }
    }
}

/// Metric with series that can end.
trait Series: Send {
    /// Removes the series whose label of this name has a value that is not kept.
    fn retain(&self, label: &str, keep: &dyn Fn(&str) -> bool);
}

impl<T: prometheus::core::MetricVecBuilder> Series
    for (prometheus::core::MetricVec<T>, &'static [&'static str])
{
    fn retain(&self, label: &str, keep: &dyn Fn(&str) -> bool) {
        let (vector, names) = self;
        if !names.contains(&label) {
            return;
        }
        for family in vector.collect() {
            for metric in family.get_metric() {
                let value = |name: &str| {
                    let pair = metric.get_label().iter().find(|pair| pair.name() == name);
                    pair.map_or("", |pair| pair.value())
                };
                if !keep(value(label)) {
                    let values: Vec<&str> = names.iter().map(|name| value(name)).collect();
                    vector.remove_label_values(&values).ok();
                }
            }
        }
    }
}

/// Rule about the series of a label.
struct Rule {
    label: &'static str,
    keep: Box<dyn Fn(&str) -> bool + Send>,
}

/// Counted metrics, and the rules about their series.
#[derive(Default)]
struct Counted {
    series: Vec<Box<dyn Series>>,
    rules: Vec<Rule>,
}

/// Values of the label `tenant`.
#[derive(Default)]
struct Tenants {
    /// Maximum number of tenants with a value of their own.
    max: usize,
    known: Mutex<HashSet<Box<str>>>,
}

/// Value of the label `tenant` for tenants beyond the maximum.
const OTHER_TENANTS: &str = "other";

/// All metrics of a process.
#[derive(Clone)]
pub struct Metrics(Option<(Registry, Arc<Mutex<Counted>>)>, Arc<Tenants>);

impl Metrics {
    /// Creates the metrics of the process itself: CPU time, memory, open files and threads.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        registry.register(Box::new(process))?;
        Ok(Self(Some((registry, Arc::default())), Arc::default()))
    }

    /// Gives the first `max` tenants a value of their own of the label `tenant`; further ones share
    /// the value `other`. By default, the label is empty.
    #[must_use]
    pub fn with_tenants(self, max: usize) -> Self {
        Self(self.0, Arc::new(Tenants { max, known: Mutex::default() }))
    }

    /// Returns the value of the label `tenant` for a tenant.
    pub fn tenant_label<'a>(&self, tenant: &'a str) -> &'a str {
        let Tenants { max, known } = &*self.1;
        if *max == 0 {
            return "";
        }
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains(tenant) {
            if known.len() >= *max {
                return OTHER_TENANTS;
            }
            known.insert(tenant.into());
        }
        tenant
    }

    /// Creates metrics that count nothing.
    pub fn disabled() -> Self {
        Self(None, Arc::default())
    }

    /// Returns false if nothing is counted.
    pub fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Registers a counter.
    pub fn counter(&self, metric: &Metric) -> Result<Counter, Error> {
        let Some((registry, counted)) = &self.0 else { return Ok(Counter(None)) };
        let counter = CounterVec::new(Opts::new(metric.name, metric.help), metric.labels)?;
        registry.register(Box::new(counter.clone()))?;
        if metric.labels.is_empty() {
            counter.get_metric_with_label_values::<&str>(&[])?;
        }
        lock(counted).series.push(Box::new((counter.clone(), metric.labels)));
        Ok(Counter(Some(counter)))
    }

    /// Registers a histogram.
    pub fn histogram(&self, metric: &Metric) -> Result<Histogram, Error> {
        let Some((registry, counted)) = &self.0 else { return Ok(Histogram(None)) };
        let buckets = match metric.kind {
            Kind::Histogram(buckets) => buckets,
            Kind::Counter | Kind::Gauge => DURATION_BUCKETS,
        };
        let options = HistogramOpts::new(metric.name, metric.help).buckets(buckets.to_vec());
        let histogram = HistogramVec::new(options, metric.labels)?;
        registry.register(Box::new(histogram.clone()))?;
        if metric.labels.is_empty() {
            histogram.get_metric_with_label_values::<&str>(&[])?;
        }
        lock(counted).series.push(Box::new((histogram.clone(), metric.labels)));
        Ok(Histogram(Some(histogram)))
    }

    /// Registers gauges and counters that `read` sets with each scrape. It must not wait.
    pub fn read(
        &self,
        metrics: &'static [Metric],
        read: impl Fn(&Values) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let Some((registry, _)) = &self.0 else { return Ok(()) };
        let mut descriptions = Vec::new();
        for metric in metrics {
            descriptions.extend(gauge(metric)?.desc().into_iter().cloned());
        }
        registry.register(Box::new(Reader { metrics, descriptions, read }))
    }

    /// Ends the series of counted metrics whose label has a value that is not kept, with each
    /// scrape. The empty value is always kept.
    pub fn keep(&self, label: &'static str, keep: impl Fn(&str) -> bool + Send + 'static) {
        let Some((_, counted)) = &self.0 else { return };
        let keep = move |value: &str| value.is_empty() || keep(value);
        lock(counted).rules.push(Rule { label, keep: Box::new(keep) });
    }

    /// Returns the current values in the text format of Prometheus.
    pub fn text(&self) -> Result<String, Error> {
        let Some((registry, counted)) = &self.0 else { return Ok(String::new()) };
        let counted = lock(counted);
        for Rule { label, keep } in &counted.rules {
            counted.series.iter().for_each(|series| series.retain(label, keep));
        }
        drop(counted);
        TextEncoder::new().encode_to_string(&registry.gather())
    }
}

fn lock(counted: &Mutex<Counted>) -> std::sync::MutexGuard<'_, Counted> {
    counted.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[test]
    fn counted_series_of_what_is_gone_end_with_the_next_scrape() {
        const BY_PLUGIN: Metric = Metric { labels: &["outcome", "plugin"], ..REQUESTS };
        const DURATION: Metric = Metric {
            name: "batchwright_duration_seconds",
            kind: Kind::Histogram(DURATION_BUCKETS),
            labels: &["plugin"],
            help: "Duration",
        };
        let metrics = Metrics::new().unwrap();
        let requests = metrics.counter(&BY_PLUGIN).unwrap();
        let duration = metrics.histogram(&DURATION).unwrap();
        metrics.keep("plugin", |plugin| plugin == "a");
        for plugin in ["a", "b", ""] {
            requests.add(&["failed", plugin], 2.5);
            duration.observe(&[plugin], 1.0);
        }
        let text = metrics.text().unwrap();
        let value = "batchwright_requests_total{outcome=\"failed\",plugin=\"";
        assert!(text.contains(&format!("{value}a\"}} 2.5\n")), "{text}");
        assert!(text.contains(&format!("{value}\"}} 2.5\n")), "{text}");
        assert!(!text.contains(r#"plugin="b""#), "{text}");
    }

    #[test]
    fn counter_that_is_read_is_a_counter() {
        let metrics = Metrics::new().unwrap();
        let read = |values: &Values| values.set_number(&REQUESTS, &["/v1/files"], 7);
        metrics.read(&[REQUESTS], read).unwrap();
        let text = metrics.text().unwrap();
        assert!(text.contains("# TYPE batchwright_requests_total counter\n"), "{text}");
        assert!(text.contains("batchwright_requests_total{route=\"/v1/files\"} 7\n"), "{text}");
    }

    #[test]
    fn label_of_tenants_has_a_bounded_number_of_values() {
        let metrics = Metrics::new().unwrap();
        assert_eq!(metrics.tenant_label("a"), "");
        let metrics = metrics.with_tenants(2);
        let labels = ["a", "b", "c", "a"].map(|tenant| metrics.tenant_label(tenant));
        assert_eq!(labels, ["a", "b", "other", "a"]);
    }

    #[test]
    fn disabled_metrics_count_nothing() {
        let metrics = Metrics::disabled();
        metrics.counter(&REQUESTS).unwrap().increment(&["/v1/files"]);
        metrics.read(&[PLUGINS], |_| unreachable!("nothing is read")).unwrap();
        assert_eq!(metrics.text().unwrap(), "");
    }
}
