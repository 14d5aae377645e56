//! `stockade simulate` on traces that LMCache's own recorders wrote, and on made-up ones.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use stockade_tests::{Key, Server, Worker, binary, lookup, root, tokens};

fn simulate(args: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.arg("simulate").args(args).output().unwrap()
}

fn golden(name: &str) -> String {
    let path = root().join("tests/golden/simulate").join(name);
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn results(args: &[&str]) -> Value {
    let output = simulate(&[args, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn traces_of_lmcache_are_replayed_in_order_of_time() {
    let storage = golden("storage.trace");
    let found = results(&["--trace", &storage, "--size-gb", "1", "--policy", "LRU"]);
    // 6 chunks on 2 ranks of 2 KiB each: 4 + 5 + 1 looked up, 0 + 4 + 1 found.
    assert_eq!(found["footprint_bytes"], 2 * 6 * 2048);
    let run = &found["results"][0];
    assert_eq!((&run["lookups"], &run["tokens"]), (&3.into(), &10.into()));
    assert_eq!(run["hit_tokens"], 5);

    let lookups = golden("lookup_hashes.jsonl");
    let found = results(&[
        "--trace",
        &lookups,
        "--size-gb",
        "1",
        "--policy",
        "LRU,S3FIFO",
    ]);
    assert_eq!(found["footprint_bytes"], 4 * 2 * 32 * 256 * 8 * 2);
    for run in found["results"].as_array().unwrap() {
        assert_eq!(
            (&run["hit_tokens"], &run["tokens"]),
            (&512.into(), &1620.into())
        );
    }
    let only = results(&["--trace", &lookups, "--size-gb", "1", "--model", "other"]);
    assert_eq!(only["requests"], 1);
}

#[test]
fn made_up_requests_are_the_same_for_the_same_seed_and_can_be_written_read_and_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (trace, plot) = (path("lookup_hashes_1.jsonl"), path("plot.svg"));
    let made = ["--generate", "chat", "--seed", "7", "--requests", "200"];
    let first = results(&[&made[..], &["--write-trace", &trace, "--plot", &plot]].concat());
    assert_eq!(first, results(&made));
    assert_eq!(first["results"].as_array().unwrap().len(), 4 * 6);
    let again = results(&["--trace", directory.path().to_str().unwrap()]);
    assert_eq!(first["results"], again["results"]);
    let drawn = std::fs::read_to_string(&plot).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
    for policy in ["LRU", "ARC", "IsolatedLRU", "S3FIFO"] {
        assert!(drawn.contains(policy));
    }
    let table = simulate(&made).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.contains("chat, seed 7: 200 requests") && table.contains(" %"),
        "{table}"
    );
}

#[test]
fn what_cannot_be_simulated_is_said_in_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let storage = std::fs::read(golden("storage.trace")).unwrap();
    let cut = file("cut", &storage[..storage.len() - 7]);
    assert_eq!(results(&["--trace", &cut, "--size-gb", "1"])["requests"], 6);
    let no_size = file(
        "no_size",
        br#"{"chunk_size": 1, "seq_len": 1, "chunk_hashes": ["0x1"]}"#,
    );
    let lie = file("lie", &[0xff, 0xff, 0xff, 0xff, 1]);
    let noise = file("noise", &[0, 0, 0, 1, 0xc1]);
    let missing = Path::new("/nonexistent").to_str().unwrap();
    for (args, sentence) in [
        (&["--trace", &no_size][..], "--kv-bytes-per-chunk"),
        (&["--trace", &lie], "frame of 4294967295 bytes"),
        (&["--trace", &noise], "is neither"),
        (&["--trace", missing], "cannot be opened"),
        (
            &["--trace", directory.path().to_str().unwrap()],
            "lookup_hashes_*.jsonl",
        ),
        (
            &["--trace", &no_size, "--generate", "zipf"],
            "cannot be used with",
        ),
        (&["--generate", "zip"], "use zipf, scan or chat"),
        (
            &["--generate", "zipf", "--size-gb", "0"],
            "--size-gb 0: give",
        ),
        (&["--generate", "zipf", "--policy", "lru"], "use LRU, ARC"),
        (
            &["--generate", "zipf", "--eviction-ratio", "2"],
            "--eviction-ratio 2: give",
        ),
        (&[], "--trace"),
    ] {
        let output = simulate(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && stderr.contains(sentence),
            "{args:?}: {stderr}"
        );
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// What a server logs of its lookups says the same to `simulate` as to LMCache's simulator.
#[tokio::test]
async fn a_server_s_own_lookup_hash_log_is_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let logs = directory.path().join("logs");
    let mut server = Server::start(&[
        "--lookup-hash-log-dir",
        logs.to_str().unwrap(),
        "--lookup-hash-log-rotation-max-size",
        "1",
    ]);
    let mut worker = Worker::register(&server, 1, "m").await;
    for (request, count) in [("first", 40), ("second", 64)] {
        let key = Key::new("m", &tokens(count, 7), None, request);
        lookup(&mut worker.client, &key).await;
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    let mut files: Vec<_> = std::fs::read_dir(&logs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    // A byte a file, so one for each lookup.
    let lines: Vec<Value> = files
        .iter()
        .map(|file| serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["request_id"], "first");
    assert_eq!(
        (&lines[0]["chunk_size"], &lines[0]["seq_len"]),
        (&16.into(), &40.into())
    );
    let hashes = |line: &Value| line["chunk_hashes"].as_array().unwrap().clone();
    assert_eq!(hashes(&lines[1])[..2], hashes(&lines[0]));
    let found = results(&[
        "--trace",
        logs.to_str().unwrap(),
        "--size-gb",
        "1",
        "--policy",
        "LRU",
    ]);
    let run = &found["results"][0];
    assert_eq!(
        (&run["lookups"], &run["hit_tokens"]),
        (&2.into(), &32.into())
    );
}
