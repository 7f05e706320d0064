//! Usage of projects: counts of requests, tokens and money by time, and how they are asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{KeyId, ProjectId, TenantId};
use batchwright_domain::money::{Cost, Money};
use batchwright_domain::usage::{TokenUsage, UsageKind};

/// What a tenant has used of its budget and of its limits per day.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meters {
    /// Money spent in this month (UTC).
    pub spent: Money,
    /// Requests of this day (UTC), by models with a limit per day.
    pub requests_today: BTreeMap<String, u64>,
}

/// Counts of usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageCounts {
    /// Requests that a model answered.
    pub requests: u64,
    /// Tokens.
    pub tokens: TokenUsage,
    /// Cost of the tokens.
    pub cost: Cost,
    /// Requests whose model had no price, so that their cost is unknown.
    pub unpriced: u64,
}

/// Selection and grouping of usage. An empty list selects everything.
#[derive(Clone, Debug)]
pub struct UsageQuery {
    /// Tenant whose usage alone may be seen; none sees all.
    pub tenant: Option<TenantId>,
    /// Kind of requests.
    pub kind: Option<UsageKind>,
    /// Beginning of the first bucket.
    pub from: Timestamp,
    /// End of the last bucket.
    pub before: Timestamp,
    /// Width of a bucket: whole minutes.
    pub width: Duration,
    /// Projects.
    pub projects: Vec<ProjectId>,
    /// Keys.
    pub keys: Vec<KeyId>,
    /// Models.
    pub models: Vec<String>,
    /// Requests of batches alone, or other requests alone.
    pub is_batch: Option<bool>,
    /// What the counts are grouped by.
    pub group: UsageGroups,
    /// Maximum number of rows.
    pub max_rows: usize,
}

/// What counts of usage are grouped by, besides the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageGroups {
    /// Project.
    pub project: bool,
    /// Key.
    pub key: bool,
    /// Model.
    pub model: bool,
    /// Batch or not.
    pub batch: bool,
}

/// Counts of a bucket and a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// Beginning of the bucket.
    pub start: Timestamp,
    /// Project, if grouped by it.
    pub project: Option<ProjectId>,
    /// Key, if grouped by it and if there was one.
    pub key: Option<KeyId>,
    /// Model, if grouped by it.
    pub model: Option<String>,
    /// True for requests of batches, if grouped by it.
    pub is_batch: Option<bool>,
    /// Counts.
    pub counts: UsageCounts,
}

/// Rows of usage, in the order of their buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsagePage {
    /// Rows of complete buckets.
    pub rows: Vec<UsageRow>,
    /// False if there are buckets after those of the rows.
    pub is_whole: bool,
}
