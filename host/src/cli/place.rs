//! Result files: atomic writes to the paths that the user gave, without damage to existing files.
//!
//! A command removes or overwrites no file that it did not write itself, unless `--force` is given.
//! A file is written under a temporary name and then renamed, so that the path holds either the
//! complete file or none. A path that is not a regular file, such as a FIFO or `/dev/stdout`, is
//! written directly.

use std::fs::{self, File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use batchwright_domain::text::hex;
use batchwright_store::users_mode;
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::path_text;
use crate::error::Error;

/// Path that results are written to.
#[derive(Debug)]
pub struct Target {
    /// Path as the user gave it, for messages.
    pub given: PathBuf,
    kind: Kind,
    /// Device and inode of the existing file.
    identity: Option<(u64, u64)>,
}

/// Way in which a target is written.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// Regular file, which may not exist yet: its path with all links resolved.
    File(PathBuf),
    /// Pipe or device, written directly.
    Stream,
}

/// Path, size and digest of a file as it was written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct FileDigest {
    /// Path with all links resolved.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

/// Complete file under a temporary name, ready to be renamed to its path.
pub struct Draft {
    file: NamedTempFile,
    /// Final path, size and digest.
    pub digested: FileDigest,
}

impl Target {
    /// Inspects a path; fails if results can never be written to it.
    pub fn resolve(given: &Path) -> Result<Self, Error> {
        let invalid = |why: &str| Error::Usage(format!("{}: {why}", given.display()));
        let found = match fs::metadata(given) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(invalid(&error.to_string())),
        };
        let identity = found.as_ref().map(|found| (found.dev(), found.ino()));
        let kind = match &found {
            Some(found) if found.is_dir() => return Err(invalid("is a folder; name a file in it")),
            Some(found)
                if !found.is_file() || given.starts_with("/dev") || given.starts_with("/proc") =>
            {
                if found.file_type().is_socket() || found.file_type().is_block_device() {
                    return Err(invalid("is neither a file nor a pipe; name a file"));
                }
                Kind::Stream
            }
            Some(_) => {
                Kind::File(fs::canonicalize(given).map_err(|error| invalid(&error.to_string()))?)
            }
            None if fs::symlink_metadata(given).is_ok() => {
                return Err(invalid(
                    "is a link to a missing file; remove the link, or create the file",
                ));
            }
            None => {
                let name =
                    given.file_name().ok_or_else(|| invalid("has no file name; name a file"))?;
                let parent = given
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                let parent = fs::canonicalize(parent)
                    .map_err(|error| invalid(&format!("its folder: {error}")))?;
                Kind::File(parent.join(name))
            }
        };
        Ok(Self { given: given.to_owned(), kind, identity })
    }

    /// Returns true if both targets are the same file, also through links; false for `/dev/null`.
    pub fn is_same(&self, other: &Self) -> bool {
        let is_null = self.given == Path::new("/dev/null");
        let same_path =
            matches!((&self.kind, &other.kind), (Kind::File(one), Kind::File(two)) if one == two);
        !is_null && (same_path || (self.identity.is_some() && self.identity == other.identity))
    }

    /// Returns true if the target is the file with this metadata, also through links.
    pub fn is_file(&self, file: &Metadata) -> bool {
        self.identity == Some((file.dev(), file.ino()))
    }

    /// Returns the resolved path of a regular file; none for a pipe or device.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::File(path) => Some(path),
            Kind::Stream => None,
        }
    }

    /// Returns true if the target is a regular file that exists.
    pub fn exists(&self) -> bool {
        self.path().is_some_and(Path::exists)
    }

    /// Returns true if the file at the target has the path, size and digest of `written`.
    pub fn matches(&self, written: &FileDigest) -> bool {
        let Some(path) = self.path() else { return false };
        let digested = || digest(path).ok();
        path == written.path
            && digested().is_some_and(|found| found == (written.bytes, written.sha256.clone()))
    }

    /// Writes a draft of the file and flushes it to disk.
    ///
    /// The draft is in `folder` if that is on the same disk as the target, because a rename works
    /// within one disk only. Otherwise the draft is beside the target.
    pub async fn draft<S>(&self, folder: Option<&Path>, chunks: S) -> Result<Draft, Error>
    where
        S: Stream<Item = Result<Bytes, Error>>,
    {
        let Some(path) = self.path() else { return Err(self.failed("is not a regular file")) };
        let parent = path.parent().unwrap_or(Path::new("."));
        let device = |folder: &Path| fs::metadata(folder).ok().map(|found| found.dev());
        let folder = folder.filter(|folder| device(folder) == device(parent)).unwrap_or(parent);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".batchwright-").permissions(fs::Permissions::from_mode(0o666));
        let mut file = builder.tempfile_in(folder).map_err(|error| self.failed(error))?;
        let permissions = match fs::metadata(path) {
            Ok(found) => Some(found.permissions()),
            Err(_) => users_mode().map(fs::Permissions::from_mode),
        };
        if let Some(permissions) = permissions {
            file.as_file().set_permissions(permissions).ok();
        }
        let (mut bytes, mut digest) = (0_u64, Sha256::new());
        let mut chunks = std::pin::pin!(chunks);
        while let Some(chunk) = chunks.try_next().await? {
            file.write_all(&chunk).map_err(|error| self.failed(error))?;
            bytes = bytes.saturating_add(chunk.len() as u64);
            digest.update(&chunk);
        }
        file.as_file().sync_all().map_err(|error| self.failed(error))?;
        let digested = FileDigest { path: path.to_owned(), bytes, sha256: hex(&digest.finalize()) };
        Ok(Draft { file, digested })
    }

    /// Renames a draft to its path; an existing file is an error unless `overwrite` is set.
    pub fn place(&self, draft: Draft, overwrite: bool) -> Result<(), Error> {
        let path = draft.digested.path;
        if overwrite {
            draft.file.persist(&path).map_err(|error| self.failed(error.error))?;
        } else {
            draft.file.persist_noclobber(&path).map_err(|error| {
                if error.error.kind() == std::io::ErrorKind::AlreadyExists {
                    self.failed(
                        "another process created the file; move it away or give --force, \
                         and run the same command again",
                    )
                } else {
                    self.failed(error.error)
                }
            })?;
        }
        if let Some(parent) = path.parent() {
            File::open(parent)
                .and_then(|folder| folder.sync_all())
                .map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    /// Writes to a pipe or device directly.
    pub async fn write_through<S>(&self, chunks: S) -> Result<(), Error>
    where
        S: Stream<Item = Result<Bytes, Error>>,
    {
        let mut file =
            File::options().write(true).open(&self.given).map_err(|error| self.failed(error))?;
        let mut chunks = std::pin::pin!(chunks);
        while let Some(chunk) = chunks.try_next().await? {
            file.write_all(&chunk).map_err(|error| self.failed(error))?;
        }
        file.flush().map_err(|error| self.failed(error))
    }

    /// Returns a write error that names the target.
    fn failed(&self, error: impl std::fmt::Display) -> Error {
        Error::Other(format!("failed to write {}: {error}", self.given.display()))
    }
}

/// Fails if both targets are the same file, or if a target exists and may not be overwritten.
///
/// `may_replace` returns true for a file that an earlier attempt of this run wrote.
pub fn check(
    targets: &[&Target],
    force: bool,
    may_replace: impl Fn(&Target) -> bool,
) -> Result<(), Error> {
    if let [one, other] = targets
        && one.is_same(other)
    {
        let (one, other) = (one.given.display(), other.given.display());
        return Err(Error::Usage(format!(
            "{one} and {other} are the same file; name a file each for results and errors"
        )));
    }
    match targets.iter().find(|target| target.exists() && !force && !may_replace(target)) {
        None => Ok(()),
        Some(target) => Err(Error::Usage(format!(
            "{} exists; name another file, move it away, or give --force to overwrite it",
            target.given.display()
        ))),
    }
}

/// Returns the size of a file in bytes and its SHA-256 in hexadecimal.
pub fn digest(path: &Path) -> std::io::Result<(u64, String)> {
    let (mut file, mut digest, mut bytes) = (File::open(path)?, Sha256::new(), 0_u64);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = file.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else { break };
        digest.update(chunk);
        bytes = bytes.saturating_add(read as u64);
    }
    Ok((bytes, hex(&digest.finalize())))
}
