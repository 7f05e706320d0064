//! Paths in JSON: as they are, with percent signs for bytes that are no UTF-8, which names of files may have.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use serde::{Deserialize, Deserializer, Serializer};

const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = path.as_os_str().as_bytes();
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('%') => serializer.serialize_str(text),
        _ => serializer.serialize_str(&percent_encode(bytes, ESCAPED).to_string()),
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(OsString::from_vec(percent_decode_str(&text).collect()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, serde::Serialize)]
    struct Kept(#[serde(with = "super")] PathBuf);

    #[test]
    fn every_name_comes_back_as_it_was() {
        for name in [&b"/a/b c"[..], "/ü".as_bytes(), b"/f\xff\n", b"/100%", b"/%41"] {
            let path = PathBuf::from(OsString::from_vec(name.to_vec()));
            let text = serde_json::to_string(&Kept(path.clone())).unwrap();
            let Kept(again) = serde_json::from_str(&text).unwrap();
            assert_eq!(again, path, "{text}");
        }
    }
}
