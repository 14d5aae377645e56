//! `tcp://host:port` and `ipc:///path`, as ZeroMQ writes them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `tcp://host:port`
    Tcp {
        /// A name, an address without brackets, or `*` for all IPv4 addresses.
        host: String,
        /// 0 lets the system choose.
        port: u16,
    },
    /// `ipc:///path`
    Ipc(PathBuf),
}

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// The scheme is missing or is another one.
    #[error("endpoint `{0}` has no known scheme; write tcp://host:port or ipc:///path")]
    Scheme(String),
    /// No port, or none that fits 16 bits.
    #[error("endpoint `{0}` has no port from 0 to 65535; write tcp://host:port")]
    Port(String),
    /// The host is empty, or an IPv6 address without brackets.
    #[error(
        "endpoint `{0}` has no usable host; write a name, an IPv4 address, an IPv6 address in brackets, or *"
    )]
    Host(String),
    /// The path is empty, relative or abstract.
    #[error("endpoint `{0}` has no absolute path; write ipc:///path")]
    Path(String),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let whole = || text.to_owned();
        if let Some(path) = text.strip_prefix("ipc://") {
            if !path.starts_with('/') || path.len() == 1 || path.contains('\0') {
                return Err(EndpointError::Path(whole()));
            }
            return Ok(Self::Ipc(path.into()));
        }
        let rest = text
            .strip_prefix("tcp://")
            .ok_or_else(|| EndpointError::Scheme(whole()))?;
        let (host, port) = rest
            .rsplit_once(':')
            .ok_or_else(|| EndpointError::Port(whole()))?;
        // `parse` alone would take "+80".
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(EndpointError::Port(whole()));
        }
        let port = port.parse().map_err(|_| EndpointError::Port(whole()))?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) if v6.parse::<std::net::Ipv6Addr>().is_ok() => v6,
            None if !host.is_empty() && !host.contains([':', '[', ']', '/']) => host,
            _ => return Err(EndpointError::Host(whole())),
        };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
    use super::*;

    #[test]
    fn endpoints_read_and_write_as_zeromq_does() {
        for text in [
            "tcp://*:5555",
            "tcp://localhost:0",
            "tcp://10.0.0.1:65535",
            "tcp://[::1]:5555",
            "ipc:///run/stockade.sock",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        type E = EndpointError;
        for (text, error) in [
            ("localhost:1", E::Scheme as fn(String) -> E),
            ("udp://a:1", E::Scheme),
            ("tcp://a", E::Port),
            ("tcp://a:65536", E::Port),
            ("tcp://a:+80", E::Port),
            ("tcp://a:", E::Port),
            ("tcp://:1", E::Host),
            ("tcp://::1:1", E::Host),
            ("tcp://[a]:1", E::Host),
            ("ipc://relative", E::Path),
            ("ipc://@abstract", E::Path),
            ("ipc:///", E::Path),
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(error(text.to_owned())));
        }
    }
}
