//! What the handlers of requests use.

use std::sync::Arc;

use batchwright_batch::{Config, Engine, Health, Online, ProgressHub, Service};
use batchwright_domain::clock::Clock;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_webhooks::WebhookService;

/// State of the API, which all requests share.
pub(crate) struct ApiState {
    /// Batches and files of all tenants.
    pub service: Arc<Service>,
    /// Answers online requests.
    pub online: Arc<Online>,
    /// Progress of batches, for listeners.
    pub progress: Arc<ProgressHub>,
    /// Webhooks of all tenants.
    pub webhooks: Arc<WebhookService>,
    /// Probes of the server.
    pub health: Arc<Health>,
    /// Plugins that serve now.
    pub registry: Arc<Registry>,
    /// Memory pools of the server.
    pub memory: Memory,
    /// Clock of the server.
    pub clock: Clock,
    /// Settings of batches.
    pub config: Arc<Config>,
}

impl ApiState {
    /// Returns the state of the API of an engine.
    pub(crate) fn new(engine: &Engine, webhooks: &Arc<WebhookService>) -> Arc<Self> {
        let parts = engine.parts();
        Arc::new(Self {
            service: engine.service().clone(),
            online: engine.online().clone(),
            progress: engine.progress().clone(),
            webhooks: webhooks.clone(),
            health: engine.health().clone(),
            registry: parts.registry.clone(),
            memory: parts.memory.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
        })
    }
}
