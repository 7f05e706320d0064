//! Parts that an engine is built from, and the state that its members share.

use std::sync::Arc;

use batchwright_domain::clock::Clock;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_store::{Objects, Store};
use batchwright_telemetry::{GenAi, Metrics, Traces};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::credentials::ProjectCredentials;
use crate::metrics::EngineMetrics;
use crate::objects::AbortedUploads;
use crate::schedule::gate::Gate;
use crate::schedule::running::Running;
use crate::spans::Spans;

/// Parts that the engine uses and that the composition root creates.
#[derive(Clone)]
pub struct Parts {
    /// Database of files, batches and results.
    pub store: Arc<dyn Store>,
    /// Object store of file contents.
    pub objects: Arc<dyn Objects>,
    /// Plugins that serve now.
    pub registry: Arc<Registry>,
    /// Credentials that projects set; none without a key to seal them.
    pub credentials: Option<Arc<ProjectCredentials>>,
    /// Clock of the server.
    pub clock: Clock,
    /// Settings of batches.
    pub config: Arc<Config>,
    /// Memory pools of the server.
    pub memory: Memory,
    /// Metrics of the server.
    pub metrics: Metrics,
    /// Where spans go.
    pub traces: Traces,
    /// Where the metrics of requests to providers go.
    pub gen_ai: GenAi,
}

/// State that the parts of an engine share.
#[derive(Clone)]
pub(crate) struct Shared {
    /// Counted metrics.
    pub metrics: Arc<EngineMetrics>,
    /// Spans of batches and requests.
    pub spans: Spans,
    /// Batches that this process works on.
    pub running: Arc<Running>,
    /// Notified when a batch may be ready to claim.
    pub work_available: Arc<Notify>,
    /// Objects of uploads that were aborted in this process.
    pub aborted_uploads: Arc<AbortedUploads>,
    /// Notified when the janitor may have something to remove.
    pub cleanup_needed: Arc<Notify>,
    /// Closed while results cannot be written.
    pub gate: Gate,
    /// Cancelled when the server starts to drain and reports not ready.
    pub draining: CancellationToken,
    /// Cancelled when the server shuts down and starts no more work.
    pub closing: CancellationToken,
}

impl Shared {
    /// Creates the state of an engine that works.
    pub(crate) fn new(metrics: Arc<EngineMetrics>, spans: Spans) -> Self {
        Self {
            metrics,
            spans,
            running: Arc::default(),
            work_available: Arc::default(),
            aborted_uploads: Arc::default(),
            cleanup_needed: Arc::default(),
            gate: Gate::default(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
        }
    }
}
