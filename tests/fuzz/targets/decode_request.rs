//! Frames from a stranger: nothing panics, what is decoded holds no more than what arrived, and
//! every refusal can be said.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use stockade_fuzz as _;
use stockade_wire::{Limits, decode, error_reply};

/// The input is frames, each after its length in two bytes.
fn frames(mut input: &[u8]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while let Some((header, rest)) = input.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*header)).min(rest.len());
        let (frame, rest) = rest.split_at(length);
        frames.push(Bytes::copy_from_slice(frame));
        input = rest;
    }
    frames
}

fuzz_target!(|input: &[u8]| {
    match decode(frames(input), &Limits::default()) {
        Ok((envelope, request)) => {
            let _ = envelope.known_operation(&Limits::default());
            let _ = request.operation();
        }
        Err(rejected) => {
            let sentence = rejected.error.to_string();
            assert!(!sentence.is_empty());
            if let Some(envelope) = &rejected.envelope {
                let reply = error_reply(envelope, &sentence);
                assert!(reply.iter().map(Bytes::len).sum::<usize>() <= input.len() + 1100);
            }
        }
    }
});
