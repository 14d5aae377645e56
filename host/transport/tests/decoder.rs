//! Properties of the protocol layer, which does no I/O.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::io::IoSlice;
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use crypto_box::{Nonce, SalsaBox, SecretKey, aead::Aead as _};
use proptest::collection::vec;
use proptest::prelude::*;
use stockade_transport::zmtp::{Decoder, Event, Item, Outbound, Session};
use stockade_transport::{
    Authenticator, Curve, Limits, Mechanism, Message, Principal, ProtocolError,
};

const LIMITS: Limits = Limits {
    max_frame_bytes: 150_000,
    max_message_bytes: 200_000,
    max_frames: 4,
    skip_factor: 4,
};

/// Two read buffers, and the factor by which a large frame's buffer runs ahead.
const ALLOWANCE: usize = 2 * (128 << 10);

/// Feeds `stream` in pieces of the given sizes, cycled, and checks memory on the way.
fn decode(
    limits: Limits,
    stream: &[u8],
    pieces: &[usize],
) -> Result<(Vec<Item>, Decoder), ProtocolError> {
    let mut decoder = Decoder::new(limits);
    let mut items = Vec::new();
    let mut rest = stream;
    let mut pieces = pieces.iter().cycle();
    while !rest.is_empty() {
        let mut space = decoder.space();
        let room = space.remaining_mut();
        assert!(room > 0, "no place for the next bytes");
        let piece = pieces.next().copied().unwrap_or(room).max(1);
        let count = room.min(piece).min(rest.len());
        space.put_slice(&rest[..count]);
        rest = &rest[count..];
        decoder.note_read(count, room);
        while let Some(item) = decoder.next()? {
            items.push(item);
        }
        assert!(
            decoder.held_bytes() <= limits.max_message_bytes + ALLOWANCE,
            "{} bytes held",
            decoder.held_bytes()
        );
    }
    Ok((items, decoder))
}

fn encode(messages: &[Vec<Vec<u8>>]) -> Vec<u8> {
    let mut out = Outbound::default();
    for frames in messages {
        out.push_message(frames.iter().map(|frame| Bytes::copy_from_slice(frame)));
    }
    let mut stream = Vec::new();
    while !out.is_empty() {
        let mut chunks = [IoSlice::new(&[]); 4];
        let used = out.chunks(&mut chunks);
        let before = stream.len();
        for chunk in &chunks[..used] {
            stream.extend_from_slice(chunk);
        }
        out.advance(stream.len() - before);
    }
    stream
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => vec(any::<u8>(), 0..40),
        2 => vec(any::<u8>(), 250..260),
        1 => (60_000..140_000_usize).prop_map(|len| vec![7; len]),
    ]
}

/// Messages within the limits and over each of them.
fn messages() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
    vec(vec(payload(), 1..7), 1..6)
}

fn expected(frames: &[Vec<u8>]) -> Item {
    let mut before: Vec<Bytes> = Vec::new();
    let mut total = 0;
    for frame in frames {
        total += frame.len();
        let over_bytes = frame.len() > LIMITS.max_frame_bytes || total > LIMITS.max_message_bytes;
        if over_bytes || before.len() == LIMITS.max_frames {
            let limit = if frame.len() > LIMITS.max_frame_bytes {
                stockade_transport::Limit::FrameBytes
            } else if over_bytes {
                stockade_transport::Limit::MessageBytes
            } else {
                stockade_transport::Limit::Frames
            };
            return Item::Message(Message::TooLarge {
                frames_before: before,
                announced: total as u64,
                limit,
            });
        }
        before.push(Bytes::copy_from_slice(frame));
    }
    Item::Message(Message::Frames(before))
}

struct AnyPassword;

impl Authenticator for AnyPassword {
    fn plain(&self, _: &[u8], _: &[u8]) -> Option<Principal> {
        Some(Principal::new("anyone"))
    }

    fn curve(&self, _: &[u8; 32]) -> Option<Principal> {
        Some(Principal::new("anyone"))
    }
}

/// What a session makes of a stream, up to its end or the first error.
fn events(session: &mut Session, stream: &[u8], out: &mut Outbound) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let mut space = session.decoder().space();
        let count = space.remaining_mut().min(rest.len());
        space.put_slice(&rest[..count]);
        rest = &rest[count..];
        loop {
            match session.next(out) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(_) => return events,
            }
        }
    }
    events
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_split_of_the_stream_gives_the_same_messages(
        messages in messages(),
        pieces in vec(prop_oneof![1..20_usize, 1000..100_000_usize], 1..20),
    ) {
        let (items, decoder) = decode(LIMITS, &encode(&messages), &pieces).unwrap();
        let expected: Vec<Item> = messages.iter().map(|frames| expected(frames)).collect();
        prop_assert_eq!(items, expected);
        prop_assert!(!decoder.is_mid_message());
    }

    #[test]
    fn arbitrary_bytes_never_panic_nor_exceed_the_memory(
        stream in vec(any::<u8>(), 0..4000),
        pieces in vec(1..500_usize, 1..10),
    ) {
        let _ = decode(LIMITS, &stream, &pieces);
    }

    #[test]
    fn damaged_streams_never_panic_nor_exceed_the_memory(
        messages in messages(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        pieces in vec(1..100_000_usize, 1..10),
    ) {
        let mut stream = encode(&messages);
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let _ = decode(LIMITS, &stream, &pieces);
    }

    #[test]
    fn sessions_survive_any_bytes_after_any_part_of_a_handshake(
        plain in any::<bool>(),
        kept in 0..200_usize,
        noise in vec(any::<u8>(), 0..2000),
    ) {
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        let name: &[u8] = if plain { b"PLAIN" } else { b"NULL" };
        greeting[12..12 + name.len()].copy_from_slice(name);
        let mut stream = greeting.to_vec();
        if plain {
            stream.extend_from_slice(b"\x04\x0a\x05HELLO\x01u\x01p");
            stream.extend_from_slice(b"\x04\x1f\x08INITIATE\x0bSocket-Type\0\0\0\x06DEALER");
        } else {
            stream.extend_from_slice(b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER");
        }
        let whole = kept >= stream.len();
        stream.truncate(kept);
        stream.extend_from_slice(&noise);

        let mechanism = if plain {
            Mechanism::Plain(Arc::new(AnyPassword))
        } else {
            Mechanism::Null
        };
        let mut out = Outbound::default();
        let mut session = Session::accept(mechanism, LIMITS, &mut out);
        let mut ready = false;
        for event in events(&mut session, &stream, &mut out) {
            match event {
                Event::Ready(_) => {
                    prop_assert!(!ready, "ready twice");
                    ready = true;
                }
                _ => prop_assert!(ready, "an event before the handshake ended"),
            }
        }
        prop_assert!(ready || !whole, "a whole handshake was refused");
        prop_assert!(out.queued_bytes() < 64 * 2200, "answers grew beyond the input");
    }

    #[test]
    fn nobody_gets_in_by_curve_with_arbitrary_bytes(
        kept in 0..300_usize,
        damage in proptest::option::of((0..266_usize, 1..255_u8)),
        noise in vec(any::<u8>(), 0..2000),
    ) {
        let mut stream = vec![0; 64];
        (stream[0], stream[9], stream[10]) = (0xff, 0x7f, 3);
        stream[12..17].copy_from_slice(b"CURVE");
        let (server, client) = (SecretKey::from([7; 32]), SecretKey::from([9; 32]));
        let between = SalsaBox::new(&server.public_key(), &client);
        let boxed = between.encrypt(&Nonce::from(*b"CurveZMQHELLO---\0\0\0\0\0\0\0\x01"), &[0; 64][..]);
        stream.extend_from_slice(b"\x04\xc8\x05HELLO\x01\0");
        stream.extend_from_slice(&[0; 72]);
        stream.extend_from_slice(client.public_key().as_bytes());
        stream.extend_from_slice(b"\0\0\0\0\0\0\0\x01");
        stream.extend_from_slice(&boxed.unwrap());
        prop_assert_eq!(stream.len(), 266);
        if let Some((at, change)) = damage {
            stream[at] ^= change;
        }
        stream.truncate(kept);
        let mut whole = stream.clone();
        stream.extend_from_slice(&noise);
        // Long enough for an INITIATE that holds nothing true.
        whole.extend_from_slice(b"\x06\0\0\0\0\0\0\x01\x2c\x08INITIATE");
        whole.extend(noise.iter().copied().chain(std::iter::repeat(7)).take(300 - 9));

        for stream in [stream, whole] {
            let mechanism = Mechanism::Curve(Arc::new(Curve::new([7; 32], Arc::new(AnyPassword))));
            let mut out = Outbound::default();
            let mut session = Session::accept(mechanism, LIMITS, &mut out);
            let events = events(&mut session, &stream, &mut out);
            prop_assert!(events.is_empty(), "{:?}", events);
            // Its greeting, WELCOME and an ERROR.
            prop_assert!(out.queued_bytes() < 400, "answers grew");
        }
    }
}
