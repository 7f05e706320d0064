//! Metrics of calls, instances and compilations.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchwright_telemetry::{Counter, DURATION_BUCKETS, Error, Histogram, Kind, Metric, Metrics};

const CALLS: Metric = Metric {
    name: "batchwright_plugin_calls_total",
    kind: Kind::Counter,
    labels: &["plugin", "function", "outcome"],
    help: "Calls of functions of plugins, by outcome: `returned`, the limit that the call \
           exceeded (`cpu_time`, `deadline`, `memory`, `table`, `handles`, `stack`, `output`), \
           `trap`, or `rejected` for settings that `configure` rejects",
};
const VIOLATIONS: Metric = Metric {
    name: "batchwright_plugin_contract_violations_total",
    kind: Kind::Counter,
    labels: &["plugin", "function"],
    help: "Calls of plugins that returned a value which the contract forbids",
};
const CPU_TIME: Metric = Metric {
    name: "batchwright_plugin_cpu_seconds_total",
    kind: Kind::Counter,
    labels: &["plugin"],
    help: "Time in calls of a plugin, without the time that the calls wait for memory; on busy \
           processors more than the CPU time",
};
const CREATED: Metric = Metric {
    name: "batchwright_plugin_instances_created_total",
    kind: Kind::Counter,
    labels: &["plugin"],
    help: "Instances of a plugin that were created",
};
const EVICTED: Metric = Metric {
    name: "batchwright_plugin_instances_evicted_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Idle instances that were dropped because others need memory, or after a minute",
};
const INSTANCES: Metric = Metric {
    name: "batchwright_plugin_instances",
    kind: Kind::Gauge,
    labels: &[],
    help: "Instances of all plugins, in calls and idle; their memory is the pool `instances`",
};
const COMPILATION: Metric = Metric {
    name: "batchwright_plugin_compile_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["outcome"],
    help: "Time to get the compiled code of a component: `loaded` from the cache or compiled, or \
           `failed`",
};

/// Declarations of the metrics of the sandbox.
pub const METRICS: &[Metric] =
    &[CALLS, VIOLATIONS, CPU_TIME, CREATED, EVICTED, INSTANCES, COMPILATION];

/// Metrics of the sandbox.
pub(crate) struct SandboxMetrics {
    calls: Counter,
    violations: Counter,
    cpu_time: Counter,
    created: Counter,
    evicted: Counter,
    compilation: Histogram,
    /// Number of instances.
    pub(crate) live: AtomicU64,
}

impl SandboxMetrics {
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, Error> {
        Ok(Self {
            calls: metrics.counter(&CALLS)?,
            violations: metrics.counter(&VIOLATIONS)?,
            cpu_time: metrics.counter(&CPU_TIME)?,
            created: metrics.counter(&CREATED)?,
            evicted: metrics.counter(&EVICTED)?,
            compilation: metrics.histogram(&COMPILATION)?,
            live: AtomicU64::new(0),
        })
    }

    /// Registers the number of instances that `read` returns.
    pub(crate) fn register_instances(
        metrics: &Metrics,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Result<(), Error> {
        metrics.read(&[INSTANCES], move |values| values.set_number(&INSTANCES, &[], read()))
    }

    /// Counts a call that returned.
    pub(crate) fn returned(&self, plugin: &str, function: &'static str) {
        self.calls.increment(&[plugin, function, "returned"]);
    }

    /// Counts a call that failed.
    pub(crate) fn failed(&self, plugin: &str, function: &'static str, outcome: &'static str) {
        self.calls.increment(&[plugin, function, outcome]);
    }

    /// Counts a call that returned a value which the contract forbids.
    pub(crate) fn violated(&self, plugin: &str, function: &'static str) {
        self.violations.increment(&[plugin, function]);
    }

    /// Counts time in a call.
    pub(crate) fn took(&self, plugin: &str, time: Duration) {
        self.cpu_time.add(&[plugin], time.as_secs_f64());
    }

    /// Counts an instance that was created.
    pub(crate) fn created(&self, plugin: &str) {
        self.created.increment(&[plugin]);
    }

    /// Counts an idle instance that was dropped.
    pub(crate) fn evicted(&self) {
        self.evicted.increment(&[]);
    }

    /// Records the time until a component was compiled or loaded from the cache.
    pub(crate) fn compiled(&self, succeeded: bool, time: Duration) {
        let outcome = if succeeded { "loaded" } else { "failed" };
        self.compilation.observe(&[outcome], time.as_secs_f64());
    }

    /// Counts a new instance.
    pub(crate) fn add_live(&self) {
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the end of an instance.
    pub(crate) fn remove_live(&self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}
