//! Cache of compiled components, in a directory that only this user can write to.
//!
//! **Threat.** To load compiled code is to run it: wasmtime maps the file as executable memory and
//! cannot check that the code is harmless. An attacker who can write a file that the host loads
//! controls the server, with its keys and all tenants' data.
//!
//! **Rules.**
//! - Compiled code is loaded only from this cache, never from the plugin directory. A plugin
//!   directory holds portable components, and the host rejects anything else.
//! - Only the host's own compiler process writes the code, into a file that the host created under
//!   a random name. The file gets its final name after it was loaded once.
//! - The directory must belong to this user or root. A directory that others can write to, such as
//!   a Kubernetes volume with `fsGroup`, is first closed to others and then emptied: another user
//!   may have planted a file.
//! - A file is loaded only if it belongs to this user or root and nobody else can write to it, as
//!   the directory may have been open to others in an earlier run.
//!
//! **No usable directory.** The cache then lives for this process only: in a temporary directory,
//! or in anonymous memory. Plugins still load, but are compiled again at each start.
//!
//! **Names.** A file name holds the SHA-256 of the component and a fingerprint of the engine.
//! Another wasmtime version, processor or engine setting gives another name, so the host compiles
//! the component again instead of loading code that does not fit.
//!
//! **Size.** Least recently used files beyond 2 GiB are evicted, except those used within an hour.
//! The directory may hold other files: only names that this cache creates are ever removed.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tempfile::{NamedTempFile, TempDir};
use wasmtime::Engine;
use wasmtime::component::Component;

/// Size of the cache above which files are evicted.
const MAX_CACHE_BYTES: u64 = 2 << 30;
/// Name prefix of files that a compiler is writing.
const UNFINISHED_PREFIX: &str = ".compiling-";
/// Time after its last use in which a file is not evicted.
const MIN_IDLE_AGE: Duration = Duration::from_secs(3600);

/// Cache of compiled components.
pub struct Cache {
    /// Directory of the cache; `None` if no directory is writable.
    folder: Option<PathBuf>,
    /// Guard that removes the directory if it is temporary.
    _temporary: Option<TempDir>,
}

/// Output file of a compilation, which nobody else can write to.
pub enum Output {
    /// Temporary file in the directory of the cache.
    InFolder(NamedTempFile),
    /// File without a name.
    InMemory(File),
}

impl Output {
    /// Returns another handle of the file, for the compiler process.
    pub fn writer(&self) -> std::io::Result<File> {
        match self {
            Self::InFolder(file) => file.reopen(),
            Self::InMemory(file) => file.try_clone(),
        }
    }
}

impl Cache {
    /// Opens the directory, or creates it. If the directory cannot be made private to this user,
    /// the cache lives for this process only.
    pub fn open(folder: &Path) -> Self {
        match private_folder(folder) {
            Ok(folder) => {
                let cache = Self { folder: Some(folder), _temporary: None };
                cache.evict(MAX_CACHE_BYTES);
                cache
            }
            Err(error) => {
                let temporary =
                    tempfile::Builder::new().prefix("batchwright-cache-").tempdir().ok();
                tracing::warn!(
                    path = %folder.display(),
                    %error,
                    in_memory = temporary.is_none(),
                    "compile cache unusable, plugins are compiled again at each start; \
                     name a directory of this user with --cache"
                );
                let folder = temporary
                    .as_ref()
                    .and_then(|temporary| std::fs::canonicalize(temporary.path()).ok());
                Self { folder, _temporary: temporary }
            }
        }
    }

    /// Returns the path of a component's compiled code for this engine.
    pub fn path(&self, engine: &Engine, sha256: &str) -> PathBuf {
        let mut fingerprint = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut fingerprint);
        let name = format!("{sha256}-{:016x}.cwasm", fingerprint.finish());
        self.folder.as_ref().map_or_else(|| PathBuf::from(&name), |folder| folder.join(&name))
    }

    /// Loads compiled code. Returns `None` if the file is missing, damaged or not trusted.
    #[expect(clippy::disallowed_methods, reason = "becomes a time of the file system")]
    pub fn load(&self, engine: &Engine, path: &Path) -> Option<Component> {
        // Without a directory, `path` is relative to the working directory, which is not trusted.
        if self.folder.is_none() || !path.exists() {
            return None;
        }
        // The directory may have been writable by others in an earlier run.
        if !is_trusted(path) {
            tracing::warn!(
                path = %path.display(),
                "cached code writable by others, component is compiled again"
            );
            return None;
        }
        match load(engine, path) {
            Ok(component) => {
                // `evict` takes the time of modification for the time of the last use.
                std::fs::File::open(path)
                    .and_then(|file| file.set_modified(SystemTime::now()))
                    .ok();
                Some(component)
            }
            Err(error) => {
                tracing::warn!(
                    path = %path.display(),
                    error = format_args!("{error:#}"),
                    "cached code does not load, component is compiled again"
                );
                None
            }
        }
    }

    /// Creates an output file for a compilation.
    pub fn output(&self) -> std::io::Result<Output> {
        let in_folder = self
            .folder
            .as_ref()
            .map(|folder| tempfile::Builder::new().prefix(UNFINISHED_PREFIX).tempfile_in(folder));
        match in_folder {
            Some(Ok(file)) => Ok(Output::InFolder(file)),
            Some(Err(error)) => {
                let folder = self.folder.as_deref().unwrap_or(Path::new(""));
                tracing::warn!(
                    path = %folder.display(),
                    %error,
                    "compile cache not writable, compiled code stays in memory"
                );
                in_memory()
            }
            None => in_memory(),
        }
    }

    /// Loads the output of a compilation and stores it under `path`.
    pub fn store(
        &self,
        engine: &Engine,
        output: Output,
        path: &Path,
    ) -> wasmtime::Result<Component> {
        match output {
            Output::InMemory(file) => load_copy(engine, file),
            Output::InFolder(file) => {
                let loaded = load(engine, file.path())?;
                let stored = file
                    .as_file()
                    .sync_all()
                    .and_then(|()| file.persist(path).map_err(|error| error.error));
                if let Err(error) = stored {
                    tracing::warn!(path = %path.display(), %error, "compiled code not stored");
                }
                self.evict(MAX_CACHE_BYTES);
                Ok(loaded)
            }
        }
    }

    /// Removes the least recently used files beyond `max_bytes`, and unfinished files of earlier
    /// processes.
    fn evict(&self, max_bytes: u64) {
        let Some(Ok(found)) = self.folder.as_ref().map(std::fs::read_dir) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = found
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let is_ours = name.to_str().is_some_and(is_cache_name);
                let metadata = entry.metadata().ok().filter(|found| is_ours && found.is_file())?;
                Some((metadata.modified().ok()?, metadata.len(), entry.path()))
            })
            .collect();
        // Most recently used first.
        files.sort_by(|one, other| other.cmp(one));
        let mut total = 0_u64;
        for (used, size, path) in files {
            total = total.saturating_add(size);
            let in_use = used.elapsed().is_ok_and(|since| since < MIN_IDLE_AGE);
            let finished = path.extension().is_some_and(|extension| extension == "cwasm");
            if !in_use && (total > max_bytes || !finished) {
                std::fs::remove_file(path).ok();
            }
        }
    }
}

/// Returns true for the file names that this cache creates. The directory may hold other files.
fn is_cache_name(name: &str) -> bool {
    name.starts_with(UNFINISHED_PREFIX) || is_compiled(name)
}

/// Returns true for the file names that [`Cache::path`] returns.
fn is_compiled(name: &str) -> bool {
    let digits = |text: &str, number: usize| {
        text.len() == number && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts = name.strip_suffix(".cwasm").and_then(|name| name.split_once('-'));
    parts.is_some_and(|(sha256, fingerprint)| digits(sha256, 64) && digits(fingerprint, 16))
}

/// Returns true if a file belongs to this user or root and nobody else can write to it.
fn is_trusted(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| {
        let is_owned = [rustix::process::geteuid().as_raw(), 0].contains(&metadata.uid());
        metadata.is_file() && is_owned && metadata.permissions().mode() & 0o022 == 0
    })
}

/// Makes a directory private to this user and returns its canonical path. An error is the reason as
/// a message.
fn private_folder(folder: &Path) -> Result<PathBuf, String> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| format!("cannot be created: {error}"))?;
    let metadata = std::fs::metadata(folder).map_err(|error| format!("cannot be read: {error}"))?;
    // The safety of `load` depends on this check: a directory of another user may hold that user's
    // code.
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own && metadata.uid() != 0 {
        return Err(format!("belongs to user {}, not to {own}", metadata.uid()));
    }
    // Paths of temporary files are canonical and must be comparable to paths in this directory.
    let folder =
        std::fs::canonicalize(folder).map_err(|error| format!("cannot be resolved: {error}"))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o022 == 0 {
        // Only a write finds out whether the mount is read-only.
        return tempfile::tempfile_in(&folder)
            .map(|_| folder)
            .map_err(|error| format!("cannot be written to: {error}"));
    }
    // Kubernetes opens volumes to a group (`fsGroup`). Others may have planted files, which are
    // removed.
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).map_err(|error| {
        format!("is writable by others (mode {mode:03o}), which cannot be changed: {error}")
    })?;
    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_cache_name) {
            std::fs::remove_file(entry.path())
                .map_err(|error| format!("cannot be emptied: {error}"))?;
        }
    }
    tracing::info!(
        path = %folder.display(),
        "compile cache was writable by others, emptied and made private"
    );
    Ok(folder)
}

/// Creates a file without a name, which no other process can open.
fn in_memory() -> std::io::Result<Output> {
    #[cfg(target_os = "linux")]
    {
        let file = rustix::fs::memfd_create("compiled", rustix::fs::MemfdFlags::CLOEXEC)?;
        Ok(Output::InMemory(file.into()))
    }
    #[cfg(not(target_os = "linux"))]
    tempfile::tempfile().map(Output::InMemory)
}

/// Loads a file by mapping it, or by copying it if its file system forbids executable mappings
/// (`noexec`).
fn load(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    load_mapped(engine, path).or_else(|error| {
        let file = File::open(path)?;
        load_copy(engine, file).map_err(|_| error)
    })
}

#[expect(unsafe_code, reason = "one of two places that load compiled code")]
fn load_mapped(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    // SAFETY: only the host's own compiler process has written this file. `output` created it, in a
    // folder that `private_folder` has made writable for this user alone. `Cache::load` checks the
    // mode of a file from an earlier run. wasmtime checks that the code fits this engine.
    unsafe { Component::deserialize_file(engine, path) }
}

#[expect(unsafe_code, reason = "one of two places that load compiled code")]
fn load_copy(engine: &Engine, mut file: File) -> wasmtime::Result<Component> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    // SAFETY: as in `load_mapped`. A file without a name was open only in the host and its compiler
    // process.
    unsafe { Component::deserialize(engine, &bytes) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::sandbox::engine::{EngineKind, compiler, start};

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    fn open() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache"));
        (folder, cache)
    }

    #[test]
    fn cache_loads_stored_code_and_rejects_damaged_or_writable_files() {
        let (_folder, cache) = open();
        for engine_kind in [EngineKind::Plain, EngineKind::Concurrent] {
            let engine = start(engine_kind).unwrap();
            let path = cache.path(&engine, &"0".repeat(64));
            assert!(cache.load(&engine, &path).is_none());
            let output = cache.output().unwrap();
            output
                .writer()
                .unwrap()
                .write_all(&compiler(engine_kind).unwrap().precompile_component(EMPTY).unwrap())
                .unwrap();
            cache.store(&engine, output, &path).unwrap();
            assert!(cache.load(&engine, &path).is_some());
            let mode = |mode| {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap()
            };
            mode(0o666);
            assert!(cache.load(&engine, &path).is_none(), "file writable by others was loaded");
            mode(0o600);
            assert!(cache.load(&engine, &path).is_some());
            std::fs::write(&path, b"damaged").unwrap();
            assert!(cache.load(&engine, &path).is_none());
        }
    }

    #[test]
    fn cache_evicts_least_recently_used_files_first() {
        let (_folder, cache) = open();
        let name = |digit: &str| format!("{}-{}.cwasm", digit.repeat(64), digit.repeat(16));
        let ages = [
            (name("b"), 3),
            (name("c"), 4),
            (name("a"), 0),
            (format!("{UNFINISHED_PREFIX}left"), 5),
            (format!("{UNFINISHED_PREFIX}begun"), 0),
            ("thesis.docx".into(), 1000),
            ("other.cwasm".into(), 1000),
        ];
        for (name, hours) in ages {
            let path = cache.folder.as_ref().unwrap().join(name);
            std::fs::write(&path, [0; 100]).unwrap();
            #[expect(clippy::disallowed_methods, reason = "a time of the file system")]
            let used = SystemTime::now() - Duration::from_secs(hours * 3600 + 60);
            std::fs::File::open(&path).unwrap().set_modified(used).unwrap();
        }
        cache.evict(300);
        let left: std::collections::BTreeSet<_> = std::fs::read_dir(cache.folder.as_ref().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        let left: Vec<_> = left.iter().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(
            left,
            [
                &format!("{UNFINISHED_PREFIX}begun"),
                &name("a"),
                &name("b"),
                "other.cwasm",
                "thesis.docx"
            ]
        );
    }

    #[test]
    fn folder_writable_by_others_is_emptied_and_made_private() {
        let folder = tempfile::tempdir().unwrap();
        let planted = folder.path().join(format!("{}-{}.cwasm", "a".repeat(64), "b".repeat(16)));
        std::fs::write(&planted, "planted").unwrap();
        std::fs::write(folder.path().join("thesis.docx"), "x").unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o2775)).unwrap();
        let cache = Cache::open(folder.path());
        assert_eq!(cache.folder.as_deref(), Some(&*std::fs::canonicalize(folder.path()).unwrap()));
        assert!(!planted.exists() && folder.path().join("thesis.docx").exists());
        assert_eq!(std::fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn cache_without_a_folder_stores_code_for_this_process_only() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        let mut cache = Cache::open(&folder.path().join("file/cache"));
        let engine = start(EngineKind::Plain).unwrap();
        for in_memory in [false, true] {
            if in_memory {
                cache = Cache { folder: None, _temporary: None };
            }
            let path = cache.path(&engine, &"0".repeat(64));
            let output = cache.output().unwrap();
            assert_eq!(matches!(output, Output::InMemory(_)), in_memory);
            let compiled =
                compiler(EngineKind::Plain).unwrap().precompile_component(EMPTY).unwrap();
            output.writer().unwrap().write_all(&compiled).unwrap();
            cache.store(&engine, output, &path).unwrap();
            assert_eq!(cache.load(&engine, &path).is_some(), !in_memory);
        }
    }
}
