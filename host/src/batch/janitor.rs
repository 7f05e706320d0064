//! Clears away what nobody needs any more: results that are in files, the bytes of files that are gone, batches long ended, and the space
//! they took.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;

use super::Batches;
use crate::clock::Timestamp;
use crate::store::Result;

/// How often it looks without a hint: files expire by themselves.
const LOOK: Duration = Duration::from_secs(60);

/// How often it looks for objects that no record leads to, which takes a walk through all of them, and how old they must be: one is
/// written before its record.
const SEARCH: Duration = Duration::from_secs(3600);

/// Rows and files removed at a time, so that whoever else writes does not wait long.
const ROWS: usize = 2000;
const FILES: usize = 100;

impl Batches {
    pub(super) async fn clear_away(self: Arc<Self>) {
        let mut next_search = self.clock.now();
        while !self.closing.is_cancelled() {
            if let Err(error) = self.clear_once(&mut next_search).await {
                tracing::warn!("what is not needed any more stays for now: {error}");
            }
            let hint = async {
                tokio::select! {
                    () = self.garbage.notified() => {}
                    () = self.clock.sleep(LOOK) => {}
                }
            };
            self.closing.run_until_cancelled(hint).await;
        }
    }

    async fn clear_once(&self, next_search: &mut Timestamp) -> Result<()> {
        let closing = || self.closing.is_cancelled();
        while !closing() && self.store.discard_results(ROWS).await? {}
        while !closing() && self.remove_files().await? {}
        let ended_before = self.clock.now().before(self.settings.batch_lifetime.duration());
        while !closing() && self.store.forget_batches(ended_before, FILES).await? {}
        if self.clock.now() >= *next_search {
            self.remove_orphans().await?;
            *next_search = self.clock.now().after(SEARCH);
        }
        while !closing() && self.store.compact().await? {}
        Ok(())
    }

    /// Removes some files that were deleted or have expired; whether there may be more.
    async fn remove_files(&self) -> Result<bool> {
        let gone = self.store.garbage(self.clock.now(), FILES).await?;
        for (tenant, id) in &gone {
            // The bytes first: as long as the row is there, they are found again.
            self.blobs.delete(tenant, id).await?;
            self.store.forget_file(tenant, id).await?;
        }
        Ok(gone.len() == FILES)
    }

    /// Removes objects whose process ended before their record was made.
    async fn remove_orphans(&self) -> Result<()> {
        let mut found = self.blobs.unchanged_since(self.clock.now().before(SEARCH), FILES);
        while let Some(objects) = found.try_next().await? {
            for (tenant, id) in self.store.unknown_files(objects).await? {
                tracing::info!(tenant, id, "removed an object that no file leads to");
                self.blobs.delete(&tenant, &id).await?;
            }
            if self.closing.is_cancelled() {
                break;
            }
        }
        Ok(())
    }
}
