//! Object store for file contents: streamed in, streamed out, never whole in memory.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};

use super::{Result, StoreError};

/// Default size of a read chunk in bytes.
pub const PIECE: u64 = 512 << 10;

/// Name of the object that the readiness probe writes and deletes.
const PROBE_OBJECT: &str = "probe";

/// Size of the probe object in bytes.
const PROBE_BYTES: usize = 64 << 10;

/// Object store with a folder for each tenant.
#[derive(Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    folder: Arc<FilePath>,
    /// Device and inode of the folder, which differ if its disk is not mounted or if the folder was
    /// created again.
    identity: (u64, u64),
}

/// Returns the device and inode of a folder.
fn identity(folder: &FilePath) -> std::io::Result<(u64, u64)> {
    let found = std::fs::metadata(folder)?;
    Ok((found.dev(), found.ino()))
}

impl Blobs {
    /// Opens an object store in a local folder; creates the folder if it does not exist.
    ///
    /// Each object is flushed to disk before its writer finishes.
    pub fn local(folder: &FilePath) -> Result<Self> {
        let failed =
            |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
        super::private::create_folder(folder)
            .map_err(|error| failed(format!("cannot be created: {error}")))?;
        if let Err(error) = remove_unfinished(folder, "") {
            tracing::warn!(%error, path = %folder.display(), "unfinished objects not removed");
        }
        let store =
            LocalFileSystem::new_with_prefix(folder).map_err(|error| failed(error.to_string()))?;
        let identity = identity(folder).map_err(|error| failed(error.to_string()))?;
        Ok(Self { store: Arc::new(store.with_fsync(true)), folder: folder.into(), identity })
    }

    /// Returns the path of an object in the store.
    fn path(tenant: &str, id: &str) -> Path {
        Path::from_iter([tenant, "files", id])
    }

    /// Starts to write an object, which exists once the writer has finished.
    pub async fn writer(&self, tenant: &str, id: &str) -> Result<BlobWriter> {
        self.check_identity()?;
        let path = Self::path(tenant, id);
        let folder = self.folder.join(tenant).join("files");
        let upload = self.store.put_multipart(&path).await.map_err(object_error)?;
        Ok(BlobWriter { upload, written: 0, folder, id: id.to_owned() })
    }

    /// Tests that the folder is the one that was opened.
    ///
    /// If the disk of the folder is not mounted, objects are unavailable and not missing: the disk
    /// may be mounted again.
    fn check_identity(&self) -> Result<()> {
        if identity(&self.folder).ok() == Some(self.identity) {
            return Ok(());
        }
        Err(StoreError::Objects(
            "its folder is missing or was replaced; mount or restore the original folder".into(),
        ))
    }

    /// Returns the size of an object in bytes.
    pub async fn size(&self, tenant: &str, id: &str) -> Result<u64> {
        match self.store.head(&Self::path(tenant, id)).await.map_err(object_error) {
            Err(missing @ StoreError::Missing(_)) => self.check_identity().and(Err(missing)),
            found => Ok(found?.size),
        }
    }

    /// Reads a range of an object.
    ///
    /// Fails with [`StoreError::Missing`] if the object is missing or shorter than the range.
    pub async fn read_range(&self, tenant: &str, id: &str, range: Range<u64>) -> Result<Bytes> {
        let end = range.end;
        let expected = end.saturating_sub(range.start);
        let read = self.store.get_range(&Self::path(tenant, id), range).await.map_err(object_error);
        match read {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            read => {
                let size = self.size(tenant, id).await?;
                if size < end {
                    return Err(StoreError::Missing(format!(
                        "object {id} has {size} bytes, but {end} are expected"
                    )));
                }
                read.and_then(|_| Err(StoreError::Objects("a read returned too few bytes".into())))
            }
        }
    }

    /// Streams an object, or a range of it, in chunks of up to `chunk_bytes`.
    pub async fn read(
        &self,
        tenant: &str,
        id: &str,
        range: Option<Range<u64>>,
        chunk_bytes: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let size = self.size(tenant, id).await?;
        let Range { start, end } = range.unwrap_or(0..size);
        let (blobs, tenant, id, end) =
            (self.clone(), tenant.to_owned(), id.to_owned(), end.min(size));
        // The store's own stream of a local file has chunks of 8 KiB, each a thread switch.
        let chunks = futures_util::stream::try_unfold(start, move |at| {
            let (blobs, tenant, id) = (blobs.clone(), tenant.clone(), id.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = at.saturating_add(chunk_bytes.max(1)).min(end);
                Ok(Some((blobs.read_range(&tenant, &id, at..next).await?, next)))
            }
        });
        Ok(Box::pin(chunks))
    }

    /// Tests that the folder is the one that was opened and that an object can be written.
    pub async fn probe(&self) -> Result<()> {
        self.check_identity().map_err(|error| StoreError::Missing(error.to_string()))?;
        let path = Path::from(PROBE_OBJECT);
        self.store
            .put(&path, PutPayload::from(vec![b'.'; PROBE_BYTES]))
            .await
            .map_err(object_error)?;
        self.store.delete(&path).await.map_err(object_error)
    }

    /// Deletes an object; succeeds if the object does not exist.
    pub async fn delete(&self, tenant: &str, id: &str) -> Result<()> {
        match self.store.delete(&Self::path(tenant, id)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(object_error(error)),
        }
    }
}

/// Removes unfinished files whose names start with `prefix`, in a folder and its subfolders.
///
/// An unfinished file has the name of its object, `#` and a number. Nothing else writes here.
fn remove_unfinished(folder: &FilePath, prefix: &str) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_unfinished(&entry.path(), prefix)?;
            continue;
        }
        let name = entry.file_name();
        let name = name.to_str().filter(|name| name.starts_with(prefix));
        let number = name.and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
        if number.is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        }) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writer of an object. A writer that is dropped before it finishes leaves no readable object.
pub struct BlobWriter {
    upload: Box<dyn MultipartUpload>,
    written: u64,
    /// Folder of the object's file.
    folder: PathBuf,
    /// Name of the object's file.
    id: String,
}

impl BlobWriter {
    /// Writes bytes. Callers buffer, because each call is a thread switch.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        self.upload.put_part(PutPayload::from(bytes)).await.map_err(object_error)
    }

    /// Returns the number of bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Completes the object and returns its size in bytes.
    pub async fn finish(mut self) -> Result<u64> {
        let finished = self.upload.complete().await.map_err(object_error);
        if finished.is_err() {
            // The unfinished file would otherwise stay until the next start.
            let (folder, prefix) = (self.folder, format!("{}#", self.id));
            let removal = tokio::task::spawn_blocking(move || remove_unfinished(&folder, &prefix));
            if let Ok(Err(error)) = removal.await {
                tracing::debug!(%error, "unfinished object not removed");
            }
        }
        finished.map(|_| self.written)
    }

    /// Aborts the object and removes its unfinished file.
    pub async fn abort(mut self) {
        if let Err(error) = self.upload.abort().await {
            tracing::debug!(%error, "unfinished object not removed");
        }
    }
}

/// Converts an error of the object store.
fn object_error(error: object_store::Error) -> StoreError {
    if matches!(error, object_store::Error::NotFound { .. }) {
        return StoreError::Missing(error.to_string());
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            return io_error(io, error.to_string());
        }
        cause = current.source();
    }
    StoreError::Objects(error.to_string())
}

/// Converts an I/O error with a message for the operator.
fn io_error(error: &std::io::Error, message: String) -> StoreError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            StoreError::Full(message)
        }
        _ => StoreError::Objects(message),
    }
}
