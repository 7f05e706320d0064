//! Bounded reads of untrusted files, and digests of their contents.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use batchwright_domain::text::hex;
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use crate::error::LoadError;

/// Maximum size of a TOML file, a signature or a list of keys, in bytes.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Reads a UTF-8 text file of at most 1 MiB.
pub(crate) fn read_text(path: &Path) -> Result<String, LoadError> {
    let bytes = read_bounded(path, MAX_TEXT_BYTES);
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
    text.map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })
}

/// Reads a regular file of at most `max_bytes` bytes.
///
/// The plugin directory may contain anything: a pipe without a writer, a device without an end, a
/// file that grows. Therefore the file is opened without blocking and read only up to the limit.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0));
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(std::io::Error::other(format!("it is larger than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// Returns the SHA-256 digest in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
