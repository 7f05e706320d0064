//! Parameters of the query of a URL. Each error names its parameter.

use std::ops::RangeInclusive;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use batchwright_domain::error_code::ErrorCode;
use batchwright_store::Order;

use super::error::ApiError;
use super::params::out_of_range;

/// Parameters of the query of a URL. Unknown ones are ignored, because proxies and SDKs add some.
pub(crate) struct QueryParams(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for QueryParams {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => {
                Err(ApiError::bad_request(format!("The query could not be read: {rejection}.")))
            }
        }
    }
}

impl QueryParams {
    /// Returns the last value of a parameter. None if it is absent or empty: some clients send
    /// every parameter.
    pub(crate) fn text(&self, name: &str) -> Option<String> {
        let found = self.0.iter().rfind(|(given, _)| given == name);
        found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
    }

    /// Returns the values of a parameter, as `name=…` or `name[]=…`, without empty ones.
    fn values(&self, name: &str) -> impl Iterator<Item = &String> {
        let is_named = move |given: &str| given.strip_suffix("[]").unwrap_or(given) == name;
        let found = self.0.iter().filter(move |(given, _)| is_named(given));
        found.map(|(_, value)| value).filter(|value| !value.is_empty())
    }

    /// Returns true if a parameter has a value.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.values(name).next().is_some()
    }

    /// Returns the values of a parameter that can be repeated. Fails if there are more than `max`.
    pub(crate) fn texts(&self, name: &str, max: usize) -> Result<Vec<String>, ApiError> {
        let values: Vec<_> = self.values(name).cloned().collect();
        if values.len() > max {
            let message = format!("Invalid '{name}': expected at most {max} values.");
            return Err(ApiError::invalid(name, ErrorCode::InvalidValue, message));
        }
        Ok(values)
    }

    /// Returns a parameter that is `true` or `false`.
    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.text(name).as_deref() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => {
                let message = format!("Invalid '{name}'. Supported values are: 'true', 'false'.");
                Err(ApiError::invalid(name, ErrorCode::InvalidValue, message))
            }
        }
    }

    /// Returns a parameter that is a time in seconds since 1970.
    pub(crate) fn seconds(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| {
            let message = format!("Invalid '{name}': expected a time in seconds since 1970.");
            ApiError::invalid(name, ErrorCode::InvalidValue, message)
        })
    }

    /// Returns the parameter `order`.
    pub(crate) fn order(&self, default: Order) -> Result<Order, ApiError> {
        match self.text("order").as_deref() {
            None => Ok(default),
            Some("desc") => Ok(Order::NewestFirst),
            Some("asc") => Ok(Order::OldestFirst),
            Some(_) => Err(ApiError::invalid(
                "order",
                ErrorCode::InvalidValue,
                "Invalid 'order'. Supported values are: 'asc', 'desc'.",
            )),
        }
    }

    /// Returns the parameter `limit`. Fails if it is outside `range`.
    pub(crate) fn limit(
        &self,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> Result<usize, ApiError> {
        let number = match self.text("limit") {
            None => default,
            Some(text) => match text.parse() {
                Ok(number) if range.contains(&number) => number,
                _ => return Err(out_of_range("limit", &range, &text)),
            },
        };
        Ok(usize::try_from(number).unwrap_or(usize::MAX))
    }
}
