//! Allow-list of one plugin: the hosts that it may reach, and the address classes of each host.
//!
//! The way in which the operator wrote a host decides which addresses that host may resolve to. A
//! wildcard allows public addresses, a host name also private addresses, and a literal address
//! itself. So a name under a wildcard, which others may control, cannot lead into the network.

use std::net::{IpAddr, SocketAddr};

use url::{Host, Url};

use super::address::{Reach, reach};
use super::{TransportError, TransportErrorKind};

/// Error of an `allow` entry that cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("`{entry}` is not a valid `allow` entry; write `host`, `host:port` or `*.example.com`")]
pub struct InvalidAllow {
    entry: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    /// Host in normalized form.
    Host(Host<String>),
    /// All hosts below a domain, which is stored with a leading dot.
    Subdomains(String),
    /// All hosts, as long as their addresses are public.
    Public,
}

#[derive(Clone, Debug)]
struct Entry {
    pattern: Pattern,
    /// Port; if absent, 443. Plain HTTP also carries credentials, so the operator writes its port.
    port: Option<u16>,
    /// Scheme of the URL that the entry comes from, or https if the entry has no port; any scheme
    /// if absent.
    scheme: Option<String>,
    /// True if every port matches.
    has_any_port: bool,
}

/// Hosts that one plugin may reach.
#[derive(Clone, Debug)]
pub struct AllowList {
    /// Plugin file to edit to allow more hosts, for messages.
    file: String,
    entries: Vec<Entry>,
}

/// Host and port of an allowed URL.
#[derive(Clone, Debug)]
pub struct Target {
    /// Host in normalized form.
    pub host: Host<String>,
    /// Port, explicit or the scheme's default.
    pub port: u16,
    /// Highest address class that this host may resolve to.
    max_reach: Reach,
    file: String,
}

impl AllowList {
    /// Returns the allow-list of the hosts of `urls` and the entries of `allow`; fails on an entry
    /// that cannot be parsed.
    pub fn new(file: String, urls: &[Url], allow: &[String]) -> Result<Self, InvalidAllow> {
        let of_url = |url: &Url| {
            let host = url.host()?.to_owned();
            Some(Entry {
                pattern: Pattern::Host(host),
                port: url.port_or_known_default(),
                scheme: Some(url.scheme().to_owned()),
                has_any_port: false,
            })
        };
        let mut entries: Vec<Entry> = urls.iter().filter_map(of_url).collect();
        for entry in allow {
            entries.push(parse_entry(entry).ok_or_else(|| InvalidAllow { entry: entry.clone() })?);
        }
        Ok(Self { file, entries })
    }

    /// Returns the list for URLs of tenants: public addresses by HTTPS, and `hosts`, each `host` or
    /// `host:port`, also by plain HTTP and at private addresses.
    pub(crate) fn public(hosts: &[String]) -> Result<Self, InvalidAllow> {
        let all = Entry {
            pattern: Pattern::Public,
            port: None,
            scheme: Some("https".to_owned()),
            has_any_port: true,
        };
        let mut entries = vec![all];
        for host in hosts {
            let parsed =
                parse_entry(host).filter(|entry| matches!(entry.pattern, Pattern::Host(_)));
            let parsed = parsed.ok_or_else(|| InvalidAllow { entry: host.clone() })?;
            entries.push(Entry { has_any_port: parsed.port.is_none(), scheme: None, ..parsed });
        }
        Ok(Self { file: "webhook_allow_http".to_owned(), entries })
    }

    /// Checks a URL of a tenant, and its address if the host is one.
    pub(crate) fn check_url(&self, url: &Url) -> Result<(), TransportError> {
        let target = self.check(url)?;
        match &target.host {
            Host::Ipv4(address) => target.check_address(IpAddr::from(*address)),
            Host::Ipv6(address) => target.check_address(IpAddr::from(*address)),
            Host::Domain(_) => Ok(()),
        }
    }

    /// Returns the target of an allowed URL, or a [`TransportErrorKind::NotAllowed`] error.
    pub fn check(&self, url: &Url) -> Result<Target, TransportError> {
        let refused =
            |message: String| Err(TransportError::new(TransportErrorKind::NotAllowed, message));
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
            return refused("The URL has no host.".into());
        };
        let host = host.to_owned();
        // The most explicit entry decides, whatever the order.
        let max_reach = self
            .entries
            .iter()
            .filter(|entry| entry.has_any_port || entry.port.unwrap_or(443) == port)
            .filter(|entry| entry.scheme.as_ref().is_none_or(|scheme| scheme == url.scheme()))
            .filter_map(|entry| Some(entry.pattern.max_reach(&host)?.min(entry.max_reach())))
            .max();
        match max_reach {
            Some(max_reach) => Ok(Target { host, port, max_reach, file: self.file.clone() }),
            None => Err(TransportError::new(
                TransportErrorKind::NotAllowed,
                "The plugin asked for a host that the operator does not allow.",
            )
            .with_detail(format!(
                "The host {host}:{port} is not allowed; to allow it, add \"{host}:{port}\" to \
                 `allow` in {}.",
                self.file
            ))),
        }
    }

    /// Returns the operator's text for the first URL with a literal address that is not allowed.
    /// Such a URL can never be used, so loading the plugin fails early.
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

    /// Returns true if the host of this URL is on the list.
    pub fn covers(&self, url: &Url) -> bool {
        self.check(url).is_ok()
    }
}

/// Returns true if the host of a URL is this machine, by loopback address or `localhost` name.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

impl Entry {
    /// Returns the highest address class of this entry. An operator often copies a URL into the
    /// settings, so a restricted address needs an `allow` entry in addition.
    fn max_reach(&self) -> Reach {
        let is_unspecified = match &self.pattern {
            Pattern::Host(Host::Ipv4(address)) => address.is_unspecified(),
            Pattern::Host(Host::Ipv6(address)) => address.is_unspecified(),
            _ => false,
        };
        if self.scheme.is_some() && !is_unspecified { Reach::Private } else { Reach::Restricted }
    }
}

impl Pattern {
    /// Returns the highest address class of a host that matches this pattern.
    fn max_reach(&self, host: &Host<String>) -> Option<Reach> {
        match (self, host) {
            (Self::Host(known), host) if known == host => {
                Some(if matches!(host, Host::Domain(_)) {
                    Reach::Private
                } else {
                    Reach::Restricted
                })
            }
            (Self::Subdomains(suffix), Host::Domain(name))
                if name.len() > suffix.len() && name.ends_with(suffix) =>
            {
                Some(Reach::Public)
            }
            (Self::Public, _) => Some(Reach::Public),
            _ => None,
        }
    }
}

impl Target {
    /// Checks an address that the host resolves to; fails if the address class is not allowed.
    pub fn check_address(&self, address: IpAddr) -> Result<(), TransportError> {
        let found = reach(address);
        if found <= self.max_reach {
            return Ok(());
        }
        let (host, port, file) = (&self.host, self.port, &self.file);
        let message = match found {
            Reach::Private | Reach::Public => format!(
                "{host} resolves to the private address {address}, which a wildcard does not \
                 cover; to allow it, add \"{host}:{port}\" to `allow` in {file}."
            ),
            Reach::Restricted => format!(
                "{host} resolves to {address}, a link-local, metadata or reserved address; to \
                 allow it, add the address \"{}\" itself to `allow` in {file} and use it in the \
                 URL.",
                SocketAddr::new(address, port)
            ),
        };
        let public = "The provider's address is one that the operator does not allow.";
        Err(TransportError::new(TransportErrorKind::NotAllowed, public).with_detail(message))
    }
}

fn parse_entry(entry: &str) -> Option<Entry> {
    if let Some(domain) = entry.strip_prefix("*.") {
        let (domain, port) = split_port(domain)?;
        let Ok(Host::Domain(domain)) = Host::parse(domain) else { return None };
        return Some(Entry {
            pattern: Pattern::Subdomains(format!(".{domain}")),
            port,
            scheme: default_scheme(port),
            has_any_port: false,
        });
    }
    if entry.contains('*') {
        return None;
    }
    let unbracketed_v6 =
        entry.parse::<std::net::Ipv6Addr>().ok().map(|address| (format!("[{address}]"), None));
    let (host, port) = match unbracketed_v6 {
        Some(found) => found,
        None => split_port(entry).map(|(host, port)| (host.to_owned(), port))?,
    };
    Some(Entry {
        pattern: Pattern::Host(Host::parse(&host).ok()?),
        port,
        scheme: default_scheme(port),
        has_any_port: false,
    })
}

/// Returns https for an entry without a port, so that plain HTTP needs an explicit port.
fn default_scheme(port: Option<u16>) -> Option<String> {
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
    fn allow_list_covers_only_settings_urls_and_allow_entries() {
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
            "The host evil.net:443 is not allowed; to allow it, add \"evil.net:443\" to `allow` \
             in plugins/x.toml."
        );
    }

    #[test]
    fn allowed_address_class_depends_on_the_notation_of_the_host() {
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
    fn allow_list_rejects_invalid_entries() {
        for entry in
            ["", "https://x.example/", "a b", "*.", "*", "host:99999", "host:", "*.1.2.3.4"]
        {
            assert!(AllowList::new(String::new(), &[], &[entry.into()]).is_err(), "{entry}");
        }
    }

    #[test]
    fn urls_of_tenants_reach_public_addresses_by_https_and_what_the_operator_named() {
        let list = AllowList::public(&["10.0.0.5:8080".into(), "hooks.internal".into()]).unwrap();
        let check = |url: &str| list.check_url(&Url::parse(url).unwrap());
        for url in [
            "https://example.com/hook",
            "https://example.com:8443/hook",
            "https://93.184.216.34/",
            "http://10.0.0.5:8080/",
            "https://hooks.internal:444/",
            "http://hooks.internal/",
        ] {
            assert!(check(url).is_ok(), "{url}");
        }
        for url in [
            "http://example.com/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://169.254.169.254/latest",
            "https://10.0.0.6/",
            "http://10.0.0.5:8081/",
            "https://0x7f.1/",
            "ftp://example.com/",
            "https://user:password@example.com/",
        ] {
            assert!(check(url).is_err(), "{url}");
        }
        assert!(AllowList::public(&["*.example.com".into()]).is_err());
        // A name that resolves to an address inside is refused when it is dialed.
        let target = list.check(&Url::parse("https://example.com/").unwrap()).unwrap();
        assert!(target.check_address("127.0.0.1".parse().unwrap()).is_err());
        assert!(target.check_address("93.184.216.34".parse().unwrap()).is_ok());
    }
}
