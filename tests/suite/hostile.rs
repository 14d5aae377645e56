//! Bad input: each costs its sender, and a fresh client is served right after.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{Client, Key, Server, Worker, lookup, map, pack, registration, tokens};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Connects, asks for a noop and returns how long that took.
async fn fresh_client(server: &Server) -> Duration {
    let started = Instant::now();
    let mut client = Client::connect(&server.url).await;
    assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
    started.elapsed()
}

/// A ZMTP 3.1 greeting with the NULL mechanism, and a READY command of a DEALER.
fn handshake() -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    bytes.extend_from_slice(b"NULL");
    bytes.resize(64, 0);
    bytes.extend_from_slice(b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER");
    bytes
}

#[tokio::test]
async fn bytes_that_are_no_requests_are_survived() {
    let server = Server::start(&[]);
    let long_frame = |length: u64| {
        let mut bytes = handshake();
        bytes.push(0x02);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    };
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("zeros", vec![0; 4096]),
        ("half a greeting", handshake()[..30].to_vec()),
        ("1 TiB announced", long_frame(1 << 40)),
        ("16 EiB announced", long_frame(u64::MAX)),
        (
            "one empty frame",
            [&handshake()[..], &[0x00, 0x00]].concat(),
        ),
        (
            "one frame",
            [&handshake()[..], &[0x00, 0x01, 0x01]].concat(),
        ),
        (
            "unknown flags",
            [&handshake()[..], &[0xf8, 0x01, 0x01]].concat(),
        ),
        (
            "a lying command",
            [&handshake()[..], b"\x04\x05\xffXXXX"].concat(),
        ),
    ];
    cases.push(("a thousand frames", {
        let mut bytes = handshake();
        bytes.extend([0x01, 0x01, 0x01].repeat(1000));
        bytes
    }));
    for (name, bytes) in cases {
        let mut stream = TcpStream::connect(&server.addr).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let took = fresh_client(&server).await;
        assert!(
            took < Duration::from_secs(5),
            "{name}: a fresh client waited {took:?}"
        );
    }
    let status = server.json("/status").await;
    assert_eq!(status["is_healthy"], true);
}

#[tokio::test]
async fn malformed_requests_are_answered_with_the_fields_name() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    client.call(14, &[registration(1, "m")]).await.value();
    let good = Key::new("m", &tokens(32, 1), Some(0), "r");
    let with = |name: &str, value: Value| {
        let mut fields = good.value();
        if let Value::Map(fields) = &mut fields {
            fields
                .iter_mut()
                .find(|(key, _)| key.as_str() == Some(name))
                .unwrap()
                .1 = value;
        }
        fields
    };
    for (field, value) in [
        ("token_ids", Value::from("text")),
        ("token_ids", Value::Array(vec![(-1).into()])),
        ("token_ids", Value::Array(vec![(1u64 << 32).into()])),
        ("token_ids", Value::Array(vec![Value::F64(1.0)])),
        ("start", Value::from("0")),
        ("end", Value::F64(32.0)),
        ("start", (-16).into()),
        ("request_id", Value::Binary(b"r".to_vec())),
        ("model_name", 7.into()),
        ("cache_salt", Value::Nil),
        ("cache_salt", "a@b".into()),
        ("cache_salt", "x".repeat(129).into()),
        ("num_kv_readers", Value::Nil),
        ("num_kv_readers", 0.into()),
        ("request_configs", Value::Array(vec![])),
    ] {
        let error = client
            .call(8, &[with(field, value.clone()), 1.into()])
            .await
            .error();
        assert!(error.contains(field), "{field} = {value}: {error}");
    }
    // A hundred thousand arrays, each inside the one before.
    let mut nested = vec![0x91; 100_000];
    nested.push(0xc0);
    let frames = vec![
        pack(&1.into()),
        pack(&8.into()),
        nested.into(),
        pack(&1.into()),
    ];
    client.send(frames).await;
    assert!(
        client.receive().await[1]
            .windows(5)
            .any(|part| part == b"error")
    );
    // An array that announces four thousand million tokens and holds none.
    let mut lying = pack(&map(&[("token_ids", Value::Nil)])).to_vec();
    lying.pop();
    lying.extend([0xdd, 0xff, 0xff, 0xff, 0xff]);
    client
        .send(vec![
            pack(&2.into()),
            pack(&8.into()),
            lying.into(),
            pack(&1.into()),
        ])
        .await;
    assert!(
        client.receive().await[1]
            .windows(5)
            .any(|part| part == b"error")
    );
    for (world_size, slots) in [
        (Value::from(1u64 << 31), Value::Nil),
        (0.into(), Value::Nil),
        (1.into(), 0.into()),
    ] {
        let Value::Map(mut fields) = registration(2, "m") else {
            unreachable!()
        };
        for (key, value) in &mut fields {
            match key.as_str() {
                Some("world_size") => *value = world_size.clone(),
                Some("num_physical_slots") => *value = slots.clone(),
                _ => {}
            }
        }
        let error = client.call(14, &[Value::Map(fields)]).await.error();
        assert!(
            error.contains("world_size") || error.contains("num_physical_slots"),
            "{error}"
        );
    }
    // The connection is as good as new.
    assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
}

#[tokio::test]
async fn ranges_that_make_no_sense_are_refused_and_leak_nothing() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    for (start, end) in [
        (1, 16),
        (0, 17),
        (0, 64),
        (32, 16),
        (1 << 40, 1 << 41),
        (16, i64::MAX),
    ] {
        let key = Key {
            start,
            end,
            ..Key::new("m", &tokens(32, 2), Some(0), "r")
        };
        for operation in [16, 18, 19] {
            let error = worker
                .client
                .call(operation, &[key.value(), 1.into()])
                .await
                .error();
            assert!(error.contains("range"), "[{start}, {end}): {error}");
        }
    }
    let rank = Key {
        rank: Some(1),
        ..Key::new("m", &tokens(32, 2), Some(0), "r")
    };
    assert!(
        worker
            .client
            .call(16, &[rank.value(), 1.into()])
            .await
            .error()
            .contains("worker_id")
    );
    let manager = &server.json("/status").await["storage_manager"]["l1_manager"];
    assert_eq!(manager["memory_used_bytes"], 0);
}

#[tokio::test]
async fn a_request_over_the_limit_is_answered_and_the_connection_goes_on() {
    let server = Server::start(&["--max-message-mib", "1"]);
    let mut client = Client::connect(&server.url).await;
    let large = Bytes::from(vec![0xc4; 3 << 20]);
    client
        .send(vec![
            pack(&5.into()),
            pack(&17.into()),
            pack(&1.into()),
            large,
        ])
        .await;
    let reply = client.receive().await;
    assert_eq!(reply[0], pack(&5.into()));
    let error = rmpv::decode::read_value(&mut &reply[1][..]).unwrap();
    assert!(
        error.as_str().unwrap().contains("--max-message-mib"),
        "{error}"
    );
    assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
}

#[tokio::test]
async fn a_reader_that_does_not_read_hurts_nobody_else() {
    let server = Server::start(&[]);
    let mut deaf = TcpStream::connect(&server.addr).await.unwrap();
    deaf.write_all(&handshake()).await.unwrap();
    // Its own greeting is read, nothing after that.
    let mut greeting = [0; 64];
    deaf.read_exact(&mut greeting).await.unwrap();
    let noop = [0x01, 0x01, 0x01, 0x00, 0x01, 0x18].repeat(10_000);
    for _ in 0..50 {
        // Back-pressure reaches the sender at some point, as it should.
        if tokio::time::timeout(Duration::from_millis(200), deaf.write_all(&noop))
            .await
            .is_err()
        {
            break;
        }
    }
    assert!(fresh_client(&server).await < Duration::from_secs(5));
}

#[tokio::test]
async fn a_cut_segment_costs_its_objects_and_never_the_server() {
    let mut server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let key = Key::new("m", &tokens(64, 3), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&worker.segment)
        .unwrap()
        .set_len(0)
        .unwrap();
    let again = Key {
        request_id: "r".to_owned(),
        ..key.clone()
    };
    // Found or not, but nothing breaks, and the server goes on.
    let _ = lookup(&mut worker.client, &again).await;
    let _ = worker.client.call(18, &[again.value(), 1.into()]).await;
    assert!(fresh_client(&server).await < Duration::from_secs(5));
    assert!(server.is_running());
}

#[tokio::test]
async fn three_hundred_connections_come_and_go() {
    let server = Server::start(&["--max-connections", "400"]);
    let mut clients = Vec::new();
    for _ in 0..300 {
        clients.push(Client::connect(&server.url).await);
    }
    for client in &mut clients {
        assert_eq!(
            client.call(22, &[Value::Nil]).await.value(),
            Value::from(true)
        );
    }
    drop(clients);
    assert!(fresh_client(&server).await < Duration::from_secs(5));
}
