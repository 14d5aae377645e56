//! Stores and retrieves that are not what they say.

use std::time::Instant;

use rmpv::Value;
use stockade_tests::{
    Client, Key, PATIENCE, Reply, Server, Worker, field, lookup, lookup_free, registration, tokens,
};

use super::Siege;

/// A commit with the data of a worker that sends KV inline.
async fn commit_inline(worker: &mut Worker, key: &Key, data: Vec<u8>) -> bool {
    let arguments = [key.value(), worker.id.into(), Value::Binary(data)];
    worker
        .client
        .call(17, &arguments)
        .await
        .value()
        .as_bool()
        .unwrap()
}

async fn used_bytes(server: &Server) -> u64 {
    let status = server.json("/status").await;
    let manager = &status["storage_manager"]["l1_manager"];
    assert_eq!(manager["staging_bytes"], 0, "a reservation is left");
    assert_eq!(manager["object_locks"], manager["owned_locks"]);
    manager["memory_used_bytes"].as_u64().unwrap()
}

#[tokio::test]
async fn ranges_that_make_no_sense_are_refused_and_leak_nothing() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let good = Key::new("m", &tokens(32, 2), Some(0), "r");
    for (start, end) in [
        (1, 16),
        (0, 17),
        (0, 64),
        (32, 16),
        (-16, 16),
        (0, -16),
        (i64::MIN, i64::MAX),
        (1 << 40, 1 << 41),
        (16, i64::MAX),
    ] {
        let key = Key {
            start,
            end,
            ..good.clone()
        };
        let error = worker
            .client
            .call(16, &[key.value(), 1.into()])
            .await
            .error();
        assert!(
            ["range", "start", "end"]
                .iter()
                .any(|name| error.contains(name)),
            "[{start}, {end}): {error}"
        );
        let reply = worker
            .client
            .call(18, &[key.value(), 1.into()])
            .await
            .value();
        assert_eq!(field(&reply, "success"), &false.into());
        assert!(!worker.commit_store(&key).await);
        let reply = worker
            .client
            .call(19, &[key.value(), 1.into()])
            .await
            .value();
        assert_eq!(reply, false.into());
    }
    for rank in [1, 255, 256, u32::MAX] {
        let key = Key {
            rank: Some(rank),
            ..good.clone()
        };
        let error = worker
            .client
            .call(16, &[key.value(), 1.into()])
            .await
            .error();
        assert!(error.contains("worker_id"), "{error}");
    }
    assert_eq!(used_bytes(&siege.server).await, 0);
    assert!(worker.store(&good, |_| 1).await);
    drop(worker);
    siege.withstood("ranges").await;
}

#[tokio::test]
async fn stale_instances_and_double_commits_change_nothing() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(16, 3), Some(0), "w");
    assert!(worker.store(&key, |_| 7).await);
    for _ in 0..100 {
        assert!(!worker.commit_store(&key).await, "a double commit");
    }
    let stored = used_bytes(&siege.server).await;
    // Another instance, one that never was, and one that has gone.
    let mut other = Worker::register(&siege.server, 2, "m").await;
    assert!(!other.commit_store(&key).await);
    other.client.call(15, &[2.into()]).await.value();
    for id in [2u64, 3, u64::MAX - 1] {
        let arguments = [key.value(), id.into()];
        // Nothing is handed out: an error, or a context without slots for a worker that may
        // have outlived the last server.
        if let Reply::Value(reply) = other.client.call(16, &arguments).await {
            assert_eq!(field(&reply, "context"), &Value::Map(Vec::new()));
        }
        let reply = other.client.call(18, &arguments).await.value();
        assert_eq!(field(&reply, "success"), &false.into());
        assert_eq!(
            other.client.call(19, &arguments).await.value(),
            false.into()
        );
        other.id = id;
        assert!(!other.commit_store(&key).await);
        assert!(!commit_inline(&mut other, &key, vec![0x80; 100]).await);
    }
    assert_eq!(used_bytes(&siege.server).await, stored);
    let read = Key {
        request_id: "r".to_owned(),
        ..key.clone()
    };
    assert_eq!(lookup(&mut worker.client, &read).await, 1);
    assert!(
        worker.retrieve(&read).await.unwrap()[0]
            .iter()
            .all(|&byte| byte == 7)
    );
    drop((worker, other));
    siege.withstood("stale instances").await;
}

#[tokio::test]
async fn a_commit_after_the_worker_was_reaped_publishes_nothing() {
    let mut siege = Siege::begin(&[
        "--worker-reap-timeout-seconds",
        "0.3",
        "--worker-registration-grace-seconds",
        "0.3",
    ])
    .await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(32, 4), Some(0), "w");
    assert_eq!(worker.prepare_store(&key).await.len(), 2);
    let deadline = Instant::now() + PATIENCE;
    while siege.server.json("/status").await["worker_liveness"]["tracked_instances"] != 0 {
        assert!(Instant::now() < deadline, "the worker was not reaped");
    }
    assert!(!worker.commit_store(&key).await);
    assert_eq!(used_bytes(&siege.server).await, 0);
    // It is told to register again, and can.
    let ping = [1.into()];
    assert_eq!(worker.client.call(22, &ping).await.value(), false.into());
    assert_eq!(worker.client.call(22, &ping).await.value(), true.into());
    worker
        .client
        .call(14, &[registration(1, "m")])
        .await
        .value();
    let read = Key {
        request_id: "r".to_owned(),
        ..key.clone()
    };
    assert_eq!(lookup_free(&mut worker.client, &read).await, 0);
    assert!(worker.store(&key, |_| 1).await);
    drop(worker);
    siege.withstood("a commit after a reap").await;
}

#[tokio::test]
async fn pickle_bombs_run_nothing_and_keep_nothing() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(16, 5), Some(0), "w");
    let marker = tempfile::tempdir().unwrap();
    let ran = marker.path().join("ran");
    let command = format!("cos\nsystem\n(S'touch {}'\ntR.", ran.display());
    let tensors = |count: usize| {
        // MARK, then a list that refers to itself again and again.
        let mut pickle = b"\x80\x04]\x94".to_vec();
        for _ in 0..count {
            pickle.extend_from_slice(b"(h\x00h\x00e");
        }
        pickle.push(b'.');
        pickle
    };
    let long_memo: Vec<u8> = [&b"\x80\x04"[..], &b"]\x94".repeat(1 << 20), b"."].concat();
    for (name, pickle) in [
        ("a call", command.into_bytes()),
        ("a billion laughs", tensors(100_000)),
        (
            "2^63 bytes of text",
            b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.".to_vec(),
        ),
        (
            "2^63 bytes",
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.".to_vec(),
        ),
        (
            "a frame of 2^63 bytes",
            b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].".to_vec(),
        ),
        (
            "a number of 2^31 bytes",
            b"\x80\x04\x8b\xff\xff\xff\x7f.".to_vec(),
        ),
        ("a million lists", long_memo),
        (
            "a million marks",
            [&b"\x80\x04"[..], &b"(".repeat(1 << 20), b"."].concat(),
        ),
        ("a memo far out", b"\x80\x04]r\xff\xff\xff\xff.".to_vec()),
        (
            "a global by name",
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93.".to_vec(),
        ),
        ("64 MiB of nothing", vec![0x80; 64 << 20]),
    ] {
        assert!(!commit_inline(&mut worker, &key, pickle).await, "{name}");
        assert!(!ran.exists(), "{name}");
        assert_eq!(used_bytes(&siege.server).await, 0, "{name}");
        siege.withstood(name).await;
    }
}

#[tokio::test]
async fn a_cut_segment_costs_its_objects_and_never_the_server() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(64, 6), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    let pending = Key::new("m", &tokens(64, 7), Some(0), "p");
    assert_eq!(worker.prepare_store(&pending).await.len(), 4);
    for length in [0, 4097] {
        let segment = std::fs::OpenOptions::new()
            .write(true)
            .open(&worker.segment);
        segment.unwrap().set_len(length).unwrap();
        let again = Key {
            request_id: format!("r{length}"),
            ..key.clone()
        };
        // Found or not, but nothing breaks.
        let _ = lookup(&mut worker.client, &again).await;
        let _ = worker.client.call(18, &[again.value(), 1.into()]).await;
        let _ = worker.commit_store(&pending).await;
        siege.withstood("a cut segment").await;
    }
    // And new objects find room.
    let fresh = Key::new("m", &tokens(64, 8), Some(0), "f");
    let mut late = Worker::register(&siege.server, 2, "m").await;
    assert!(late.store(&fresh, |index| index as u8).await);
    assert_eq!(lookup(&mut late.client, &fresh).await, 4);
    assert!(late.retrieve(&fresh).await.is_some());
}

#[tokio::test]
async fn a_removed_segment_does_not_stop_the_server() {
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(32, 9), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    std::fs::remove_file(&worker.segment).unwrap();
    let mut late = Client::connect(&siege.server.url).await;
    late.call(14, &[registration(2, "m")]).await.value();
    let read = Key {
        request_id: "r".to_owned(),
        ..key
    };
    let _ = lookup_free(&mut late, &read).await;
    drop((worker, late));
    siege.withstood("a removed segment").await;
}

/// Whoever maps the pool can write anywhere in it. What lies there is then what was written, but
/// which slots are whose is kept elsewhere.
#[tokio::test]
async fn a_scribbled_segment_costs_its_bytes_and_no_bookkeeping() {
    use std::os::unix::fs::FileExt as _;
    let mut siege = Siege::begin(&[]).await;
    let mut worker = Worker::register(&siege.server, 1, "m").await;
    let key = Key::new("m", &tokens(64, 10), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    let pending = Key::new("m", &tokens(64, 11), Some(0), "p");
    assert_eq!(worker.prepare_store(&pending).await.len(), 4);
    let segment = std::fs::OpenOptions::new()
        .write(true)
        .open(&worker.segment)
        .unwrap();
    let length = segment.metadata().unwrap().len();
    let noise = vec![0xff_u8; 1 << 20];
    for offset in (0..length).step_by(noise.len()) {
        segment.write_all_at(&noise, offset).unwrap();
    }
    assert_eq!(segment.metadata().unwrap().len(), length);
    let read = Key {
        request_id: "r".to_owned(),
        ..key.clone()
    };
    assert_eq!(lookup(&mut worker.client, &read).await, 4);
    let bytes = worker.retrieve(&read).await.unwrap();
    assert!(bytes.concat().iter().all(|&byte| byte == 0xff));
    assert!(worker.commit_store(&pending).await);
    let fresh = Key::new("m", &tokens(64, 12), Some(0), "f");
    assert!(worker.store(&fresh, |index| index as u8).await);
    assert_eq!(lookup(&mut worker.client, &fresh).await, 4);
    let bytes = worker.retrieve(&fresh).await.unwrap();
    for (index, chunk) in bytes.iter().enumerate() {
        assert!(chunk.iter().all(|&byte| byte == index as u8), "{index}");
    }
    let cleared = siege.server.http("POST", "/cache/clear", "").await;
    assert_eq!(cleared.0, 200, "{cleared:?}");
    assert_eq!(used_bytes(&siege.server).await, 0);
    drop(worker);
    siege.withstood("a scribbled segment").await;
}
