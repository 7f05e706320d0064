//! Files: uploads by clients, input of batches and output of batches.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use batchwright_domain::ids::{FileId, ObjectKey, TenantId};
use batchwright_domain::limits::Limit;
use batchwright_domain::units::Size;
use batchwright_memory::Reservation;
use batchwright_store::{FileQuery, FileRecord, Paged, StoreError};
use bytes::Bytes;
use uuid::Uuid;

use crate::objects::RegisteredWriter;
use crate::service::Service;
use crate::service::uploading::UploadingBytes;

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
    /// The project would exceed `max_stored_bytes`.
    #[error(
        "The files of the project would exceed its limit of stored bytes; delete files, or ask the \
         administrator for more."
    )]
    NoRoom,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Upload in progress. Its bytes are written to disk before its record exists.
pub struct Upload {
    object: PendingObject,
    writer: RegisteredWriter,
    /// Memory of the writer's buffer.
    reservation: Reservation,
    /// Bytes that count toward the limit of the project until the record exists.
    counted: UploadingBytes,
    began: SystemTime,
}

/// Registered object of an upload. Dropped without a record, the object is left to the janitor.
struct PendingObject {
    service: Arc<Service>,
    key: ObjectKey,
    is_recorded: bool,
}

impl Drop for PendingObject {
    fn drop(&mut self) {
        if !self.is_recorded {
            self.service.aborted_uploads.add(self.key.clone());
            self.service.cleanup_needed.notify_one();
        }
    }
}

impl Service {
    /// Starts an upload: registers the object and opens its writer.
    pub async fn upload(self: &Arc<Self>, tenant: &TenantId) -> batchwright_store::Result<Upload> {
        let counted = self.begin_upload(tenant).await?;
        let file = format!("file-{}", Uuid::new_v4().simple()).into();
        let key = ObjectKey { tenant: tenant.clone(), file };
        let object = PendingObject { service: self.clone(), key: key.clone(), is_recorded: false };
        let (store, objects) = (self.store.clone(), self.objects.clone());
        let clock = self.clock.clone();
        let reservation = self.memory.clients.reservation(&tenant.as_str().into());
        // On a separate task: if the client disconnects now, the object is registered, and its
        // upload is dropped and abandoned after that.
        let began = batchwright_telemetry::trace::now();
        let creating = tokio::spawn(async move {
            let writer = RegisteredWriter::create(store, objects, clock, key).await?;
            Ok(Upload { object, writer, reservation, counted, began })
        });
        creating.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Returns a file, or `None` if it is unknown, deleted or expired.
    pub async fn file(
        &self,
        tenant: &TenantId,
        id: &FileId,
    ) -> batchwright_store::Result<Option<FileRecord>> {
        self.store.file(tenant, id, self.clock.now()).await
    }

    /// Returns a page of files.
    pub async fn files(
        &self,
        tenant: &TenantId,
        query: FileQuery,
    ) -> batchwright_store::Result<Paged<FileRecord>> {
        self.store.files(tenant, query).await
    }

    /// Deletes a file and returns false if there was no such file.
    pub async fn delete_file(
        &self,
        tenant: &TenantId,
        id: &FileId,
    ) -> batchwright_store::Result<bool> {
        let deleted = self.store.delete_file(tenant, id, self.clock.now()).await?;
        if deleted {
            self.cleanup_needed.notify_one();
        }
        Ok(deleted)
    }

    /// Returns a byte range of a file.
    pub async fn content(
        &self,
        tenant: &TenantId,
        id: &FileId,
        range: Range<u64>,
    ) -> batchwright_store::Result<Bytes> {
        self.objects.read_range(&object_key(tenant, id), range).await
    }

    /// Returns the size of a file in bytes.
    pub async fn content_size(
        &self,
        tenant: &TenantId,
        id: &FileId,
    ) -> batchwright_store::Result<u64> {
        self.objects.size(&object_key(tenant, id)).await
    }
}

impl Upload {
    /// Writes bytes. Memory is held only while a part is incomplete.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), UploadError> {
        let service = &self.object.service;
        let limit = *service.config.batch.max_file_size;
        if self.writer.written().saturating_add(bytes.len() as u64) > limit.bytes() {
            return Err(UploadError::TooLarge(limit));
        }
        if !self.counted.add(bytes.len() as u64) {
            return Err(UploadError::NoRoom);
        }
        let part_bytes = service.objects.part_size().target;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(self.writer.room().min(bytes.len()));
            self.reservation.grow_to(part_bytes).await;
            self.writer.write(now).await?;
            if self.writer.is_flushed() {
                self.reservation.shrink_to(0);
            }
            bytes = later;
        }
        Ok(())
    }

    /// Writes the buffer and releases its memory if possible, so that an idle upload holds little.
    pub async fn flush(&mut self) -> Result<(), UploadError> {
        if self.writer.flush_if_possible().await? {
            self.reservation.shrink_to(0);
        }
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
    async fn finish_now(self, new: NewFile) -> Result<FileRecord, UploadError> {
        if self.writer.written() == 0 {
            self.writer.abort().await;
            return Err(UploadError::Empty);
        }
        let Self { mut object, writer, reservation, counted: _counted, began } = self;
        let bytes = writer.finish().await?;
        drop(reservation);
        let service = object.service.clone();
        let created_at = service.clock.now();
        let tenant = &object.key.tenant;
        let policy = service.policy(tenant).await?;
        let lifetimes = service.config.retention.fill(policy.limits);
        let by_default = (new.purpose == "batch")
            .then(|| lifetimes.lifetime(Limit::InputFileLifetime))
            .flatten();
        let file = FileRecord {
            id: object.key.file.clone(),
            bytes,
            created_at,
            expires_at: new.lifetime.or(by_default).map(|lifetime| created_at.after(lifetime)),
            filename: new.filename,
            purpose: new.purpose,
        };
        service.store.insert_file(tenant, file.clone(), policy.storage()).await?;
        object.is_recorded = true;
        service.spans.uploaded(tenant, &file.id, file.bytes, began);
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

fn object_key(tenant: &TenantId, file: &FileId) -> ObjectKey {
    ObjectKey { tenant: tenant.clone(), file: file.clone() }
}
