//! Bytes on their way to a peer.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use super::curve::Sealer;
use super::frame::Header;

/// Frames below this are copied into one run of bytes; copying them costs less
/// than an extra slice in a vectored write, and it lets go of the buffer that
/// a small frame was cut from.
const COPY_BELOW_BYTES: usize = 8 << 10;
/// What a queued message costs beyond its payload, for the bound in bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 32;

/// Encoded messages and commands that wait to be written.
///
/// It is not bounded by itself: the owner stops feeding it according to
/// [`queued_bytes`](Self::queued_bytes) and [`queued_messages`](Self::queued_messages).
#[derive(Default)]
pub struct Outbound {
    /// Whole runs before `tail`: copied small frames and large frames by reference.
    runs: VecDeque<Bytes>,
    tail: BytesMut,
    queued: usize,
    /// Where in the stream each queued message ends.
    ends: VecDeque<u64>,
    /// Position in the stream of the first unwritten byte.
    position: u64,
    /// Under CURVE, what seals each frame.
    sealer: Option<Sealer>,
}

impl Outbound {
    /// Queues a message. An empty list of frames cannot be expressed and is dropped.
    pub fn push_message(&mut self, frames: impl IntoIterator<Item = Bytes>) {
        let mut frames = frames.into_iter().peekable();
        let mut any = false;
        while let Some(frame) = frames.next() {
            self.push_frame(false, frames.peek().is_some(), frame);
            any = true;
        }
        if any {
            self.end_message();
        }
    }

    /// Queues a command.
    pub(super) fn push_command(&mut self, body: BytesMut) {
        self.push_frame(true, false, body.freeze());
        self.end_message();
    }

    /// Queues bytes that are no frame: the greeting.
    pub(super) fn push_raw(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.queued += bytes.len();
    }

    /// From now on, seals what is queued.
    pub(super) fn seal_with(&mut self, sealer: Sealer) {
        self.sealer = Some(sealer);
    }

    fn push_frame(&mut self, command: bool, more: bool, frame: Bytes) {
        let Some(sealer) = &mut self.sealer else {
            return self.push_plain(command, more, frame);
        };
        if let Some(sealed) = sealer.seal(command, more, &frame) {
            self.push_plain(false, false, sealed.freeze());
        }
    }

    fn push_plain(&mut self, command: bool, more: bool, frame: Bytes) {
        let before = self.tail.len();
        Header::put(&mut self.tail, command, more, frame.len());
        self.queued += self.tail.len() - before + frame.len();
        if frame.len() < COPY_BELOW_BYTES {
            self.tail.extend_from_slice(&frame);
        } else {
            self.runs.push_back(self.tail.split().freeze());
            self.runs.push_back(frame);
        }
    }

    fn end_message(&mut self) {
        self.ends.push_back(self.position + self.queued as u64);
    }

    /// Whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Bytes not yet written, with an allowance for each queued message.
    pub fn queued_bytes(&self) -> usize {
        self.queued + self.ends.len() * MESSAGE_OVERHEAD_BYTES
    }

    /// Messages and commands not yet written in full.
    pub fn queued_messages(&self) -> usize {
        self.ends.len()
    }

    /// Fills `slices` with the next bytes to write and returns how many it used.
    pub fn chunks<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let runs = self.runs.iter().map(|run| &run[..]);
        let chunks = runs
            .chain([&self.tail[..]])
            .filter(|chunk| !chunk.is_empty());
        let mut used = 0;
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
            used += 1;
        }
        used
    }

    /// Drops the first `count` bytes, which have been written; returns how many
    /// messages ended in them.
    pub fn advance(&mut self, count: usize) -> u64 {
        let mut left = count.min(self.queued);
        self.queued -= left;
        self.position += left as u64;
        while left > 0 {
            let Some(run) = self.runs.front_mut() else {
                self.tail.advance(left);
                break;
            };
            if left < run.len() {
                run.advance(left);
                break;
            }
            left -= run.len();
            self.runs.pop_front();
        }
        let mut ended = 0;
        while self.ends.front().is_some_and(|&end| end <= self.position) {
            self.ends.pop_front();
            ended += 1;
        }
        ended
    }

    /// Throws away all that is queued.
    pub fn clear(&mut self) {
        self.advance(self.queued);
    }

    /// Gives memory of an empty queue back.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = Self {
                position: self.position,
                sealer: self.sealer.take(),
                ..Self::default()
            };
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

    fn written(out: &mut Outbound, step: usize) -> (Vec<u8>, u64) {
        let (mut all, mut messages) = (Vec::new(), 0);
        while !out.is_empty() {
            let mut slices = [IoSlice::new(&[]); 3];
            let used = out.chunks(&mut slices);
            let bytes: Vec<u8> = slices[..used].iter().flat_map(|s| s.to_vec()).collect();
            let count = step.min(bytes.len());
            all.extend_from_slice(&bytes[..count]);
            messages += out.advance(count);
        }
        (all, messages)
    }

    #[test]
    fn any_step_of_writing_gives_the_same_stream_and_count() {
        for step in [1, 2, 7, 8191, 8192, 1 << 20] {
            let mut out = Outbound::default();
            out.push_raw(b"hello");
            out.push_message([Bytes::from_static(b"u"), Bytes::new()]);
            out.push_message([
                Bytes::from(vec![7; COPY_BELOW_BYTES]),
                Bytes::from_static(b"z"),
            ]);
            out.push_message([]);
            let expected_bytes = out.queued;
            assert_eq!(out.queued_messages(), 2);
            let (stream, messages) = written(&mut out, step);
            assert_eq!(stream.len(), expected_bytes);
            assert_eq!(&stream[..10], b"hello\x01\x01u\x00\x00");
            assert_eq!(stream[10..19], [3, 0, 0, 0, 0, 0, 0, 0x20, 0]);
            assert_eq!(&stream[stream.len() - 3..], b"\x00\x01z");
            assert_eq!((messages, out.queued_bytes()), (2, 0));
        }
    }

    #[test]
    fn large_frames_are_not_copied() {
        let frame = Bytes::from(vec![7; COPY_BELOW_BYTES]);
        let mut out = Outbound::default();
        out.push_message([frame.clone()]);
        assert_eq!(out.runs[1].as_ptr(), frame.as_ptr());
    }
}
