//! The bytes of files: streamed in, streamed out, never whole in memory.

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

/// What is read at a time where nothing else is asked for, in bytes.
pub const PIECE: u64 = 512 << 10;

/// An object that is written and removed to see whether the store takes one, and its size.
const PROBE: &str = "probe";
const PROBE_BYTES: usize = 64 << 10;

/// An object store with a folder for each tenant.
#[derive(Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    folder: Arc<FilePath>,
    /// Device and inode of the folder: those of a disk that is not mounted, or of a folder that was made anew, are others.
    identity: (u64, u64),
}

fn identity(folder: &FilePath) -> std::io::Result<(u64, u64)> {
    let found = std::fs::metadata(folder)?;
    Ok((found.dev(), found.ino()))
}

impl Blobs {
    /// Objects in a local folder, which is made if need be. What was written is on the disk when writing ends.
    pub fn local(folder: &FilePath) -> Result<Self> {
        let failed =
            |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
        super::private::make_folder(folder)
            .map_err(|error| failed(format!("cannot be made: {error}")))?;
        if let Err(error) = remove_unfinished(folder, "") {
            tracing::warn!("unfinished objects are left behind in {}: {error}", folder.display());
        }
        let store =
            LocalFileSystem::new_with_prefix(folder).map_err(|error| failed(error.to_string()))?;
        let identity = identity(folder).map_err(|error| failed(error.to_string()))?;
        Ok(Self { store: Arc::new(store.with_fsync(true)), folder: folder.into(), identity })
    }

    fn path(tenant: &str, id: &str) -> Path {
        Path::from_iter([tenant, "files", id])
    }

    /// Begins an object, which is there once the writer has finished.
    pub async fn writer(&self, tenant: &str, id: &str) -> Result<BlobWriter> {
        self.check_identity()?;
        let path = Self::path(tenant, id);
        let place = self.folder.join(tenant).join("files");
        let upload = self.store.put_multipart(&path).await.map_err(explain)?;
        Ok(BlobWriter { upload, written: 0, place, id: id.to_owned() })
    }

    /// Whether the folder is the one that was opened. If it is gone, or another is in its place, as a disk that is not mounted has it, nothing
    /// is missing: it may come back.
    fn check_identity(&self) -> Result<()> {
        if identity(&self.folder).ok() == Some(self.identity) {
            return Ok(());
        }
        Err(StoreError::Objects("the folder of objects is gone, or another is in its place".into()))
    }

    /// The size of an object in bytes.
    pub async fn size(&self, tenant: &str, id: &str) -> Result<u64> {
        match self.store.head(&Self::path(tenant, id)).await.map_err(explain) {
            Err(missing @ StoreError::Missing(_)) => self.check_identity().and(Err(missing)),
            found => Ok(found?.size),
        }
    }

    /// Some bytes of an object.
    pub async fn read_range(&self, tenant: &str, id: &str, range: Range<u64>) -> Result<Bytes> {
        let end = range.end;
        let expected = end.saturating_sub(range.start);
        let read = self.store.get_range(&Self::path(tenant, id), range).await.map_err(explain);
        match read {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            read => {
                let size = self.size(tenant, id).await?;
                if size < end {
                    return Err(StoreError::Missing(format!(
                        "it has {size} bytes, fewer than it had"
                    )));
                }
                read.and_then(|_| Err(StoreError::Objects("a read was cut short".into())))
            }
        }
    }

    /// The bytes of an object, or of a part of it, in pieces of up to `piece`.
    pub async fn read(
        &self,
        tenant: &str,
        id: &str,
        range: Option<Range<u64>>,
        piece: u64,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let size = self.size(tenant, id).await?;
        let Range { start, end } = range.unwrap_or(0..size);
        let (blobs, tenant, id, end) =
            (self.clone(), tenant.to_owned(), id.to_owned(), end.min(size));
        // Piece by piece, and not as the store would stream it: from a local file those are 8 KiB, each a trip to another thread.
        let pieces = futures_util::stream::try_unfold(start, move |at| {
            let (blobs, tenant, id) = (blobs.clone(), tenant.clone(), id.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = at.saturating_add(piece.max(1)).min(end);
                Ok(Some((blobs.read_range(&tenant, &id, at..next).await?, next)))
            }
        });
        Ok(Box::pin(pieces))
    }

    /// Whether the store is the one that was opened, and takes an object.
    pub async fn probe(&self) -> Result<()> {
        self.check_identity().map_err(|error| StoreError::Missing(error.to_string()))?;
        let path = Path::from(PROBE);
        self.store.put(&path, PutPayload::from(vec![b'.'; PROBE_BYTES])).await.map_err(explain)?;
        self.store.delete(&path).await.map_err(explain)
    }

    /// Removes an object; one that is not there is as good as removed.
    pub async fn delete(&self, tenant: &str, id: &str) -> Result<()> {
        match self.store.delete(&Self::path(tenant, id)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(explain(error)),
        }
    }
}

/// Removes what a process was writing when it was killed, of files whose names begin so. A file being written bears its object's name, `#`
/// and a number; nobody else writes here.
fn remove_unfinished(folder: &FilePath, begin: &str) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_unfinished(&entry.path(), begin)?;
            continue;
        }
        let name = entry.file_name();
        let name = name.to_str().filter(|name| name.starts_with(begin));
        let number = name.and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
        if number.is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        }) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An object being written. Dropped before the end, it leaves nothing that can be read.
pub struct BlobWriter {
    upload: Box<dyn MultipartUpload>,
    written: u64,
    /// The folder it is written in, under this name.
    place: PathBuf,
    id: String,
}

impl BlobWriter {
    /// Writes bytes, which the caller gathers: each call is a trip to another thread.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        self.upload.put_part(PutPayload::from(bytes)).await.map_err(explain)
    }

    pub fn written(&self) -> u64 {
        self.written
    }

    pub async fn finish(mut self) -> Result<u64> {
        let finished = self.upload.complete().await.map_err(explain);
        if finished.is_err() {
            // What could not be completed stays otherwise, under a name of its own, until the next start.
            let (place, begin) = (self.place, format!("{}#", self.id));
            let removal = tokio::task::spawn_blocking(move || remove_unfinished(&place, &begin));
            if let Ok(Err(error)) = removal.await {
                tracing::debug!("an unfinished object is left behind: {error}");
            }
        }
        finished.map(|_| self.written)
    }

    /// Gives up and removes what was written.
    pub async fn abort(mut self) {
        if let Err(error) = self.upload.abort().await {
            tracing::debug!("an unfinished object is left behind: {error}");
        }
    }
}

fn explain(error: object_store::Error) -> StoreError {
    if matches!(error, object_store::Error::NotFound { .. }) {
        return StoreError::Missing(error.to_string());
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            return explain_io(io, error.to_string());
        }
        cause = current.source();
    }
    StoreError::Objects(error.to_string())
}

fn explain_io(error: &std::io::Error, message: String) -> StoreError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            StoreError::Full(message)
        }
        _ => StoreError::Objects(message),
    }
}
