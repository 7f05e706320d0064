//! Clears away what nobody needs any more: results that are in files, the bytes of files that are gone, batches long ended, and the space
//! they took.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::Batches;
use crate::clock::Timestamp;
use crate::store::Result;

/// How often it looks without a hint: files expire by themselves.
const LOOK: Duration = Duration::from_secs(60);

/// How often batches are looked for that nobody needs to remember.
const SEARCH: Duration = Duration::from_secs(3600);

/// How long the id of a file that is gone can still be named as the one to begin a page after.
const REMEMBERED: Duration = Duration::from_secs(86_400);

/// Rows and files removed at a time, so that whoever else writes does not wait long.
const ROWS: usize = 2000;
const FILES: usize = 100;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Chore {
    GivenUp,
    Results,
    Files,
    FileNames,
    Batches,
    Space,
}

impl Batches {
    pub(super) async fn clear_away(self: Arc<Self>) {
        let mut next_search = self.clock.now();
        while !self.closing.is_cancelled() {
            self.clear_once(&mut next_search).await;
            let hint = async {
                tokio::select! {
                    () = self.garbage.notified() => {}
                    () = self.clock.sleep(LOOK) => {}
                }
            };
            self.closing.run_until_cancelled(hint).await;
        }
    }

    async fn clear_once(&self, next_search: &mut Timestamp) {
        let now = self.clock.now();
        let search = now >= *next_search;
        if search {
            *next_search = now.after(SEARCH);
        }
        for chore in [
            Chore::GivenUp,
            Chore::Results,
            Chore::Files,
            Chore::FileNames,
            Chore::Batches,
            Chore::Space,
        ] {
            if chore == Chore::Batches && !search {
                continue;
            }
            while !self.closing.is_cancelled() {
                match self.do_some(chore).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        // It is left for the next time, and keeps nothing else from being done.
                        tracing::warn!("what is not needed any more stays for now: {error}");
                        break;
                    }
                }
            }
        }
    }

    /// Does a part of a chore; whether there may be more of it.
    async fn do_some(&self, chore: Chore) -> Result<bool> {
        match chore {
            Chore::GivenUp => self.remove_given_up().await,
            Chore::Results => self.store.discard_results(ROWS).await,
            Chore::Files => self.remove_files().await,
            Chore::FileNames => {
                self.store.forget_files(self.clock.now().before(REMEMBERED), ROWS).await
            }
            Chore::Batches => self.forget_batches().await,
            Chore::Space => self.store.compact().await,
        }
    }

    /// Removes some files that were deleted or have expired; whether there may be more.
    async fn remove_files(&self) -> Result<bool> {
        let gone = self.store.garbage(self.clock.now(), FILES).await?;
        let mut failed = None;
        for (tenant, id) in &gone {
            // The bytes first: as long as the row is there, they are found again.
            let removed = async {
                self.blobs.delete(tenant, id).await?;
                self.store.file_removed(tenant, id).await
            };
            // One that cannot be removed is no reason to keep the others.
            failed = removed.await.err().or(failed);
        }
        failed.map_or(Ok(gone.len() == FILES), Err)
    }

    /// Forgets some batches that ended long ago; whether there may be more.
    async fn forget_batches(&self) -> Result<bool> {
        let ended_before = self.clock.now().before(self.settings.batch_lifetime.duration());
        let found = self.store.forgettable_batches(ended_before, FILES).await?;
        let more = found.len() == FILES;
        if !found.is_empty() {
            self.store.forget_batches(found).await?;
        }
        Ok(more)
    }

    /// Removes an object whose writing was given up; whether there was one.
    async fn remove_given_up(&self) -> Result<bool> {
        let next = || self.given_up.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some((tenant, id)) = next() else { return Ok(false) };
        let removed = async {
            // A client who went away at the last moment may have a file all the same.
            if self.store.is_pending(&tenant, &id).await? {
                // The bytes first: as long as they are noted, they are found again.
                self.blobs.delete(&tenant, &id).await?;
                self.store.object_removed(&tenant, &id).await?;
            }
            Ok(())
        };
        if let Err(error) = removed.await {
            self.given_up.lock().unwrap_or_else(PoisonError::into_inner).push((tenant, id));
            return Err(error);
        }
        Ok(true)
    }

    /// Removes the objects that former processes had begun and did not come to record.
    pub(super) async fn remove_abandoned(&self) -> Result<()> {
        loop {
            let abandoned = self.store.abandoned_objects(FILES).await?;
            for (tenant, id) in &abandoned {
                self.blobs.delete(tenant, id).await?;
                self.store.object_removed(tenant, id).await?;
            }
            if abandoned.len() < FILES {
                return Ok(());
            }
        }
    }
}
