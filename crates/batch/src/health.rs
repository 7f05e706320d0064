//! Readiness: probes everything that a batch needs, with a small write to the database and to the
//! object store. The result is cached, so that frequent health checks cost nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::DEFAULT_TENANT;
use batchwright_plugin::Registry;
use batchwright_store::{Objects, Result, Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::parts::{Parts, Shared};
use crate::schedule::gate::{Cause, Gate};

/// Lifetime of a cached result.
const CACHE_LIFETIME: Duration = Duration::from_secs(2);

/// Timeout of each probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of newest files whose objects are checked. A few missing objects are the problem of their
/// owners. If all of them are missing, the object store is faulty.
const SAMPLED_FILES: usize = 5;

const SHUTTING_DOWN: &str = "The server is shutting down.";

/// Readiness of the server to validate, execute and store a new batch.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Reasons why the server is not ready, as text for clients. Empty if the server is ready.
    pub reasons: Vec<String>,
}

/// Probes of a server, with their latest results.
pub struct Health {
    store: Arc<dyn Store>,
    objects: Arc<dyn Objects>,
    registry: Arc<Registry>,
    clock: Clock,
    config: Arc<Config>,
    gate: Gate,
    draining: CancellationToken,
    ready: tokio::sync::Mutex<Option<(std::time::Instant, Readiness)>>,
    /// Causes in the latest log entry.
    logged: Mutex<Vec<String>>,
}

impl Health {
    pub(crate) fn new(parts: &Parts, shared: &Shared) -> Self {
        Self {
            store: parts.store.clone(),
            objects: parts.objects.clone(),
            registry: parts.registry.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
            gate: shared.gate.clone(),
            draining: shared.draining.clone(),
            ready: tokio::sync::Mutex::default(),
            logged: Mutex::default(),
        }
    }

    /// Returns the readiness of the server, from the cache if the latest result is recent.
    pub async fn readiness(&self) -> Readiness {
        // The lock allows one probe at a time. Concurrent callers get its result.
        let mut last = self.ready.lock().await;
        let mut readiness = match &*last {
            Some((at, readiness)) if at.elapsed() < CACHE_LIFETIME => readiness.clone(),
            _ => {
                let readiness = self.probe().await;
                *last = Some((std::time::Instant::now(), readiness.clone()));
                readiness
            }
        };
        drop(last);
        if self.draining.is_cancelled() {
            readiness.reasons.insert(0, SHUTTING_DOWN.into());
        }
        readiness
    }

    /// Returns why clients should be sent elsewhere; none if the database can be read, so that
    /// files and batches can be read, downloaded and deleted.
    pub async fn not_serving(&self) -> Option<&'static str> {
        if self.draining.is_cancelled() {
            return Some(SHUTTING_DOWN);
        }
        let probe = tokio::time::timeout(PROBE_TIMEOUT, self.store.probe_read()).await;
        (!matches!(probe, Ok(Ok(())))).then_some("The database does not answer.")
    }

    /// Probes the database, the object store and the plugins.
    async fn probe(&self) -> Readiness {
        let mut reasons = Vec::new();
        let mut details = Vec::new();
        let database = self.with_timeout(self.store.probe(self.clock.now())).await;
        let objects = self.with_timeout(self.probe_objects()).await;
        for (component, found) in [("database", database), ("object store", objects)] {
            match found {
                Ok(()) => {}
                Err(error) => {
                    let reason = match &error {
                        StoreError::Full(_) => "is full",
                        StoreError::Missing(_) => "is missing stored data",
                        _ => "does not work",
                    };
                    reasons.push(format!("The {component} {reason}."));
                    details.push(format!("{component}: {error}"));
                }
            }
        }
        // The last space of a disk may take the small write of the probe and no results.
        if let Some(cause) = self.gate.cause().filter(|_| reasons.is_empty()) {
            reasons.push(match cause {
                Cause::Full => "The database is full.".into(),
                Cause::Failing => "The database does not work.".into(),
            });
            details.push("database: results cannot be written".into());
        }
        let plugins = self.registry.current();
        if plugins.adapters().next().is_none() {
            reasons.push("No plugin is loaded that serves a model.".into());
            details.push("plugins: no adapter is loaded".into());
        }
        // The default tenant represents all tenants that no plugin names.
        let tenant = DEFAULT_TENANT.into();
        if let Err(why) = plugins.check_required(&self.config.required_plugins, &tenant) {
            reasons.push("Required plugins are not loaded.".into());
            details.push(format!("plugins: {why}"));
        }
        self.log_changes(details);
        Readiness { reasons }
    }

    /// Probes the object store with a write and checks the objects of the newest files.
    async fn probe_objects(&self) -> Result<()> {
        self.objects.probe().await?;
        let files = self.store.newest_files(self.clock.now(), SAMPLED_FILES).await?;
        let mut missing = 0_usize;
        for key in &files {
            match self.objects.size(key).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Missing(_)) => missing = missing.saturating_add(1),
                Err(error) => return Err(error),
            }
        }
        if missing == 0 {
            Ok(())
        } else {
            Err(StoreError::Missing(format!("the objects of the newest {missing} files")))
        }
    }

    /// Runs a probe with a timeout.
    async fn with_timeout(&self, probe: impl Future<Output = Result<()>>) -> Result<()> {
        let timeout = Err(StoreError::Database(format!("no response within {PROBE_TIMEOUT:?}")));
        tokio::time::timeout(PROBE_TIMEOUT, probe).await.unwrap_or(timeout)
    }

    /// Logs the readiness whenever it changes.
    fn log_changes(&self, details: Vec<String>) {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged != details {
            match details.as_slice() {
                [] => tracing::info!("server ready"),
                details => tracing::warn!(error = details.join("; "), "server not ready"),
            }
            *logged = details;
        }
    }
}
