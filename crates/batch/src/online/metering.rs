//! Metering of an online request: its usage is counted once, however the request ends.
//!
//! An answered request counts what its provider reports. A client that leaves before that is
//! charged for what is known: the estimated input, and a token for each event with text. A request
//! that no model answered counts nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{KeyId, TenantId};
use batchwright_domain::usage::TokenUsage;
use batchwright_store::{Charge, OnlineUsage, StoreError};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::online::count::RequestFacts;
use crate::online::{Admitted, Online};
use crate::schedule::backoff::Backoff;
use crate::schedule::quotas::{Hold, estimated_tokens};

/// Maximum time that an answer waits until its usage is written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Usage of a request that is not counted yet.
pub(super) struct Metering {
    online: Arc<Online>,
    tenant: TenantId,
    key: Option<KeyId>,
    endpoint: Endpoint,
    model: Arc<str>,
    facts: Arc<RequestFacts>,
    /// Estimated usage so far.
    seen: TokenUsage,
    /// Usage that the provider has reported.
    reported: Option<TokenUsage>,
    /// Lets the server wait at its end until the usage is counted.
    _pending: TaskTrackerToken,
    /// Reservation; none once the usage is counted.
    hold: Option<Hold>,
}

impl Metering {
    pub(super) fn new(online: Arc<Online>, admitted: &Admitted<'_>, hold: Hold) -> Self {
        let input = estimated_tokens(admitted.body.len());
        Self {
            reported: None,
            facts: admitted.facts.clone(),
            _pending: online.tasks.token(),
            online,
            tenant: admitted.request.tenant.clone(),
            key: admitted.request.key.clone(),
            endpoint: admitted.request.endpoint,
            model: admitted.provider_model.as_str().into(),
            seen: TokenUsage { input, ..TokenUsage::default() },
            hold: Some(hold),
        }
    }

    /// Notes that the request is sent.
    pub(super) fn begin(&self) {
        self.facts.is_sent.store(true, Ordering::Relaxed);
    }

    /// Notes an event with text.
    pub(super) fn saw_text(&mut self) {
        self.seen.output = self.seen.output.saturating_add(1);
    }

    /// Takes over the usage that the provider reports.
    pub(super) fn report(&mut self, usage: TokenUsage) {
        self.reported = Some(usage);
    }

    /// Returns true if a model has answered, as far as is known.
    pub(super) fn has_answer(&self) -> bool {
        self.reported.is_some() || self.seen.output > 0
    }

    /// Returns what the provider has reported, or else what was seen.
    pub(super) fn usage(&self) -> TokenUsage {
        self.reported.unwrap_or(self.seen)
    }

    /// Gives the reservation back: no model has answered.
    pub(super) fn release(mut self) {
        self.hold = None;
    }

    /// Counts the usage. Returns when it is written, or after a moment: a full disk must not keep
    /// an answer from the client. The write then goes on.
    pub(super) async fn finish(mut self, usage: TokenUsage) {
        if let Some(writing) = self.write(usage) {
            tokio::time::timeout(WRITE_TIMEOUT, writing).await.ok();
        }
    }

    /// Begins to write the usage, on a task that a client who leaves does not end.
    fn write(&mut self, usage: TokenUsage) -> Option<tokio::task::JoinHandle<()>> {
        let hold = self.hold.take()?;
        self.facts.tokens(usage);
        let (online, tenant, model) =
            (self.online.clone(), self.tenant.clone(), self.model.clone());
        let price = hold.price(&model);
        let charge = Charge { model, price };
        let row =
            OnlineUsage { endpoint: self.endpoint, key: self.key.clone(), charge, tokens: usage };
        let tasks = self.online.tasks.clone();
        Some(tasks.spawn(async move {
            if online.write_usage(&tenant, row).await {
                hold.record(usage, price);
            }
        }))
    }
}

impl Drop for Metering {
    fn drop(&mut self) {
        if self.facts.is_sent.load(Ordering::Relaxed) {
            // The client has left, or the answer was cut off.
            self.write(self.usage());
        }
    }
}

impl Online {
    /// Writes usage, until the write succeeds or the server shuts down. While writes fail, nothing
    /// is sent to providers.
    async fn write_usage(&self, tenant: &TenantId, row: OnlineUsage) -> bool {
        let (mut backoff, mut closed) = (Backoff::default(), None);
        loop {
            let rows = vec![row.clone()];
            let written = self.store.record_online_usage(tenant, rows, self.clock.now()).await;
            let Err(error) = written else { return true };
            tracing::error!(%tenant, %error, "usage not recorded");
            if matches!(error, StoreError::Closed) || self.closing.is_cancelled() {
                return false;
            }
            closed.get_or_insert_with(|| self.gate.close(&error));
            self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
        }
    }
}
