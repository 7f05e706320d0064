//! Credentials of a plugin: the source of each secret, its header, and the hosts that receive it.
//!
//! A secret is sent only to the hosts of the URLs in the plugin's settings, and to the hosts that
//! the operator lists with the credential. A credential that could not be sent anywhere is an
//! error at load, so that requests do not fail later without it.
//!
//! A project can have secrets of its own: in the plugin's file, or in the folder of the setting
//! `secrets`, as `<folder>/<slug>/<plugin>/<credential>`. The folder comes first, and its files are
//! looked at before each exchange, so that a new secret takes effect with the next request.

use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use batchwright_domain::ids::TenantId;
use batchwright_egress::{
    AllowList, Credential, CredentialStore, MAX_FOLDER_READS, Secrets, SecretsFolder, is_distinct,
    is_loopback,
};
use http::HeaderName;
use tokio::sync::Semaphore;
use url::Url;

use crate::contract::types::{CredentialRequest, Description};
use crate::error::LoadError;
use crate::package::manifest::{CredentialTable, GivenCredential, Manifest, Source};

/// Number of tenants whose secrets are kept in memory.
const MAX_CACHED_TENANTS: usize = 1000;

/// Credential that a component declares, bound to its hosts.
struct Bound {
    name: String,
    header: HeaderName,
    prefix: String,
    /// True if a tenant without the secret cannot use the plugin: the component requires it, or the
    /// plugin's file names the credential without a default.
    is_required: bool,
    hosts: Arc<AllowList>,
    /// Secret of tenants without their own.
    default: Option<String>,
    /// Own secrets of tenants.
    tenants: HashMap<TenantId, String>,
}

/// Credentials of a plugin.
struct Credentials {
    bound: Vec<Bound>,
    /// Headers that only credentials may set.
    reserved: Vec<HeaderName>,
    plain_http: bool,
}

/// Reads the secrets of a plugin, and binds each secret to its hosts.
///
/// With a `placeholder`, a secret that cannot be read is replaced. `folder` is the folder of
/// secrets, with the name of the plugin. `key` makes an error of a key and a message.
pub(crate) fn secrets(
    manifest: &Manifest,
    description: &Description,
    (file, folder): (&Path, Option<(&Path, &str)>),
    urls: &[Url],
    placeholder: Option<&str>,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<CredentialStore, LoadError> {
    for name in manifest.credentials.keys() {
        if !description.credentials.iter().any(|need| need.name == *name) {
            let known: Vec<&str> =
                description.credentials.iter().map(|need| need.name.as_str()).collect();
            let message = if known.is_empty() {
                "the component takes no credentials".into()
            } else {
                format!(
                    "the component declares no credential of this name; it declares {}",
                    known.join(", ")
                )
            };
            return Err(key(&format!("credentials.{name}"), message));
        }
    }
    let mut bound = Vec::new();
    for need in &description.credentials {
        let given = manifest.credentials.get(&need.name).map(|GivenCredential(given)| given);
        if given.is_some() || folder.is_some() {
            let found = bind(need, given, manifest, (file, urls), placeholder);
            bound.extend(found.map_err(|message| key(&key_of(need), message))?);
        } else if need.required {
            let message =
                format!("is required; add `{} = \"env:NAME\"` to [credentials]", need.name);
            return Err(key(&key_of(need), message));
        }
    }
    let headers = description.credentials.iter();
    let reserved = headers.filter_map(|need| HeaderName::try_from(&need.header).ok()).collect();
    let credentials = Credentials { bound, reserved, plain_http: manifest.allow_plain_http };
    credentials.into_store(folder).map_err(|message| key("credentials", message))
}

fn key_of(need: &CredentialRequest) -> String {
    format!("credentials.{}", need.name)
}

/// Reads the secrets of a credential and binds it to its hosts; none if it has no valid header.
fn bind(
    need: &CredentialRequest,
    given: Option<&CredentialTable>,
    manifest: &Manifest,
    (file, urls): (&Path, &[Url]),
    placeholder: Option<&str>,
) -> Result<Option<Bound>, String> {
    let Ok(header) = HeaderName::try_from(need.header.as_str()) else { return Ok(None) };
    let read = |source: &String| -> Result<Option<String>, String> {
        let Some(source) = Source::parse(source) else { return Ok(None) };
        let secret = match (source.read(), placeholder) {
            (Ok(secret), _) => secret,
            (Err(_), Some(placeholder)) => placeholder.to_owned(),
            (Err(message), None) => return Err(message),
        };
        if placeholder.is_none() {
            warn(file, &need.name, &source, &secret);
        }
        Ok(Some(secret))
    };
    let default = given.and_then(|given| given.from.as_ref()).map(read).transpose()?.flatten();
    let mut tenants = HashMap::new();
    for (slug, source) in given.iter().flat_map(|given| &given.tenants) {
        if let Some(secret) = read(source)? {
            tenants.insert(slug.as_str().into(), secret);
        }
    }
    let extra = given.map_or(&[][..], |given| &given.hosts);
    let hosts = AllowList::new(file.display().to_string(), urls, extra)
        .map_err(|error| error.to_string())?;
    // A folder alone gives no credential to a plugin that has no host for it.
    if given.is_some() || need.required {
        check_hosts(manifest, &need.name, urls)?;
    }
    Ok(Some(Bound {
        name: need.name.clone(),
        header,
        prefix: need.prefix.clone(),
        is_required: need.required || given.is_some_and(|given| given.from.is_none()),
        hosts: Arc::new(hosts),
        default,
        tenants,
    }))
}

/// Warns about a secret that others can read, or that is not redacted in bodies.
fn warn(file: &Path, name: &str, source: &Source<'_>, secret: &str) {
    if let Some(mode) = source.open_mode() {
        tracing::warn!(
            path = %file.display(),
            credential = name,
            mode = format_args!("{mode:03o}"),
            "secret file is readable by all users"
        );
    }
    if !is_distinct(secret) {
        tracing::warn!(
            path = %file.display(),
            credential = name,
            "secret is short or made of words, not redacted in response bodies"
        );
    }
}

impl Credentials {
    /// Returns the secrets of a tenant, given those of a folder; none if a required one is missing.
    fn of(
        &self,
        tenant: Option<&TenantId>,
        folder: &HashMap<String, String>,
    ) -> Result<Option<Secrets>, String> {
        let mut credentials = Vec::new();
        for bound in &self.bound {
            let own = tenant.and_then(|tenant| bound.tenants.get(tenant));
            match folder.get(&bound.name).or(own).or(bound.default.as_ref()) {
                Some(secret) => credentials.push(Credential {
                    name: bound.name.clone(),
                    header: bound.header.clone(),
                    prefix: bound.prefix.clone(),
                    secret: secret.clone(),
                    hosts: bound.hosts.clone(),
                }),
                None if bound.is_required => return Ok(None),
                None => {}
            }
        }
        let secrets = Secrets::new(credentials, self.reserved.clone(), self.plain_http);
        secrets.map(Some).map_err(|error| error.to_string())
    }

    fn into_store(self, folder: Option<(&Path, &str)>) -> Result<CredentialStore, String> {
        let none = HashMap::new();
        let default = self.of(None, &none)?.map(Arc::new);
        let names: BTreeSet<&TenantId> =
            self.bound.iter().flat_map(|bound| bound.tenants.keys()).collect();
        let mut tenants = HashMap::new();
        for tenant in names {
            if let Some(secrets) = self.of(Some(tenant), &none)? {
                tenants.insert(tenant.clone(), Arc::new(secrets));
            }
        }
        let folder = folder.filter(|_| !self.bound.is_empty()).map(|(folder, plugin)| {
            Arc::new(Folder {
                path: folder.to_owned(),
                plugin: plugin.to_owned(),
                credentials: self,
                cache: Mutex::default(),
            }) as Arc<dyn SecretsFolder>
        });
        let folder_reads = Arc::new(Semaphore::new(MAX_FOLDER_READS));
        Ok(CredentialStore { default, tenants, folder, folder_reads })
    }
}

/// State of a secret's file, which differs after each replacement: device, inode, size, and the
/// time of the last change of the file or of its metadata.
type FileState = Option<(u64, u64, u64, i64, i64)>;

/// Returns the state of a file; none if it does not exist. A link to nowhere is an error, as its
/// secret is missing and not unknown.
fn state_of(file: &Path) -> Result<FileState, String> {
    let failed = |error: std::io::Error| format!("failed to read {}: {error}", file.display());
    let found = match std::fs::metadata(file) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound && file.symlink_metadata().is_err() => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    Ok(Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec())))
}

/// Secrets of a tenant, and the states of the files that they were read from.
type Cached = (Vec<FileState>, Option<Arc<Secrets>>);

/// Folder with secrets of tenants.
struct Folder {
    path: PathBuf,
    plugin: String,
    credentials: Credentials,
    cache: Mutex<HashMap<TenantId, Cached>>,
}

impl SecretsFolder for Folder {
    fn of(&self, tenant: &TenantId) -> Result<Option<Arc<Secrets>>, String> {
        // A folder that is not mounted says nothing about its secrets.
        if !self.path.is_dir() {
            return Err(format!("{} is no folder", self.path.display()));
        }
        let folder = self.path.join(tenant.as_str()).join(&self.plugin);
        let files = self.credentials.bound.iter().map(|bound| folder.join(&bound.name));
        let files: Vec<PathBuf> = files.collect();
        let states: Vec<FileState> =
            files.iter().map(|file| state_of(file)).collect::<Result<_, _>>()?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, secrets)) = cache.get(tenant)
            && *known == states
        {
            return Ok(secrets.clone());
        }
        let mut found = HashMap::new();
        for ((bound, file), state) in self.credentials.bound.iter().zip(&files).zip(&states) {
            if state.is_some() {
                let source = Source::File(file);
                let secret = source.read()?;
                warn(file, &bound.name, &source, &secret);
                found.insert(bound.name.clone(), secret);
            }
        }
        let secrets = match found.is_empty() {
            true => None,
            false => self.credentials.of(Some(tenant), &found)?.map(Arc::new),
        };
        if cache.len() >= MAX_CACHED_TENANTS {
            cache.clear();
        }
        cache.insert(tenant.clone(), (states, secrets.clone()));
        Ok(secrets)
    }
}

/// Checks that a credential has a host, and that no host would receive it over plain HTTP.
fn check_hosts(manifest: &Manifest, name: &str, urls: &[Url]) -> Result<(), String> {
    let given = manifest.credentials.get(name).map(|GivenCredential(given)| given);
    let from = given.and_then(|given| given.from.as_deref()).unwrap_or("env:NAME");
    let hosts = given.map_or(&[][..], |given| &given.hosts);
    if urls.is_empty() && hosts.is_empty() {
        return Err(format!(
            "has no host, as no setting is a URL; list the hosts that receive it: \
             {name} = {{ from = \"{from}\", hosts = [\"api.example.com\"] }}"
        ));
    }
    let plain = urls.iter().find(|url| url.scheme() == "http" && !is_loopback(url));
    match plain.filter(|_| !manifest.allow_plain_http) {
        Some(url) => Err(format!(
            "would be sent to {} over plain HTTP, where others can read it; use https, or write \
             `allow_plain_http = true` at the top of this file if that network is trusted",
            url.host_str().unwrap_or_default()
        )),
        None => Ok(()),
    }
}
