//! Frame headers: one flags byte, then a length of one or eight bytes.

use bytes::{BufMut, BytesMut};

use super::ProtocolError;

/// More frames of the same message follow.
const MORE: u8 = 0b001;
/// The length takes eight bytes.
const LONG: u8 = 0b010;
/// The frame is a command.
const COMMAND: u8 = 0b100;

/// A parsed frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) more: bool,
    pub(super) command: bool,
    /// Payload bytes announced.
    pub(super) len: u64,
    /// Bytes the header itself takes.
    pub(super) size: usize,
}

impl Header {
    /// Reads the header at the start of `input`, or `None` while it is incomplete.
    pub(super) fn parse(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let Some((&flags, rest)) = input.split_first() else {
            return Ok(None);
        };
        let command = flags & COMMAND != 0;
        let more = flags & MORE != 0;
        if flags & !(MORE | LONG | COMMAND) != 0 || (command && more) {
            return Err(ProtocolError::FrameFlags);
        }
        let (len, size) = if flags & LONG != 0 {
            match rest.first_chunk::<8>() {
                Some(bytes) => (u64::from_be_bytes(*bytes), 9),
                None => return Ok(None),
            }
        } else {
            match rest.first() {
                Some(&len) => (u64::from(len), 2),
                None => return Ok(None),
            }
        };
        Ok(Some(Self {
            more,
            command,
            len,
            size,
        }))
    }

    /// Writes a header for a payload of `len` bytes.
    pub(super) fn put(out: &mut BytesMut, command: bool, more: bool, len: usize) {
        let flags = if command { COMMAND } else { 0 } | if more { MORE } else { 0 };
        match u8::try_from(len) {
            Ok(short) => {
                out.put_u8(flags);
                out.put_u8(short);
            }
            Err(_) => {
                out.put_u8(flags | LONG);
                out.put_u64(len as u64);
            }
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

    #[track_caller]
    fn check(len: usize, encoded: &[u8]) {
        let mut out = BytesMut::new();
        Header::put(&mut out, false, true, len);
        assert_eq!(&out[..], encoded);
        let header = Header::parse(&out).unwrap().unwrap();
        assert_eq!((header.len, header.size), (len as u64, encoded.len()));
        assert!(header.more && !header.command);
        for cut in 0..encoded.len() {
            assert_eq!(Header::parse(&out[..cut]).unwrap(), None);
        }
    }

    #[test]
    fn the_length_takes_eight_bytes_from_256_on() {
        check(0, &[1, 0]);
        check(255, &[1, 255]);
        check(256, &[3, 0, 0, 0, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn reserved_flags_and_continued_commands_are_refused() {
        for flags in [0x08, 0x80, 0xff, COMMAND | MORE, COMMAND | MORE | LONG] {
            assert_eq!(Header::parse(&[flags]), Err(ProtocolError::FrameFlags));
        }
    }
}
