//! CURVE: each side proves a key pair, and all that follows is encrypted and cannot be changed,
//! repeated or left out unseen.
//!
//! Follows CurveZMQ (<https://rfc.zeromq.org/spec/26/>) as libzmq 4.3.5 speaks it
//! (`src/curve_server.cpp`, `src/curve_mechanism_base.cpp`): a frame of traffic is an ordinary
//! message frame whose body is a `MESSAGE`, with the flags of the real one inside.

use std::fmt;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use crypto_box::aead::{AeadInPlace, OsRng, rand_core::RngCore};
use crypto_box::{Nonce, PublicKey, SalsaBox, SecretKey, Tag};

use super::command::{self, Metadata};
use super::decoder::{Item, Limit, Limits, MAX_COMMAND_BYTES, Message};
use super::{Authenticator, Frames, ProtocolError};

/// What sealing adds to a payload: name, nonce, authenticator and flags.
pub(super) const OVERHEAD_BYTES: usize = MESSAGE.len() + SHORT_NONCE_BYTES + TAG_BYTES + 1;

const MESSAGE: &[u8] = b"\x07MESSAGE";
const HELLO: &[u8] = b"\x05HELLO";
const INITIATE: &[u8] = b"\x08INITIATE";
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const SHORT_NONCE_BYTES: usize = 8;
const LONG_NONCE_BYTES: usize = 16;
const COOKIE_BYTES: usize = 96;
/// `HELLO` as a whole: as long as `WELCOME`, so that nobody gets more than they gave.
const HELLO_BYTES: usize = 200;
/// The client's key, and its vouch for the key of this connection.
const IDENTITY_BYTES: usize = KEY_BYTES + LONG_NONCE_BYTES + TAG_BYTES + 2 * KEY_BYTES;
/// Flags within a `MESSAGE`.
const MORE: u8 = 0b01;
const COMMAND: u8 = 0b10;

/// The server's half of CURVE: its key, and who may come in.
pub struct Curve {
    secret: SecretKey,
    public: [u8; 32],
    authenticator: Arc<dyn Authenticator>,
}

impl fmt::Debug for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Curve").finish_non_exhaustive()
    }
}

impl Curve {
    /// A server with a secret key of 32 bytes, which lets in whose public keys
    /// [`Authenticator::curve`] knows.
    pub fn new(secret: [u8; 32], authenticator: Arc<dyn Authenticator>) -> Self {
        Self {
            secret: SecretKey::from(secret),
            public: curve_public_key(secret),
            authenticator,
        }
    }

    /// The key that clients need to know before they connect.
    pub fn public_key(&self) -> [u8; 32] {
        self.public
    }

    pub(super) fn authenticator(&self) -> &dyn Authenticator {
        &*self.authenticator
    }

    /// Answers `HELLO`: the negotiation it begins, and the body of `WELCOME`.
    pub(super) fn hello(&self, body: &[u8]) -> Result<(Negotiation, BytesMut), ProtocolError> {
        // Name, version 1.0, padding, the client's key of this connection, a nonce and a box of zeros.
        let malformed = ProtocolError::MalformedCommand;
        if body.len() != HELLO_BYTES || !body.starts_with(HELLO) || body[6..8] != [1, 0] {
            return Err(malformed);
        }
        let client = PublicKey::from(array(&body[80..112]).ok_or(malformed)?);
        let to_client = SalsaBox::new(&client, &self.secret);
        open(
            &to_client,
            b"CurveZMQHELLO---",
            &body[112..120],
            &body[120..],
        )?;

        let secret = SecretKey::from(random::<KEY_BYTES>()?);
        // Opaque to the client, who gives it back: what is within would spare a server the state
        // of those who have only said hello, and a connection has that in any case.
        let cookie = random::<COOKIE_BYTES>()?;
        let nonce = random::<LONG_NONCE_BYTES>()?;
        let mut boxed = BytesMut::with_capacity(KEY_BYTES + COOKIE_BYTES);
        boxed.put_slice(secret.public_key().as_bytes());
        boxed.put_slice(&cookie);
        let welcome = sealed("WELCOME", &to_client, b"WELCOME-", &nonce, boxed)?;
        let negotiation = Negotiation {
            between: Arc::new(SalsaBox::new(&client, &secret)),
            client,
            secret,
            cookie,
        };
        Ok((negotiation, welcome))
    }
}

/// The public half of a secret key.
pub fn curve_public_key(secret: [u8; 32]) -> [u8; 32] {
    SecretKey::from(secret).public_key().to_bytes()
}

/// A handshake between `WELCOME` and `INITIATE`.
pub(super) struct Negotiation {
    client: PublicKey,
    secret: SecretKey,
    cookie: [u8; COOKIE_BYTES],
    between: Arc<SalsaBox>,
}

/// What `INITIATE` has proven and told.
pub(super) struct Initiated {
    pub(super) client_key: [u8; 32],
    pub(super) metadata: Metadata,
    nonce: u64,
}

impl Negotiation {
    /// Reads `INITIATE`: whose key it is, which the client has proven to have.
    pub(super) fn initiate(&self, curve: &Curve, body: &[u8]) -> Result<Initiated, ProtocolError> {
        let malformed = ProtocolError::MalformedCommand;
        let mut rest = body.strip_prefix(INITIATE).ok_or(malformed)?;
        if rest.len() < COOKIE_BYTES + SHORT_NONCE_BYTES + TAG_BYTES + IDENTITY_BYTES {
            return Err(malformed);
        }
        let (cookie, after) = rest.split_at(COOKIE_BYTES);
        if cookie != self.cookie {
            return Err(ProtocolError::CurveBox);
        }
        rest = after;
        let (nonce, boxed) = rest.split_at(SHORT_NONCE_BYTES);
        let plain = open(&self.between, b"CurveZMQINITIATE", nonce, boxed)?;
        let (identity, metadata) = plain.split_at(IDENTITY_BYTES.min(plain.len()));
        let client_key: [u8; KEY_BYTES] =
            identity.get(..KEY_BYTES).and_then(array).ok_or(malformed)?;
        // Only who has the secret of that key can have vouched for the key of this connection, to this
        // server and to nobody else.
        let long_term = SalsaBox::new(&PublicKey::from(client_key), &self.secret);
        let (vouch_nonce, vouch) = identity[KEY_BYTES..].split_at(LONG_NONCE_BYTES);
        let vouched = open(&long_term, b"VOUCH---", vouch_nonce, vouch)?;
        let (for_key, for_server) = vouched.split_at(KEY_BYTES.min(vouched.len()));
        if for_key != self.client.as_bytes() || for_server != curve.public {
            return Err(ProtocolError::CurveBox);
        }
        Ok(Initiated {
            client_key,
            metadata: Metadata::parse(Bytes::copy_from_slice(metadata))?,
            nonce: u64::from_be_bytes(array(nonce).ok_or(malformed)?),
        })
    }

    /// What opens and seals the traffic that begins now, and the body of `READY`.
    pub(super) fn complete(
        &self,
        initiated: &Initiated,
        limits: Limits,
    ) -> Result<(Opener, Sealer, BytesMut), ProtocolError> {
        let opener = Opener {
            between: Arc::clone(&self.between),
            last_nonce: initiated.nonce,
            limits,
            frames: Vec::new(),
            bytes: 0,
            skipped: None,
            is_over: false,
        };
        let mut sealer = Sealer {
            between: Arc::clone(&self.between),
            nonce: 0,
        };
        let metadata = command::ready().split_off(command::bare("READY").len());
        let nonce = sealer.next_nonce();
        let ready = sealed(
            "READY",
            &self.between,
            b"CurveZMQREADY---",
            &nonce,
            metadata,
        )?;
        Ok((opener, sealer, ready))
    }
}

/// Opens what a client sends, and joins it to messages within the limits.
pub(super) struct Opener {
    between: Arc<SalsaBox>,
    /// Nonces count up, so that nothing is taken twice.
    last_nonce: u64,
    limits: Limits,
    /// Opened frames of the message under way.
    frames: Frames,
    bytes: usize,
    /// Bytes of the over-limit message thrown away so far.
    skipped: Option<u64>,
    /// Whether a frame was too long to be opened: what follows it cannot be told.
    is_over: bool,
}

impl Opener {
    /// Bytes of the message under way.
    pub(super) fn held_bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_mid_message(&self) -> bool {
        !self.frames.is_empty() || self.skipped.is_some()
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// What a frame of the stream holds; `None` while its message goes on.
    pub(super) fn open(&mut self, item: Item) -> Result<Option<Item>, ProtocolError> {
        let sealed = match item {
            Item::Command(body) => body,
            Item::Message(Message::Frames(mut frames)) => match (frames.pop(), frames.is_empty()) {
                (Some(frame), true) => frame,
                _ => return Err(ProtocolError::FrameFlags),
            },
            Item::Message(Message::TooLarge { announced, .. }) => {
                self.is_over = true;
                let announced = announced.saturating_sub(OVERHEAD_BYTES as u64);
                return Ok(Some(self.too_large(announced, Limit::FrameBytes)));
            }
        };
        let (flags, payload) = self.unseal(sealed)?;
        let is_last = flags & MORE == 0;
        if flags & COMMAND != 0 {
            if !is_last {
                return Err(ProtocolError::FrameFlags);
            }
            if payload.len() as u64 > MAX_COMMAND_BYTES {
                return Err(ProtocolError::CommandTooLarge);
            }
            return Ok(Some(Item::Command(payload)));
        }
        let len = payload.len() as u64;
        if let Some(skipped) = &mut self.skipped {
            self.limits.skip(skipped, len)?;
            if is_last {
                self.skipped = None;
            }
            return Ok(None);
        }
        let Some(limit) = self.limits.exceeded(self.frames.len(), self.bytes, len) else {
            self.bytes += payload.len();
            self.frames.push(payload);
            if !is_last {
                return Ok(None);
            }
            self.bytes = 0;
            let frames = std::mem::take(&mut self.frames);
            return Ok(Some(Item::Message(Message::Frames(frames))));
        };
        self.skipped = (!is_last).then_some(self.bytes as u64 + len);
        Ok(Some(self.too_large(len, limit)))
    }

    fn too_large(&mut self, len: u64, limit: Limit) -> Item {
        let announced = (std::mem::take(&mut self.bytes) as u64).saturating_add(len);
        Item::Message(Message::TooLarge {
            frames_before: std::mem::take(&mut self.frames),
            announced,
            limit,
        })
    }

    /// The flags and payload of a `MESSAGE`.
    fn unseal(&mut self, sealed: Bytes) -> Result<(u8, Bytes), ProtocolError> {
        if self.is_over {
            return Err(ProtocolError::EndlessMessage);
        }
        if sealed.len() < OVERHEAD_BYTES || !sealed.starts_with(MESSAGE) {
            return Err(ProtocolError::MalformedCommand);
        }
        // A large frame has its memory to itself and is opened in place; a small one shares a read buffer.
        let mut body = sealed
            .try_into_mut()
            .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        body.advance(MESSAGE.len());
        let short = body.get_u64();
        if short <= self.last_nonce {
            return Err(ProtocolError::CurveBox);
        }
        let tag: [u8; TAG_BYTES] =
            array(&body[..TAG_BYTES]).ok_or(ProtocolError::MalformedCommand)?;
        body.advance(TAG_BYTES);
        let nonce = nonce(b"CurveZMQMESSAGEC", &short.to_be_bytes())?;
        self.between
            .decrypt_in_place_detached(&nonce, &[], &mut body, &Tag::from(tag))
            .map_err(|_| ProtocolError::CurveBox)?;
        self.last_nonce = short;
        let flags = body.get_u8();
        match flags & !(MORE | COMMAND) {
            0 => Ok((flags, body.freeze())),
            _ => Err(ProtocolError::FrameFlags),
        }
    }
}

/// Seals what goes to a client.
pub(super) struct Sealer {
    between: Arc<SalsaBox>,
    nonce: u64,
}

impl Sealer {
    fn next_nonce(&mut self) -> [u8; SHORT_NONCE_BYTES] {
        self.nonce += 1;
        self.nonce.to_be_bytes()
    }

    /// The body of a `MESSAGE` with a frame; `None` if it has more than the cipher can take (256 GiB).
    pub(super) fn seal(&mut self, command: bool, more: bool, payload: &[u8]) -> Option<BytesMut> {
        let short = self.next_nonce();
        let nonce = nonce(b"CurveZMQMESSAGES", &short).ok()?;
        let mut body = BytesMut::with_capacity(OVERHEAD_BYTES + payload.len());
        body.put_slice(MESSAGE);
        body.put_slice(&short);
        body.put_bytes(0, TAG_BYTES);
        let mut boxed = body.split_off(body.len());
        boxed.put_u8(if command { COMMAND } else { 0 } | if more { MORE } else { 0 });
        boxed.put_slice(payload);
        let tag = self
            .between
            .encrypt_in_place_detached(&nonce, &[], &mut boxed)
            .ok()?;
        let at = body.len() - TAG_BYTES;
        body[at..].copy_from_slice(&tag);
        // They are parts of one allocation.
        body.unsplit(boxed);
        Some(body)
    }
}

fn nonce(prefix: &[u8], rest: &[u8]) -> Result<Nonce, ProtocolError> {
    let whole: [u8; 24] = array(&[prefix, rest].concat()).ok_or(ProtocolError::CurveBox)?;
    Ok(Nonce::from(whole))
}

/// Opens a box: 16 bytes that authenticate it, then what it holds.
fn open(
    between: &SalsaBox,
    prefix: &[u8],
    short: &[u8],
    boxed: &[u8],
) -> Result<Vec<u8>, ProtocolError> {
    let (tag, sealed) = boxed
        .split_first_chunk::<TAG_BYTES>()
        .ok_or(ProtocolError::MalformedCommand)?;
    let mut plain = sealed.to_vec();
    between
        .decrypt_in_place_detached(&nonce(prefix, short)?, &[], &mut plain, &Tag::from(*tag))
        .map_err(|_| ProtocolError::CurveBox)?;
    Ok(plain)
}

/// The body of a command of the handshake: a nonce, and `plain` in a box.
fn sealed(
    name: &str,
    between: &SalsaBox,
    prefix: &[u8],
    short: &[u8],
    mut plain: BytesMut,
) -> Result<BytesMut, ProtocolError> {
    let tag = between
        .encrypt_in_place_detached(&nonce(prefix, short)?, &[], &mut plain)
        .map_err(|_| ProtocolError::CurveBox)?;
    let mut body = command::bare(name);
    body.put_slice(short);
    body.put_slice(&tag);
    body.put_slice(&plain);
    Ok(body)
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

fn random<const N: usize>() -> Result<[u8; N], ProtocolError> {
    let mut bytes = [0; N];
    OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|_| ProtocolError::NoRandomness)?;
    Ok(bytes)
}
