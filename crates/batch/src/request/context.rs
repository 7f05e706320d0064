//! State that the requests of a batch share, and the request of one line.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_egress::QueueId;
use batchwright_plugin::Registry;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::metrics::EngineMetrics;
use crate::request::jobs::Jobs;
use crate::schedule::breaker::Breaker;
use crate::schedule::breakers::Breakers;
use crate::schedule::gate::Gate;
use crate::schedule::quotas::{BatchShare, TenantQuota};
use crate::schedule::stop::Stop;
use crate::spans::Spans;

/// Minimum wait for which a request with a stored job leaves memory. It is also the pause after a
/// failed read of a job state.
pub(crate) const DEFER_THRESHOLD: Duration = Duration::from_secs(5);

/// State that all requests of a batch share.
pub(crate) struct Context {
    /// Tenant of the batch.
    pub tenant: TenantId,
    /// Id of the batch.
    pub batch: BatchId,
    /// Endpoint of the batch.
    pub endpoint: Endpoint,
    /// Model for lines that name no model.
    pub default_model: Option<String>,
    /// Creation time of the batch, in Unix seconds.
    pub created_at: u64,
    /// Registry that maps a model to its plugin.
    pub registry: Arc<Registry>,
    /// Jobs of the requests at their providers.
    pub jobs: Jobs,
    /// Registry of all circuit breakers.
    pub breaker_registry: Arc<Breakers>,
    /// Circuit breakers of the plugins that served the models at validation, by plugin name.
    pub breakers: Vec<(String, Arc<Breaker>)>,
    /// Clock of the server.
    pub clock: Clock,
    /// Settings of batches.
    pub config: Arc<Config>,
    /// Stop signal of the batch.
    pub stop: Arc<Stop>,
    /// Cancelled when the batch is stopped or evicted. Requests that are not sent yet are dropped.
    pub leave: CancellationToken,
    /// Gate that is closed while results cannot be written.
    pub gate: Gate,
    /// Counted metrics.
    pub metrics: Arc<EngineMetrics>,
    /// Spans of requests.
    pub spans: Spans,
    /// Queue in which the requests of the batch wait for their provider.
    pub queue: QueueId,
    /// Quota of the tenant.
    pub quota: Arc<TenantQuota>,
    /// Share of the batch within its tenant.
    pub share: BatchShare,
}

/// Request of a batch, as read from its line.
#[derive(Clone, Copy)]
pub(crate) struct Line<'a> {
    /// Id of the request, the same in every attempt.
    pub id: &'a str,
    /// `custom_id` of the line.
    pub custom_id: &'a str,
    /// Model that the client asks for.
    pub model: &'a str,
    /// JSON text of the body.
    pub body: &'a str,
    /// Line number in the input file, from 1.
    pub number: u64,
    /// Hash by which breakers identify the line.
    pub mark: u64,
}
