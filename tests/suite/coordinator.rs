//! What the fleet's coordinator is told, and what becomes of it when the coordinator is not well.
//!
//! `tests/lmcache/coordinator.py` tries the same with LMCache's own coordinator.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use rustix::process::Signal;
use serde_json::{Value as Json, json};
use stockade_tests::{Client, Key, Server, Worker, lookup_free, tokens, wait_for};

/// A request to the coordinator.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    method: String,
    path: String,
    body: Json,
}

/// A coordinator that writes down what it is told, and answers as `status` says.
struct Coordinator {
    url: String,
    told: Arc<Mutex<Vec<Told>>>,
}

type Status = dyn Fn(&Told, &[Told]) -> u16 + Send + Sync;

impl Coordinator {
    fn start(status: impl Fn(&Told, &[Told]) -> u16 + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let told = Arc::<Mutex<Vec<Told>>>::default();
        let (all, status): (_, Arc<Status>) = (Arc::clone(&told), Arc::new(status));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (all, status) = (Arc::clone(&all), Arc::clone(&status));
                std::thread::spawn(
                    move || while serve(stream.as_ref().unwrap(), &all, &*status) {},
                );
            }
        });
        Self { url, told }
    }

    fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap().clone()
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&[Told]) -> bool) -> Vec<Told> {
        wait_for(what, || Some(self.told()).filter(|told| condition(told)))
    }
}

/// One request; `false` at the connection's end.
fn serve(mut stream: &TcpStream, all: &Mutex<Vec<Told>>, status: &Status) -> bool {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return false;
    }
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        match header.trim().to_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let told = Told { method, path, body };
    let status = {
        let mut all = all.lock().unwrap();
        let status = status(&told, &all);
        all.push(told);
        status
    };
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
    );
    stream.write_all(head.as_bytes()).is_ok()
}

fn flags(url: &str) -> Vec<&str> {
    vec![
        "--coordinator-url",
        url,
        "--coordinator-heartbeat-interval",
        "0.2",
        "--coordinator-event-reporting",
        "--coordinator-event-flush-interval",
        "0.05",
        "--instance-id",
        "server one",
        "--coordinator-advertise-ip",
        "10.1.2.3",
    ]
}

/// All batches in the order in which they were taken.
fn batches(told: &[Told]) -> Vec<Json> {
    let events = told.iter().filter(|told| told.path == "/events");
    events
        .flat_map(|told| told.body["batches"].as_array().unwrap().clone())
        .collect()
}

fn kinds(told: &[Told]) -> Vec<String> {
    let kind = |batch: &Json| batch["event_type"].as_str().unwrap().to_owned();
    batches(told).iter().map(kind).collect()
}

#[tokio::test]
async fn the_coordinator_is_told_who_is_here_and_what_is_held() {
    let coordinator = Coordinator::start(|_, _| 200);
    let mut server = Server::start(&flags(&coordinator.url));
    let prompt = tokens(32, 1);
    let mut worker = Worker::register(&server, 1, "m").await;
    assert!(
        worker
            .store(&Key::new("m", &prompt, Some(0), "w"), |_| 1)
            .await
    );
    let mut client = Client::connect(&server.url).await;
    assert_eq!(
        lookup_free(&mut client, &Key::new("m", &prompt, Some(0), "r")).await,
        2
    );
    client.call("clear", &[true.into()]).await.value();
    let told = coordinator.wait_until("the deletion", |told| {
        kinds(told).contains(&"delete".into())
    });

    assert_eq!(
        (told[0].method.as_str(), told[0].path.as_str()),
        ("POST", "/instances")
    );
    assert_eq!(told[0].body["instance_id"], "server one");
    assert_eq!(told[0].body["ip"], "10.1.2.3");
    let http_port: u16 = server.http.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(told[0].body["http_port"], http_port);
    let batches = batches(&told);
    let numbers: Vec<u64> = batches
        .iter()
        .map(|it| it["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=batches.len() as u64).collect::<Vec<_>>());
    assert!(
        batches
            .iter()
            .all(|it| it["incarnation"] == batches[0]["incarnation"])
    );
    assert_eq!(kinds(&told), ["config", "store", "access", "delete"]);
    assert_eq!(batches[0]["capacity_bytes"], 64 << 20);
    assert_eq!(
        (&batches[1]["tier"], &batches[1]["backend"]),
        (&json!("l1"), &json!("dram"))
    );
    let entries = |at: usize| batches[at]["entries"].as_array().unwrap().clone();
    let keys =
        |at: usize| -> Vec<Json> { entries(at).iter().map(|it| it["key"].clone()).collect() };
    assert_eq!(
        entries(1)
            .iter()
            .map(|it| &it["size_bytes"])
            .collect::<Vec<_>>(),
        [2048, 2048]
    );
    assert_eq!(keys(1)[0]["model_name"], "m");
    assert_eq!(keys(1)[0]["chunk_hash_hex"].as_str().unwrap().len(), 64);
    assert_eq!(keys(2), keys(1), "what was used is what was stored");
    let deleted = keys(3);
    assert!(keys(1).iter().all(|key| deleted.contains(key)));
    let metrics = server.http("GET", "/metrics", "").await.1;
    assert!(
        metrics.contains("stockade_coordinator_registered 1"),
        "{metrics}"
    );

    let is_beat =
        |told: &&Told| told.method == "PUT" && told.path == "/instances/server%20one/heartbeat";
    coordinator.wait_until("two heartbeats", |told| {
        told.iter().filter(is_beat).count() >= 2
    });
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    let last = coordinator.told().pop().unwrap();
    assert_eq!(
        (last.method.as_str(), last.path.as_str()),
        ("DELETE", "/instances/server%20one")
    );
}

#[tokio::test]
async fn events_that_are_not_taken_come_again_in_order_and_once_each() {
    // Takes one message of events in three.
    let coordinator = Coordinator::start(|told, before| {
        let attempts = before.iter().filter(|told| told.path == "/events").count();
        if told.path == "/events" && attempts % 3 != 2 {
            503
        } else {
            200
        }
    });
    let server = Server::start(&flags(&coordinator.url));
    let mut worker = Worker::register(&server, 1, "m").await;
    for seed in 0..5 {
        let prompt = tokens(16, seed);
        let key = Key::new("m", &prompt, Some(0), &format!("w{seed}"));
        assert!(worker.store(&key, |_| 1).await);
        let told = |told: &[Told]| {
            told.iter()
                .any(|told| told.body.to_string().contains("\"store\""))
        };
        coordinator.wait_until("an attempt", told);
    }
    server
        .metric_becomes("stockade_coordinator_event_keys_sent_total", |keys| {
            keys == 5.0
        })
        .await;
    // Each number stands for the same entries whenever it is sent.
    let mut by_number = std::collections::BTreeMap::new();
    for batch in batches(&coordinator.told()) {
        let entries = by_number
            .entry(batch["seq"].as_u64().unwrap())
            .or_insert_with(|| batch["entries"].clone());
        assert_eq!(*entries, batch["entries"]);
    }
    let numbers: Vec<u64> = by_number.keys().copied().collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let keys: usize = by_number
        .values()
        .map(|entries| entries.as_array().unwrap().len())
        .sum();
    assert_eq!(keys, 5);
    assert_eq!(
        server
            .metric("stockade_coordinator_event_keys_lost_total")
            .await,
        0.0
    );
}

#[tokio::test]
async fn a_coordinator_that_forgot_this_server_hears_of_it_again() {
    // Knows nobody at the second heartbeat.
    let coordinator = Coordinator::start(|told, before| {
        let beats = before.iter().filter(|told| told.method == "PUT").count();
        if told.method == "PUT" && beats == 1 {
            404
        } else {
            200
        }
    });
    let _server = Server::start(&flags(&coordinator.url));
    let registrations =
        |told: &[Told]| told.iter().filter(|told| told.path == "/instances").count();
    coordinator.wait_until("another registration", |told| registrations(told) == 2);
    let told = coordinator.wait_until("its capacity again", |told| kinds(told).len() == 2);
    let revisions: Vec<Json> = batches(&told)
        .iter()
        .map(|it| it["capacity_revision"].clone())
        .collect();
    assert_eq!(revisions, [1, 2]);
}

#[tokio::test]
async fn a_coordinator_that_is_not_there_costs_nothing() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let mut server = Server::start(&flags(&url));
    let mut worker = Worker::register(&server, 1, "m").await;
    assert!(
        worker
            .store(&Key::new("m", &tokens(16, 1), Some(0), "w"), |_| 1)
            .await
    );
    assert_eq!(server.metric("stockade_coordinator_registered").await, 0.0);
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
}

#[tokio::test]
async fn the_coordinator_is_told_what_is_written_down_loaded_and_evicted() {
    let coordinator = Coordinator::start(|_, _| 200);
    let directory = tempfile::tempdir().unwrap();
    // Room for two chunks of 2 KiB.
    let gib = 4096.0 / f64::from(1_u32 << 30);
    let adapter = json!({"type": "fs", "base_path": directory.path(), "shared": true,
        "max_capacity_gb": gib, "eviction": {"eviction_policy": "LRU", "trigger_watermark": 1.0}})
    .to_string();
    let mut flags = flags(&coordinator.url);
    flags.extend(["--l2-adapter", &adapter]);
    let server = Server::start(&flags);
    let mut worker = Worker::register(&server, 1, "m").await;
    let written = "lmcache_mp_l2_store_completed_requests_total";
    let first = Key::new("m", &tokens(16, 1), Some(0), "first");
    assert!(worker.store(&first, |_| 1).await);
    server.metric_becomes(written, |it| it == 1.0).await;
    server.http("POST", "/cache/clear", "").await;
    let scheduler = Key {
        rank: None,
        ..first
    };
    worker
        .client
        .call(8, &[scheduler.value(), 1.into()])
        .await
        .value();
    let hit = worker.client.call(10, &["first".into(), 60.0.into()]).await;
    assert_eq!(hit.value().as_u64(), Some(1));
    let loaded = "lmcache_mp_l2_load_completed_requests_total";
    server.metric_becomes(loaded, |it| it == 1.0).await;
    for seed in 2..4 {
        let key = Key::new("m", &tokens(16, seed), Some(0), "more");
        assert!(worker.store(&key, |_| 2).await);
        server.metric_becomes(written, |it| it == seed as f64).await;
    }
    let of_storage = |told: &[Told]| -> Vec<Json> {
        let batches = batches(told).into_iter();
        batches.filter(|batch| batch["tier"] == "l2").collect()
    };
    let told = coordinator.wait_until("the eviction", |told| {
        of_storage(told)
            .iter()
            .any(|it| it["event_type"] == "delete")
    });
    let told = of_storage(&told);
    assert!(
        told.iter()
            .all(|it| it["backend"] == "fs" && it["shared"] == true),
        "{told:?}"
    );
    let hashes = |kind: &str| -> Vec<String> {
        let of_kind = told.iter().filter(|it| it["event_type"] == kind);
        let entries = of_kind.flat_map(|it| it["entries"].as_array().unwrap());
        entries
            .map(|it| it["key"]["chunk_hash_hex"].as_str().unwrap().to_owned())
            .collect()
    };
    let stored = hashes("store");
    assert_eq!(hashes("access"), stored[..1]);
    assert_eq!(hashes("delete")[0], stored[0], "the one used longest ago");
    let entry = &told[0]["entries"][0];
    assert_eq!(
        (&entry["size_bytes"], &entry["key"]["object_group_id"]),
        (&json!(2048), &json!(0))
    );
}
