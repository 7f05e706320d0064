//! Failures of a provider: what they mean for the breaker, the line and the people involved.

use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_domain::text::truncate_for_message;
use batchwright_plugin::Plugin;
use batchwright_plugin::types::{Answer, Response};

use crate::request::context::{Context, Line};
use crate::request::exchange::ExchangeSummary;
use crate::request::outcome::{AttemptOutcome, FinalAnswer, failure, identity, milliseconds};
use crate::schedule::breaker::{
    Breaker, BreakerDecision, FailureKind, FailureVerdict, ProviderFailure,
};
use crate::schedule::breakers::{Breakers, MODEL};
use crate::schedule::retry_queue::RetryState;

/// Interval at which a missing or paused plugin is looked up again. A change of the plugins
/// triggers a lookup at once.
const PLUGIN_POLL_INTERVAL: Duration = Duration::from_secs(30);

/// Interval between attempts while a project has no credential.
const CREDENTIAL_POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Copies an answer for waiting lines, and replaces a long body by a short message.
fn without_long_body(answer: &Answer) -> Answer {
    const MAX_COPIED_BODY_BYTES: usize = 4 << 10;
    match answer {
        Answer::Response(Response { status, body, .. }) if body.len() > MAX_COPIED_BODY_BYTES => {
            failure(
                ErrorCode::ProviderError,
                format!("The provider answered with status {status}."),
            )
        }
        answer => answer.clone(),
    }
}

/// Where requests come from: a batch, or online requests of a tenant.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    /// Tenant of the requests.
    pub tenant: &'a TenantId,
    /// Batch of the requests; none for an online request.
    pub batch: Option<&'a BatchId>,
    /// Endpoint of the requests.
    pub endpoint: Endpoint,
    /// Clock of the server.
    pub clock: &'a Clock,
    /// Registry of all circuit breakers.
    pub breakers: &'a Breakers,
}

impl Origin<'_> {
    /// Records a success of the provider and logs the end of an outage.
    pub(crate) fn record_success(&self, breaker: &Breaker, plugin: &Plugin) {
        if let Some(outage) = breaker.record_success() {
            tracing::warn!(
                tenant = %self.tenant,
                batch = self.batch.map(display),
                plugin = plugin.name(),
                endpoint = %self.endpoint,
                duration_ms = milliseconds(outage.since.until(self.clock.now())),
                error = outage.trouble.detail,
                "breaker closed"
            );
            self.breakers.notify();
        }
    }

    /// Records a failure that may be the fault of the provider, and logs the start of an outage.
    ///
    /// `line` has the id of the request and the number by which the breaker knows it.
    pub(crate) fn record_failure(
        &self,
        breaker: &Breaker,
        line: (&str, u64),
        plugin: &Plugin,
        refused_at: Option<u64>,
        trouble: ProviderFailure,
        probe: bool,
    ) -> FailureVerdict {
        let ((id, mark), detail) = (line, trouble.detail.clone());
        let (verdict, opened) = breaker.record_failure(
            self.clock.now(),
            mark,
            identity(plugin),
            refused_at,
            trouble,
            probe,
        );
        if opened {
            tracing::warn!(
                tenant = %self.tenant,
                batch = self.batch.map(display),
                plugin = plugin.name(),
                endpoint = %self.endpoint,
                error = detail,
                "breaker opened"
            );
        } else {
            tracing::debug!(
                tenant = %self.tenant,
                batch = self.batch.map(display),
                request = id,
                plugin = plugin.name(),
                ?verdict,
                error = detail,
                "request failed"
            );
        }
        verdict
    }
}

/// Describes a failure of the provider, for the client and for the operator.
pub(crate) fn describe_trouble(
    kind: FailureKind,
    answer: &Answer,
    sent: Option<&ExchangeSummary>,
) -> ProviderFailure {
    let status = match answer {
        Answer::Response(response) => Some(response.status),
        Answer::Failure(_) => None,
    };
    let with_status = |what: &str| match status {
        Some(status) => format!("{what} (status {status})."),
        None => format!("{what}."),
    };
    let message = match (kind, answer) {
        (FailureKind::Unauthorized, _) => {
            with_status("The provider does not accept the operator's credential")
        }
        (FailureKind::Forbidden, _) => {
            with_status("The provider denies this request to the operator's credential")
        }
        (FailureKind::Quota, _) => {
            with_status("The provider says that the account's quota is used up")
        }
        (_, Answer::Failure(failure)) => failure.message.clone(),
        (_, Answer::Response(_)) => with_status("The provider answers with an error"),
    };
    let detail = sent.and_then(|sent| sent.detail.clone()).unwrap_or_else(|| message.clone());
    ProviderFailure { kind, message, detail, answer: without_long_body(answer) }
}

impl Context {
    /// Returns the origin of the requests, for the breakers and the log.
    pub(super) fn origin(&self) -> Origin<'_> {
        Origin {
            tenant: &self.tenant,
            batch: Some(&self.batch),
            endpoint: self.endpoint,
            clock: &self.clock,
            breakers: &self.breaker_registry,
        }
    }

    /// Defers a line whose model has no plugin any more.
    ///
    /// A plugin served the model when the batch was validated, and the plugin may return.
    pub(super) fn missing_plugin(&self, line: Line<'_>, retry_state: RetryState) -> AttemptOutcome {
        let model = truncate_for_message(line.model);
        let message = format!("No plugin serves the model '{model}' any more.");
        let plugins = self.registry.current();
        let gone =
            self.breakers.iter().map(|(name, _)| name).find(|name| plugins.identity(name) == 0);
        let name = gone.cloned().unwrap_or_else(|| format!("{MODEL}{model}"));
        let breaker = self.breaker_registry.of(&name, &self.tenant, self.endpoint);
        let trouble = (FailureKind::Plugin, message.as_str(), message.as_str());
        let ended = self.blocked_by_plugin(&breaker, line, retry_state, trouble, 0);
        // Another batch may have opened the breaker, so this batch is registered as waiting too.
        if !breaker.has_waiting(&self.batch) {
            breaker.add_waiting(&self.batch, 1);
        }
        ended
    }

    /// Opens the breaker of a missing or paused plugin and defers a line.
    ///
    /// `trouble` has the cause for the client and the cause for the operator. `plugin` is the
    /// identity of the plugin, or 0 if the plugin is gone.
    pub(super) fn blocked_by_plugin(
        &self,
        breaker: &Breaker,
        line: Line<'_>,
        retry_state: RetryState,
        trouble: (FailureKind, &str, &str),
        plugin: usize,
    ) -> AttemptOutcome {
        let ((kind, message, detail), now) = (trouble, self.clock.now());
        if let BreakerDecision::GiveUp(answer) = breaker.check(now, plugin) {
            return AttemptOutcome::Answered(FinalAnswer {
                answer,
                by: None,
                reservation: None,
                metered: None,
            });
        }
        let trouble = ProviderFailure {
            kind,
            message: message.to_owned(),
            detail: detail.to_owned(),
            answer: failure(ErrorCode::ModelNotFound, message.to_owned()),
        };
        let (_, opened) = breaker.record_failure(now, line.mark, plugin, None, trouble, true);
        if opened {
            tracing::warn!(
                tenant = %self.tenant,
                batch = %self.batch,
                endpoint = %self.endpoint,
                error = detail,
                "breaker opened"
            );
        }
        AttemptOutcome::Retry(
            now.after(match kind {
                FailureKind::Credential => CREDENTIAL_POLL_INTERVAL,
                _ => PLUGIN_POLL_INTERVAL,
            }),
            RetryState { waits: true, ..retry_state },
        )
    }
}
