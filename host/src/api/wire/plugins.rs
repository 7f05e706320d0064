//! Plugins, and what requests wait for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::batch::{Outage, OutageKey};
use crate::plugin::Entry;
use crate::plugin::types::Kind;
use crate::store::{ServedBy, WaitsFor};

/// The plugins of a batch, and what its requests wait for.
#[derive(Serialize, ToSchema)]
pub struct BatchPlugins {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<BatchPlugin>,
    /// What the requests of the batch wait for; null while they are sent.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl BatchPlugins {
    pub fn new(served_by: Vec<ServedBy>, waits_for: Option<WaitsFor>) -> Self {
        Self {
            object: "list",
            data: served_by.into_iter().map(BatchPlugin::from).collect(),
            waiting: waits_for.map(|waits| Waiting {
                message: waits.cause,
                since: waits.since.as_seconds(),
                next_attempt_at: waits.next.as_seconds(),
            }),
        }
    }
}

/// What requests wait for.
#[derive(Serialize, ToSchema)]
pub struct Waiting {
    /// One sentence.
    message: String,
    /// Unix seconds.
    since: i64,
    /// When the provider is tried again; Unix seconds.
    next_attempt_at: i64,
}

impl From<&Outage> for Waiting {
    fn from(outage: &Outage) -> Self {
        Self {
            message: outage.trouble.message.clone(),
            since: outage.since.as_seconds(),
            next_attempt_at: outage.next_probe.as_seconds(),
        }
    }
}

/// A plugin as the operator sees it.
#[derive(Serialize)]
pub struct OperatorPlugin {
    #[serde(flatten)]
    plugin: Plugin,
    /// Exchanges at a time that the provider is thought to take, and those that the operator allows.
    concurrency: Option<f64>,
    outages: Vec<OperatorOutage>,
}

/// A provider in trouble, in the operator's words.
#[derive(Serialize)]
pub struct OperatorOutage {
    pub plugin: String,
    tenant: String,
    endpoint: String,
    message: String,
    since: i64,
    next_attempt_at: i64,
    waiting_requests: u64,
}

impl From<&(OutageKey, Outage)> for OperatorOutage {
    fn from((key, outage): &(OutageKey, Outage)) -> Self {
        Self {
            plugin: key.plugin.clone(),
            tenant: key.tenant.clone(),
            endpoint: key.endpoint.clone(),
            message: outage.trouble.detail.clone(),
            since: outage.since.as_seconds(),
            next_attempt_at: outage.next_probe.as_seconds(),
            waiting_requests: outage.waiting,
        }
    }
}

impl OperatorPlugin {
    pub fn new(entry: &Entry, outages: &[(OutageKey, Outage)]) -> Self {
        let own = outages.iter().filter(|(key, _)| key.plugin == entry.name);
        let mut plugin = Plugin::from(entry);
        plugin.error.clone_from(&entry.error);
        let adapter = entry.serving.as_deref().filter(|plugin| plugin.kind == Kind::Adapter);
        Self {
            plugin,
            concurrency: adapter.map(|plugin| plugin.gateway().limit()),
            outages: own.map(OperatorOutage::from).collect(),
        }
    }
}

#[derive(Serialize, ToSchema)]
pub struct Plugin {
    #[schema(pattern = "^plugin$")]
    object: &'static str,
    /// The name of its TOML file.
    name: String,
    #[schema(value_type = PluginState)]
    state: &'static str,
    /// That the file as it is does not load, if so.
    #[schema(required)]
    error: Option<String>,
    /// `validator` or `adapter`; null if nothing is loaded.
    #[schema(required)]
    kind: Option<String>,
    #[schema(required)]
    version: Option<String>,
    #[schema(required)]
    sha256: Option<String>,
    /// What the component says of itself.
    #[schema(required)]
    summary: Option<String>,
    /// Models it serves, as clients name them, globs included.
    models: Vec<String>,
    /// Endpoints it is for; empty means all.
    endpoints: Vec<String>,
    /// Unix seconds.
    #[schema(required)]
    loaded_at: Option<i64>,
    /// Fingerprint and name of the key that signed it, where signatures are asked for
    signed_by: Option<String>,
    /// What requests wait for that go to its provider; null while they are sent.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl Plugin {
    /// With what is the matter for a tenant.
    pub fn with(self, outages: &[(OutageKey, Outage)], tenant: &str) -> Self {
        let found = outages.iter().find(|(key, _)| key.plugin == self.name && key.tenant == tenant);
        Self { waiting: found.map(|(_, outage)| Waiting::from(outage)), ..self }
    }
}

/// `outdated`: the file does not load as it is, and what it was before serves on. `paused`: nothing is sent for now, and requests wait.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    Loaded,
    Paused,
    Outdated,
    Failed,
    Disabled,
}

impl From<&Entry> for Plugin {
    fn from(entry: &Entry) -> Self {
        let plugin = entry.serving.as_deref();
        Self {
            object: "plugin",
            name: entry.name.clone(),
            state: entry.state().as_str(),
            error: entry
                .error
                .is_some()
                .then(|| "The plugin's file does not load; the server's log says why.".to_owned()),
            kind: plugin.map(|plugin| plugin.kind.to_string()),
            version: plugin.map(|plugin| plugin.description.version.clone()),
            sha256: plugin.map(|plugin| plugin.sha256.clone()),
            summary: plugin.map(|plugin| plugin.description.summary.clone()),
            models: plugin
                .map(|plugin| {
                    plugin
                        .models
                        .iter()
                        .chain(plugin.aliases.keys())
                        .cloned()
                        .collect::<std::collections::BTreeSet<_>>()
                })
                .map(|models| models.into_iter().collect())
                .unwrap_or_default(),
            endpoints: plugin
                .map(|plugin| {
                    if plugin.endpoints.is_empty() {
                        &plugin.description.endpoints
                    } else {
                        &plugin.endpoints
                    }
                })
                .cloned()
                .unwrap_or_default(),
            loaded_at: plugin.map(|plugin| plugin.loaded_at),
            signed_by: plugin
                .and_then(|plugin| plugin.signed.as_ref())
                .map(|signed| signed.by.clone()),
            waiting: None,
        }
    }
}

/// A plugin that had a part in a batch, as it was then.
#[derive(Serialize, ToSchema)]
pub struct BatchPlugin {
    #[schema(pattern = "^batch.plugin$")]
    object: &'static str,
    name: String,
    kind: String,
    version: String,
    sha256: String,
}

impl From<ServedBy> for BatchPlugin {
    fn from(by: ServedBy) -> Self {
        Self {
            object: "batch.plugin",
            name: by.name,
            kind: by.kind,
            version: by.version,
            sha256: by.sha256,
        }
    }
}
