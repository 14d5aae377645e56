//! ZMTP 3.1 as its server side sees it: bytes in, events and bytes out, no I/O.
//!
//! ZMTP is the protocol that ZeroMQ sockets speak over a byte stream
//! (<https://rfc.zeromq.org/spec/37/>). This module plays the accepting ROUTER:
//! [`Session`] greets, runs the NULL, PLAIN or CURVE mechanism, and then turns the
//! stream into [`Message`]s. Peers that announce 3.0 are served too; they
//! never get a `PING`.
//!
//! Nothing here trusts a length from the wire: memory follows the bytes that
//! have arrived, and what goes over a limit is skipped instead of stored.

mod command;
mod curve;
mod decoder;
mod frame;
mod greeting;
mod outbound;
mod session;

pub use curve::{Curve, curve_public_key};
pub use decoder::{Decoder, Item, Limit, Limits, Message};
pub use outbound::Outbound;
pub use session::{Authenticator, Event, Mechanism, PeerInfo, Principal, Session, SocketType};

/// The frames of one message, without the identity frame a ROUTER would add.
///
/// Frames may be slices of a read buffer of up to 128 KiB that lives as long as
/// the longest-lived of them: copy a small frame that is kept.
pub type Frames = Vec<bytes::Bytes>;

/// Why a peer's bytes are not ZMTP as this server speaks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not a ZMTP signature: another protocol is spoken here.
    #[error("the first bytes are not a ZMTP greeting; connect with a ZeroMQ DEALER or REQ socket")]
    NotZmtp,
    /// The peer speaks ZMTP 1 or 2 (`ZeroMQ` before 4.0).
    #[error(
        "the greeting announces ZMTP {0}, and 3.0 is the oldest served; upgrade the client's ZeroMQ to 4.0 or later"
    )]
    UnsupportedVersion(u8),
    /// The mechanism in the greeting is not the one of this listener.
    #[error(
        "the greeting asks for another security mechanism than this listener's; set plain_username and plain_password only for a PLAIN listener, and curve_serverkey only for a CURVE one"
    )]
    MechanismMismatch,
    /// A PLAIN or CURVE peer claims the server's role.
    #[error(
        "the greeting claims the server role of the mechanism; unset the client's plain_server or curve_server option"
    )]
    PeerIsServer,
    /// Username and password were refused.
    #[error("the username or password of HELLO is wrong")]
    AuthenticationFailed,
    /// The public key of a CURVE peer is nobody's.
    #[error("the client's CURVE key is none of the listener's users")]
    UnknownKey,
    /// Something encrypted cannot be opened, or was seen before.
    #[error(
        "a CURVE box cannot be opened; set the client's curve_serverkey to this listener's public key"
    )]
    CurveBox,
    /// The system gave no random numbers for a key.
    #[error("the system has no random numbers for the keys of a connection")]
    NoRandomness,
    /// `Socket-Type` is missing or cannot talk to a ROUTER.
    #[error("the metadata's Socket-Type cannot talk to a ROUTER; use DEALER, REQ or ROUTER")]
    SocketType,
    /// A command that does not belong here, or a message before the handshake ended.
    #[error("a frame of the handshake came out of order")]
    OutOfOrder,
    /// The peer sent an `ERROR` command.
    #[error("the peer reported an error and gave up")]
    PeerError,
    /// A command whose lengths or names contradict its size.
    #[error("the body of a command is malformed")]
    MalformedCommand,
    /// A command longer than any that is defined.
    #[error("a command is longer than {} bytes", decoder::MAX_COMMAND_BYTES)]
    CommandTooLarge,
    /// Reserved flag bits are set, or a command claims to continue.
    #[error("a frame header has reserved flag bits set")]
    FrameFlags,
    /// A message over the limit went on for longer than the server skips.
    #[error("a message over the limit went on past the bytes that are skipped")]
    EndlessMessage,
}
