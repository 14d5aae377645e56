//! A connection from a stranger: nothing panics, memory follows what arrived, and the pieces in
//! which bytes come change nothing.
#![no_main]

use std::sync::Arc;

use bytes::BufMut;
use libfuzzer_sys::fuzz_target;
use stockade_fuzz as _;
use stockade_transport::{
    Curve, Limits, Mechanism, Principal, ProtocolError,
    zmtp::{Authenticator, Event, Outbound, Session},
};

/// Small, so that short inputs reach them.
const LIMITS: Limits = Limits {
    max_frame_bytes: 128,
    max_message_bytes: 256,
    max_frames: 4,
    skip_factor: 2,
};

/// Two read buffers.
const ALLOWANCE: usize = 2 * (128 << 10);

struct Anybody;

impl Authenticator for Anybody {
    fn plain(&self, username: &[u8], _password: &[u8]) -> Option<Principal> {
        (username != b"nobody").then(|| Principal::new("somebody"))
    }

    fn curve(&self, _public_key: &[u8; 32]) -> Option<Principal> {
        Some(Principal::new("somebody"))
    }
}

fn events(
    mechanism: Mechanism,
    stream: &[u8],
    piece: usize,
) -> (Vec<Event>, Option<ProtocolError>) {
    let mut out = Outbound::default();
    let mut session = Session::accept(mechanism, LIMITS, &mut out);
    let mut events = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let mut space = session.decoder().space();
        let room = space.remaining_mut();
        assert!(room > 0, "no place for the next bytes");
        let count = room.min(piece).min(rest.len());
        space.put_slice(&rest[..count]);
        rest = &rest[count..];
        session.decoder().note_read(count, room);
        loop {
            match session.next(&mut out) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
            }
        }
        assert!(session.decoder().held_bytes() <= LIMITS.max_message_bytes + ALLOWANCE);
        assert!(out.queued_bytes() <= 4 * stream.len() + 1024);
    }
    (events, None)
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, stream)) = input.split_first() else {
        return;
    };
    let mechanism = || match choice & 3 {
        0 | 2 => Mechanism::Null,
        1 => Mechanism::Plain(Arc::new(Anybody)),
        _ => Mechanism::Curve(Arc::new(Curve::new([7; 32], Arc::new(Anybody)))),
    };
    let whole = events(mechanism(), stream, usize::MAX);
    let pieces = events(mechanism(), stream, 1 + usize::from(choice >> 1));
    assert_eq!(whole, pieces);
});
