//! Delivery of events: attempts, backoff, and the end of endpoints that do not work.
//!
//! **Fair.** One attempt at a time for each endpoint, [`MAX_OF_TENANT`] for a tenant, and
//! [`MAX_ATTEMPTS`] in all. An endpoint that answers slowly delays its own events only.
//!
//! **Order.** Events of an endpoint are attempted in their order, unless one waits for its next
//! attempt. A receiver that needs the latest state asks for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{EventId, TenantId, WebhookId};
use batchwright_domain::text::printable;
use batchwright_domain::webhook::EventType;
use batchwright_egress::OutboundAnswer;
use batchwright_store::webhooks::{AttemptResult, DueDelivery, WebhookRecord};
use batchwright_telemetry::{Error, Metrics};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::metrics::WebhookMetrics;
use crate::service::WebhookService;
use crate::sign::signature;

/// Maximum number of attempts at a time.
const MAX_ATTEMPTS: usize = 256;

/// Maximum number of attempts of a tenant at a time.
const MAX_OF_TENANT: usize = 4;

/// Interval of searches for due deliveries.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Interval of reads for the metrics, and of the removal of old deliveries.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(15);

/// Maximum number of deliveries that one step removes.
const PURGE_ROWS: usize = 1000;

/// Maximum number of such steps in a row.
const MAX_PURGES: usize = 10;

/// First pause before another attempt.
const FIRST_PAUSE: Duration = Duration::from_secs(5);

/// Longest pause before another attempt.
const MAX_PAUSE: Duration = Duration::from_secs(4 * 3600);

/// Time beyond the timeout of an attempt after which its delivery is due again.
const LEASE_ALLOWANCE: Duration = Duration::from_secs(10);

/// Maximum time that attempts in flight get when the server ends.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of bytes at the beginning of an answer that the log of an endpoint shows.
const MAX_ANSWER_BYTES: usize = 256;

/// Event as it is sent.
pub(crate) struct Envelope<'a> {
    pub id: &'a EventId,
    pub event: EventType,
    /// Id of the batch.
    pub subject: &'a str,
    pub created_at: Timestamp,
}

/// Sends an event once. An error is for the tenant.
pub(crate) async fn post(
    service: &WebhookService,
    tenant: &TenantId,
    webhook: &WebhookRecord,
    envelope: &Envelope<'_>,
) -> Result<OutboundAnswer, String> {
    let body = json!({
        "id": envelope.id.as_str(),
        "object": "event",
        "created_at": envelope.created_at.as_seconds(),
        "type": envelope.event.as_str(),
        "data": {"id": envelope.subject},
    })
    .to_string();
    let secrets = service.secrets(tenant, webhook).map_err(|error| {
        tracing::error!(%tenant, webhook = %webhook.id, error, "webhook secret not opened");
        "The secret of the endpoint cannot be used; rotate it.".to_owned()
    })?;
    let at = service.clock.now().as_seconds();
    let secrets = secrets.iter().map(String::as_str);
    let signed = signature(secrets, (envelope.id.as_str(), at), body.as_bytes());
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in [
        ("webhook-id", envelope.id.to_string()),
        ("webhook-timestamp", at.to_string()),
        ("webhook-signature", signed),
    ] {
        let value = HeaderValue::try_from(value).map_err(|error| error.to_string())?;
        headers.insert(name, value);
    }
    let url = Url::parse(&webhook.url).map_err(|error| error.to_string())?;
    let bounds = (service.config.webhook_timeout.duration(), MAX_ANSWER_BYTES);
    let answer = service.outbound.post(tenant, &url, headers, Bytes::from(body), bounds).await;
    answer.map_err(|error| {
        tracing::debug!(%tenant, webhook = %webhook.id, error = error.detail(), "webhook not sent");
        error.message
    })
}

/// Delivers the events of all tenants.
pub struct Deliverer {
    service: Arc<WebhookService>,
    metrics: WebhookMetrics,
}

/// Attempts in flight, by tenant and endpoint.
type InFlight = HashMap<TenantId, Vec<WebhookId>>;

impl Deliverer {
    /// Creates a deliverer and registers its metrics.
    pub fn new(service: Arc<WebhookService>, metrics: &Metrics) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self { service, metrics: WebhookMetrics::register(metrics)? }))
    }

    /// Delivers until `closing`. Attempts in flight then have a moment to end; what is cut off is
    /// attempted again after the next start.
    pub async fn run(self: Arc<Self>, closing: CancellationToken) {
        let (mut attempts, mut in_flight) = (JoinSet::new(), InFlight::new());
        let mut maintained_at: Option<Instant> = None;
        while !closing.is_cancelled() {
            if maintained_at.is_none_or(|at| at.elapsed() >= MAINTENANCE_INTERVAL) {
                maintained_at = Some(Instant::now());
                self.maintain().await;
            }
            match self.claim(&in_flight).await {
                Ok(claimed) => {
                    for due in claimed {
                        let of_tenant = in_flight.entry(due.tenant.clone()).or_default();
                        of_tenant.push(due.webhook.id.clone());
                        let (deliverer, whose) =
                            (self.clone(), (due.tenant.clone(), due.webhook.id.clone()));
                        attempts.spawn(async move {
                            deliverer.attempt(due).await;
                            whose
                        });
                    }
                }
                Err(error) => tracing::warn!(%error, "due webhook deliveries not read"),
            }
            let pause = async {
                tokio::select! {
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                    Some(ended) = attempts.join_next() => free(&mut in_flight, ended),
                }
                while let Some(ended) = attempts.try_join_next() {
                    free(&mut in_flight, ended);
                }
            };
            if closing.run_until_cancelled(pause).await.is_none() {
                break;
            }
        }
        let rest = async { while attempts.join_next().await.is_some() {} };
        tokio::time::timeout(END_TIMEOUT, rest).await.ok();
    }

    /// Reads the counts for the metrics, and removes old deliveries.
    async fn maintain(&self) {
        let service = &self.service;
        let now = service.clock.now();
        match service.store.webhook_counts().await {
            Ok(counts) => self.metrics.counted(now, counts),
            Err(error) => tracing::warn!(%error, "webhook deliveries not counted"),
        }
        let lifetime = service.config.webhook_delivery_lifetime.duration();
        let before = now.before(lifetime);
        for _ in 0..MAX_PURGES {
            if !matches!(service.store.purge_deliveries(before, PURGE_ROWS).await, Ok(true)) {
                break;
            }
        }
    }

    /// Claims due deliveries for which there is room.
    async fn claim(&self, in_flight: &InFlight) -> batchwright_store::Result<Vec<DueDelivery>> {
        let running: usize = in_flight.values().map(Vec::len).sum();
        let room = MAX_ATTEMPTS.saturating_sub(running);
        let (store, now) = (&self.service.store, self.service.clock.now());
        if room == 0 || store.next_delivery().await?.is_none_or(|next| next > now) {
            return Ok(Vec::new());
        }
        let busy = in_flight
            .iter()
            .flat_map(|(tenant, ids)| ids.iter().map(|id| (tenant.clone(), id.clone())))
            .collect();
        let timeout = self.service.config.webhook_timeout.duration();
        let until = now.after(timeout.saturating_add(LEASE_ALLOWANCE));
        store.claim_deliveries(busy, (room, MAX_OF_TENANT), now, until).await
    }

    /// Makes one attempt, and records its outcome.
    async fn attempt(&self, due: DueDelivery) {
        let service = &self.service;
        let DueDelivery { key, lease, tenant, webhook, delivery } = due;
        let envelope = Envelope {
            id: &delivery.event,
            event: delivery.event_type,
            subject: &delivery.subject,
            created_at: delivery.created_at,
        };
        let began = Instant::now();
        let answer = post(service, &tenant, &webhook, &envelope).await;
        let at = service.clock.now();
        let (status, detail) = match &answer {
            Ok(answer) => {
                let beginning = String::from_utf8_lossy(&answer.beginning);
                (Some(answer.status), printable(&beginning, MAX_ANSWER_BYTES))
            }
            Err(message) => (None, message.clone()),
        };
        let is_delivered = status.is_some_and(|status| (200..300).contains(&status));
        let outcome = match (is_delivered, status) {
            (true, _) => "delivered",
            (false, Some(_)) => "refused",
            (false, None) => "failed",
        };
        self.metrics.attempted(outcome, began.elapsed());
        let retry_time = service.config.webhook_retry_time.duration();
        let is_over = delivery.retry_since.until(at) >= retry_time;
        // The first failure ends a timeout after its attempt began.
        let timeout = service.config.webhook_timeout.duration().saturating_mul(2);
        let began_by = delivery.retry_since.after(timeout);
        let has_failed_long = webhook.failing_since.is_some_and(|since| since <= began_by);
        // 410 means that the receiver is gone for good.
        let disables = !is_delivered && (status == Some(410) || is_over && has_failed_long);
        let next_at = (!is_delivered && !is_over && !disables).then(|| {
            at.after(pause(delivery.attempts)).min(delivery.retry_since.after(retry_time))
        });
        if disables {
            tracing::warn!(%tenant, webhook = %webhook.id, status, "webhook endpoint disabled");
        } else if next_at.is_some() && webhook.failing_since.is_none() {
            // The first failure after a success; the others are in the log of deliveries.
            tracing::warn!(
                %tenant, webhook = %webhook.id, status, "webhook endpoint fails, will be retried"
            );
        } else if !is_delivered {
            tracing::debug!(%tenant, webhook = %webhook.id, status, "webhook attempt failed");
        }
        let detail = Some(detail).filter(|detail| !detail.is_empty());
        let result = AttemptResult {
            lease,
            webhook_updated_at: webhook.updated_at,
            at,
            status,
            detail,
            is_delivered,
            next_at,
            disables,
        };
        if let Err(error) = service.store.record_attempt(key, result).await {
            // It is attempted again when its lease ends, under the same id.
            tracing::warn!(%tenant, webhook = %webhook.id, %error, "webhook attempt not recorded");
        }
    }
}

/// Frees the place of an attempt that has ended.
fn free(in_flight: &mut InFlight, ended: Result<(TenantId, WebhookId), tokio::task::JoinError>) {
    let Ok((tenant, webhook)) = ended else {
        // An attempt that panicked: which one is not known, so all places are given up, and the
        // leases keep the attempts apart.
        in_flight.clear();
        return;
    };
    if let Some(of_tenant) = in_flight.get_mut(&tenant) {
        of_tenant.retain(|id| *id != webhook);
        if of_tenant.is_empty() {
            in_flight.remove(&tenant);
        }
    }
}

/// Returns the pause after a number of failed attempts, with jitter.
fn pause(attempts: u64) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(31);
    let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(doublings)).min(MAX_PAUSE);
    pause.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_hours() {
        for (attempts, seconds) in [(0, 5.0), (1, 10.0), (5, 160.0), (30, 14_400.0), (99, 14_400.0)]
        {
            let found = pause(attempts).as_secs_f64();
            assert!((seconds * 0.75..seconds * 1.25).contains(&found), "{attempts}: {found}");
        }
    }
}
