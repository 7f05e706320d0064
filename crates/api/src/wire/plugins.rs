//! JSON objects for plugins, and for the reasons why requests wait.

use batchwright_batch::{BreakerKey, Outage};
use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::Permissions;
use batchwright_plugin::Entry;
use batchwright_plugin::types::Kind;
use batchwright_store::PluginVersion;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Plugins of a batch, and the reason why its requests wait.
#[derive(Serialize, ToSchema)]
pub(crate) struct BatchPlugins {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<BatchPlugin>,
    /// Reason why the requests of the batch wait; null if they do not wait.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl From<batchwright_batch::BatchPlugins> for BatchPlugins {
    fn from(found: batchwright_batch::BatchPlugins) -> Self {
        Self {
            object: "list",
            data: found.served_by.into_iter().map(BatchPlugin::from).collect(),
            waiting: found.waits_for.map(|waits| Waiting {
                message: waits.cause,
                since: waits.since.as_seconds(),
                next_attempt_at: waits.next.as_seconds(),
            }),
        }
    }
}

/// Reason why requests wait.
#[derive(Serialize, ToSchema)]
pub(super) struct Waiting {
    /// Reason, in one sentence.
    message: String,
    /// Start of the wait, in Unix seconds.
    since: i64,
    /// Time of the next attempt, in Unix seconds.
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

/// Plugin as the operator sees it, with full error messages.
#[derive(Serialize)]
pub(crate) struct OperatorPlugin {
    #[serde(flatten)]
    plugin: Plugin,
    /// Current limit on concurrent exchanges with the provider: as measured, and within the
    /// operator's setting. Null if the plugin is not an adapter.
    concurrency: Option<f64>,
    outages: Vec<OperatorOutage>,
}

/// Outage of a provider for one tenant and endpoint, with the full error message.
#[derive(Serialize)]
pub(super) struct OperatorOutage {
    /// Name of the plugin.
    pub plugin: String,
    tenant: String,
    endpoint: String,
    message: String,
    since: i64,
    next_attempt_at: i64,
    waiting_requests: u64,
}

impl From<&(BreakerKey, Outage)> for OperatorOutage {
    fn from((key, outage): &(BreakerKey, Outage)) -> Self {
        Self {
            plugin: key.plugin.clone(),
            tenant: key.tenant.to_string(),
            endpoint: key.endpoint.to_string(),
            message: outage.trouble.detail.clone(),
            since: outage.since.as_seconds(),
            next_attempt_at: outage.next_probe.as_seconds(),
            waiting_requests: outage.waiting,
        }
    }
}

impl OperatorPlugin {
    /// Creates the object, with those of `outages` that belong to the plugin.
    pub(crate) fn new(entry: &Entry, outages: &[(BreakerKey, Outage)]) -> Self {
        let own = outages.iter().filter(|(key, _)| key.plugin == entry.name);
        let mut plugin = Plugin::from(entry);
        plugin.error.clone_from(&entry.error);
        let adapter = entry.serving.as_deref().filter(|plugin| plugin.kind() == Kind::Adapter);
        Self {
            plugin,
            concurrency: adapter.map(|plugin| plugin.gateway().limit()),
            outages: own.map(OperatorOutage::from).collect(),
        }
    }
}

/// Plugin as a tenant sees it.
#[derive(Serialize, ToSchema)]
pub(crate) struct Plugin {
    #[schema(pattern = "^plugin$")]
    object: &'static str,
    /// Name of its TOML file.
    name: String,
    #[schema(value_type = PluginState)]
    state: &'static str,
    /// Message if the file does not load.
    #[schema(required)]
    error: Option<String>,
    /// `validator` or `adapter`; null if nothing is loaded.
    #[schema(required)]
    kind: Option<String>,
    #[schema(required)]
    version: Option<String>,
    #[schema(required)]
    sha256: Option<String>,
    /// Summary from the component.
    #[schema(required)]
    summary: Option<String>,
    /// Models that the plugin serves, as clients name them. May contain globs.
    models: Vec<String>,
    /// Endpoints that the plugin serves; empty means all.
    endpoints: Vec<String>,
    /// Time of the load, in Unix seconds.
    #[schema(required)]
    loaded_at: Option<i64>,
    /// Fingerprint and name of the key that signed it, if signatures are required.
    signed_by: Option<String>,
    /// Reason why requests to its provider wait; null if they do not wait.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl Plugin {
    /// Adds the outage that a tenant sees, if there is one.
    pub(crate) fn with_outage(self, outages: &[(BreakerKey, Outage)], tenant: &TenantId) -> Self {
        let found =
            outages.iter().find(|(key, _)| key.plugin == self.name && key.tenant == *tenant);
        Self { waiting: found.map(|(_, outage)| Waiting::from(outage)), ..self }
    }

    /// Removes the models that a tenant may not use.
    pub(crate) fn with_permissions(mut self, permissions: &Permissions, entry: &Entry) -> Self {
        if let Some(plugin) = &entry.serving {
            let aliases = &plugin.routing().aliases;
            let at_provider = |name: &String| aliases.get(name).unwrap_or(name).clone();
            self.models
                .retain(|name| permissions.allows_model(plugin.name(), name, &at_provider(name)));
        }
        self
    }
}

/// State of a plugin.
///
/// `outdated`: the file does not load, and its previous version still serves. `paused`: no requests
/// are sent, and they wait.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum PluginState {
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
            kind: plugin.map(|plugin| plugin.kind().to_string()),
            version: plugin.map(|plugin| plugin.description().version.clone()),
            sha256: plugin.map(|plugin| plugin.sha256().to_owned()),
            summary: plugin.map(|plugin| plugin.description().summary.clone()),
            models: plugin
                .map(|plugin| {
                    plugin
                        .routing()
                        .models
                        .iter()
                        .chain(plugin.routing().aliases.keys())
                        .cloned()
                        .collect::<std::collections::BTreeSet<_>>()
                })
                .map(|models| models.into_iter().collect())
                .unwrap_or_default(),
            endpoints: plugin
                .map(|plugin| {
                    if plugin.routing().endpoints.is_empty() {
                        &plugin.description().endpoints
                    } else {
                        &plugin.routing().endpoints
                    }
                })
                .cloned()
                .unwrap_or_default(),
            loaded_at: plugin.map(|plugin| plugin.loaded_at()),
            signed_by: plugin.and_then(|plugin| plugin.signature()).map(|signed| signed.by.clone()),
            waiting: None,
        }
    }
}

/// Plugin that served a batch, in the version that served it.
#[derive(Serialize, ToSchema)]
pub(super) struct BatchPlugin {
    #[schema(pattern = "^batch.plugin$")]
    object: &'static str,
    name: String,
    kind: String,
    version: String,
    sha256: String,
}

impl From<PluginVersion> for BatchPlugin {
    fn from(by: PluginVersion) -> Self {
        Self {
            object: "batch.plugin",
            name: by.name,
            kind: by.kind,
            version: by.version,
            sha256: by.sha256,
        }
    }
}
