//! The mail between the server and one run of a plugin.
//!
//! Everything is bounded: a queue of calls, one rank at a time, one batch of events on its way.
//! A run that is asleep waits on these, without a thread of its own.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Code, EventBatch, MAX_NAME_BYTES, MAX_TIMERS, RankRequest, Refusal};

/// Calls that may wait for one plugin.
const MAX_WAITING_CALLS: usize = 64;

/// Why a call of a plugin's method has no payload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallFailure {
    /// There is no such plugin.
    #[error("no plugin serves `{0}`: its name would be what stands before a dot")]
    NoPlugin(String),
    /// The plugin serves no calls.
    #[error(
        "plugin `{0}` serves no calls: its manifest needs calls = true, which the server's [plugins] may take away"
    )]
    NotGranted(Arc<str>),
    /// The plugin does not run.
    #[error("plugin `{plugin}` does not run: it is {state}")]
    NotRunning {
        /// The plugin.
        plugin: Arc<str>,
        /// The name of its state.
        state: &'static str,
    },
    /// Too many calls wait for it.
    #[error("plugin `{0}` has {MAX_WAITING_CALLS} calls waiting: call less often")]
    Busy(Arc<str>),
    /// The payload is too long.
    #[error("the payload has {bytes} bytes: send at most {limit}")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// No reply came in time.
    #[error("plugin `{plugin}` gave no reply within its call_ms of {milliseconds} ms")]
    Timeout {
        /// The plugin.
        plugin: Arc<str>,
        /// Its limit.
        milliseconds: u64,
    },
    /// It ended before it replied.
    #[error("plugin `{0}` ended before it replied")]
    Ended(Arc<str>),
    /// It says that it failed, or gave no reply.
    #[error("{0}")]
    Failed(String),
}

/// Why a plugin's order is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RankFailure {
    /// No reply within `rank_ms`.
    Timeout,
    /// It trapped, or was ended, while it ranked.
    Trap,
    /// The reply is no JSON list of numbers, or the handler says that it failed.
    Garbage,
    /// The reply names a candidate that was not given.
    Foreign,
    /// The reply names a candidate twice.
    Duplicate,
    /// It returned without a reply, or has no handler for it.
    Missing,
    /// It is still busy with something else.
    Busy,
    /// It does not run.
    NotRunning,
}

impl RankFailure {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Timeout,
        Self::Trap,
        Self::Garbage,
        Self::Foreign,
        Self::Duplicate,
        Self::Missing,
        Self::Busy,
        Self::NotRunning,
    ];

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Trap => "trap",
            Self::Garbage => "garbage",
            Self::Foreign => "foreign",
            Self::Duplicate => "duplicate",
            Self::Missing => "missing",
            Self::Busy => "busy",
            Self::NotRunning => "not_running",
        }
    }
}

/// A call on its way.
#[derive(Debug)]
pub(crate) struct CallAsk {
    pub(crate) method: String,
    pub(crate) cache_salt: String,
    pub(crate) caller: &'static str,
    pub(crate) payload: Bytes,
    pub(crate) reply: oneshot::Sender<Result<Bytes, String>>,
}

/// Candidates on their way. Whoever waits for the order may not be async, so the reply is a
/// channel of the standard library that never blocks its sender.
#[derive(Debug)]
pub(crate) struct RankAsk {
    pub(crate) request: RankRequest,
    pub(crate) deadline: Duration,
    pub(crate) reply: std::sync::mpsc::SyncSender<Result<Vec<u32>, RankFailure>>,
    /// Free again when the plugin is done with it, however late.
    pub(crate) turn: RankTurn,
}

/// The one rank at a time.
#[derive(Debug)]
pub(crate) struct RankTurn(Arc<AtomicBool>);

impl Drop for RankTurn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The server's end: cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    // Boxed, because a queue keeps room for 32 of what it holds.
    calls: mpsc::Sender<Box<CallAsk>>,
    ranks: mpsc::Sender<Box<RankAsk>>,
    is_ranking: Arc<AtomicBool>,
}

impl Link {
    /// Hands a call over; `Err` with what becomes of it otherwise.
    pub(crate) fn call(&self, plugin: &Arc<str>, ask: CallAsk) -> Result<(), CallFailure> {
        self.calls
            .try_send(Box::new(ask))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => CallFailure::Busy(Arc::clone(plugin)),
                mpsc::error::TrySendError::Closed(_) => CallFailure::Ended(Arc::clone(plugin)),
            })
    }

    /// Has candidates put into an order, and waits for that until the deadline. Blocks.
    pub(crate) fn order(
        self,
        request: RankRequest,
        deadline: Duration,
    ) -> Result<Vec<u32>, RankFailure> {
        let turn = self.rank_turn().ok_or(RankFailure::Busy)?;
        let (reply, ordered) = std::sync::mpsc::sync_channel(1);
        let ask = RankAsk {
            request,
            deadline,
            reply,
            turn,
        };
        self.ranks
            .try_send(Box::new(ask))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => RankFailure::Busy,
                mpsc::error::TrySendError::Closed(_) => RankFailure::NotRunning,
            })?;
        // Whoever waits here keeps no run from being told of its end.
        drop(self);
        match ordered.recv_timeout(deadline) {
            Ok(order) => order,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err(RankFailure::Timeout),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Err(RankFailure::Trap),
        }
    }

    /// The right to ask for an order; `None` while the plugin has not finished the last one.
    fn rank_turn(&self) -> Option<RankTurn> {
        let was_ranking = self.is_ranking.swap(true, Ordering::AcqRel);
        (!was_ranking).then(|| RankTurn(Arc::clone(&self.is_ranking)))
    }
}

/// What comes next for a run.
#[derive(Debug)]
pub(crate) enum Incoming {
    Call(CallAsk),
    Rank(RankAsk),
    Events(EventBatch),
    Timer { name: String, lag: Duration },
    Shutdown,
}

#[derive(Debug)]
struct Timer {
    due: Instant,
    every: Option<Duration>,
}

/// The run's end.
#[derive(Debug)]
pub(crate) struct Inbox {
    calls: mpsc::Receiver<Box<CallAsk>>,
    ranks: mpsc::Receiver<Box<RankAsk>>,
    events: mpsc::Receiver<EventBatch>,
    events_in: mpsc::Sender<EventBatch>,
    stop: CancellationToken,
    is_told: bool,
    timers: BTreeMap<String, Timer>,
}

/// Both ends. The mail ends with a `Shutdown` at `stop`.
pub(crate) fn link(stop: CancellationToken) -> (Link, Inbox) {
    let (calls_in, calls) = mpsc::channel(MAX_WAITING_CALLS);
    let (ranks_in, ranks) = mpsc::channel(1);
    let (events_in, events) = mpsc::channel(1);
    let link = Link {
        calls: calls_in,
        ranks: ranks_in,
        is_ranking: Arc::default(),
    };
    let inbox = Inbox {
        calls,
        ranks,
        events,
        events_in,
        stop,
        is_told: false,
        timers: BTreeMap::new(),
    };
    (link, inbox)
}

impl Inbox {
    /// What comes next. Losing the future loses nothing.
    pub(crate) async fn next(&mut self) -> Incoming {
        loop {
            let due = self.timers.values().map(|timer| timer.due).min();
            let timer = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            // A flood of one kind takes turns with the others.
            let (calls, events) = (&mut self.calls, &mut self.events);
            let others = async {
                tokio::select! {
                    Some(call) = calls.recv() => Some(Incoming::Call(*call)),
                    Some(batch) = events.recv() => Some(Incoming::Events(batch)),
                    () = timer => None,
                    else => std::future::pending().await,
                }
            };
            let incoming = tokio::select! {
                biased;
                () = self.stop.cancelled(), if !self.is_told => {
                    self.is_told = true;
                    return Incoming::Shutdown;
                }
                Some(rank) = self.ranks.recv() => return Incoming::Rank(*rank),
                other = others => other,
            };
            if let Some(incoming) = incoming.or_else(|| self.take_due_timer()) {
                return incoming;
            }
        }
    }

    /// Where a subscription's batches go in.
    pub(crate) fn events_in(&self) -> mpsc::Sender<EventBatch> {
        self.events_in.clone()
    }

    /// Forgets the subscription before; its batches find nobody.
    pub(crate) fn renew_events(&mut self) {
        let (events_in, events) = mpsc::channel(1);
        self.events_in = events_in;
        self.events = events;
    }

    /// Starts or replaces a timer.
    ///
    /// # Errors
    /// [`Refusal`] that names the argument.
    pub(crate) fn set_timer(
        &mut self,
        name: &str,
        after_ms: i32,
        every_ms: i32,
    ) -> Result<(), Refusal> {
        let time = |argument: &str, milliseconds: i32| {
            u64::try_from(milliseconds)
                .map(Duration::from_millis)
                .map_err(|_| {
                    Refusal::invalid(format!(
                        "{argument} is {milliseconds}: give milliseconds from 0 on"
                    ))
                })
        };
        let (after, every) = (time("after_ms", after_ms)?, time("every_ms", every_ms)?);
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(Refusal::invalid(format!(
                "the timer's name has {} bytes: give 1 to {MAX_NAME_BYTES}",
                name.len()
            )));
        }
        if self.timers.len() >= MAX_TIMERS && !self.timers.contains_key(name) {
            return Err(Refusal::new(
                Code::Limit,
                format!("it has {MAX_TIMERS} timers, which is all it may have: cancel one"),
            ));
        }
        let timer = Timer {
            due: Instant::now() + after,
            every: (!every.is_zero()).then_some(every),
        };
        self.timers.insert(name.to_owned(), timer);
        Ok(())
    }

    /// Whether there was such a timer.
    pub(crate) fn cancel_timer(&mut self, name: &str) -> bool {
        self.timers.remove(name).is_some()
    }

    fn take_due_timer(&mut self) -> Option<Incoming> {
        let now = Instant::now();
        let name = self
            .timers
            .iter()
            .filter(|(_, timer)| timer.due <= now)
            .min_by_key(|(_, timer)| timer.due)
            .map(|(name, _)| name.clone())?;
        let timer = self.timers.get_mut(&name)?;
        let lag = now.saturating_duration_since(timer.due);
        match timer.every {
            // Ticks that were missed are not made up for.
            Some(every) => {
                let next = timer.due + every;
                timer.due = if next > now { next } else { now + every };
            }
            None => {
                self.timers.remove(&name);
            }
        }
        Some(Incoming::Timer { name, lag })
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn timers_come_when_they_are_due_and_missed_ticks_once() {
        let (_link, mut inbox) = link(CancellationToken::new());
        inbox.set_timer("once", 30, 0).unwrap();
        inbox.set_timer("tick", 10, 10).unwrap();
        let mut names = Vec::new();
        for _ in 0..5 {
            match inbox.next().await {
                Incoming::Timer { name, .. } => names.push(name),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(names.iter().filter(|name| *name == "once").count(), 1);
        tokio::time::advance(Duration::from_millis(95)).await;
        match inbox.next().await {
            Incoming::Timer { lag, .. } => assert!(lag >= Duration::from_millis(85), "{lag:?}"),
            other => panic!("{other:?}"),
        }
        let before = Instant::now();
        inbox.next().await;
        assert_eq!(before.elapsed(), Duration::from_millis(10));
    }

    #[tokio::test]
    async fn the_end_comes_first_and_once() {
        let stop = CancellationToken::new();
        let (_link, mut inbox) = link(stop.clone());
        inbox.set_timer("t", 0, 0).unwrap();
        stop.cancel();
        assert!(matches!(inbox.next().await, Incoming::Shutdown));
        assert!(matches!(inbox.next().await, Incoming::Timer { .. }));
    }

    #[test]
    fn timers_are_few_and_named() {
        let (_link, mut inbox) = link(CancellationToken::new());
        for number in 0..MAX_TIMERS {
            inbox.set_timer(&number.to_string(), 0, 0).unwrap();
        }
        assert_eq!(inbox.set_timer("more", 0, 0).unwrap_err().code, Code::Limit);
        inbox.set_timer("0", 5, 5).unwrap();
        assert!(inbox.cancel_timer("0") && !inbox.cancel_timer("0"));
        for (name, after, field) in [("", 0, "name"), ("x", -1, "after_ms")] {
            let refusal = inbox.set_timer(name, after, 0).unwrap_err();
            assert!(refusal.reason.contains(field), "{refusal:?}");
        }
    }

    #[test]
    fn one_rank_at_a_time() {
        let (link, _inbox) = link(CancellationToken::new());
        let turn = link.rank_turn().unwrap();
        assert!(link.rank_turn().is_none());
        drop(turn);
        assert!(link.rank_turn().is_some());
    }
}
