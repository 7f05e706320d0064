//! The breakers of a server: one for each plugin, tenant and endpoint that is in use.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::breaker::{Breaker, Kind, Outage, Pauses};
use crate::config::Settings;
use crate::plugin::Snapshot;
use crate::store::{Claim, Lane};

/// What the name begins with of a breaker for a model that no plugin serves.
pub const MODEL: &str = "model ";

/// What stands for the models that have none of their own.
const OTHERS: &str = "…";

/// Breakers that are kept though nobody uses them.
const KEPT: usize = 1024;

/// What a breaker is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The plugin's name. Of a model that no plugin serves, its name instead.
    pub plugin: String,
    pub tenant: String,
    pub endpoint: String,
}

pub struct Outages {
    pauses: Pauses,
    breakers: Mutex<HashMap<Key, Arc<Breaker>>>,
    changed: watch::Sender<u64>,
}

impl Outages {
    pub fn new(settings: &Settings) -> Self {
        let give_up_after =
            Some(settings.max_outage.duration()).filter(|longest| !longest.is_zero());
        let pauses = Pauses {
            first: settings.outage_backoff.duration(),
            longest: settings.max_outage_backoff.duration(),
            give_up_after,
        };
        Self { pauses, breakers: Mutex::default(), changed: watch::Sender::new(0) }
    }

    pub fn of(&self, plugin: &str, tenant: &str, endpoint: &str) -> Arc<Breaker> {
        let mut key = Key {
            plugin: plugin.to_owned(),
            tenant: tenant.to_owned(),
            endpoint: endpoint.to_owned(),
        };
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = breakers.get(&key) {
            return found.clone();
        }
        if breakers.len() >= KEPT {
            breakers.retain(|_, breaker| Arc::strong_count(breaker) > 1 || !breaker.is_calm());
            // Clients name models: those beyond share a breaker.
            if breakers.len() >= KEPT && plugin.starts_with(MODEL) {
                key.plugin = format!("{MODEL}{OTHERS}");
                return breakers
                    .entry(key)
                    .or_insert_with(|| Arc::new(Breaker::new(self.pauses)))
                    .clone();
            }
        }
        let made = Arc::new(Breaker::new(self.pauses));
        breakers.insert(key, made.clone());
        made
    }

    /// What is the matter now, by plugin.
    pub fn list(&self) -> Vec<(Key, Outage)> {
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

    /// Those that a batch's lines go through.
    pub fn of_batch(&self, claim: &Claim, endpoint: &str) -> Vec<Arc<Breaker>> {
        let Lane::Execute(plugins) = &claim.lane else { return Vec::new() };
        // A model that is gone is the affair of the batches that ask for it alone.
        let own = |key: &Key, breaker: &Breaker| {
            plugins.contains(&key.plugin)
                || (key.plugin.starts_with(MODEL) && breaker.holds(&claim.batch_id))
        };
        let of = |key: &Key| key.tenant == claim.tenant && key.endpoint == endpoint;
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let found = breakers.iter().filter(|(key, breaker)| of(key) && own(key, breaker));
        found.map(|(_, breaker)| breaker.clone()).collect()
    }

    /// Ends what was the matter with plugins that are as they should be now.
    pub fn plugins_changed(&self, plugins: &Snapshot) {
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, breaker) in &*breakers {
            let outage = breaker.outage();
            if outage.is_none_or(|outage| outage.trouble.kind != Kind::Plugin) {
                continue;
            }
            let serves = match key.plugin.strip_prefix(MODEL) {
                Some(OTHERS) => true,
                Some(model) => {
                    plugins.route(&key.tenant, model).is_some_and(|route| !route.plugin.paused)
                }
                None => {
                    plugins.adapters().any(|plugin| plugin.name == key.plugin && !plugin.paused)
                }
            };
            if serves {
                breaker.close();
                tracing::warn!(
                    plugin = key.plugin,
                    tenant = key.tenant,
                    "requests wait no more: the plugin serves again"
                );
            }
        }
    }

    /// Tells those that wait that something is as it was before, or that plugins have changed.
    pub fn tell(&self) {
        self.changed.send_modify(|number| *number = number.wrapping_add(1));
    }

    /// Told whenever an outage ends or plugins change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::breaker::Trouble;
    use crate::clock::Timestamp;
    use crate::config::Given;
    use crate::plugin::types::{Answer, Failure};

    #[test]
    fn clients_that_name_many_models_make_no_more_breakers_than_are_kept() {
        let outages = Outages::new(&Settings::resolve(Given::default(), None).unwrap());
        for number in 0..KEPT * 3 {
            let breaker = outages.of(&format!("{MODEL}{number}"), "t", "/v1/chat/completions");
            let answer = Answer::Failure(Failure { code: "x".into(), message: "x".into() });
            let trouble = Trouble {
                kind: Kind::Plugin,
                message: "gone".into(),
                detail: "gone".into(),
                answer,
            };
            breaker.failed(Timestamp::from_millis(0), number as u64, 0, None, trouble, true);
        }
        assert_eq!(outages.list().len(), KEPT + 1);
        // None of these models is waited for by anybody any more once it is known that plugins have changed.
        outages.plugins_changed(&Snapshot::default());
        assert_eq!(outages.list().len(), KEPT);
    }
}
