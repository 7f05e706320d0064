//! Janitor: removes results that are in files, objects of deleted files, tombstones and old
//! batches, and returns their space to the disk.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_store::{Objects, Result, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::objects::AbortedUploads;
use crate::parts::{Parts, Shared};

/// Interval between cleanups without a notification. File expiry sends no notification.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(60);

/// Age from which usage is kept by hour and not by minute. A report by hour has up to a week.
const USAGE_BY_MINUTE_AGE: Duration = Duration::from_secs(8 * 86_400);

/// Interval between searches for old batches and old usage.
const BATCH_SEARCH_INTERVAL: Duration = Duration::from_secs(3600);

/// Lifetime of the tombstone of a removed file. Lists can use a tombstone as their start position.
const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(86_400);

/// Time in which the removal of an object must end, or else it is repeated.
const REMOVAL_LEASE: Duration = CLEANUP_INTERVAL;

/// Maximum number of rows removed in one step, so that other writers do not wait long.
const STEP_ROWS: usize = 2000;

/// Maximum number of files or objects removed in one step.
const STEP_FILES: usize = 100;

/// Maximum number of batches removed in one step. Each step reads all batches that are older than
/// the shortest lifetime of a project, so there should be few steps.
const STEP_BATCHES: usize = 1000;

/// Kind of garbage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Garbage {
    AbandonedObjects,
    Results,
    Files,
    Tombstones,
    Batches,
    Usage,
    Audit,
    DiskSpace,
}

/// Janitor of one process.
pub(crate) struct Janitor {
    store: Arc<dyn Store>,
    objects: Arc<dyn Objects>,
    clock: Clock,
    config: Arc<Config>,
    aborted_uploads: Arc<AbortedUploads>,
    cleanup_needed: Arc<Notify>,
    closing: CancellationToken,
}

impl Janitor {
    pub(crate) fn new(parts: &Parts, shared: &Shared) -> Self {
        Self {
            store: parts.store.clone(),
            objects: parts.objects.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
            aborted_uploads: shared.aborted_uploads.clone(),
            cleanup_needed: shared.cleanup_needed.clone(),
            closing: shared.closing.clone(),
        }
    }

    /// Runs cleanups until the server closes.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut next_search = self.clock.now();
        while !self.closing.is_cancelled() {
            self.clean_up(&mut next_search).await;
            let hint = async {
                tokio::select! {
                    () = self.cleanup_needed.notified() => {}
                    () = self.clock.sleep(CLEANUP_INTERVAL) => {}
                }
            };
            self.closing.run_until_cancelled(hint).await;
        }
    }

    /// Removes all garbage once.
    async fn clean_up(&self, next_search: &mut Timestamp) {
        let now = self.clock.now();
        let search = now >= *next_search;
        if search {
            *next_search = now.after(BATCH_SEARCH_INTERVAL);
        }
        for garbage in [
            Garbage::AbandonedObjects,
            Garbage::Results,
            Garbage::Files,
            Garbage::Tombstones,
            Garbage::Batches,
            Garbage::Usage,
            Garbage::Audit,
            Garbage::DiskSpace,
        ] {
            if matches!(garbage, Garbage::Batches | Garbage::Usage | Garbage::Audit) && !search {
                continue;
            }
            self.remove_all(garbage).await;
        }
    }

    /// Removes the objects that earlier processes left behind, before a worker writes them again.
    pub(crate) async fn remove_abandoned_objects(&self) {
        self.remove_all(Garbage::AbandonedObjects).await;
    }

    /// Removes all garbage of a kind. After an error, the next cleanup tries again.
    async fn remove_all(&self, garbage: Garbage) {
        while !self.closing.is_cancelled() {
            match self.remove_some(garbage).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(%error, "cleanup failed, will be retried");
                    return;
                }
            }
        }
    }

    /// Removes a part of the garbage and returns true if there may be more.
    async fn remove_some(&self, garbage: Garbage) -> Result<bool> {
        match garbage {
            Garbage::AbandonedObjects => self.remove_abandoned_object().await,
            Garbage::Results => self.store.discard_results(STEP_ROWS).await,
            Garbage::Files => self.remove_files().await,
            Garbage::Tombstones => {
                self.store
                    .purge_tombstones(self.clock.now().before(TOMBSTONE_LIFETIME), STEP_ROWS)
                    .await
            }
            Garbage::Batches => self.delete_old_batches().await,
            Garbage::Usage => {
                let before = self.clock.now().before(USAGE_BY_MINUTE_AGE);
                self.store.merge_usage(before, STEP_FILES).await
            }
            Garbage::Audit => {
                let lifetime = self.config.retention.audit_lifetime.duration();
                if lifetime.is_zero() {
                    return Ok(false);
                }
                self.store.purge_audit_log(self.clock.now().before(lifetime), STEP_ROWS).await
            }
            Garbage::DiskSpace => self.store.compact().await,
        }
    }

    /// Removes some deleted or expired files and returns true if there may be more.
    async fn remove_files(&self) -> Result<bool> {
        let removable = self.store.removable_files(self.clock.now(), STEP_FILES).await?;
        let mut failed = None;
        for key in &removable {
            // The object goes first. While the row exists, an interrupted removal is repeated.
            let removed = async {
                self.objects.delete(key).await?;
                self.store.mark_file_removed(key).await
            };
            // A file that cannot be removed must not block the others.
            failed = removed.await.err().or(failed);
        }
        failed.map_or(Ok(removable.len() == STEP_FILES), Err)
    }

    /// Removes some batches that ended long ago and returns true if there may be more.
    async fn delete_old_batches(&self) -> Result<bool> {
        let lifetime = self.config.retention.batch_lifetime.duration();
        let now = self.clock.now();
        let found = self.store.removable_batches(now, lifetime, STEP_BATCHES).await?;
        let more = found.len() == STEP_BATCHES;
        if !found.is_empty() {
            self.store.delete_batches(found).await?;
        }
        Ok(more)
    }

    /// Removes an object whose registration has ended and returns false if there is none.
    ///
    /// Each object is taken just before it is deleted, so that little time passes in which the
    /// reservation of its removal could end.
    async fn remove_abandoned_object(&self) -> Result<bool> {
        while let Some(key) = self.aborted_uploads.next() {
            if let Err(error) = self.store.abandon_object(&key).await {
                self.aborted_uploads.add(key);
                return Err(error);
            }
        }
        let now = self.clock.now();
        let until = now.after(REMOVAL_LEASE);
        let Some(key) = self.store.take_abandoned_object(now, until).await? else {
            return Ok(false);
        };
        // The object goes first. While the registration exists, an interrupted removal is repeated.
        if let Err(error) = self.objects.delete(&key).await {
            // An object that cannot be deleted must block neither the others nor its next writer.
            tracing::warn!(tenant = %key.tenant, file = %key.file, %error, "object not removed");
            self.store.postpone_removal(&key, until).await?;
        } else {
            self.store.unregister_object(&key).await?;
        }
        Ok(true)
    }
}
