//! A connected client as handlers see it, and the way to send to it unasked.

mod tcp_user;

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::stats::{Stats, add};
use crate::zmtp::{Frames, PeerInfo, Principal, SocketType};

/// Where a peer connected from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerAddress {
    /// Over TCP, from this address.
    Tcp(SocketAddr),
    /// Over the local socket at this path.
    Ipc(Arc<Path>),
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

/// Whose process a local peer is, as the kernel says (`SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Its process, when it connected.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

/// Why [`Peer::try_send`] did not take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The peer reads too slowly: `max_push_bytes` or `max_push_messages` wait for it.
    #[error("the peer's queue of unasked messages is full")]
    Full,
    /// The connection has ended or is ending.
    #[error("the peer's connection is closed")]
    Closed,
}

/// A connection that has completed its handshake.
pub struct Peer {
    pub(crate) info: PeerInfo,
    pub(crate) origin: Origin,
    pub(crate) link: Arc<Link>,
    pub(crate) context: OnceLock<Box<dyn Any + Send + Sync>>,
    /// Found at the first question.
    pub(crate) user: OnceLock<Option<u32>>,
}

/// What is known of a connection when it is accepted.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) listener: Arc<str>,
    pub(crate) since: Instant,
    pub(crate) address: PeerAddress,
    pub(crate) credentials: Option<Credentials>,
    /// Our end of a TCP connection.
    pub(crate) own_address: Option<SocketAddr>,
}

impl Peer {
    /// A number no other connection of this process has or had.
    pub fn id(&self) -> u64 {
        self.link.id
    }

    /// The name of the listener it came through.
    pub fn listener(&self) -> &Arc<str> {
        &self.origin.listener
    }

    /// When it was accepted.
    pub fn connected_at(&self) -> Instant {
        self.origin.since
    }

    /// Where it connected from.
    pub fn address(&self) -> &PeerAddress {
        &self.origin.address
    }

    /// Whose process it is; `None` over TCP.
    pub fn credentials(&self) -> Option<Credentials> {
        self.origin.credentials
    }

    /// The user whose process it is, if that is one of this machine: on a local socket by its
    /// [credentials](Self::credentials), over TCP by the kernel's list of sockets. The kernel is
    /// asked once per connection.
    ///
    /// For a connection that another local process passes on (a proxy, a tunnel) it is the user
    /// of that process.
    ///
    /// Reads files: not for async threads.
    pub fn local_user(&self) -> Option<u32> {
        let ask = || match (&self.origin.address, self.origin.own_address) {
            (PeerAddress::Tcp(peer), Some(own)) => tcp_user::user_of(*peer, own),
            _ => None,
        };
        match self.origin.credentials {
            Some(credentials) => Some(credentials.uid),
            None => *self.user.get_or_init(ask),
        }
    }

    /// Who it proved to be; `None` without PLAIN and CURVE.
    pub fn principal(&self) -> Option<&Principal> {
        self.info.principal.as_ref()
    }

    /// Its socket type. A [`Req`](SocketType::Req) peer puts an empty frame before
    /// its request, visible to the handler, and wants it back before the reply.
    pub fn socket_type(&self) -> SocketType {
        self.info.socket_type
    }

    /// The identity it chose; not unique, and empty unless it set one.
    pub fn identity(&self) -> &Bytes {
        &self.info.identity
    }

    /// Queues a message that answers no request, in order with other calls of this.
    ///
    /// # Errors
    /// [`SendError::Full`] when the peer has too much waiting, [`SendError::Closed`]
    /// when it is gone; the message is dropped in both cases.
    pub fn try_send(&self, frames: Frames) -> Result<(), SendError> {
        self.link.push(frames)
    }

    /// Closes the connection once requests in flight are answered.
    pub fn close(&self) {
        self.link.ask(Ask::HANDLER);
    }

    /// What the handler keeps with this connection, made at the first call. It lives as long
    /// as the peer. `None` if something of another type is kept already.
    pub fn context<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Option<&T> {
        let context = self.context.get_or_init(|| Box::new(make()));
        context.downcast_ref()
    }

    /// Whether the connection has ended or is ending.
    pub fn is_closed(&self) -> bool {
        self.link.closed.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("id", &self.id())
            .field("listener", &self.origin.listener)
            .field("address", &self.origin.address)
            .field("credentials", &self.origin.credentials)
            .field("info", &self.info)
            .finish()
    }
}

/// What others may ask of a connection's task.
pub(crate) struct Ask;

impl Ask {
    pub(crate) const NOTHING: usize = 0;
    pub(crate) const HANDLER: usize = 1;
    pub(crate) const SHUTDOWN: usize = 2;
}

/// The way from other tasks to a connection's own.
pub(crate) struct Link {
    pub(crate) id: u64,
    pub(crate) waker: AtomicWaker,
    asked: AtomicUsize,
    closed: AtomicBool,
    /// Whether `pushes` may be non-empty: spares the task the lock on every turn.
    pushed: AtomicBool,
    pushes: Mutex<Pushes>,
    max_bytes: usize,
    max_messages: usize,
    stats: Arc<Stats>,
}

#[derive(Default)]
struct Pushes {
    messages: VecDeque<Frames>,
    bytes: usize,
}

impl Link {
    pub(crate) fn new(id: u64, max_bytes: usize, max_messages: usize, stats: Arc<Stats>) -> Self {
        Self {
            id,
            waker: AtomicWaker::new(),
            asked: AtomicUsize::new(Ask::NOTHING),
            closed: AtomicBool::new(false),
            pushed: AtomicBool::new(false),
            pushes: Mutex::default(),
            max_bytes,
            max_messages,
            stats,
        }
    }

    fn push(&self, frames: Frames) -> Result<(), SendError> {
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        {
            let mut pushes = self.pushes.lock();
            // Read under the lock that `close` takes: nothing is queued after it.
            if self.closed.load(Ordering::Acquire) {
                return Err(SendError::Closed);
            }
            // A message over the bound by itself is let into an empty queue.
            let over = pushes.bytes.saturating_add(bytes) > self.max_bytes;
            if pushes.messages.len() >= self.max_messages || (over && !pushes.messages.is_empty()) {
                add(&self.stats.pushes_refused, 1);
                return Err(SendError::Full);
            }
            pushes.bytes += bytes;
            pushes.messages.push_back(frames);
            self.pushed.store(true, Ordering::Release);
        }
        self.waker.wake();
        Ok(())
    }

    /// The next pushed message.
    pub(crate) fn pop(&self) -> Option<Frames> {
        if !self.pushed.load(Ordering::Acquire) {
            return None;
        }
        let mut pushes = self.pushes.lock();
        let frames = pushes.messages.pop_front();
        match &frames {
            Some(frames) => pushes.bytes -= frames.iter().map(Bytes::len).sum::<usize>(),
            None => self.pushed.store(false, Ordering::Release),
        }
        frames
    }

    /// Takes no further pushes; those queued stay.
    pub(crate) fn close(&self) {
        let _pushes = self.pushes.lock();
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn ask(&self, what: usize) {
        self.asked.fetch_max(what, Ordering::AcqRel);
        self.waker.wake();
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::Acquire)
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

    #[test]
    fn pushes_are_bounded_by_bytes_and_messages_and_end_with_the_link() {
        let stats = Arc::new(Stats::default());
        let link = Link::new(1, 10, 3, Arc::clone(&stats));
        let message = |len| vec![Bytes::from(vec![0; len])];
        assert_eq!(link.push(message(6)), Ok(()));
        assert_eq!(link.push(message(5)), Err(SendError::Full));
        assert_eq!(link.push(message(4)), Ok(()));
        assert_eq!(link.push(message(0)), Ok(()));
        assert_eq!(link.push(message(0)), Err(SendError::Full));
        assert_eq!(link.pop(), Some(message(6)));
        assert_eq!(link.push(message(6)), Ok(()));
        link.close();
        assert_eq!(link.push(message(0)), Err(SendError::Closed));
        assert_eq!(
            [link.pop(), link.pop(), link.pop(), link.pop()],
            [Some(message(4)), Some(message(0)), Some(message(6)), None]
        );
        assert_eq!(stats.pushes_refused(), 2);
    }

    #[test]
    fn a_push_over_the_bound_by_itself_gets_through_an_empty_queue() {
        let link = Link::new(1, 10, 3, Arc::default());
        assert_eq!(link.push(vec![Bytes::from(vec![0; 11])]), Ok(()));
        assert_eq!(link.push(vec![Bytes::new()]), Err(SendError::Full));
    }
}
