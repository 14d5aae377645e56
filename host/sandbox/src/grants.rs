//! What a plugin may reach outside itself: nothing, except what its manifest names and the
//! server's configuration leaves.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use url::Host;

/// What may be done in a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reading.
    #[default]
    ReadOnly,
    /// Reading, and writing within `limits.directory_mib` and `limits.open_files`.
    ReadWrite,
}

/// A directory of the server's machine that a plugin gets under a name of its own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Where it is, as an absolute path.
    pub host: PathBuf,
    /// What may be done in it.
    #[serde(default)]
    pub access: Access,
}

/// Directories by the name the guest knows them under.
pub type Directories = BTreeMap<String, Directory>;

/// Checks the names and paths.
pub(crate) fn check_directories(directories: &Directories) -> Result<(), String> {
    const MAX_DIRECTORIES: usize = 16;
    if directories.len() > MAX_DIRECTORIES {
        return Err(format!(
            "directories has {} entries: give at most {MAX_DIRECTORIES}",
            directories.len()
        ));
    }
    for (guest, directory) in directories {
        if guest.is_empty() || guest.contains('\0') {
            return Err(format!(
                "directories.{guest:?} is no name: give the path that the plugin shall see, such as \"/data\""
            ));
        }
        if !directory.host.is_absolute() {
            return Err(format!(
                "directories.{guest:?}.host is {:?}: give an absolute path",
                directory.host
            ));
        }
    }
    Ok(())
}

/// Methods that a grant can name: those that make no tunnel and echo no request.
const HTTP_METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// A host that a plugin may send HTTP requests to, at one port: an entry of `[[http]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpGrant {
    /// A host name or an IP address; no pattern. A name is not granted the addresses that only
    /// this machine or its own link knows, except `localhost`; an address is what it is.
    pub host: String,
    /// The port.
    pub port: u16,
    /// What it may ask for there.
    #[serde(default = "only_get")]
    pub methods: Vec<String>,
}

fn only_get() -> Vec<String> {
    vec!["GET".to_owned()]
}

impl HttpGrant {
    /// The host as it is compared: names in small letters, addresses in one form.
    ///
    /// # Errors
    /// One sentence: why it is no host that can be granted.
    pub(crate) fn parsed_host(&self) -> Result<Host, String> {
        parse_host(&self.host)
    }
}

impl fmt::Display for HttpGrant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let methods = self.methods.join(" ");
        match self.parsed_host() {
            Ok(host) => write!(formatter, "{methods} {host}:{}", self.port),
            Err(_) => write!(formatter, "{methods} {:?}:{}", self.host, self.port),
        }
    }
}

/// Reads a host in its one accepted spelling, so that nobody has to know how many ways there are
/// to write 127.0.0.1.
pub(crate) fn parse_host(text: &str) -> Result<Host, String> {
    let bare = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if let Ok(address) = bare.unwrap_or(text).parse::<Ipv6Addr>() {
        return Ok(match address.to_ipv4_mapped() {
            Some(address) => Host::Ipv4(address),
            None => Host::Ipv6(address),
        });
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_plain) {
        return Err(format!(
            "{text:?} is no host: give a name in its ASCII form or an IP address, without patterns, scheme or port"
        ));
    }
    let host = Host::parse(text).map_err(|error| format!("{text:?} is no host: {error}"))?;
    let canonical = host.to_string();
    if !canonical.eq_ignore_ascii_case(text) || text.ends_with('.') {
        let canonical = canonical.trim_end_matches('.');
        return Err(format!("{text:?} is no host: write it as {canonical:?}"));
    }
    Ok(host)
}

/// Checks the hosts, ports and methods.
pub(crate) fn check_http(grants: &[HttpGrant]) -> Result<(), String> {
    const MAX_GRANTS: usize = 64;
    if grants.len() > MAX_GRANTS {
        return Err(format!(
            "http has {} entries: give at most {MAX_GRANTS}",
            grants.len()
        ));
    }
    for (number, grant) in grants.iter().enumerate() {
        let host = grant
            .parsed_host()
            .map_err(|reason| format!("http[{number}].host {reason}"))?;
        let address: Option<IpAddr> = match host {
            Host::Domain(_) => None,
            Host::Ipv4(address) => Some(address.into()),
            Host::Ipv6(address) => Some(address.into()),
        };
        let is_nobodys = address.is_some_and(|it| {
            it.is_unspecified()
                || it.is_multicast()
                || matches!(it, IpAddr::V4(address) if address.is_broadcast())
        });
        if is_nobodys {
            return Err(format!(
                "http[{number}].host {:?} is no address of one host",
                grant.host
            ));
        }
        if grant.port == 0 {
            return Err(format!("http[{number}].port is 0: give 1 to 65535"));
        }
        let unknown = |method: &&String| !HTTP_METHODS.contains(&method.as_str());
        if let Some(method) = grant.methods.iter().find(unknown) {
            return Err(format!(
                "http[{number}].methods has {method:?}: give of {}",
                HTTP_METHODS.join(", ")
            ));
        }
    }
    Ok(())
}

/// What `allowed` leaves of `asked`: the same hosts and ports, and of their methods those that
/// both name.
pub(crate) fn narrow_http(asked: &[HttpGrant], allowed: &[HttpGrant]) -> Vec<HttpGrant> {
    let is_same = |one: &HttpGrant, other: &HttpGrant| {
        one.port == other.port
            && one
                .parsed_host()
                .is_ok_and(|host| other.parsed_host() == Ok(host))
    };
    let mut left: Vec<HttpGrant> = asked.to_vec();
    for grant in &mut left {
        let allowed: Vec<&String> = allowed
            .iter()
            .filter(|it| is_same(it, grant))
            .flat_map(|it| &it.methods)
            .collect();
        grant.methods.retain(|method| allowed.contains(&method));
    }
    left.retain(|grant| !grant.methods.is_empty());
    left
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn grant(host: &str, methods: &[&str]) -> HttpGrant {
        HttpGrant {
            host: host.to_owned(),
            port: 443,
            methods: methods.iter().map(|&it| it.to_owned()).collect(),
        }
    }

    #[test]
    fn a_host_has_one_spelling() {
        let host = |text: &str| parse_host(text).unwrap().to_string();
        assert_eq!(host("Collector.Example.COM"), "collector.example.com");
        assert_eq!(host("_dmarc.example.com"), "_dmarc.example.com");
        assert_eq!(host("127.0.0.1"), "127.0.0.1");
        assert_eq!(host("[::1]"), "[::1]");
        assert_eq!(host("0:0:0:0:0:0:0:1"), "[::1]");
        assert_eq!(host("::ffff:127.0.0.1"), "127.0.0.1");
        for wrong in [
            "",
            "*",
            "*.example.com",
            "example.com.",
            "http://example.com",
            "example.com:443",
            "user@example.com",
            "ex ample.com",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "2130706433",
            "127.1",
            "127.0.0.1.",
            "bücher.example",
            "fe80::1%eth0",
            "[::1",
        ] {
            let refused = parse_host(wrong);
            assert!(refused.is_err(), "{wrong} is {refused:?}");
        }
        assert!(parse_host("0x7f.1").unwrap_err().contains("127.0.0.1"));
    }

    #[test]
    fn what_cannot_be_granted_is_named() {
        assert_eq!(
            check_http(&[grant("collector.example.com", &["GET"])]),
            Ok(())
        );
        assert_eq!(check_http(&[grant("169.254.169.254", &["GET"])]), Ok(()));
        for (grant, named) in [
            (grant("*", &["GET"]), "http[0].host"),
            (grant("0.0.0.0", &["GET"]), "no address of one host"),
            (grant("::", &["GET"]), "no address of one host"),
            (grant("224.0.0.1", &["GET"]), "no address of one host"),
            (grant("255.255.255.255", &["GET"]), "no address of one host"),
            (grant("a.example", &["CONNECT"]), "CONNECT"),
            (grant("a.example", &["get"]), "http[0].methods"),
            (
                HttpGrant {
                    port: 0,
                    ..grant("a.example", &[])
                },
                "http[0].port",
            ),
        ] {
            let reason = check_http(&[grant]).unwrap_err();
            assert!(reason.contains(named), "{reason}");
        }
        let many = vec![grant("a.example", &["GET"]); 65];
        assert!(check_http(&many).unwrap_err().contains("at most 64"));
    }

    #[test]
    fn narrowing_leaves_what_both_name() {
        let asked = [
            grant("a.example", &["GET", "POST"]),
            grant("b.example", &["GET"]),
            grant("127.0.0.1", &["GET"]),
        ];
        let allowed = [
            grant("A.example", &["POST", "PUT"]),
            grant("c.example", &["GET"]),
            grant("::ffff:127.0.0.1", &["GET"]),
        ];
        let left = narrow_http(&asked, &allowed);
        assert_eq!(
            left,
            [grant("a.example", &["POST"]), grant("127.0.0.1", &["GET"])]
        );
        assert_eq!(narrow_http(&asked, &[]), []);
        let elsewhere = HttpGrant {
            port: 80,
            ..grant("b.example", &["GET"])
        };
        assert_eq!(narrow_http(&asked, &[elsewhere]), []);
    }
}
