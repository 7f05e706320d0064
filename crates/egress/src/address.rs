//! Classification of IP addresses before they are dialed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Class of an address; a later class needs a more explicit entry of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reach {
    /// On the public internet.
    Public,
    /// In the operator's network, or on this machine.
    Private,
    /// Link-local, cloud metadata, multicast or reserved: allowed only if the operator wrote the
    /// address itself.
    Restricted,
}

/// IPv4 metadata services outside the link-local range: Alibaba Cloud and Azure.
const METADATA_V4: [Ipv4Addr; 2] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];
/// IPv6 metadata services: AWS instance metadata, AWS EKS credentials and Google Cloud.
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
];

/// Returns the class of an address, by the IANA special-purpose address registries.
pub(crate) fn reach(address: IpAddr) -> Reach {
    match address {
        IpAddr::V4(address) => reach_v4(address),
        IpAddr::V6(address) => reach_v6(address),
    }
}

fn reach_v4(address: Ipv4Addr) -> Reach {
    let [first, second, third, _] = address.octets();
    if METADATA_V4.contains(&address)
        || address.is_link_local()
        || address.is_multicast()
        || first == 0
        || first >= 240
        || (first, second, third) == (192, 0, 0)
        || address.is_documentation()
    {
        Reach::Restricted
    } else if address.is_private()
        || address.is_loopback()
        // Carrier-grade NAT (100.64.0.0/10) and benchmark networks (198.18.0.0/15).
        || (first == 100 && (64..128).contains(&second))
        || (first == 198 && (18..20).contains(&second))
    {
        Reach::Private
    } else {
        Reach::Public
    }
}

fn reach_v6(address: Ipv6Addr) -> Reach {
    if let Some(inner) = embedded_v4(address) {
        return reach_v4(inner);
    }
    if address.is_loopback() {
        return Reach::Private;
    }
    if METADATA_V6.contains(&address)
        || address.is_unspecified()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || matches!(
            address.segments(),
            [0xfec0..=0xfeff, ..]
                | [0x2001, 0xdb8, ..]
                | [0x100, 0, 0, 0, ..]
                | [0x64, 0xff9b, 1, ..]
        )
    {
        Reach::Restricted
    } else if address.is_unique_local() {
        Reach::Private
    } else {
        Reach::Public
    }
}

/// Returns the IPv4 address that an IPv6 address embeds: mapped, compatible, NAT64 (RFC 6052) or
/// 6to4 (RFC 3056).
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => Some(v4(high, low)),
        [0, 0, 0, 0, 0, 0, high, low] if (high, low) > (0, 1) => Some(v4(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => Some(v4(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_classifies_every_notation_of_an_address() {
        for (class, addresses) in [
            (
                Reach::Public,
                vec!["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
            ),
            (
                Reach::Private,
                vec![
                    "127.0.0.1",
                    "127.8.9.1",
                    "10.0.0.1",
                    "172.16.0.1",
                    "172.31.255.255",
                    "192.168.1.1",
                    "100.64.0.1",
                    "::1",
                    "fd12::1",
                    "::ffff:127.0.0.1",
                    "::ffff:10.0.0.1",
                    "64:ff9b::7f00:1",
                    "2002:7f00:1::",
                ],
            ),
            (
                Reach::Restricted,
                vec![
                    "169.254.169.254",
                    "169.254.0.1",
                    "100.100.100.200",
                    "0.0.0.0",
                    "0.1.2.3",
                    "255.255.255.255",
                    "224.0.0.1",
                    "240.0.0.1",
                    "192.0.0.192",
                    "fe80::1",
                    "fd00:ec2::254",
                    "::",
                    "ff02::1",
                    "fec0::1",
                    "::ffff:169.254.169.254",
                    "64:ff9b::a9fe:a9fe",
                    "2002:a9fe:a9fe::",
                    "::a9fe:a9fe",
                    "::ffff:0.0.0.0",
                    "::ffff:0.0.0.1",
                    "64:ff9b:1::1",
                    "168.63.129.16",
                    "fd20:ce::254",
                    "fd00:ec2::23",
                ],
            ),
        ] {
            for address in addresses {
                assert_eq!(reach(address.parse().unwrap()), class, "{address}");
            }
        }
    }
}
