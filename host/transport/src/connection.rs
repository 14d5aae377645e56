//! One connection as a state machine that its task polls.
//!
//! All state lives in [`Connection`] and none in a future's stack, so nothing is
//! lost when a poll ends half-way. A turn is: handle what has arrived, poll the
//! requests in flight, write, read, and so on until something must be waited for.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep};
use tokio_util::io::poll_read_buf;

use crate::budget::Account;
use crate::peer::{Ask, Link, Origin, Peer, PeerAddress};
use crate::server::{Handler, Lane, Outcome, Shared, Turn, wake_after_sockets};
use crate::stats::{DisconnectReason, add};
use crate::zmtp::{Event, Frames, Mechanism, Message, Outbound, ProtocolError, Session};

/// How long a connection that we close is still read, so that the last reply
/// arrives: closing with unread input would make the kernel send a reset, which
/// discards what the peer has not read yet.
pub(crate) const LINGER: Duration = Duration::from_millis(500);
/// Chunks handed to one vectored write.
const WRITE_CHUNKS: usize = 32;
/// Bytes read before other connections get their turn.
const READ_BYTES_PER_TURN: usize = 1 << 20;
/// Bytes of one read where a turn is limited: the kernel gives the core to nobody else while it
/// copies them.
const READ_BYTES_SHARED: usize = 64 << 10;
/// A timer must have a deadline; nothing is due this far off.
const FAR: Duration = Duration::from_secs(3600);

/// A socket that another runtime can take over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + Sized + 'static {
    /// Leaves its runtime for the one at hand.
    fn moved(self) -> io::Result<Self>;
}

impl Stream for TcpStream {
    fn moved(self) -> io::Result<Self> {
        Self::from_std(self.into_std()?)
    }
}

impl Stream for UnixStream {
    fn moved(self) -> io::Result<Self> {
        Self::from_std(self.into_std()?)
    }
}

/// Why a connection no longer runs in a task.
pub(crate) enum Exit {
    /// It is to go on in this lane.
    Moves(Lane),
    /// It is over.
    Ended(DisconnectReason),
}

pub(crate) struct Connection<H: Handler, S> {
    io: S,
    lane: Lane,
    shared: Arc<Shared<H>>,
    link: Arc<Link>,
    origin: Origin,
    peer: Option<Arc<Peer>>,
    session: Session,
    out: Outbound,
    in_flight: FuturesUnordered<InFlight>,
    in_flight_bytes: usize,
    account: Account,
    /// What the turn at hand may take.
    allowance: Turn,
    /// Whether the handler has not let the next turn begin yet.
    waits_for_turn: bool,
    /// Whether the handler was told that the next turn is wanted.
    wants_turn: bool,
    phase: Phase,
    timer: Pin<Box<Sleep>>,
    clock: Clock,
}

enum Phase {
    /// Reading and writing.
    Open,
    /// Not reading; requests in flight finish and replies go out until `until`.
    Draining {
        reason: DisconnectReason,
        until: Instant,
        /// Whether we close first, and thus read on for [`LINGER`].
        linger: bool,
        /// Whether writing has failed.
        deaf: bool,
    },
    /// Everything is written and our side is shut; input is thrown away.
    Lingering {
        reason: DisconnectReason,
        until: Instant,
    },
}

/// When things happened that a time limit counts from.
struct Clock {
    handshake_until: Instant,
    received: Instant,
    /// Whether the heartbeat interval has passed since `received`, and been acted on.
    quiet: bool,
    /// The silence after which the peer itself asked to be dropped.
    ttl: Option<Duration>,
    /// Since when the peer has accepted no byte of what waits for it.
    stalled: Option<Instant>,
    /// When the message now arriving began.
    message: Option<Instant>,
    /// Whether reading was held back, so that the peer's silence is our doing.
    paused: bool,
}

/// Why handling messages stopped.
enum Stop {
    /// The next message is not complete.
    NeedBytes,
    /// Replies or requests in flight are at their bound.
    Blocked,
    /// Other connections are due.
    TurnOver,
}

struct InFlight {
    reply: Pin<Box<dyn Future<Output = Option<Frames>> + Send>>,
    bytes: usize,
}

impl Future for InFlight {
    type Output = (Option<Frames>, usize);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let reply = ready!(self.reply.as_mut().poll(cx));
        Poll::Ready((reply, self.bytes))
    }
}

impl<H: Handler, S: Stream> Connection<H, S> {
    pub(crate) fn new(
        io: S,
        shared: Arc<Shared<H>>,
        link: Arc<Link>,
        origin: Origin,
        mechanism: Mechanism,
        account: Account,
    ) -> Self {
        let now = Instant::now();
        let mut out = Outbound::default();
        let session = Session::accept(mechanism, shared.config.limits, &mut out);
        let handshake_until = now + shared.config.handshake_timeout;
        Self {
            io,
            lane: Lane::Main,
            link,
            origin,
            peer: None,
            session,
            out,
            in_flight: FuturesUnordered::new(),
            in_flight_bytes: 0,
            account,
            allowance: Turn::UNLIMITED,
            waits_for_turn: false,
            wants_turn: false,
            phase: Phase::Open,
            timer: Box::pin(tokio::time::sleep_until(handshake_until)),
            clock: Clock {
                handshake_until,
                received: now,
                quiet: false,
                ttl: None,
                stalled: None,
                message: None,
                paused: false,
            },
            shared,
        }
    }

    /// Goes on in another lane, on whose runtime this is called.
    pub(crate) fn moved_to(self, lane: Lane) -> io::Result<Self> {
        let timer = Box::pin(tokio::time::sleep_until(self.timer.deadline()));
        let io = self.io.moved()?;
        Ok(Self {
            io,
            lane,
            timer,
            ..self
        })
    }

    pub(crate) fn address(&self) -> &PeerAddress {
        &self.origin.address
    }

    /// Runs the connection to its end, or until it is to go on elsewhere. `known` is set as soon
    /// as the handler has been told of the peer.
    pub(crate) async fn run(&mut self, known: &mut Option<Arc<Peer>>) -> Exit {
        poll_fn(|cx| {
            // A panic of the handler ends this connection and no other.
            let turn = std::panic::catch_unwind(AssertUnwindSafe(|| self.poll(cx, known)));
            turn.unwrap_or(Poll::Ready(Exit::Ended(DisconnectReason::HandlerPanicked)))
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>, known: &mut Option<Arc<Peer>>) -> Poll<Exit> {
        // Before the flags are read, or a wake between the two would be lost.
        self.link.waker.register(cx.waker());
        let now = Instant::now();
        match self.link.asked() {
            Ask::HANDLER => self.drain(DisconnectReason::Handler, now),
            Ask::SHUTDOWN => self.drain(DisconnectReason::Shutdown, now),
            _ => {}
        }
        self.waits_for_turn = false;
        self.allowance = Turn::UNLIMITED;
        if !self.is_open()
            && std::mem::take(&mut self.wants_turn)
            && let Some(peer) = &self.peer
        {
            // Or it would keep others from the turn that it would get and not take.
            let handler = &self.shared.handler;
            handler.turn_over(peer, Turn::default(), false);
        }
        let peer = self.peer.clone().filter(|_| self.is_open());
        if let Some(peer) = &peer {
            match self.shared.handler.poll_turn(peer, cx) {
                Poll::Ready(Turn { lane, .. }) if lane != self.lane => {
                    // The turn is taken there.
                    self.wants_turn = true;
                    return Poll::Ready(Exit::Moves(lane));
                }
                Poll::Ready(allowance) => {
                    self.allowance = Turn {
                        messages: allowance.messages.max(1),
                        bytes: allowance.bytes.max(1),
                        ..allowance
                    };
                }
                Poll::Pending => {
                    self.waits_for_turn = true;
                    self.wants_turn = true;
                    self.note_pause(now);
                    return self.poll_timer(cx, now).map(Exit::Ended);
                }
            }
        }
        self.wants_turn = false;
        let mut used = Turn::default();
        let outcome = self.work(cx, known, &mut used, now);
        if let Some(peer) = &peer {
            let handler = &self.shared.handler;
            handler.turn_over(peer, used, self.wants_turn);
        }
        outcome.map(Exit::Ended)
    }

    /// One turn: gives messages, writes and reads until something must be waited for.
    fn work(
        &mut self,
        cx: &mut Context<'_>,
        known: &mut Option<Arc<Peer>>,
        used: &mut Turn,
        now: Instant,
    ) -> Poll<DisconnectReason> {
        // Of what was given. Reading ahead costs the peer too, but is another matter.
        let mut handled = Turn::default();
        loop {
            if let Phase::Lingering { reason, .. } = self.phase {
                return self.poll_linger(cx, reason);
            }
            let stop = self.handle_messages(known, &mut handled, now);
            used.messages = handled.messages;
            self.poll_in_flight(cx);
            if self.poll_write(cx, now).is_ready() && self.in_flight.is_empty() {
                match self.phase {
                    Phase::Draining {
                        reason,
                        linger: true,
                        deaf: false,
                        ..
                    } => {
                        let until = now + LINGER;
                        self.phase = Phase::Lingering { reason, until };
                        continue;
                    }
                    Phase::Draining { reason, .. } => return Poll::Ready(reason),
                    _ => {}
                }
            }
            match stop {
                Stop::TurnOver => {
                    self.come_back(cx);
                    break;
                }
                // Writing or a finished request may just have made room.
                Stop::Blocked if self.may_handle() => continue,
                Stop::Blocked => break,
                Stop::NeedBytes => {}
            }
            if !self.may_handle() {
                break;
            }
            if used.bytes >= READ_BYTES_PER_TURN.min(self.allowance.bytes) {
                self.come_back(cx);
                break;
            }
            match self.poll_read(cx, now) {
                Poll::Pending => break,
                Poll::Ready(count) => used.bytes += count,
            }
        }
        self.note_pause(now);
        self.poll_timer(cx, now)
    }

    /// Asks for another turn.
    fn come_back(&mut self, cx: &mut Context<'_>) {
        self.wants_turn = true;
        if self.allowance == Turn::UNLIMITED {
            cx.waker().wake_by_ref();
            return;
        }
        // Those whose turn this one made room for come from there.
        wake_after_sockets(cx.waker());
    }

    /// Ends the connection in order: what is in flight or queued still goes out.
    fn drain(&mut self, reason: DisconnectReason, now: Instant) {
        if let Phase::Open = self.phase {
            self.link.close();
            let linger = !matches!(
                reason,
                DisconnectReason::PeerClosed | DisconnectReason::Io(_)
            );
            self.phase = Phase::Draining {
                reason,
                until: now + self.shared.config.drain_grace,
                linger,
                deaf: false,
            };
        }
    }

    /// Reading or writing failed: nothing can go out any more.
    fn broken(&mut self, error: &io::Error, now: Instant) {
        self.drain(DisconnectReason::Io(error.kind()), now);
        self.fall_silent();
    }

    /// Writes nothing more; requests in flight may still finish.
    fn fall_silent(&mut self) {
        if let Phase::Draining { deaf, .. } = &mut self.phase {
            *deaf = true;
        }
        self.out.clear();
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Whether there is room for what the next message may cause.
    fn may_handle(&self) -> bool {
        let config = &self.shared.config;
        matches!(self.phase, Phase::Open)
            && self.in_flight.len() < config.max_in_flight
            // Of small ones the turns are the measure, and their futures wake us when they end.
            && self.in_flight_bytes <= self.allowance.in_flight_bytes
            && self.has_outbound_room()
    }

    fn has_outbound_room(&self) -> bool {
        let config = &self.shared.config;
        self.out.queued_bytes() < config.max_outbound_bytes
            && self.out.queued_messages() < config.max_outbound_messages
    }

    fn handle_messages(
        &mut self,
        known: &mut Option<Arc<Peer>>,
        handled: &mut Turn,
        now: Instant,
    ) -> Stop {
        let mut messages = 0;
        let stop = loop {
            if !self.may_handle() {
                break Stop::Blocked;
            }
            let most = self.shared.config.messages_per_turn;
            if handled.messages >= most.min(self.allowance.messages)
                || handled.bytes >= self.allowance.bytes
            {
                break Stop::TurnOver;
            }
            let event = match self.session.next(&mut self.out) {
                Ok(Some(event)) => event,
                Ok(None) => break Stop::NeedBytes,
                Err(error) => {
                    self.protocol_error(error, now);
                    break Stop::Blocked;
                }
            };
            handled.messages += 1;
            match (event, &self.peer) {
                (Event::Message(message), Some(peer)) => {
                    messages += 1;
                    let peer = Arc::clone(peer);
                    handled.bytes += message.held_bytes();
                    self.handle(&peer, message, now);
                }
                (Event::Heartbeat(ttl), _) => self.clock.ttl = ttl.or(self.clock.ttl),
                (Event::Ready(info), None) => {
                    let peer = Arc::new(Peer {
                        info,
                        origin: self.origin.clone(),
                        link: Arc::clone(&self.link),
                        context: std::sync::OnceLock::new(),
                        user: std::sync::OnceLock::new(),
                    });
                    self.peer = Some(Arc::clone(&peer));
                    *known = Some(Arc::clone(&peer));
                    self.shared.handler.connected(&peer);
                    // Its first message needs a turn as all others do.
                    self.allowance.messages = handled.messages;
                }
                // The session gives `Ready` once and before all messages.
                (Event::Ready(_), Some(_)) | (Event::Message(_), None) => {}
            }
        };
        if messages > 0 {
            add(&self.shared.stats.messages_in, messages);
            // Whatever is incomplete now began after those. Commands do not count:
            // they may stand between the frames of a message and would prolong it.
            self.clock.message = None;
        }
        self.release();
        if !self.session.is_mid_message() {
            self.clock.message = None;
        } else if self.clock.message.is_none() {
            self.clock.message = Some(now);
        }
        stop
    }

    fn handle(&mut self, peer: &Arc<Peer>, message: Message, now: Instant) {
        let too_large = matches!(message, Message::TooLarge { .. });
        let bytes = message.held_bytes();
        match self.shared.handler.message(peer, message) {
            Outcome::Reply(frames) => self.out.push_message(frames),
            Outcome::Later(reply) => {
                // A small frame may keep the whole buffer it was read into.
                let bytes = bytes.max(self.session.decoder().read_bytes());
                self.in_flight_bytes += bytes;
                self.in_flight.push(InFlight { reply, bytes });
            }
            Outcome::Nothing => {}
            Outcome::Close => self.drain(DisconnectReason::Handler, now),
        }
        if too_large {
            add(&self.shared.stats.too_large, 1);
            if self.session.is_stopped() {
                self.drain(DisconnectReason::MessageTooLarge, now);
            }
        }
    }

    fn protocol_error(&mut self, error: ProtocolError, now: Instant) {
        let reason = if self.peer.is_some() {
            DisconnectReason::Protocol(error)
        } else {
            let Origin {
                address, listener, ..
            } = &self.origin;
            self.shared.handler.refused(address, listener, error);
            DisconnectReason::HandshakeFailed(error)
        };
        self.drain(reason, now);
    }

    fn poll_in_flight(&mut self, cx: &mut Context<'_>) {
        if self.in_flight.is_empty() {
            return;
        }
        while let Poll::Ready(Some((reply, bytes))) = self.in_flight.poll_next_unpin(cx) {
            self.in_flight_bytes -= bytes;
            if let Some(frames) = reply {
                self.out.push_message(frames);
            }
        }
        self.release();
    }

    /// Bytes that must be covered before the next read. What it will allocate is
    /// part of them, or a connection would give back at once what it waits for.
    fn wanted_bytes(&mut self) -> usize {
        let held = self.session.held_bytes() + self.in_flight_bytes;
        held + self.session.decoder().next_growth()
    }

    fn release(&mut self) {
        let wanted = self.wanted_bytes();
        self.account.release(wanted);
    }

    /// Writes until nothing waits any more (ready) or the peer must read first.
    fn poll_write(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        let (mut bytes, mut messages) = (0, 0);
        let result = loop {
            while self.has_outbound_room()
                && let Some(frames) = self.link.pop()
            {
                self.out.push_message(frames);
            }
            if let Phase::Draining { deaf: true, .. } = self.phase {
                self.out.clear();
            }
            if self.out.is_empty() {
                break Poll::Ready(Ok(()));
            }
            let mut chunks = [IoSlice::new(&[]); WRITE_CHUNKS];
            let used = self.out.chunks(&mut chunks);
            match Pin::new(&mut self.io).poll_write_vectored(cx, &chunks[..used]) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => {
                    bytes += count as u64;
                    messages += self.out.advance(count);
                }
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
            }
        };
        if bytes > 0 {
            self.clock.stalled = None;
            add(&self.shared.stats.bytes_out, bytes);
            add(&self.shared.stats.messages_out, messages);
        }
        match result {
            Poll::Pending => {
                self.clock.stalled.get_or_insert(now);
                Poll::Pending
            }
            Poll::Ready(result) => {
                self.clock.stalled = None;
                if let Err(error) = result {
                    self.broken(&error, now);
                }
                Poll::Ready(())
            }
        }
    }

    /// Reads once; ready with the bytes read, 0 when the connection is at its end.
    fn poll_read(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<usize> {
        let wanted = self.wanted_bytes();
        let waited = self.account.is_waiting();
        if self.account.poll_cover(cx, wanted).is_pending() {
            if !waited {
                add(&self.shared.stats.budget_waits, 1);
            }
            return Poll::Pending;
        }
        let mut space = self.session.decoder().space();
        if self.allowance.bytes != usize::MAX {
            space.set_limit(space.remaining_mut().min(READ_BYTES_SHARED));
        }
        let room = space.remaining_mut();
        match ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut space)) {
            Ok(0) => {
                self.drain(DisconnectReason::PeerClosed, now);
                Poll::Ready(0)
            }
            Ok(count) => {
                self.session.decoder().note_read(count, room);
                self.clock.received = now;
                self.clock.quiet = false;
                add(&self.shared.stats.bytes_in, count as u64);
                Poll::Ready(count)
            }
            Err(error) => {
                self.broken(&error, now);
                Poll::Ready(0)
            }
        }
    }

    fn poll_linger(
        &mut self,
        cx: &mut Context<'_>,
        reason: DisconnectReason,
    ) -> Poll<DisconnectReason> {
        let Phase::Lingering { until, .. } = self.phase else {
            return Poll::Ready(reason);
        };
        if self.timer.deadline() != until {
            self.timer.as_mut().reset(until);
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(reason);
        }
        // Shutting down again is harmless, and is how a pending one goes on.
        if matches!(
            Pin::new(&mut self.io).poll_shutdown(cx),
            Poll::Ready(Err(_))
        ) {
            return Poll::Ready(reason);
        }
        let mut scratch = [0; 8 << 10];
        loop {
            let mut chunk = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.io).poll_read(cx, &mut chunk)) {
                Ok(()) if !chunk.filled().is_empty() => {}
                _ => return Poll::Ready(reason),
            }
        }
    }

    /// Keeps time limits on the peer from counting while we do not read.
    fn note_pause(&mut self, now: Instant) {
        let paused = self.account.is_waiting() || self.waits_for_turn || !self.may_handle();
        if paused || self.clock.paused {
            self.clock.received = now;
            self.clock.quiet = false;
            self.clock.message = self.clock.message.map(|_| now);
        }
        self.clock.paused = paused;
    }

    /// Acts on what is due and waits for what is due next.
    fn poll_timer(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<DisconnectReason> {
        loop {
            let due = match self.next_due() {
                (at, Some(reason)) if at <= now => {
                    if matches!(self.phase, Phase::Open) && !self.in_flight.is_empty() {
                        self.drain(reason, now);
                        self.fall_silent();
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    return Poll::Ready(reason);
                }
                (at, None) if at <= now => {
                    self.quiet(now);
                    // Its PING may find the socket full, which starts another limit.
                    let _ = self.poll_write(cx, now);
                    continue;
                }
                (at, _) => at,
            };
            // A timer that fires early only looks again, so moving a deadline back is free.
            if due < self.timer.deadline() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timer.as_mut().reset(due);
        }
    }

    /// The next deadline, and the reason for which the connection ends at it; no
    /// reason stands for the heartbeat interval.
    fn next_due(&self) -> (Instant, Option<DisconnectReason>) {
        type Reason = DisconnectReason;
        let config = &self.shared.config;
        let clock = &self.clock;
        let mut next = (clock.received + FAR, None);
        let mut at = |instant: Instant, reason: Option<Reason>| {
            if instant < next.0 {
                next = (instant, reason);
            }
        };
        match self.phase {
            Phase::Draining { until, reason, .. } | Phase::Lingering { until, reason } => {
                return (until, Some(reason));
            }
            Phase::Open => {}
        }
        if let Some(since) = clock.stalled {
            at(since + config.slow_reader_grace, Some(Reason::SlowReader));
        }
        if self.peer.is_none() {
            at(clock.handshake_until, Some(Reason::HandshakeTimeout));
        }
        if clock.paused {
            return next;
        }
        if let Some(since) = clock.message {
            at(since + config.message_timeout, Some(Reason::MessageTimeout));
        }
        if let Some(peer) = &self.peer {
            if let Some(ttl) = clock.ttl {
                at(clock.received + ttl, Some(Reason::HeartbeatTimeout));
            }
            if !clock.quiet {
                at(clock.received + config.heartbeat_interval, None);
            } else if peer.info.heartbeats {
                let silence = config.heartbeat_timeout;
                at(clock.received + silence, Some(Reason::HeartbeatTimeout));
            }
        }
        next
    }

    /// The peer has sent nothing for the heartbeat interval.
    fn quiet(&mut self, now: Instant) {
        let Some(peer) = &self.peer else {
            // Only `FAR` can have passed; count it anew.
            self.clock.received = now;
            return;
        };
        if self.clock.quiet {
            self.clock.received = now;
            return;
        }
        self.clock.quiet = true;
        if peer.info.heartbeats {
            self.session.ping(&mut self.out);
        }
        self.session.decoder().shrink();
        self.out.shrink();
    }
}
