//! Manifest of a plugin: its TOML file, parsed and checked.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use batchwright_domain::text::nearest;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::package::limits::{Limits, MAX_MEMORY, MAX_TABLE_ELEMENTS};
use crate::package::read::read_bounded;
use crate::reference::keys;

keys! {
    /// Parsed TOML file of a plugin.
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Manifest, manifest_keys {
        /// File name of the component, beside this file or in a folder of the setting `components`.
        pub component: PathBuf, "string", "required";
        /// False disables the plugin: it is not loaded.
        #[serde(default = "enabled_by_default")]
        pub enabled: bool, "boolean", "`true`";
        /// Adapters: true sends no requests, so that batches wait.
        #[serde(default)]
        pub paused: bool, "boolean", "`false`";
        /// Serial of the signature, which grows with each signature. A lower serial is refused.
        #[serde(default)]
        pub serial: u64, "whole number", "0, unsigned";
        /// Pinned SHA-256 digest of the component, in hexadecimal.
        pub sha256: Option<String>, "string", "none";
        /// Adapters: names and globs of the served models. A glob routes but is not listed.
        #[serde(default)]
        pub models: Vec<String>, "array of strings", "required for adapters";
        /// Adapters: model names of clients, each with the model name of the provider.
        #[serde(default)]
        pub aliases: BTreeMap<String, String>, "table of strings", "none";
        /// Adapters: default models of requests without a model, by endpoint. The API allows such
        /// requests for moderations.
        #[serde(default)]
        pub default_models: BTreeMap<String, String>, "table of strings", "none";
        /// Adapters: allowed hosts in addition to the hosts of the settings' URLs.
        #[serde(default)]
        pub allow: Vec<String>, "array of strings", "none";
        /// Validators: position. Lower values run first; the name decides between equal values.
        pub order: Option<i64>, "whole number", "100";
        /// Validators: endpoints that the validator applies to; empty means all that it describes.
        #[serde(default)]
        pub endpoints: Vec<String>, "array of strings", "all";
        /// Tenants that the plugin serves; empty means all.
        #[serde(default)]
        pub tenants: Vec<String>, "array of strings", "all";
        /// Settings for the component's `configure`.
        #[serde(default)]
        pub settings: Map<String, Value>, "table", "the defaults of the component";
        /// Credentials by the name that the component declares.
        #[serde(default)]
        pub credentials: BTreeMap<String, GivenCredential>, "table", "none";
        /// True allows credentials over plain HTTP to other machines.
        #[serde(default)]
        pub allow_plain_http: bool, "boolean", "`false`";
        /// Resource limits.
        #[serde(default)]
        pub limits: Limits, "table", "see below";
    }
}

fn enabled_by_default() -> bool {
    true
}

keys! {
    /// Credential in the TOML file.
    ///
    /// Either `"env:NAME"` or `{ from = "env:NAME", hosts = ["api.example.com"] }`.
    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct CredentialTable, credential_keys {
        /// Source of the secret: `env:NAME`, or `file:PATH` relative to this file. It can also be
        /// called `default`. Without it, projects without a secret of their own cannot use the
        /// plugin.
        #[serde(default)]
        pub from: Option<String>, "string", "none";
        /// Sources of the secrets of projects, by their slugs. They can also be in the table of
        /// the credential itself, as in `{ default = "env:A", acme = "file:b" }`.
        #[serde(default)]
        pub tenants: BTreeMap<String, String>, "table", "none";
        /// True lets a project set the secret itself, through the API. It comes before the other
        /// sources.
        #[serde(default)]
        pub from_projects: bool, "boolean", "`false`";
        /// Hosts that receive the secret in addition to the hosts of the settings' URLs.
        #[serde(default)]
        pub hosts: Vec<String>, "array of strings", "none";
    }
}

/// Credential in the TOML file, as a string or as a table.
#[derive(Debug)]
pub struct GivenCredential(pub CredentialTable);

impl<'de> Deserialize<'de> for GivenCredential {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GivenVisitor;
        impl<'de> Visitor<'de> for GivenVisitor {
            type Value = GivenCredential;

            fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                formatter.write_str("`env:NAME`, `file:PATH` or a table with `from` and `hosts`")
            }

            fn visit_str<E: serde::de::Error>(self, from: &str) -> Result<Self::Value, E> {
                let from = Some(from.to_owned());
                Ok(GivenCredential(CredentialTable { from, ..CredentialTable::default() }))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut table = CredentialTable::default();
                let twice = |key: &str| serde::de::Error::custom(format!("`{key}` is given twice"));
                while let Some(key) = map.next_key::<String>()? {
                    let sources = match key.as_str() {
                        "from" | "default" => {
                            if table.from.replace(map.next_value()?).is_some() {
                                return Err(twice("from"));
                            }
                            continue;
                        }
                        "hosts" => {
                            table.hosts = map.next_value()?;
                            continue;
                        }
                        "from_projects" => {
                            table.from_projects = map.next_value()?;
                            continue;
                        }
                        "tenants" => map.next_value::<BTreeMap<String, String>>()?,
                        slug => {
                            check_tenant(slug).map_err(serde::de::Error::custom)?;
                            BTreeMap::from([(slug.to_owned(), map.next_value()?)])
                        }
                    };
                    for (slug, source) in sources {
                        check_slug(&slug).map_err(serde::de::Error::custom)?;
                        if table.tenants.insert(slug.clone(), source).is_some() {
                            return Err(twice(&slug));
                        }
                    }
                }
                Ok(GivenCredential(table))
            }
        }
        deserializer.deserialize_any(GivenVisitor)
    }
}

/// Checks a key of a credential that may be the slug of a project.
fn check_tenant(key: &str) -> Result<(), String> {
    let known = ["from", "default", "from_projects", "hosts", "tenants"];
    if let Some(known) = nearest(key, &known) {
        return Err(format!(
            "there is no key `{key}`; did you mean `{known}`? The source of a project with the \
             slug `{key}` belongs into the table `tenants`"
        ));
    }
    check_slug(key)
}

fn check_slug(key: &str) -> Result<(), String> {
    let is_slug = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    match (1..=63).contains(&key.len()) && key.bytes().all(is_slug) {
        true => Ok(()),
        false => Err(format!("`{key}` is neither a key nor the slug of a project")),
    }
}

impl CredentialTable {
    /// Returns all sources: the default's, and those of projects.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &String> {
        self.from.iter().chain(self.tenants.values())
    }
}

/// Maximum size of a secret in a file, in bytes.
const MAX_SECRET_BYTES: u64 = 64 << 10;

impl Manifest {
    /// Parses and checks the text of `file`. Errors name the file and the key.
    ///
    /// Relative paths in `file:PATH` become absolute.
    pub fn parse(file: &Path, text: &str) -> Result<Self, LoadError> {
        let mut manifest: Self = toml::from_str(text).map_err(|error| LoadError::Manifest {
            file: file.to_owned(),
            // Clients see the message, and the line may contain a secret, so the line is omitted.
            message: format!(
                "{}{}",
                error_location(text, error.span()),
                renamed(error.message()).unwrap_or_else(|| error.message().to_owned())
            ),
        })?;
        let invalid = |key: &str, message: String| LoadError::Key {
            file: file.to_owned(),
            key: key.into(),
            message,
        };
        if manifest.component.components().any(|part| !matches!(part, Component::Normal(_))) {
            let message = format!(
                "`{}` leads out of the plugin directory; name a file beside this one",
                manifest.component.display()
            );
            return Err(invalid("component", message));
        }
        if manifest.limits.max_memory > MAX_MEMORY {
            return Err(invalid(
                "limits.max_memory",
                format!("{} is more than {MAX_MEMORY}", manifest.limits.max_memory),
            ));
        }
        if manifest.limits.max_table_elements.get() as usize > MAX_TABLE_ELEMENTS {
            let message =
                format!("{} is more than {MAX_TABLE_ELEMENTS}", manifest.limits.max_table_elements);
            return Err(invalid("limits.max_table_elements", message));
        }
        if let Some(cycle) = find_cycle(&manifest.aliases) {
            let message =
                format!("{cycle} is a cycle; point each alias at a model name of the provider");
            return Err(invalid("aliases", message));
        }
        for GivenCredential(given) in manifest.credentials.values_mut() {
            for source in given.from.iter_mut().chain(given.tenants.values_mut()) {
                if let Some(path) = source.strip_prefix("file:").filter(|path| !path.is_empty()) {
                    // A relative path is relative to this file.
                    let path = file.with_file_name("").join(path);
                    let path = std::path::absolute(&path).unwrap_or(path);
                    *source = format!("file:{}", path.display());
                }
            }
        }
        for (name, given) in &manifest.credentials {
            // The value is omitted, because it may be a secret written here by mistake.
            if given.0.sources().any(|source| Source::parse(source).is_none()) {
                return Err(invalid(
                    &format!("credentials.{name}"),
                    "must be `env:NAME` or `file:PATH`; move the secret out of this file".into(),
                ));
            }
        }
        Ok(manifest)
    }
}

/// Limits that had another name, with the name that they have now.
const RENAMED_LIMITS: [(&str, &str); 8] = [
    ("memory", "max_memory"),
    ("answer", "max_output"),
    ("table_elements", "max_table_elements"),
    ("handles", "max_handles"),
    ("instances", "isolation"),
    ("max_calls", "max_calls_per_instance"),
    ("concurrency", "max_in_flight"),
    ("max_response", "max_response_body"),
];

/// Message about a key of `[limits]` that has another name now.
fn renamed(message: &str) -> Option<String> {
    let (_, name) = RENAMED_LIMITS
        .iter()
        .find(|(old, _)| message.starts_with(&format!("unknown field `{old}`")))?;
    Some(format!("this limit is called `{name}`"))
}

/// Returns the location of an error in words: line, column and key, never the value.
fn error_location(text: &str, span: Option<std::ops::Range<usize>>) -> String {
    let Some(before) = span.and_then(|span| text.get(..span.start)) else { return String::new() };
    let line = before.matches('\n').count().saturating_add(1);
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count().saturating_add(1);
    let whole = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    let key = whole.split_once('=').map(|(key, _)| key.trim()).filter(|key| {
        let fits =
            |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.');
        !key.is_empty() && key.len() <= 64 && key.chars().all(fits)
    });
    let key = key.map(|key| format!(" (`{key}`)")).unwrap_or_default();
    format!("line {line}, column {column}{key}: ")
}

/// Returns the first cycle of aliases, as "`a` = `b`, `b` = `a`".
fn find_cycle(aliases: &BTreeMap<String, String>) -> Option<String> {
    // Aliases whose chain was followed before.
    let mut seen = HashSet::new();
    for start in aliases.keys() {
        let mut chain: Vec<&String> = Vec::new();
        let mut at = start;
        while let Some(next) = aliases.get(at) {
            if !seen.insert(at) {
                let cycle = chain.iter().skip_while(|known| **known != at);
                let shown: Vec<_> = cycle
                    .filter_map(|from| Some(format!("`{from}` = `{}`", aliases.get(*from)?)))
                    .collect();
                if !shown.is_empty() {
                    return Some(shown.join(", "));
                }
                break;
            }
            chain.push(at);
            at = next;
        }
    }
    None
}

/// Source of a secret.
pub(crate) enum Source<'a> {
    /// Name of an environment variable.
    Env(&'a str),
    /// Path of a file.
    File(&'a Path),
}

/// Reads the secret of a source, `env:NAME` or `file:PATH`.
///
/// An error does not repeat an invalid source, because its text may be a secret.
pub fn read_secret(source: &str) -> Result<String, String> {
    let parsed = Source::parse(source)
        .ok_or("must be `env:NAME` or `file:PATH`; the secret itself is not allowed here")?;
    parsed.read()
}

impl<'a> Source<'a> {
    /// Parses `env:NAME` or `file:PATH`. None for any other text.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        match text.split_once(':')? {
            ("env", name) if !name.is_empty() => Some(Self::Env(name)),
            ("file", path) if !path.is_empty() => Some(Self::File(Path::new(path))),
            _ => None,
        }
    }

    /// Returns the file mode if every user may read the file.
    pub(crate) fn open_mode(&self) -> Option<u32> {
        let Self::File(path) = self else { return None };
        let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
        (mode & 0o004 != 0).then_some(mode)
    }

    /// Reads the secret without trailing line ends. Errors name the source.
    pub(crate) fn read(&self) -> Result<String, String> {
        let secret = match self {
            Self::Env(name) => std::env::var(name).map_err(|_| {
                format!("the environment variable {name} is not set; export it and start again")
            })?,
            Self::File(path) => {
                let bytes = read_bounded(path, MAX_SECRET_BYTES);
                let text =
                    bytes.and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
                text.map_err(|error| format!("failed to read {}: {error}", path.display()))?
            }
        };
        let secret = secret.trim_end_matches(['\r', '\n']);
        if secret.is_empty() { Err(format!("{self} is empty")) } else { Ok(secret.to_owned()) }
    }
}

impl std::fmt::Display for Source<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Env(name) => write!(formatter, "the environment variable {name}"),
            Self::File(path) => write!(formatter, "the file {}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests;
