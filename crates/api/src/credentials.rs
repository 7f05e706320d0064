//! `/credentials`: secrets that a project sets for plugins. No answer has a secret.

use axum::Json;
use axum::extract::{Path, State};
use batchwright_batch::CredentialError;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;

use super::App;
use super::error::ApiError;
use super::openapi::Errors;
use super::params::Params;
use super::wire::{Collection, Credential, DeletedCredential, SetCredential};
use crate::auth::{Client, DeleteCredentials, ReadCredentials, SetCredentials, Tenant};

/// Maximum length of a secret, in bytes.
const MAX_SECRET_BYTES: usize = 4096;

/// Maximum length of a name, in characters.
const MAX_NAME_CHARS: usize = 64;

/// Lists the credentials that the project has set, without their secrets
#[utoipa::path(get, path = "/credentials", tag = "Credentials",
    responses((status = 200, body = Collection<Credential>, description = "All credentials"),
        Errors))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadCredentials>,
) -> Result<Json<Collection<Credential>>, ApiError> {
    let found = app.service.credentials(&tenant.0).await?;
    Ok(Json(Collection::new(found.into_iter().map(Credential::from).collect())))
}

/// Sets a credential, or replaces it
///
/// The operator allows it in the plugin's file. The secret is sealed, no call returns it, and it
/// takes effect with the next request.
#[utoipa::path(post, path = "/credentials", tag = "Credentials",
    request_body = SetCredential,
    responses((status = 200, body = Credential, description = "The credential"), Errors))]
pub(crate) async fn set(
    State(app): App,
    tenant: Tenant<SetCredentials>,
    client: Client,
    mut params: Params,
) -> Result<Json<Credential>, ApiError> {
    let (plugin, name) = (params.string("plugin")?, params.string("name")?);
    let secret = params.string("value")?;
    params.reject_unknown()?;
    for (param, value) in [("plugin", &plugin), ("name", &name)] {
        if value.is_empty() || value.chars().count() > MAX_NAME_CHARS {
            let message = format!("Invalid '{param}': expected 1 to {MAX_NAME_CHARS} characters.");
            return Err(ApiError::invalid(param, ErrorCode::InvalidValue, message));
        }
    }
    if !(1..=MAX_SECRET_BYTES).contains(&secret.len())
        || !secret.bytes().all(|byte| byte.is_ascii_graphic())
    {
        let message = format!(
            "Invalid 'value': expected 1 to {MAX_SECRET_BYTES} printable ASCII characters without \
             spaces."
        );
        return Err(ApiError::invalid("value", ErrorCode::InvalidValue, message));
    }
    let by = client.actor(app.clock.now());
    let set = app.service.set_credential(&tenant.0, (&plugin, &name), &secret, by).await;
    set.map(|record| Json(record.into())).map_err(|error| match error {
        CredentialError::NotAccepted { .. } => ApiError::not_found(error.to_string())
            .with_param("plugin")
            .with_code(ErrorCode::CredentialNotAccepted),
        CredentialError::Sealing(error) => ApiError::internal(error),
        CredentialError::Store(error) => error.into(),
    })
}

/// Deletes a credential
///
/// The next request has the default of the plugin, where the operator allows it.
#[utoipa::path(delete, path = "/credentials/{plugin}/{name}", tag = "Credentials",
    params(
        ("plugin" = String, Path, description = "Name of the plugin"),
        ("name" = String, Path, description = "Name of the credential"),
    ),
    responses((status = 200, body = DeletedCredential, description = "Deleted"), Errors))]
pub(crate) async fn delete(
    State(app): App,
    tenant: Tenant<DeleteCredentials>,
    client: Client,
    Path((plugin, name)): Path<(String, String)>,
) -> Result<Json<DeletedCredential>, ApiError> {
    let by = client.actor(app.clock.now());
    match app.service.delete_credential(&tenant.0, (&plugin, &name), by).await? {
        true => Ok(Json(DeletedCredential::new(plugin, name))),
        false => Err(ApiError::not_found(format!(
            "No credential '{}' was set for the plugin '{}'.",
            truncate_for_message(&name),
            truncate_for_message(&plugin)
        ))),
    }
}
