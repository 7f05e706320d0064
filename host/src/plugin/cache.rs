//! Compiled components, kept in a folder of the host's own.
//!
//! Loading compiled code is running it, so nothing here is ever read from the plugin directory, and the folder must belong to
//! the host alone. A name holds the component's digest and the engine's fingerprint: another wasmtime, processor or setting compiles anew.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tempfile::NamedTempFile;
use wasmtime::Engine;
use wasmtime::component::Component;

use super::error::LoadError;

/// What the folder holds at the most, in bytes, besides what was used within the last hour: what was used longest ago goes first.
const MOST: u64 = 2 << 30;
/// How the names of files begin that are being compiled into.
const UNFINISHED: &str = ".compiling-";
const IN_USE: Duration = Duration::from_secs(3600);

pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Opens the folder, or makes it; refuses one that others may write to.
    pub fn open(folder: &Path) -> Result<Self, LoadError> {
        let failed = |message: String| LoadError::Cache { path: folder.to_owned(), message };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| failed(format!("cannot be made: {error}; name another folder with --cache")))?;
        let found = std::fs::metadata(folder).map_err(|error| failed(format!("cannot be read: {error}")))?;
        if found.permissions().mode() & 0o022 != 0 {
            return Err(failed(format!(
                "others may write to it (mode {:03o}), and what is in it is run; empty it, and make it yours alone with `chmod 700`",
                found.permissions().mode() & 0o777
            )));
        }
        // SAFETY rests on this: a folder of somebody else's may hold code of theirs.
        let own = rustix::process::geteuid().as_raw();
        if found.uid() != own && found.uid() != 0 {
            return Err(failed(format!(
                "belongs to user {}, not to {own}; name another folder with --cache",
                found.uid()
            )));
        }
        // Names of temporary files are whole, and so must this be to compare with them.
        let folder = std::fs::canonicalize(folder).map_err(|error| failed(format!("cannot be found: {error}")))?;
        let cache = Self { folder };
        cache.tidy(MOST);
        Ok(cache)
    }

    /// Where the compiled form of a component lies for this engine.
    pub fn path(&self, engine: &Engine, sha256: &str) -> PathBuf {
        let mut fingerprint = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut fingerprint);
        self.folder.join(format!("{sha256}-{:016x}.cwasm", fingerprint.finish()))
    }

    /// What was kept there, if it is there and whole.
    pub fn load(&self, engine: &Engine, path: &Path) -> Option<Component> {
        if !path.exists() {
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
                std::fs::File::open(path).and_then(|file| file.set_modified(SystemTime::now())).ok();
                Some(component)
            }
            Err(error) => {
                tracing::warn!("{} is compiled anew: {error:#}", path.display());
                None
            }
        }
    }

    /// A file to compile into, which nobody else can write to.
    pub fn output(&self) -> std::io::Result<NamedTempFile> {
        let mut file = tempfile::Builder::new();
        file.prefix(UNFINISHED);
        file.tempfile_in(&self.folder).or_else(|error| {
            tracing::warn!("the compile cache {} keeps nothing: {error}", self.folder.display());
            file.tempfile()
        })
    }

    /// Takes over what was compiled, and loads it.
    pub fn keep(&self, engine: &Engine, output: NamedTempFile, path: &Path) -> wasmtime::Result<Component> {
        output.as_file().sync_all()?;
        if output.path().parent() != Some(&self.folder) {
            return load(engine, output.path());
        }
        output.persist(path)?;
        let loaded = load(engine, path);
        self.tidy(MOST);
        loaded
    }

    /// Removes what was not used for long, beyond so many bytes, and what a former process left unfinished.
    fn tidy(&self, most: u64) {
        let Ok(found) = std::fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = found
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let ours = name.to_str().is_some_and(|name| name.starts_with(UNFINISHED) || is_compiled(name));
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
    let digits = |text: &str, number: usize| text.len() == number && text.bytes().all(|byte| byte.is_ascii_hexdigit());
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

#[expect(unsafe_code, reason = "the one place that loads compiled code")]
fn load(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    // SAFETY: the file holds what our own compiling process wrote into a file that `output` made, in a folder that `open` found to be
    // writable by this user alone, or under a name that nobody else may write to; wasmtime checks that this engine can run it.
    unsafe { Component::deserialize_file(engine, path) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::engine::{Flavour, compiler, start};
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    fn open() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache")).unwrap();
        (folder, cache)
    }

    #[test]
    fn what_was_compiled_is_loaded_and_what_is_damaged_is_not() {
        let (_folder, cache) = open();
        for flavour in [Flavour::Plain, Flavour::Concurrent] {
            let engine = start(flavour).unwrap();
            let path = cache.path(&engine, &"0".repeat(64));
            assert!(cache.load(&engine, &path).is_none());
            let mut output = cache.output().unwrap();
            output.write_all(&compiler(flavour).unwrap().precompile_component(EMPTY).unwrap()).unwrap();
            cache.keep(&engine, output, &path).unwrap();
            assert!(cache.load(&engine, &path).is_some());
            let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
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
            let path = cache.folder.join(name);
            std::fs::write(&path, [0; 100]).unwrap();
            let used = SystemTime::now() - Duration::from_secs(hours * 3600 + 60);
            std::fs::File::open(&path).unwrap().set_modified(used).unwrap();
        }
        cache.tidy(300);
        let left: std::collections::BTreeSet<_> =
            std::fs::read_dir(&cache.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let left: Vec<_> = left.iter().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(left, [&format!("{UNFINISHED}begun"), &name("a"), &name("b"), "other.cwasm", "thesis.docx"]);
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Cache::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("777") && error.contains("chmod 700"), "{error}");
    }
}
