//! From a byte stream in arbitrary pieces to whole messages within limits.

use bytes::buf::Limit as BufLimit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::Header;
use super::{Frames, ProtocolError};

/// Longest command: `HELLO` takes 518 bytes, and metadata of applications is small.
pub(super) const MAX_COMMAND_BYTES: u64 = 8 << 10;
/// First size of a read buffer; a connection that sends little keeps it.
const READ_BYTES_MIN: usize = 4 << 10;
/// Largest read at once. Beyond it a system call costs little per byte.
const READ_BYTES_MAX: usize = 64 << 10;
/// Frames up to this size are completed in the read buffer, without a copy.
const IN_PLACE_BYTES: usize = 64 << 10;
/// Large frames grow by this factor: at most this many times what arrived is
/// allocated, and at most a third of the frame is copied.
const GROWTH: usize = 4;

/// What a peer may send before its message is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest payload of one frame, in bytes.
    pub max_frame_bytes: usize,
    /// Largest sum of the payloads of one message, in bytes.
    pub max_message_bytes: usize,
    /// Most frames of one message.
    pub max_frames: usize,
    /// A message of up to this many times `max_message_bytes` is skipped and the
    /// connection goes on; over it the connection is closed.
    pub skip_factor: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_frame_bytes: 16 << 20,
            max_message_bytes: 32 << 20,
            max_frames: 16,
            skip_factor: 16,
        }
    }
}

impl Limits {
    fn max_skipped_bytes(&self) -> u64 {
        (self.max_message_bytes as u64).saturating_mul(u64::from(self.skip_factor))
    }

    /// Which limit a message of so many frames and bytes goes over with another frame of `len`.
    pub(super) fn exceeded(&self, frames: usize, bytes: usize, len: u64) -> Option<Limit> {
        if len > self.max_frame_bytes as u64 {
            Some(Limit::FrameBytes)
        } else if (bytes as u64).saturating_add(len) > self.max_message_bytes as u64 {
            Some(Limit::MessageBytes)
        } else if frames >= self.max_frames {
            Some(Limit::Frames)
        } else {
            None
        }
    }

    /// Counts a frame of `len` that is thrown away.
    pub(super) fn skip(&self, skipped: &mut u64, len: u64) -> Result<(), ProtocolError> {
        // Headers count too, or empty frames could go on for ever.
        *skipped = skipped.saturating_add(len).saturating_add(2);
        match *skipped > self.max_skipped_bytes() {
            true => Err(ProtocolError::EndlessMessage),
            false => Ok(()),
        }
    }
}

/// The limit a message went over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::max_frame_bytes`]
    FrameBytes,
    /// [`Limits::max_message_bytes`]
    MessageBytes,
    /// [`Limits::max_frames`]
    Frames,
}

/// A message from a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A whole message within the limits; at least one frame, any of which may be empty.
    Frames(Frames),
    /// A message over a limit. Its remaining bytes are skipped, not stored, so
    /// the connection stays usable and the sender can be answered.
    TooLarge {
        /// The frames that came before the one that went over the limit.
        frames_before: Frames,
        /// Payload bytes of the message as announced so far, in bytes.
        announced: u64,
        /// Which limit it was.
        limit: Limit,
    },
}

impl Message {
    /// Payload bytes this message holds in memory.
    pub(crate) fn held_bytes(&self) -> usize {
        let (Self::Frames(frames)
        | Self::TooLarge {
            frames_before: frames,
            ..
        }) = self;
        frames.iter().map(Bytes::len).sum()
    }
}

/// What [`Decoder::next`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A message, or the notice of one that is skipped.
    Message(Message),
    /// The body of a command frame.
    Command(Bytes),
}

enum State {
    Header,
    /// The payload of a frame within the limits.
    Payload {
        len: usize,
        more: bool,
        command: bool,
    },
    /// The payload of a frame that is thrown away.
    Skip {
        left: u64,
        more: bool,
    },
    /// A message was announced that is not even worth skipping.
    Stopped,
}

/// Cuts a byte stream into messages and commands.
///
/// Bytes are put where [`space`](Self::space) points, then [`next`](Self::next) is
/// called until it returns `None`. Memory in use is bounded by
/// `max_message_bytes`, twice a read buffer (64 KiB), and the factor 4 by which
/// the buffer of a large frame runs ahead of what has arrived.
pub struct Decoder {
    limits: Limits,
    state: State,
    buf: BytesMut,
    /// A frame too long for the read buffer gathers here, alone, so that small
    /// frames after it do not keep its memory alive.
    large: Option<Vec<u8>>,
    /// Finished frames of the message under way.
    frames: Frames,
    message_bytes: usize,
    /// Bytes of the over-limit message thrown away or announced so far.
    skipped: Option<u64>,
    read_bytes: usize,
    commands_only: bool,
}

impl Decoder {
    /// A decoder at the start of a frame.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::Header,
            buf: BytesMut::new(),
            large: None,
            frames: Vec::new(),
            message_bytes: 0,
            skipped: None,
            read_bytes: READ_BYTES_MIN,
            commands_only: false,
        }
    }

    /// Whether message frames are refused at their header, as in a handshake.
    pub(super) fn set_commands_only(&mut self, commands_only: bool) {
        self.commands_only = commands_only;
    }

    /// Unread bytes, for the greeting that precedes the frames.
    pub(super) fn unread(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    /// The place for the next bytes of the stream; never empty.
    ///
    /// Allocates at most [`next_growth`](Self::next_growth) bytes.
    pub fn space(&mut self) -> BufLimit<&mut (dyn BufMut + Send)> {
        let growth = self.next_growth();
        match (&self.state, &mut self.large) {
            (State::Payload { len, .. }, Some(large)) if large.len() < *len => {
                if growth > 0 {
                    large.reserve_exact(growth);
                }
                let room = large.capacity().min(*len) - large.len();
                (large as &mut (dyn BufMut + Send)).limit(room)
            }
            _ => {
                if growth > 0 {
                    self.buf.reserve(growth);
                }
                // A full buffer would grow by itself, but it never is full here.
                let room = self.buf.capacity() - self.buf.len();
                (&mut self.buf as &mut (dyn BufMut + Send)).limit(room)
            }
        }
    }

    /// Bytes that the next call of [`space`](Self::space) may add to what is held.
    pub fn next_growth(&self) -> usize {
        match (&self.state, &self.large) {
            (State::Payload { len, .. }, Some(large)) if large.len() < *len => {
                large_growth(large, *len)
            }
            _ => self.read_growth(),
        }
    }

    fn read_growth(&self) -> usize {
        let wanted = match self.state {
            State::Payload { len, .. } => len.saturating_sub(self.buf.len()),
            _ => 0,
        }
        .max(READ_BYTES_MIN / 4);
        if self.buf.capacity() - self.buf.len() >= wanted {
            0
        } else {
            wanted.max(self.read_bytes)
        }
    }

    /// Tells that `count` bytes were put into a space of `room` bytes, so that
    /// the next reads of a busy stream are larger.
    pub fn note_read(&mut self, count: usize, room: usize) {
        if count == room {
            self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
        }
    }

    /// Bytes that one read asks for at present.
    pub fn read_bytes(&self) -> usize {
        self.read_bytes
    }

    /// Gives the read buffer of a stream that went quiet back.
    pub fn shrink(&mut self) {
        if self.buf.is_empty() {
            self.buf = BytesMut::new();
            self.read_bytes = READ_BYTES_MIN;
        }
    }

    /// Bytes of memory held for input that has not been returned by `next`.
    pub fn held_bytes(&self) -> usize {
        self.buf.capacity() + self.large.as_ref().map_or(0, Vec::capacity) + self.message_bytes
            - match (&self.state, &self.large) {
                // The frame under way counts once: by the buffer it gathers in.
                (State::Payload { len, command, .. }, _) if !command => *len,
                _ => 0,
            }
    }

    /// Whether a message or command has begun and not ended.
    pub fn is_mid_message(&self) -> bool {
        !self.buf.is_empty()
            || !self.frames.is_empty()
            || self.skipped.is_some()
            || !matches!(self.state, State::Header | State::Stopped)
    }

    /// Whether a message was announced that is too long even to be skipped: no
    /// further item will come, and the connection must be closed.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, State::Stopped)
    }

    /// The next item, or `None` until more bytes have come.
    ///
    /// # Errors
    /// [`ProtocolError`] when the stream cannot be followed any more.
    #[allow(
        clippy::should_implement_trait,
        reason = "an iterator would end at None"
    )]
    pub fn next(&mut self) -> Result<Option<Item>, ProtocolError> {
        loop {
            match self.state {
                State::Header => {
                    let Some(header) = Header::parse(&self.buf)? else {
                        return Ok(None);
                    };
                    self.buf.advance(header.size);
                    if let Some(item) = self.begin_frame(header)? {
                        return Ok(Some(item));
                    }
                }
                State::Payload { len, more, command } => {
                    let Some(payload) = self.take_payload(len) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    if command {
                        return Ok(Some(Item::Command(payload)));
                    }
                    self.frames.push(payload);
                    if !more {
                        self.message_bytes = 0;
                        let frames = std::mem::take(&mut self.frames);
                        return Ok(Some(Item::Message(Message::Frames(frames))));
                    }
                }
                State::Skip { left, more } => {
                    let here = usize::try_from(left)
                        .map_or(self.buf.len(), |left| left.min(self.buf.len()));
                    self.buf.advance(here);
                    let left = left - here as u64;
                    if left > 0 {
                        self.state = State::Skip { left, more };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    if !more {
                        self.skipped = None;
                    }
                }
                State::Stopped => {
                    self.buf.clear();
                    return Ok(None);
                }
            }
        }
    }

    /// Decides from its header what becomes of a frame.
    fn begin_frame(&mut self, header: Header) -> Result<Option<Item>, ProtocolError> {
        let Header {
            more, command, len, ..
        } = header;
        if command {
            let Ok(len) = usize::try_from(len.min(MAX_COMMAND_BYTES + 1)) else {
                return Err(ProtocolError::CommandTooLarge);
            };
            if len as u64 > MAX_COMMAND_BYTES {
                return Err(ProtocolError::CommandTooLarge);
            }
            self.state = State::Payload { len, more, command };
            return Ok(None);
        }
        if self.commands_only {
            return Err(ProtocolError::OutOfOrder);
        }
        if let Some(skipped) = &mut self.skipped {
            self.limits.skip(skipped, len)?;
            self.state = State::Skip { left: len, more };
            return Ok(None);
        }
        let exceeded = self
            .limits
            .exceeded(self.frames.len(), self.message_bytes, len);
        let Some(limit) = exceeded else {
            // Within `max_frame_bytes`, hence within `usize`.
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            self.message_bytes = self.message_bytes.saturating_add(len);
            self.state = State::Payload { len, more, command };
            return Ok(None);
        };
        let announced = (self.message_bytes as u64).saturating_add(len);
        self.message_bytes = 0;
        self.skipped = Some(announced);
        self.state = if announced > self.limits.max_skipped_bytes() {
            State::Stopped
        } else {
            State::Skip { left: len, more }
        };
        Ok(Some(Item::Message(Message::TooLarge {
            frames_before: std::mem::take(&mut self.frames),
            announced,
            limit,
        })))
    }

    /// The whole payload of the frame under way, or `None` until it has come.
    fn take_payload(&mut self, len: usize) -> Option<Bytes> {
        if let Some(large) = &mut self.large {
            if large.len() < len {
                return None;
            }
            return self.large.take().map(Bytes::from);
        }
        if self.buf.len() >= len {
            return Some(self.buf.split_to(len).freeze());
        }
        if len > IN_PLACE_BYTES {
            let mut large = Vec::new();
            // Room for what has come; `space` takes the growth from there.
            large.reserve_exact(READ_BYTES_MAX.min(len).max(self.buf.len()));
            large.extend_from_slice(&self.buf);
            self.buf.clear();
            self.large = Some(large);
        }
        None
    }
}

fn large_growth(large: &Vec<u8>, len: usize) -> usize {
    if large.len() < large.capacity() {
        return 0;
    }
    let target = large.len().saturating_mul(GROWTH).max(READ_BYTES_MAX);
    target.min(len) - large.len()
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

    const SMALL: Limits = Limits {
        max_frame_bytes: 1000,
        max_message_bytes: 1500,
        max_frames: 3,
        skip_factor: 4,
    };

    fn encode(frames: &[&[u8]]) -> Vec<u8> {
        let mut out = BytesMut::new();
        for (at, frame) in frames.iter().enumerate() {
            Header::put(&mut out, false, at + 1 < frames.len(), frame.len());
            out.put_slice(frame);
        }
        out.to_vec()
    }

    fn feed(decoder: &mut Decoder, mut bytes: &[u8]) -> Result<Vec<Item>, ProtocolError> {
        let mut items = Vec::new();
        while !bytes.is_empty() {
            let growth = decoder.next_growth();
            let before = decoder.held_bytes();
            let mut space = decoder.space();
            let room = space.remaining_mut();
            assert!(room > 0);
            let count = room.min(bytes.len());
            space.put_slice(&bytes[..count]);
            bytes = &bytes[count..];
            let held = decoder.held_bytes();
            assert!(
                held <= before + 2 * growth,
                "announced growth {growth}, {before} -> {held}"
            );
            decoder.note_read(count, room);
            while let Some(item) = decoder.next()? {
                items.push(item);
            }
        }
        Ok(items)
    }

    fn whole(frames: &[&[u8]]) -> Item {
        Item::Message(Message::Frames(
            frames.iter().map(|f| Bytes::copy_from_slice(f)).collect(),
        ))
    }

    fn too_large(before: &[&[u8]], announced: u64, limit: Limit) -> Item {
        Item::Message(Message::TooLarge {
            frames_before: before.iter().map(|f| Bytes::copy_from_slice(f)).collect(),
            announced,
            limit,
        })
    }

    #[track_caller]
    fn check_over(frames: &[&[u8]], expected: Item) {
        let mut decoder = Decoder::new(SMALL);
        let mut stream = encode(frames);
        stream.extend(encode(&[b"next"]));
        assert_eq!(
            feed(&mut decoder, &stream).unwrap(),
            [expected, whole(&[b"next"])]
        );
        assert!(!decoder.is_mid_message());
    }

    #[test]
    fn a_message_over_each_limit_is_reported_and_the_next_one_is_whole() {
        let (kilo, over) = ([1; 1000], [1; 1001]);
        check_over(
            &[b"uid", &over],
            too_large(&[b"uid"], 1004, Limit::FrameBytes),
        );
        check_over(
            &[&kilo, &kilo, b"tail"],
            too_large(&[&kilo], 2000, Limit::MessageBytes),
        );
        check_over(
            &[b"a", b"", b"c", b"d", b"e"],
            too_large(&[b"a", b"", b"c"], 3, Limit::Frames),
        );
    }

    #[test]
    fn messages_at_the_limits_are_whole() {
        let kilo = [1; 1000];
        for frames in [&[&kilo[..], &kilo[..500]][..], &[b"a", b"b", b"c"]] {
            let mut decoder = Decoder::new(SMALL);
            assert_eq!(
                feed(&mut decoder, &encode(frames)).unwrap(),
                [whole(frames)]
            );
        }
    }

    #[test]
    fn a_frame_of_a_tebibyte_is_reported_and_ends_the_stream() {
        let mut decoder = Decoder::new(SMALL);
        let mut stream = vec![1, 3, b'u', b'i', b'd', 2];
        stream.extend((1_u64 << 40).to_be_bytes());
        let items = feed(&mut decoder, &stream).unwrap();
        assert_eq!(
            items,
            [too_large(&[b"uid"], (1 << 40) + 3, Limit::FrameBytes)]
        );
        assert!(decoder.is_stopped());
        assert_eq!(feed(&mut decoder, &[0; 100_000]).unwrap(), []);
        assert!(decoder.held_bytes() < 128 << 10);
    }

    #[test]
    fn a_skipped_message_that_never_ends_is_an_error() {
        let mut decoder = Decoder::new(SMALL);
        let result = feed(&mut decoder, &[1, 0].repeat(10_000));
        assert_eq!(result, Err(ProtocolError::EndlessMessage));
    }

    #[test]
    fn commands_may_stand_between_the_frames_of_a_message() {
        let mut decoder = Decoder::new(SMALL);
        let items = feed(&mut decoder, b"\x01\x01a\x04\x02hi\x00\x01b").unwrap();
        let command = Item::Command(Bytes::from_static(b"hi"));
        assert_eq!(items, [command, whole(&[b"a", b"b"])]);
    }

    #[test]
    fn memory_of_a_large_frame_follows_what_has_arrived() {
        let mut decoder = Decoder::new(Limits::default());
        let mut header = vec![2];
        header.extend((16_u64 << 20).to_be_bytes());
        feed(&mut decoder, &header).unwrap();
        let mut arrived = 0;
        while arrived < 16 << 20 {
            assert!(decoder.held_bytes() <= GROWTH * arrived + (192 << 10));
            feed(&mut decoder, &[0; 4096]).unwrap();
            arrived += 4096;
        }
        assert!(!decoder.is_mid_message());
        decoder.shrink();
        assert_eq!(decoder.held_bytes(), 0);
    }

    #[test]
    fn a_large_frame_does_not_share_memory_with_the_next_one() {
        let mut decoder = Decoder::new(Limits::default());
        let big = vec![9; 1 << 20];
        let mut stream = encode(&[&big]);
        stream.extend(encode(&[b"small"]));
        let items = feed(&mut decoder, &stream).unwrap();
        assert_eq!(items, [whole(&[&big]), whole(&[b"small"])]);
        assert!(decoder.held_bytes() <= 128 << 10);
    }
}
