//! Compiled components, kept in a folder of the host's own.
//!
//! Loading compiled code is running it, so nothing here is ever read from the plugin directory, and the folder must belong to
//! the host alone. Where it cannot be made so, compiled code is kept for this process only: in a folder of its own, or in memory. A name holds
//! the component's digest and the engine's fingerprint: another wasmtime, processor or setting compiles anew.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tempfile::{NamedTempFile, TempDir};
use wasmtime::Engine;
use wasmtime::component::Component;

/// What the folder holds at the most, in bytes, besides what was used within the last hour: what was used longest ago goes first.
const MOST: u64 = 2 << 30;
/// How the names of files begin that are being compiled into.
const UNFINISHED: &str = ".compiling-";
const IN_USE: Duration = Duration::from_secs(3600);

pub struct Cache {
    /// None if there is no folder that could be written to.
    folder: Option<PathBuf>,
    /// The folder, if it is for this process alone.
    _own: Option<TempDir>,
}

/// A file to compile into, which nobody else can write to.
pub enum Output {
    Beside(NamedTempFile),
    InMemory(File),
}

impl Output {
    /// Another handle of it, for the process that compiles.
    pub fn writer(&self) -> std::io::Result<File> {
        match self {
            Self::Beside(file) => file.reopen(),
            Self::InMemory(file) => file.try_clone(),
        }
    }
}

impl Cache {
    /// Opens the folder, or makes it. Where it cannot be this user's alone, what is compiled is kept for this process only.
    pub fn open(folder: &Path) -> Self {
        match private_folder(folder) {
            Ok(folder) => {
                let cache = Self { folder: Some(folder), _own: None };
                cache.tidy(MOST);
                cache
            }
            Err(why) => {
                let own = tempfile::Builder::new().prefix("batchwright-cache-").tempdir().ok();
                let kept =
                    if own.is_some() { "in a folder for temporary files" } else { "in memory" };
                tracing::warn!(
                    "the compile cache {} {why}; plugins are compiled again at each start, and kept {kept} until then. Name a folder of this user's with --cache",
                    folder.display()
                );
                let folder = own.as_ref().and_then(|own| std::fs::canonicalize(own.path()).ok());
                Self { folder, _own: own }
            }
        }
    }

    /// Where the compiled form of a component lies for this engine.
    pub fn path(&self, engine: &Engine, sha256: &str) -> PathBuf {
        let mut fingerprint = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut fingerprint);
        let name = format!("{sha256}-{:016x}.cwasm", fingerprint.finish());
        self.folder.as_ref().map_or_else(|| PathBuf::from(&name), |folder| folder.join(&name))
    }

    /// What was kept there, if it is there and whole.
    pub fn load(&self, engine: &Engine, path: &Path) -> Option<Component> {
        // Without a folder a path is a name in whatever directory this process works in.
        if self.folder.is_none() || !path.exists() {
            return None;
        }
        // The folder may have been open to others once.
        if !is_ours(path) {
            tracing::warn!("{} may be somebody else's and is compiled anew", path.display());
            return None;
        }
        match load(engine, path) {
            Ok(component) => {
                // So that `tidy` knows that it is in use.
                std::fs::File::open(path)
                    .and_then(|file| file.set_modified(SystemTime::now()))
                    .ok();
                Some(component)
            }
            Err(error) => {
                tracing::warn!("{} is compiled anew: {error:#}", path.display());
                None
            }
        }
    }

    /// A file to compile into.
    pub fn output(&self) -> std::io::Result<Output> {
        let beside = self
            .folder
            .as_ref()
            .map(|folder| tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder));
        match beside {
            Some(Ok(file)) => Ok(Output::Beside(file)),
            Some(Err(error)) => {
                let folder = self.folder.as_deref().unwrap_or(Path::new("")).display();
                tracing::warn!("the compile cache {folder} keeps nothing: {error}");
                in_memory()
            }
            None => in_memory(),
        }
    }

    /// Takes over what was compiled, and loads it.
    pub fn keep(
        &self,
        engine: &Engine,
        output: Output,
        path: &Path,
    ) -> wasmtime::Result<Component> {
        match output {
            Output::InMemory(file) => load_copy(engine, file),
            Output::Beside(file) => {
                let loaded = load(engine, file.path())?;
                let kept = file
                    .as_file()
                    .sync_all()
                    .and_then(|()| file.persist(path).map_err(|error| error.error));
                if let Err(error) = kept {
                    tracing::warn!("{} is not kept: {error}", path.display());
                }
                self.tidy(MOST);
                Ok(loaded)
            }
        }
    }

    /// Removes what was not used for long, beyond so many bytes, and what a former process left unfinished.
    fn tidy(&self, most: u64) {
        let Some(Ok(found)) = self.folder.as_ref().map(std::fs::read_dir) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = found
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let ours = name
                    .to_str()
                    .is_some_and(|name| name.starts_with(UNFINISHED) || is_compiled(name));
                let found = entry.metadata().ok().filter(|found| ours && found.is_file())?;
                Some((found.modified().ok()?, found.len(), entry.path()))
            })
            .collect();
        // The newest first: they stay.
        files.sort_by(|one, other| other.cmp(one));
        let mut kept = 0_u64;
        for (used, size, path) in files {
            kept = kept.saturating_add(size);
            let in_use = used.elapsed().is_ok_and(|since| since < IN_USE);
            let finished = path.extension().is_some_and(|extension| extension == "cwasm");
            if !in_use && (kept > most || !finished) {
                std::fs::remove_file(path).ok();
            }
        }
    }
}

/// Whether a name is one that `path` gives: the folder may be somebody's who keeps other things there.
fn is_compiled(name: &str) -> bool {
    let digits = |text: &str, number: usize| {
        text.len() == number && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts = name.strip_suffix(".cwasm").and_then(|name| name.split_once('-'));
    parts.is_some_and(|(sha256, fingerprint)| digits(sha256, 64) && digits(fingerprint, 16))
}

/// Whether a file is this user's own, or root's, and nobody else may write to it.
fn is_ours(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| {
        let owner = [rustix::process::geteuid().as_raw(), 0].contains(&found.uid());
        found.is_file() && owner && found.permissions().mode() & 0o022 == 0
    })
}

/// The folder, which is this user's alone from then on; or why it cannot be.
fn private_folder(folder: &Path) -> Result<PathBuf, String> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| format!("cannot be made: {error}"))?;
    let found = std::fs::metadata(folder).map_err(|error| format!("cannot be read: {error}"))?;
    // SAFETY of `load` rests on this: a folder of somebody else's may hold code of theirs.
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own && found.uid() != 0 {
        return Err(format!("belongs to user {}, not to {own}", found.uid()));
    }
    // Names of temporary files are whole, and so must this be to compare with them.
    let folder =
        std::fs::canonicalize(folder).map_err(|error| format!("cannot be found: {error}"))?;
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o022 == 0 {
        // Asked for by writing, as a mount may be read-only.
        return tempfile::tempfile_in(&folder)
            .map(|_| folder)
            .map_err(|error| format!("cannot be written to: {error}"));
    }
    // Kubernetes opens volumes to a group (fsGroup). What others could have put there meanwhile goes.
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).map_err(|error| {
        format!("is open to others (mode {mode:03o}), which cannot be changed: {error}")
    })?;
    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| is_compiled(name) || name.starts_with(UNFINISHED))
        {
            std::fs::remove_file(entry.path())
                .map_err(|error| format!("cannot be emptied: {error}"))?;
        }
    }
    tracing::info!(
        "the compile cache {} was open to others; it is emptied, and this user's alone now",
        folder.display()
    );
    Ok(folder)
}

/// A file without a name, of this process alone.
fn in_memory() -> std::io::Result<Output> {
    #[cfg(target_os = "linux")]
    {
        let file = rustix::fs::memfd_create("compiled", rustix::fs::MemfdFlags::CLOEXEC)?;
        Ok(Output::InMemory(file.into()))
    }
    #[cfg(not(target_os = "linux"))]
    tempfile::tempfile().map(Output::InMemory)
}

/// Loads a file by mapping it, or by copying it where its file system forbids code (`noexec`).
fn load(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    load_mapped(engine, path).or_else(|error| {
        let file = File::open(path)?;
        load_copy(engine, file).map_err(|_| error)
    })
}

#[expect(unsafe_code, reason = "one of two places that load compiled code")]
fn load_mapped(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    // SAFETY: the file holds what our own compiling process wrote into a file that `output` made, in a folder that `private_folder` found
    // to be writable by this user alone, or under a name that nobody else may write to; wasmtime checks that this engine can run it.
    unsafe { Component::deserialize_file(engine, path) }
}

#[expect(unsafe_code, reason = "one of two places that load compiled code")]
fn load_copy(engine: &Engine, mut file: File) -> wasmtime::Result<Component> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    // SAFETY: as above; or the file has no name, and only our own compiling process had a handle of it.
    unsafe { Component::deserialize(engine, &bytes) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::engine::{Flavour, compiler, start};
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    fn open() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache"));
        (folder, cache)
    }

    #[test]
    fn what_was_compiled_is_loaded_and_what_is_damaged_is_not() {
        let (_folder, cache) = open();
        for flavour in [Flavour::Plain, Flavour::Concurrent] {
            let engine = start(flavour).unwrap();
            let path = cache.path(&engine, &"0".repeat(64));
            assert!(cache.load(&engine, &path).is_none());
            let output = cache.output().unwrap();
            output
                .writer()
                .unwrap()
                .write_all(&compiler(flavour).unwrap().precompile_component(EMPTY).unwrap())
                .unwrap();
            cache.keep(&engine, output, &path).unwrap();
            assert!(cache.load(&engine, &path).is_some());
            let mode = |mode| {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap()
            };
            mode(0o666);
            assert!(cache.load(&engine, &path).is_none(), "others could have written it");
            mode(0o600);
            assert!(cache.load(&engine, &path).is_some());
            std::fs::write(&path, b"damaged").unwrap();
            assert!(cache.load(&engine, &path).is_none());
        }
    }

    #[test]
    fn what_was_not_used_for_long_goes_first() {
        let (_folder, cache) = open();
        let name = |digit: &str| format!("{}-{}.cwasm", digit.repeat(64), digit.repeat(16));
        let ages = [
            (name("b"), 3),
            (name("c"), 4),
            (name("a"), 0),
            (format!("{UNFINISHED}left"), 5),
            (format!("{UNFINISHED}begun"), 0),
            ("thesis.docx".into(), 1000),
            ("other.cwasm".into(), 1000),
        ];
        for (name, hours) in ages {
            let path = cache.folder.as_ref().unwrap().join(name);
            std::fs::write(&path, [0; 100]).unwrap();
            let used = SystemTime::now() - Duration::from_secs(hours * 3600 + 60);
            std::fs::File::open(&path).unwrap().set_modified(used).unwrap();
        }
        cache.tidy(300);
        let left: std::collections::BTreeSet<_> = std::fs::read_dir(cache.folder.as_ref().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        let left: Vec<_> = left.iter().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(
            left,
            [&format!("{UNFINISHED}begun"), &name("a"), &name("b"), "other.cwasm", "thesis.docx"]
        );
    }

    #[test]
    fn a_folder_that_was_open_to_others_is_emptied_and_closed() {
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
    fn without_a_folder_code_is_kept_for_this_process() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        let mut cache = Cache::open(&folder.path().join("file/cache"));
        let engine = start(Flavour::Plain).unwrap();
        for in_memory in [false, true] {
            if in_memory {
                cache = Cache { folder: None, _own: None };
            }
            let path = cache.path(&engine, &"0".repeat(64));
            let output = cache.output().unwrap();
            assert_eq!(matches!(output, Output::InMemory(_)), in_memory);
            let compiled = compiler(Flavour::Plain).unwrap().precompile_component(EMPTY).unwrap();
            output.writer().unwrap().write_all(&compiled).unwrap();
            cache.keep(&engine, output, &path).unwrap();
            assert_eq!(cache.load(&engine, &path).is_some(), !in_memory);
        }
    }
}
