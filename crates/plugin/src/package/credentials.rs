//! Credentials of a plugin: the source of each secret, its header, and the hosts that receive it.
//!
//! A secret is sent only to the hosts of the URLs in the plugin's settings, and to the hosts that
//! the operator lists with the credential. A credential that could not be sent anywhere is an
//! error at load, so that requests do not fail later without it.

use std::path::Path;

use batchwright_egress::{AllowList, Credential, Secrets, is_distinct, is_loopback};
use url::Url;

use crate::contract::types::Description;
use crate::error::LoadError;
use crate::package::manifest::{Manifest, Source};

/// Reads the secrets of a plugin, and binds each secret to its hosts.
///
/// With a `placeholder`, a secret that cannot be read is replaced. `key` makes an error of a key
/// and a message.
pub(crate) fn secrets(
    manifest: &Manifest,
    description: &Description,
    file: &Path,
    urls: &[Url],
    placeholder: Option<&str>,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<Secrets, LoadError> {
    let mut credentials = Vec::new();
    for (name, given) in &manifest.credentials {
        let at = format!("credentials.{name}");
        let Some(need) = description.credentials.iter().find(|need| need.name == *name) else {
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
            return Err(key(&at, message));
        };
        let Some(source) = Source::parse(&given.0.from) else { continue };
        let secret = match (source.read(), placeholder) {
            (Ok(secret), _) => secret,
            (Err(_), Some(placeholder)) => placeholder.to_owned(),
            (Err(message), None) => return Err(key(&at, message)),
        };
        if let Some(mode) = source.open_mode() {
            tracing::warn!(
                path = %file.display(),
                credential = name,
                mode = format_args!("{mode:03o}"),
                "secret file is readable by all users"
            );
        }
        if placeholder.is_none() && !is_distinct(&secret) {
            tracing::warn!(
                path = %file.display(),
                credential = name,
                "secret is short or made of words, not redacted in response bodies"
            );
        }
        let Ok(header) = http::HeaderName::try_from(need.header.as_str()) else { continue };
        let hosts = AllowList::new(file.display().to_string(), urls, &given.0.hosts)
            .map_err(|error| key(&at, error.to_string()))?;
        check_hosts(manifest, name, urls).map_err(|message| key(&at, message))?;
        credentials.push(Credential {
            name: name.clone(),
            header,
            prefix: need.prefix.clone(),
            secret,
            hosts,
        });
    }
    if let Some(need) = description
        .credentials
        .iter()
        .find(|need| need.required && !manifest.credentials.contains_key(&need.name))
    {
        let message = format!("is required; add `{} = \"env:NAME\"` to [credentials]", need.name);
        return Err(key(&format!("credentials.{}", need.name), message));
    }
    let headers = description
        .credentials
        .iter()
        .filter_map(|need| http::HeaderName::try_from(&need.header).ok());
    let secrets = Secrets::new(credentials, headers.collect(), manifest.allow_plain_http);
    secrets.map_err(|error| key("credentials", error.to_string()))
}

/// Checks that a credential has a host, and that no host would receive it over plain HTTP.
fn check_hosts(manifest: &Manifest, name: &str, urls: &[Url]) -> Result<(), String> {
    let given = manifest
        .credentials
        .get(name)
        .map(|given| (given.0.from.as_str(), given.0.hosts.as_slice()));
    let (from, hosts) = given.unwrap_or_default();
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
