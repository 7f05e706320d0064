//! Plugins that serve the lines of a batch, with their breakers.

use std::sync::Arc;

use batchwright_domain::clock::Timestamp;
use batchwright_memory::Holder;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::request::context::Context;
use crate::schedule::breaker::{Breaker, BreakerDecision};
use crate::schedule::quotas::QUOTA_RETRY_INTERVAL;
use crate::worker::record::Recorded;

/// Plugin that serves lines of the batch, with its circuit breaker.
pub(crate) struct Target {
    pub(super) plugin: String,
    /// Holder of the memory of lines: the plugin and the tenant.
    pub(super) holder: Holder,
    pub(super) breaker: Arc<Breaker>,
}

/// State that an execution shares with the requests that it spawns.
pub(crate) struct Work<'a> {
    pub(super) context: Arc<Context>,
    pub(super) holder: Holder,
    pub(super) targets: Vec<Target>,
    /// Name that the provider knows of the model of all requests; none if they differ.
    pub(super) model: Option<String>,
    pub(super) results: mpsc::Sender<Recorded>,
    pub(super) kill: &'a CancellationToken,
    pub(super) tasks: &'a TaskTracker,
}

impl Work<'_> {
    /// Returns true if all breakers are closed and without suspicion.
    pub(super) fn is_healthy(&self) -> bool {
        self.targets.iter().all(|target| target.breaker.is_healthy())
    }

    /// Returns the time before which no line can be sent, or `None` if some line can be sent now.
    pub(super) fn blocked_until(&self, now: Timestamp) -> Option<Timestamp> {
        if self.targets.iter().any(|target| target.breaker.is_healthy()) {
            return None;
        }
        let waits = self
            .targets
            .iter()
            .map(|target| self.waits_until(target, now))
            .collect::<Option<Vec<_>>>()?;
        waits.into_iter().min()
    }

    /// Returns the time before which the quota of the project lets no line begin, or `None` if some
    /// line may begin now.
    pub(super) async fn held_until(&self, now: Timestamp) -> Option<Timestamp> {
        let quota = &self.context.quota;
        match quota.refresh().await {
            Ok(()) => quota.blocked(self.model.as_deref()).map(|blocked| blocked.until),
            Err(error) => {
                tracing::error!(tenant = %self.context.tenant, %error, "limits not read");
                Some(now.after(QUOTA_RETRY_INTERVAL))
            }
        }
    }

    /// Returns the time at which the first waiting plugin may be tried again.
    pub(super) fn next_probe(&self, now: Timestamp) -> Option<Timestamp> {
        self.targets.iter().filter_map(|target| self.waits_until(target, now)).min()
    }

    /// Returns the time until which lines of a plugin wait, or `None` if a line can be sent now.
    pub(super) fn waits_until(&self, target: &Target, now: Timestamp) -> Option<Timestamp> {
        if target.breaker.is_healthy() {
            return None;
        }
        match target.breaker.check(now, self.context.registry.current().identity(&target.plugin)) {
            BreakerDecision::Wait(until) => Some(until),
            BreakerDecision::Allow | BreakerDecision::Probe | BreakerDecision::GiveUp(_) => None,
        }
    }

    /// Returns the target of a line, or `None` if its model is unknown or has no target.
    pub(super) fn target(&self, model: Option<&str>) -> Option<&Target> {
        if let [only] = self.targets.as_slice() {
            return Some(only);
        }
        let route = self.context.registry.current().route(&self.context.tenant, model?)?;
        self.targets.iter().find(|target| target.plugin == route.plugin.name())
    }
}
