//! Registry of circuit breakers: one for each plugin, tenant and endpoint in use.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_plugin::Snapshot;
use batchwright_store::{Claim, Lane, WaitCause};
use tokio::sync::watch;

use crate::config::ExecutionConfig;
use crate::schedule::breaker::{Breaker, FailureKind, Outage, ProbePauses};

/// Prefix of [`BreakerKey::plugin`] for a model that no plugin serves.
pub(crate) const MODEL: &str = "model ";

/// Name shared by all unserved models beyond [`MAX_BREAKERS`].
const OVERFLOW_MODEL: &str = "…";

/// Number of breakers from which unused breakers are evicted.
const MAX_BREAKERS: usize = 1024;

/// Key of a breaker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BreakerKey {
    /// Name of the plugin, or `model ` and the name of a model that no plugin serves.
    pub plugin: String,
    /// Name of the tenant.
    pub tenant: TenantId,
    /// API endpoint of the requests.
    pub endpoint: Endpoint,
}

/// Circuit breakers of a server.
pub(crate) struct Breakers {
    pauses: ProbePauses,
    breakers: Mutex<HashMap<BreakerKey, Arc<Breaker>>>,
    changed: watch::Sender<u64>,
}

impl Breakers {
    /// Creates an empty registry with the pauses from the settings.
    pub(crate) fn new(settings: &ExecutionConfig) -> Self {
        let give_up_after =
            Some(settings.max_outage.duration()).filter(|longest| !longest.is_zero());
        let pauses = ProbePauses {
            first: settings.outage_backoff.duration(),
            longest: settings.max_outage_backoff.duration(),
            give_up_after,
        };
        Self { pauses, breakers: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// Returns the breaker of a plugin, tenant and endpoint, and creates it if necessary.
    pub(crate) fn of(&self, plugin: &str, tenant: &TenantId, endpoint: Endpoint) -> Arc<Breaker> {
        let mut key = BreakerKey { plugin: plugin.to_owned(), tenant: tenant.clone(), endpoint };
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = breakers.get(&key) {
            return found.clone();
        }
        if breakers.len() >= MAX_BREAKERS {
            breakers.retain(|_, breaker| Arc::strong_count(breaker) > 1 || !breaker.is_healthy());
            // Clients choose model names, so models beyond the limit share one breaker.
            if breakers.len() >= MAX_BREAKERS && plugin.starts_with(MODEL) {
                key.plugin = format!("{MODEL}{OVERFLOW_MODEL}");
                return breakers
                    .entry(key)
                    .or_insert_with(|| Arc::new(Breaker::new(self.pauses)))
                    .clone();
            }
        }
        let breaker = Arc::new(Breaker::new(self.pauses));
        breakers.insert(key, breaker.clone());
        breaker
    }

    /// Returns the outages of all open breakers, sorted by plugin and tenant.
    pub(crate) fn list(&self) -> Vec<(BreakerKey, Outage)> {
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<_> = breakers
            .iter()
            .filter_map(|(key, breaker)| Some((key.clone(), breaker.outage()?)))
            .collect();
        drop(breakers);
        found.sort_by(|(one, _), (other, _)| {
            (&one.plugin, &one.tenant).cmp(&(&other.plugin, &other.tenant))
        });
        found
    }

    /// Returns the breakers that the requests of a batch use.
    pub(crate) fn of_batch(&self, claim: &Claim, endpoint: Endpoint) -> Vec<Arc<Breaker>> {
        let Lane::Execute(plugins) = &claim.lane else { return Vec::new() };
        // The outage of an unserved model concerns only the batches that request the model.
        let own = |key: &BreakerKey, breaker: &Breaker| {
            plugins.contains(&key.plugin)
                || (key.plugin.starts_with(MODEL) && breaker.has_waiting(&claim.batch_id))
        };
        let of = |key: &BreakerKey| key.tenant == claim.tenant && key.endpoint == endpoint;
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let found = breakers.iter().filter(|(key, breaker)| of(key) && own(key, breaker));
        found.map(|(_, breaker)| breaker.clone()).collect()
    }

    /// Returns the cause of the wait of a batch, as text for the client, or `None` if no breaker of
    /// the batch is open and `next` is not in the future.
    pub(crate) fn wait_cause(
        &self,
        claim: &Claim,
        endpoint: Endpoint,
        now: Timestamp,
        next: Timestamp,
    ) -> Option<WaitCause> {
        let breakers = self.of_batch(claim, endpoint);
        let outages = breakers.iter().filter_map(|breaker| breaker.outage());
        match outages.min_by_key(|outage| outage.since) {
            Some(outage) => Some(WaitCause {
                cause: outage.trouble.message,
                since: outage.since,
                next: next.max(outage.next_probe),
            }),
            // No breaker is open, so the provider has asked for a delay.
            None => (now < next).then(|| WaitCause {
                cause: "The provider asks to wait.".into(),
                since: now,
                next,
            }),
        }
    }

    /// Closes the breakers of plugins that were unavailable and serve requests again.
    pub(crate) fn plugins_changed(&self, plugins: &Snapshot) {
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, breaker) in &*breakers {
            let outage = breaker.outage();
            let kind = outage.map(|outage| outage.trouble.kind);
            if !matches!(kind, Some(FailureKind::Plugin | FailureKind::Credential)) {
                continue;
            }
            let is_served = match key.plugin.strip_prefix(MODEL) {
                Some(OVERFLOW_MODEL) => true,
                Some(model) => plugins
                    .route(&key.tenant, model)
                    .is_some_and(|route| !route.plugin.routing().paused),
                None => plugins
                    .adapters()
                    .any(|plugin| plugin.name() == key.plugin && !plugin.routing().paused),
            };
            if is_served {
                breaker.close();
                tracing::warn!(
                    plugin = key.plugin,
                    tenant = %key.tenant,
                    endpoint = %key.endpoint,
                    "plugin available, breaker closed"
                );
            }
        }
    }

    /// Notifies waiting batches that an outage has ended or that plugins have changed.
    pub(crate) fn notify(&self) {
        self.changed.send_modify(|number| *number = number.wrapping_add(1));
    }

    /// Returns a receiver that is notified when an outage ends or plugins change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use batchwright_domain::settings::{Given, Section};
    use batchwright_plugin::types::{Answer, Failure};

    use super::*;
    use crate::schedule::breaker::ProviderFailure;

    #[test]
    fn unserved_models_share_one_breaker_beyond_the_limit() {
        let outages = Breakers::new(&ExecutionConfig::read(&mut Given::default()).unwrap());
        for number in 0..MAX_BREAKERS * 3 {
            let breaker =
                outages.of(&format!("{MODEL}{number}"), &"t".into(), Endpoint::ChatCompletions);
            let answer = Answer::Failure(Failure { code: "x".into(), message: "x".into() });
            let trouble = ProviderFailure {
                kind: FailureKind::Plugin,
                message: "gone".into(),
                detail: "gone".into(),
                answer,
            };
            breaker.record_failure(
                Timestamp::from_millis(0),
                number as u64,
                0,
                None,
                trouble,
                true,
            );
        }
        assert_eq!(outages.list().len(), MAX_BREAKERS + 1);
        // The shared breaker closes on any change, because its models are unknown.
        outages.plugins_changed(&Snapshot::default());
        assert_eq!(outages.list().len(), MAX_BREAKERS);
    }
}
