//! Objects that are being written, under a registration that is renewed while bytes arrive, and
//! those that nobody writes any more.
//!
//! The registration tells the janitor of any process that the object has a writer; see
//! [`Store::register_object`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::ObjectKey;
use batchwright_store::{ObjectWriter, Objects, Result, Store, StoreError};

/// Lease of the registration of an object that is being written.
const OBJECT_LEASE: Duration = Duration::from_secs(600);

/// Delay of a renewal after one that failed.
const RENEWAL_RETRY_DELAY: Duration = Duration::from_secs(10);

/// Maximum number of aborted uploads that wait for the janitor. The objects of further ones are
/// removed after their lease.
const MAX_ABORTED_UPLOADS: usize = 10_000;

/// Objects of aborted uploads, whose registrations the janitor ends.
#[derive(Default)]
pub(crate) struct AbortedUploads(Mutex<Vec<ObjectKey>>);

impl AbortedUploads {
    /// Adds an object, unless there are too many.
    pub(crate) fn add(&self, key: ObjectKey) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.len() < MAX_ABORTED_UPLOADS {
            keys.push(key);
        }
    }

    /// Removes and returns an object.
    pub(crate) fn next(&self) -> Option<ObjectKey> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

/// Writer of a registered object.
pub(crate) struct RegisteredWriter {
    store: Arc<dyn Store>,
    clock: Clock,
    key: ObjectKey,
    writer: ObjectWriter,
    /// Time at which the registration is renewed.
    renew_at: Timestamp,
}

impl RegisteredWriter {
    /// Registers an object and starts to write it.
    pub(crate) async fn create(
        store: Arc<dyn Store>,
        objects: Arc<dyn Objects>,
        clock: Clock,
        key: ObjectKey,
    ) -> Result<Self> {
        let now = clock.now();
        store.register_object(&key, now, now.after(OBJECT_LEASE)).await?;
        let writer = ObjectWriter::create(&*objects, &key).await?;
        Ok(Self { store, clock, key, writer, renew_at: now.after(OBJECT_LEASE / 2) })
    }

    /// Appends bytes, and renews the registration if it is due.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let now = self.clock.now();
        if now >= self.renew_at {
            self.renew(now).await?;
        }
        self.writer.write(bytes).await
    }

    /// Renews the registration. A renewal that fails for a passing reason is tried again soon.
    async fn renew(&mut self, now: Timestamp) -> Result<()> {
        match self.store.renew_object(&self.key, now.after(OBJECT_LEASE)).await {
            Ok(()) => self.renew_at = now.after(OBJECT_LEASE / 2),
            Err(error @ (StoreError::Unregistered | StoreError::Closed)) => return Err(error),
            Err(error) => {
                let ObjectKey { tenant, file } = &self.key;
                tracing::warn!(%tenant, %file, %error, "object renewal failed, will be retried");
                self.renew_at = now.after(RENEWAL_RETRY_DELAY);
            }
        }
        Ok(())
    }

    /// Returns the number of bytes that complete the current part.
    pub(crate) fn room(&self) -> usize {
        self.writer.room()
    }

    /// Returns true if the buffer is empty.
    pub(crate) fn is_flushed(&self) -> bool {
        self.writer.is_flushed()
    }

    /// Writes the buffer if it is large enough for a part; returns true if the buffer is empty
    /// then.
    pub(crate) async fn flush_if_possible(&mut self) -> Result<bool> {
        self.writer.flush_if_possible().await
    }

    /// Returns the number of bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.writer.written()
    }

    /// Completes the object and returns its size in bytes.
    pub(crate) async fn finish(self) -> Result<u64> {
        self.writer.finish().await
    }

    /// Aborts the object and removes what was written of it.
    pub(crate) async fn abort(self) {
        self.writer.abort().await;
    }
}
