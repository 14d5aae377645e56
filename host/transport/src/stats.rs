//! Counters of a server, and why connections end.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::zmtp::ProtocolError;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisconnectReason {
    /// The peer closed it.
    PeerClosed,
    /// Reading or writing failed: reset, unreachable, timed out.
    Io(std::io::ErrorKind),
    /// The peer's bytes are not ZMTP as it is spoken here.
    Protocol(ProtocolError),
    /// The handshake took too long.
    HandshakeTimeout,
    /// The handshake failed: another protocol, mechanism, socket type or password.
    HandshakeFailed(ProtocolError),
    /// A message announced more than is skipped; it was answered first.
    MessageTooLarge,
    /// A message did not arrive in full within `message_timeout`.
    MessageTimeout,
    /// Nothing came from the peer, not even a `PONG`.
    HeartbeatTimeout,
    /// The peer did not read what it was sent.
    SlowReader,
    /// The handler asked for it.
    Handler,
    /// The handler, or a future it returned, panicked.
    HandlerPanicked,
    /// The server stopped.
    Shutdown,
}

impl DisconnectReason {
    const COUNT: usize = 12;

    /// Every name that [`name`](Self::name) can return, for metrics that list all labels.
    pub const NAMES: [&'static str; Self::COUNT] = [
        "peer_closed",
        "io",
        "protocol",
        "handshake_timeout",
        "handshake_failed",
        "message_too_large",
        "message_timeout",
        "heartbeat_timeout",
        "slow_reader",
        "handler",
        "handler_panicked",
        "shutdown",
    ];

    /// A stable name, for a metric's label.
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }

    fn index(&self) -> usize {
        match self {
            Self::PeerClosed => 0,
            Self::Io(_) => 1,
            Self::Protocol(_) => 2,
            Self::HandshakeTimeout => 3,
            Self::HandshakeFailed(_) => 4,
            Self::MessageTooLarge => 5,
            Self::MessageTimeout => 6,
            Self::HeartbeatTimeout => 7,
            Self::SlowReader => 8,
            Self::Handler => 9,
            Self::HandlerPanicked => 10,
            Self::Shutdown => 11,
        }
    }
}

impl fmt::Display for DisconnectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(kind) => write!(f, "io: {kind}"),
            Self::Protocol(error) | Self::HandshakeFailed(error) => {
                write!(f, "{}: {error}", self.name())
            }
            _ => f.write_str(self.name()),
        }
    }
}

/// Counters of a server. All but [`connections_open`](Self::connections_open) only grow.
#[derive(Debug, Default)]
pub struct Stats {
    pub(crate) open: AtomicU64,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) accept_errors: AtomicU64,
    pub(crate) messages_in: AtomicU64,
    pub(crate) messages_out: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    pub(crate) too_large: AtomicU64,
    pub(crate) pushes_refused: AtomicU64,
    pub(crate) budget_waits: AtomicU64,
    disconnects: [AtomicU64; DisconnectReason::COUNT],
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Stats {
    /// Connections open now, those in their handshake included.
    pub fn connections_open(&self) -> u64 {
        get(&self.open)
    }

    /// Connections accepted, without the refused ones.
    pub fn connections_accepted(&self) -> u64 {
        get(&self.accepted)
    }

    /// Connections closed at once because `max_connections` was reached.
    pub fn connections_refused(&self) -> u64 {
        get(&self.refused)
    }

    /// Failures of accept, such as too many open files.
    pub fn accept_errors(&self) -> u64 {
        get(&self.accept_errors)
    }

    /// Messages given to the handler.
    pub fn messages_in(&self) -> u64 {
        get(&self.messages_in)
    }

    /// Messages and commands written in full.
    pub fn messages_out(&self) -> u64 {
        get(&self.messages_out)
    }

    /// Bytes read, framing included.
    pub fn bytes_in(&self) -> u64 {
        get(&self.bytes_in)
    }

    /// Bytes written, framing included.
    pub fn bytes_out(&self) -> u64 {
        get(&self.bytes_out)
    }

    /// Messages over a limit.
    pub fn messages_too_large(&self) -> u64 {
        get(&self.too_large)
    }

    /// Calls of [`Peer::try_send`](crate::Peer::try_send) that found the queue full.
    pub fn pushes_refused(&self) -> u64 {
        get(&self.pushes_refused)
    }

    /// Times a connection had to wait for the budget of inbound bytes.
    pub fn inbound_budget_waits(&self) -> u64 {
        get(&self.budget_waits)
    }

    /// Handshakes that failed or timed out.
    pub fn handshake_failures(&self) -> u64 {
        self.disconnects("handshake_failed") + self.disconnects("handshake_timeout")
    }

    /// Peers dropped because they did not read.
    pub fn slow_readers_dropped(&self) -> u64 {
        self.disconnects("slow_reader")
    }

    /// Connections that ended for the reason of this [name](DisconnectReason::name);
    /// 0 for a name that is none.
    pub fn disconnects(&self, name: &str) -> u64 {
        let index = DisconnectReason::NAMES.iter().position(|n| *n == name);
        index.map_or(0, |index| get(&self.disconnects[index]))
    }

    pub(crate) fn count_disconnect(&self, reason: DisconnectReason) {
        add(&self.disconnects[reason.index()], 1);
    }
}
