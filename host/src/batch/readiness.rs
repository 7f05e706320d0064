//! Whether the server can do its work, by trying: a small write of everything that a batch needs, at most once in a while.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{Batches, ENDPOINTS};
use crate::store::{Result, StoreError};

/// How long an answer holds, so that probes cost nothing.
const FRESH: Duration = Duration::from_secs(2);

/// How long a probe may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Files whose objects are looked for. One that is gone is its owner's loss; all of them gone is the store's.
const SAMPLE: usize = 5;

/// Whether a batch that is created now would be validated, executed and kept.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Why not, in words that may be shown to anybody. Ready if there are none.
    pub reasons: Vec<String>,
}

/// The last answers.
#[derive(Default)]
pub struct Probes {
    ready: tokio::sync::Mutex<Option<(std::time::Instant, Readiness)>>,
    /// What was told to the log last.
    told: Mutex<Vec<String>>,
}

impl Batches {
    /// Whether a batch that is created now would be validated, executed and kept.
    pub async fn readiness(&self) -> Readiness {
        // One probe at a time; whoever comes meanwhile gets its answer.
        let mut last = self.probes.ready.lock().await;
        let mut readiness = match &*last {
            Some((at, readiness)) if at.elapsed() < FRESH => readiness.clone(),
            _ => {
                let readiness = self.probe().await;
                *last = Some((std::time::Instant::now(), readiness.clone()));
                readiness
            }
        };
        drop(last);
        if self.draining.is_cancelled() {
            readiness.reasons.insert(0, "The server is shutting down.".into());
        }
        readiness
    }

    /// Whether the store answers, so that files can be read and deleted.
    pub async fn is_serving(&self) -> bool {
        matches!(tokio::time::timeout(TIMEOUT, self.store.probe_read()).await, Ok(Ok(())))
    }

    async fn probe(&self) -> Readiness {
        let mut reasons = Vec::new();
        let mut details = Vec::new();
        let database = self.timed(self.store.probe(self.clock.now())).await;
        let objects = self.timed(self.probe_objects()).await;
        for (what, found) in [("database", database), ("object store", objects)] {
            match found {
                Ok(()) => {}
                Err(error) => {
                    let reason = match &error {
                        StoreError::Full(_) => "is full",
                        StoreError::Missing(_) => "lacks what was stored in it",
                        _ => "does not work",
                    };
                    reasons.push(format!("The {what} {reason}."));
                    details.push(format!("{what}: {error}"));
                }
            }
        }
        let plugins = self.registry.current();
        if plugins.adapters().next().is_none() {
            reasons.push("No plugin is loaded that serves a model.".into());
            details.push("plugins: no adapter is loaded".into());
        }
        // As for tenants that no plugin names.
        if let Err(why) =
            plugins.check_required(&self.settings.required_plugins, "default", &ENDPOINTS)
        {
            reasons.push("Required plugins are not loaded.".into());
            details.push(format!("plugins: {why}"));
        }
        self.tell(details);
        Readiness { reasons }
    }

    async fn probe_objects(&self) -> Result<()> {
        self.blobs.probe().await?;
        let files = self.store.newest_files(self.clock.now(), SAMPLE).await?;
        let mut missing = 0_usize;
        for (tenant, id) in &files {
            match self.blobs.size(tenant, id).await {
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

    async fn timed(&self, probe: impl Future<Output = Result<()>>) -> Result<()> {
        let timeout = Err(StoreError::Database(format!("no answer within {TIMEOUT:?}")));
        tokio::time::timeout(TIMEOUT, probe).await.unwrap_or(timeout)
    }

    /// A line in the log whenever something changes.
    fn tell(&self, details: Vec<String>) {
        let mut told = self.probes.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != details {
            match details.as_slice() {
                [] => tracing::info!("the server is ready"),
                details => tracing::warn!("the server is not ready: {}", details.join("; ")),
            }
            *told = details;
        }
    }
}
