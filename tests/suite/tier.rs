//! The second tier, through a real server on real storage.

mod api;
mod cluster;
mod real_faults;
mod s3;
mod tls;

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rmpv::Value;
use rustix::process::Signal;
use serde_json::json;
use stockade_tests::{Client, Key, Process, Server, Worker, tokens, wait_for};

const CHUNK: usize = 16;
/// Bytes of one chunk of a [`Worker`].
const CHUNK_BYTES: usize = 2 * 2 * CHUNK * 16 * 2;
const STORED: &str = "lmcache_mp_l2_store_completed_requests_total";
const LOADED: &str = "lmcache_mp_l2_load_completed_requests_total";

/// For storage that is slow on purpose.
const PATIENT: [&str; 4] = [
    "--l2-lookup-deadline-seconds",
    "30",
    "--l2-prefetch-deadline-seconds",
    "60",
];

fn fs(directory: &tempfile::TempDir) -> serde_json::Value {
    json!({"type": "fs", "base_path": directory.path()})
}

fn start(adapter: &serde_json::Value, flags: &[&str]) -> Server {
    let adapter = adapter.to_string();
    let mut all = vec!["--l2-adapter", &adapter];
    all.extend(flags);
    Server::start(&all)
}

/// A lookup as an engine makes it that waits: the hit in chunks.
async fn lookup(client: &mut Client, key: &Key) -> u64 {
    submit(client, key).await;
    wait(client, key, 60.0)
        .await
        .expect("the lookup never ended")
}

async fn submit(client: &mut Client, key: &Key) {
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    let reply = client.call(8, &[scheduler.value(), 1.into()]).await;
    assert_eq!(reply.value(), Value::Nil);
}

async fn wait(client: &mut Client, key: &Key, seconds: f64) -> Option<u64> {
    let arguments = [key.request_id.as_str().into(), seconds.into()];
    client.call(10, &arguments).await.value().as_u64()
}

async fn query(client: &mut Client, key: &Key) -> Option<u64> {
    let reply = client.call(9, &[key.request_id.as_str().into()]).await;
    reply.value().as_u64()
}

async fn end(client: &mut Client, key: &Key) {
    client
        .call(13, &[key.request_id.as_str().into()])
        .await
        .value();
}

/// Stores a prompt whose chunk `index` is filled with `first + index`, and waits until it is
/// written down.
async fn store(server: &Server, prompt: &[u32], first: u8) {
    let mut worker = Worker::register(server, 1, "org/m").await;
    let key = Key::new("org/m", prompt, Some(0), "w");
    assert!(worker.store(&key, |index| first + index as u8).await);
    let chunks = (prompt.len() / CHUNK) as f64;
    server
        .metric_becomes(STORED, |written| written >= chunks)
        .await;
}

/// Has a server write a prompt down into `directory` as [`store`] does, and ends it.
async fn leave_stored(directory: &tempfile::TempDir, prompt: &[u32]) {
    let server = start(&fs(directory), &[]);
    store(&server, prompt, 1).await;
}

fn chunks(first: u8, count: u8) -> Vec<Vec<u8>> {
    (0..count)
        .map(|index| vec![first + index; CHUNK_BYTES])
        .collect()
}

fn data_files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "data")
        })
        .collect();
    files.sort();
    files
}

/// The file of the chunk that is filled with `byte`.
fn file_of(directory: &Path, byte: u8) -> PathBuf {
    let is_it = |path: &PathBuf| std::fs::read(path).unwrap().first() == Some(&byte);
    data_files(directory).into_iter().find(is_it).unwrap()
}

async fn in_memory(server: &Server) -> u64 {
    let status = server.json("/status").await;
    status["storage_manager"]["l1_manager"]["total_object_count"]
        .as_u64()
        .unwrap()
}

#[tokio::test]
async fn what_one_server_stored_the_next_one_finds_under_lmcaches_names() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(3 * CHUNK, 1);
    let mut first = start(&fs(&directory), &[]);
    store(&first, &prompt, 10).await;
    first.signal(Signal::KILL);
    first.wait();

    let files = data_files(directory.path());
    assert_eq!(files.len(), 3);
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("org-SEP-m@0x01000100@0@"), "{name}");
        assert_eq!(std::fs::metadata(file).unwrap().len(), CHUNK_BYTES as u64);
    }

    let second = start(&fs(&directory), &[]);
    let mut worker = Worker::register(&second, 7, "org/m").await;
    let key = Key::new("org/m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 3);
    assert_eq!(query(&mut worker.client, &key).await, Some(0), "told once");
    assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(10, 3));
    // Another tenant's request finds nothing of it.
    let other = Key {
        salt: "tenant".to_owned(),
        ..Key::new("org/m", &prompt, Some(0), "other")
    };
    assert_eq!(lookup(&mut worker.client, &other).await, 0);
    let adapters = second.json("/config/adapters").await;
    assert_eq!(adapters["adapters"][0]["type_name"], "fs");
    let status = second.json("/status").await;
    let storage = &status["storage_manager"];
    assert_eq!(storage["l2_adapters"][0]["is_healthy"], true, "{storage}");
    assert_eq!(storage["prefetch_controller"]["max_in_flight"], 8);
    assert_eq!(
        second.metric("lmcache_mp_lookup_hit_l2_tokens_total").await,
        3.0 * CHUNK as f64
    );
}

#[tokio::test]
async fn a_lookup_is_pending_while_storage_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(2 * CHUNK, 2);
    leave_stored(&directory, &prompt).await;
    let slow = json!({"type": "fault_inject", "delay_ms": 700, "inner": fs(&directory)});
    let server = start(&slow, &PATIENT);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let key = Key::new("org/m", &prompt, Some(0), "r");
    submit(&mut worker.client, &key).await;
    assert_eq!(query(&mut worker.client, &key).await, None);
    assert_eq!(wait(&mut worker.client, &key, 0.01).await, None);
    // What the scheduler gives back too early is not taken from under the loading.
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    worker
        .client
        .call(12, &[scheduler.value(), 1.into()])
        .await
        .value();
    // The connection serves other requests meanwhile.
    let mut other = Client::connect(&server.url).await;
    assert_eq!(other.call(24, &[]).await.value(), Value::from("OK"));
    assert_eq!(wait(&mut worker.client, &key, 60.0).await, Some(2));
    assert_eq!(
        wait(&mut worker.client, &key, 0.0).await,
        Some(0),
        "told once"
    );
    assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(1, 2));
}

#[tokio::test]
async fn two_lookups_of_the_same_prompt_load_it_once() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(4 * CHUNK, 3);
    leave_stored(&directory, &prompt).await;
    let slow = json!({"type": "fault_inject", "delay_ms": 300, "inner": fs(&directory)});
    let server = start(&slow, &PATIENT);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let keys: Vec<_> = (0..5)
        .map(|number| Key::new("org/m", &prompt, Some(0), &format!("r{number}")))
        .collect();
    for key in &keys {
        submit(&mut worker.client, key).await;
    }
    for key in &keys {
        assert_eq!(wait(&mut worker.client, key, 60.0).await, Some(4));
        assert_eq!(worker.retrieve(key).await.unwrap(), chunks(1, 4));
    }
    assert_eq!(server.metric(LOADED).await, 4.0);
}

#[tokio::test]
async fn loaded_objects_go_when_they_were_read_unless_they_are_to_stay() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(3 * CHUNK, 4);
    leave_stored(&directory, &prompt).await;
    for (policy, left) in [("default", 0), ("retain", 3)] {
        let server = start(&fs(&directory), &["--l2-prefetch-policy", policy]);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        for round in ["a", "b"] {
            let key = Key::new("org/m", &prompt, Some(0), round);
            assert_eq!(lookup(&mut worker.client, &key).await, 3);
            assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(1, 3));
            end(&mut worker.client, &key).await;
            assert_eq!(in_memory(&server).await, left, "{policy}");
        }
        let loads = if left == 0 { 6.0 } else { 3.0 };
        assert_eq!(server.metric(LOADED).await, loads, "{policy}");
        assert_eq!(
            server.metric(STORED).await,
            0.0,
            "what was loaded is not written again"
        );
    }
}

#[tokio::test]
async fn with_skip_l1_memory_is_a_buffer() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(&fs(&directory), &["--l2-store-policy", "skip_l1"]);
    let prompt = tokens(3 * CHUNK, 5);
    store(&server, &prompt, 1).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while in_memory(&server).await > 0 {
        assert!(Instant::now() < deadline, "memory was never emptied");
    }
    let mut worker = Worker::register(&server, 2, "org/m").await;
    let key = Key::new("org/m", &prompt, Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 3);
    assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(1, 3));
}

#[tokio::test]
async fn a_gap_or_a_damaged_value_ends_the_prefix_there() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(4 * CHUNK, 6);
    leave_stored(&directory, &prompt).await;
    let flip = |byte: u8, at: usize| {
        let file = file_of(directory.path(), byte);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[at] ^= 1;
        std::fs::write(file, bytes).unwrap();
    };
    flip(3, 100);
    let server = start(&fs(&directory), &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let mut hit = async |name: &str| {
        let key = Key::new("org/m", &prompt, Some(0), name);
        let hit = lookup(&mut worker.client, &key).await;
        if hit > 0 {
            let part = Key {
                end: (hit as usize * CHUNK) as i64,
                ..key.clone()
            };
            let read = worker.retrieve(&part).await.unwrap();
            assert_eq!(read, chunks(1, u8::try_from(hit).unwrap()));
        }
        end(&mut worker.client, &key).await;
        hit
    };
    assert_eq!(hit("flipped").await, 2);
    assert_eq!(
        server.metric("stockade_l2_quarantined_objects_total").await,
        1.0
    );
    assert_eq!(
        data_files(directory.path()).len(),
        3,
        "it is out of the way"
    );
    assert_eq!(hit("gap").await, 2);
    // Stored again it is whole again; the others are not written twice.
    let again = Key::new("org/m", &prompt, Some(0), "again");
    assert!(worker.store(&again, |index| 1 + index as u8).await);
    server
        .metric_becomes(STORED, |written| written == 1.0)
        .await;
    drop(server);
    std::fs::File::options()
        .write(true)
        .open(file_of(directory.path(), 1))
        .unwrap()
        .set_len(CHUNK_BYTES as u64 / 2)
        .unwrap();
    let server = start(&fs(&directory), &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let key = Key::new("org/m", &prompt, Some(0), "torn");
    assert_eq!(lookup(&mut worker.client, &key).await, 0);
    let status = server.json("/status").await;
    let l1 = &status["storage_manager"]["l1_manager"];
    assert_eq!(
        (&l1["owned_locks"], &l1["staging_object_count"]),
        (&json!(0), &json!(0))
    );
}

#[tokio::test]
async fn a_lookup_that_memory_answers_asks_no_storage() {
    let hung = json!({"type": "fault_inject", "find": "hang", "load": "hang", "store": "hang",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10}});
    let server = start(&hung, &[]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let prompt = tokens(3 * CHUNK, 7);
    let key = Key::new("org/m", &prompt, Some(0), "w");
    assert!(worker.store(&key, |_| 9).await);
    let key = Key::new("org/m", &prompt, Some(0), "r");
    submit(&mut worker.client, &key).await;
    assert_eq!(query(&mut worker.client, &key).await, Some(3), "at once");
    assert_eq!(
        server
            .metric("lmcache_mp_l2_prefetch_lookup_requests_total")
            .await,
        0.0
    );
}

/// Each fault of storage and what becomes of it: a store that still succeeds in memory, or a miss,
/// within the deadline.
#[tokio::test]
async fn every_fault_of_storage_costs_at_most_its_deadline_and_becomes_a_miss() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(2 * CHUNK, 8);
    leave_stored(&directory, &prompt).await;
    for (number, (operation, fault, reason)) in [
        ("find", "unavailable", "unavailable"),
        ("find", "denied", "denied"),
        ("find", "hang", "deadline"),
        ("load", "unavailable", "unavailable"),
        ("load", "denied", "denied"),
        ("load", "hang", "deadline"),
        ("store", "full", "full"),
        ("store", "denied", "denied"),
        ("store", "unavailable", "unavailable"),
        ("store", "hang", "deadline"),
    ]
    .into_iter()
    .enumerate()
    {
        let adapter = json!({"type": "fault_inject", operation: fault, "inner": fs(&directory)});
        let flags = [
            "--l2-lookup-deadline-seconds",
            "0.3",
            "--l2-prefetch-deadline-seconds",
            "0.6",
            "--l2-store-deadline-seconds",
            "0.3",
        ];
        let server = start(&adapter, &flags);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        let key = Key::new("org/m", &prompt, Some(0), "r");
        let began = Instant::now();
        let hit = lookup(&mut worker.client, &key).await;
        let expected = if operation == "store" { 2 } else { 0 };
        assert_eq!(hit, expected, "{operation} {fault}");
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{operation} {fault}"
        );
        // Memory serves on.
        let fresh = tokens(2 * CHUNK, 900 + number as u64);
        let key = Key::new("org/m", &fresh, Some(0), "w");
        assert!(worker.store(&key, |_| 5).await);
        let key = Key::new("org/m", &fresh, Some(0), "again");
        assert_eq!(lookup(&mut worker.client, &key).await, 2);
        let during = if operation == "find" {
            "lookup"
        } else {
            operation
        };
        let wanted = format!("during=\"{during}\",reason=\"{reason}\"");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (_, metrics) = server.http("GET", "/metrics", "").await;
            if metrics.lines().any(|line| {
                line.starts_with("stockade_l2_failures_total") && line.contains(&wanted)
            }) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{operation} {fault}: no {wanted} in\n{metrics}"
            );
        }
        let status = server.json("/status").await;
        assert_eq!(status["is_healthy"], true);
    }
}

#[tokio::test]
async fn storage_that_is_down_is_left_alone_and_costs_nothing_then() {
    let down = json!({"type": "fault_inject", "find": "hang",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10}});
    let server = start(&down, &["--l2-lookup-deadline-seconds", "0.1"]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let mut slow = 0;
    for number in 0..30 {
        let key = Key::new(
            "org/m",
            &tokens(CHUNK, 100 + number),
            Some(0),
            &format!("r{number}"),
        );
        submit(&mut worker.client, &key).await;
        // While the breaker is open there is nothing to wait for.
        if query(&mut worker.client, &key).await.is_none() {
            slow += 1;
            assert_eq!(wait(&mut worker.client, &key, 60.0).await, Some(0));
        }
        end(&mut worker.client, &key).await;
    }
    assert!((5..30).contains(&slow), "{slow} of 30 waited");
    let status = server.json("/status").await;
    let adapter = &status["storage_manager"]["l2_adapters"][0];
    assert!(
        adapter["breakers"]["reads"]["openings"].as_u64().unwrap() > 0,
        "{adapter}"
    );
}

#[tokio::test]
async fn a_request_that_ends_while_it_loads_leaves_nothing_held() {
    let directory = tempfile::tempdir().unwrap();
    let prompt = tokens(3 * CHUNK, 10);
    leave_stored(&directory, &prompt).await;
    let hung = json!({"type": "fault_inject", "load": "hang", "inner": fs(&directory)});
    let server = start(&hung, &["--l2-prefetch-deadline-seconds", "3600"]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let key = Key::new("org/m", &prompt, Some(0), "r");
    submit(&mut worker.client, &key).await;
    let held = async |server: &Server| {
        let status = server.json("/status").await;
        let l1 = &status["storage_manager"]["l1_manager"];
        l1["staging_object_count"].as_u64().unwrap() + l1["owned_locks"].as_u64().unwrap()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while held(&server).await != 3 {
        assert!(Instant::now() < deadline, "nothing was ever reserved");
    }
    end(&mut worker.client, &key).await;
    while held(&server).await != 0 {
        assert!(
            Instant::now() < deadline,
            "the reservations were never given back"
        );
    }
}

#[tokio::test]
async fn a_tenant_that_is_purged_is_gone_from_storage_too() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    std::fs::write(&file, "[tenants.a]\nsalts = [\"salt-a\"]\n").unwrap();
    let storage = directory.path().join("kv");
    let adapter = json!({"type": "fs", "base_path": storage});
    let server = start(&adapter, &["--config", file.to_str().unwrap()]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    for salt in ["salt-a", "other"] {
        let key = Key {
            salt: salt.to_owned(),
            ..Key::new("org/m", &tokens(2 * CHUNK, 12), Some(0), salt)
        };
        assert!(worker.store(&key, |_| 1).await);
    }
    server
        .metric_becomes(STORED, |written| written == 4.0)
        .await;
    let (status, receipt) = server.http("POST", "/v1/tenants/a/purge", "").await;
    assert_eq!(status, 200, "{receipt}");
    let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
    assert_eq!(
        (&receipt["l2"]["values"], &receipt["complete"]),
        (&json!(2), &json!(true)),
        "{receipt}"
    );
    let left = data_files(&storage);
    assert_eq!(left.len(), 2);
    assert!(
        left.iter()
            .all(|file| file.to_str().unwrap().ends_with("@other.data"))
    );
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert!(!metrics.contains("salt-a"), "{metrics}");
}

/// A write that is killed anywhere leaves the old value or the whole new one.
#[tokio::test]
async fn after_kill_9_under_load_every_hit_is_byte_equal() {
    let directory = tempfile::tempdir().unwrap();
    let rounds: u64 = std::env::var("STOCKADE_KILL_ROUNDS").map_or(3, |it| it.parse().unwrap());
    let mut stored: HashMap<u64, u8> = HashMap::new();
    let mut hits = 0;
    for round in 0..rounds {
        let mut server = start(&fs(&directory), &[]);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        // What earlier rounds stored is there or not, but never wrong.
        for (&seed, &byte) in &stored {
            let key = Key::new(
                "org/m",
                &tokens(4 * CHUNK, seed),
                Some(0),
                &format!("r{seed}"),
            );
            let hit = lookup(&mut worker.client, &key).await;
            if hit > 0 {
                let part = Key {
                    end: (hit as usize * CHUNK) as i64,
                    ..key.clone()
                };
                let read = worker.retrieve(&part).await.unwrap();
                assert_eq!(
                    read,
                    chunks(byte, u8::try_from(hit).unwrap()),
                    "seed {seed}"
                );
                hits += hit;
            }
            end(&mut worker.client, &key).await;
        }
        let goal = 20 + 13 * round;
        for number in 0.. {
            let seed = 1000 + round * 100_000 + number;
            let byte = (seed % 200) as u8;
            let key = Key::new("org/m", &tokens(4 * CHUNK, seed), Some(0), "w");
            assert!(worker.store(&key, |index| byte + index as u8).await);
            stored.insert(seed, byte);
            // In the midst of writing: some are down, others wait.
            if server.metric(STORED).await >= goal as f64 {
                break;
            }
        }
        server.signal(Signal::KILL);
        server.wait();
    }
    assert!(hits > 0, "nothing that was stored was found");
}

#[tokio::test]
async fn a_full_queue_drops_and_counts_and_nobody_waits() {
    let slow = json!({"type": "fault_inject", "store": "hang",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10}});
    let server = start(
        &slow,
        &[
            "--l2-store-queue-items",
            "8",
            "--l2-store-deadline-seconds",
            "3600",
        ],
    );
    let mut worker = Worker::register(&server, 1, "org/m").await;
    for number in 0..50 {
        let key = Key::new("org/m", &tokens(4 * CHUNK, 500 + number), Some(0), "w");
        assert!(worker.store(&key, |_| 1).await);
    }
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    let dropped: f64 = metrics
        .lines()
        .filter(|line| {
            line.starts_with("stockade_l2_failures_total") && line.contains("queue_full")
        })
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert!(dropped >= 100.0, "{dropped}");
}

#[tokio::test]
async fn secrets_of_adapters_are_shown_nowhere_and_a_dead_backend_stops_no_start() {
    let secret = "hunter2-and-more";
    let closed = free_port();
    let adapter = json!({"type": "resp", "host": "127.0.0.1", "port": closed, "password": secret});
    let mut server = start(&adapter, &["--log-level", "debug"]);
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let key = Key::new("org/m", &tokens(CHUNK, 11), Some(0), "r");
    assert_eq!(lookup(&mut worker.client, &key).await, 0);
    for path in ["/config", "/status", "/config/adapters", "/metrics"] {
        let (status, body) = server.http("GET", path, "").await;
        assert_eq!(status, 200);
        assert!(!body.contains(secret), "{path}");
    }
    let config = server.json("/config").await;
    let shown = &config["storage_manager"]["l2_adapter_config"]["adapters"][0];
    assert_eq!(shown["password"], "[redacted]", "{shown}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    assert!(!server.log().join("\n").contains(secret));
}

#[test]
fn adapters_that_cannot_be_are_refused_with_the_way_out() {
    for (adapter, part) in [
        (
            r#"{"type": "p2p"}"#,
            "--l2-adapter type p2p: peer-to-peer reads are not served",
        ),
        (r#"{"type": "fs"}"#, "base_path"),
        ("{", "--l2-adapter is not JSON"),
        (
            r#"{"type": "fs", "base_path": "/proc/nothing/here"}"#,
            "base_path",
        ),
    ] {
        let output = Command::new(stockade_tests::binary())
            .args([
                "serve",
                "--port",
                "0",
                "--http-port",
                "0",
                "--l1-size-gb",
                "0.01",
            ])
            .args(["--l2-adapter", adapter])
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{adapter}");
        assert!(log.contains(part), "{adapter}: {log}");
    }
}

/// Starts a storage server and waits until it listens; says so when there is none.
fn run(command: &mut Command, directory: &Path, port: u16) -> Option<Process> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .current_dir(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        eprintln!("SKIPPED: there is no {program}");
        return None;
    };
    let running = Process(child);
    let deadline = Instant::now() + Duration::from_secs(120);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "{program} does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(running)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// What a Redis answers to one short command.
fn redis_command(port: u16, words: &[&str]) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(text.as_bytes()).ok()?;
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// A Redis of the test's own.
struct Redis {
    child: Process,
    port: u16,
    directory: tempfile::TempDir,
}

impl Redis {
    /// `None`, said loudly, where there is no Redis.
    fn start() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let Some(child) = Self::spawn(&directory, port) else {
            eprintln!("SKIPPED: no redis-server in PATH; apt-get install redis-server");
            return None;
        };
        let redis = Self {
            child,
            port,
            directory,
        };
        redis.wait();
        Some(redis)
    }

    fn spawn(directory: &tempfile::TempDir, port: u16) -> Option<Process> {
        Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--appendonly",
                "yes",
            ])
            .args(["--appendfsync", "always", "--dir"])
            .arg(directory.path())
            .stdout(Stdio::null())
            .spawn()
            .ok()
            .map(Process)
    }

    fn wait(&self) {
        wait_for("redis", || {
            (self.command(&["PING"]).as_deref() == Some("+PONG\r\n")).then_some(())
        });
    }

    fn command(&self, words: &[&str]) -> Option<String> {
        redis_command(self.port, words)
    }
    fn stop(&mut self) {
        self.child.end();
    }

    fn restart(&mut self) {
        self.stop();
        self.child = Self::spawn(&self.directory, self.port).unwrap();
        self.wait();
    }

    fn adapter(&self, kind: &str) -> serde_json::Value {
        match kind {
            "resp" => json!({"type": "resp", "host": "127.0.0.1", "port": self.port}),
            _ => {
                json!({"type": "valkey", "startup_nodes": format!("127.0.0.1:{}", self.port), "key_prefix": "fleet"})
            }
        }
    }
}

#[tokio::test]
async fn redis_keeps_it_under_lmcaches_keys_and_wrong_bytes_are_a_miss() {
    let Some(redis) = Redis::start() else { return };
    for (kind, prefix, seed) in [("resp", "", 20), ("valkey", "fleet@", 21)] {
        let prompt = tokens(2 * CHUNK, seed);
        drop({
            let server = start(&redis.adapter(kind), &[]);
            store(&server, &prompt, 30).await;
            server
        });
        let keys = redis
            .command(&["KEYS", &format!("{prefix}org/m@01000100@0@*")])
            .unwrap();
        assert!(keys.starts_with("*2\r\n"), "{keys}");
        let server = start(&redis.adapter(kind), &[]);
        let mut worker = Worker::register(&server, 1, "org/m").await;
        let key = Key::new("org/m", &prompt, Some(0), "r");
        assert_eq!(lookup(&mut worker.client, &key).await, 2, "{kind}");
        assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(30, 2));
        end(&mut worker.client, &key).await;

        for name in keys.lines().filter(|line| line.contains('@')) {
            redis.command(&["SETRANGE", name, "100", "x"]).unwrap();
        }
        let key = Key::new("org/m", &prompt, Some(0), "damaged");
        assert_eq!(lookup(&mut worker.client, &key).await, 0, "{kind}");
        assert!(server.metric("stockade_l2_quarantined_objects_total").await >= 1.0);
    }
}

/// The hit of a prompt of two chunks that was [stored](store) with 1; a whole one is read and compared.
async fn hit_of_two(worker: &mut Worker, prompt: &[u32], request: &str) -> u64 {
    let key = Key::new("org/m", prompt, Some(0), request);
    let hit = lookup(&mut worker.client, &key).await;
    if hit == 2 {
        assert_eq!(worker.retrieve(&key).await.unwrap(), chunks(1, 2));
    }
    end(&mut worker.client, &key).await;
    hit
}

#[tokio::test]
async fn a_redis_that_restarts_under_load_costs_misses_and_comes_back() {
    let Some(mut redis) = Redis::start() else {
        return;
    };
    let flags = [
        "--l2-lookup-deadline-seconds",
        "0.5",
        "--l2-store-policy",
        "skip_l1",
    ];
    let server = start(&redis.adapter("resp"), &flags);
    let prompt = tokens(2 * CHUNK, 30);
    store(&server, &prompt, 1).await;
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let mut hit = async |name: String| hit_of_two(&mut worker, &prompt, &name).await;
    assert_eq!(hit("before".to_owned()).await, 2);
    redis.stop();
    for number in 0..20 {
        assert_eq!(hit(format!("down{number}")).await, 0);
    }
    redis.restart();
    let deadline = Instant::now() + Duration::from_secs(90);
    for number in 0.. {
        if hit(format!("up{number}")).await == 2 {
            break;
        }
        assert!(Instant::now() < deadline, "it never came back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
