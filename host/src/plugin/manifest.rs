//! A plugin's TOML file.

use std::collections::{BTreeMap, HashSet};
use std::num::{NonZeroU32, NonZeroUsize};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::error::LoadError;
use super::read::read_bounded;
use batchwright_domain::units::{Size, Span};

/// The file as it stands, each key of the right type.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The component, beside this file.
    pub component: PathBuf,
    /// Whether it is loaded at all.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Adapters: whether nothing is sent for now. Batches wait.
    #[serde(default)]
    pub paused: bool,
    /// Grows with each signature, so that an older signed file does not take this one's place.
    #[serde(default)]
    pub serial: u64,
    /// Its SHA-256 in hexadecimal, if the operator pins it.
    pub sha256: Option<String>,
    /// Adapters: the models it serves. A glob routes but is not listed.
    #[serde(default)]
    pub models: Vec<String>,
    /// Adapters: what clients say, and what the provider is asked for.
    #[serde(default)]
    pub aliases: BTreeMap<String, String>,
    /// Adapters: the models of requests that name none, by endpoint. The API has this for moderations.
    #[serde(default)]
    pub default_models: BTreeMap<String, String>,
    /// Adapters: hosts allowed besides those of the settings' URLs.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Validators: lower ones judge first; among equals the name decides.
    pub order: Option<i64>,
    /// Validators: the endpoints they apply to; all those they know if there are none.
    #[serde(default)]
    pub endpoints: Vec<String>,
    /// The tenants a plugin serves; all if there are none.
    #[serde(default)]
    pub tenants: Vec<String>,
    #[serde(default)]
    pub settings: Map<String, Value>,
    #[serde(default)]
    pub credentials: BTreeMap<String, GivenCredential>,
    /// Whether credentials may be sent over plain HTTP to other machines.
    #[serde(default)]
    pub allow_plain_http: bool,
    #[serde(default)]
    pub limits: Limits,
}

fn yes() -> bool {
    true
}

/// A credential: `"env:NAME"`, or `{ from = "env:NAME", hosts = ["api.example.com"] }`.
#[derive(Debug)]
pub struct GivenCredential {
    /// `env:NAME` or `file:PATH`.
    pub from: String,
    /// Hosts that get it besides those of the settings' URLs.
    pub hosts: Vec<String>,
}

impl<'de> Deserialize<'de> for GivenCredential {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            from: String,
            #[serde(default)]
            hosts: Vec<String>,
        }
        struct GivenVisitor;
        impl<'de> Visitor<'de> for GivenVisitor {
            type Value = GivenCredential;

            fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                formatter.write_str("`env:NAME`, `file:PATH` or a table with `from` and `hosts`")
            }

            fn visit_str<E: serde::de::Error>(self, from: &str) -> Result<Self::Value, E> {
                Ok(GivenCredential { from: from.to_owned(), hosts: Vec::new() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let Table { from, hosts } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(GivenCredential { from, hosts })
            }
        }
        deserializer.deserialize_any(GivenVisitor)
    }
}

/// Whether an instance serves one call or many.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// One tenant's calls, one after the other.
    #[default]
    Tenant,
    /// One call: a new sandbox for each.
    Fresh,
}

/// What bounds a plugin. Each stands in its `[limits]` under the same name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Linear memory of an instance, summed over its memories. Enough for a line of 16 MiB and its copy.
    pub memory: Size,
    /// CPU time of one call; for validators of each started 1,000 lines or MiB.
    pub call_timeout: Span,
    /// What a guest may hand over in one call.
    pub answer: Size,
    /// Elements of each of its tables.
    pub table_elements: NonZeroU32,
    /// Handles it may hold at a time; those of a language runtime's standard streams and clocks are a dozen.
    pub handles: NonZeroU32,
    pub instances: Isolation,
    /// Calls after which an instance makes way for a new one.
    pub max_calls: NonZeroU32,
    /// Steps of one attempt, so that `resume` comes to an end.
    pub max_steps: NonZeroU32,
    /// One pause that an adapter asks for: who polls a provider asks again before long.
    pub max_wait: Span,
    /// Exchanges in flight.
    pub concurrency: NonZeroUsize,
    /// Exchanges begun in a minute; absent is no bound.
    pub requests_per_minute: Option<NonZeroU32>,
    pub connect_timeout: Span,
    /// Until the head of a response: a model may think for minutes before it says a word.
    pub first_byte_timeout: Span,
    pub exchange_timeout: Span,
    /// Body of a provider's response.
    pub max_response: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: Size::mib(64),
            call_timeout: Span::milliseconds(100),
            answer: Size::mib(16),
            table_elements: NonZeroU32::new(50_000).unwrap_or(NonZeroU32::MIN),
            handles: NonZeroU32::new(1000).unwrap_or(NonZeroU32::MIN),
            instances: Isolation::Tenant,
            max_calls: NonZeroU32::new(100_000).unwrap_or(NonZeroU32::MIN),
            max_steps: NonZeroU32::new(1000).unwrap_or(NonZeroU32::MIN),
            max_wait: Span::seconds(3600),
            concurrency: NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN),
            requests_per_minute: None,
            connect_timeout: Span::seconds(10),
            first_byte_timeout: Span::seconds(600),
            exchange_timeout: Span::seconds(900),
            max_response: Size::mib(16),
        }
    }
}

/// Longest secret in a file, in bytes.
const MOST_SECRET: u64 = 64 << 10;

/// The largest `[limits] memory`: what one slot of the instance pool reserves.
pub const MOST_MEMORY: Size = Size::mib(4096);

/// The largest `[limits] table_elements`, likewise.
pub const MOST_TABLE: usize = 100_000;

impl Manifest {
    /// Reads the text of `file`, which is named in errors.
    pub fn parse(file: &Path, text: &str) -> Result<Self, LoadError> {
        let mut manifest: Self = toml::from_str(text).map_err(|error| LoadError::Manifest {
            file: file.to_owned(),
            // Without the line itself: it may hold a secret that somebody wrote there, and this is shown to clients.
            message: format!("{}{}", place(text, error.span()), error.message()),
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
        if manifest.limits.memory > MOST_MEMORY {
            return Err(invalid(
                "limits.memory",
                format!("{} is more than {MOST_MEMORY}", manifest.limits.memory),
            ));
        }
        if manifest.limits.table_elements.get() as usize > MOST_TABLE {
            let message = format!("{} is more than {MOST_TABLE}", manifest.limits.table_elements);
            return Err(invalid("limits.table_elements", message));
        }
        if let Some(cycle) = cycle(&manifest.aliases) {
            let message = format!(
                "{cycle} is a cycle; an alias is what clients say for a name that the provider knows, so let each lead to one of those"
            );
            return Err(invalid("aliases", message));
        }
        for given in manifest.credentials.values_mut() {
            if let Some(path) = given.from.strip_prefix("file:").filter(|path| !path.is_empty()) {
                // Beside this file, if it does not say where.
                let path = file.with_file_name("").join(path);
                let path = std::path::absolute(&path).unwrap_or(path);
                given.from = format!("file:{}", path.display());
            }
        }
        for (name, given) in &manifest.credentials {
            // The value is not shown: it may be a secret that someone wrote here by mistake.
            if Source::parse(&given.from).is_none() {
                return Err(invalid(
                    &format!("credentials.{name}"),
                    "must be `env:NAME` or `file:PATH`; a secret never stands in this file".into(),
                ));
            }
        }
        Ok(manifest)
    }
}

/// Where in a text something is wrong, in words: the line and its key, never its value.
fn place(text: &str, span: Option<std::ops::Range<usize>>) -> String {
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

/// Aliases that lead back to where they began, as `a` = `b`, `b` = `a`.
fn cycle(aliases: &BTreeMap<String, String>) -> Option<String> {
    // Those from which every way was followed before.
    let mut seen = HashSet::new();
    for start in aliases.keys() {
        let mut way: Vec<&String> = Vec::new();
        let mut at = start;
        while let Some(next) = aliases.get(at) {
            if !seen.insert(at) {
                let circle = way.iter().skip_while(|known| **known != at);
                let shown: Vec<_> = circle
                    .filter_map(|from| Some(format!("`{from}` = `{}`", aliases.get(*from)?)))
                    .collect();
                if !shown.is_empty() {
                    return Some(shown.join(", "));
                }
                break;
            }
            way.push(at);
            at = next;
        }
    }
    None
}

/// Where a secret is kept.
pub enum Source<'a> {
    Env(&'a str),
    File(&'a Path),
}

/// The secret that `env:NAME` or `file:PATH` leads to.
pub fn read_secret(source: &str) -> Result<String, String> {
    let parsed = Source::parse(source)
        .ok_or("must be `env:NAME` or `file:PATH`; a secret never stands here itself")?;
    parsed.read()
}

impl<'a> Source<'a> {
    pub fn parse(text: &'a str) -> Option<Self> {
        match text.split_once(':')? {
            ("env", name) if !name.is_empty() => Some(Self::Env(name)),
            ("file", path) if !path.is_empty() => Some(Self::File(Path::new(path))),
            _ => None,
        }
    }

    /// The mode of a file that everybody may read.
    pub fn open_mode(&self) -> Option<u32> {
        let Self::File(path) = self else { return None };
        let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
        (mode & 0o004 != 0).then_some(mode)
    }

    /// The secret, without the line end that editors leave in a file. Errors say where it was looked for.
    pub fn read(&self) -> Result<String, String> {
        let secret = match self {
            Self::Env(name) => std::env::var(name).map_err(|_| {
                format!("the environment variable {name} is not set; export it and start again")
            })?,
            Self::File(path) => {
                let bytes = read_bounded(path, MOST_SECRET);
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
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Manifest, String> {
        Manifest::parse(Path::new("plugins/x.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_full_file_is_read_and_the_rest_has_defaults() {
        let manifest = parse(
            "component = 'x.wasm'\nmodels = ['a', 'b-*']\n[aliases]\nc = 'd'\n[settings]\nbase_url = 'http://h/v1'\n\
             [credentials]\napi_key = 'env:KEY'\n[limits]\nmemory = '32MiB'\nrequests_per_minute = 3000\n",
        )
        .unwrap();
        assert_eq!(manifest.limits.memory, Size::mib(32));
        assert_eq!(manifest.limits.call_timeout, Span::milliseconds(100));
        assert_eq!(manifest.settings.get("base_url"), Some(&"http://h/v1".into()));
    }

    #[test]
    fn mistakes_are_named_with_file_and_place_and_secrets_are_not_shown() {
        for (text, parts) in [
            ("component = 'x.wasm'\nmodel = ['a']", vec!["plugins/x.toml", "line 2", "model"]),
            ("component = '../x.wasm'", vec!["component", "leads out"]),
            ("component = '/x.wasm'", vec!["component", "leads out"]),
            ("component = 'x.wasm'\n[limits]\nmemory = '5GiB'", vec!["limits.memory", "4GiB"]),
            ("component = 'x.wasm'\n[limits]\nconcurrency = 0", vec!["line 3"]),
            ("component = 'x.wasm'\n[limits]\ncall_timeout = 'long'", vec!["line 3", "100ms"]),
            (
                "component = 'x.wasm'\n[limits]\ntable_elements = 1000000",
                vec!["limits.table_elements", "100000"],
            ),
            (
                "component = 'x.wasm'\n[aliases]\na = 'b'\nb = 'c'\nc = 'b'",
                vec!["aliases", "`b` = `c`, `c` = `b` is a cycle"],
            ),
            ("component = 'x.wasm'\n[aliases]\na = 'a'", vec!["aliases", "`a` = `a` is a cycle"]),
            ("", vec!["component"]),
        ] {
            let error = parse(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "`{part}` is missing from: {error}");
            }
        }
        let error =
            parse("component = 'x.wasm'\n[credentials]\napi_key = 'sk-secret'").unwrap_err();
        assert!(error.contains("credentials.api_key") && error.contains("env:NAME"), "{error}");
        assert!(!error.contains("sk-secret"), "{error}");
        let error = parse("component = 'x.wasm'\n[credentials]\napi_key = sk-secret").unwrap_err();
        assert!(
            error.contains("line 3") && error.contains("api_key") && !error.contains("sk-secret"),
            "{error}"
        );
    }
}
