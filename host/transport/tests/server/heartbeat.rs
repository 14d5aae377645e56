//! Peers that are silent, and peers that only seem so.

use std::time::Duration;

use stockade_transport::{Config, Outcome};

use crate::harness::*;

fn quick() -> Config {
    Config {
        heartbeat_interval: Duration::from_millis(50),
        heartbeat_timeout: Duration::from_millis(300),
        ..Config::default()
    }
}

const PING: &[u8] = b"\x04PING\0\0";

#[tokio::test]
async fn a_silent_3_1_peer_is_pinged_and_then_dropped() {
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(quick(), handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    assert_eq!(raw.receive().await, Received::Command(PING.to_vec()));
    raw.expect_end().await;
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "heartbeat_timeout");
}

#[tokio::test]
async fn a_peer_that_pongs_stays_for_longer_than_the_timeout() {
    let server = TestServer::echo(quick()).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    for _ in 0..12 {
        assert_eq!(raw.receive().await, Received::Command(PING.to_vec()));
        raw.send(&command(b"\x04PONG")).await;
    }
    raw.send(&message(&[b"still here"])).await;
    raw.expect_message(&[b"still here"]).await;
    assert_eq!(server.stats.disconnects("heartbeat_timeout"), 0);
}

#[tokio::test]
async fn a_3_0_peer_is_neither_pinged_nor_dropped() {
    let server = TestServer::echo(quick()).await;
    let mut raw = server.raw().await;
    raw.handshake(0).await;
    // Time must pass here: the test is that nothing happens in it.
    tokio::time::sleep(Duration::from_millis(600)).await;
    raw.send(&message(&[b"still here"])).await;
    raw.expect_message(&[b"still here"]).await;
}

#[tokio::test]
async fn a_ping_is_answered_with_its_context() {
    let server = TestServer::echo(Config::default()).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    for context in [&b""[..], b"0123456789abcdef"] {
        raw.send(&command(&[b"\x04PING\0\0", context].concat()))
            .await;
        let pong = [b"\x04PONG", context].concat();
        assert_eq!(raw.receive().await, Received::Command(pong));
    }
    raw.send(&command(b"\x04PING\0\x000123456789abcdefg")).await;
    raw.expect_end().await;
}

#[tokio::test]
async fn the_time_to_live_of_a_ping_is_kept() {
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(Config::default(), handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(&command(b"\x04PING\0\x02")).await;
    assert_eq!(raw.receive().await, Received::Command(b"\x04PONG".to_vec()));
    raw.expect_end().await;
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "heartbeat_timeout");
}

#[tokio::test]
async fn commands_of_other_versions_are_ignored() {
    let server = TestServer::echo(Config::default()).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(&command(b"\x09SUBSCRIBEtopic")).await;
    raw.send(&command(b"\x06CANCELtopic")).await;
    raw.send(&command(b"\x07UNKNOWN\xff\xff")).await;
    raw.send(&message(&[b"next"])).await;
    raw.expect_message(&[b"next"]).await;
}
