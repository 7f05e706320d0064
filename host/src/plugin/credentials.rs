//! The credentials of a plugin's TOML file: where each secret is read, which header it goes into, and which hosts get it.

use std::path::Path;

use url::Url;

use super::error::LoadError;
use super::manifest::{Manifest, Source};
use super::types::Description;
use crate::egress::{AllowList, Credential, Secrets, is_distinct, is_loopback};

/// The secrets of a plugin, each with the hosts it belongs to: those of the URLs in its settings, and those written beside it.
pub fn secrets(
    manifest: &Manifest,
    description: &Description,
    file: &Path,
    urls: &[Url],
    stand_in: Option<&str>,
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
                format!("the component knows no such credential; it has {}", known.join(", "))
            };
            return Err(key(&at, message));
        };
        let Some(source) = Source::parse(&given.from) else { continue };
        let secret = match (source.read(), stand_in) {
            (Ok(secret), _) => secret,
            (Err(_), Some(stand_in)) => stand_in.to_owned(),
            (Err(message), None) => return Err(key(&at, message)),
        };
        if let Some(mode) = source.open_mode() {
            tracing::warn!(file = %file.display(), credential = name, mode = format_args!("{mode:03o}"), "every user of this machine may read the file of the secret");
        }
        if stand_in.is_none() && !is_distinct(&secret) {
            tracing::warn!(
                file = %file.display(),
                credential = name,
                "the secret is short or made of words: it is redacted in errors and headers, but not in answers, which may have it for other reasons"
            );
        }
        let Ok(header) = http::HeaderName::try_from(need.header.as_str()) else { continue };
        let hosts = AllowList::new(file.display().to_string(), urls, &given.hosts)
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

/// Whether a credential can be sent at all: one that cannot is not left out without a word.
fn check_hosts(manifest: &Manifest, name: &str, urls: &[Url]) -> Result<(), String> {
    let given =
        manifest.credentials.get(name).map(|given| (given.from.as_str(), given.hosts.as_slice()));
    let (from, hosts) = given.unwrap_or_default();
    if urls.is_empty() && hosts.is_empty() {
        return Err(format!(
            "belongs to no host, as no setting is a URL; name the hosts that get it: {name} = {{ from = \"{from}\", hosts = [\"api.example.com\"] }}"
        ));
    }
    let plain = urls.iter().find(|url| url.scheme() == "http" && !is_loopback(url));
    match plain.filter(|_| !manifest.allow_plain_http) {
        Some(url) => Err(format!(
            "would be sent to {} over plain HTTP, where others can read it; use https, or write `allow_plain_http = true` at the top of this file if that network is trusted",
            url.host_str().unwrap_or_default()
        )),
        None => Ok(()),
    }
}
