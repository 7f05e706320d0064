//! Metrics of the engine.

use batchwright_telemetry::{Error, Kind, Metric, Metrics};

use crate::engine::Engine;

const OUTAGES: Metric = Metric {
    name: "batchwright_provider_outages",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "Open circuit breakers of a plugin, one for each tenant and endpoint whose requests wait \
           for the provider",
};
const WAITING: Metric = Metric {
    name: "batchwright_provider_outage_waiting_requests",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "Requests that wait for the end of an outage of a plugin",
};

/// Declarations of the metrics of the engine.
pub const METRICS: &[Metric] = &[OUTAGES, WAITING];

impl Engine {
    /// Registers the metrics of the engine, and of the plugins and memory pools that it uses.
    pub fn register_metrics(&self, metrics: &Metrics) -> Result<(), Error> {
        let parts = self.parts();
        parts.memory.register_metrics(metrics)?;
        parts.registry.register_metrics(metrics)?;
        let (service, registry) = (self.service().clone(), parts.registry.clone());
        metrics.read(METRICS, move |values| {
            for plugin in registry.current().adapters() {
                values.set(&OUTAGES, &[plugin.name()], 0.0);
                values.set(&WAITING, &[plugin.name()], 0.0);
            }
            for (key, outage) in service.outages() {
                values.increment(&OUTAGES, &[&key.plugin]);
                let waiting = u32::try_from(outage.waiting).unwrap_or(u32::MAX);
                values.add(&WAITING, &[&key.plugin], f64::from(waiting));
            }
        })
    }
}
