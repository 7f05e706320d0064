//! Endpoints of projects: what clients ask for.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::{EventId, TenantId, WebhookId};
use batchwright_domain::webhook::EventType;
use batchwright_egress::{InvalidAllow, Outbound};
use batchwright_store::accounts::{Actor, ListQuery};
use batchwright_store::webhooks::{
    DeliveryRecord, NewWebhook, StoredSecret, WebhookChanges, WebhookRecord,
};
use batchwright_store::{Paged, Store, StoreError};
use batchwright_tenancy::SealingKey;
use url::Url;
use uuid::Uuid;

use crate::config::WebhookConfig;
use crate::delivery::{Envelope, post};
use crate::sign::{hint, new_secret};

/// Maximum length of the name of an endpoint, in characters.
const MAX_NAME_CHARS: usize = 256;

/// Maximum length of a URL, in bytes.
const MAX_URL_BYTES: usize = 2048;

/// Maximum number of tests that run at a time.
const MAX_TESTS: usize = 32;

/// Time for which an old secret signs after a rotation that keeps it.
const OLD_SECRET_LIFETIME: std::time::Duration = std::time::Duration::from_secs(86_400);

/// Reason why a request about webhooks fails. The texts are shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Unknown endpoint.
    #[error("No webhook endpoint found with id '{0}'.")]
    UnknownEndpoint(String),
    /// Unknown event of an endpoint.
    #[error("No delivery of the event '{0}' to this webhook endpoint found.")]
    UnknownEvent(String),
    /// Value that is not valid, with the name of its parameter.
    #[error("Invalid '{param}': {message}")]
    Invalid {
        /// Name of the parameter.
        param: &'static str,
        /// Reason and remedy.
        message: String,
    },
    /// Endpoint that a test has not reached.
    #[error("{0}")]
    Unreachable(String),
    /// Test beside another one of the project, or beside too many of others.
    #[error("A test of a webhook endpoint is running; try again when it has ended.")]
    TestRunning,
    /// Secret that cannot be made, sealed or opened. The text is for the operator.
    #[error("{0}")]
    Secret(String),
    /// Failure of the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Text of a secret, which is shown once.
pub struct Secret(pub String);

/// Endpoint that a client asks for.
#[derive(Clone, Debug, Default)]
pub struct NewEndpoint {
    /// Name.
    pub name: Option<String>,
    /// URL.
    pub url: Option<String>,
    /// Events.
    pub event_types: Option<Vec<String>>,
}

/// Outcome of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tested {
    /// HTTP status that the endpoint has answered with.
    pub status: u16,
    /// Event that was sent.
    pub event: EventType,
}

/// Service of webhooks.
pub struct WebhookService {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Clock,
    pub(crate) config: WebhookConfig,
    pub(crate) outbound: Outbound,
    /// Key that seals secrets; without one they are stored as they are.
    key: Option<SealingKey>,
    /// Tenants with a running test.
    testing: Mutex<HashSet<TenantId>>,
}

/// Test that is running until dropped.
struct RunningTest<'a> {
    service: &'a WebhookService,
    tenant: &'a TenantId,
}

impl Drop for RunningTest<'_> {
    fn drop(&mut self) {
        self.service.testing().remove(self.tenant);
    }
}

/// Checked values of an endpoint.
struct Checked {
    name: Option<String>,
    url: Option<String>,
    event_types: Option<Vec<EventType>>,
}

impl WebhookService {
    /// Creates the service.
    pub fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        config: WebhookConfig,
        key: Option<SealingKey>,
    ) -> Result<Self, InvalidAllow> {
        let outbound = Outbound::new(&config.webhook_allow_http.0)?;
        Ok(Self { store, clock, config, outbound, key, testing: Mutex::default() })
    }

    fn testing(&self) -> MutexGuard<'_, HashSet<TenantId>> {
        self.testing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a test: one of a tenant at a time, and [`MAX_TESTS`] of all.
    fn begin_test<'a>(&'a self, tenant: &'a TenantId) -> Result<RunningTest<'a>, WebhookError> {
        let mut testing = self.testing();
        if testing.len() >= MAX_TESTS || !testing.insert(tenant.clone()) {
            return Err(WebhookError::TestRunning);
        }
        Ok(RunningTest { service: self, tenant })
    }

    /// Returns the time of the server.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Creates an endpoint. The secret is returned this once.
    pub async fn create(
        &self,
        tenant: &TenantId,
        new: NewEndpoint,
        by: Actor,
    ) -> Result<(WebhookRecord, Secret), WebhookError> {
        let missing = |param| WebhookError::Invalid { param, message: "it is missing.".into() };
        let Checked { name, url, event_types } = self.check(new)?;
        let id: WebhookId = format!("whe_{}", Uuid::new_v4().simple()).into();
        let (secret, text, hint) = self.secret(tenant, &id)?;
        let new = NewWebhook {
            id,
            name: name.ok_or_else(|| missing("name"))?,
            url: url.ok_or_else(|| missing("url"))?,
            event_types: event_types.ok_or_else(|| missing("event_types"))?,
            secret,
            hint,
        };
        let max = self.config.webhook_max_endpoints;
        let record = self.store.create_webhook(tenant, new, max, by).await?;
        Ok((record, text))
    }

    /// Returns an endpoint.
    pub async fn get(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
    ) -> Result<WebhookRecord, WebhookError> {
        self.store.webhook(tenant, id).await?.ok_or_else(|| unknown(id))
    }

    /// Lists endpoints.
    pub async fn list(
        &self,
        tenant: &TenantId,
        part: ListQuery,
    ) -> Result<Paged<WebhookRecord>, WebhookError> {
        Ok(self.store.webhooks(tenant, part).await?)
    }

    /// Changes an endpoint. A change enables a disabled endpoint.
    pub async fn update(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        changes: NewEndpoint,
        by: Actor,
    ) -> Result<WebhookRecord, WebhookError> {
        let Checked { name, url, event_types } = self.check(changes)?;
        let changes = WebhookChanges { name, url, event_types, secret: None };
        let changed = self.store.update_webhook(tenant, id, changes, by).await?;
        changed.ok_or_else(|| unknown(id))
    }

    /// Deletes an endpoint with its deliveries.
    pub async fn delete(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        by: Actor,
    ) -> Result<(), WebhookError> {
        match self.store.delete_webhook(tenant, id, by).await? {
            true => Ok(()),
            false => Err(unknown(id)),
        }
    }

    /// Replaces the secret of an endpoint. The new one is returned this once.
    pub async fn rotate_secret(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        keeps_old: bool,
        by: Actor,
    ) -> Result<(WebhookRecord, Secret), WebhookError> {
        let (secret, text, hint) = self.secret(tenant, id)?;
        let old_until = keeps_old.then(|| self.clock.now().after(OLD_SECRET_LIFETIME));
        let secret = Some((secret, hint, old_until));
        let changes = WebhookChanges { secret, ..WebhookChanges::default() };
        let changed = self.store.update_webhook(tenant, id, changes, by).await?;
        Ok((changed.ok_or_else(|| unknown(id))?, text))
    }

    /// Sends a sample event now, and returns the status of the answer.
    pub async fn test(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        event: &str,
    ) -> Result<Tested, WebhookError> {
        let event = parse_event("event_type", event)?;
        let webhook = self.get(tenant, id).await?;
        let _running = self.begin_test(tenant)?;
        let event_id: EventId = format!("evt_{}", Uuid::new_v4().simple()).into();
        let envelope = Envelope {
            id: &event_id,
            event,
            subject: "batch_sample",
            created_at: self.clock.now(),
        };
        let answer = post(self, tenant, &webhook, &envelope).await;
        match answer {
            Ok(answer) => Ok(Tested { status: answer.status, event }),
            Err(message) => Err(WebhookError::Unreachable(message)),
        }
    }

    /// Lists the deliveries of an endpoint, newest first.
    pub async fn deliveries(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        part: ListQuery,
    ) -> Result<Paged<DeliveryRecord>, WebhookError> {
        self.store.deliveries(tenant, id, part).await?.ok_or_else(|| unknown(id))
    }

    /// Delivers an event again, under the same id.
    pub async fn redeliver(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        event: &EventId,
    ) -> Result<DeliveryRecord, WebhookError> {
        let again = self.store.redeliver(tenant, id, event, self.clock.now()).await?;
        match again {
            Some(delivery) => Ok(delivery),
            None => {
                self.get(tenant, id).await?;
                Err(WebhookError::UnknownEvent(event.to_string()))
            }
        }
    }

    /// Checks what a client has given.
    fn check(&self, given: NewEndpoint) -> Result<Checked, WebhookError> {
        let invalid = |param, message| Err(WebhookError::Invalid { param, message });
        let NewEndpoint { name, url, event_types } = given;
        if name.as_ref().is_some_and(|name| {
            let length = name.chars().count();
            length == 0 || length > MAX_NAME_CHARS || name.chars().any(char::is_control)
        }) {
            let message = format!("expected 1 to {MAX_NAME_CHARS} characters.");
            return invalid("name", message);
        }
        if let Some(text) = &url {
            if text.len() > MAX_URL_BYTES {
                return invalid("url", format!("expected at most {MAX_URL_BYTES} characters."));
            }
            let parsed = match Url::parse(text) {
                Ok(parsed) => parsed,
                Err(error) => return invalid("url", format!("it is no URL: {error}.")),
            };
            if self.outbound.check(&parsed).is_err() {
                let message = "expected an https URL of a public host, without a user name.";
                return invalid("url", message.into());
            }
        }
        let event_types = match event_types {
            None => None,
            Some(names) if names.is_empty() => {
                return invalid("event_types", format!("it is empty. {}", supported()));
            }
            Some(names) => {
                let mut types = names
                    .iter()
                    .map(|name| parse_event("event_types", name))
                    .collect::<Result<Vec<_>, _>>()?;
                types.sort_unstable();
                types.dedup();
                Some(types)
            }
        };
        Ok(Checked { name, url, event_types })
    }

    /// Creates a secret: as it is stored, as it is shown, and its hint.
    fn secret(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
    ) -> Result<(StoredSecret, Secret, String), WebhookError> {
        let failed = |error: &dyn std::fmt::Display| WebhookError::Secret(error.to_string());
        let text = new_secret().map_err(|error| failed(&error))?;
        let stored = match &self.key {
            Some(key) => {
                let sealed =
                    key.seal(&text, &purpose(tenant, id)).map_err(|error| failed(&error))?;
                StoredSecret { bytes: sealed.into(), is_sealed: true }
            }
            None => StoredSecret { bytes: text.as_bytes().into(), is_sealed: false },
        };
        let hint = hint(&text);
        Ok((stored, Secret(text), hint))
    }

    /// Returns the texts of the secrets that sign now. An error is for the operator.
    pub(crate) fn secrets(
        &self,
        tenant: &TenantId,
        webhook: &WebhookRecord,
    ) -> Result<Vec<String>, String> {
        let open = |secret: &StoredSecret| match (secret.is_sealed, &self.key) {
            (false, _) => {
                String::from_utf8(secret.bytes.to_vec()).map_err(|error| error.to_string())
            }
            (true, Some(key)) => key
                .open(&secret.bytes, &purpose(tenant, &webhook.id))
                .map_err(|error| error.to_string()),
            (true, None) => Err("the secret is sealed, and there is no credential_key".to_owned()),
        };
        let mut secrets = vec![open(&webhook.secret)?];
        if let Some((old, until)) = &webhook.old_secret
            && *until > self.clock.now()
        {
            match open(old) {
                Ok(old) => secrets.push(old),
                // The new secret is enough: a rotation is the way out of a lost key.
                Err(error) => {
                    let webhook = &webhook.id;
                    tracing::warn!(%tenant, %webhook, error, "old webhook secret not used");
                }
            }
        }
        Ok(secrets)
    }
}

/// Returns what a secret is sealed for.
fn purpose<'a>(tenant: &'a TenantId, id: &'a WebhookId) -> [&'a str; 3] {
    ["webhook", tenant.as_str(), id.as_str()]
}

fn unknown(id: &WebhookId) -> WebhookError {
    WebhookError::UnknownEndpoint(id.to_string())
}

fn supported() -> String {
    let names: Vec<&str> = EventType::ALL.iter().map(|event| event.as_str()).collect();
    format!("Supported values are: '{}'.", names.join("', '"))
}

fn parse_event(param: &'static str, name: &str) -> Result<EventType, WebhookError> {
    EventType::parse(name).ok_or_else(|| {
        let shown: String = name.chars().take(64).collect();
        let message = format!("'{shown}' is not available. {}", supported());
        WebhookError::Invalid { param, message }
    })
}
