//! KV in, KV out: what is found, what is not, and that it is the same bytes.

use std::os::unix::fs::FileExt as _;

use rmpv::Value;
use stockade_tests::{Client, Key, Server, Worker, field, lookup, lookup_free, tokens, wait_for};
use stockade_wire::{Dtype, pickle};

const CHUNK: usize = 16;

/// Bytes of one chunk of a [`Worker`].
const CHUNK_BYTES: usize = 2 * 2 * CHUNK * 16 * 2;

#[tokio::test]
async fn what_was_stored_is_read_back_by_another_worker() {
    let server = Server::start(&[]);
    let mut writer = Worker::register(&server, 1, "m").await;
    let mut reader = Worker::register(&server, 2, "m").await;
    let prompt = tokens(3 * CHUNK, 1);
    assert!(
        writer
            .store(&Key::new("m", &prompt, Some(0), "w"), |index| 10
                + index as u8)
            .await
    );

    let key = Key::new("m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut reader.client, &key).await, 3);
    let chunks = reader.retrieve(&key).await.unwrap();
    assert_eq!(
        chunks,
        [
            vec![10; CHUNK_BYTES],
            vec![11; CHUNK_BYTES],
            vec![12; CHUNK_BYTES]
        ]
    );
    assert!(
        reader.retrieve(&key).await.is_none(),
        "the locks were used up"
    );

    // A part of the range, after the locks of the first chunk were given back.
    let mut key = Key::new("m", &prompt, Some(0), "part");
    assert_eq!(lookup(&mut reader.client, &key).await, 3);
    let first = Key {
        rank: None,
        end: CHUNK as i64,
        ..key.clone()
    };
    reader
        .client
        .call(12, &[first.value(), 1.into()])
        .await
        .value();
    key.start = CHUNK as i64;
    assert_eq!(
        reader.retrieve(&key).await.unwrap(),
        [vec![11; CHUNK_BYTES], vec![12; CHUNK_BYTES]]
    );
}

#[tokio::test]
async fn a_lookup_finds_the_longest_prefix_and_nothing_else() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let prompt = tokens(4 * CHUNK, 2);
    let stored = Key {
        end: 2 * CHUNK as i64,
        ..Key::new("m", &prompt, Some(0), "w")
    };
    assert!(worker.store(&stored, |_| 1).await);
    let mut client = Client::connect(&server.url).await;
    let mut hit = async |name: &str, tokens: &[u32], salt: &str, model: &str| {
        let key = Key {
            salt: salt.to_owned(),
            ..Key::new(model, tokens, Some(0), name)
        };
        lookup_free(&mut client, &key).await
    };
    assert_eq!(hit("longer", &prompt, "", "m").await, 2);
    assert_eq!(hit("shorter", &prompt[..CHUNK], "", "m").await, 1);
    assert_eq!(
        hit("one token short", &prompt[..2 * CHUNK - 1], "", "m").await,
        1
    );
    assert_eq!(hit("suffix", &prompt[CHUNK..], "", "m").await, 0);
    assert_eq!(hit("tenant", &prompt, "tenant-b", "m").await, 0);
    assert_eq!(hit("model", &prompt, "", "n").await, 0);
    let mut other = prompt.clone();
    other[0] ^= 1;
    assert_eq!(hit("first token", &other, "", "m").await, 0);
    let mut other = prompt.clone();
    other[CHUNK] ^= 1;
    assert_eq!(hit("second chunk", &other, "", "m").await, 1);
}

#[tokio::test]
async fn a_status_is_told_once() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let prompt = tokens(CHUNK, 3);
    assert!(
        worker
            .store(&Key::new("m", &prompt, Some(0), "w"), |_| 1)
            .await
    );
    let key = Key::new("m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 1);
    assert_eq!(
        worker.client.call(9, &["r".into()]).await.value(),
        Value::from(0)
    );
}

#[tokio::test]
async fn only_committed_bytes_are_ever_found() {
    let server = Server::start(&[]);
    let mut keep = Worker::register(&server, 1, "m").await;
    let mut leaver = Worker::register(&server, 2, "m").await;
    let prompt = tokens(2 * CHUNK, 4);
    let key = Key::new("m", &prompt, Some(0), "w");
    assert!(!keep.commit_store(&key).await, "commit without prepare");
    assert_eq!(leaver.prepare_store(&key).await.len(), 2);
    assert_eq!(
        lookup_free(&mut keep.client, &Key::new("m", &prompt, Some(0), "r")).await,
        0
    );
    assert!(
        keep.prepare_store(&key).await.is_empty(),
        "somebody else is writing it"
    );
    assert!(
        !keep.commit_store(&key).await,
        "the reservation is not ours"
    );
    // LMCache publishes the slots here, never written as they are.
    leaver.client.call(15, &[2.into()]).await.value();
    assert_eq!(
        lookup_free(&mut keep.client, &Key::new("m", &prompt, Some(0), "r2")).await,
        0
    );
    let manager = &server.json("/status").await["storage_manager"]["l1_manager"];
    assert_eq!(
        (&manager["staging_bytes"], &manager["memory_used_bytes"]),
        (&0.into(), &0.into())
    );
    // The range is free again.
    assert!(keep.store(&key, |_| 9).await);
    assert!(!keep.commit_store(&key).await, "double commit");
    assert_eq!(
        lookup_free(&mut keep.client, &Key::new("m", &prompt, Some(0), "r3")).await,
        2
    );
}

#[tokio::test]
async fn a_repeated_prepare_gets_the_same_slots() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let key = Key::new("m", &tokens(2 * CHUNK, 5), Some(0), "w");
    let slots = worker.prepare_store(&key).await;
    assert_eq!(worker.prepare_store(&key).await, slots);
    assert!(worker.commit_store(&key).await);
}

#[tokio::test]
async fn locks_have_owners_and_add_up() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let prompt = tokens(2 * CHUNK, 6);
    assert!(
        worker
            .store(&Key::new("m", &prompt, Some(0), "w"), |_| 3)
            .await
    );
    let mine = Key {
        readers: 3,
        ..Key::new("m", &prompt, Some(0), "mine")
    };
    assert_eq!(lookup(&mut worker.client, &mine).await, 2);
    let locks = async || {
        let manager = server.json("/status").await["storage_manager"]["l1_manager"].clone();
        assert_eq!(manager["object_locks"], manager["owned_locks"]);
        manager["object_locks"].as_u64().unwrap()
    };
    assert_eq!(locks().await, 6);
    // Another request has no lock, whatever is locked.
    let theirs = Key::new("m", &prompt, Some(0), "theirs");
    assert!(worker.retrieve(&theirs).await.is_none());
    for _ in 0..3 {
        assert!(worker.retrieve(&mine).await.is_some());
    }
    assert!(worker.retrieve(&mine).await.is_none());
    assert_eq!(locks().await, 0);
    // A second lookup of a request replaces the first, and the end of a request gives all back.
    for _ in 0..3 {
        assert_eq!(lookup(&mut worker.client, &theirs).await, 2);
        assert_eq!(locks().await, 2);
    }
    worker.client.call(13, &["theirs".into()]).await.value();
    assert_eq!(locks().await, 0);
}

#[tokio::test]
async fn clear_keeps_what_is_locked_unless_forced() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let (held, loose) = (tokens(CHUNK, 7), tokens(CHUNK, 8));
    assert!(
        worker
            .store(&Key::new("m", &held, Some(0), "a"), |_| 1)
            .await
    );
    assert!(
        worker
            .store(&Key::new("m", &loose, Some(0), "b"), |_| 2)
            .await
    );
    let key = Key::new("m", &held, Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 1);
    worker.client.call(20, &[false.into()]).await.value();
    assert_eq!(
        lookup_free(&mut worker.client, &Key::new("m", &loose, Some(0), "l")).await,
        0
    );
    assert_eq!(worker.retrieve(&key).await.unwrap(), [vec![1; CHUNK_BYTES]]);
    let again = Key::new("m", &held, Some(0), "r2");
    assert_eq!(lookup(&mut worker.client, &again).await, 1);
    worker.client.call(20, &[true.into()]).await.value();
    assert!(worker.retrieve(&again).await.is_none());
    assert_eq!(
        lookup_free(&mut worker.client, &Key::new("m", &held, Some(0), "r3")).await,
        0
    );
}

#[tokio::test]
async fn a_full_pool_evicts_the_oldest_and_never_what_is_locked() {
    // 64 MiB in slots of 4 KiB hold 16 384 chunks.
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let prompt = |seed| tokens(512 * CHUNK, seed);
    let key = |seed, request: &str| Key::new("m", &prompt(seed), Some(0), request);
    assert!(worker.store(&key(100, "held"), |_| 5).await);
    assert!(worker.store(&key(101, "oldest"), |_| 6).await);
    let held = key(100, "holder");
    assert_eq!(lookup(&mut worker.client, &held).await, 512);
    for seed in 0..48 {
        let key = key(200 + seed, "fill");
        assert_eq!(
            worker.prepare_store(&key).await.len(),
            512,
            "a store failed while something could be evicted"
        );
        assert!(worker.commit_store(&key).await);
    }
    assert_eq!(
        lookup_free(&mut worker.client, &key(101, "l1")).await,
        0,
        "the oldest went"
    );
    assert_eq!(
        lookup_free(&mut worker.client, &key(247, "l2")).await,
        512,
        "the newest stayed"
    );
    let chunks = worker.retrieve(&held).await.expect("locked chunks stay");
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.iter().all(|&byte| byte == 5))
    );
}

#[tokio::test]
async fn silent_workers_are_reaped_and_their_reservations_freed() {
    let server = Server::start(&[
        "--worker-reap-timeout-seconds",
        "0.5",
        "--worker-registration-grace-seconds",
        "0.5",
    ]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let key = Key::new("m", &tokens(CHUNK, 9), Some(0), "w");
    assert_eq!(worker.prepare_store(&key).await.len(), 1);
    let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
    while server.json("/status").await["registered_non_cuda_instance_ids"] != serde_json::json!([])
    {
        assert!(
            std::time::Instant::now() < deadline,
            "the worker was not reaped"
        );
        tokio::task::yield_now().await;
    }
    assert!(!worker.commit_store(&key).await);
    assert_eq!(
        server.json("/status").await["storage_manager"]["l1_manager"]["staging_bytes"],
        0
    );
}

#[tokio::test]
async fn without_shared_memory_nothing_is_in_dev_shm_and_kv_moves_inline() {
    let server = Server::start(&["--shm-name", ""]);
    let mut worker = Worker::register(&server, 1, "m").await;
    assert_eq!(worker.segment, std::path::Path::new("/dev/shm"));
    let key = Key::new("m", &tokens(CHUNK, 10), Some(0), "w");
    let reply = worker
        .client
        .call(16, &[key.value(), 1.into()])
        .await
        .value();
    assert_eq!(
        stockade_tests::field(&reply, "context"),
        &Value::Map(Vec::new())
    );
    // Not a pickle of tensors: refused in the type that the operation has.
    for data in [&b""[..], b"garbage", b"cos\nsystem\n(S'true'\ntR."] {
        let data = Value::Binary(data.to_vec());
        assert_eq!(
            worker
                .client
                .call(17, &[key.value(), 1.into(), data])
                .await
                .value(),
            false.into()
        );
    }
    assert_eq!(lookup_free(&mut worker.client, &key).await, 0);
}

#[test]
fn the_segment_goes_with_the_server_and_a_dead_servers_is_taken_over() {
    let name = format!("stockade-test-{}", std::process::id());
    let path = std::path::Path::new("/dev/shm").join(&name);
    let mut server = Server::start(&["--shm-name", &name]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 << 20);
    server.signal(rustix::process::Signal::KILL);
    server.wait();
    assert!(path.exists(), "nobody was there to remove it");
    let mut server = Server::start(&["--shm-name", &name]);
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    wait_for("the end of the segment", || (!path.exists()).then_some(()));
}

#[test]
fn a_server_on_any_port_removes_what_a_killed_one_left() {
    let mut killed = Server::start(&[]);
    let port = killed.addr.rsplit(':').next().unwrap().to_owned();
    let path = std::path::Path::new("/dev/shm").join(format!("stockade-{port}"));
    killed.signal(rustix::process::Signal::KILL);
    killed.wait();
    let running = Server::start(&[]);
    assert!(!path.exists(), "the next start takes the memory back");
    let port = running.addr.rsplit(':').next().unwrap();
    let path = std::path::Path::new("/dev/shm").join(format!("stockade-{port}"));
    let _another = Server::start(&[]);
    assert!(path.exists(), "a living server's segment is left alone");
}

#[tokio::test]
async fn objects_of_another_layout_are_not_found() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 1, "m").await;
    let key = Key::new("m", &tokens(CHUNK, 11), Some(0), "w");
    assert!(worker.store(&key, |_| 1).await);
    let Value::Map(mut fields) = stockade_tests::registration(1, "m") else {
        unreachable!()
    };
    for (name, value) in &mut fields {
        if name.as_str() == Some("dtype_str") {
            *value = "bfloat16".into();
        }
    }
    // As many bytes a chunk, and other numbers.
    worker.client.call(14, &[Value::Map(fields)]).await.value();
    let again = Key {
        request_id: "r".to_owned(),
        ..key.clone()
    };
    assert_eq!(lookup_free(&mut worker.client, &again).await, 0);
    worker
        .client
        .call(14, &[stockade_tests::registration(1, "m")])
        .await
        .value();
    let back = Key {
        request_id: "r2".to_owned(),
        ..key
    };
    assert_eq!(lookup_free(&mut worker.client, &back).await, 1);
}

/// Stores two chunks inline, overwrites a byte of the first in the segment, and retrieves
/// both inline; returns whether that succeeded.
async fn retrieve_scribbled(server: &Server) -> bool {
    let mut worker = Worker::register(server, 1, "m").await;
    let key = Key::new("m", &tokens(32, 3), Some(0), "w");
    let bytes = vec![7; 2048];
    let tensor = (Dtype::Float16, &[2, 2, 16, 16][..], &bytes[..]);
    let data = Value::Binary(pickle::write_tensors(&[tensor, tensor]).unwrap());
    let stored = worker.client.call(17, &[key.value(), 1.into(), data]).await;
    assert_eq!(stored.value(), true.into());
    std::fs::OpenOptions::new()
        .write(true)
        .open(&worker.segment)
        .unwrap()
        .write_all_at(&[8], 100)
        .unwrap();
    let again = Key {
        request_id: "r".to_owned(),
        ..key
    };
    assert_eq!(lookup(&mut worker.client, &again).await, 2);
    let reply = worker.client.call(18, &[again.value(), 1.into()]).await;
    field(&reply.value(), "success").as_bool().unwrap()
}

#[tokio::test]
async fn an_object_that_a_worker_scribbled_over_is_a_miss_quarantined_and_counted() {
    let server = Server::start(&[]);
    assert!(!retrieve_scribbled(&server).await);
    let status = server.json("/status").await;
    assert_eq!(
        status["storage_manager"]["l1_manager"]["corrupt_objects"],
        1
    );
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert!(
        metrics.contains("stockade_corrupt_objects_total 1"),
        "{metrics}"
    );
    let mut client = Client::connect(&server.url).await;
    let key = Key::new("m", &tokens(32, 3), None, "s");
    assert_eq!(lookup_free(&mut client, &key).await, 0);

    let trusting = Server::start(&["--no-l1-checksum"]);
    assert!(retrieve_scribbled(&trusting).await);
}
