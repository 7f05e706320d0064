//! Limits for models and budgets, with the names of the official SDKs.

use std::collections::BTreeMap;

use batchwright_domain::limits::ModelLimit;
use batchwright_domain::money::Money;
use serde::Serialize;
use utoipa::ToSchema;

use super::Identified;

/// Limits of a project for a model; null is no limit.
#[derive(Serialize, ToSchema)]
pub(crate) struct RateLimit {
    pub id: String,
    #[schema(pattern = "^project.rate_limit$")]
    object: &'static str,
    /// Name of the model as its provider knows it.
    model: String,
    /// Requests that begin within 60 seconds.
    #[schema(required)]
    max_requests_per_1_minute: Option<u64>,
    /// Tokens of requests that begin within 60 seconds.
    #[schema(required)]
    max_tokens_per_1_minute: Option<u64>,
    /// Requests of a day (UTC).
    #[schema(required)]
    max_requests_per_1_day: Option<u64>,
    /// Input tokens of batches that have not ended.
    #[schema(required)]
    batch_1_day_max_input_tokens: Option<u64>,
}

impl Identified for RateLimit {
    fn id(&self) -> &str {
        &self.id
    }
}

impl RateLimit {
    /// Returns the limits for a model.
    pub(crate) fn new(
        id: String,
        model: String,
        limits: &BTreeMap<ModelLimit, Option<u64>>,
    ) -> Self {
        let value = |limit| limits.get(&limit).copied().flatten();
        Self {
            id,
            object: "project.rate_limit",
            model,
            max_requests_per_1_minute: value(ModelLimit::RequestsPerMinute),
            max_tokens_per_1_minute: value(ModelLimit::TokensPerMinute),
            max_requests_per_1_day: value(ModelLimit::RequestsPerDay),
            batch_1_day_max_input_tokens: value(ModelLimit::EnqueuedTokens),
        }
    }
}

/// Budget of a project.
#[derive(Serialize, ToSchema)]
pub(crate) struct SpendLimit {
    #[schema(pattern = "^project.spend_limit$")]
    object: &'static str,
    /// Budget of a month, in cents.
    threshold_amount: u64,
    #[schema(pattern = "^USD$")]
    currency: &'static str,
    #[schema(pattern = "^month$")]
    interval: &'static str,
    enforcement: Enforcement,
    /// Money spent in this month (UTC), in dollars. The OpenAI API does not have it.
    spent: f64,
}

/// State of a budget.
#[derive(Serialize, ToSchema)]
struct Enforcement {
    /// `enforcing` while the budget of the month is spent.
    #[schema(pattern = "^(inactive|enforcing)$")]
    status: &'static str,
}

impl SpendLimit {
    /// Returns a budget in cents, and what is spent.
    pub(crate) fn new(cents: u64, spent: Money) -> Self {
        let is_spent = spent >= Money::from_cents(cents);
        Self {
            object: "project.spend_limit",
            threshold_amount: cents,
            currency: "USD",
            interval: "month",
            enforcement: Enforcement { status: if is_spent { "enforcing" } else { "inactive" } },
            spent: spent.dollars(),
        }
    }
}

/// Confirmation that a project has no budget.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeletedSpendLimit {
    #[schema(pattern = "^project.spend_limit.deleted$")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

impl DeletedSpendLimit {
    /// Returns the confirmation.
    pub(crate) fn new() -> Self {
        Self { object: "project.spend_limit.deleted", deleted: true }
    }
}
