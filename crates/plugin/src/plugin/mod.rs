//! Loaded plugin: its instances by tenant, and the calls of its functions.
//!
//! **One call.**
//! 1. The caller waits for its turn. Calls are short and occupy a thread, so few run at a time, and
//!    tenants share the CPU time; see [`crate::sandbox::cpu_shares`].
//! 2. The call gets an idle instance of the same tenant, or a new one. Tenants never share an
//!    instance: what a guest remembers of one tenant cannot reach another.
//! 3. The instance runs the function within the limits of [`crate::sandbox::instance`].
//! 4. The result is checked, as a guest's value is untrusted input, and bounded in size.
//! 5. The instance returns to its pool only if the call succeeded and the instance is not bloated.
//!    A trap can leave the guest's memory inconsistent.
//!
//! **Errors.** A failed call gives a [`CallError`] that names the limit and its setting. Clients
//! see the short text. The log has the detail, which may contain settings or the guest's output.
//!
//! **Out of memory.** Linear memory never shrinks, so a used instance can lack room for a request
//! that fits into a new one. Two measures keep such a request from failing: a call with large
//! arguments avoids a used instance without room, and `begin` tries again on a new instance after
//! it ran out of memory.

mod calls;
pub(crate) mod explain;
mod pool;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_egress::Gateway;
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::contract::types::{Description, Kind};
use crate::package::limits::Limits;
use crate::package::routing::Routing;
use crate::package::trust::VerifiedSignature;
use crate::plugin::pool::Pool;
use crate::sandbox::instance::Template;
use crate::sandbox::instances::Instances;
use crate::sandbox::log::PluginLog;

/// Bytes at the beginning of a response body that `classify` receives.
pub const CLASSIFY_BODY_BYTES: usize = 4 << 10;

/// Component with its settings, checked and ready to be called.
pub struct Plugin {
    facts: PluginFacts,
    runtime: PluginRuntime,
    /// Time of the last sampled call of `classify`.
    last_classified: Mutex<Option<Instant>>,
    /// Endpoints whose streams are passed on, once they are known.
    stream_endpoints: tokio::sync::OnceCell<Vec<Endpoint>>,
    /// Pools of instances, by tenant.
    pools: Mutex<HashMap<TenantId, Arc<Pool>>>,
}

/// Facts about a plugin that loading has established.
pub(crate) struct PluginFacts {
    /// Name of the TOML file without its extension.
    pub name: String,
    /// World that the component implements.
    pub kind: Kind,
    /// Result of `describe`.
    pub description: Description,
    /// SHA-256 of the component, in hexadecimal.
    pub sha256: String,
    /// Signature, if the server requires signatures.
    pub signed: Option<VerifiedSignature>,
    /// Limits of calls and exchanges.
    pub limits: Limits,
    /// What the plugin serves.
    pub routing: Routing,
    /// Time of the load, in Unix seconds.
    pub loaded_at: i64,
    /// Settings as a JSON object, for `configure`.
    pub settings: String,
}

/// What a plugin runs with.
pub(crate) struct PluginRuntime {
    /// Reference that lets other plugins of the same component share its code.
    pub _component: Arc<Component>,
    /// Linked component.
    pub template: Template,
    /// Engine of the component.
    pub engine: Engine,
    /// Log of the plugin.
    pub log: Arc<PluginLog>,
    /// Gateway for exchanges.
    pub gateway: Gateway,
    /// Registry of idle instances, shared by all plugins.
    pub instances: Arc<Instances>,
}

impl Plugin {
    /// Creates a plugin without instances.
    pub(crate) fn new(facts: PluginFacts, runtime: PluginRuntime) -> Self {
        Self {
            facts,
            runtime,
            last_classified: Mutex::default(),
            stream_endpoints: tokio::sync::OnceCell::new(),
            pools: Mutex::default(),
        }
    }

    /// Returns the linear memory of the largest idle instance, in bytes.
    pub fn most_memory(&self) -> usize {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.values().map(|pool| pool.idle.max_memory()).max().unwrap_or(0)
    }

    /// Returns a setting that is a text, as `configure` gets it.
    pub fn setting(&self, name: &str) -> Option<String> {
        let settings: serde_json::Value = serde_json::from_str(&self.facts.settings).ok()?;
        settings.get(name)?.as_str().map(str::to_owned)
    }

    /// Returns the gateway for the exchanges that steps ask for.
    pub fn gateway(&self) -> &Gateway {
        &self.runtime.gateway
    }

    /// Returns the name of the TOML file without its extension.
    pub fn name(&self) -> &str {
        &self.facts.name
    }

    /// Returns the world that the component implements.
    pub fn kind(&self) -> Kind {
        self.facts.kind
    }

    /// Returns the result of `describe`.
    pub fn description(&self) -> &Description {
        &self.facts.description
    }

    /// Returns the SHA-256 of the component, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.facts.sha256
    }

    /// Returns the signature, if the server requires signatures.
    pub fn signature(&self) -> Option<&VerifiedSignature> {
        self.facts.signed.as_ref()
    }

    /// Returns the limits of calls and exchanges.
    pub fn limits(&self) -> &Limits {
        &self.facts.limits
    }

    /// Returns what the plugin serves, as the operator configured it.
    pub fn routing(&self) -> &Routing {
        &self.facts.routing
    }

    /// Returns the time of the load, in Unix seconds.
    pub fn loaded_at(&self) -> i64 {
        self.facts.loaded_at
    }

    /// Returns true if the plugin serves this tenant.
    pub fn serves(&self, tenant: &TenantId) -> bool {
        self.facts.routing.serves(tenant)
    }

    /// Returns true if both the description and the operator allow this endpoint.
    pub fn handles(&self, endpoint: Endpoint) -> bool {
        [&self.facts.description.endpoints, &self.facts.routing.endpoints]
            .into_iter()
            .all(|list| list.is_empty() || list.iter().any(|known| known == endpoint.as_str()))
    }
}
