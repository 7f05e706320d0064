//! Settings of the adapter.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::bindings::exports::batchwright::plugin::inference::Header;

/// JSON Schema of the settings.
pub(crate) const SCHEMA: &str = r#"{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "properties": {
    "base_url": {
      "type": "string",
      "pattern": "^https?://",
      "description": "Base of the provider's URLs: the part before /chat/completions.",
      "default": "https://api.openai.com/v1"
    },
    "query": {
      "type": "string",
      "description": "A query added to each URL, such as api-version=2024-10-21 for Azure."
    },
    "headers": {
      "type": "object",
      "description": "Extra headers, such as openai-organization. Put secrets in [credentials].",
      "additionalProperties": {"type": "string"}
    },
    "idempotency_key": {
      "type": "boolean",
      "description": "Send an Idempotency-Key, so that a retried request is not executed twice.",
      "default": true
    }
  },
  "additionalProperties": false
}"#;

/// Settings of the operator, validated against `SCHEMA` by the host.
#[derive(Deserialize)]
#[serde(default)]
pub(crate) struct Settings {
    base_url: String,
    query: Option<String>,
    headers: BTreeMap<String, String>,
    idempotency_key: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            base_url: "https://api.openai.com/v1".into(),
            query: None,
            headers: BTreeMap::new(),
            idempotency_key: true,
        }
    }
}

impl Settings {
    /// Parses the settings; an error is one sentence for the operator.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut settings: Self =
            serde_json::from_str(text).map_err(|error| format!("settings: {error}"))?;
        settings.base_url.truncate(settings.base_url.trim_end_matches('/').len());
        if settings.base_url.contains(['?', '#']) {
            return Err(
                "settings.base_url must not have a query or a fragment; use settings.query".into(),
            );
        }
        Ok(settings)
    }

    /// Returns the provider's URL for an endpoint of the API. The base URL includes the provider's
    /// own `/v1`.
    pub(crate) fn url(&self, endpoint: &str) -> String {
        let path = endpoint.strip_prefix("/v1").unwrap_or(endpoint);
        match &self.query {
            Some(query) => format!("{}{path}?{}", self.base_url, query.trim_start_matches('?')),
            None => format!("{}{path}", self.base_url),
        }
    }

    /// Returns the headers of a request, with its idempotency key. A retry after an answer gets a
    /// new key, because some gateways return the stored answer for a known key.
    pub(crate) fn headers_with_key(&self, id: &str, attempt: u32) -> Vec<Header> {
        let mut headers = self.headers();
        if self.idempotency_key {
            let value = if attempt > 1 { format!("{id}-{attempt}") } else { id.to_owned() };
            headers.push(Header { name: "idempotency-key".into(), value });
        }
        headers
    }

    /// Returns the headers that every request has.
    pub(crate) fn headers(&self) -> Vec<Header> {
        let fixed = [("content-type", "application/json"), ("accept", "application/json")];
        let own = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        fixed
            .into_iter()
            .chain(own)
            .map(|(name, value)| Header { name: name.into(), value: value.into() })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_url_includes_the_path_prefix_of_the_provider() {
        let settings = Settings::parse(r#"{"base_url":"http://localhost:8000/api/v1/"}"#).unwrap();
        assert_eq!(
            settings.url("/v1/chat/completions"),
            "http://localhost:8000/api/v1/chat/completions"
        );
        let settings =
            Settings::parse(r#"{"base_url":"https://x.example/openai","query":"api-version=1"}"#)
                .unwrap();
        assert_eq!(
            settings.url("/v1/embeddings"),
            "https://x.example/openai/embeddings?api-version=1"
        );
        assert_eq!(
            Settings::parse("{}").unwrap().url("/v1/responses"),
            "https://api.openai.com/v1/responses"
        );
        assert!(Settings::parse(r#"{"base_url":"https://x.example/v1?a=b"}"#).is_err());
    }

    #[test]
    fn retry_after_an_answer_has_a_new_idempotency_key() {
        let key = |settings: &str, attempt| {
            let headers =
                Settings::parse(settings).unwrap().headers_with_key("batch_req_1", attempt);
            headers
                .into_iter()
                .find(|header| header.name == "idempotency-key")
                .map(|header| header.value)
        };
        assert_eq!(key("{}", 1).as_deref(), Some("batch_req_1"));
        assert_eq!(key("{}", 3).as_deref(), Some("batch_req_1-3"));
        assert_eq!(key(r#"{"idempotency_key":false}"#, 1), None);
    }
}
