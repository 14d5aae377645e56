//! One accepted connection: greeting, mechanism, then messages and heartbeats.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::ProtocolError;
use super::command::{self, Command, Metadata};
use super::decoder::{Decoder, Item, Limits, Message};
use super::greeting::{GREETING_BYTES, Greeting, mechanism_name, server_greeting};
use super::outbound::Outbound;

const NULL: [u8; 20] = mechanism_name(b"NULL");
const PLAIN: [u8; 20] = mechanism_name(b"PLAIN");

/// Judges the username and password of PLAIN peers.
pub trait Authenticator: Send + Sync + 'static {
    /// Who this is, or `None` to refuse. Runs on the connection's task, so it
    /// must not block, and it should compare in constant time.
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal>;
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
}

impl fmt::Debug for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "Null",
            Self::Plain(_) => "Plain",
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
    /// Who it is, under PLAIN.
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
    Traffic,
}

/// The protocol state of one accepted connection.
pub struct Session {
    mechanism: Mechanism,
    phase: Phase,
    heartbeats: bool,
    decoder: Decoder,
}

impl Session {
    /// Starts a connection; its greeting is queued on `out` at once, since peers
    /// may wait for it before they send theirs.
    pub fn accept(mechanism: Mechanism, limits: Limits, out: &mut Outbound) -> Self {
        let (name, as_server) = match mechanism {
            Mechanism::Null => (NULL, false),
            Mechanism::Plain(_) => (PLAIN, true),
        };
        out.push_raw(&server_greeting(name, as_server));
        let mut decoder = Decoder::new(limits);
        decoder.set_commands_only(true);
        Self {
            mechanism,
            phase: Phase::Greeting,
            heartbeats: false,
            decoder,
        }
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
            let command = match self.decoder.next()? {
                None => return Ok(None),
                Some(Item::Message(message)) => return Ok(Some(Event::Message(message))),
                Some(Item::Command(body)) => Command::parse(body)?,
            };
            if let Some(event) = self.command(command, out)? {
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

    fn ready(
        &mut self,
        metadata: Metadata,
        principal: Option<Principal>,
        out: &mut Outbound,
    ) -> Result<Option<Event>, ProtocolError> {
        let socket_type = match metadata.socket_type.as_deref() {
            Some(b"DEALER") => SocketType::Dealer,
            Some(b"REQ") => SocketType::Req,
            Some(b"ROUTER") => SocketType::Router,
            _ => {
                out.push_command(command::error("use a DEALER, REQ or ROUTER socket"));
                return Err(ProtocolError::SocketType);
            }
        };
        if let Phase::PlainInitiate(_) = self.phase {
            out.push_command(command::ready());
        }
        self.phase = Phase::Traffic;
        self.decoder.set_commands_only(false);
        Ok(Some(Event::Ready(PeerInfo {
            socket_type,
            // A copy, so that it does not keep the read buffer for as long as the peer lives.
            identity: Bytes::copy_from_slice(&metadata.identity),
            principal,
            heartbeats: self.heartbeats,
        })))
    }
}
