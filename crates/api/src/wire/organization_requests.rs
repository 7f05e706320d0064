//! Bodies of requests of the administration, for the OpenAPI document. [`crate::params`] parses
//! them.

use serde::Deserialize;
use utoipa::ToSchema;

/// Body of `POST …/limits`. An absent limit stays, and null is the default of the server again.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateLimits {
    #[schema(maximum = 1000000000000000i64)]
    max_stored_bytes: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_stored_files: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_open_batches: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_requests_per_batch: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_requests_in_flight: Option<u64>,
    #[schema(minimum = 1, maximum = 1000)]
    weight: Option<u64>,
    #[schema(minimum = 1, maximum = 3155760000i64)]
    input_file_lifetime_seconds: Option<u64>,
    #[schema(minimum = 0, maximum = 3155760000i64)]
    output_file_lifetime_seconds: Option<u64>,
    #[schema(minimum = 0, maximum = 3155760000i64)]
    error_file_lifetime_seconds: Option<u64>,
    #[schema(minimum = 1, maximum = 3155760000i64)]
    batch_lifetime_seconds: Option<u64>,
    #[schema(max_items = 1000, min_length = 1)]
    allowed_plugins: Option<Vec<String>>,
    #[schema(max_items = 1000, min_length = 1)]
    allowed_validators: Option<Vec<String>>,
    #[schema(max_items = 1000, min_length = 1)]
    allowed_completion_windows: Option<Vec<String>>,
}

/// Body of `POST …/rate_limits/{rate_limit}`. An absent limit stays, and null removes it.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateRateLimit {
    #[schema(maximum = 1000000000000000i64)]
    max_requests_per_1_minute: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_tokens_per_1_minute: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    max_requests_per_1_day: Option<u64>,
    #[schema(maximum = 1000000000000000i64)]
    batch_1_day_max_input_tokens: Option<u64>,
}

/// Body of `POST …/spend_limit`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateSpendLimit {
    /// Budget of a month, in cents.
    #[schema(maximum = 400000000)]
    threshold_amount: u64,
    #[schema(pattern = "^USD$")]
    currency: String,
    #[schema(pattern = "^month$")]
    interval: String,
}

/// Body of `POST …/model_permissions`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateModelPermissions {
    #[schema(pattern = "^(allow_list|deny_list)$")]
    mode: String,
    #[schema(max_items = 1000)]
    model_ids: Vec<ModelName>,
}

/// Name of a project, a service account or a key: one line with a visible character.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[schema(
    min_length = 1,
    max_length = 128,
    pattern = r"^[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$"
)]
pub(crate) struct Name(String);

/// Name of a model.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[schema(min_length = 1)]
pub(crate) struct ModelName(String);

/// Body of `POST /organization/projects`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateProject {
    name: Name,
}

/// Body of `POST /organization/projects/{project}`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateProject {
    name: Option<Name>,
}

/// Body of `POST …/service_accounts`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateServiceAccount {
    name: Name,
    /// True for an account without a key.
    create_service_account_only: Option<bool>,
    /// Lifetime of the key, in seconds; no limit if absent.
    #[schema(minimum = 1, maximum = 315360000)]
    expires_in_seconds: Option<u64>,
}

/// Body of `POST …/service_accounts/{account}`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateServiceAccount {
    name: Option<Name>,
    #[schema(pattern = "^member$")]
    role: Option<String>,
}

/// Body of `POST …/service_accounts/{account}/api_keys`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateKey {
    name: Option<Name>,
    /// Names of scopes, such as `api.batch.read`; all of them if absent.
    #[schema(min_items = 1)]
    scopes: Option<Vec<KeyScope>>,
    /// Lifetime of the key, in seconds; no limit if absent.
    #[schema(minimum = 1, maximum = 315360000)]
    expires_in_seconds: Option<u64>,
}

/// Body of `POST …/api_keys/{key}`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateKey {
    #[schema(min_items = 1)]
    scopes: Option<Vec<KeyScope>>,
    /// Rest of the lifetime of the key, in seconds from now.
    #[schema(minimum = 1, maximum = 315360000)]
    expires_in_seconds: Option<u64>,
}

/// Body of `POST /organization/admin_api_keys`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateAdminKey {
    name: Name,
    /// `metrics.read` for a key that reads the metrics and nothing else; none for a key that may
    /// do everything.
    #[schema(min_items = 1)]
    scopes: Option<Vec<AdminScope>>,
    /// Lifetime of the key, in seconds; no limit if absent.
    #[schema(minimum = 1, maximum = 315360000)]
    expires_in_seconds: Option<u64>,
}

/// Scope of an admin key.
#[derive(Deserialize, ToSchema)]
enum AdminScope {
    #[serde(rename = "metrics.read")]
    MetricsRead,
}

/// Scope of a key. [`crate::openapi`] adds the names.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
pub(crate) struct KeyScope(String);
