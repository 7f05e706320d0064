//! Which hosts a plugin may reach, and how near their addresses may be.

use std::net::{IpAddr, SocketAddr};

use url::{Host, Url};

use super::address::{Reach, reach};
use super::{Fault, TransportError};

/// An entry of `allow` that is none.
#[derive(Debug, thiserror::Error)]
#[error("`{entry}` is no host to allow; write `host`, `host:port` or `*.example.com`")]
pub struct InvalidAllow {
    entry: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    /// A host that the operator wrote out, in normal form.
    Host(Host<String>),
    /// All hosts below a domain, which stands here with its leading dot.
    Below(String),
}

#[derive(Clone, Debug)]
struct Entry {
    pattern: Pattern,
    /// None is the default port of https: what goes unencrypted, credentials included, is written out.
    port: Option<u16>,
    /// The scheme of the URL that an entry comes from, https where no port is written; none allows both.
    scheme: Option<String>,
}

/// The hosts that one plugin may reach.
#[derive(Clone, Debug)]
pub struct AllowList {
    /// The file that would allow more, for messages.
    file: String,
    entries: Vec<Entry>,
}

/// Where an allowed URL leads.
#[derive(Clone, Debug)]
pub struct Target {
    pub host: Host<String>,
    pub port: u16,
    /// The nearest reach that this host's addresses may have.
    limit: Reach,
    file: String,
}

impl AllowList {
    /// The hosts of `urls`, and those that `allow` names.
    pub fn new(file: String, urls: &[Url], allow: &[String]) -> Result<Self, InvalidAllow> {
        let of_url = |url: &Url| {
            let host = url.host()?.to_owned();
            Some(Entry {
                pattern: Pattern::Host(host),
                port: url.port_or_known_default(),
                scheme: Some(url.scheme().to_owned()),
            })
        };
        let mut entries: Vec<Entry> = urls.iter().filter_map(of_url).collect();
        for entry in allow {
            entries.push(parse(entry).ok_or_else(|| InvalidAllow { entry: entry.clone() })?);
        }
        Ok(Self { file, entries })
    }

    /// Where this URL leads, or why it may not be followed.
    pub fn check(&self, url: &Url) -> Result<Target, TransportError> {
        let refused = |message: String| Err(TransportError::new(Fault::NotAllowed, message));
        if !matches!(url.scheme(), "http" | "https") {
            return refused(format!(
                "The scheme `{}` is not allowed; use http or https.",
                url.scheme()
            ));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return refused(
                "A URL must not hold a user name or a password; use [credentials].".into(),
            );
        }
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return refused("The URL names no host.".into());
        };
        let host = host.to_owned();
        // What is written out says more than what is matched, whichever stands first.
        let limit = self
            .entries
            .iter()
            .filter(|entry| entry.port.unwrap_or(443) == port)
            .filter(|entry| entry.scheme.as_ref().is_none_or(|scheme| scheme == url.scheme()))
            .filter_map(|entry| entry.pattern.limit(&host).map(|limit| limit.min(entry.nearest())))
            .max();
        match limit {
            Some(limit) => Ok(Target { host, port, limit, file: self.file.clone() }),
            None => Err(TransportError::new(
                Fault::NotAllowed,
                "The plugin asked for a host that the operator does not allow.",
            )
            .with_detail(format!(
                "The host {host}:{port} is not allowed; to allow it, add \"{host}:{port}\" to `allow` in {}.",
                self.file
            ))),
        }
    }

    /// Why one of these URLs could never be followed, as the address in it is one that has to be allowed by itself.
    pub fn check_addresses(&self, urls: &[Url]) -> Result<(), String> {
        urls.iter().try_for_each(|url| {
            let address = match url.host() {
                Some(Host::Ipv4(address)) => IpAddr::from(address),
                Some(Host::Ipv6(address)) => IpAddr::from(address),
                _ => return Ok(()),
            };
            let target = self.check(url).map_err(|error| error.detail().to_owned())?;
            target.check_address(address).map_err(|error| error.detail().to_owned())
        })
    }

    /// Whether this URL leads to one of the hosts.
    pub fn covers(&self, url: &Url) -> bool {
        self.check(url).is_ok()
    }
}

/// Whether a URL leads to this machine.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

impl Entry {
    /// How near this entry lets an address be: a URL of the settings is often copied, so what leads to a cloud's credentials has to be in
    /// `allow`, too.
    fn nearest(&self) -> Reach {
        let is_any = match &self.pattern {
            Pattern::Host(Host::Ipv4(address)) => address.is_unspecified(),
            Pattern::Host(Host::Ipv6(address)) => address.is_unspecified(),
            _ => false,
        };
        if self.scheme.is_some() && !is_any { Reach::Private } else { Reach::Restricted }
    }
}

impl Pattern {
    /// How near the addresses of this host may be, if it fits.
    fn limit(&self, host: &Host<String>) -> Option<Reach> {
        match (self, host) {
            (Self::Host(known), host) if known == host => {
                Some(if matches!(host, Host::Domain(_)) {
                    Reach::Private
                } else {
                    Reach::Restricted
                })
            }
            (Self::Below(suffix), Host::Domain(name))
                if name.len() > suffix.len() && name.ends_with(suffix) =>
            {
                Some(Reach::Public)
            }
            _ => None,
        }
    }
}

impl Target {
    /// Whether this address of the host may be dialled.
    pub fn check_address(&self, address: IpAddr) -> Result<(), TransportError> {
        let found = reach(address);
        if found <= self.limit {
            return Ok(());
        }
        let (host, port, file) = (&self.host, self.port, &self.file);
        let message = match found {
            Reach::Private | Reach::Public => format!(
                "{host} resolves to the private address {address}, which a wildcard does not cover; to allow it, add \"{host}:{port}\" to `allow` in {file}."
            ),
            Reach::Restricted => format!(
                "{host} resolves to {address}, a link-local, metadata or reserved address; to allow it, add the address \"{}\" itself to `allow` in {file} and use it in the URL.",
                SocketAddr::new(address, port)
            ),
        };
        let public = "The provider's address is one that the operator does not allow.";
        Err(TransportError::new(Fault::NotAllowed, public).with_detail(message))
    }
}

fn parse(entry: &str) -> Option<Entry> {
    if let Some(domain) = entry.strip_prefix("*.") {
        let (domain, port) = split_port(domain)?;
        let Ok(Host::Domain(domain)) = Host::parse(domain) else { return None };
        return Some(Entry {
            pattern: Pattern::Below(format!(".{domain}")),
            port,
            scheme: scheme(port),
        });
    }
    if entry.contains('*') {
        return None;
    }
    let bare_v6 =
        entry.parse::<std::net::Ipv6Addr>().ok().map(|address| (format!("[{address}]"), None));
    let (host, port) = match bare_v6 {
        Some(found) => found,
        None => split_port(entry).map(|(host, port)| (host.to_owned(), port))?,
    };
    Some(Entry { pattern: Pattern::Host(Host::parse(&host).ok()?), port, scheme: scheme(port) })
}

/// A host without a port means https on its own port: what goes unencrypted is written out.
fn scheme(port: Option<u16>) -> Option<String> {
    port.is_none().then(|| "https".into())
}

fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    match text.rsplit_once(':') {
        Some((host, port))
            if !host.ends_with(':') && (!host.contains(':') || host.ends_with(']')) =>
        {
            Some((host, Some(port.parse().ok()?)))
        }
        _ => Some((text, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(allow: &[&str]) -> AllowList {
        let urls = [
            Url::parse("http://models.internal:8000/v1").unwrap(),
            Url::parse("https://api.example.com").unwrap(),
        ];
        let allow: Vec<_> = allow.iter().map(|entry| (*entry).to_owned()).collect();
        AllowList::new("plugins/x.toml".into(), &urls, &allow).unwrap()
    }

    fn check(list: &AllowList, url: &str) -> Result<Target, String> {
        list.check(&Url::parse(url).unwrap()).map_err(|error| error.detail().to_owned())
    }

    #[test]
    fn only_hosts_of_the_settings_and_of_allow_are_reached() {
        let list =
            list(&["*.example.org", "other.example.net:8443", "10.1.2.3:80", "[::1]:80", "::1"]);
        for url in [
            "http://models.internal:8000/v1/x",
            "https://api.example.com/y",
            "https://a.b.example.org/",
            "https://other.example.net:8443/",
            "http://10.1.2.3/",
            "http://0xa.0x1.0x2.0x3/",
            "http://[::1]/",
        ] {
            assert!(check(&list, url).is_ok(), "{url}");
        }
        for url in [
            "http://models.internal/v1",
            "https://api.example.com:444/",
            "https://example.org/",
            "https://evil-example.org/",
            "https://other.example.net/",
            "http://10.1.2.3:81/",
            "https://api.example.com.evil.net/",
            "http://127.0.0.1/",
            "http://api.example.com:443/",
            "http://a.example.org/",
            "http://a.example.org:443/",
            "https://user@api.example.com/",
            "ftp://api.example.com/",
            "https://api.example.com@evil.net/",
        ] {
            assert!(check(&list, url).is_err(), "{url}");
        }
        let refusal = check(&list, "https://evil.net/").unwrap_err();
        assert_eq!(
            refusal,
            "The host evil.net:443 is not allowed; to allow it, add \"evil.net:443\" to `allow` in plugins/x.toml."
        );
    }

    #[test]
    fn how_near_an_address_may_be_depends_on_how_its_host_was_written() {
        let list = list(&["*.example.org", "169.254.169.254:80"]);
        let may = |url: &str, address: &str| {
            check(&list, url).unwrap().check_address(address.parse().unwrap()).is_ok()
        };
        assert!(may("http://models.internal:8000/", "10.0.0.7"));
        assert!(may("http://models.internal:8000/", "127.0.0.1"));
        assert!(!may("http://models.internal:8000/", "169.254.169.254"));
        assert!(may("https://a.example.org/", "8.8.8.8"));
        assert!(!may("https://a.example.org/", "10.0.0.7"));
        assert!(!may("https://a.example.org/", "::ffff:127.0.0.1"));
        assert!(may("http://169.254.169.254/", "169.254.169.254"));
        assert!(may("http://2852039166/", "169.254.169.254"));
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for entry in
            ["", "https://x.example/", "a b", "*.", "*", "host:99999", "host:", "*.1.2.3.4"]
        {
            assert!(AllowList::new(String::new(), &[], &[entry.into()]).is_err(), "{entry}");
        }
    }
}
