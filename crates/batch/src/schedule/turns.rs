//! Turns of tenants: which tenant's batch has the next place of a lane.
//!
//! **Problem.** If the batch that has waited longest is next, a tenant with a thousand batches
//! makes everybody else wait for a thousand turns.
//!
//! **Virtual time.** Each resource (validation, finishing, each plugin) counts virtual time, and so
//! does each tenant that uses it (start-time fair queueing). A turn begins at the tenant's time, or
//! at the resource's if the tenant was away, and moves the tenant ahead by one turn divided by its
//! weight. The tenant that is least ahead is next. A tenant that comes back is never behind, so it
//! saves up nothing.

use std::collections::{BTreeSet, HashMap};

use batchwright_domain::ids::TenantId;
use batchwright_store::Lane;

/// Length of a turn of a tenant with the weight 1, in virtual time.
const TURN: u64 = 1_000_000;

/// Virtual times of all resources.
#[derive(Default)]
pub(crate) struct Turns {
    validation: Times,
    finishing: Times,
    plugins: HashMap<String, Times>,
    /// Weights other than 1.
    weights: HashMap<TenantId, u32>,
}

/// Virtual time of a resource, and of the tenants that are ahead of it.
#[derive(Default)]
struct Times {
    now: u64,
    tenants: HashMap<TenantId, u64>,
}

impl Turns {
    /// Takes over the weight of a tenant.
    pub(crate) fn set_weight(&mut self, tenant: &TenantId, weight: u32) {
        match weight {
            0 | 1 => drop(self.weights.remove(tenant)),
            weight => drop(self.weights.insert(tenant.clone(), weight)),
        }
    }

    /// Returns how far a tenant is ahead of its share of a lane.
    pub(crate) fn lead(&self, tenant: &TenantId, lane: &Lane) -> u64 {
        match lane {
            Lane::Validate => self.validation.lead(tenant),
            Lane::Finish | Lane::Admit => self.finishing.lead(tenant),
            Lane::Execute(plugins) => self.lead_at(tenant, plugins),
        }
    }

    /// Returns how far a tenant is ahead of its share of the plugins of a batch.
    pub(crate) fn lead_at(&self, tenant: &TenantId, plugins: &BTreeSet<String>) -> u64 {
        let times = plugins.iter().filter_map(|plugin| self.plugins.get(plugin));
        times.map(|times| times.lead(tenant)).max().unwrap_or(0)
    }

    /// Counts a turn of a tenant in a lane.
    pub(crate) fn count(&mut self, tenant: &TenantId, lane: &Lane) {
        let weight = self.weights.get(tenant).copied().unwrap_or(1).max(1);
        let turn = TURN / u64::from(weight);
        match lane {
            Lane::Validate => self.validation.count(tenant, turn),
            Lane::Finish | Lane::Admit => self.finishing.count(tenant, turn),
            Lane::Execute(plugins) => {
                for plugin in plugins {
                    self.plugins.entry(plugin.clone()).or_default().count(tenant, turn);
                }
            }
        }
    }
}

impl Times {
    /// Returns how far a tenant is ahead.
    fn lead(&self, tenant: &TenantId) -> u64 {
        self.tenants.get(tenant).map_or(0, |time| time.saturating_sub(self.now))
    }

    /// Moves a tenant ahead by a turn.
    fn count(&mut self, tenant: &TenantId, turn: u64) {
        let start = self.tenants.get(tenant).copied().unwrap_or(0).max(self.now);
        self.now = start;
        self.tenants.retain(|_, time| *time > start);
        self.tenants.insert(tenant.clone(), start.saturating_add(turn));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Gives turns to the tenant that is least ahead, in the order of the list if equal.
    fn give(turns: &mut Turns, waiting: &[&str], number: usize) -> BTreeMap<String, usize> {
        let lane = Lane::Execute(["p".to_owned()].into());
        let mut given = BTreeMap::new();
        for _ in 0..number {
            let next = waiting.iter().min_by_key(|name| turns.lead(&(**name).into(), &lane));
            let next = *next.unwrap();
            turns.count(&next.into(), &lane);
            *given.entry(next.to_owned()).or_default() += 1;
        }
        given
    }

    #[test]
    fn turns_are_shared_by_weight() {
        let mut turns = Turns::default();
        turns.set_weight(&"b".into(), 3);
        let given = give(&mut turns, &["a", "b", "c"], 500);
        assert_eq!(
            given,
            [("a", 100), ("b", 300), ("c", 100)].map(|(name, number)| (name.into(), number)).into()
        );
        turns.set_weight(&"b".into(), 1);
        let given = give(&mut turns, &["a", "b"], 100);
        assert!((48..=52).contains(&given["a"]), "{given:?}");
    }

    #[test]
    fn tenant_that_comes_back_has_no_savings_and_is_next() {
        let mut turns = Turns::default();
        give(&mut turns, &["greedy"], 1000);
        let given = give(&mut turns, &["greedy", "modest"], 2);
        assert_eq!(given["modest"], 1);
        let given = give(&mut turns, &["greedy", "modest"], 100);
        assert_eq!(given["modest"], 50);
        assert!(turns.plugins.values().all(|times| times.tenants.len() <= 2));
    }

    #[test]
    fn plugins_have_turns_of_their_own() {
        let mut turns = Turns::default();
        let lane =
            |names: &[&str]| Lane::Execute(names.iter().map(|name| (*name).into()).collect());
        let tenant = "t".into();
        turns.count(&tenant, &lane(&["busy"]));
        turns.count(&tenant, &lane(&["busy"]));
        turns.count(&"other".into(), &lane(&["busy"]));
        assert_eq!(turns.lead(&tenant, &lane(&["idle"])), 0);
        assert_eq!(turns.lead(&tenant, &Lane::Validate), 0);
        assert_eq!(turns.lead(&tenant, &lane(&["busy"])), TURN);
        assert_eq!(turns.lead(&tenant, &lane(&["busy", "idle"])), TURN);
    }
}
