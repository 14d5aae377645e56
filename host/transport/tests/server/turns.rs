//! Turns of connections: what a handler lets them do, and what it hears of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use stockade_transport::{Config, Handler, Message, Outcome, Peer, Turn};
use tokio::sync::Semaphore;

use crate::harness::*;

/// Lets every connection do so much in a turn while it is open, and counts.
#[derive(Default)]
struct Gate {
    allowance: Turn,
    is_closed: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
    /// The most messages of one turn, and all of them.
    most: AtomicUsize,
    all: AtomicUsize,
    /// Turns that ended with more to do, and waits that were given up.
    wanted_more: AtomicUsize,
    given_up: AtomicUsize,
    /// What requests wait for, if they do.
    later: Option<Arc<Semaphore>>,
}

impl Handler for Gate {
    fn message(&self, _: &Arc<Peer>, message: Message) -> Outcome {
        self.all.fetch_add(1, Ordering::SeqCst);
        match self.later.clone() {
            None => Outcome::Reply(echo(message)),
            Some(later) => Outcome::Later(Box::pin(async move {
                later.acquire().await.unwrap().forget();
                Some(echo(message))
            })),
        }
    }

    fn poll_turn(&self, _: &Arc<Peer>, cx: &mut Context<'_>) -> Poll<Turn> {
        if self.is_closed.load(Ordering::SeqCst) {
            self.wakers.lock().push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(self.allowance)
    }

    fn turn_over(&self, _: &Arc<Peer>, used: Turn, wants_more: bool) {
        self.most.fetch_max(used.messages, Ordering::SeqCst);
        self.wanted_more
            .fetch_add(usize::from(wants_more), Ordering::SeqCst);
        if self.is_closed.load(Ordering::SeqCst) {
            self.given_up.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[tokio::test]
async fn a_turn_ends_at_its_messages_and_at_its_bytes() {
    for (allowance, most) in [
        (
            Turn {
                messages: 3,
                ..Turn::UNLIMITED
            },
            3,
        ),
        // The message that goes over it is the last one.
        (
            Turn {
                bytes: 25,
                ..Turn::UNLIMITED
            },
            3,
        ),
    ] {
        let gate = Arc::new(Gate {
            allowance,
            ..Gate::default()
        });
        let server = TestServer::start(Config::default(), Arc::clone(&gate)).await;
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        let all: Vec<u8> = (0..20).flat_map(|at| message(&[&[at; 10]])).collect();
        raw.send(&all).await;
        for at in 0..20 {
            raw.expect_message(&[&[at; 10]]).await;
        }
        assert!(gate.most.load(Ordering::SeqCst) <= most, "{allowance:?}");
        assert!(gate.wanted_more.load(Ordering::SeqCst) > 0);
    }
}

#[tokio::test]
async fn with_too_much_in_flight_one_request_at_a_time_goes_on() {
    let later = Arc::new(Semaphore::new(0));
    let gate = Arc::new(Gate {
        allowance: Turn {
            in_flight_bytes: 0,
            ..Turn::UNLIMITED
        },
        later: Some(Arc::clone(&later)),
        ..Gate::default()
    });
    let server = TestServer::start(Config::default(), Arc::clone(&gate)).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    for at in 0..5_u8 {
        raw.send(&message(&[&[at]])).await;
    }
    for at in 0..5_u8 {
        let begun = || gate.all.load(Ordering::SeqCst);
        until("the next one has begun", || begun() > usize::from(at)).await;
        assert_eq!(begun(), usize::from(at) + 1, "and no other beside it");
        later.add_permits(1);
        raw.expect_message(&[&[at]]).await;
    }
}

#[tokio::test]
async fn a_connection_that_ends_while_it_waits_for_a_turn_gives_it_up() {
    let gate = Arc::new(Gate {
        allowance: Turn::UNLIMITED,
        ..Gate::default()
    });
    let server = TestServer::start(Config::default(), Arc::clone(&gate)).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(&message(&[b"before"])).await;
    raw.expect_message(&[b"before"]).await;
    gate.is_closed.store(true, Ordering::SeqCst);
    raw.send(&message(&[b"waits"])).await;
    until("it waits", || !gate.wakers.lock().is_empty()).await;
    assert_eq!(gate.given_up.load(Ordering::SeqCst), 0);
    server.stop().await.unwrap();
    assert_eq!(gate.given_up.load(Ordering::SeqCst), 1);
    assert_eq!(gate.all.load(Ordering::SeqCst), 1);
}
