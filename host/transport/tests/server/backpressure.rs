//! Bounds that make a peer wait instead of costing memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use stockade_transport::{Config, Outcome, SendError};
use tokio::sync::{Semaphore, mpsc};

use crate::harness::*;

#[tokio::test]
async fn requests_in_flight_are_bounded_and_the_rest_wait() {
    let gate = Arc::new(Semaphore::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let (opened, counted) = (Arc::clone(&gate), Arc::clone(&begun));
    let (handler, _ends) = with(move |_, message| {
        begun.fetch_add(1, Ordering::SeqCst);
        let gate = Arc::clone(&gate);
        Outcome::Later(Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Some(echo(message))
        }))
    });
    let config = Config {
        max_in_flight: 3,
        ..Config::default()
    };
    let server = TestServer::start(config, handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    for at in 0..10_u8 {
        raw.send(&message(&[&[at]])).await;
    }
    until("three begun", || counted.load(Ordering::SeqCst) == 3).await;
    // Time must pass here: the test is that nothing happens in it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(counted.load(Ordering::SeqCst), 3);
    opened.add_permits(10);
    for at in 0..10_u8 {
        raw.expect_message(&[&[at]]).await;
    }
}

#[tokio::test]
async fn silence_that_the_server_causes_does_not_count_against_the_peer() {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let (handler, _ends) = with(move |_, message| {
        let gate = Arc::clone(&gate);
        Outcome::Later(Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Some(echo(message))
        }))
    });
    let config = Config {
        max_in_flight: 1,
        heartbeat_interval: Duration::from_millis(400),
        heartbeat_timeout: Duration::from_millis(500),
        message_timeout: Duration::from_millis(500),
        ..Config::default()
    };
    let server = TestServer::start(config, handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    let (first, second) = (message(&[b"first"]), message(&[b"second"]));
    let (begun, rest) = second.split_at(5);
    raw.send(&[&first, begun].concat()).await;
    until("received", || server.stats.messages_in() == 1).await;
    // Time must pass here: it is the server that does not read in it.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    opened.add_permits(2);
    raw.expect_message(&[b"first"]).await;
    raw.send(rest).await;
    raw.expect_message(&[b"second"]).await;
}

#[tokio::test]
async fn unasked_messages_to_a_deaf_peer_are_bounded() {
    let (peers, mut joined) = mpsc::unbounded_channel();
    let (handler, _ends) = with(move |peer, _| {
        peers.send(Arc::clone(peer)).unwrap();
        Outcome::Nothing
    });
    let config = Config {
        max_push_bytes: 1 << 20,
        max_push_messages: 100,
        max_outbound_bytes: 1 << 20,
        slow_reader_grace: Duration::from_millis(300),
        ..Config::default()
    };
    let server = TestServer::start(config, handler).await;
    let mut deaf = server.raw().await;
    deaf.handshake(1).await;
    deaf.send(&message(&[b"subscribe"])).await;
    let peer = soon(joined.recv()).await.unwrap();
    let payload = bytes::Bytes::from(vec![0; 50_000]);
    let mut taken = 0_usize;
    let refused = soon(async {
        loop {
            match peer.try_send(vec![payload.clone()]) {
                Ok(()) => taken += 1,
                Err(SendError::Full) if peer.is_closed() => {}
                Err(SendError::Full) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(SendError::Closed) => break,
            }
        }
    });
    refused.await;
    assert!(taken < 500, "{taken} messages of 50 kB were taken");
    assert!(server.stats.pushes_refused() > 0);
    assert_eq!(server.stats.slow_readers_dropped(), 1);
}

#[tokio::test]
async fn the_inbound_budget_makes_large_messages_take_turns() {
    const LARGE: usize = 8 << 20;
    let config = Config {
        max_inbound_bytes: 1 << 20,
        message_timeout: Duration::from_secs(15),
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let server = Arc::new(server);
    // All have begun before any may end.
    let all_begun = Arc::new(tokio::sync::Barrier::new(9));
    let clients: Vec<_> = (0..8_u8)
        .map(|client| {
            let (server, all_begun) = (Arc::clone(&server), Arc::clone(&all_begun));
            tokio::spawn(async move {
                let mut raw = server.raw().await;
                raw.handshake(1).await;
                let payload = vec![client; LARGE];
                let whole = message(&[b"uid", &payload]);
                // As much as the kernel buffers for a server that does not read.
                raw.send(&whole[..LARGE / 32]).await;
                all_begun.wait().await;
                raw.send(&whole[LARGE / 32..]).await;
                raw.expect_message(&[b"uid", &payload]).await;
            })
        })
        .collect();
    soon(all_begun.wait()).await;
    // Small requests need no budget.
    server.answers_a_fresh_client().await;
    for client in clients {
        soon(client).await.unwrap();
    }
    assert!(server.stats.inbound_budget_waits() > 0);
}

#[tokio::test]
async fn a_peer_that_holds_the_budget_loses_it_in_time() {
    let config = Config {
        max_inbound_bytes: 1 << 20,
        message_timeout: Duration::from_millis(500),
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let whole = message(&[b"uid", &vec![0; 8 << 20]]);
    let mut hoarders = Vec::new();
    for _ in 0..2 {
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        raw.send(&whole[..2 << 20]).await;
        hoarders.push(raw);
    }
    let mut dealer = server.dealer().await;
    let payload = vec![1; 4 << 20];
    assert_eq!(call(&mut dealer, &[&payload]).await, [&payload[..]]);
    until("hoarders gone", || {
        server.stats.disconnects("message_timeout") == 2
    })
    .await;
}
