//! Accepts connections and ends them in order.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::budget::{Account, Budget};
use crate::config::{Config, ConfigError};
use crate::connection::{Connection, Exit, LINGER, Stream};
use crate::listener::{Accepted, Listener, tune_tcp};
use crate::log_limiter::LogLimiter;
use crate::peer::{Ask, Link, Origin, Peer, PeerAddress};
use crate::stats::{DisconnectReason, Stats, add};
use crate::zmtp::{Frames, Mechanism, Message, ProtocolError};

/// First and last wait after an accept that failed for want of something.
const ACCEPT_BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Longest time between two turns of an idle accept loop, by which it shows that it runs.
const ACCEPT_TURN: Duration = Duration::from_millis(250);

/// On which of a server's runtimes a connection works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lane {
    /// That on which the server runs.
    #[default]
    Main,
    /// That of [`Server::yielding_on`], whose threads give way to others. Without one, the same.
    Yielding,
}

/// What a connection may do in one turn, or did in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    /// Messages and commands.
    pub messages: usize,
    /// Bytes: of messages for what it may do, read from the peer for what it did. The message or
    /// the read that goes over them is the last one.
    pub bytes: usize,
    /// Bytes of its own requests in flight at which the connection takes no more of them; one that
    /// has none in flight may always take one. Of no meaning for what it did.
    pub in_flight_bytes: usize,
    /// Where the connection works from now on: it takes its turn there. Of no meaning for what it
    /// did.
    pub lane: Lane,
}

impl Turn {
    /// As much as the server's own settings let it.
    pub const UNLIMITED: Self = Self {
        messages: usize::MAX,
        bytes: usize::MAX,
        in_flight_bytes: usize::MAX,
        lane: Lane::Main,
    };
}

/// Wakes a task once the runtime has looked at its sockets. As long as it has something to run it does
/// so only now and then: a task that is woken at once goes on before requests that came meanwhile are
/// seen.
pub fn wake_after_sockets(waker: &Waker) {
    let mut yielding = std::pin::pin!(tokio::task::yield_now());
    let polled = yielding.as_mut().poll(&mut Context::from_waker(waker));
    if polled.is_ready() {
        waker.wake_by_ref();
    }
}

/// What a server does with messages.
///
/// All calls for one peer come from its connection's task, one after the other:
/// `connected`, then any number of `message`, then `disconnected`. They must not
/// block; what takes time goes into [`Outcome::Later`].
pub trait Handler: Send + Sync + 'static {
    /// The handshake of a connection failed. It is no peer, and nothing else is told of it.
    fn refused(&self, address: &PeerAddress, listener: &str, error: ProtocolError) {
        let _ = (address, listener, error);
    }

    /// A peer completed its handshake.
    fn connected(&self, peer: &Arc<Peer>) {
        let _ = peer;
    }

    /// A message came. Called in the order of arrival.
    fn message(&self, peer: &Arc<Peer>, message: Message) -> Outcome;

    /// Whether the peer's connection may work now, and how much before others are due. Asked at
    /// the begin of each of its turns, in which it reads, gives messages and writes. While it is
    /// pending all of that rests, so that the peer's bytes stay with the peer; it must wake `cx`
    /// then. Asked once more, about the same turn, by a connection that has changed its
    /// [lane](Turn::lane) for it.
    fn poll_turn(&self, peer: &Arc<Peer>, cx: &mut Context<'_>) -> Poll<Turn> {
        let _ = (peer, cx);
        Poll::Ready(Turn::UNLIMITED)
    }

    /// The turn that [`poll_turn`](Self::poll_turn) let begin is over, and this is what came of
    /// it. `wants_more`: what it might have took an end, so the next one is asked for at once.
    /// Also called, with nothing used, when a connection that waits for a turn ends and takes
    /// none any more. Not called for a turn that a panic of the handler ends.
    fn turn_over(&self, peer: &Arc<Peer>, used: Turn, wants_more: bool) {
        let _ = (peer, used, wants_more);
    }

    /// The connection is gone, and its last [`Outcome::Later`] has ended or was dropped.
    fn disconnected(&self, peer: &Arc<Peer>, reason: DisconnectReason) {
        let _ = (peer, reason);
    }
}

impl<H: Handler> Handler for Arc<H> {
    fn refused(&self, address: &PeerAddress, listener: &str, error: ProtocolError) {
        (**self).refused(address, listener, error);
    }

    fn connected(&self, peer: &Arc<Peer>) {
        (**self).connected(peer);
    }

    fn message(&self, peer: &Arc<Peer>, message: Message) -> Outcome {
        (**self).message(peer, message)
    }

    fn poll_turn(&self, peer: &Arc<Peer>, cx: &mut Context<'_>) -> Poll<Turn> {
        (**self).poll_turn(peer, cx)
    }

    fn turn_over(&self, peer: &Arc<Peer>, used: Turn, wants_more: bool) {
        (**self).turn_over(peer, used, wants_more);
    }

    fn disconnected(&self, peer: &Arc<Peer>, reason: DisconnectReason) {
        (**self).disconnected(peer, reason);
    }
}

/// What becomes of a message.
pub enum Outcome {
    /// This is the reply.
    Reply(Frames),
    /// The reply comes when the future ends; replies overtake each other. The
    /// future runs on the connection's task, so it must not block either. If the
    /// peer goes away it gets `drain_grace` to end and is then dropped.
    Later(Pin<Box<dyn Future<Output = Option<Frames>> + Send>>),
    /// There is no reply.
    Nothing,
    /// The connection is closed once what is queued and in flight has gone out.
    Close,
}

/// A ROUTER-like server over any number of listeners.
pub struct Server<H> {
    shared: Arc<Shared<H>>,
    yielding: Option<Handle>,
}

/// What all connections of a server share.
pub(crate) struct Shared<H> {
    pub(crate) handler: H,
    pub(crate) config: Config,
    pub(crate) stats: Arc<Stats>,
    budget: Arc<Budget>,
    next_id: AtomicU64,
    links: Mutex<Links>,
    refusals: LogLimiter,
    disconnects: LogLimiter,
}

/// The connections of a server.
#[derive(Default)]
struct Links {
    open: HashMap<u64, Arc<Link>>,
    /// Whether the server stops and takes no more.
    stopping: bool,
}

impl<H: Handler> Server<H> {
    /// A server that is not started yet.
    ///
    /// # Errors
    /// [`ConfigError`] when the settings contradict each other.
    pub fn new(handler: H, config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let budget = Arc::new(Budget::new(config.max_inbound_bytes));
        Ok(Self {
            shared: Arc::new(Shared {
                handler,
                config,
                stats: Arc::default(),
                budget,
                next_id: AtomicU64::new(1),
                links: Mutex::default(),
                refusals: LogLimiter::default(),
                disconnects: LogLimiter::default(),
            }),
            yielding: None,
        })
    }

    /// With a runtime for connections in the [yielding lane](Lane::Yielding).
    #[must_use]
    pub fn yielding_on(mut self, runtime: Handle) -> Self {
        self.yielding = Some(runtime);
        self
    }

    /// Its counters, which may be kept and read at any time.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.shared.stats)
    }

    /// Serves until `shutdown` ends; then accepts no more, closes the listeners
    /// (and removes their ipc files), stops reading, gives requests in flight
    /// `drain_grace` to finish and replies to be read, and closes every connection.
    ///
    /// Dropped before that, it asks every connection to end in the same way but
    /// does not wait for them.
    pub async fn serve(self, listeners: Vec<Listener>, shutdown: impl Future<Output = ()>) {
        let main = Handle::current();
        let lanes = Arc::new(Lanes {
            tasks: TaskTracker::new(),
            yielding: self.yielding.unwrap_or_else(|| main.clone()),
            main,
        });
        let ending = EndOnDrop(&self.shared);
        let mut accepting = JoinSet::new();
        for listener in listeners {
            let shared = Arc::clone(&self.shared);
            accepting.spawn(accept_from(listener, shared, Arc::clone(&lanes)));
        }
        shutdown.await;
        accepting.shutdown().await;
        drop(ending);
        lanes.tasks.close();
        // Connections end by themselves in this time; a handler that blocks does not,
        // and must not hold the shutdown up.
        let grace = self.shared.config.drain_grace + LINGER + Duration::from_secs(1);
        if tokio::time::timeout(grace, lanes.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                connections = lanes.tasks.len(),
                "connections outlived the drain grace; their handler may be blocking"
            );
        }
    }
}

/// Where connections' tasks run.
struct Lanes {
    tasks: TaskTracker,
    main: Handle,
    yielding: Handle,
}

impl Lanes {
    fn spawn(&self, lane: Lane, task: impl Future<Output = ()> + Send + 'static) {
        let runtime = match lane {
            Lane::Main => &self.main,
            Lane::Yielding => &self.yielding,
        };
        self.tasks.spawn_on(task, runtime);
    }
}

/// Asks all connections to end, also when `serve` is dropped half-way.
struct EndOnDrop<'a, H>(&'a Shared<H>);

impl<H> Drop for EndOnDrop<'_, H> {
    fn drop(&mut self) {
        let open: Vec<_> = {
            let mut links = self.0.links.lock();
            links.stopping = true;
            links.open.values().cloned().collect()
        };
        for link in open {
            link.ask(Ask::SHUTDOWN);
        }
    }
}

async fn accept_from<H: Handler>(listener: Listener, shared: Arc<Shared<H>>, lanes: Arc<Lanes>) {
    let mut backoff = ACCEPT_BACKOFF.0;
    loop {
        listener.count_turn();
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = tokio::time::sleep(ACCEPT_TURN) => continue,
        };
        match accepted {
            Ok((stream, origin)) => {
                backoff = ACCEPT_BACKOFF.0;
                let Some(admission) = Admission::new(&shared) else {
                    refuse(&shared, &origin);
                    continue;
                };
                let mechanism = listener.mechanism().clone();
                match stream {
                    Accepted::Tcp(stream) => {
                        tune_tcp(&stream, shared.config.tcp_user_timeout);
                        admission.start(stream, origin, mechanism, lanes.clone());
                    }
                    Accepted::Ipc(stream) => {
                        admission.start(stream, origin, mechanism, lanes.clone());
                    }
                }
            }
            Err(error) => {
                add(&shared.stats.accept_errors, 1);
                if is_about_one_connection(&error) {
                    continue;
                }
                if let Some(unsaid) = shared.refusals.turn() {
                    tracing::warn!(
                        endpoint = %listener.endpoint(),
                        %error,
                        unsaid,
                        "could not accept; trying again (raise the open file limit if it is too many open files)"
                    );
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF.1);
            }
        }
    }
}

/// Whether an accept failed because of the connection that it would have returned.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

fn refuse<H>(shared: &Shared<H>, origin: &Origin) {
    add(&shared.stats.refused, 1);
    if let Some(unsaid) = shared.refusals.turn() {
        tracing::warn!(
            peer = %origin.address,
            listener = %origin.listener,
            max_connections = shared.config.max_connections,
            unsaid,
            "refused a connection: max_connections are open"
        );
    }
}

/// A connection's place among `max_connections` and in the list of links.
struct Admission<H: Handler> {
    shared: Arc<Shared<H>>,
    link: Arc<Link>,
    /// Set once the handler knows the peer.
    peer: Option<Arc<Peer>>,
    reason: DisconnectReason,
}

impl<H: Handler> Admission<H> {
    fn new(shared: &Arc<Shared<H>>) -> Option<Self> {
        let mut links = shared.links.lock();
        if links.stopping || links.open.len() >= shared.config.max_connections {
            return None;
        }
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let config = &shared.config;
        let link = Arc::new(Link::new(
            id,
            config.max_push_bytes,
            config.max_push_messages,
            Arc::clone(&shared.stats),
        ));
        links.open.insert(id, Arc::clone(&link));
        add(&shared.stats.accepted, 1);
        add(&shared.stats.open, 1);
        Some(Self {
            shared: Arc::clone(shared),
            link,
            peer: None,
            // Only a runtime that is torn down ends the task with this.
            reason: DisconnectReason::Shutdown,
        })
    }

    /// Serves a connection in a task of its own.
    fn start<S: Stream>(self, stream: S, origin: Origin, mechanism: Mechanism, lanes: Arc<Lanes>) {
        let connection = Connection::new(
            stream,
            Arc::clone(&self.shared),
            Arc::clone(&self.link),
            origin,
            mechanism,
            Account::new(Arc::clone(&self.shared.budget)),
        );
        let tasks = Arc::clone(&lanes);
        tasks.spawn(Lane::Main, self.run(connection, lanes));
    }

    /// Serves it on the runtime at hand, to its end or until it is to be served on another one.
    async fn run<S: Stream>(mut self, mut connection: Connection<H, S>, lanes: Arc<Lanes>) {
        match connection.run(&mut self.peer).await {
            Exit::Moves(lane) => self.go_on(connection, lane, lanes),
            Exit::Ended(reason) => {
                let address = connection.address().clone();
                // Drops the futures in flight before the handler hears of the end.
                drop(connection);
                self.end(&address, reason);
            }
        }
    }

    fn go_on<S: Stream>(self, connection: Connection<H, S>, lane: Lane, lanes: Arc<Lanes>) {
        let tasks = Arc::clone(&lanes);
        let address = connection.address().clone();
        tasks.spawn(lane, async move {
            match connection.moved_to(lane) {
                Ok(connection) => self.run(connection, lanes).await,
                Err(error) => self.end(&address, DisconnectReason::Io(error.kind())),
            }
        });
    }

    fn end(mut self, address: &PeerAddress, reason: DisconnectReason) {
        self.reason = reason;
        self.log(address);
    }

    fn log(&self, address: &PeerAddress) {
        let (peer, reason) = (address, self.reason);
        tracing::debug!(%peer, %reason, "connection ended");
        let noteworthy = matches!(
            reason,
            DisconnectReason::HandshakeFailed(_)
                | DisconnectReason::Protocol(_)
                | DisconnectReason::MessageTooLarge
                | DisconnectReason::MessageTimeout
                | DisconnectReason::SlowReader
                | DisconnectReason::HandlerPanicked
        );
        if noteworthy && let Some(unsaid) = self.shared.disconnects.turn() {
            tracing::warn!(%peer, %reason, unsaid, "dropped a connection");
        }
    }
}

impl<H: Handler> Drop for Admission<H> {
    fn drop(&mut self) {
        self.link.close();
        self.shared.links.lock().open.remove(&self.link.id);
        self.shared.stats.open.fetch_sub(1, Ordering::Relaxed);
        self.shared.stats.count_disconnect(self.reason);
        if let Some(peer) = self.peer.take() {
            self.shared.handler.disconnected(&peer, self.reason);
        }
    }
}
