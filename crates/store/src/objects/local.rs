//! Object store in a local folder, one file for each object.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use batchwright_domain::ids::ObjectKey;
use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};

use super::{ObjectUpload, Objects, PartSize};
use crate::{Result, StoreError};

/// Name of the object that the readiness probe writes and deletes.
const PROBE_OBJECT: &str = "probe";

/// Size of the probe object in bytes.
const PROBE_BYTES: usize = 64 << 10;

/// Size of the parts. A file accepts any, and each part costs a thread switch.
const PART_SIZE: PartSize = PartSize { min: 1, target: 64 << 10 };

/// Object store in a local folder, with a subfolder for each tenant.
pub struct LocalObjects {
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

impl LocalObjects {
    /// Opens an object store in a local folder; creates the folder if it does not exist.
    ///
    /// Each object is flushed to disk before its writer finishes.
    pub fn open(folder: &FilePath) -> Result<Self> {
        let failed =
            |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
        crate::private::create_folder(folder)
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
    fn path(key: &ObjectKey) -> Path {
        Path::from_iter([key.tenant.as_str(), "files", key.file.as_str()])
    }

    /// Returns the path of an object below the folder of the object store.
    pub(crate) fn relative_path(tenant: &str, file: &str) -> PathBuf {
        let key = ObjectKey { tenant: tenant.into(), file: file.into() };
        PathBuf::from(Self::path(&key).as_ref())
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
}

#[async_trait]
impl Objects for LocalObjects {
    fn part_size(&self) -> PartSize {
        PART_SIZE
    }

    async fn create(&self, key: &ObjectKey) -> Result<Box<dyn ObjectUpload>> {
        self.check_identity()?;
        let path = Self::path(key);
        let folder = self.folder.join(key.tenant.as_str()).join("files");
        let upload = self.store.put_multipart(&path).await.map_err(object_error)?;
        Ok(Box::new(LocalUpload { upload, folder, name: key.file.as_str().to_owned() }))
    }

    async fn size(&self, key: &ObjectKey) -> Result<u64> {
        match self.store.head(&Self::path(key)).await.map_err(object_error) {
            Err(missing @ StoreError::Missing(_)) => self.check_identity().and(Err(missing)),
            found => Ok(found?.size),
        }
    }

    async fn read_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes> {
        let end = range.end;
        let expected = end.saturating_sub(range.start);
        let read = self.store.get_range(&Self::path(key), range).await.map_err(object_error);
        match read {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            read => {
                let size = self.size(key).await?;
                if size < end {
                    return Err(StoreError::Missing(format!(
                        "object {} has {size} bytes, but {end} are expected",
                        key.file
                    )));
                }
                read.and_then(|_| Err(StoreError::Objects("a read returned too few bytes".into())))
            }
        }
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self.store.delete(&Self::path(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(object_error(error)),
        }
    }

    async fn probe(&self) -> Result<()> {
        self.check_identity().map_err(|error| StoreError::Missing(error.to_string()))?;
        let path = Path::from(PROBE_OBJECT);
        self.store
            .put(&path, PutPayload::from(vec![b'.'; PROBE_BYTES]))
            .await
            .map_err(object_error)?;
        self.store.delete(&path).await.map_err(object_error)
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

/// Upload of an object to a file, which gets its name when it is complete.
struct LocalUpload {
    upload: Box<dyn MultipartUpload>,
    /// Folder of the object's file.
    folder: PathBuf,
    /// Name of the object's file.
    name: String,
}

#[async_trait]
impl ObjectUpload for LocalUpload {
    async fn put_part(&mut self, part: Bytes) -> Result<()> {
        self.upload.put_part(PutPayload::from(part)).await.map_err(object_error)
    }

    async fn complete(mut self: Box<Self>) -> Result<()> {
        let completed = self.upload.complete().await.map_err(object_error);
        if completed.is_err() {
            // The unfinished file would otherwise stay until the next start.
            let (folder, prefix) = (self.folder, format!("{}#", self.name));
            let removal = tokio::task::spawn_blocking(move || remove_unfinished(&folder, &prefix));
            if let Ok(Err(error)) = removal.await {
                tracing::debug!(%error, "unfinished object not removed");
            }
        }
        completed.map(drop)
    }

    async fn abort(mut self: Box<Self>) {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tempfile::TempDir;

    use super::{LocalObjects, Objects};
    use crate::suite::objects_suite;

    fn open() -> (Arc<dyn Objects>, TempDir) {
        let folder = TempDir::new().unwrap();
        (Arc::new(LocalObjects::open(folder.path()).unwrap()), folder)
    }

    objects_suite!(open);
}
