//! Credentials of a plugin: the source of each secret, its header, and the hosts that receive it.
//!
//! A secret is sent only to the hosts of the URLs in the plugin's settings, and to the hosts that
//! the operator lists with the credential. A credential that could not be sent anywhere is an
//! error at load, so that requests do not fail later without it.
//!
//! A project can have secrets of its own: those that it has set through the API, where the plugin's
//! file allows it; those in the folder of the setting `secrets`; and those in the plugin's file, in
//! this order. The first two are looked at before each exchange, so that a new secret takes effect
//! with the next request.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use batchwright_domain::ids::TenantId;
use batchwright_egress::{
    AllowList, Credential, CredentialStore, Secrets, SecretsSource, is_distinct, is_loopback,
};
use http::HeaderName;
use url::Url;

use crate::contract::types::{CredentialRequest, Description};
use crate::error::LoadError;
use crate::package::manifest::{CredentialTable, GivenCredential, Manifest, Source};
use crate::package::secrets_folder::Folder;

/// Number of tenants whose secrets are kept in memory.
pub(super) const MAX_CACHED_TENANTS: usize = 1000;

/// Secrets that projects have set for plugins.
#[async_trait]
pub trait ProjectSecrets: Send + Sync {
    /// Returns the secrets of a project for a plugin, by the name of the credential. The same value
    /// is returned until a secret changes. The error is for the operator.
    async fn of(
        &self,
        tenant: &TenantId,
        plugin: &str,
    ) -> Result<Arc<BTreeMap<String, String>>, String>;
}

/// Sources of secrets besides the plugin's file.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sources<'a> {
    /// Folder of secrets.
    pub folder: Option<&'a Path>,
    /// Secrets that projects have set.
    pub projects: Option<&'a Arc<dyn ProjectSecrets>>,
}

/// Credential that a component declares, bound to its hosts.
pub(super) struct Bound {
    pub(super) name: String,
    header: HeaderName,
    prefix: String,
    /// True if a tenant without the secret cannot use the plugin: the component requires it, or the
    /// plugin's file names the credential without a default.
    is_required: bool,
    /// True if projects may set the secret.
    from_projects: bool,
    hosts: Arc<AllowList>,
    /// Secret of tenants without their own.
    default: Option<String>,
    /// Own secrets of tenants.
    tenants: HashMap<TenantId, String>,
}

/// Credentials of a plugin.
pub(super) struct Credentials {
    pub(super) bound: Vec<Bound>,
    /// Headers that only credentials may set.
    reserved: Vec<HeaderName>,
    plain_http: bool,
}

/// Reads the secrets of a plugin, and binds each secret to its hosts.
///
/// With a `placeholder`, a secret that cannot be read is replaced. `plugin` is the name of the
/// plugin. `key` makes an error of a key and a message.
pub(crate) fn secrets(
    manifest: &Manifest,
    description: &Description,
    (file, plugin, sources): (&Path, &str, Sources<'_>),
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
        if given.is_some() || sources.folder.is_some() {
            if given.is_some_and(|given| given.from_projects)
                && sources.projects.is_none()
                && placeholder.is_none()
            {
                let message = "from_projects needs the setting credential_key, with which the \
                               secrets of projects are sealed";
                return Err(key(&key_of(need), message.into()));
            }
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
    credentials.into_store(plugin, sources).map_err(|message| key("credentials", message))
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
        from_projects: given.is_some_and(|given| given.from_projects),
        is_required: need.required || given.is_some_and(|given| given.from.is_none()),
        hosts: Arc::new(hosts),
        default,
        tenants,
    }))
}

/// Warns about a secret that others can read, or that is not redacted in bodies.
pub(super) fn warn(file: &Path, name: &str, source: &Source<'_>, secret: &str) {
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
    /// Returns the secrets of a tenant, given those of another source; none if a required one is
    /// missing.
    fn of(
        &self,
        tenant: Option<&TenantId>,
        other: &BTreeMap<String, String>,
    ) -> Result<Option<Secrets>, String> {
        let (mut credentials, mut is_own) = (Vec::new(), false);
        for bound in &self.bound {
            let own = tenant.and_then(|tenant| bound.tenants.get(tenant));
            let own = other.get(&bound.name).or(own);
            is_own |= own.is_some();
            match own.or(bound.default.as_ref()) {
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
        let secrets = secrets.map_err(|error| error.to_string())?;
        Ok(Some(if is_own { secrets.own() } else { secrets }))
    }

    /// Returns the secrets of a tenant, given those of a source; none if the source has none.
    pub(super) fn of_source(
        &self,
        tenant: &TenantId,
        found: &BTreeMap<String, String>,
    ) -> Result<Option<Arc<Secrets>>, String> {
        if found.is_empty() {
            return Ok(None);
        }
        Ok(self.of(Some(tenant), found)?.map(Arc::new))
    }

    fn into_store(self, plugin: &str, sources: Sources<'_>) -> Result<CredentialStore, String> {
        let none = BTreeMap::new();
        let default = self.of(None, &none)?.map(Arc::new);
        let names: BTreeSet<&TenantId> =
            self.bound.iter().flat_map(|bound| bound.tenants.keys()).collect();
        let mut tenants = HashMap::new();
        for tenant in names {
            if let Some(secrets) = self.of(Some(tenant), &none)? {
                tenants.insert(tenant.clone(), Arc::new(secrets));
            }
        }
        let has_secrets = !self.bound.is_empty();
        let of_projects = self.bound.iter().any(|bound| bound.from_projects);
        let credentials = Arc::new(self);
        let mut found: Vec<Arc<dyn SecretsSource>> = Vec::new();
        if let Some(source) = sources.projects.filter(|_| of_projects) {
            found.push(Arc::new(OfProjects {
                plugin: plugin.to_owned(),
                source: source.clone(),
                credentials: credentials.clone(),
                cache: Mutex::default(),
            }));
        }
        if let Some(folder) = sources.folder.filter(|_| has_secrets) {
            found.push(Folder::new(folder, plugin, credentials));
        }
        Ok(CredentialStore { default, tenants, sources: found })
    }
}

/// Secrets that projects have set, and what was made of them.
type OfProject = (Arc<BTreeMap<String, String>>, Option<Arc<Secrets>>);

/// Secrets that projects have set for one plugin.
struct OfProjects {
    plugin: String,
    source: Arc<dyn ProjectSecrets>,
    credentials: Arc<Credentials>,
    cache: Mutex<HashMap<TenantId, OfProject>>,
}

#[async_trait]
impl SecretsSource for OfProjects {
    async fn of(&self, tenant: &TenantId) -> Result<Option<Arc<Secrets>>, String> {
        let found = self.source.of(tenant, &self.plugin).await?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, secrets)) = cache.get(tenant)
            && Arc::ptr_eq(known, &found)
        {
            return Ok(secrets.clone());
        }
        let allowed = self.credentials.bound.iter().filter(|bound| bound.from_projects);
        let own: BTreeMap<String, String> = allowed
            .filter_map(|bound| Some((bound.name.clone(), found.get(&bound.name)?.clone())))
            .collect();
        let secrets = self.credentials.of_source(tenant, &own)?;
        if cache.len() >= MAX_CACHED_TENANTS {
            cache.clear();
        }
        cache.insert(tenant.clone(), (found, secrets.clone()));
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
