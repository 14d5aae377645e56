//! Which addresses a host name may lead to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses outside the link-local ranges at which clouds serve an instance's credentials.
const METADATA_V4: [Ipv4Addr; 3] = [
    // Alibaba Cloud, Azure, Oracle Cloud.
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
const METADATA_V6: [Ipv6Addr; 2] = [
    // AWS, Google Cloud.
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
];

/// What kind of address this is, if a name that was granted must not lead to it; `None` if it may.
///
/// An IPv6 address that stands for one of IPv4 is judged as that one, since a gateway or the
/// kernel would send the packets there.
pub(super) fn forbidden(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => forbidden_v4(address),
        IpAddr::V6(address) => match embedded(address) {
            Some(address) => forbidden_v4(address),
            None => forbidden_v6(address),
        },
    }
}

fn forbidden_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [first, ..] = address.octets();
    if METADATA_V4.contains(&address) {
        return Some("an address of a cloud's metadata service");
    }
    match first {
        0 => Some("an unspecified address"),
        127 => Some("a loopback address"),
        224..=239 => Some("a multicast address"),
        // With broadcast; no host has one of these.
        240.. => Some("a reserved address"),
        _ if address.is_link_local() => Some("a link-local address"),
        _ => None,
    }
}

fn forbidden_v6(address: Ipv6Addr) -> Option<&'static str> {
    let [first, ..] = address.segments();
    if METADATA_V6.contains(&address) {
        return Some("an address of a cloud's metadata service");
    }
    if address.is_unspecified() {
        Some("an unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else if address.is_unicast_link_local() || first & 0xffc0 == 0xfec0 {
        // The latter are site-local, which is how link-local was meant for a site.
        Some("a link-local address")
    } else {
        None
    }
}

/// The IPv4 address that an IPv6 one stands for: mapped and compatible ones, NAT64 (RFC 6052 and
/// 8215) and 6to4.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => Some(v4(high, low)),
        // Not `::` and `::1`, which are addresses of IPv6.
        [0, 0, 0, 0, 0, 0, high, low] if (high, low) > (0, 1) => Some(v4(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(v4(high, low)),
        [0x64, 0xff9b, 1, _, _, _, high, low] => Some(v4(high, low)),
        [0x2002, high, low, ..] => Some(v4(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn what_only_this_machine_or_link_knows_is_forbidden() {
        for (address, kind) in [
            ("127.0.0.1", "loopback"),
            ("127.255.255.254", "loopback"),
            ("0.0.0.0", "unspecified"),
            ("0.1.2.3", "unspecified"),
            ("169.254.0.1", "link-local"),
            ("169.254.169.254", "link-local"),
            ("100.100.100.200", "metadata"),
            ("168.63.129.16", "metadata"),
            ("192.0.0.192", "metadata"),
            ("224.0.0.1", "multicast"),
            ("239.255.255.255", "multicast"),
            ("240.0.0.1", "reserved"),
            ("255.255.255.255", "reserved"),
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("fe80::1", "link-local"),
            ("febf::1", "link-local"),
            ("fec0::1", "link-local"),
            ("ff02::1", "multicast"),
            ("fd00:ec2::254", "metadata"),
            ("fd20:ce::254", "metadata"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::ffff:169.254.169.254", "link-local"),
            ("::127.0.0.1", "loopback"),
            ("::2", "unspecified"),
            ("64:ff9b::7f00:1", "loopback"),
            ("64:ff9b:1::a9fe:a9fe", "link-local"),
            ("2002:7f00:1::1", "loopback"),
            ("2002:a9fe:a9fe::", "link-local"),
        ] {
            let found = forbidden(address.parse().unwrap());
            assert!(
                found.is_some_and(|it| it.contains(kind)),
                "{address}: {found:?}"
            );
        }
    }

    #[test]
    fn hosts_of_networks_public_and_private_are_allowed() {
        for address in [
            "1.1.1.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.253.255.255",
            "169.255.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "fd00::1",
            "64:ff9b::101:101",
            "2002:101:101::1",
            "::ffff:10.0.0.1",
        ] {
            assert_eq!(forbidden(address.parse().unwrap()), None, "{address}");
        }
    }
}
