//! Janitor: removes results that are in files, objects of deleted files, tombstones and old
//! batches, and returns their space to the disk.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_store::Result;

use super::Batches;

/// Interval between cleanups without a notification. File expiry sends no notification.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(60);

/// Interval between searches for old batches.
const BATCH_SEARCH_INTERVAL: Duration = Duration::from_secs(3600);

/// Lifetime of the tombstone of a removed file. Lists can use a tombstone as their start position.
const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(86_400);

/// Maximum number of rows removed in one step, so that other writers do not wait long.
const STEP_ROWS: usize = 2000;

/// Maximum number of files, objects or batches removed in one step.
const STEP_FILES: usize = 100;

/// Kind of garbage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Garbage {
    AbortedObjects,
    Results,
    Files,
    Tombstones,
    Batches,
    DiskSpace,
}

impl Batches {
    /// Runs cleanups until the server closes.
    pub(super) async fn run_janitor(self: Arc<Self>) {
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
            Garbage::AbortedObjects,
            Garbage::Results,
            Garbage::Files,
            Garbage::Tombstones,
            Garbage::Batches,
            Garbage::DiskSpace,
        ] {
            if garbage == Garbage::Batches && !search {
                continue;
            }
            while !self.closing.is_cancelled() {
                match self.remove_some(garbage).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        // The next cleanup tries again. Other kinds of garbage are removed now.
                        tracing::warn!(%error, "cleanup failed, will be retried");
                        break;
                    }
                }
            }
        }
    }

    /// Removes a part of the garbage and returns true if there may be more.
    async fn remove_some(&self, garbage: Garbage) -> Result<bool> {
        match garbage {
            Garbage::AbortedObjects => self.remove_aborted_object().await,
            Garbage::Results => self.store.discard_results(STEP_ROWS).await,
            Garbage::Files => self.remove_files().await,
            Garbage::Tombstones => {
                self.store
                    .forget_files(self.clock.now().before(TOMBSTONE_LIFETIME), STEP_ROWS)
                    .await
            }
            Garbage::Batches => self.forget_batches().await,
            Garbage::DiskSpace => self.store.compact().await,
        }
    }

    /// Removes some deleted or expired files and returns true if there may be more.
    async fn remove_files(&self) -> Result<bool> {
        let removable = self.store.garbage(self.clock.now(), STEP_FILES).await?;
        let mut failed = None;
        for (tenant, id) in &removable {
            // The object goes first. While the row exists, an interrupted removal is repeated.
            let removed = async {
                self.blobs.delete(tenant, id).await?;
                self.store.file_removed(tenant, id).await
            };
            // A file that cannot be removed must not block the others.
            failed = removed.await.err().or(failed);
        }
        failed.map_or(Ok(removable.len() == STEP_FILES), Err)
    }

    /// Removes some batches that ended long ago and returns true if there may be more.
    async fn forget_batches(&self) -> Result<bool> {
        let ended_before =
            self.clock.now().before(self.settings.retention.batch_lifetime.duration());
        let found = self.store.forgettable_batches(ended_before, STEP_FILES).await?;
        let more = found.len() == STEP_FILES;
        if !found.is_empty() {
            self.store.forget_batches(found).await?;
        }
        Ok(more)
    }

    /// Removes one object whose upload was aborted and returns false if there was none.
    async fn remove_aborted_object(&self) -> Result<bool> {
        let next = || self.aborted_objects.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some((tenant, id)) = next() else { return Ok(false) };
        let removed = async {
            // The upload of a client that disconnected at the last moment may have succeeded.
            if self.store.is_pending(&tenant, &id).await? {
                // The object goes first. While the registration exists, an interrupted removal is
                // repeated.
                self.blobs.delete(&tenant, &id).await?;
                self.store.object_removed(&tenant, &id).await?;
            }
            Ok(())
        };
        if let Err(error) = removed.await {
            self.aborted_objects.lock().unwrap_or_else(PoisonError::into_inner).push((tenant, id));
            return Err(error);
        }
        Ok(true)
    }

    /// Removes the objects that previous processes registered and did not commit.
    pub(super) async fn remove_abandoned(&self) -> Result<()> {
        loop {
            let abandoned = self.store.abandoned_objects(STEP_FILES).await?;
            for (tenant, id) in &abandoned {
                self.blobs.delete(tenant, id).await?;
                self.store.object_removed(tenant, id).await?;
            }
            if abandoned.len() < STEP_FILES {
                return Ok(());
            }
        }
    }
}
