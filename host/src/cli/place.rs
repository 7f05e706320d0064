//! Putting results where they were asked for, without harm to what is there.
//!
//! No file is removed or overwritten that this run did not write, unless `--force` says so. A file is written beside its place and
//! renamed into it, so that it is there whole or not at all. What is no regular file (a FIFO, `/dev/stdout`) is written as it is.

use std::fs::{self, File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::{Error, path_text};
use crate::plugin::hex;
use crate::store::users_mode;

/// A place that results are to go to.
#[derive(Debug)]
pub struct Target {
    /// As it was given.
    pub given: PathBuf,
    kind: Kind,
    /// Device and inode of what is there.
    identity: Option<(u64, u64)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A regular file, or one that is not there yet: its place with all links followed.
    File(PathBuf),
    /// Written as it is.
    Stream,
}

/// A file as it was written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Digested {
    #[serde(with = "path_text")]
    pub path: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// A file that is written and waits to be put in its place.
pub struct Draft {
    file: NamedTempFile,
    pub digested: Digested,
}

impl Target {
    /// Looks at a place, and refuses what can never be written to.
    pub fn find(given: &Path) -> Result<Self, Error> {
        let refused = |why: &str| Error::Usage(format!("{}: {why}", given.display()));
        let found = match fs::metadata(given) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(refused(&error.to_string())),
        };
        let identity = found.as_ref().map(|found| (found.dev(), found.ino()));
        let kind = match &found {
            Some(found) if found.is_dir() => return Err(refused("is a folder; name a file in it")),
            Some(found)
                if !found.is_file() || given.starts_with("/dev") || given.starts_with("/proc") =>
            {
                if found.file_type().is_socket() || found.file_type().is_block_device() {
                    return Err(refused("is neither a file nor a pipe"));
                }
                Kind::Stream
            }
            Some(_) => {
                Kind::File(fs::canonicalize(given).map_err(|error| refused(&error.to_string()))?)
            }
            None if fs::symlink_metadata(given).is_ok() => {
                return Err(refused(
                    "is a link to a file that is not there; remove the link, or make the file",
                ));
            }
            None => {
                let name = given.file_name().ok_or_else(|| refused("names no file"))?;
                let parent = given
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                let parent = fs::canonicalize(parent)
                    .map_err(|error| refused(&format!("its folder: {error}")))?;
                Kind::File(parent.join(name))
            }
        };
        Ok(Self { given: given.to_owned(), kind, identity })
    }

    /// Whether both are one place, also by links. `/dev/null` is no place.
    pub fn is_same(&self, other: &Self) -> bool {
        let is_null = self.given == Path::new("/dev/null");
        let same_path =
            matches!((&self.kind, &other.kind), (Kind::File(one), Kind::File(two)) if one == two);
        !is_null && (same_path || (self.identity.is_some() && self.identity == other.identity))
    }

    /// Whether this place is that file, also by links.
    pub fn is_file(&self, file: &Metadata) -> bool {
        self.identity == Some((file.dev(), file.ino()))
    }

    /// The regular file that is there or will be there.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::File(path) => Some(path),
            Kind::Stream => None,
        }
    }

    /// Whether a regular file is there.
    pub fn exists(&self) -> bool {
        self.path().is_some_and(Path::exists)
    }

    /// Whether what is there is what was written before.
    pub fn holds(&self, written: &Digested) -> bool {
        let Some(path) = self.path() else { return false };
        let digested = || digest(path).ok();
        path == written.path
            && digested().is_some_and(|found| found == (written.bytes, written.sha256.clone()))
    }

    /// Writes a file that is to be put here: in a folder of one's own if that is on the same disk, or else beside its place.
    pub async fn draft<S>(&self, folder: Option<&Path>, pieces: S) -> Result<Draft, Error>
    where
        S: Stream<Item = Result<Bytes, Error>>,
    {
        let Some(path) = self.path() else { return Err(self.failed("is no regular file")) };
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
        let mut pieces = std::pin::pin!(pieces);
        while let Some(piece) = pieces.try_next().await? {
            file.write_all(&piece).map_err(|error| self.failed(error))?;
            bytes = bytes.saturating_add(piece.len() as u64);
            digest.update(&piece);
        }
        file.as_file().sync_all().map_err(|error| self.failed(error))?;
        let digested = Digested { path: path.to_owned(), bytes, sha256: hex(&digest.finalize()) };
        Ok(Draft { file, digested })
    }

    /// Puts a file in its place; over another one only if it may.
    pub fn place(&self, draft: Draft, overwrite: bool) -> Result<(), Error> {
        let path = draft.digested.path;
        if overwrite {
            draft.file.persist(&path).map_err(|error| self.failed(error.error))?;
        } else {
            draft.file.persist_noclobber(&path).map_err(|error| {
                if error.error.kind() == std::io::ErrorKind::AlreadyExists {
                    self.failed(
                        "has appeared meanwhile; move it away, or give --force, and give the same command again",
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

    /// Writes to what is no regular file.
    pub async fn write_through<S>(&self, pieces: S) -> Result<(), Error>
    where
        S: Stream<Item = Result<Bytes, Error>>,
    {
        let mut file =
            File::options().write(true).open(&self.given).map_err(|error| self.failed(error))?;
        let mut pieces = std::pin::pin!(pieces);
        while let Some(piece) = pieces.try_next().await? {
            file.write_all(&piece).map_err(|error| self.failed(error))?;
        }
        file.flush().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: impl std::fmt::Display) -> Error {
        Error::Other(format!("failed to write {}: {error}", self.given.display()))
    }
}

/// Refuses places that are one, or that exist and may not be overwritten.
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
            "{one} and {other} are the same file; answers and errors need one each"
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

/// Size and SHA-256 of a file.
pub fn digest(path: &Path) -> std::io::Result<(u64, String)> {
    let (mut file, mut digest, mut bytes) = (File::open(path)?, Sha256::new(), 0_u64);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = file.read(&mut buffer)?;
        let Some(piece) = buffer.get(..read).filter(|piece| !piece.is_empty()) else { break };
        digest.update(piece);
        bytes = bytes.saturating_add(read as u64);
    }
    Ok((bytes, hex(&digest.finalize())))
}
