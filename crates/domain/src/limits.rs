//! Limits of a project, and the models that it may use.

use std::collections::BTreeSet;

/// Maximum value of a limit: every JSON parser reads an integer of this size exactly.
pub const MAX_LIMIT: u64 = 1_000_000_000_000_000;

/// Maximum number of models in a rule.
pub const MAX_RULE_MODELS: usize = 1000;

/// Limits of a project. None is no limit, or for the own limits of a project, no own value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Total size of the stored files, in bytes.
    pub max_stored_bytes: Option<u64>,
    /// Number of stored files.
    pub max_stored_files: Option<u64>,
    /// Number of batches that have not ended.
    pub max_open_batches: Option<u64>,
    /// Number of requests in a batch.
    pub max_requests_per_batch: Option<u64>,
}

impl Limits {
    /// Names of the limits, as the API and the command line have them.
    pub const NAMES: [&str; 4] =
        ["max_stored_bytes", "max_stored_files", "max_open_batches", "max_requests_per_batch"];

    /// Returns the limits with their names.
    pub fn named(&self) -> [(&'static str, Option<u64>); 4] {
        let [bytes, files, batches, requests] = Self::NAMES;
        [
            (bytes, self.max_stored_bytes),
            (files, self.max_stored_files),
            (batches, self.max_open_batches),
            (requests, self.max_requests_per_batch),
        ]
    }
}

/// Models that a project may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRule {
    /// The listed models alone.
    Allow(BTreeSet<String>),
    /// Every model but the listed ones.
    Deny(BTreeSet<String>),
}

impl Default for ModelRule {
    fn default() -> Self {
        Self::Deny(BTreeSet::new())
    }
}

impl ModelRule {
    /// Returns true if a request may use a model, given the name that the request has and the name
    /// that the provider knows.
    ///
    /// An alias is allowed if either name is, and denied if either name is, so that an alias opens
    /// nothing that is denied.
    pub fn allows(&self, name: &str, at_provider: &str) -> bool {
        match self {
            Self::Allow(models) => models.contains(name) || models.contains(at_provider),
            Self::Deny(models) => !models.contains(name) && !models.contains(at_provider),
        }
    }

    /// Returns the mode as the API names it, and the models.
    pub fn parts(&self) -> (&'static str, &BTreeSet<String>) {
        match self {
            Self::Allow(models) => ("allow_list", models),
            Self::Deny(models) => ("deny_list", models),
        }
    }

    /// Returns the rule with a mode of the API; none for an unknown mode.
    pub fn from_parts(mode: &str, models: BTreeSet<String>) -> Option<Self> {
        match mode {
            "allow_list" => Some(Self::Allow(models)),
            "deny_list" => Some(Self::Deny(models)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_rule_applies_to_alias_and_provider_name() {
        let models = BTreeSet::from(["big".to_owned()]);
        let (allowed, denied) = (ModelRule::Allow(models.clone()), ModelRule::Deny(models));
        for (name, at_provider, in_list) in
            [("big", "big", true), ("alias", "big", true), ("big", "v2", true), ("s", "s", false)]
        {
            assert_eq!(allowed.allows(name, at_provider), in_list, "{name}");
            assert_eq!(denied.allows(name, at_provider), !in_list, "{name}");
            assert!(ModelRule::default().allows(name, at_provider));
        }
    }

    #[test]
    fn model_rule_has_the_parts_that_it_is_made_of() {
        for rule in [ModelRule::default(), ModelRule::Allow(["a".to_owned()].into())] {
            let (mode, models) = rule.parts();
            assert_eq!(ModelRule::from_parts(mode, models.clone()), Some(rule.clone()));
        }
        assert_eq!(ModelRule::from_parts("all", BTreeSet::new()), None);
    }
}
