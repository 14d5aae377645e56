//! Much of what is harmless in small numbers.

use std::time::Duration;

use bytes::Bytes;
use rmpv::Value;
use stockade_tests::{Client, Key, PATIENCE, Worker, pack};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use super::{Siege, handshake};

#[tokio::test]
async fn a_thousand_connections_are_served_and_forgotten() {
    let mut siege = Siege::begin(&[]).await;
    let mut clients = Vec::new();
    for _ in 0..1000 {
        clients.push(Client::connect(&siege.server.url).await);
    }
    for client in &mut clients {
        assert_eq!(
            client.call(22, &[Value::Nil]).await.value(),
            Value::from(true)
        );
    }
    assert!(siege.server.metric("stockade_connections_open").await >= 1000.0);
    drop(clients);
    siege
        .server
        .metric_becomes("stockade_connections_open", |open| open == 0.0)
        .await;
    siege.withstood("a thousand connections").await;
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_and_others_go_on() {
    let mut siege = Siege::begin(&["--max-connections", "20"]).await;
    let mut kept = Vec::new();
    for _ in 0..19 {
        kept.push(Client::connect(&siege.server.url).await);
    }
    for _ in 0..200 {
        let _ = TcpStream::connect(&siege.server.addr).await;
    }
    for client in &mut kept {
        assert_eq!(client.call(24, &[]).await.value(), Value::from("OK"));
    }
    drop(kept);
    // Or the fresh client would be one too many.
    siege
        .server
        .metric_becomes("stockade_connections_open", |open| open == 0.0)
        .await;
    siege.withstood("connections over the limit").await;
}

/// A key of that many tokens that no other seed gives, packed by hand: packing each token as a
/// value of its own would take most of the test's time.
fn large_key(count: u32, seed: u32, request: &str) -> Bytes {
    let small = Key::new("m", &[], None, request);
    let mut packed = Vec::new();
    let Value::Map(fields) = small.value() else {
        unreachable!()
    };
    packed.push(0x80 | u8::try_from(fields.len()).unwrap());
    for (name, value) in &fields {
        packed.extend_from_slice(&pack(name));
        match name.as_str().unwrap() {
            "token_ids" => {
                packed.push(0xdd);
                packed.extend_from_slice(&count.to_be_bytes());
                for token in 0..count {
                    packed.push(0xce);
                    packed.extend_from_slice(&(token ^ seed << 20).to_be_bytes());
                }
            }
            "end" => packed.extend_from_slice(&pack(&count.into())),
            _ => packed.extend_from_slice(&pack(value)),
        }
    }
    packed.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_tokens_in_forty_requests_at_once_are_all_answered() {
    // Sessions keep tokens until they have been idle for this long.
    let mut siege = Siege::begin(&["--session-ttl-seconds", "1"]).await;
    let _worker = Worker::register(&siege.server, 1, "m").await;
    // Made before anybody connects: a handshake has a deadline.
    let name = |seed| format!("r{seed}");
    let keys: Vec<_> = (0..40)
        .map(|seed| large_key(1_000_000, seed, &name(seed)))
        .collect();
    let mut clients = Vec::new();
    for _ in &keys {
        clients.push(Client::connect(&siege.server.url).await);
    }
    let mut requests = JoinSet::new();
    for (seed, (mut client, key)) in (0..).zip(clients.into_iter().zip(keys)) {
        let name = name(seed);
        requests.spawn(async move {
            client
                .send(vec![pack(&1.into()), pack(&8.into()), key, pack(&1.into())])
                .await;
            let reply = client.receive().await;
            assert_eq!(reply[..], [pack(&1.into()), pack(&8.into())]);
            assert_eq!(
                client.call(9, &[name.as_str().into()]).await.value(),
                0.into()
            );
        });
    }
    while let Some(done) = requests.join_next().await {
        done.unwrap();
    }
    siege.withstood("forty requests of a million tokens").await;
}

#[tokio::test]
async fn sixty_four_mebibytes_are_read_and_let_go() {
    let mut siege = Siege::begin(&[]).await;
    let mut client = Client::connect(&siege.server.url).await;
    for _ in 0..3 {
        let frames = vec![
            pack(&1.into()),
            pack(&8.into()),
            vec![0x93; 64 << 20].into(),
            pack(&1.into()),
        ];
        client.send(frames).await;
        let reply = client.receive().await;
        assert_eq!(reply[0], pack(&1.into()));
        assert!(reply[1].windows(6).any(|part| part == b"error:"));
    }
    siege.withstood("64 MiB").await;
    // And half of it, from somebody who then leaves.
    let mut bytes = handshake();
    bytes.extend_from_slice(b"\x01\x01\x01\x01\x01\x08\x03");
    bytes.extend_from_slice(&(64u64 << 20).to_be_bytes());
    bytes.resize(bytes.len() + (32 << 20), 0x93);
    let stream = super::raw(&siege.server, &bytes).await;
    drop(stream);
    siege.withstood("half of 64 MiB").await;
}

#[tokio::test]
async fn readers_that_stop_reading_hurt_nobody_else() {
    let mut siege = Siege::begin(&[]).await;
    let mut deaf = Vec::new();
    let noop = [0x01, 0x01, 0x01, 0x00, 0x01, 0x18].repeat(10_000);
    for _ in 0..20 {
        let mut stream = TcpStream::connect(&siege.server.addr).await.unwrap();
        stream.write_all(&handshake()).await.unwrap();
        // The server's greeting is read, nothing after it.
        let mut greeting = [0; 64];
        stream.read_exact(&mut greeting).await.unwrap();
        for _ in 0..100 {
            // Back-pressure reaches the sender at some point, as it should.
            let write = stream.write_all(&noop);
            if tokio::time::timeout(Duration::from_millis(100), write)
                .await
                .is_err()
            {
                break;
            }
        }
        deaf.push(stream);
    }
    let others = Client::connect(&siege.server.url);
    let mut other = tokio::time::timeout(PATIENCE, others).await.unwrap();
    for _ in 0..100 {
        assert_eq!(other.call(24, &[]).await.value(), Value::from("OK"));
    }
    drop(deaf);
    siege.withstood("twenty readers that stop").await;
}

#[tokio::test]
async fn sessions_and_subscriptions_of_nobody_stay_few() {
    let mut siege = Siege::begin(&["--session-ttl-seconds", "1"]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let tokens = stockade_tests::tokens(64, 1);
    for request in 0..20_000 {
        let key = Key::new("m", &tokens, None, &format!("request-{request}"));
        worker
            .client
            .call(8, &[key.value(), 1.into()])
            .await
            .value();
    }
    drop(worker);
    siege.withstood("twenty thousand sessions").await;
}
