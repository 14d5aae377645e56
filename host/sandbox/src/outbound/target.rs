//! Where a request of a guest goes, read from its URL without trusting it.

use url::{Host, Url};

use crate::grants::parse_host;

/// Longest URL that is read, in bytes.
const MAX_URL_BYTES: usize = 8 << 10;

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// `https` rather than `http`.
    pub(super) is_tls: bool,
    /// As it is compared with grants and looked up.
    pub(super) host: Host,
    pub(super) port: u16,
    /// What the `host` header says.
    pub(super) authority: String,
    /// Path and query, as the request line has them.
    pub(super) path: String,
}

impl Target {
    /// Reads an absolute URL. Each host has one accepted spelling; whatever another reader could
    /// take for another host is refused rather than understood.
    ///
    /// # Errors
    /// One sentence that says what of the URL is wrong.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_URL_BYTES {
            return Err(format!(
                "url has {} bytes, of {MAX_URL_BYTES} at most",
                text.len()
            ));
        }
        // The parser would leave out or rewrite them, and mean another URL than what is logged.
        if let Some(odd) = text
            .chars()
            .find(|it| !it.is_ascii_graphic() || *it == '\\')
        {
            return Err(format!("url has {odd:?}: write it percent-encoded"));
        }
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let is_tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err("url is to start with http:// or https://".to_owned()),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err("url has a user: send an authorization header instead".to_owned());
        }
        // A colon inside the brackets of an IPv6 address is no port's.
        let host = match authority.rfind([':', ']']) {
            Some(end) if authority[end..].starts_with(':') => &authority[..end],
            _ => authority,
        };
        let host = parse_host(host).map_err(|reason| format!("url's host {reason}"))?;
        let url = Url::parse(text).map_err(|error| format!("url is none: {error}"))?;
        // Two readers, one meaning: otherwise what is granted is not what is asked for.
        let read = url.host_str().map(parse_host);
        if read != Some(Ok(host.clone())) {
            return Err("url's host can be read in two ways".to_owned());
        }
        let port = url.port_or_known_default().unwrap_or_default();
        if port == 0 {
            return Err("url has port 0".to_owned());
        }
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_string(),
        };
        let path = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        Ok(Self {
            is_tls,
            host,
            port,
            authority,
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn the_parts_are_read() {
        let target = Target::parse("HTTPS://Collector.Example.com/a/../b?c=d#e").unwrap();
        assert!(target.is_tls);
        assert_eq!(
            target.host,
            Host::Domain("collector.example.com".to_owned())
        );
        assert_eq!((target.port, &*target.path), (443, "/b?c=d"));
        assert_eq!(target.authority, "collector.example.com");
        let target = Target::parse("http://[::1]:8080").unwrap();
        assert_eq!((target.port, &*target.path), (8080, "/"));
        assert_eq!(target.authority, "[::1]:8080");
        let target = Target::parse("http://[::ffff:7f00:1]/").unwrap();
        assert_eq!(target.host.to_string(), "127.0.0.1");
        assert_eq!(target.authority, "127.0.0.1");
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for url in [
            "",
            "collector.example.com/",
            "//collector.example.com/",
            "file:///etc/passwd",
            "ftp://collector.example.com/",
            "http://",
            "http:///path",
            "http://user@collector.example.com/",
            "http://collector.example.com@127.0.0.1/",
            "http://collector.example.com:80@127.0.0.1/",
            "http://collector.example.com\\@127.0.0.1/",
            "http://127.0.0.1\\.collector.example.com/",
            "http://collector.example.com/\r\nhost: x",
            "http://collector.example.com/ HTTP/1.1",
            "http://coll\tector.example.com/",
            "http://collector.example.com:0/",
            "http://collector.example.com:99999/",
            "http://collector.example.com:80:80/",
            "http://collector.example.com./",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://%31%32%37.0.0.1/",
            "http://①②⑦.0.0.1/",
            "http://bücher.example/",
            "http://[fe80::1%25eth0]/",
            "http://[::1/",
        ] {
            let read = Target::parse(url);
            assert!(read.is_err(), "{url:?}: {read:?}");
        }
        let long = format!("http://a.example/{}", "a".repeat(MAX_URL_BYTES));
        assert!(Target::parse(&long).unwrap_err().contains("at most"));
    }
}
