//! Object store for the contents of files: written in parts, read in ranges, never whole in memory.
//!
//! **Parts.** An object is written as a sequence of parts. [`Objects::part_size`] says how large a
//! part must be at least and how large it should be: S3 accepts no part below 5 MiB except the
//! last, a local folder accepts any. [`ObjectWriter`] collects bytes into parts. Its buffer takes
//! [`PartSize::target`] bytes, for which the caller reserves memory before it writes.
//!
//! **Visibility.** An object exists once its writer has finished. A writer that is dropped or
//! aborted leaves nothing that can be read.

mod local;

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use batchwright_domain::ids::ObjectKey;
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;

pub use local::LocalObjects;

use crate::Result;

/// Size of the parts of an object, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartSize {
    /// Minimum size of every part except the last.
    pub min: usize,
    /// Size at which a part is written.
    pub target: usize,
}

/// Object store with a folder for each tenant.
#[async_trait]
pub trait Objects: Send + Sync {
    /// Returns the size of the parts in which objects are written.
    fn part_size(&self) -> PartSize;
    /// Starts to write an object; replaces an object of the same key when the upload is complete.
    async fn create(&self, key: &ObjectKey) -> Result<Box<dyn ObjectUpload>>;
    /// Returns the size of an object in bytes; fails with
    /// [`StoreError::Missing`](crate::StoreError::Missing) if there is none.
    async fn size(&self, key: &ObjectKey) -> Result<u64>;
    /// Reads a range of an object.
    ///
    /// Fails with [`StoreError::Missing`](crate::StoreError::Missing) if the object is missing or
    /// shorter than the range.
    async fn read_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes>;
    /// Deletes an object; succeeds if the object does not exist.
    async fn delete(&self, key: &ObjectKey) -> Result<()>;
    /// Tests that the store is the one that was opened and that an object can be written.
    async fn probe(&self) -> Result<()>;
}

/// Upload of an object, part by part. Dropped before it is complete, it leaves no readable object.
#[async_trait]
pub trait ObjectUpload: Send {
    /// Writes the next part.
    async fn put_part(&mut self, part: Bytes) -> Result<()>;
    /// Completes the object, which is durable when this returns.
    async fn complete(self: Box<Self>) -> Result<()>;
    /// Aborts the object and removes its parts.
    async fn abort(self: Box<Self>);
}

/// Writer of an object, which collects bytes into parts.
pub struct ObjectWriter {
    upload: Box<dyn ObjectUpload>,
    part_size: PartSize,
    buffer: BytesMut,
    /// Bytes in the parts that are written.
    flushed: u64,
}

impl ObjectWriter {
    /// Starts to write an object.
    pub async fn create(objects: &dyn Objects, key: &ObjectKey) -> Result<Self> {
        let (upload, part_size) = (objects.create(key).await?, objects.part_size());
        Ok(Self { upload, part_size, buffer: BytesMut::new(), flushed: 0 })
    }

    /// Appends bytes, and writes each part that is full.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(self.room().min(bytes.len()));
            if self.buffer.is_empty() && !later.is_empty() {
                self.buffer.reserve(self.part_size.target);
            }
            self.buffer.extend_from_slice(now);
            if self.buffer.len() >= self.part_size.target {
                self.flush().await?;
            }
            bytes = later;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        let part = std::mem::take(&mut self.buffer).freeze();
        let bytes = part.len() as u64;
        self.upload.put_part(part).await?;
        self.flushed = self.flushed.saturating_add(bytes);
        Ok(())
    }

    /// Writes the buffer if it is large enough for a part; returns true if the buffer is empty
    /// then.
    pub async fn flush_if_possible(&mut self) -> Result<bool> {
        if !self.buffer.is_empty() && self.buffer.len() >= self.part_size.min {
            self.flush().await?;
        }
        Ok(self.buffer.is_empty())
    }

    /// Returns the number of bytes that complete the current part, at least 1.
    pub fn room(&self) -> usize {
        self.part_size.target.saturating_sub(self.buffer.len()).max(1)
    }

    /// Returns true if the buffer is empty.
    pub fn is_flushed(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Returns the number of bytes written so far.
    pub fn written(&self) -> u64 {
        self.flushed.saturating_add(self.buffer.len() as u64)
    }

    /// Completes the object and returns its size in bytes.
    pub async fn finish(mut self) -> Result<u64> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        self.upload.complete().await?;
        Ok(self.flushed)
    }

    /// Aborts the object and removes what was written of it.
    pub async fn abort(self) {
        self.upload.abort().await;
    }
}

/// Streams a range of an object in chunks of up to `chunk_bytes`; the object must have the range.
pub fn read_in_chunks(
    objects: Arc<dyn Objects>,
    key: ObjectKey,
    range: Range<u64>,
    chunk_bytes: u64,
) -> BoxStream<'static, Result<Bytes>> {
    // A stream of the object store itself has chunks of 8 KiB for a local file, each a thread
    // switch.
    let chunks = futures_util::stream::try_unfold(range.start, move |at| {
        let (objects, key) = (objects.clone(), key.clone());
        async move {
            if at >= range.end {
                return Ok(None);
            }
            let next = at.saturating_add(chunk_bytes.max(1)).min(range.end);
            Ok(Some((objects.read_range(&key, at..next).await?, next)))
        }
    });
    Box::pin(chunks)
}
