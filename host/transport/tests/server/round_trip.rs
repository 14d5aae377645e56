//! What well-behaved peers get.

use std::sync::Arc;

use bytes::Bytes;
use stockade_transport::{Config, Message, Outcome, SendError};
use tokio::sync::{Notify, mpsc};

use crate::harness::*;

#[tokio::test]
async fn frames_of_every_size_come_back_as_sent() {
    let server = TestServer::echo(Config::default()).await;
    let mut dealer = server.dealer().await;
    for len in [
        0,
        1,
        255,
        256,
        4095,
        65_535,
        65_536,
        65_537,
        520_000,
        9 << 20,
    ] {
        let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
        let frames: [&[u8]; 4] = [b"uid", b"", &payload, b"end"];
        assert_eq!(call(&mut dealer, &frames).await, frames, "{len}");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = TestServer::echo(Config::default()).await;
    let mut dealer = server.dealer().await;
    for batch in 0..20_u32 {
        for at in 0..200_u32 {
            send(&mut dealer, &[&batch.to_be_bytes(), &at.to_be_bytes()]).await;
        }
        for at in 0..200_u32 {
            let reply = receive(&mut dealer).await;
            assert_eq!(reply, [&batch.to_be_bytes()[..], &at.to_be_bytes()[..]]);
        }
    }
    assert_eq!(server.stats.messages_in(), 4000);
    until("all counted as written", || {
        server.stats.messages_out() == 4001
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_get_their_own_replies() {
    let server = Arc::new(TestServer::echo(Config::default()).await);
    let clients: Vec<_> = (0..50_u32)
        .map(|client| {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let mut dealer = server.dealer().await;
                for at in 0..100_u32 {
                    let frames: [&[u8]; 2] = [&client.to_be_bytes(), &at.to_be_bytes()];
                    assert_eq!(call(&mut dealer, &frames).await, frames);
                }
            })
        })
        .collect();
    for client in clients {
        soon(client).await.unwrap();
    }
    assert_eq!(server.stats.connections_accepted(), 50);
    until("all closed", || server.stats.connections_open() == 0).await;
}

#[tokio::test]
async fn later_replies_overtake_each_other() {
    let first = Arc::new(Notify::new());
    let gate = Arc::clone(&first);
    let (handler, _ends) = with(move |_, message| {
        let frames = echo(message);
        let gate = Arc::clone(&gate);
        Outcome::Later(Box::pin(async move {
            if frames[0] == "waits" {
                gate.notified().await;
            }
            (frames[0] != "silent").then_some(frames)
        }))
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut dealer = server.dealer().await;
    for name in [&b"waits"[..], b"silent", b"goes ahead"] {
        send(&mut dealer, &[name]).await;
    }
    assert_eq!(receive(&mut dealer).await, [&b"goes ahead"[..]]);
    first.notify_one();
    assert_eq!(receive(&mut dealer).await, [&b"waits"[..]]);
}

#[tokio::test]
async fn unasked_messages_arrive_in_order_and_end_with_the_connection() {
    let (peers, mut joined) = mpsc::unbounded_channel();
    let (handler, mut ends) = with(move |peer, _| {
        peers.send(Arc::clone(peer)).unwrap();
        Outcome::Nothing
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut dealer = server.dealer().await;
    send(&mut dealer, &[b"subscribe"]).await;
    let peer = soon(joined.recv()).await.unwrap();
    for at in 0..100_u32 {
        let frames = vec![Bytes::copy_from_slice(&at.to_be_bytes())];
        assert_eq!(peer.try_send(frames), Ok(()));
    }
    for at in 0..100_u32 {
        assert_eq!(receive(&mut dealer).await, [&at.to_be_bytes()[..]]);
    }
    drop(dealer);
    soon(ends.recv()).await.unwrap();
    assert!(peer.is_closed());
    assert_eq!(peer.try_send(vec![Bytes::new()]), Err(SendError::Closed));
}

#[tokio::test]
async fn a_request_finishes_although_its_client_left() {
    let (finished, mut finish) = mpsc::unbounded_channel();
    let (peers, mut joined) = mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let (handler, mut ends) = with(move |peer, _| {
        peers.send(Arc::clone(peer)).unwrap();
        let (finished, gate) = (finished.clone(), Arc::clone(&gate));
        Outcome::Later(Box::pin(async move {
            gate.notified().await;
            finished.send(()).unwrap();
            None
        }))
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(&message(&[b"end_session"])).await;
    let peer = soon(joined.recv()).await.unwrap();
    drop(raw);
    until("the server saw it leave", || peer.is_closed()).await;
    opened.notify_one();
    soon(finish.recv()).await.unwrap();
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "peer_closed");
}

#[tokio::test]
async fn req_peers_see_their_empty_delimiter_come_back() {
    use zeromq::{ReqSocket, Socket, SocketRecv, SocketSend};
    let (handler, _ends) = with(|peer, message| {
        assert_eq!(peer.socket_type(), stockade_transport::SocketType::Req);
        let Message::Frames(frames) = message else {
            panic!("too large");
        };
        assert!(frames[0].is_empty());
        Outcome::Reply(frames)
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut req = ReqSocket::new();
    req.connect(&server.endpoint.to_string()).await.unwrap();
    soon(req.send("ask".into())).await.unwrap();
    assert_eq!(soon(req.recv()).await.unwrap().into_vec(), [&b"ask"[..]]);
}
