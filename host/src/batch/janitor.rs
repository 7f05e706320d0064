//! Clears away what nobody needs any more: results that are in files, and the bytes of files that are gone.

use std::sync::Arc;
use std::time::Duration;

use super::Batches;
use crate::store::Result;

/// How often it looks without a hint: files expire by themselves.
const LOOK: Duration = Duration::from_secs(60);

/// Rows and files removed at a time, so that whoever else writes does not wait long.
const ROWS: usize = 2000;
const FILES: usize = 100;

impl Batches {
    pub(super) async fn clear_away(self: Arc<Self>) {
        while !self.closing.is_cancelled() {
            if let Err(error) = self.clear_once().await {
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

    async fn clear_once(&self) -> Result<()> {
        while self.store.discard_results(ROWS).await? {
            if self.closing.is_cancelled() {
                return Ok(());
            }
        }
        loop {
            let gone = self.store.garbage(self.clock.now(), FILES).await?;
            for (tenant, id) in &gone {
                // The bytes first: as long as the row is there, they are found again.
                self.blobs.delete(tenant, id).await?;
                self.store.forget_file(tenant, id).await?;
            }
            if gone.len() < FILES || self.closing.is_cancelled() {
                return Ok(());
            }
        }
    }
}
