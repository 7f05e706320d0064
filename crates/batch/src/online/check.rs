//! Check of an online request before anything is sent: its rules, its model and its plugin.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use batchwright_plugin::types::BatchContext;
use batchwright_plugin::{Plugin, Route};
use batchwright_store::StoreError;
use batchwright_telemetry::Context;
use uuid::Uuid;

use crate::formats::input::InputLine;
use crate::formats::line::{RequestLine, with_model};
use crate::formats::result_line::online_request_id;
use crate::online::body::OnlineBody;
use crate::online::count::RequestFacts;
use crate::online::{Admitted, Online, OnlineError, OnlineRequest};
use crate::rules::ChunkValidator;

impl Online {
    /// Validates a request, and finds the plugin that serves it.
    pub(super) async fn check<'a>(
        &self,
        request: &'a OnlineRequest,
    ) -> Result<Admitted<'a>, OnlineError> {
        if self.closing.is_cancelled() {
            return Err(StoreError::Closed.into());
        }
        if !self.gate.is_open() {
            // Nothing is sent while its usage could not be recorded.
            return Err(StoreError::NotReady("results cannot be written".into()).into());
        }
        let quota = self.quotas.of(&request.tenant);
        quota.refresh().await?;
        let body = OnlineBody::parse(&request.body, request.endpoint)?;
        let (tenant, endpoint) = (&request.tenant, request.endpoint);
        let id =
            online_request_id(tenant.as_str(), request.idempotency_key.as_deref(), &request.body);
        let plugins = self.registry.current();
        plugins
            .check_required(&self.config.required_plugins, tenant)
            .map_err(StoreError::NotReady)?;
        let permissions = quota.permissions();
        let line = format!(
            r#"{{"custom_id":"{id}","method":"POST","url":"{endpoint}","body":{}}}"#,
            body.plain
        );
        let named = RequestLine::parse(&line).model.map(std::borrow::Cow::into_owned);
        let default = plugins.default_model(tenant, endpoint, &permissions).map(str::to_owned);
        if let Some(model) = named.as_ref().or(default.as_ref()) {
            let route = plugins.allowed_route(tenant, model, &permissions);
            if !route.as_ref().is_some_and(|route| route.plugin.handles(endpoint)) {
                let shown = truncate_for_message(model);
                let of_endpoint = route.map(|_| format!(" at {endpoint}")).unwrap_or_default();
                return Err(OnlineError::ModelNotFound(shown, of_endpoint));
            }
        }
        let context = BatchContext {
            id: format!("batch_{}", Uuid::new_v4().simple()),
            endpoint: endpoint.as_str().to_owned(),
            metadata: Vec::new(),
            first_model: named.clone(),
        };
        let rules = (permissions.clone(), BTreeSet::new());
        let validator = ChunkValidator::new(tenant, (context, endpoint), plugins.clone(), rules);
        let line = InputLine::Buffered { number: 1, at: 0, bytes: line.into() };
        let found = validator.validate(vec![line]).await;
        let found = found.map_err(|error| OnlineError::of_call(&error, false))?;
        if let Some(violation) = found.violations.into_iter().next() {
            let param = violation.param.map(|param| within_body(&param).to_owned());
            let message = violation.message.replace("'body.", "'");
            return Err(OnlineError::Invalid { code: violation.code, message, param });
        }
        let model = found.requests.into_iter().next().and_then(|request| request.model);
        let route = model.as_deref().and_then(|model| plugins.route(tenant, model));
        let (Some(model), Some(Route { plugin, model: at_provider, listed })) = (model, route)
        else {
            let message = "Model parameter is required.";
            return Err(OnlineError::invalid(ErrorCode::InvalidRequest, message, Some("model")));
        };
        let is_stream = body.streamed.is_some();
        if is_stream {
            let streams = plugin.streams(tenant, endpoint).await;
            if !streams.map_err(|error| OnlineError::of_call(&error, false))? {
                return Err(OnlineError::NoStream(truncate_for_message(&model)));
            }
        }
        let sent = body.streamed.unwrap_or(body.plain);
        let sent = if named.is_some() { sent } else { with_model(&sent, &model) };
        let breaker = self.breakers.of(plugin.name(), tenant, endpoint);
        tracing::debug!(
            request_id = request.log_id,
            request = id,
            plugin = plugin.name(),
            model = at_provider,
            is_stream,
            client_request_id = request.client_id.as_deref(),
            user = body.about.user.as_deref(),
            metadata = body.about.metadata.as_deref(),
            "online request valid"
        );
        let facts = self.facts(request, &id, &plugin, listed);
        Ok(Admitted {
            request,
            id,
            provider_model: at_provider,
            facts,
            plugin,
            body: sent,
            is_stream,
            wants_usage: body.wants_usage,
            breaker,
            quota,
        })
    }

    /// Returns what a valid request is counted by.
    fn facts(
        &self,
        request: &OnlineRequest,
        id: &str,
        plugin: &Arc<Plugin>,
        listed: Arc<str>,
    ) -> Arc<RequestFacts> {
        let context = request.trace.map_or_else(|| Context::of(id), |parent| parent.child());
        let attempt = match request.trace {
            // Without spans of our own, the provider continues the trace of the client.
            Some(parent) if !self.spans.traces.is_enabled() => Some(parent),
            Some(_) => Some(context.child()),
            None => self.spans.attempt(context),
        };
        Arc::new(RequestFacts {
            metrics: self.metrics.clone(),
            spans: self.spans.clone(),
            tenant: request.tenant.clone(),
            plugin: plugin.clone(),
            listed,
            endpoint: request.endpoint,
            id: id.to_owned(),
            parent: request.trace,
            context,
            attempt,
            is_sent: AtomicBool::new(false),
            usage: Mutex::default(),
        })
    }
}

/// Returns a path within the body.
fn within_body(param: &str) -> &str {
    param.strip_prefix("body.").unwrap_or(param)
}
