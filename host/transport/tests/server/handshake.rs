//! Greetings and mechanisms, right and wrong.

use std::sync::Arc;
use std::time::Duration;

use stockade_transport::{
    Authenticator, Config, ListenOptions, Mechanism, Message, Outcome, Principal,
};

use crate::harness::*;

/// So long that only what the peer did can have ended its connection.
fn patient() -> Config {
    Config {
        handshake_timeout: Duration::from_secs(600),
        ..Config::default()
    }
}

#[track_caller]
fn failed(server: &TestServer, count: u64) {
    assert_eq!(server.stats.disconnects("handshake_failed"), count);
    assert_eq!(server.stats.messages_in(), 0);
}

#[tokio::test]
async fn other_protocols_are_cut_off_at_once() {
    let server = TestServer::echo(patient()).await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00",
        b"\0",
        // ZMTP 1.0: a long frame length of 1, then an empty identity.
        b"\xff\0\0\0\0\0\0\0\x01\0",
        // ZMTP 2.0.
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x05",
    ] {
        let mut raw = server.raw().await;
        raw.read_greeting().await;
        raw.send(bytes).await;
        raw.expect_end().await;
    }
    until("counted", || server.stats.handshake_failures() == 5).await;
    failed(&server, 5);
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn the_handshake_has_a_deadline_however_busy_the_peer_looks() {
    let config = Config {
        handshake_timeout: Duration::from_millis(200),
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let whole = greeting(1, "NULL");

    let mut silent = server.raw().await;
    let mut half = server.raw().await;
    half.send(&whole[..32]).await;
    let mut greeted = server.raw().await;
    greeted.send(&whole).await;
    let dribbling = server.raw().await;
    let dribble = async {
        for byte in whole.iter().cycle() {
            if dribbling.0.writable().await.is_err() || dribbling.0.try_write(&[*byte]).is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(dribble).await;
    for raw in [&mut silent, &mut half, &mut greeted] {
        raw.read_greeting().await;
        while raw.receive().await != Received::End {}
    }
    until("counted", || {
        server.stats.disconnects("handshake_timeout") == 4
    })
    .await;
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn a_server_waits_for_a_greeting_in_pieces() {
    let server = TestServer::echo(Config::default()).await;
    let mut raw = server.raw().await;
    // As libzmq does it: signature, then the version, then the rest.
    let whole = greeting(0, "NULL");
    for piece in [&whole[..10], &whole[10..11], &whole[11..]] {
        raw.send(piece).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(raw.read_greeting().await[..32], greeting(1, "NULL")[..32]);
    for byte in metadata(b"READY", "DEALER") {
        raw.send(&[byte]).await;
    }
    assert!(matches!(raw.receive().await, Received::Command(_)));
    raw.send(&message(&[b"a", b"b"])).await;
    raw.expect_message(&[b"a", b"b"]).await;
}

#[tokio::test]
async fn only_socket_types_that_can_talk_to_a_router_get_in() {
    let server = TestServer::echo(patient()).await;
    for (at, socket_type) in ["SUB", "PUB", "PULL", "REP", "PAIR", "", "dealer"]
        .into_iter()
        .enumerate()
    {
        let mut raw = server.raw().await;
        raw.send(&greeting(1, "NULL")).await;
        raw.send(&metadata(b"READY", socket_type)).await;
        raw.read_greeting().await;
        assert!(matches!(raw.receive().await, Received::Command(_)));
        let Received::Command(error) = raw.receive().await else {
            panic!("{socket_type} got in");
        };
        assert!(error.starts_with(b"\x05ERROR"));
        raw.expect_end().await;
        drop(raw);
        let count = at as u64 + 1;
        until("counted", || server.stats.handshake_failures() == count).await;
    }
    failed(&server, 7);
}

#[tokio::test]
async fn nothing_but_the_handshake_is_taken_before_it_ends() {
    let server = TestServer::echo(patient()).await;
    let hostile: [&[u8]; 6] = [
        &message(&[b"too early"]),
        // A frame of 16 MiB, within the limit for messages.
        &[2, 0, 0, 0, 0, 1, 0, 0, 0],
        &command(b"\x04PING\0\0"),
        &command(b"\x05HELLO\x01a\x01b"),
        &command(b"\x05READY\x0bSocket-Type\xff\xff\xff\xffDEALER"),
        // A command of 1 MiB.
        &[6, 0, 0, 0, 0, 0, 16, 0, 0],
    ];
    for (at, bytes) in hostile.into_iter().enumerate() {
        let mut raw = server.raw().await;
        raw.send(&greeting(1, "NULL")).await;
        raw.send(bytes).await;
        raw.read_greeting().await;
        assert!(matches!(raw.receive().await, Received::Command(_)));
        raw.expect_end().await;
        drop(raw);
        let count = at as u64 + 1;
        until("counted", || server.stats.handshake_failures() == count).await;
    }
    failed(&server, 6);
    server.answers_a_fresh_client().await;
}

struct OneUser;

impl Authenticator for OneUser {
    fn plain(&self, username: &[u8], password: &[u8]) -> Option<Principal> {
        (username == b"team-a" && password == b"secret").then(|| Principal::new("team-a"))
    }
}

async fn plain_server() -> TestServer {
    let (handler, _ends) = with(|peer, message| {
        let name = peer.principal().unwrap().name().to_owned();
        let Message::Frames(mut frames) = message else {
            panic!("too large");
        };
        frames.push(name.into());
        Outcome::Reply(frames)
    });
    let options = ListenOptions {
        mechanism: Mechanism::Plain(Arc::new(OneUser)),
        ..ListenOptions::default()
    };
    TestServer::listen("tcp://127.0.0.1:0", options, patient(), handler).await
}

#[tokio::test]
async fn plain_peers_get_in_with_their_password() {
    let server = plain_server().await;
    let mut raw = server.raw().await;
    raw.send(&greeting(1, "PLAIN")).await;
    let greeting = raw.read_greeting().await;
    assert_eq!((&greeting[12..18], greeting[32]), (&b"PLAIN\0"[..], 1));
    raw.send(&command(b"\x05HELLO\x06team-a\x06secret")).await;
    assert_eq!(
        raw.receive().await,
        Received::Command(b"\x07WELCOME".to_vec())
    );
    raw.send(&metadata(b"INITIATE", "DEALER")).await;
    let Received::Command(ready) = raw.receive().await else {
        panic!("not READY");
    };
    assert!(ready.starts_with(b"\x05READY"));
    raw.send(&message(&[b"who am I"])).await;
    raw.expect_message(&[b"who am I", b"team-a"]).await;
}

#[tokio::test]
async fn plain_peers_without_the_password_are_told_and_cut_off() {
    let server = plain_server().await;
    for (at, hello) in [
        &b"\x05HELLO\x06team-a\x06Secret"[..],
        b"\x05HELLO\x06team-b\x06secret",
        b"\x05HELLO\0\0",
    ]
    .into_iter()
    .enumerate()
    {
        let mut raw = server.raw().await;
        raw.send(&greeting(1, "PLAIN")).await;
        raw.read_greeting().await;
        raw.send(&command(hello)).await;
        assert_eq!(
            raw.receive().await,
            Received::Command(b"\x05ERROR\x03400".to_vec())
        );
        raw.expect_end().await;
        drop(raw);
        let count = at as u64 + 1;
        until("counted", || server.stats.handshake_failures() == count).await;
    }
    failed(&server, 3);
}

#[tokio::test]
async fn plain_cannot_be_skipped() {
    let server = plain_server().await;
    let without_hello = metadata(b"INITIATE", "DEALER");
    let with_half_hello = command(b"\x05HELLO\x06team-a\xff");
    let as_null = metadata(b"READY", "DEALER");
    let mut as_server = greeting(1, "PLAIN");
    as_server[32] = 1;
    for (greeting, then) in [
        (greeting(1, "NULL"), &as_null),
        (greeting(1, "PLAIN"), &as_null),
        (greeting(1, "PLAIN"), &without_hello),
        (greeting(1, "PLAIN"), &with_half_hello),
        (greeting(1, "CURVE"), &as_null),
        (as_server, &as_null),
    ] {
        let mut raw = server.raw().await;
        raw.send(&greeting).await;
        // The server may have closed already.
        let _ = raw.0.try_write(then);
        raw.read_greeting().await;
        raw.expect_end().await;
    }
    until("counted", || server.stats.handshake_failures() == 6).await;
    failed(&server, 6);
}
