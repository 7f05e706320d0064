//! What an operator may set.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::bindings::exports::batchwright::plugin::inference::Header;

pub(crate) const SCHEMA: &str = r#"{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "properties": {
    "base_url": {
      "type": "string",
      "pattern": "^https?://",
      "description": "What stands before /chat/completions in the provider's URLs.",
      "default": "https://api.openai.com/v1"
    },
    "query": {
      "type": "string",
      "description": "A query added to each URL, such as api-version=2024-10-21 for Azure."
    },
    "headers": {
      "type": "object",
      "description": "Headers added to each request, such as openai-organization. Secrets belong in [credentials].",
      "additionalProperties": {"type": "string"}
    },
    "idempotency_key": {
      "type": "boolean",
      "description": "Whether each request has an Idempotency-Key, by which a provider that knows it does not do the same work twice.",
      "default": true
    }
  },
  "additionalProperties": false
}"#;

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

    /// Where a request for this endpoint of the API goes. The base URL has the provider's own `/v1`.
    pub(crate) fn url(&self, endpoint: &str) -> String {
        let path = endpoint.strip_prefix("/v1").unwrap_or(endpoint);
        match &self.query {
            Some(query) => format!("{}{path}?{}", self.base_url, query.trim_start_matches('?')),
            None => format!("{}{path}", self.base_url),
        }
    }

    /// Headers of a request, with its key. An attempt after an answer has a key of its own: some gateways give the stored answer again for one
    /// that they know.
    pub(crate) fn headers_of(&self, id: &str, attempt: u32) -> Vec<Header> {
        let mut headers = self.headers();
        if self.idempotency_key {
            let value = if attempt > 1 { format!("{id}-{attempt}") } else { id.to_owned() };
            headers.push(Header { name: "idempotency-key".into(), value });
        }
        headers
    }

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
    fn the_base_url_has_the_providers_own_prefix() {
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
    fn an_attempt_after_an_answer_has_a_key_of_its_own() {
        let key = |settings: &str, attempt| {
            let headers = Settings::parse(settings).unwrap().headers_of("batch_req_1", attempt);
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
