//! Authentication: turns the key of a request into a principal, before the body is read.
//!
//! **Threat.** A request without a key, or with the key of another tenant, reads or changes data;
//! a revoked key goes on working; a header other than the key decides whose data is used.
//!
//! **Who it is.** [`identify`] runs before every handler below `/v1` and puts a [`Principal`] into
//! the request. Nothing but the key decides: other headers and parameters name no tenant.
//!
//! **What it may.** A handler gets the tenant only as [`Tenant`] of an access, so no handler of a
//! tenant's data can forget the scope. A layer refuses requests to the administration that no
//! administrator sends.

mod access;
mod authenticator;

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use batchwright_tenancy::key::redact;
use batchwright_tenancy::{Denied, Principal};

pub(crate) use access::{
    Admin, CancelBatches, Client, CreateBatches, DeleteCredentials, DeleteFiles, MetricsReader,
    ReadBatches, ReadCredentials, ReadFiles, ReadModels, ReadWebhooks, RequestModels,
    SetCredentials, Tenant, UploadFiles, UsageReader, WriteWebhooks, holder,
};
pub use authenticator::Authenticator;
use authenticator::Rejected;

use crate::error::ApiError;

/// Address of the client of a request.
#[derive(Clone, Copy)]
pub(crate) struct ClientAddress(pub IpAddr);

/// Adds the principal to a request, or refuses the request.
pub(crate) async fn identify(
    State(authenticator): State<Arc<Authenticator>>,
    mut request: Request,
    next: Next,
) -> Response {
    match principal(&authenticator, request.headers()).await {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

async fn principal(
    authenticator: &Authenticator,
    headers: &HeaderMap,
) -> Result<Principal, ApiError> {
    if authenticator.has_no_keys() {
        return Ok(Principal::without_keys());
    }
    let key = bearer_token(headers)?;
    authenticator.authenticate(key).await.map_err(|rejected| match rejected {
        Rejected::Denied(Denied::Invalid) => ApiError::unauthenticated(format!(
            "Incorrect API key provided: {}. Use a key that the administrator of this server \
             created.",
            redact(key)
        )),
        Rejected::Denied(Denied::Expired) => ApiError::unauthenticated(format!(
            "The API key {} has expired. Use another key.",
            redact(key)
        )),
        Rejected::Store(error) => error.into(),
        Rejected::Overloaded => ApiError::overloaded(),
    })
}

/// Returns the token of the header `Authorization: Bearer …`. The scheme is case-insensitive.
fn bearer_token(headers: &HeaderMap) -> Result<&str, ApiError> {
    let missing = || {
        ApiError::unauthenticated(
            "No API key provided. Send your key in the header 'Authorization: Bearer YOUR_KEY'.",
        )
    };
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or_else(missing)?;
    if values.next().is_some() {
        return Err(ApiError::unauthenticated(
            "There is more than one header 'Authorization'; send one.",
        ));
    }
    let text = value.to_str().map_err(|_| missing())?;
    match text.trim().split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim()),
        _ => Err(missing()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_token_is_found_in_any_case_and_only_in_one_header() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().unwrap());
            }
            headers
        };
        for value in ["Bearer k", "bearer k", "BEARER  k ", " Bearer k"] {
            assert_eq!(bearer_token(&headers(&[value])).unwrap(), "k");
        }
        for values in [&[][..], &["k"], &["Basic k"], &["Bearer"], &["Bearer k", "Bearer k"]] {
            assert!(bearer_token(&headers(values)).is_err(), "{values:?}");
        }
    }
}
