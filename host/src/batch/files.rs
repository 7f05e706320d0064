//! Files: uploaded by clients, read by batches, made by batches.

use std::ops::Range;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use uuid::Uuid;

use super::Batches;
use crate::config::Size;
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
    #[error("The file is larger than {0}; split it into several.")]
    TooLarge(Size),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An upload under way. Its bytes are on the disk before anything else is known of it.
pub struct Upload<'a> {
    begun: Begun<'a>,
    writer: BlobWriter,
}

/// An object whose writing was noted. Given up, it is left to whoever clears away.
struct Begun<'a> {
    batches: &'a Batches,
    tenant: &'a str,
    id: String,
    recorded: bool,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if !self.recorded {
            let given_up = (self.tenant.to_owned(), std::mem::take(&mut self.id));
            self.batches.given_up.lock().unwrap_or_else(PoisonError::into_inner).push(given_up);
            self.batches.garbage.notify_one();
        }
    }
}

impl Batches {
    pub async fn upload<'a>(&'a self, tenant: &'a str) -> store::Result<Upload<'a>> {
        let id = format!("file-{}", Uuid::new_v4().simple());
        self.store.begin_object(tenant, &id).await?;
        let writer = self.blobs.writer(tenant, &id);
        Ok(Upload { begun: Begun { batches: self, tenant, id, recorded: false }, writer })
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

    /// The bytes of a file, or of a part of it.
    pub async fn content(
        &self,
        tenant: &str,
        id: &str,
        range: Option<Range<u64>>,
    ) -> store::Result<BoxStream<'static, store::Result<Bytes>>> {
        self.blobs.read(tenant, id, range).await
    }
}

impl Upload<'_> {
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), UploadError> {
        let limit = self.begun.batches.settings.max_file_size;
        if self.writer.written().saturating_add(bytes.len() as u64) > limit.bytes() {
            return Err(UploadError::TooLarge(limit));
        }
        Ok(self.writer.write(bytes).await?)
    }

    /// Completes the upload. The file is there when its record is.
    pub async fn finish(self, new: NewFile) -> Result<FileRecord, UploadError> {
        if self.writer.written() == 0 {
            self.abort().await;
            return Err(UploadError::Empty);
        }
        let Self { mut begun, writer } = self;
        let bytes = writer.finish().await?;
        let batches = begun.batches;
        let created_at = batches.clock.now();
        let by_default = (new.purpose == "batch").then(|| batches.settings.input_file_lifetime.duration());
        let file = FileRecord {
            id: begun.id.clone(),
            bytes,
            created_at,
            expires_at: new.lifetime.or(by_default).map(|lifetime| created_at.after(lifetime)),
            filename: new.filename,
            purpose: new.purpose,
        };
        batches.store.insert_file(begun.tenant, file.clone()).await?;
        begun.recorded = true;
        Ok(file)
    }

    pub async fn abort(self) {
        self.writer.abort().await;
    }
}
