//! The 64 bytes each side sends first.

use super::ProtocolError;

/// Bytes of a ZMTP 3 greeting.
pub(super) const GREETING_BYTES: usize = 64;

/// The fields of a peer's greeting that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    /// Minor version of the peer's ZMTP 3, or at least 1 for a later major.
    pub(super) minor: u8,
    /// Mechanism name, padded with zeros.
    pub(super) mechanism: [u8; 20],
    pub(super) as_server: bool,
}

impl Greeting {
    /// Reads a greeting, `None` while it is incomplete and still plausible.
    ///
    /// The signature is judged byte by byte, so that a peer of another protocol
    /// that then waits for an answer is refused at once.
    pub(super) fn parse(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        if input.first().is_some_and(|&byte| byte != 0xff)
            || input.get(9).is_some_and(|&byte| byte != 0x7f)
        {
            return Err(ProtocolError::NotZmtp);
        }
        // A ZMTP 1 peer sends no 64 bytes, so its version is judged when seen.
        if let Some(&major) = input.get(10)
            && major < 3
        {
            return Err(ProtocolError::UnsupportedVersion(major));
        }
        let Some(greeting) = input.first_chunk::<GREETING_BYTES>() else {
            return Ok(None);
        };
        let mut mechanism = [0; 20];
        mechanism.copy_from_slice(&greeting[12..32]);
        Ok(Some(Self {
            minor: if greeting[10] > 3 { 1 } else { greeting[11] },
            mechanism,
            as_server: greeting[32] & 1 == 1,
        }))
    }
}

/// The greeting this server sends for a mechanism.
pub(super) fn server_greeting(mechanism: [u8; 20], as_server: bool) -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[11] = 1;
    greeting[12..32].copy_from_slice(&mechanism);
    greeting[32] = u8::from(as_server);
    greeting
}

/// Pads a mechanism name to the 20 bytes of the greeting.
pub(super) const fn mechanism_name(name: &[u8]) -> [u8; 20] {
    let mut padded = [0; 20];
    let mut at = 0;
    while at < name.len() && at < padded.len() {
        padded[at] = name[at];
        at += 1;
    }
    padded
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
    fn our_own_greeting_parses_and_every_prefix_waits() {
        let greeting = server_greeting(mechanism_name(b"PLAIN"), true);
        for cut in 0..GREETING_BYTES {
            assert_eq!(Greeting::parse(&greeting[..cut]).unwrap(), None, "{cut}");
        }
        let parsed = Greeting::parse(&greeting).unwrap().unwrap();
        assert_eq!((parsed.minor, parsed.as_server), (1, true));
        assert_eq!(&parsed.mechanism[..6], b"PLAIN\0");
    }

    #[test]
    fn other_protocols_and_old_versions_are_refused_as_soon_as_seen() {
        assert_eq!(Greeting::parse(b"G"), Err(ProtocolError::NotZmtp));
        assert_eq!(
            Greeting::parse(&[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x20]),
            Err(ProtocolError::NotZmtp)
        );
        let mut old = server_greeting(mechanism_name(b"NULL"), false);
        old[10] = 1;
        assert_eq!(
            Greeting::parse(&old[..11]),
            Err(ProtocolError::UnsupportedVersion(1))
        );
    }

    #[test]
    fn a_later_major_version_is_served_as_3_1() {
        let mut later = server_greeting(mechanism_name(b"NULL"), false);
        (later[10], later[11]) = (4, 0);
        assert_eq!(Greeting::parse(&later).unwrap().unwrap().minor, 1);
    }
}
