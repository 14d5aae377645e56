//! Command bodies: a name of up to 255 bytes, then data that the name defines.

use bytes::{BufMut, Bytes, BytesMut};

use super::ProtocolError;

/// Longest `PING` context that is echoed; the protocol allows no more.
pub(super) const MAX_PING_CONTEXT_BYTES: usize = 16;

/// A command a client may send, as far as a server acts on it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    Ready(Metadata),
    Hello {
        username: Bytes,
        password: Bytes,
    },
    Initiate(Metadata),
    Error,
    Ping {
        ttl_deciseconds: u16,
        context: Bytes,
    },
    Pong,
    /// `SUBSCRIBE`, `CANCEL` and whatever later versions add.
    Other,
}

/// The properties of `READY` and `INITIATE` that a server reads.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) socket_type: Option<Bytes>,
    pub(super) identity: Bytes,
}

impl Command {
    pub(super) fn parse(body: Bytes) -> Result<Self, ProtocolError> {
        let mut rest = body;
        let name = take_short(&mut rest)?;
        Ok(match &name[..] {
            b"READY" => Self::Ready(Metadata::parse(rest)?),
            b"INITIATE" => Self::Initiate(Metadata::parse(rest)?),
            b"HELLO" => {
                let username = take_short(&mut rest)?;
                let password = take_short(&mut rest)?;
                if !rest.is_empty() {
                    return Err(ProtocolError::MalformedCommand);
                }
                Self::Hello { username, password }
            }
            b"ERROR" => Self::Error,
            b"PING" => {
                let ttl = take(&mut rest, 2)?;
                if rest.len() > MAX_PING_CONTEXT_BYTES {
                    return Err(ProtocolError::MalformedCommand);
                }
                Self::Ping {
                    ttl_deciseconds: u16::from_be_bytes([ttl[0], ttl[1]]),
                    context: rest,
                }
            }
            b"PONG" => Self::Pong,
            _ => Self::Other,
        })
    }
}

impl Metadata {
    pub(super) fn parse(mut rest: Bytes) -> Result<Self, ProtocolError> {
        let mut metadata = Self::default();
        while !rest.is_empty() {
            let name = take_short(&mut rest)?;
            let len = take(&mut rest, 4)?;
            let len = u32::from_be_bytes([len[0], len[1], len[2], len[3]]);
            let len = usize::try_from(len).map_err(|_| ProtocolError::MalformedCommand)?;
            let value = take(&mut rest, len)?;
            if name.eq_ignore_ascii_case(b"Socket-Type") {
                metadata.socket_type = Some(value);
            } else if name.eq_ignore_ascii_case(b"Identity") {
                metadata.identity = value;
            }
        }
        Ok(metadata)
    }
}

fn take(rest: &mut Bytes, len: usize) -> Result<Bytes, ProtocolError> {
    if rest.len() < len {
        return Err(ProtocolError::MalformedCommand);
    }
    Ok(rest.split_to(len))
}

fn take_short(rest: &mut Bytes) -> Result<Bytes, ProtocolError> {
    let len = take(rest, 1)?;
    take(rest, usize::from(len[0]))
}

/// A command body without data.
pub(super) fn bare(name: &str) -> BytesMut {
    let mut body = BytesMut::with_capacity(64);
    put_short(&mut body, name.as_bytes());
    body
}

/// `READY` of a ROUTER without an identity.
pub(super) fn ready() -> BytesMut {
    let mut body = bare("READY");
    put_short(&mut body, b"Socket-Type");
    body.put_u32(6);
    body.put_slice(b"ROUTER");
    body
}

/// `ERROR` with a reason, cut to 255 bytes.
pub(super) fn error(reason: &str) -> BytesMut {
    let mut body = bare("ERROR");
    put_short(&mut body, reason.as_bytes());
    body
}

/// `PING` without a context. The TTL is 0: the peer must not drop us for being
/// quiet, since we only ping when *it* is.
pub(super) fn ping() -> BytesMut {
    let mut body = bare("PING");
    body.put_u16(0);
    body
}

/// `PONG` with the context of the `PING` it answers.
pub(super) fn pong(context: &[u8]) -> BytesMut {
    let mut body = bare("PONG");
    body.put_slice(context);
    body
}

fn put_short(body: &mut BytesMut, text: &[u8]) {
    let text = &text[..text.len().min(255)];
    body.put_u8(text.len() as u8);
    body.put_slice(text);
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
    fn our_ready_reads_back_as_a_router() {
        let Command::Ready(metadata) = Command::parse(ready().freeze()).unwrap() else {
            panic!("not READY");
        };
        assert_eq!(metadata.socket_type.as_deref(), Some(&b"ROUTER"[..]));
    }

    #[test]
    fn property_names_are_matched_without_case() {
        let body = b"\x05READY\x0bsocket-TYPE\0\0\0\x06DEALER\x08identity\0\0\0\x02ab";
        assert_eq!(
            Command::parse(Bytes::from_static(body)).unwrap(),
            Command::Ready(Metadata {
                socket_type: Some(Bytes::from_static(b"DEALER")),
                identity: Bytes::from_static(b"ab"),
            })
        );
    }

    #[test]
    fn a_body_cut_anywhere_is_malformed_or_shorter_never_a_panic() {
        let whole = Bytes::from_static(b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER");
        for cut in 0..whole.len() {
            let parsed = Command::parse(whole.slice(..cut));
            // Cut right after the name, no property is left to be wrong.
            assert_eq!(parsed.is_ok(), cut == 6, "{cut}: {parsed:?}");
        }
    }

    #[test]
    fn a_ping_context_over_16_bytes_is_refused() {
        let mut body = ping();
        body.put_slice(&[7; 16]);
        assert!(Command::parse(body.clone().freeze()).is_ok());
        body.put_u8(7);
        assert_eq!(
            Command::parse(body.freeze()),
            Err(ProtocolError::MalformedCommand)
        );
    }
}
