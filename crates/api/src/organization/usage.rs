//! `/organization/usage/…` and `/organization/costs`: reports by time and group.
//!
//! An admin key reads the usage of all projects, and the key of a project with the scope
//! `api.usage.read` that of its own.

use std::ops::RangeInclusive;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use batchwright_domain::usage::UsageKind;
use batchwright_store::usage::{UsageGroups, UsagePage, UsageQuery, UsageRow};

use super::Administration;
use crate::auth::UsageReader;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::params::missing_parameter;
use crate::query_params::QueryParams;
use crate::wire::usage::{Bucket, CostBucket, CostGroups, CostPage, UsageBuckets};

/// Maximum number of rows of a report; a page ends at a whole bucket before.
const MAX_ROWS: usize = 10_000;

/// Maximum number of values of a filter.
const MAX_FILTER_VALUES: usize = 100;

/// Prefix of the cursor of a page; the time of its first bucket follows.
const PAGE_PREFIX: &str = "page_";

/// Width of a bucket, with the number of buckets of a page.
struct Width {
    name: &'static str,
    seconds: i64,
    default: u64,
    range: RangeInclusive<u64>,
}

const DAY: Width = Width { name: "1d", seconds: 86_400, default: 7, range: 1..=31 };
const WIDTHS: [Width; 3] = [
    DAY,
    Width { name: "1h", seconds: 3600, default: 24, range: 1..=168 },
    Width { name: "1m", seconds: 60, default: 60, range: 1..=1440 },
];
const COST_WIDTHS: [Width; 1] = [Width { range: 1..=180, ..DAY }];

macro_rules! usage_routes {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ident, $path:literal;)+) => {$(
        $(#[doc = $doc])+
        ///
        /// A request counts once, whatever its attempts, in the minute of its result. Times are in
        /// seconds since 1970 and buckets begin at whole minutes, hours or days (UTC). Usage of
        /// more than a week ago is kept by hour.
        #[utoipa::path(get, path = $path, tag = "Organization",
            params(
                ("start_time" = i64, Query, minimum = 0, maximum = 100000000000i64,
                    description = "Beginning of the report"),
                ("end_time" = Option<i64>, Query, minimum = 0, maximum = 100000000000i64,
                    description = "End of the report; now if absent"),
                ("bucket_width" = Option<String>, Query, pattern = "^(1m|1h|1d)?$",
                    description = "Width of a bucket; 1d if absent"),
                ("limit" = Option<u32>, Query, minimum = 1, maximum = 31,
                    description = "Maximum number of buckets: up to 31 by day (7 if absent), \
                        168 by hour (24), 1440 by minute (60)"),
                ("page" = Option<String>, Query, description = "`next_page` of the page before"),
                ("group_by" = Option<Vec<String>>, Query,
                    description = "`project_id`, `api_key_id`, `model` and `batch`"),
                ("project_ids" = Option<Vec<String>>, Query, description = "Projects"),
                ("api_key_ids" = Option<Vec<String>>, Query, description = "API keys"),
                ("models" = Option<Vec<String>>, Query,
                    description = "Models, as their providers know them"),
                ("batch" = Option<bool>, Query,
                    description = "Requests of batches alone, or other requests alone"),
            ),
            responses((status = 200, body = UsageBuckets, description = "Page of usage"), Errors))]
        pub(crate) async fn $name(
            State(organization): Administration,
            reader: UsageReader,
            query: QueryParams,
        ) -> Result<Json<UsageBuckets>, ApiError> {
            report(&organization, &reader, &query, UsageKind::$kind).await
        }
    )+};
}

usage_routes! {
    /// Returns the usage of chat completions, completions and responses
    completions: Completions, "/organization/usage/completions";
    /// Returns the usage of embeddings
    embeddings: Embeddings, "/organization/usage/embeddings";
    /// Returns the usage of moderations
    moderations: Moderations, "/organization/usage/moderations";
}

async fn report(
    organization: &super::Organization,
    reader: &UsageReader,
    params: &QueryParams,
    kind: UsageKind,
) -> Result<Json<UsageBuckets>, ApiError> {
    let names = groups(params, &["project_id", "api_key_id", "model", "batch"])?;
    let has = |name: &str| names.iter().any(|given| given == name);
    let group = UsageGroups {
        project: has("project_id"),
        key: has("api_key_id"),
        model: has("model"),
        batch: has("batch"),
    };
    let span = Span::read(params, organization.clock.now(), &WIDTHS)?;
    let models = params.texts("models", MAX_FILTER_VALUES)?;
    let mut query = query(params, reader, &span, group)?;
    query.kind = Some(kind);
    query.models = models;
    query.is_batch = params.boolean("batch")?;
    let (buckets, next_page) = span.buckets(organization.accounts.usage(query).await?)?;
    let buckets = buckets.into_iter().map(|(start, end, rows)| Bucket::new(start, end, rows, kind));
    Ok(Json(UsageBuckets::new(buckets.collect(), next_page)))
}

/// Returns the costs of all requests, from the prices of the server's settings
///
/// The cost of a request whose model had no price is unknown: `unpriced_requests` counts them.
#[utoipa::path(get, path = "/organization/costs", tag = "Organization",
    params(
        ("start_time" = i64, Query, minimum = 0, maximum = 100000000000i64,
                    description = "Beginning of the report"),
        ("end_time" = Option<i64>, Query, minimum = 0, maximum = 100000000000i64,
                    description = "End of the report; now if absent"),
        ("bucket_width" = Option<String>, Query, pattern = "^(1d)?$",
            description = "Width of a bucket: 1d"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 180,
            description = "Maximum number of buckets; 7 if absent"),
        ("page" = Option<String>, Query, description = "`next_page` of the page before"),
        ("group_by" = Option<Vec<String>>, Query,
            description = "`project_id`, `api_key_id` and `line_item`"),
        ("project_ids" = Option<Vec<String>>, Query, description = "Projects"),
        ("api_key_ids" = Option<Vec<String>>, Query, description = "API keys"),
        ("line_items" = Option<Vec<String>>, Query,
            description = "Line items, such as `gpt-4o, input_tokens`"),
    ),
    responses((status = 200, body = CostPage, description = "Page of costs"), Errors))]
pub(crate) async fn costs(
    State(organization): Administration,
    reader: UsageReader,
    params: QueryParams,
) -> Result<Json<CostPage>, ApiError> {
    let names = groups(&params, &["project_id", "api_key_id", "line_item"])?;
    let has = |name: &str| names.iter().any(|given| given == name);
    let items = params.texts("line_items", MAX_FILTER_VALUES)?;
    let shown = CostGroups {
        project: has("project_id"),
        key: has("api_key_id"),
        item: has("line_item"),
        items,
    };
    let group = UsageGroups {
        project: shown.project,
        key: shown.key,
        model: shown.item || !shown.items.is_empty(),
        batch: false,
    };
    let span = Span::read(&params, organization.clock.now(), &COST_WIDTHS)?;
    let query = query(&params, &reader, &span, group)?;
    let (buckets, next_page) = span.buckets(organization.accounts.usage(query).await?)?;
    let buckets =
        buckets.into_iter().map(|(start, end, rows)| CostBucket::new(start, end, rows, &shown));
    Ok(Json(CostPage::new(buckets.collect(), next_page)))
}

/// Reads the filters that usage and costs share.
fn query(
    params: &QueryParams,
    reader: &UsageReader,
    span: &Span,
    group: UsageGroups,
) -> Result<UsageQuery, ApiError> {
    for name in ["user_ids", "service_tiers", "api_sources"] {
        if params.has(name) {
            let message = format!("This server does not filter usage by '{name}'.");
            return Err(ApiError::invalid(name, ErrorCode::InvalidValue, message));
        }
    }
    let texts = |name| params.texts(name, MAX_FILTER_VALUES);
    Ok(UsageQuery {
        tenant: reader.tenant.clone(),
        kind: None,
        from: Timestamp::from_millis(span.from.saturating_mul(1000)),
        before: Timestamp::from_millis(span.before.saturating_mul(1000)),
        width: Duration::from_secs(span.width.unsigned_abs()),
        projects: texts("project_ids")?.into_iter().map(Into::into).collect(),
        keys: texts("api_key_ids")?.into_iter().map(Into::into).collect(),
        models: Vec::new(),
        is_batch: None,
        group,
        max_rows: MAX_ROWS,
    })
}

fn groups(params: &QueryParams, known: &[&str]) -> Result<Vec<String>, ApiError> {
    let names = params.texts("group_by", MAX_FILTER_VALUES)?;
    match names.iter().find(|name| !known.contains(&name.as_str())) {
        None => Ok(names),
        Some(unknown) => {
            let message = format!(
                "Invalid value: '{}'. Supported values are: '{}'. The parameter is 'group_by'.",
                truncate_for_message(unknown),
                known.join("', '")
            );
            Err(ApiError::invalid("group_by", ErrorCode::InvalidValue, message))
        }
    }
}

/// Times of a page, in seconds since 1970.
struct Span {
    from: i64,
    before: i64,
    width: i64,
    /// End of the whole report.
    end: i64,
}

/// Bucket with its beginning, its end and its rows.
type Rows = (i64, i64, Vec<UsageRow>);

impl Span {
    fn read(params: &QueryParams, now: Timestamp, widths: &[Width]) -> Result<Self, ApiError> {
        let invalid = |name: &str, message: String| {
            Err(ApiError::invalid(name, ErrorCode::InvalidValue, message))
        };
        let name = params.text("bucket_width").unwrap_or_else(|| DAY.name.to_owned());
        let Some(width) = widths.iter().find(|width| width.name == name) else {
            let known: Vec<_> = widths.iter().map(|width| width.name).collect();
            let known = known.join("', '");
            let message = format!("Invalid 'bucket_width'. Supported values are: '{known}'.");
            return invalid("bucket_width", message);
        };
        let limit = params.limit(width.range.clone(), width.default)?;
        let start = params.seconds("start_time")?.ok_or_else(|| missing_parameter("start_time"))?;
        let end = params.seconds("end_time")?.unwrap_or(now.as_seconds().saturating_add(1));
        let times = 0..=MAX_SECONDS;
        for (name, time) in [("start_time", start), ("end_time", end)] {
            if !times.contains(&time) {
                let message = format!("Invalid '{name}': expected 0 to {MAX_SECONDS}.");
                return invalid(name, message);
            }
        }
        let first = match params.text("page") {
            None => start,
            Some(page) => {
                let time = page.strip_prefix(PAGE_PREFIX).and_then(|time| time.parse().ok());
                match time {
                    Some(time) if (start..end.max(start)).contains(&time) => time,
                    _ => return invalid("page", "Invalid 'page': expected 'next_page'.".into()),
                }
            }
        };
        let from = first.saturating_sub(first.rem_euclid(width.seconds));
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let last = from.saturating_add(width.seconds.saturating_mul(limit));
        Ok(Self { from, before: last.min(end), width: width.seconds, end })
    }

    /// Splits rows into buckets, empty ones included; returns the cursor of the next page too.
    fn buckets(&self, page: UsagePage) -> Result<(Vec<Rows>, Option<String>), ApiError> {
        let mut rows = page.rows.into_iter().peekable();
        let last = match page.is_whole {
            true => None,
            false => {
                let last = rows.clone().last().map(|row| row.start.as_seconds());
                Some(last.ok_or_else(|| {
                    ApiError::bad_request(format!(
                        "A bucket has more than {MAX_ROWS} groups; choose a smaller \
                         'bucket_width', fewer groups, or a filter."
                    ))
                })?)
            }
        };
        let (mut buckets, mut start) = (Vec::new(), self.from);
        while start < self.before && last.is_none_or(|last| start <= last) {
            let next = start.saturating_add(self.width);
            let mut of_bucket = Vec::new();
            while let Some(row) = rows.next_if(|row| row.start.as_seconds() < next) {
                of_bucket.push(row);
            }
            buckets.push((start, next, of_bucket));
            start = next;
        }
        let next_page = (start < self.end).then(|| format!("{PAGE_PREFIX}{start}"));
        Ok((buckets, next_page))
    }
}

/// Maximum time of a report: the year 5138.
const MAX_SECONDS: i64 = 100_000_000_000;
