//! Connections that change their lane, and with it their runtime.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use stockade_transport::{
    Config, DisconnectReason, Handler, Lane, ListenOptions, Message, Outcome, Peer, Server, Turn,
};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use crate::harness::*;

/// Name of the yielding runtime's thread.
const YIELDING: &str = "yielding";
/// Messages between two changes of the lane.
const STAY: usize = 4;

/// Answers with the name of the thread, and changes the lane after every [`STAY`] messages.
struct Wanderer {
    handled: AtomicUsize,
    /// What every third request waits for.
    later: Arc<Semaphore>,
    /// Closes the connection when it is about to change its lane for the first time.
    closes: bool,
    /// Turns that were let begin, and that are over.
    turns: (AtomicUsize, AtomicUsize),
    gone: AtomicUsize,
}

impl Wanderer {
    fn new(closes: bool) -> Arc<Self> {
        Arc::new(Self {
            handled: AtomicUsize::default(),
            later: Arc::new(Semaphore::new(0)),
            closes,
            turns: Default::default(),
            gone: AtomicUsize::default(),
        })
    }
}

fn thread() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

fn lane_after(handled: usize) -> Lane {
    match handled / STAY % 2 {
        0 => Lane::Main,
        _ => Lane::Yielding,
    }
}

impl Handler for Wanderer {
    fn message(&self, _: &Arc<Peer>, message: Message) -> Outcome {
        let number = self.handled.fetch_add(1, Ordering::SeqCst);
        let mut reply = echo(message);
        reply.push(thread().into());
        if !number.is_multiple_of(3) {
            return Outcome::Reply(reply);
        }
        let later = Arc::clone(&self.later);
        Outcome::Later(Box::pin(async move {
            later.acquire().await.unwrap().forget();
            Some(reply)
        }))
    }

    fn poll_turn(&self, peer: &Arc<Peer>, _: &mut Context<'_>) -> Poll<Turn> {
        let lane = lane_after(self.handled.load(Ordering::SeqCst));
        if self.closes && lane == Lane::Yielding {
            peer.close();
        }
        self.turns.0.fetch_add(1, Ordering::SeqCst);
        Poll::Ready(Turn {
            // After the last one of a turn more is wanted, which is not so here.
            messages: if self.closes { 2 } else { 1 },
            lane,
            ..Turn::UNLIMITED
        })
    }

    fn turn_over(&self, _: &Arc<Peer>, _: Turn, _: bool) {
        self.turns.1.fetch_add(1, Ordering::SeqCst);
    }

    fn disconnected(&self, _: &Arc<Peer>, _: DisconnectReason) {
        self.gone.fetch_add(1, Ordering::SeqCst);
    }
}

/// The runtime of the yielding lane.
struct Yielding(Option<Runtime>);

impl Yielding {
    /// A server that has it.
    async fn serve(endpoint: &str, handler: &Arc<Wanderer>) -> (Self, TestServer) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(YIELDING)
            .enable_all()
            .build()
            .unwrap();
        let server = Server::new(Arc::clone(handler), Config::default()).unwrap();
        let server = server.yielding_on(runtime.handle().clone());
        let server = TestServer::serve(endpoint, ListenOptions::default(), server).await;
        (Self(Some(runtime)), server)
    }
}

impl Drop for Yielding {
    fn drop(&mut self) {
        // It must not be waited for within another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[tokio::test]
async fn a_connection_goes_on_in_another_lane_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let ipc = format!("ipc://{}", directory.path().join("socket").display());
    for endpoint in ["tcp://127.0.0.1:0", &ipc] {
        let handler = Wanderer::new(false);
        let (_yielding, server) = Yielding::serve(endpoint, &handler).await;
        let mut dealer = server.dealer().await;
        let all = 20 * STAY;
        // In one go, so that most of it waits in the connection when it moves.
        for number in 0..all {
            send(&mut dealer, &[&number.to_be_bytes()]).await;
        }
        let mut threads = vec![None; all];
        let mut next = async || {
            let reply = receive(&mut dealer).await;
            let number = usize::from_be_bytes(reply[0][..].try_into().unwrap());
            assert_eq!(threads[number].replace(reply[1].clone()), None);
            number
        };
        for number in (0..all).filter(|number| number % 3 != 0) {
            assert_eq!(next().await, number, "in order");
        }
        // These were begun in all lanes that the connection has been in.
        handler.later.add_permits(all);
        for _ in (0..all).filter(|number| number % 3 == 0) {
            assert_eq!(next().await % 3, 0);
        }
        for (number, thread) in threads.into_iter().enumerate() {
            let is_yielding = thread.unwrap() == YIELDING;
            assert_eq!(
                is_yielding,
                lane_after(number) == Lane::Yielding,
                "{number}"
            );
        }
        soon(server.stop()).await.unwrap();
        assert_eq!(handler.gone.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn a_server_that_stops_waits_for_connections_in_every_lane() {
    let handler = Wanderer::new(false);
    let (_yielding, server) = Yielding::serve("tcp://127.0.0.1:0", &handler).await;
    let mut dealer = server.dealer().await;
    // The last one is in flight, and in the yielding lane.
    let all = 7_usize;
    for number in 0..all {
        send(&mut dealer, &[&number.to_be_bytes()]).await;
    }
    until("all have begun", || {
        handler.handled.load(Ordering::SeqCst) == all
    })
    .await;
    let stopped = server.stop();
    handler.later.add_permits(all);
    for _ in 0..all {
        receive(&mut dealer).await;
    }
    soon(stopped).await.unwrap();
    assert_eq!(handler.gone.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_connection_that_ends_while_it_changes_its_lane_gives_its_turn_up() {
    let handler = Wanderer::new(true);
    let (_yielding, server) = Yielding::serve("tcp://127.0.0.1:0", &handler).await;
    let mut dealer = server.dealer().await;
    handler.later.add_permits(STAY);
    // One after the other, so that it does not want more when it is to move.
    for number in 0..STAY {
        call(&mut dealer, &[&number.to_be_bytes()]).await;
    }
    until("it is closed", || handler.gone.load(Ordering::SeqCst) == 1).await;
    assert_eq!(handler.handled.load(Ordering::SeqCst), STAY);
    let (begun, over) = (&handler.turns.0, &handler.turns.1);
    assert_eq!(begun.load(Ordering::SeqCst), over.load(Ordering::SeqCst));
    soon(server.stop()).await.unwrap();
}
