//! Case file: a recorded conversation, as JSON.

use std::collections::BTreeMap;

use batchwright_egress::{HttpResponse, TransportError, TransportErrorKind};
use serde::Deserialize;
use serde_json::Value;

use super::inputs::FAULTS;
use crate::contract::types::Outcome;
use crate::reference::keys;

/// Recorded case: a JSON file of the author.
pub(super) enum Case {
    Adapter(AdapterCase),
    Validator(ValidatorCase),
}

keys! {
    /// Case of an adapter.
    #[derive(Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct AdapterCase, case_keys {
        /// Request of a client, which `begin` gets.
        pub(super) request: CaseRequest, "object", "required";
        /// Exchanges in their order, each with the expected request and its outcome.
        pub(super) exchanges: Vec<Exchange>, "array of objects", "required";
        /// Expected answer: `status`, `body` and `usage` of a response; `code` and `message` of a
        /// failure; or `retry` with `after_milliseconds` and `otherwise`.
        pub(super) answer: Value, "object", "required";
    }
}

keys! {
    /// Case of a validator.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct ValidatorCase, validator_case_keys {
        /// Batch of the lines.
        pub(super) batch: CaseBatch, "object", "required";
        /// Lines of the input file, each as text.
        pub(super) lines: Vec<String>, "array of strings", "required";
        /// Expected violations, in any order; an empty array for valid lines.
        pub(super) violations: Vec<Value>, "array of objects", "required";
    }
}

keys! {
    /// Request of a case.
    #[derive(Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct CaseRequest, request_keys {
        /// Path of the API endpoint, such as `/v1/embeddings`.
        pub(super) endpoint: String, "string", "required";
        /// Model name of the provider.
        #[serde(default)]
        pub(super) model: Option<String>, "string", "`model` of the body";
        /// Body of the request.
        pub(super) body: Value, "object", "required";
    }
}

keys! {
    /// Batch of a case.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct CaseBatch, batch_keys {
        /// Path of the API endpoint of the batch.
        pub(super) endpoint: String, "string", "required";
        /// Metadata of the batch.
        #[serde(default)]
        pub(super) metadata: BTreeMap<String, String>, "object of strings", "none";
        /// Model that the first line of the input file names.
        #[serde(default)]
        pub(super) first_model: Option<String>, "string", "none";
    }
}

keys! {
    /// Exchange of a case: the expected request and its outcome, or the end of a requested wait.
    #[derive(Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Exchange, exchange_keys {
        /// Expected request of the adapter: `method`, `url`, `headers` and `body`, as far as they
        /// matter.
        #[serde(default)]
        pub(super) request: Value, "object", "any request";
        /// Response of the provider.
        pub(super) response: Option<CaseResponse>, "object", "one of three";
        /// Fault as named in the contract, such as `timeout`, instead of a response.
        pub(super) error: Option<String>, "string", "one of three";
        /// True ends a wait that the adapter requested, instead of an exchange.
        #[serde(default)]
        pub(super) elapsed: bool, "boolean", "one of three";
    }
}

keys! {
    /// Response of a case.
    #[derive(Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct CaseResponse, response_keys {
        /// Status code.
        pub(super) status: u16, "whole number", "required";
        /// Headers by name.
        #[serde(default)]
        pub(super) headers: BTreeMap<String, String>, "object of strings", "none";
        /// Body: a string is sent as it is, any other value as JSON.
        pub(super) body: Value, "any", "required";
    }
}

impl Exchange {
    pub(super) fn outcome(self) -> Result<Outcome, String> {
        match (self.response, self.error, self.elapsed) {
            (Some(CaseResponse { status, headers, body }), None, false) => {
                let body =
                    body.as_str().map_or_else(|| body.to_string(), str::to_owned).into_bytes();
                Ok(Outcome::Response(HttpResponse {
                    status,
                    headers: headers.into_iter().collect(),
                    body,
                }))
            }
            (None, Some(name), false) => {
                let named = |fault: &&TransportErrorKind| {
                    format!("{fault:?}").eq_ignore_ascii_case(&name.replace('-', ""))
                };
                let fault = *FAULTS
                    .iter()
                    .find(named)
                    .ok_or_else(|| format!("`{name}` is not a fault of the contract"))?;
                Ok(Outcome::Error(TransportError::new(fault, "It did not work.")))
            }
            (None, None, true) => Ok(Outcome::Elapsed),
            _ => Err("must have exactly one of `response`, `error` and `elapsed`".into()),
        }
    }
}
