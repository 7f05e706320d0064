//! Compiled components, kept in a folder of the host's own.
//!
//! Loading compiled code is running it, so nothing here is ever read from the plugin directory, and the folder must belong to
//! the host alone. A name holds the component's digest and the engine's fingerprint: another wasmtime, processor or setting compiles anew.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use wasmtime::Engine;
use wasmtime::component::Component;

use super::error::LoadError;

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
                "others may write to it (mode {:03o}), and what is in it is run; make it yours alone with `chmod 700`",
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
        Ok(Self { folder: folder.to_owned() })
    }

    /// The compiled form of `bytes`, whose SHA-256 is `digest`. Blocks for as long as compiling takes.
    pub fn load_or_compile(&self, engine: &Engine, digest: &str, bytes: &[u8]) -> wasmtime::Result<Component> {
        let mut fingerprint = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut fingerprint);
        let path = self.folder.join(format!("{digest}-{:016x}.cwasm", fingerprint.finish()));
        if path.exists() {
            match load(engine, &path) {
                Ok(component) => return Ok(component),
                Err(error) => tracing::warn!("{} is compiled anew: {error:#}", path.display()),
            }
        }
        let compiled = engine.precompile_component(bytes)?;
        match self.keep(&path, &compiled) {
            Ok(()) => load(engine, &path),
            Err(error) => {
                tracing::warn!("the compile cache {} keeps nothing: {error}", self.folder.display());
                Component::from_binary(engine, bytes)
            }
        }
    }

    fn keep(&self, path: &Path, compiled: &[u8]) -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(compiled)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }
}

#[expect(unsafe_code, reason = "the one place that loads compiled code")]
fn load(engine: &Engine, path: &Path) -> wasmtime::Result<Component> {
    // SAFETY: the file was written by `keep` from the output of `precompile_component`, in a folder that `open` found to be writable
    // by this user alone; wasmtime checks that this engine can run it.
    unsafe { Component::deserialize_file(engine, path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    #[test]
    fn what_was_compiled_is_loaded_and_what_is_damaged_is_compiled_anew() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache")).unwrap();
        let engine = super::super::engine::start().unwrap();
        cache.load_or_compile(&engine, "00", EMPTY).unwrap();
        let file = std::fs::read_dir(&cache.folder).unwrap().next().unwrap().unwrap().path();
        // Given other bytes under the same digest, it must come from the folder.
        cache.load_or_compile(&engine, "00", b"not wasm").unwrap();
        std::fs::write(&file, b"damaged").unwrap();
        assert!(cache.load_or_compile(&engine, "00", b"not wasm").is_err());
        cache.load_or_compile(&engine, "00", EMPTY).unwrap();
        cache.load_or_compile(&engine, "00", b"not wasm").unwrap();
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Cache::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("777") && error.contains("chmod 700"), "{error}");
    }
}
