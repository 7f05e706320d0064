//! Metrics of plugins and of their providers.

use std::sync::Arc;

use batchwright_telemetry::{Error, Kind, Metric, Metrics};

use super::registry::Registry;
use super::snapshot::EntryState;

const PLUGINS: Metric = Metric {
    name: "batchwright_plugins",
    kind: Kind::Gauge,
    labels: &["state"],
    help: "Plugin files by state: `loaded`, `paused`, `outdated`, `failed`, `disabled`",
};
const IN_FLIGHT: Metric = Metric {
    name: "batchwright_provider_exchanges_in_flight",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "HTTP exchanges with the provider of a plugin in flight",
};
const LIMIT: Metric = Metric {
    name: "batchwright_provider_exchanges_limit",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "Estimated number of exchanges in flight that the provider of a plugin accepts; below \
           one, it accepts less than one at a time",
};

/// Declarations of the metrics of plugins.
pub const METRICS: &[Metric] = &[PLUGINS, IN_FLIGHT, LIMIT];

impl Registry {
    /// Registers the metrics of plugins.
    pub fn register_metrics(self: &Arc<Self>, metrics: &Metrics) -> Result<(), Error> {
        let registry = self.clone();
        let known = self.clone();
        metrics.keep("plugin", move |name| {
            known.current().entries.iter().any(|entry| entry.name == name)
        });
        metrics.read(METRICS, move |values| {
            let plugins = registry.current();
            for state in EntryState::ALL {
                values.set(&PLUGINS, &[state.as_str()], 0.0);
            }
            for entry in &plugins.entries {
                values.increment(&PLUGINS, &[entry.state().as_str()]);
            }
            for plugin in plugins.adapters() {
                let gateway = plugin.gateway();
                let in_flight = u32::try_from(gateway.in_flight()).unwrap_or(u32::MAX);
                values.set(&IN_FLIGHT, &[plugin.name()], f64::from(in_flight));
                values.set(&LIMIT, &[plugin.name()], gateway.limit());
            }
        })
    }
}
