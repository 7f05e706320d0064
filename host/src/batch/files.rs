//! Files: uploaded by clients, read by batches, made by batches.

use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use uuid::Uuid;

use super::Batches;
use crate::config::Size;
use crate::memory::Share;
use crate::store::{self, BlobWriter, FileQuery, FileRecord, Paged, StoreError};

/// What is known of an upload besides its bytes.
#[derive(Debug)]
pub struct NewFile {
    pub filename: String,
    pub purpose: String,
    /// How long it is kept; an input file that names none gets the setting's.
    pub lifetime: Option<Duration>,
}

#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error("The file is empty.")]
    Empty,
    #[error("The file is larger than {0} (max_file_size); split it into several.")]
    TooLarge(Size),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An upload under way. Its bytes are on the disk before anything else is known of it.
pub struct Upload {
    begun: Begun,
    writer: BlobWriter,
    /// Bytes that are not handed to the writer yet, and the memory that they take.
    buffer: BytesMut,
    share: Share,
}

/// What is gathered of an upload before it is written, in bytes.
const BUFFER: usize = 64 << 10;

/// An object whose writing was noted. Given up, it is left to whoever clears away.
struct Begun {
    batches: Arc<Batches>,
    tenant: String,
    id: String,
    recorded: bool,
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.recorded {
            let given_up = (std::mem::take(&mut self.tenant), std::mem::take(&mut self.id));
            self.batches.given_up.lock().unwrap_or_else(PoisonError::into_inner).push(given_up);
            self.batches.garbage.notify_one();
        }
    }
}

impl Batches {
    pub async fn upload(self: &Arc<Self>, tenant: &str) -> store::Result<Upload> {
        let id = format!("file-{}", Uuid::new_v4().simple());
        let begun = Begun { batches: self.clone(), tenant: tenant.to_owned(), id, recorded: false };
        self.store.begin_object(tenant, &begun.id).await?;
        let (blobs, tenant_name, id) = (self.blobs.clone(), tenant.to_owned(), begun.id.clone());
        // On a task of its own: a client that goes away now leaves a writer that is dropped, and not a file that nobody knows.
        let making = tokio::spawn(async move { blobs.writer(&tenant_name, &id).await });
        let writer = making.await.unwrap_or(Err(StoreError::Closed))?;
        let share = self.memory.clients.share(&tenant.into());
        Ok(Upload { begun, writer, buffer: BytesMut::new(), share })
    }

    pub async fn file(&self, tenant: &str, id: &str) -> store::Result<Option<FileRecord>> {
        self.store.file(tenant, id, self.clock.now()).await
    }

    pub async fn files(&self, tenant: &str, query: FileQuery) -> store::Result<Paged<FileRecord>> {
        self.store.files(tenant, query).await
    }

    /// Whether there was such a file.
    pub async fn delete_file(&self, tenant: &str, id: &str) -> store::Result<bool> {
        let deleted = self.store.delete_file(tenant, id, self.clock.now()).await?;
        if deleted {
            self.garbage.notify_one();
        }
        Ok(deleted)
    }

    /// Some bytes of a file.
    pub async fn content(&self, tenant: &str, id: &str, range: Range<u64>) -> store::Result<Bytes> {
        self.blobs.read_range(tenant, id, range).await
    }

    /// Bytes that there are of a file.
    pub async fn content_size(&self, tenant: &str, id: &str) -> store::Result<u64> {
        self.blobs.size(tenant, id).await
    }
}

impl Upload {
    /// Takes bytes, and writes what was gathered once it is enough.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), UploadError> {
        let limit = self.begun.batches.settings.max_file_size;
        let size = self
            .writer
            .written()
            .saturating_add(self.buffer.len() as u64)
            .saturating_add(bytes.len() as u64);
        if size > limit.bytes() {
            return Err(UploadError::TooLarge(limit));
        }
        for piece in bytes.chunks(BUFFER) {
            if self.buffer.is_empty() {
                self.share.cover(BUFFER).await;
            }
            self.buffer.extend_from_slice(piece);
            if self.buffer.len() >= BUFFER {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Writes what was gathered, so that an upload whose client pauses takes no memory.
    pub async fn flush(&mut self) -> Result<(), UploadError> {
        if !self.buffer.is_empty() {
            self.writer.write(std::mem::take(&mut self.buffer).freeze()).await?;
        }
        self.share.settle(0);
        Ok(())
    }

    /// Completes the upload. The file is there when its record is. On a task of its own: a client that goes away at the last moment has
    /// the file or nothing.
    pub async fn finish(self, new: NewFile) -> Result<FileRecord, UploadError> {
        let finishing = tokio::spawn(self.finish_now(new));
        finishing.await.unwrap_or(Err(UploadError::Store(StoreError::Closed)))
    }

    async fn finish_now(mut self, new: NewFile) -> Result<FileRecord, UploadError> {
        self.flush().await?;
        if self.writer.written() == 0 {
            self.writer.abort().await;
            return Err(UploadError::Empty);
        }
        let Self { mut begun, writer, .. } = self;
        let bytes = writer.finish().await?;
        let batches = begun.batches.clone();
        let created_at = batches.clock.now();
        let by_default =
            (new.purpose == "batch").then(|| batches.settings.input_file_lifetime.duration());
        let file = FileRecord {
            id: begun.id.clone(),
            bytes,
            created_at,
            expires_at: new.lifetime.or(by_default).map(|lifetime| created_at.after(lifetime)),
            filename: new.filename,
            purpose: new.purpose,
        };
        batches.store.insert_file(&begun.tenant, file.clone()).await?;
        begun.recorded = true;
        Ok(file)
    }

    /// Gives up, on a task of its own: what is under way is over before it is cleared away.
    pub async fn abort(self) {
        let Self { begun, writer, .. } = self;
        let aborting = tokio::spawn(async move {
            writer.abort().await;
            drop(begun);
        });
        aborting.await.ok();
    }
}
