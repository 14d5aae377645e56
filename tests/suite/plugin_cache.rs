//! What a plugin does with the cache of a whole server: list, pin, evict, load from the second tier,
//! and keep state of its own.

use std::{fs, path::Path};

use rustix::process::Signal;
use serde_json::{Value as Json, json};
use stockade_tests::{Key, Server, Worker, root, tokens};

const CHUNK: usize = 16;
/// Bytes of one chunk of a [`Worker`].
const CHUNK_BYTES: usize = 2 * 2 * CHUNK * 16 * 2;
const WRITTEN: &str = "lmcache_mp_l2_store_completed_requests_total";
const LOADED: &str = "lmcache_mp_l2_load_completed_requests_total";

/// A directory with the plugin `relays`, which does what its calls ask.
fn relays(grants: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let guest = root().join("tests/guests/abi-v1/relays.wat");
    fs::copy(guest, directory.path().join("relays.wat")).unwrap();
    let manifest =
        format!("calls = true\ncache = {grants}\n[limits]\ncall_ms = 60000\nstate_kib = 1\n");
    fs::write(directory.path().join("relays.plugin.toml"), manifest).unwrap();
    directory
}

async fn start(plugins: &Path, flags: &[&str]) -> Server {
    let location = ["--runtime-plugin-locations", plugins.to_str().unwrap()];
    let server = Server::start(&[&location[..], flags].concat());
    for _ in 0..6000 {
        let status = server.json("/v1/plugins/relays").await;
        if status["state"] == "running" {
            return server;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("relays does not run: {}", server.log().join("\n"));
}

/// What the plugin's function answered, or the reason why not.
async fn ask(server: &Server, function: char, given: &str) -> Result<String, String> {
    let (status, body) = server
        .http(
            "POST",
            "/v1/plugins/relays/call/x",
            &format!("{function}{given}"),
        )
        .await;
    assert_eq!(status, 200, "{body}");
    match body.split_at(1) {
        ("+", answer) => Ok(answer.to_owned()),
        (_, reason) => Err(reason.to_owned()),
    }
}

async fn request(server: &Server, op: &str, keys: &[String]) -> Result<Json, String> {
    let request = json!({"op": op, "keys": keys}).to_string();
    let answer = ask(server, 'r', &request).await?;
    Ok(serde_json::from_str(&answer).unwrap())
}

fn change(done: u64, missing: u64, denied: u64) -> Json {
    json!({"done": done, "missing": missing, "denied": denied})
}

async fn listed(server: &Server) -> Vec<Json> {
    let page = ask(server, 'k', "{\"limit\":1000}").await.unwrap();
    let page: Json = serde_json::from_str(&page).unwrap();
    page["keys"].as_array().unwrap().clone()
}

async fn keys(server: &Server) -> Vec<String> {
    let of = |listed: Json| listed["key"].as_str().unwrap().to_owned();
    listed(server).await.into_iter().map(of).collect()
}

fn salted(prompt: &[u32], salt: &str) -> Key {
    Key {
        salt: salt.to_owned(),
        ..Key::new("org/m", prompt, Some(0), salt)
    }
}

fn fs_tier(directory: &tempfile::TempDir) -> String {
    json!({"type": "fs", "base_path": directory.path()}).to_string()
}

#[tokio::test]
async fn a_plugin_loads_what_it_asks_for_from_the_second_tier() {
    let plugins = relays("['keys', 'evict', 'prefetch']");
    let storage = tempfile::tempdir().unwrap();
    let tier = fs_tier(&storage);
    let flags = ["--l2-adapter", &tier];
    let prompt = tokens(5 * CHUNK, 1);
    let mut stored = {
        let server = start(plugins.path(), &flags).await;
        let mut worker = Worker::register(&server, 1, "org/m").await;
        let key = Key::new("org/m", &prompt, Some(0), "w");
        assert!(worker.store(&key, |index| 1 + index as u8).await);
        server
            .metric_becomes(WRITTEN, |written| written >= 5.0)
            .await;
        keys(&server).await
    };
    assert_eq!(stored.len(), 5);
    stored.sort();

    let server = start(plugins.path(), &flags).await;
    // While no worker has told what an object of the model is like, none can be loaded.
    let early = request(&server, "prefetch", &stored).await;
    assert_eq!(early, Ok(change(0, 5, 0)));
    let mut worker = Worker::register(&server, 7, "org/m").await;
    // One that storage does not have, and one whose bytes were changed, keep no other away.
    let never = format!("{}{}", &stored[0][..stored[0].len() - 64], "0".repeat(64));
    let other_model = stored[0].replace("org/m", "org/other");
    let hash = stored[1].rsplit('@').next().unwrap();
    let mut files = fs::read_dir(storage.path())
        .unwrap()
        .map(|it| it.unwrap().path());
    let file = files
        .find(|path| {
            path.to_string_lossy().contains(hash) && path.extension().is_some_and(|it| it == "data")
        })
        .unwrap();
    fs::write(&file, vec![0; CHUNK_BYTES]).unwrap();
    let mut asked = vec![never, other_model];
    asked.extend(stored[..4].iter().cloned());
    let loaded = request(&server, "prefetch", &asked).await;
    assert_eq!(loaded, Ok(change(3, 3, 0)), "{}", server.log().join("\n"));
    let mut there = keys(&server).await;
    there.sort();
    let wanted = [&stored[0], &stored[2], &stored[3]];
    assert_eq!(there.iter().collect::<Vec<_>>(), wanted);
    // What had come beside the damaged one was loaded once more.
    let loads = server.metric(LOADED).await;
    assert!((3.0..=5.0).contains(&loads), "{loads}");
    // Asked again, they are there, and nothing is loaded.
    let again = request(&server, "prefetch", &there).await;
    assert_eq!(again, Ok(change(3, 0, 0)));
    assert!((server.metric(LOADED).await - loads).abs() < f64::EPSILON);
    // The bytes are those that were stored, as far as nothing is missing before them.
    let key = Key::new("org/m", &prompt, Some(0), "r");
    let found = read_back(&mut worker, &key).await;
    assert_eq!(found.len(), 1, "the second was damaged");
    for (index, chunk) in found.iter().enumerate() {
        assert_eq!(chunk, &vec![1 + index as u8; CHUNK_BYTES]);
    }
    assert_eq!(
        request(&server, "evict", &there).await,
        Ok(change(3, 0, 0)),
        "nothing holds them"
    );
}

/// The chunks that a lookup finds and a worker reads; the request is over then.
async fn read_back(worker: &mut Worker, key: &Key) -> Vec<Vec<u8>> {
    let scheduler = Key {
        rank: None,
        ..key.clone()
    };
    let asked = [scheduler.value(), 1.into()];
    worker.client.call("lookup", &asked).await.value();
    let wait = [key.request_id.as_str().into(), 60.0.into()];
    let hit = worker.client.call("wait_prefetch_status", &wait).await;
    let chunks = match hit.value().as_u64() {
        Some(0) | None => Vec::new(),
        Some(hit) => {
            let found = Key {
                end: i64::try_from(hit).unwrap() * CHUNK as i64,
                ..key.clone()
            };
            worker.retrieve(&found).await.unwrap()
        }
    };
    worker
        .client
        .call("end_session", &[key.request_id.as_str().into()])
        .await
        .value();
    chunks
}

#[tokio::test]
async fn a_plugin_of_a_tenant_loads_pins_and_evicts_its_tenants_objects_only() {
    let plugins = relays("['keys', 'pin', 'evict', 'prefetch']");
    let storage = tempfile::tempdir().unwrap();
    let tier = fs_tier(&storage);
    let prompt = tokens(2 * CHUNK, 2);
    let all = {
        let server = start(plugins.path(), &["--l2-adapter", &tier]).await;
        let mut worker = Worker::register(&server, 1, "org/m").await;
        for salt in ["red", "blue"] {
            assert!(worker.store(&salted(&prompt, salt), |_| 1).await);
        }
        server
            .metric_becomes(WRITTEN, |written| written >= 4.0)
            .await;
        keys(&server).await
    };
    let red: Vec<_> = all.iter().filter(|it| it.ends_with("@red")).collect();
    assert_eq!((all.len(), red.len()), (4, 2));
    let file = plugins.path().join("stockade.toml");
    let tables = "[tenants.red]\nsalts = ['red']\nplugins = ['relays']\n\
                  [tenants.blue]\nsalts = ['blue']\n";
    fs::write(&file, tables).unwrap();
    let config = file.to_str().unwrap();
    let flags = ["--l2-adapter", &tier, "--config", config];
    let server = start(plugins.path(), &flags).await;
    let mut worker = Worker::register(&server, 1, "org/m").await;
    assert!(worker.store(&salted(&prompt, "blue"), |_| 1).await);
    for (op, done, missing) in [
        ("prefetch", 2, 0),
        ("pin", 2, 0),
        ("unpin", 2, 0),
        ("evict", 2, 0),
        ("evict", 0, 2),
    ] {
        let outcome = request(&server, op, &all).await;
        assert_eq!(outcome, Ok(change(done, missing, 2)), "{op}");
    }
    assert_eq!(keys(&server).await, Vec::<String>::new());
    let key = salted(&prompt, "blue");
    assert_eq!(read_back(&mut worker, &key).await.len(), 2);
}

#[tokio::test]
async fn without_a_second_tier_or_a_grant_a_load_says_what_is_missing() {
    let server = start(relays("['prefetch']").path(), &[]).await;
    let refused = request(&server, "prefetch", &[]).await.unwrap_err();
    assert!(refused.contains("needs --l2-adapter"), "{refused}");
    let refused = request(&server, "evict", &[]).await.unwrap_err();
    assert!(refused.contains("cache = [\"evict\"]"), "{refused}");
}

#[tokio::test]
async fn what_a_plugin_pins_outlives_what_came_after_it_until_it_unpins_or_ends() {
    let plugins = relays("['keys', 'pin', 'evict']");
    // Half of what is used goes when 164 of the 16384 slots are in use.
    let watermark = [
        "--eviction-trigger-watermark",
        "0.01",
        "--eviction-ratio",
        "0.5",
    ];
    let server = start(plugins.path(), &watermark).await;
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let prompt = tokens(2 * CHUNK, 3);
    let key = Key::new("org/m", &prompt, Some(0), "kept");
    assert!(worker.store(&key, |_| 9).await);
    worker
        .client
        .call("end_session", &["kept".into()])
        .await
        .value();
    let mine = keys(&server).await;
    assert_eq!(request(&server, "pin", &mine).await, Ok(change(2, 0, 0)));
    worker.churn().await;
    let evicted = "lmcache_mp_l1_evicted_chunks_total";
    server.metric_becomes(evicted, |count| count > 200.0).await;
    let pinned = |listed: &Json| listed["pinned"] == true;
    let kept: Vec<_> = listed(&server).await.into_iter().filter(pinned).collect();
    assert_eq!(kept.len(), 2);
    assert_eq!(read_back(&mut worker, &key).await[0][0], 9);

    // A pin ends with the run that gave it.
    let run = async || {
        let status = server.json("/v1/plugins/relays").await;
        status["running_since_unix_ms"].as_u64()
    };
    let first = run().await;
    let (status, body) = server.http("POST", "/v1/plugins/relays/restart", "").await;
    assert!(status < 300, "{body}");
    for attempt in 0.. {
        let now = run().await;
        if now.is_some() && now != first && !listed(&server).await.iter().any(pinned) {
            break;
        }
        assert!(attempt < 6000, "the pins outlive their plugin");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    worker.churn().await;
    let gone = |count: f64| count > 600.0;
    server.metric_becomes(evicted, gone).await;
    assert_eq!(request(&server, "evict", &mine).await, Ok(change(0, 2, 0)));
}

#[tokio::test]
async fn a_plugins_state_outlives_its_server() {
    let plugins = relays("[]");
    let state = tempfile::tempdir().unwrap();
    let flags = ["--state-dir", state.path().to_str().unwrap()];
    let mut server = start(plugins.path(), &flags).await;
    let missing = ask(&server, 'g', "").await.unwrap_err();
    assert!(missing.contains("no key \"counter\""), "{missing}");
    assert!(ask(&server, 'w', "41").await.is_ok());
    assert_eq!(ask(&server, 'g', "").await, Ok("41".to_owned()));
    let full = ask(&server, 'w', &"x".repeat(1025)).await.unwrap_err();
    assert!(full.contains("state_kib"), "{full}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    let server = start(plugins.path(), &flags).await;
    assert_eq!(ask(&server, 'g', "").await, Ok("41".to_owned()));
}
