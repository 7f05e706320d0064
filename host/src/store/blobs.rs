//! The bytes of files: streamed in, streamed out, never whole in memory.

use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;

use super::{Result, StoreError};

/// A part of an upload, in bytes: what a writer holds at the most, twice. As large as local files need it: there may be many at a time.
const PART: usize = 512 << 10;

/// What is read at a time, in bytes.
const PIECE: u64 = 512 << 10;

/// An object store with a folder for each tenant.
#[derive(Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    folder: Arc<FilePath>,
}

impl Blobs {
    /// Objects in a local folder, which is made if need be. What was written is on the disk when writing ends.
    pub fn local(folder: &FilePath) -> Result<Self> {
        let failed = |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
        std::fs::create_dir_all(folder).map_err(|error| failed(format!("cannot be made: {error}")))?;
        if let Err(error) = remove_unfinished(folder, "") {
            tracing::warn!("unfinished objects are left behind in {}: {error}", folder.display());
        }
        let store = LocalFileSystem::new_with_prefix(folder).map_err(|error| failed(error.to_string()))?;
        Ok(Self { store: Arc::new(store.with_fsync(true)), folder: folder.into() })
    }

    fn path(tenant: &str, id: &str) -> Path {
        Path::from_iter([tenant, "files", id])
    }

    /// Begins an object, which is there once the writer has finished.
    pub fn writer(&self, tenant: &str, id: &str) -> BlobWriter {
        let path = Self::path(tenant, id);
        let writer = BufWriter::with_capacity(self.store.clone(), path, PART).with_max_concurrency(1);
        let place = self.folder.join(tenant).join("files");
        BlobWriter { writer, written: 0, place, id: id.to_owned() }
    }

    /// The bytes of an object, or of a part of it, in pieces of up to [`PIECE`].
    pub async fn read(
        &self,
        tenant: &str,
        id: &str,
        range: Option<Range<u64>>,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let path = Self::path(tenant, id);
        let size = self.store.head(&path).await.map_err(explain)?.size;
        let Range { start, end } = range.unwrap_or(0..size);
        let (store, end) = (self.store.clone(), end.min(size));
        // Piece by piece, and not as the store would stream it: from a local file those are 8 KiB, each a trip to another thread.
        let pieces = futures_util::stream::try_unfold(start, move |at| {
            let (store, path) = (store.clone(), path.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = at.saturating_add(PIECE).min(end);
                let piece = store.get_range(&path, at..next).await.map_err(explain)?;
                Ok(Some((piece, next)))
            }
        });
        Ok(Box::pin(pieces))
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
        if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An object being written. Dropped before the end, it leaves nothing that can be read.
pub struct BlobWriter {
    writer: BufWriter,
    written: u64,
    /// The folder it is written in, under this name.
    place: PathBuf,
    id: String,
}

impl BlobWriter {
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.written = self.written.saturating_add(bytes.len() as u64);
        self.writer.put(bytes).await.map_err(explain)
    }

    pub fn written(&self) -> u64 {
        self.written
    }

    pub async fn finish(mut self) -> Result<u64> {
        let finished = self.writer.shutdown().await.map_err(|error| match error.downcast::<object_store::Error>() {
            Ok(error) => explain(error),
            Err(error) => explain_io(&error, error.to_string()),
        });
        if finished.is_err() {
            // What could not be completed stays otherwise, under a name of its own, until the next start.
            let (place, begin) = (self.place, format!("{}#", self.id));
            let removal = tokio::task::spawn_blocking(move || remove_unfinished(&place, &begin));
            if let Ok(Err(error)) = removal.await {
                tracing::debug!("an unfinished object is left behind: {error}");
            }
        }
        finished.map(|()| self.written)
    }

    /// Gives up and removes what was written.
    pub async fn abort(mut self) {
        if let Err(error) = self.writer.abort().await {
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
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StoreError::Full(message),
        _ => StoreError::Objects(message),
    }
}
