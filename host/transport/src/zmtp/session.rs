//! One accepted connection: greeting, mechanism, then messages and heartbeats.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::ProtocolError;
use super::command::{self, Command, Metadata};
use super::curve::{self, Curve, Negotiation, Opener};
use super::decoder::{Decoder, Item, Limits, Message};
use super::greeting::{GREETING_BYTES, Greeting, mechanism_name, server_greeting};
use super::outbound::Outbound;

const NULL: [u8; 20] = mechanism_name(b"NULL");
const PLAIN: [u8; 20] = mechanism_name(b"PLAIN");
const CURVE: [u8; 20] = mechanism_name(b"CURVE");

/// Judges who wants to come in. Runs on the connection's task, so it must not block.
pub trait Authenticator: Send + Sync + 'static {
    /// Who a PLAIN peer is, or `None` to refuse, as for all unless this is implemented.
    /// It should compare in constant time.
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal> {
        let _ = (username, password);
        None
    }

    /// Who a CURVE peer is, which has proven to have the secret of this public key, or `None`
    /// to refuse, as for all unless this is implemented.
    fn curve(&self, public_key: &[u8; 32]) -> Option<Principal> {
        let _ = public_key;
        None
    }
}

/// The name of an authenticated peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Principal(Arc<str>);

impl Principal {
    /// A principal called `name`.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

/// How peers of a listener prove who they are.
#[derive(Clone, Default)]
pub enum Mechanism {
    /// They do not.
    #[default]
    Null,
    /// Username and password in clear text: for loopback, ipc and trusted networks.
    Plain(Arc<dyn Authenticator>),
    /// By a key pair; all traffic is encrypted.
    Curve(Arc<Curve>),
}

impl fmt::Debug for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "Null",
            Self::Plain(_) => "Plain",
            Self::Curve(_) => "Curve",
        })
    }
}

/// Socket types that may talk to a ROUTER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketType {
    /// Sends and receives freely.
    Dealer,
    /// Puts an empty frame before its request and wants it back before the reply.
    Req,
    /// Sends and receives freely.
    Router,
}

/// What the handshake told about a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its socket type.
    pub socket_type: SocketType,
    /// The identity it chose, empty by default. Peers may choose the same one:
    /// it routes nothing here.
    pub identity: Bytes,
    /// Who it is, under PLAIN and CURVE.
    pub principal: Option<Principal>,
    /// Whether it speaks ZMTP 3.1 and thus answers `PING`.
    pub heartbeats: bool,
}

/// What [`Session::next`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The handshake is complete; comes once and first.
    Ready(PeerInfo),
    /// A message.
    Message(Message),
    /// A command was seen to. If the peer asked to be dropped when it is silent
    /// for a while after this, that time.
    Heartbeat(Option<Duration>),
}

enum Phase {
    Greeting,
    NullReady,
    PlainHello,
    PlainInitiate(Principal),
    CurveHello,
    CurveInitiate(Box<Negotiation>),
    Traffic,
}

/// The protocol state of one accepted connection.
pub struct Session {
    mechanism: Mechanism,
    phase: Phase,
    heartbeats: bool,
    limits: Limits,
    decoder: Decoder,
    /// Under CURVE, what opens the frames that the decoder gives.
    opener: Option<Opener>,
}

impl Session {
    /// Starts a connection; its greeting is queued on `out` at once, since peers
    /// may wait for it before they send theirs.
    pub fn accept(mechanism: Mechanism, limits: Limits, out: &mut Outbound) -> Self {
        // The messages of CURVE are of one frame each for the decoder.
        let (name, as_server, overhead) = match mechanism {
            Mechanism::Null => (NULL, false, 0),
            Mechanism::Plain(_) => (PLAIN, true, 0),
            Mechanism::Curve(_) => (CURVE, true, curve::OVERHEAD_BYTES),
        };
        out.push_raw(&server_greeting(name, as_server));
        let mut decoder = Decoder::new(Limits {
            max_frame_bytes: limits.max_frame_bytes.saturating_add(overhead),
            max_message_bytes: limits.max_message_bytes.saturating_add(overhead),
            ..limits
        });
        decoder.set_commands_only(true);
        Self {
            mechanism,
            phase: Phase::Greeting,
            heartbeats: false,
            limits,
            decoder,
            opener: None,
        }
    }

    /// Bytes of memory held for input that has not been returned by `next`.
    pub fn held_bytes(&self) -> usize {
        self.decoder.held_bytes() + self.opener.as_ref().map_or(0, Opener::held_bytes)
    }

    /// Whether a message or command has begun and not ended.
    pub fn is_mid_message(&self) -> bool {
        self.decoder.is_mid_message() || self.opener.as_ref().is_some_and(Opener::is_mid_message)
    }

    /// Whether a message was too long even to be skipped: no further event will come, and the
    /// connection must be closed.
    pub fn is_stopped(&self) -> bool {
        self.decoder.is_stopped() || self.opener.as_ref().is_some_and(Opener::is_over)
    }

    /// The decoder, for the reader of the socket to fill.
    pub fn decoder(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    /// The next event, or `None` until more bytes have come. Answers to commands
    /// are queued on `out`.
    ///
    /// # Errors
    /// [`ProtocolError`]: the connection must be closed, after `out` is written if it can be.
    pub fn next(&mut self, out: &mut Outbound) -> Result<Option<Event>, ProtocolError> {
        if let Phase::Greeting = self.phase {
            let Some(greeting) = Greeting::parse(self.decoder.unread())? else {
                return Ok(None);
            };
            self.decoder.unread().advance(GREETING_BYTES);
            self.greeted(greeting, out)?;
        }
        loop {
            let Some(mut item) = self.decoder.next()? else {
                return Ok(None);
            };
            if let Some(opener) = &mut self.opener {
                let Some(opened) = opener.open(item)? else {
                    continue;
                };
                item = opened;
            }
            let event = match item {
                Item::Message(message) => return Ok(Some(Event::Message(message))),
                Item::Command(body) => match self.phase {
                    Phase::CurveHello | Phase::CurveInitiate(_) => self.curve(&body, out)?,
                    _ => self.command(Command::parse(body)?, out)?,
                },
            };
            if let Some(event) = event {
                return Ok(Some(event));
            }
        }
    }

    /// Queues a `PING`. Only for peers with [`PeerInfo::heartbeats`].
    pub fn ping(&self, out: &mut Outbound) {
        out.push_command(command::ping());
    }

    fn greeted(&mut self, greeting: Greeting, out: &mut Outbound) -> Result<(), ProtocolError> {
        self.heartbeats = greeting.minor >= 1;
        match self.mechanism {
            Mechanism::Null if greeting.mechanism == NULL => {
                // Sent before the peer's READY has come: NULL peers may wait for each other.
                out.push_command(command::ready());
                self.phase = Phase::NullReady;
            }
            Mechanism::Plain(_) if greeting.mechanism == PLAIN => {
                if greeting.as_server {
                    return Err(ProtocolError::PeerIsServer);
                }
                self.phase = Phase::PlainHello;
            }
            Mechanism::Curve(_) if greeting.mechanism == CURVE => {
                if greeting.as_server {
                    return Err(ProtocolError::PeerIsServer);
                }
                self.phase = Phase::CurveHello;
            }
            _ => return Err(ProtocolError::MechanismMismatch),
        }
        Ok(())
    }

    fn command(
        &mut self,
        command: Command,
        out: &mut Outbound,
    ) -> Result<Option<Event>, ProtocolError> {
        match (&self.phase, command) {
            (Phase::NullReady, Command::Ready(metadata)) => self.ready(metadata, None, out),
            (Phase::PlainHello, Command::Hello { username, password }) => {
                let Mechanism::Plain(authenticator) = &self.mechanism else {
                    return Err(ProtocolError::OutOfOrder);
                };
                let Some(principal) = authenticator.plain(&username, &password) else {
                    // The status code that libzmq turns into its authentication event.
                    out.push_command(command::error("400"));
                    return Err(ProtocolError::AuthenticationFailed);
                };
                out.push_command(command::bare("WELCOME"));
                self.phase = Phase::PlainInitiate(principal);
                Ok(None)
            }
            (Phase::PlainInitiate(principal), Command::Initiate(metadata)) => {
                let principal = Some(principal.clone());
                self.ready(metadata, principal, out)
            }
            (_, Command::Error) => Err(ProtocolError::PeerError),
            (
                Phase::Traffic,
                Command::Ping {
                    ttl_deciseconds,
                    context,
                },
            ) => {
                out.push_command(command::pong(&context));
                let ttl = (ttl_deciseconds > 0)
                    .then(|| Duration::from_millis(u64::from(ttl_deciseconds) * 100));
                Ok(Some(Event::Heartbeat(ttl)))
            }
            (Phase::Traffic, Command::Pong | Command::Other) => Ok(Some(Event::Heartbeat(None))),
            _ => Err(ProtocolError::OutOfOrder),
        }
    }

    /// A command of the handshake of CURVE.
    fn curve(&mut self, body: &[u8], out: &mut Outbound) -> Result<Option<Event>, ProtocolError> {
        let Mechanism::Curve(curve) = &self.mechanism else {
            return Err(ProtocolError::OutOfOrder);
        };
        if body.starts_with(b"\x05ERROR") {
            return Err(ProtocolError::PeerError);
        }
        let Phase::CurveInitiate(negotiation) = &self.phase else {
            let (negotiation, welcome) = curve.hello(body)?;
            out.push_command(welcome);
            self.phase = Phase::CurveInitiate(Box::new(negotiation));
            return Ok(None);
        };
        let initiated = negotiation.initiate(curve, body)?;
        let Some(principal) = curve.authenticator().curve(&initiated.client_key) else {
            out.push_command(command::error("400"));
            return Err(ProtocolError::UnknownKey);
        };
        let socket_type = socket_type(&initiated.metadata, out)?;
        let (opener, sealer, ready) = negotiation.complete(&initiated, self.limits)?;
        out.push_command(ready);
        out.seal_with(sealer);
        self.opener = Some(opener);
        Ok(Some(self.traffic(
            socket_type,
            &initiated.metadata,
            Some(principal),
        )))
    }

    fn ready(
        &mut self,
        metadata: Metadata,
        principal: Option<Principal>,
        out: &mut Outbound,
    ) -> Result<Option<Event>, ProtocolError> {
        let socket_type = socket_type(&metadata, out)?;
        if let Phase::PlainInitiate(_) = self.phase {
            out.push_command(command::ready());
        }
        Ok(Some(self.traffic(socket_type, &metadata, principal)))
    }

    fn traffic(
        &mut self,
        socket_type: SocketType,
        metadata: &Metadata,
        principal: Option<Principal>,
    ) -> Event {
        self.phase = Phase::Traffic;
        self.decoder.set_commands_only(false);
        Event::Ready(PeerInfo {
            socket_type,
            // A copy, so that it does not keep the read buffer for as long as the peer lives.
            identity: Bytes::copy_from_slice(&metadata.identity),
            principal,
            heartbeats: self.heartbeats,
        })
    }
}

fn socket_type(metadata: &Metadata, out: &mut Outbound) -> Result<SocketType, ProtocolError> {
    match metadata.socket_type.as_deref() {
        Some(b"DEALER") => Ok(SocketType::Dealer),
        Some(b"REQ") => Ok(SocketType::Req),
        Some(b"ROUTER") => Ok(SocketType::Router),
        _ => {
            out.push_command(command::error("use a DEALER, REQ or ROUTER socket"));
            Err(ProtocolError::SocketType)
        }
    }
}
