//! Access of a handler: the scope that it needs, and the tenant that it gets.

use std::marker::PhantomData;

use axum::extract::FromRequestParts;
use axum::http::Extensions;
use axum::http::request::Parts;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{KeyId, TenantId};
use batchwright_memory::Holder;
use batchwright_store::accounts::Actor;
use batchwright_tenancy::{METRICS_SCOPE, Principal, Scope};

use super::ClientAddress;
use crate::error::ApiError;

/// Client who changes something that the audit log names.
pub(crate) struct Client {
    key: Option<KeyId>,
    address: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Client {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let address =
            parts.extensions.get::<ClientAddress>().map(|ClientAddress(ip)| ip.to_string());
        let key = match principal(&parts.extensions)? {
            Principal::Project(project) => project.key.clone(),
            Principal::Admin(key) | Principal::Monitor(key) => Some(key.clone()),
            Principal::Operator => None,
        };
        Ok(Self { key, address })
    }
}

impl Client {
    /// Returns the client as the actor of a change.
    pub(crate) fn actor(&self, at: Timestamp) -> Actor {
        Actor { key: self.key.clone(), address: self.address.clone(), at }
    }
}

/// Access of a handler to the data of a tenant.
pub(crate) trait Access {
    /// Scope that the key needs.
    const SCOPE: Scope;
    /// True if the handler creates something, which an archived project does not allow.
    const CREATES: bool = false;
}

macro_rules! accesses {
    ($($(#[doc = $doc:literal])+ $name:ident: $scope:ident $(, creates $creates:literal)?;)+) => {
        $(
            $(#[doc = $doc])+
            pub(crate) enum $name {}

            impl Access for $name {
                const SCOPE: Scope = Scope::$scope;
                $(const CREATES: bool = $creates;)?
            }
        )+
    };
}

accesses! {
    /// Reads batches.
    ReadBatches: BatchRead;
    /// Creates batches.
    CreateBatches: BatchWrite, creates true;
    /// Cancels batches.
    CancelBatches: BatchWrite;
    /// Reads files.
    ReadFiles: FilesRead;
    /// Uploads files.
    UploadFiles: FilesWrite, creates true;
    /// Deletes files.
    DeleteFiles: FilesWrite;
    /// Lists credentials.
    ReadCredentials: CredentialsRead;
    /// Sets credentials.
    SetCredentials: CredentialsWrite, creates true;
    /// Deletes credentials.
    DeleteCredentials: CredentialsWrite;
    /// Reads webhooks.
    ReadWebhooks: WebhooksRead;
    /// Creates, changes and deletes webhooks.
    WriteWebhooks: WebhooksWrite;
    /// Reads models and plugins.
    ReadModels: ModelRead;
    /// Sends online requests.
    RequestModels: ModelRequest, creates true;
}

/// Tenant of a request whose key allows the access `A`, and that key.
pub(crate) struct Tenant<A>(pub TenantId, pub Option<KeyId>, PhantomData<A>);

impl<S: Sync, A: Access> FromRequestParts<S> for Tenant<A> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match principal(&parts.extensions)? {
            Principal::Project(project) if !project.scopes.contains(A::SCOPE) => {
                Err(missing_scope(A::SCOPE))
            }
            // This check saves the client an upload that the store would refuse.
            Principal::Project(project) if A::CREATES && project.is_archived => {
                Err(ApiError::project_archived())
            }
            Principal::Project(project) => {
                Ok(Self(project.tenant.clone(), project.key.clone(), PhantomData))
            }
            Principal::Monitor(_) => Err(metrics_only()),
            Principal::Admin(_) | Principal::Operator => Err(ApiError::forbidden(
                "An admin key has no access to the data of projects; use the key of a project.",
            )
            .with_code(ErrorCode::ProjectKeyRequired)),
        }
    }
}

fn missing_scope(scope: Scope) -> ApiError {
    let scope = scope.as_str();
    ApiError::forbidden(format!(
        "You have insufficient permissions for this operation. Missing scope: {scope}."
    ))
    .with_code(ErrorCode::MissingScope)
}

fn metrics_only() -> ApiError {
    ApiError::forbidden(format!(
        "You have insufficient permissions for this operation. This key has the scope \
         {METRICS_SCOPE} alone."
    ))
    .with_code(ErrorCode::MissingScope)
}

/// Reader of usage: an administrator, or a project whose key allows it.
pub(crate) struct UsageReader {
    /// Tenant whose usage the reader sees; none sees all.
    pub tenant: Option<TenantId>,
}

impl<S: Sync> FromRequestParts<S> for UsageReader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match principal(&parts.extensions)? {
            Principal::Admin(_) | Principal::Operator => Ok(Self { tenant: None }),
            Principal::Project(project) if project.scopes.contains(Scope::UsageRead) => {
                Ok(Self { tenant: Some(project.tenant.clone()) })
            }
            Principal::Project(_) => Err(missing_scope(Scope::UsageRead)),
            Principal::Monitor(_) => Err(metrics_only()),
        }
    }
}

/// Reader of metrics: an administrator, a monitor, or anyone while the server has no keys.
pub(crate) struct MetricsReader;

impl<S: Sync> FromRequestParts<S> for MetricsReader {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match principal(&parts.extensions)? {
            Principal::Monitor(_) => Ok(Self),
            Principal::Project(project) if project.key.is_none() => Ok(Self),
            _ => Admin::from_request_parts(parts, state).await.map(|_| Self),
        }
    }
}

/// Administrator who sends a request.
pub(crate) struct Admin(Client);

impl Admin {
    /// Returns the administrator as the actor of a change, for the audit log.
    pub(crate) fn actor(&self, at: Timestamp) -> Actor {
        self.0.actor(at)
    }
}

impl<S: Sync> FromRequestParts<S> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match principal(&parts.extensions)? {
            Principal::Admin(_) | Principal::Operator => {
                Client::from_request_parts(parts, state).await.map(Self)
            }
            Principal::Monitor(_) => Err(metrics_only()),
            Principal::Project(project) if project.key.is_none() => Err(ApiError::unauthenticated(
                "This server has no keys. Create the first admin key with \
                     'batchwright admin key create' while the server is stopped.",
            )),
            Principal::Project(_) => Err(ApiError::forbidden(
                "You have insufficient permissions for this operation; use an admin key.",
            )
            .with_code(ErrorCode::AdminKeyRequired)),
        }
    }
}

/// Returns the principal that authentication put into a request.
fn principal(extensions: &Extensions) -> Result<&Principal, ApiError> {
    extensions.get().ok_or_else(|| ApiError::internal("a request was not authenticated"))
}

/// Returns the holder of memory that a request takes: the tenant, or the administration.
pub(crate) fn holder(extensions: &Extensions) -> Holder {
    match extensions.get::<Principal>() {
        Some(Principal::Project(project)) => project.tenant.as_str().into(),
        _ => "/administration".into(),
    }
}
