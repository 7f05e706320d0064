//! `/organization/audit_logs`

use axum::Json;
use axum::extract::State;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_store::accounts::AuditQuery;

use super::Administration;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::pages::{DEFAULT_PAGE_ENTRIES, PAGE_ENTRIES, page};
use crate::query_params::QueryParams;
use crate::wire::List;
use crate::wire::organization::AuditLog;

/// Maximum number of values of one filter.
const MAX_FILTER_VALUES: usize = 100;

/// Lists the audit log, newest first
///
/// Each change of a project, a service account or a key has one entry: what, by which key, from
/// which address.
#[utoipa::path(get, path = "/organization/audit_logs", tag = "Organization", params(
    ("after" = Option<String>, Query, description = "Id of the last entry of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of entries in the page; 20 if absent"),
    ("event_types[]" = Option<Vec<String>>, Query, description = "Kinds of changes"),
    ("project_ids[]" = Option<Vec<String>>, Query, description = "Projects that were changed"),
    ("actor_ids[]" = Option<Vec<String>>, Query, description = "Admin keys"),
    ("resource_ids[]" = Option<Vec<String>>, Query, description = "Ids of what was changed"),
    ("effective_at[gte]" = Option<i64>, Query,
        description = "First time, in seconds since 1970; likewise gt, lt and lte"),
), responses((status = 200, body = List<AuditLog>, description = "Page of entries"), Errors))]
pub(crate) async fn list(
    State(organization): Administration,
    query: QueryParams,
) -> Result<Json<List<AuditLog>>, ApiError> {
    for name in ["before", "actor_emails", "tenant_only"] {
        if query.has(name) {
            let message = format!("The filter '{name}' is not supported.");
            return Err(ApiError::invalid(name, ErrorCode::UnknownParameter, message));
        }
    }
    let limit = query.limit(PAGE_ENTRIES, DEFAULT_PAGE_ENTRIES)?;
    let next_second = |second: i64| second.saturating_add(1);
    let gt = query.seconds("effective_at[gt]")?.map(next_second);
    let lte = query.seconds("effective_at[lte]")?.map(next_second);
    let (gte, lt) = (query.seconds("effective_at[gte]")?, query.seconds("effective_at[lt]")?);
    let time = |second: i64| Timestamp::from_millis(second.saturating_mul(1000));
    let part = AuditQuery {
        after: query.text("after"),
        limit,
        events: query.texts("event_types", MAX_FILTER_VALUES)?,
        projects: query.texts("project_ids", MAX_FILTER_VALUES)?,
        actors: query.texts("actor_ids", MAX_FILTER_VALUES)?,
        resources: query.texts("resource_ids", MAX_FILTER_VALUES)?,
        from: gt.max(gte).map(time),
        before: [lt, lte].into_iter().flatten().min().map(time),
    };
    let after = part.after.clone();
    let found = organization.accounts.audit_log(part).await?;
    page(found, "entry", after.as_deref(), AuditLog::from)
}
