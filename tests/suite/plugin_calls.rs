//! Plugins of the contract in a server: what clients ask of them, what they see of the cache, and
//! that eviction takes their order or does without.

use std::{fs, path::Path, time::Instant};

use rmpv::Value;
use rustix::process::Signal;
use serde_json::{Value as Json, json};
use stockade_tests::{Client, Key, Server, Worker, field, lookup, map, root, tokens};

const CHUNK: usize = 16;

/// Guests of `tests/guests/abi-v1` with their manifests, in a directory of their own.
fn plugins(guests: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let from = root().join("tests/guests/abi-v1");
    for (name, manifest) in guests {
        let file = format!("{name}.wat");
        fs::copy(from.join(&file), directory.path().join(&file)).unwrap();
        fs::write(
            directory.path().join(format!("{name}.plugin.toml")),
            manifest,
        )
        .unwrap();
    }
    directory
}

fn start(directory: &Path, flags: &[&str]) -> Server {
    let location = ["--runtime-plugin-locations", directory.to_str().unwrap()];
    Server::start(&[&location[..], flags].concat())
}

async fn plugin(server: &Server, name: &str) -> Json {
    server.json(&format!("/v1/plugins/{name}")).await
}

async fn until_running(server: &Server, name: &str) {
    for _ in 0..6000 {
        if plugin(server, name).await["state"] == "running" {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{name} does not run: {}", server.log().join("\n"));
}

fn request(method: &str, payload: &[u8]) -> Value {
    map(&[
        ("method", method.into()),
        ("payload", Value::Binary(payload.to_vec())),
    ])
}

#[tokio::test]
async fn clients_and_operators_call_plugins() {
    let patient = "calls = true\n[limits]\ncall_ms = 60000\nstate_kib = 1";
    let directory = plugins(&[
        ("echo", patient),
        (
            "bad_calls",
            "restart = 'never'\ncalls = true\n[limits]\ncall_ms = 3000",
        ),
        ("timer_loops", "[limits]\ncall_ms = 60000"),
    ]);
    let server = start(directory.path(), &[]);
    for name in ["echo", "bad_calls", "timer_loops"] {
        until_running(&server, name).await;
    }
    let mut client = Client::connect(&server.url).await;
    let called = client
        .call(
            "server_module_call",
            &[request("echo.any.thing", b"pay\0load")],
        )
        .await
        .value();
    assert_eq!(field(&called, "success"), &Value::from(true), "{called}");
    assert_eq!(
        field(&called, "payload"),
        &Value::Binary(b"pay\0load".to_vec())
    );
    assert_eq!(field(&called, "error"), &Value::from(""));
    for (method, reason) in [
        ("nobody.x", "no plugin serves `nobody.x`"),
        ("plain", "no plugin serves `plain`"),
        (
            "timer_loops.x",
            "serves no calls: its manifest needs calls = true",
        ),
    ] {
        let called = client
            .call("server_module_call", &[request(method, b"")])
            .await
            .value();
        assert_eq!(field(&called, "success"), &Value::from(false));
        let error = field(&called, "error").as_str().unwrap();
        assert!(error.contains(reason), "{error}");
    }
    // A plugin that loops keeps nobody waiting, not even on the same connection.
    let slow = client
        .post(
            &"server_module_call".into(),
            &[request("bad_calls.x", &[2])],
        )
        .await;
    let begun = Instant::now();
    let mut between = 0;
    let late = loop {
        client.post(&"get_chunk_size".into(), &[]).await;
        let reply = client.receive().await;
        let uid = rmpv::decode::read_value(&mut &reply[0][..]).unwrap();
        if uid == Value::from(slow) {
            break rmpv::decode::read_value(&mut &reply[2][..]).unwrap();
        }
        between += 1;
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        assert!(begun.elapsed().as_secs() < 60);
    };
    assert!(between > 10, "{between} replies meanwhile");
    assert_eq!(field(&late, "success"), &Value::from(false));
    let error = field(&late, "error").as_str().unwrap();
    assert!(
        error.contains("gave no reply within its call_ms of 3000 ms")
            || error.contains("ended before it replied"),
        "{error}"
    );

    let (status, body) = server
        .http("POST", "/v1/plugins/echo/call/op", "from an operator")
        .await;
    assert_eq!((status, body.as_str()), (200, "from an operator"));
    for (path, status, code) in [
        ("nobody/call/x", 404, "plugin-not-found"),
        ("timer_loops/call/x", 403, "plugin-serves-no-calls"),
    ] {
        let (found, body) = server
            .http("POST", &format!("/v1/plugins/{path}"), "")
            .await;
        let body: Json = serde_json::from_str(&body).unwrap();
        assert_eq!((found, &body["code"]), (status, &json!(code)), "{body}");
    }
    let echo = plugin(&server, "echo").await;
    assert_eq!(echo["metrics"], json!({"calls": 2.0}));
    assert!(
        echo["handlers"]
            .as_array()
            .unwrap()
            .contains(&json!({"handler": "call", "outcome": "ok", "count": 2})),
        "{echo}"
    );
    let custom = "stockade_plugin_custom_total{plugin=\"echo\",name=\"calls\"}";
    assert!((server.metric(custom).await - 2.0).abs() < f64::EPSILON);
}

#[tokio::test]
async fn a_plugin_hears_what_happens_in_the_cache() {
    let directory = plugins(&[("listens", "cache = ['stats', 'keys', 'events']")]);
    let mut server = start(directory.path(), &[]);
    server.wait_for_line("[listens] subscribed");
    let mut worker = Worker::register(&server, 1, "m").await;
    let prompt = tokens(2 * CHUNK, 1);
    assert!(
        worker
            .store(&Key::new("m", &prompt, Some(0), "first"), |_| 1)
            .await
    );
    let read = Key::new("m", &prompt, Some(0), "second");
    assert_eq!(lookup(&mut worker.client, &read).await, 2);
    assert!(worker.retrieve(&read).await.is_some());
    worker
        .client
        .call("end_session", &["second".into()])
        .await
        .value();
    server.http("POST", "/cache/clear", "{}").await;
    server.wait_for_line("\"why\":\"cleared\"");
    let log = server.log();
    let told: Vec<Json> = log
        .iter()
        .filter_map(|line| line.split_once("[listens] {"))
        .filter_map(|(_, text)| serde_json::from_str(&format!("{{{text}")).ok())
        .collect();
    let events: Vec<&Json> = told
        .iter()
        .filter_map(|message| message["events"].as_array())
        .flatten()
        .collect();
    let kinds: Vec<_> = events.iter().map(|event| &event["type"]).collect();
    assert_eq!(
        kinds,
        [
            "stored",
            "stored",
            "lookup",
            "retrieved",
            "retrieved",
            "session_end",
            "evicted",
            "evicted"
        ]
    );
    assert_eq!(
        (
            &events[0]["request"],
            &events[0]["tokens"],
            &events[0]["model"]
        ),
        (&json!("first"), &json!(16), &json!("m"))
    );
    let key = events[0]["key"].as_str().unwrap();
    let parts: Vec<_> = key.split('@').collect();
    assert!(
        parts.len() == 4 && key.starts_with("m@01000100@") && parts[3].len() == 64,
        "{key}"
    );
    assert_eq!(events[0]["key"], events[3]["key"]);
    let looked_up = json!({"type": "lookup", "salt": "", "model": "m", "request": "second", "tokens": 32, "hit_tokens": 32});
    assert_eq!(events[2], &looked_up);
    assert_eq!(events[5]["request"], "second");
    // What the cache held when the plugin was told of the stores.
    let stats = told
        .iter()
        .find(|it| it["capacity_bytes"].is_u64())
        .unwrap();
    assert_eq!(
        (&stats["stored_chunks"], &stats["tenants"][0]["name"]),
        (&json!(2), &json!("everybody else"))
    );
    let page = told.iter().find(|it| it["keys"].is_array()).unwrap();
    assert!(page["next"].is_null(), "{page}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
}

#[tokio::test]
async fn a_plugin_of_a_tenant_sees_what_is_its_tenants() {
    let directory = plugins(&[("listens", "cache = ['stats', 'keys', 'events']")]);
    let file = directory.path().join("stockade.toml");
    let tables = "[tenants.red]\nsalts = ['salt-red']\nplugins = ['listens']\n\
                  [tenants.blue]\nsalts = ['salt-blue']\n";
    fs::write(&file, tables).unwrap();
    let mut server = start(directory.path(), &["--config", file.to_str().unwrap()]);
    server.wait_for_line("[listens] subscribed");
    let mut worker = Worker::register(&server, 1, "m").await;
    for (salt, chunks) in [("salt-blue", 3), ("salt-red", 1)] {
        let prompt = tokens(chunks * CHUNK, 1);
        let mut key = Key::new("m", &prompt, Some(0), salt);
        key.salt = salt.to_owned();
        assert!(worker.store(&key, |_| 1).await);
        assert_eq!(lookup(&mut worker.client, &key).await, chunks as u64);
    }
    server.wait_for_line("\"request\":\"salt-red\",\"tokens\":16,\"hit_tokens\":16");
    // The page of keys that follows the last message.
    server.wait_for_line("\"next\":");
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    let log = server.log();
    let told: Vec<_> = log.iter().filter(|it| it.contains("[listens] ")).collect();
    assert!(told.iter().any(|it| it.contains("\"type\":\"stored\"")));
    assert!(told.iter().any(|it| it.contains("@salt-red")));
    for line in &told {
        assert!(!line.contains("blue"), "{line}");
    }
    let stats: Vec<Json> = told
        .iter()
        .filter_map(|line| serde_json::from_str(line.split_once("[listens] ")?.1).ok())
        .filter(|it: &Json| it["capacity_bytes"].is_u64())
        .collect();
    let last = stats.last().unwrap();
    assert_eq!(
        (
            &last["objects"],
            &last["stored_chunks"],
            &last["tenants"][0]["name"]
        ),
        (&json!(1), &json!(1), &json!("red")),
        "{last}"
    );
}

#[tokio::test]
async fn eviction_takes_a_plugins_order_and_does_without_a_bad_one() {
    // Half of what is used goes when 164 of the 16384 slots are in use.
    let flags = [
        "--eviction-trigger-watermark",
        "0.01",
        "--eviction-ratio",
        "0.5",
    ];
    let patient = "restart = 'never'\nrank = true\n[limits]\nrank_ms = 1000\ncall_ms = 60000";
    let rankings = |reason: &str, plugin: &str| {
        format!("stockade_plugin_rankings_total{{plugin=\"{plugin}\",reason=\"{reason}\"}}")
    };
    {
        let directory = plugins(&[("rank_reverses", patient)]);
        let server = start(directory.path(), &flags);
        until_running(&server, "rank_reverses").await;
        Worker::register(&server, 1, "m").await.churn().await;
        server
            .metric_becomes("stockade_ranked_evicted_objects_total", |count| {
                count >= 2.0
            })
            .await;
        let ok = rankings("ok", "rank_reverses");
        server.metric_becomes(&ok, |count| count >= 1.0).await;
    }
    for (guest, reason) in [("rank_garbage", "garbage"), ("rank_traps", "trap")] {
        let directory = plugins(&[(guest, patient)]);
        let server = start(directory.path(), &flags);
        until_running(&server, guest).await;
        Worker::register(&server, 1, "m").await.churn().await;
        let mut status = Json::Null;
        for _ in 0..6000 {
            status = plugin(&server, guest).await;
            if status["rank_fallbacks"][reason].as_u64().is_some() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert!(
            status["rank_fallbacks"][reason].as_u64() > Some(0),
            "{status}"
        );
        assert!(server.metric(&rankings(reason, guest)).await > 0.0);
        assert!(server.metric("lmcache_mp_l1_evicted_chunks_total").await > 0.0);
        assert_eq!(
            server.metric("stockade_ranked_evicted_objects_total").await,
            0.0
        );
        assert_eq!(status["ranked"], 0, "{status}");
    }
}
