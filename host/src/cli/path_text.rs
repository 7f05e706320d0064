//! Serialization of paths as JSON strings.
//!
//! A path that is UTF-8 without a percent sign is written as it is. Any other path is written with
//! percent-encoding, because a file name may hold bytes that are not UTF-8.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use serde::{Deserialize, Deserializer, Serializer};

/// Characters that percent-encoding replaces, besides bytes that are not ASCII.
const ESCAPE_SET: &AsciiSet = &CONTROLS.add(b'%');

/// Serializes a path as a string.
pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = path.as_os_str().as_bytes();
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('%') => serializer.serialize_str(text),
        _ => serializer.serialize_str(&percent_encode(bytes, ESCAPE_SET).to_string()),
    }
}

/// Deserializes a path from a string that [`serialize`] wrote.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(OsString::from_vec(percent_decode_str(&text).collect()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, serde::Serialize)]
    struct Wrapper(#[serde(with = "super")] PathBuf);

    #[test]
    fn paths_with_any_bytes_round_trip() {
        for name in [&b"/a/b c"[..], "/ü".as_bytes(), b"/f\xff\n", b"/100%", b"/%41"] {
            let path = PathBuf::from(OsString::from_vec(name.to_vec()));
            let text = serde_json::to_string(&Wrapper(path.clone())).unwrap();
            let Wrapper(again) = serde_json::from_str(&text).unwrap();
            assert_eq!(again, path, "{text}");
        }
    }
}
