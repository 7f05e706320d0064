//! Files: uploads by clients, input of batches and output of batches.

use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use batchwright_domain::units::Size;
use batchwright_memory::Share;
use batchwright_store::{BlobWriter, FileQuery, FileRecord, Paged, StoreError};
use bytes::{Bytes, BytesMut};
use uuid::Uuid;

use super::Batches;

/// Metadata of an upload.
#[derive(Debug)]
pub struct NewFile {
    /// Name of the file as the client sent it.
    pub filename: String,
    /// Purpose of the file, such as `batch`.
    pub purpose: String,
    /// Lifetime of the file. An input file without a lifetime gets `input_file_lifetime`.
    pub lifetime: Option<Duration>,
}

/// Error of an upload. The texts are shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The file has no bytes.
    #[error("The file is empty.")]
    Empty,
    /// The file exceeds `max_file_size`.
    #[error("The file is larger than {0} (max_file_size); split it into several.")]
    TooLarge(Size),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Upload in progress. Its bytes are written to disk before its record exists.
pub struct Upload {
    object: PendingObject,
    writer: BlobWriter,
    /// Bytes that are not written yet, within the memory reserved in `share`.
    buffer: BytesMut,
    share: Share,
}

/// Size of the write buffer of an upload, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// Registered object of an upload. Dropped without a record, the object is left to the janitor.
struct PendingObject {
    batches: Arc<Batches>,
    tenant: String,
    id: String,
    recorded: bool,
}

impl Drop for PendingObject {
    fn drop(&mut self) {
        if !self.recorded {
            let aborted = (std::mem::take(&mut self.tenant), std::mem::take(&mut self.id));
            self.batches
                .aborted_objects
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(aborted);
            self.batches.cleanup_needed.notify_one();
        }
    }
}

impl Batches {
    /// Starts an upload: registers the object and opens its writer.
    pub async fn upload(self: &Arc<Self>, tenant: &str) -> batchwright_store::Result<Upload> {
        let id = format!("file-{}", Uuid::new_v4().simple());
        let object =
            PendingObject { batches: self.clone(), tenant: tenant.to_owned(), id, recorded: false };
        self.store.begin_object(tenant, &object.id).await?;
        let (blobs, tenant_name, id) = (self.blobs.clone(), tenant.to_owned(), object.id.clone());
        // The writer is opened on a separate task. If the client disconnects now, the writer is
        // dropped and leaves no unknown file.
        let opening = tokio::spawn(async move { blobs.writer(&tenant_name, &id).await });
        let writer = opening.await.unwrap_or(Err(StoreError::Closed))?;
        let share = self.memory.clients.share(&tenant.into());
        Ok(Upload { object, writer, buffer: BytesMut::new(), share })
    }

    /// Returns a file, or `None` if it is unknown, deleted or expired.
    pub async fn file(
        &self,
        tenant: &str,
        id: &str,
    ) -> batchwright_store::Result<Option<FileRecord>> {
        self.store.file(tenant, id, self.clock.now()).await
    }

    /// Returns a page of files.
    pub async fn files(
        &self,
        tenant: &str,
        query: FileQuery,
    ) -> batchwright_store::Result<Paged<FileRecord>> {
        self.store.files(tenant, query).await
    }

    /// Deletes a file and returns false if there was no such file.
    pub async fn delete_file(&self, tenant: &str, id: &str) -> batchwright_store::Result<bool> {
        let deleted = self.store.delete_file(tenant, id, self.clock.now()).await?;
        if deleted {
            self.cleanup_needed.notify_one();
        }
        Ok(deleted)
    }

    /// Returns a byte range of a file.
    pub async fn content(
        &self,
        tenant: &str,
        id: &str,
        range: Range<u64>,
    ) -> batchwright_store::Result<Bytes> {
        self.blobs.read_range(tenant, id, range).await
    }

    /// Returns the size of a file in bytes.
    pub async fn content_size(&self, tenant: &str, id: &str) -> batchwright_store::Result<u64> {
        self.blobs.size(tenant, id).await
    }
}

impl Upload {
    /// Appends bytes to the buffer and writes the buffer whenever it is full.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), UploadError> {
        let limit = *self.object.batches.settings.batch.max_file_size;
        let size = self
            .writer
            .written()
            .saturating_add(self.buffer.len() as u64)
            .saturating_add(bytes.len() as u64);
        if size > limit.bytes() {
            return Err(UploadError::TooLarge(limit));
        }
        for chunk in bytes.chunks(BUFFER_BYTES) {
            if self.buffer.is_empty() {
                self.share.cover(BUFFER_BYTES).await;
            }
            self.buffer.extend_from_slice(chunk);
            if self.buffer.len() >= BUFFER_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Writes the buffer and releases its memory, so that an idle upload holds no memory.
    pub async fn flush(&mut self) -> Result<(), UploadError> {
        if !self.buffer.is_empty() {
            self.writer.write(std::mem::take(&mut self.buffer).freeze()).await?;
        }
        self.share.settle(0);
        Ok(())
    }

    /// Completes the upload. The file exists as soon as its record is committed.
    ///
    /// The completion runs on a separate task, so that a disconnected client cannot interrupt it.
    pub async fn finish(self, new: NewFile) -> Result<FileRecord, UploadError> {
        let finishing = tokio::spawn(self.finish_now(new));
        finishing.await.unwrap_or(Err(UploadError::Store(StoreError::Closed)))
    }

    /// Completes the upload on the current task.
    async fn finish_now(mut self, new: NewFile) -> Result<FileRecord, UploadError> {
        self.flush().await?;
        if self.writer.written() == 0 {
            self.writer.abort().await;
            return Err(UploadError::Empty);
        }
        let Self { mut object, writer, .. } = self;
        let bytes = writer.finish().await?;
        let batches = object.batches.clone();
        let created_at = batches.clock.now();
        let by_default = (new.purpose == "batch")
            .then(|| batches.settings.retention.input_file_lifetime.duration());
        let file = FileRecord {
            id: object.id.clone(),
            bytes,
            created_at,
            expires_at: new.lifetime.or(by_default).map(|lifetime| created_at.after(lifetime)),
            filename: new.filename,
            purpose: new.purpose,
        };
        batches.store.insert_file(&object.tenant, file.clone()).await?;
        object.recorded = true;
        Ok(file)
    }

    /// Aborts the upload.
    ///
    /// A separate task waits for writes in flight before the janitor may remove the object.
    pub async fn abort(self) {
        let Self { object, writer, .. } = self;
        let aborting = tokio::spawn(async move {
            writer.abort().await;
            drop(object);
        });
        aborting.await.ok();
    }
}
