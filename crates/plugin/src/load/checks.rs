//! Checks of a manifest against its component, and what the gateway needs from it.

use std::collections::BTreeMap;

use batchwright_domain::endpoint::Endpoint;
use batchwright_egress::ExchangeLimits;
use serde_json::Value;
use url::Url;

use crate::contract::types::Kind;
use crate::error::LoadError;
use crate::load::inspect::Inspected;
use crate::package::limits::Limits;
use crate::package::manifest::Manifest;

/// Parses `default_models`, which only endpoints whose requests may name no model can have.
pub(crate) fn default_models(
    manifest: &Manifest,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<BTreeMap<Endpoint, String>, LoadError> {
    let parse = |(path, model): (&String, &String)| {
        let known = Endpoint::ALL.into_iter().find(|endpoint| endpoint.as_str() == path);
        let endpoint = known.filter(|endpoint| endpoint.has_optional_model());
        let endpoint = endpoint.ok_or_else(|| {
            let message = format!(
                "`{path}` needs a model in every request; only {} does not",
                Endpoint::Moderations
            );
            key("default_models", message)
        })?;
        Ok((endpoint, model.clone()))
    };
    manifest.default_models.iter().map(parse).collect()
}

/// Checks that the keys of the TOML file apply to the component's kind.
pub(crate) fn check_kind(
    manifest: &Manifest,
    inspected: &Inspected,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<(), LoadError> {
    let unused_key = match inspected.kind {
        Kind::Validator => [
            ("models", manifest.models.is_empty()),
            ("aliases", manifest.aliases.is_empty()),
            ("default_models", manifest.default_models.is_empty()),
            ("allow", manifest.allow.is_empty()),
            ("paused", !manifest.paused),
        ]
        .into_iter()
        .find(|(_, absent)| !absent),
        Kind::Adapter => {
            [("order", manifest.order.is_none()), ("endpoints", manifest.endpoints.is_empty())]
                .into_iter()
                .find(|(_, absent)| !absent)
        }
    };
    if let Some((name, _)) = unused_key {
        return Err(key(
            name,
            format!(
                "the component is a plugin of kind {}, which does not use this key; remove the key",
                inspected.kind
            ),
        ));
    }
    if inspected.kind == Kind::Adapter && manifest.models.is_empty() && manifest.aliases.is_empty()
    {
        return Err(key(
            "models",
            "names no model, so no request would ever reach this adapter; add `models = [\"…\"]`"
                .into(),
        ));
    }
    Ok(())
}

/// Returns every HTTP URL in a setting, at any depth.
pub(crate) fn urls_in(value: &Value) -> Vec<Url> {
    match value {
        Value::String(text) => Url::parse(text)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .into_iter()
            .collect(),
        Value::Array(values) => values.iter().flat_map(urls_in).collect(),
        Value::Object(values) => values.values().flat_map(urls_in).collect(),
        _ => Vec::new(),
    }
}

pub(crate) fn bounds(limits: &Limits) -> ExchangeLimits {
    ExchangeLimits {
        concurrency: limits.max_in_flight.get(),
        online_percent: usize::from(limits.online_share.get()),
        requests_per_minute: limits.requests_per_minute,
        share_by: limits.share_by.into(),
        connect_timeout: limits.connect_timeout.duration(),
        first_byte_timeout: limits.first_byte_timeout.duration(),
        exchange_timeout: limits.exchange_timeout.duration(),
        max_response: limits.max_response_body.in_memory(),
    }
}
