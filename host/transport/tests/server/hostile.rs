//! Peers that mean harm, and the clients beside them.

use std::time::Duration;

use stockade_transport::{Config, Limit, Limits, Message, Outcome};

use crate::harness::*;

fn small_messages() -> Config {
    Config {
        limits: Limits {
            max_frame_bytes: 1 << 20,
            max_message_bytes: 1 << 20,
            ..Limits::default()
        },
        ..Config::default()
    }
}

#[tokio::test]
async fn a_tebibyte_is_refused_with_a_reply_and_no_memory() {
    let (handler, mut ends) = with(|_, message| {
        let Message::TooLarge {
            announced, limit, ..
        } = &message
        else {
            panic!("taken");
        };
        assert_eq!((*announced, *limit), ((1 << 40) + 3, Limit::FrameBytes));
        Outcome::Reply(echo(message))
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(b"\x01\x03uid\x02\0\0\x01\0\0\0\0\0").await;
    raw.expect_message(&[b"uid", b"too large"]).await;
    raw.expect_end().await;
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "message_too_large");
    assert_eq!(server.stats.messages_too_large(), 1);
}

#[tokio::test]
async fn a_message_over_the_limit_is_answered_and_the_connection_goes_on() {
    let server = TestServer::echo(small_messages()).await;
    let mut dealer = server.dealer().await;
    for len in [1 << 20, (1 << 20) + 1, 15 << 20] {
        let reply = call(&mut dealer, &[b"uid", &vec![1; len]]).await;
        assert_eq!(reply, [&b"uid"[..], b"too large"]);
        assert_eq!(call(&mut dealer, &[b"small"]).await, [&b"small"[..]]);
    }
    assert_eq!(server.stats.messages_too_large(), 3);
}

#[tokio::test]
async fn sixty_four_mebibytes_pass_under_a_limit_that_allows_them() {
    let mut config = Config::default();
    config.limits.max_frame_bytes = 64 << 20;
    config.limits.max_message_bytes = 65 << 20;
    let server = TestServer::echo(config).await;
    let mut dealer = server.dealer().await;
    let payload: Vec<u8> = (0..64 << 20).map(|at: usize| (at >> 8) as u8).collect();
    let reply = call(&mut dealer, &[b"uid", &payload]).await;
    assert_eq!(reply[1].len(), payload.len());
    assert!(reply[1] == payload[..]);
}

#[tokio::test]
async fn a_million_tiny_frames_are_skipped() {
    let server = TestServer::echo(Config::default()).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    let thousand = b"\x01\x01x".repeat(1000);
    raw.send(b"\x01\x03uid").await;
    for _ in 0..1000 {
        raw.send(&thousand).await;
    }
    raw.send(b"\0\0").await;
    raw.send(&message(&[b"next"])).await;
    let Received::Message(reply) = raw.receive().await else {
        panic!("no answer");
    };
    assert_eq!(reply.first().unwrap(), b"uid");
    assert_eq!(reply.last().unwrap(), b"too large");
    raw.expect_message(&[b"next"]).await;
}

#[tokio::test]
async fn a_skipped_message_must_end_some_time() {
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(small_messages(), handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    // 4 MiB more again and again, each within what is skipped.
    let chunk = vec![0; 4 << 20];
    let header = b"\x03\0\0\0\0\0\x40\0\0";
    let flood = async {
        use tokio::io::AsyncWriteExt;
        for _ in 0..16 {
            if raw.0.write_all(header).await.is_err() || raw.0.write_all(&chunk).await.is_err() {
                break;
            }
        }
    };
    soon(flood).await;
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "protocol");
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_the_connection() {
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(Config::default(), handler).await;
    let garbage: [&[u8]; 6] = [
        &command(b""),
        &command(b"\xffPING"),
        &command(b"\x04PING"),
        &metadata(b"READY", "DEALER"),
        b"\xf8\x01a",
        b"\x05\x01a",
    ];
    for bytes in garbage {
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        raw.send(bytes).await;
        raw.expect_end().await;
        drop(raw);
        assert_eq!(soon(ends.recv()).await.unwrap().name(), "protocol");
    }
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn a_flood_of_pings_is_answered_or_its_sender_dropped() {
    let config = Config {
        slow_reader_grace: Duration::from_millis(300),
        max_outbound_bytes: 64 << 10,
        ..Config::default()
    };
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(config, handler).await;
    let flood = command(b"\x04PING\0\0context").repeat(1000);

    let mut reading = server.raw().await;
    reading.handshake(1).await;
    for _ in 0..20 {
        reading.send(&flood).await;
        for _ in 0..1000 {
            let pong = Received::Command(b"\x04PONGcontext".to_vec());
            assert_eq!(reading.receive().await, pong);
        }
    }

    let mut deaf = server.raw().await;
    deaf.handshake(1).await;
    let beside = server.answers_a_fresh_client();
    let flooding = async {
        use tokio::io::AsyncWriteExt;
        while deaf.0.write_all(&flood).await.is_ok() {}
    };
    soon(async { tokio::join!(flooding, beside) }).await;
    // The fresh client has left too, in either order.
    let ends = [soon(ends.recv()).await, soon(ends.recv()).await];
    assert!(ends.iter().any(|end| end.unwrap().name() == "slow_reader"));
    assert_eq!(server.stats.slow_readers_dropped(), 1);
}

#[tokio::test]
async fn a_peer_that_stops_reading_hurts_only_itself() {
    let config = Config {
        slow_reader_grace: Duration::from_millis(500),
        max_outbound_bytes: 1 << 20,
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let mut deaf = server.raw().await;
    deaf.handshake(1).await;
    let request = message(&[b"uid", &vec![7; 100_000]]);
    let flooding = async {
        use tokio::io::AsyncWriteExt;
        let mut sent = 0;
        while deaf.0.write_all(&request).await.is_ok() {
            sent += 1;
        }
        sent
    };
    let others = async {
        let mut dealer = server.dealer().await;
        let mut served = 0;
        while server.stats.slow_readers_dropped() == 0 {
            assert_eq!(call(&mut dealer, &[b"other"]).await, [&b"other"[..]]);
            served += 1;
        }
        served
    };
    let (sent, served) = soon(async { tokio::join!(flooding, others) }).await;
    assert!(served > 100, "only {served} beside the flood");
    // 1 MiB of replies and what the kernel buffers: reading stopped long ago.
    let handled = server.stats.bytes_in() / 100_000;
    assert!(handled < 300, "{handled} of {sent} requests were read");
}

#[tokio::test]
async fn a_message_left_unfinished_ends_with_the_connection_or_the_timeout() {
    let config = Config {
        message_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(config, handler).await;
    let whole = message(&[b"uid", &vec![1; 200_000]]);
    for cut in [1, 9, 11, 50_000, 150_000] {
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        raw.send(&whole[..cut]).await;
        drop(raw);
        assert_eq!(soon(ends.recv()).await.unwrap().name(), "peer_closed");

        let mut raw = server.raw().await;
        raw.handshake(1).await;
        raw.send(&whole[..cut]).await;
        raw.expect_end().await;
        drop(raw);
        assert_eq!(soon(ends.recv()).await.unwrap().name(), "message_timeout");
    }
    assert_eq!(server.stats.messages_in(), 0);
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn pings_do_not_prolong_a_message() {
    let config = Config {
        message_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    let (handler, mut ends) = with(|_, message| Outcome::Reply(echo(message)));
    let server = TestServer::start(config, handler).await;
    let mut raw = server.raw().await;
    raw.handshake(1).await;
    raw.send(b"\x01\x03uid").await;
    let pinging = async {
        use tokio::io::AsyncWriteExt;
        while raw.0.write_all(&command(b"\x04PING\0\0")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(pinging).await;
    assert_eq!(soon(ends.recv()).await.unwrap().name(), "message_timeout");
}

#[tokio::test]
async fn a_handler_that_panics_ends_one_connection() {
    let (handler, mut ends) = with(|_, message| match echo(message) {
        frames if frames[0] == "now" => panic!("on purpose"),
        frames if frames[0] == "later" => Outcome::Later(Box::pin(async { panic!("on purpose") })),
        frames => Outcome::Reply(frames),
    });
    let server = TestServer::start(Config::default(), handler).await;
    let mut beside = server.dealer().await;
    for name in [&b"now"[..], b"later"] {
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        raw.send(&message(&[name])).await;
        raw.expect_end().await;
        drop(raw);
        assert_eq!(soon(ends.recv()).await.unwrap().name(), "handler_panicked");
    }
    assert_eq!(call(&mut beside, &[b"fine"]).await, [&b"fine"[..]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_are_served() {
    let server = TestServer::echo(Config::default()).await;
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let mut raw = server.raw().await;
        raw.send(&greeting(1, "NULL")).await;
        raw.send(&metadata(b"READY", "DEALER")).await;
        raw.send(&message(&[b"one of many"])).await;
        clients.push(raw);
    }
    for raw in &mut clients {
        raw.read_greeting().await;
        assert!(matches!(raw.receive().await, Received::Command(_)));
        raw.expect_message(&[b"one of many"]).await;
    }
    assert_eq!(server.stats.connections_open(), 1000);
    drop(clients);
    until("all closed", || server.stats.connections_open() == 0).await;
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn connections_over_the_cap_are_closed_until_there_is_room() {
    let config = Config {
        max_connections: 2,
        ..Config::default()
    };
    let server = TestServer::echo(config).await;
    let first = server.dealer().await;
    let mut second = server.dealer().await;
    for refused in 1..=20 {
        server.raw().await.expect_end().await;
        assert_eq!(server.stats.connections_refused(), refused);
    }
    assert_eq!(call(&mut second, &[b"second"]).await, [&b"second"[..]]);
    drop(first);
    until("room", || server.stats.connections_open() == 1).await;
    server.answers_a_fresh_client().await;
}

#[tokio::test]
async fn the_handler_can_close_a_connection_after_its_last_reply() {
    let (handler, mut ends) = with(|peer, message| {
        let mut frames = echo(message);
        let by_peer = frames[0] == "ask peer";
        // More than the client has taken in when the connection is closed.
        frames.push(vec![7; 1 << 20].into());
        if by_peer {
            peer.close();
            Outcome::Reply(frames)
        } else {
            peer.try_send(frames).unwrap();
            Outcome::Close
        }
    });
    let server = TestServer::start(Config::default(), handler).await;
    for (name, replies) in [(&b"ask peer"[..], 2), (b"by outcome", 4)] {
        let mut raw = server.raw().await;
        raw.handshake(1).await;
        // More follows than is read, which a careless close answers with a reset.
        let more = message(&[&vec![0; 300_000]]);
        raw.send(&[message(&[name]), more].concat()).await;
        until("written", || server.stats.messages_out() == replies).await;
        raw.expect_message(&[name, &vec![7; 1 << 20]]).await;
        raw.expect_end().await;
        drop(raw);
        assert_eq!(soon(ends.recv()).await.unwrap().name(), "handler");
    }
}
