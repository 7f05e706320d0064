//! Checks of adapters.

use batchwright_domain::endpoint::Endpoint;
use batchwright_egress::{HttpResponse, TransportError};

use super::inputs::{
    ENDPOINTS, FAULTS, ODD_BODIES, ODD_RESPONSE_BODIES, ODD_RETRY_AFTER_VALUES, OTHER_BODY,
};
use crate::conformance::{FIRST_TENANT, Report, SECOND_TENANT, check_equal, request};
use crate::contract::types::{Answer, Outcome, Request, Step};
use crate::plugin::Plugin;

impl Report {
    /// Runs the checks of an adapter.
    pub(super) async fn adapter(&mut self, plugin: &Plugin) {
        let handled: Vec<_> =
            ENDPOINTS.iter().filter(|(endpoint, _)| plugin.handles(*endpoint)).collect();
        if handled.is_empty() {
            self.record(
                "handles an endpoint",
                Err("`describe` names no endpoint of the Batch API".into()),
            );
        }
        for (endpoint, body) in &handled {
            let endpoint = endpoint.as_str();
            let good = request(endpoint, body);
            let (first_step, same) = self.begin_twice(plugin, &good).await;
            self.record(
                format!("{endpoint}: `begin` returns the same step from every instance"),
                same,
            );
            if let Some(Step::Send { request, .. }) = &first_step {
                let sendable =
                    plugin.gateway().check(request).map_err(|error| error.detail().to_owned());
                self.record(
                    format!("{endpoint}: the host accepts the adapter's request"),
                    sendable,
                );
            }
            // Now the second instance saw another request last. A plugin that keeps a request
            // outside of the state fails the checks of `resume`.
            let other = Request {
                custom_id: "other".into(),
                model: "other".into(),
                ..request(endpoint, OTHER_BODY)
            };
            self.begin(plugin, SECOND_TENANT, &other).await.ok();
            if let Some(Step::Send { state, .. } | Step::Wait { state, .. }) = first_step {
                self.outcomes(plugin, endpoint, &state).await;
            }
            for (place, body) in ODD_BODIES.iter().enumerate() {
                let (_, same) = self.begin_twice(plugin, &request(endpoint, body)).await;
                self.record(format!("{endpoint}: odd body {}", place + 1), same);
            }
            let deep = format!(
                r#"{{"model":"m","messages":[],"x":{}{}}}"#,
                "[".repeat(5000),
                "]".repeat(5000)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &deep)).await;
            self.record(format!("{endpoint}: a body nested 5,000 levels deep"), same);
            let long = format!(
                r#"{{"model":"m","input":"{0}","prompt":"{0}","messages":[]}}"#,
                "x".repeat(1 << 20)
            );
            let (_, same) = self.begin_twice(plugin, &request(endpoint, &long)).await;
            self.record(format!("{endpoint}: a body of 1 MiB"), same);
        }
        if plugin.handles(Endpoint::ChatCompletions) {
            let robot = r#"{"model":"m","messages":[{"role":"robot","content":"x"}]}"#;
            let step =
                self.begin(plugin, FIRST_TENANT, &request("/v1/chat/completions", robot)).await;
            let refused = match step {
                Ok(Step::Done(Answer::Failure(_))) => Ok(()),
                Ok(Step::Done(Answer::Response(response))) if response.status >= 400 => Ok(()),
                Ok(_) => Err("a message with the role `robot` is not refused; the contract of \
                              `begin` requires it"
                    .into()),
                Err(error) => Err(error.detail()),
            };
            self.record("refuses an unknown role before anything is sent", refused);
        }
        if plugin.classifies(true) {
            self.classification(plugin).await;
        }
        let foreign = self.resume(plugin, SECOND_TENANT, b"not its own", Outcome::Elapsed).await;
        self.record(
            "`resume` handles a state that the plugin did not return",
            foreign.map(drop).map_err(|error| error.detail()),
        );
    }

    /// Begins a request on both instances, then again on the first, and compares the steps.
    async fn begin_twice(
        &mut self,
        plugin: &Plugin,
        request: &Request,
    ) -> (Option<Step>, Result<(), String>) {
        let first = self.begin(plugin, FIRST_TENANT, request).await;
        let others = [
            self.begin(plugin, SECOND_TENANT, request).await,
            self.begin(plugin, FIRST_TENANT, request).await,
        ];
        let same = others.iter().try_for_each(|other| check_equal(&first, other));
        (first.ok(), same)
    }

    /// Classifies odd responses on both instances and compares the results.
    async fn classification(&mut self, plugin: &Plugin) {
        for status in [200, 204, 400, 401, 403, 429, 500, 503, 599] {
            let mut found = Ok(());
            for body in ODD_RESPONSE_BODIES {
                let headers = vec![("retry-after".to_owned(), "soon".to_owned())];
                let response = HttpResponse { status, headers, body: body.to_vec() };
                let (one, two) = (
                    plugin.classify(&FIRST_TENANT.into(), &response).await,
                    plugin.classify(&SECOND_TENANT.into(), &response).await,
                );
                found = found.and(check_equal(&one, &two));
            }
            self.record(
                format!("`classify` returns the same result from every instance, status {status}"),
                found,
            );
        }
    }

    /// Resumes with every outcome of an exchange on both instances and compares the steps.
    async fn outcomes(&mut self, plugin: &Plugin, endpoint: &str, state: &[u8]) {
        for status in
            [200, 201, 204, 301, 400, 401, 404, 408, 409, 413, 429, 500, 502, 503, 529, 599]
        {
            let mut found = Ok(());
            for body in ODD_RESPONSE_BODIES {
                let outcome = || {
                    let headers = vec![
                        ("content-type".to_owned(), "application/json".to_owned()),
                        ("retry-after".to_owned(), "Wed, 21 Oct 2015 07:28:00 GMT".to_owned()),
                    ];
                    Outcome::Response(HttpResponse { status, headers, body: body.to_vec() })
                };
                let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
                let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
                found = found.and(check_equal(&one, &two)).map_err(|problem| {
                    format!(
                        "{problem}; the body was {}",
                        String::from_utf8_lossy(body).escape_debug()
                    )
                });
            }
            self.record(format!("{endpoint}: responses with status {status}"), found);
        }
        for value in ODD_RETRY_AFTER_VALUES {
            let outcome = || {
                let headers = vec![("retry-after".to_owned(), value.to_owned())];
                Outcome::Response(HttpResponse { status: 429, headers, body: b"{}".to_vec() })
            };
            let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
            let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
            let shown: String = value.chars().take(20).collect();
            self.record(
                format!("{endpoint}: 429 with retry-after {shown}"),
                check_equal(&one, &two),
            );
        }
        let deep =
            format!(r#"{{"error":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000)).into_bytes();
        for status in [200, 503] {
            let response =
                Outcome::Response(HttpResponse { status, headers: Vec::new(), body: deep.clone() });
            let found = self.resume(plugin, FIRST_TENANT, state, response).await;
            let found = found.map(drop).map_err(|error| error.detail());
            self.record(
                format!("{endpoint}: a response with status {status}, nested 10,000 levels deep"),
                found,
            );
        }
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1 << 20));
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        let long =
            Outcome::Response(HttpResponse { status: 200, headers, body: long.into_bytes() });
        let found = self.resume(plugin, FIRST_TENANT, state, long).await;
        self.record(
            format!("{endpoint}: a response of 1 MiB"),
            found.map(drop).map_err(|error| error.detail()),
        );
        for fault in FAULTS {
            let outcome = || Outcome::Error(TransportError::new(fault, "It did not work."));
            let one = self.resume(plugin, FIRST_TENANT, state, outcome()).await;
            let two = self.resume(plugin, SECOND_TENANT, state, outcome()).await;
            self.record(
                format!("{endpoint}: {fault:?} instead of a response"),
                check_equal(&one, &two),
            );
        }
    }
}
