//! Limits of a project, and the models that it may use.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Maximum value of a limit: every JSON parser reads an integer of this size exactly.
pub const MAX_LIMIT: u64 = 1_000_000_000_000_000;

/// Maximum lifetime of files and batches, in seconds: a hundred years.
pub const MAX_LIFETIME_SECONDS: u64 = 3_155_760_000;

/// Returns a lifetime in whole seconds, rounded up, so that none becomes 0.
pub fn lifetime_seconds(lifetime: Duration) -> u64 {
    u64::try_from(lifetime.as_millis().div_ceil(1000)).unwrap_or(MAX_LIFETIME_SECONDS)
}

/// Maximum weight of a project.
pub const MAX_WEIGHT: u64 = 1000;

/// Maximum number of models in a rule, and of models with limits.
pub const MAX_RULE_MODELS: usize = 1000;

/// Limit of a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Total size of the stored files, in bytes.
    StoredBytes,
    /// Number of stored files.
    StoredFiles,
    /// Number of batches that have not ended.
    OpenBatches,
    /// Number of requests in a batch.
    RequestsPerBatch,
    /// Number of requests in flight, over all plugins.
    RequestsInFlight,
    /// Weight of the project in the shares of providers.
    Weight,
    /// Lifetime of an input file whose upload sets none, in seconds.
    InputFileLifetime,
    /// Lifetime of an output file whose batch sets none, in seconds; 0 is forever.
    OutputFileLifetime,
    /// Lifetime of an error file whose batch sets none, in seconds; 0 is forever.
    ErrorFileLifetime,
    /// Time that a batch is kept after its end, in seconds.
    BatchLifetime,
}

impl Limit {
    /// All limits, in the order in which people see them.
    pub const ALL: [Self; 10] = [
        Self::StoredBytes,
        Self::StoredFiles,
        Self::OpenBatches,
        Self::RequestsPerBatch,
        Self::RequestsInFlight,
        Self::Weight,
        Self::InputFileLifetime,
        Self::OutputFileLifetime,
        Self::ErrorFileLifetime,
        Self::BatchLifetime,
    ];

    /// Returns the name in the API, in files and in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::StoredBytes => "max_stored_bytes",
            Self::StoredFiles => "max_stored_files",
            Self::OpenBatches => "max_open_batches",
            Self::RequestsPerBatch => "max_requests_per_batch",
            Self::RequestsInFlight => "max_requests_in_flight",
            Self::Weight => "weight",
            Self::InputFileLifetime => "input_file_lifetime_seconds",
            Self::OutputFileLifetime => "output_file_lifetime_seconds",
            Self::ErrorFileLifetime => "error_file_lifetime_seconds",
            Self::BatchLifetime => "batch_lifetime_seconds",
        }
    }

    /// Returns the valid values.
    pub fn range(self) -> RangeInclusive<u64> {
        match self {
            Self::Weight => 1..=MAX_WEIGHT,
            Self::InputFileLifetime | Self::BatchLifetime => 1..=MAX_LIFETIME_SECONDS,
            Self::OutputFileLifetime | Self::ErrorFileLifetime => 0..=MAX_LIFETIME_SECONDS,
            _ => 0..=MAX_LIMIT,
        }
    }
}

/// Limits of a project. None is no limit, or for the own limits of a project, no own value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits([Option<u64>; Limit::ALL.len()]);

impl Limits {
    /// Returns a limit.
    pub fn get(&self, limit: Limit) -> Option<u64> {
        self.0.get(limit as usize).copied().flatten()
    }

    /// Returns a lifetime; none is forever.
    pub fn lifetime(&self, limit: Limit) -> Option<Duration> {
        self.get(limit).filter(|seconds| *seconds > 0).map(Duration::from_secs)
    }

    /// Returns the limits with another value.
    #[must_use]
    pub fn with(mut self, limit: Limit, value: Option<u64>) -> Self {
        if let Some(found) = self.0.get_mut(limit as usize) {
            *found = value;
        }
        self
    }
}

/// Limits of a project for one model. None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelLimits {
    /// Requests that begin in a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens of the requests that begin in a minute.
    pub tokens_per_minute: Option<u64>,
    /// Requests in a day (UTC).
    pub requests_per_day: Option<u64>,
    /// Input tokens of the requests that open batches have not finished.
    pub enqueued_tokens: Option<u64>,
}

/// Limit of a project for one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ModelLimit {
    /// Requests that begin in a minute.
    RequestsPerMinute,
    /// Tokens of the requests that begin in a minute.
    TokensPerMinute,
    /// Requests in a day.
    RequestsPerDay,
    /// Input tokens that open batches have not used.
    EnqueuedTokens,
}

impl ModelLimit {
    /// All limits of a model.
    pub const ALL: [Self; 4] = [
        Self::RequestsPerMinute,
        Self::TokensPerMinute,
        Self::RequestsPerDay,
        Self::EnqueuedTokens,
    ];

    /// Returns the name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "max_requests_per_1_minute",
            Self::TokensPerMinute => "max_tokens_per_1_minute",
            Self::RequestsPerDay => "max_requests_per_1_day",
            Self::EnqueuedTokens => "batch_1_day_max_input_tokens",
        }
    }
}

impl ModelLimits {
    /// Returns a limit.
    pub fn get(&self, limit: ModelLimit) -> Option<u64> {
        match limit {
            ModelLimit::RequestsPerMinute => self.requests_per_minute,
            ModelLimit::TokensPerMinute => self.tokens_per_minute,
            ModelLimit::RequestsPerDay => self.requests_per_day,
            ModelLimit::EnqueuedTokens => self.enqueued_tokens,
        }
    }

    /// Changes a limit.
    pub fn set(&mut self, limit: ModelLimit, value: Option<u64>) {
        *match limit {
            ModelLimit::RequestsPerMinute => &mut self.requests_per_minute,
            ModelLimit::TokensPerMinute => &mut self.tokens_per_minute,
            ModelLimit::RequestsPerDay => &mut self.requests_per_day,
            ModelLimit::EnqueuedTokens => &mut self.enqueued_tokens,
        } = value;
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

/// Kind of names that a project may be confined to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowed {
    /// Adapters whose models the project may use.
    Plugins,
    /// Validators that judge the requests of the project.
    Validators,
    /// Completion windows of the project's batches.
    CompletionWindows,
}

impl Allowed {
    /// All kinds, in the order in which people see them.
    pub const ALL: [Self; 3] = [Self::Plugins, Self::Validators, Self::CompletionWindows];

    /// Returns the name in the API, in files and in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plugins => "allowed_plugins",
            Self::Validators => "allowed_validators",
            Self::CompletionWindows => "allowed_completion_windows",
        }
    }
}

/// What a project may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Models.
    pub models: ModelRule,
    /// Names of each kind; none allows all.
    lists: [Option<BTreeSet<String>>; Allowed::ALL.len()],
}

impl From<ModelRule> for Permissions {
    fn from(models: ModelRule) -> Self {
        Self { models, ..Self::default() }
    }
}

impl Permissions {
    /// Returns the names of a kind; none if all are allowed.
    pub fn list(&self, kind: Allowed) -> Option<&BTreeSet<String>> {
        self.lists.get(kind as usize)?.as_ref()
    }

    /// Returns the permissions with other names of a kind.
    #[must_use]
    pub fn with(mut self, kind: Allowed, names: Option<BTreeSet<String>>) -> Self {
        if let Some(found) = self.lists.get_mut(kind as usize) {
            *found = names;
        }
        self
    }

    /// Returns true if a name of a kind is allowed.
    pub fn allows(&self, kind: Allowed, name: &str) -> bool {
        self.list(kind).is_none_or(|names| names.contains(name))
    }

    /// Returns true if a request may use a model of a plugin, given the name that the request has
    /// and the name that the provider knows.
    pub fn allows_model(&self, plugin: &str, name: &str, at_provider: &str) -> bool {
        self.allows(Allowed::Plugins, plugin) && self.models.allows(name, at_provider)
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
    fn project_without_a_list_may_use_all_and_one_with_a_list_no_other() {
        let names = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let all = Permissions::default();
        assert!(Allowed::ALL.iter().all(|kind| all.allows(*kind, "x")));
        let some = all.with(Allowed::Plugins, names(&["p"])).with(Allowed::Validators, names(&[]));
        assert!(some.allows_model("p", "m", "m") && !some.allows_model("q", "m", "m"));
        assert!(!some.allows(Allowed::Validators, "x"));
        assert!(some.allows(Allowed::CompletionWindows, "24h"));
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
