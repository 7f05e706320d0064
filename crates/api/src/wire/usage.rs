//! Reports of usage and costs, with the names of the official SDKs.

use std::collections::BTreeMap;

use batchwright_domain::money::Money;
use batchwright_domain::usage::UsageKind;
use batchwright_store::usage::{UsageCounts, UsageRow};
use serde::Serialize;
use utoipa::ToSchema;

/// Page of usage.
#[derive(Serialize, ToSchema)]
pub(crate) struct UsageBuckets {
    #[schema(pattern = "^page$")]
    object: &'static str,
    data: Vec<Bucket>,
    has_more: bool,
    #[schema(required)]
    next_page: Option<String>,
}

impl UsageBuckets {
    /// Creates a page.
    pub(crate) fn new(data: Vec<Bucket>, next_page: Option<String>) -> Self {
        Self { object: "page", data, has_more: next_page.is_some(), next_page }
    }
}

/// Usage of a span of time.
#[derive(Serialize, ToSchema)]
pub(crate) struct Bucket {
    #[schema(pattern = "^bucket$")]
    object: &'static str,
    start_time: i64,
    end_time: i64,
    results: Vec<UsageResult>,
}

/// Usage of a group. What the report is not grouped by is null.
#[derive(Serialize, ToSchema)]
struct UsageResult {
    #[schema(pattern = "^organization.usage.(completions|embeddings|moderations).result$")]
    object: &'static str,
    input_tokens: u64,
    /// Cached input tokens; for completions alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    input_cached_tokens: Option<u64>,
    /// Output tokens; for completions alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    output_tokens: Option<u64>,
    num_model_requests: u64,
    #[schema(required)]
    project_id: Option<String>,
    #[schema(required)]
    api_key_id: Option<String>,
    #[schema(required)]
    model: Option<String>,
    #[schema(required)]
    batch: Option<bool>,
}

impl Bucket {
    /// Creates a bucket from its rows.
    pub(crate) fn new(start: i64, end: i64, rows: Vec<UsageRow>, kind: UsageKind) -> Self {
        let of_completions = |number| (kind == UsageKind::Completions).then_some(number);
        let result = |row: UsageRow| UsageResult {
            object: match kind {
                UsageKind::Completions => "organization.usage.completions.result",
                UsageKind::Embeddings => "organization.usage.embeddings.result",
                UsageKind::Moderations => "organization.usage.moderations.result",
            },
            input_tokens: row.counts.tokens.input,
            input_cached_tokens: of_completions(row.counts.tokens.cached_input),
            output_tokens: of_completions(row.counts.tokens.output),
            num_model_requests: row.counts.requests,
            project_id: row.project.map(|id| id.to_string()),
            api_key_id: row.key.map(|id| id.to_string()),
            model: row.model,
            batch: row.is_batch,
        };
        let results = rows.into_iter().map(result).collect();
        Self { object: "bucket", start_time: start, end_time: end, results }
    }
}

/// Page of costs.
#[derive(Serialize, ToSchema)]
pub(crate) struct CostPage {
    #[schema(pattern = "^page$")]
    object: &'static str,
    data: Vec<CostBucket>,
    has_more: bool,
    #[schema(required)]
    next_page: Option<String>,
}

impl CostPage {
    /// Creates a page.
    pub(crate) fn new(data: Vec<CostBucket>, next_page: Option<String>) -> Self {
        Self { object: "page", data, has_more: next_page.is_some(), next_page }
    }
}

/// Costs of a day.
#[derive(Serialize, ToSchema)]
pub(crate) struct CostBucket {
    #[schema(pattern = "^bucket$")]
    object: &'static str,
    start_time: i64,
    end_time: i64,
    results: Vec<CostResult>,
}

/// Costs of a group. What the report is not grouped by is null.
#[derive(Serialize, ToSchema)]
struct CostResult {
    #[schema(pattern = "^organization.costs.result$")]
    object: &'static str,
    amount: CostAmount,
    /// Model and kind of tokens, such as `gpt-4o, input_tokens`.
    #[schema(required)]
    line_item: Option<String>,
    /// Tokens of the line item.
    #[schema(required)]
    quantity: Option<u64>,
    #[schema(required, pattern = "^tokens$")]
    quantity_unit: Option<&'static str>,
    #[schema(required)]
    project_id: Option<String>,
    #[schema(required)]
    api_key_id: Option<String>,
    /// Requests whose model has no price: their cost is unknown and not in the amount. The OpenAI
    /// API does not have it.
    unpriced_requests: u64,
}

#[derive(Serialize, ToSchema)]
struct CostAmount {
    /// Dollars.
    value: f64,
    #[schema(pattern = "^usd$")]
    currency: &'static str,
}

/// What costs are grouped by, and the line items that a report has; none selects all.
pub(crate) struct CostGroups {
    pub project: bool,
    pub key: bool,
    pub item: bool,
    pub items: Vec<String>,
}

/// Sum of a group of costs.
#[derive(Default)]
struct CostSum {
    amount: Money,
    tokens: u64,
    unpriced: u64,
}

/// Project, key and line item of a group.
type CostGroup = (Option<String>, Option<String>, Option<String>);

impl CostBucket {
    /// Creates a bucket from its rows.
    pub(crate) fn new(start: i64, end: i64, rows: Vec<UsageRow>, groups: &CostGroups) -> Self {
        let mut sums = BTreeMap::<CostGroup, CostSum>::new();
        for row in rows {
            let model = row.model.unwrap_or_default();
            let (project, key) =
                (row.project.map(|id| id.to_string()), row.key.map(|id| id.to_string()));
            for (kind, amount, tokens) in items(&row.counts) {
                let item = format!("{model}, {kind}");
                if !groups.items.is_empty() && !groups.items.contains(&item) {
                    continue;
                }
                let group = (project.clone(), key.clone(), groups.item.then_some(item));
                let sum = sums.entry(group).or_default();
                sum.amount = sum.amount.plus(amount);
                sum.tokens = sum.tokens.saturating_add(tokens);
                // Each request counts once.
                if kind == INPUT_TOKENS {
                    sum.unpriced = sum.unpriced.saturating_add(row.counts.unpriced);
                }
            }
        }
        let results = sums.into_iter().map(|((project_id, api_key_id, line_item), sum)| {
            let has_item = line_item.is_some();
            CostResult {
                object: "organization.costs.result",
                amount: CostAmount { value: sum.amount.dollars(), currency: "usd" },
                line_item,
                quantity: has_item.then_some(sum.tokens),
                quantity_unit: has_item.then_some("tokens"),
                project_id,
                api_key_id,
                unpriced_requests: sum.unpriced,
            }
        });
        let results = results.collect();
        Self { object: "bucket", start_time: start, end_time: end, results }
    }
}

const INPUT_TOKENS: &str = "input_tokens";

/// Returns the line items of a model: kind of tokens, cost and number.
fn items(counts: &UsageCounts) -> [(&'static str, Money, u64); 3] {
    let tokens = counts.tokens;
    [
        (INPUT_TOKENS, counts.cost.input, tokens.input.saturating_sub(tokens.cached_input)),
        ("cached_input_tokens", counts.cost.cached_input, tokens.cached_input),
        ("output_tokens", counts.cost.output, tokens.output),
    ]
}
