//! The probes: what turns them red, how soon, and whether they say why.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use stockade_tests::{Server, root};

/// Asks until the status comes; how long it took, and the body.
async fn until(server: &Server, path: &str, status: u16) -> (Duration, String) {
    let started = Instant::now();
    loop {
        let answer = server.http("GET", path, "").await;
        if answer.0 == status {
            return (started.elapsed(), answer.1);
        }
        assert!(
            started.elapsed() < stockade_tests::PATIENCE,
            "{path}: {answer:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Debug builds let a test hold a loop up, by a file that names it.
#[tokio::test]
async fn a_loop_that_stands_still_turns_health_red_and_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stall");
    fs::write(&file, "").unwrap();
    let hello = root().join("tests/guests/sleep_loop.wat");
    let server = Server::start_with_env(
        &["--runtime-plugin-locations", hello.to_str().unwrap()],
        &[("STOCKADE_TEST_STALL", file.to_str().unwrap())],
    );
    until(&server, "/readyz", 200).await;
    let health = server.json("/v1/health").await;
    let names: Vec<_> = health["loops"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["name"].as_str().unwrap().to_owned())
        .collect();
    for name in [
        "log writer",
        "http",
        "maintenance",
        "observer",
        "plugin epochs",
        "watchdog",
    ] {
        assert!(
            names.iter().any(|it| it == name),
            "{name} is not in {names:?}"
        );
    }
    assert!(
        names.iter().any(|it| it.starts_with("accept tcp://")),
        "{names:?}"
    );
    for name in ["maintenance", "observer"] {
        fs::write(&file, name).unwrap();
        let (took, body) = until(&server, "/readyz", 503).await;
        assert!(body.contains(name), "{body}");
        // 2 s by design; the rest is for a machine that does other things as well.
        assert!(
            took < Duration::from_secs(6),
            "{name} showed after {took:?}"
        );
        assert_eq!(server.http("GET", "/livez", "").await.0, 503);
        assert_eq!(server.http("GET", "/healthcheck", "").await.0, 503);
        let metrics = server.http("GET", "/metrics", "").await.1;
        assert!(
            metrics.contains(&format!("stockade_loop_healthy{{name=\"{name}\"}} 0")),
            "{metrics}"
        );
        fs::write(&file, "").unwrap();
        until(&server, "/readyz", 200).await;
    }
}

/// No hook: nobody reads the server's stderr, and its log is full of a plugin's lines.
#[tokio::test]
async fn a_log_that_nobody_reads_is_noticed_and_holds_nothing_up() {
    let flood = root().join("tests/guests/log_flood.wat");
    let mut child = std::process::Command::new(stockade_tests::binary())
        .args([
            "serve",
            "--host",
            "127.0.0.1",
            "--l1-size-gb",
            "0.01",
            "--log-level",
            "trace",
        ])
        .args(["--port", "0", "--http-port", "0", "--shm-name", ""])
        .arg("--plugin-cache-dir")
        .arg(tempfile::tempdir().unwrap().path())
        .arg("--runtime-plugin-locations")
        .arg(flood)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Only as far as the line that names the port; then the pipe fills.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("serving on") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut stderr, &mut line).unwrap() > 0);
    }
    let (_, address) = line.split_once("HTTP on http://").unwrap();
    let address = address.split(' ').next().unwrap().to_owned();
    let started = Instant::now();
    let body = loop {
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let answer = stockade_tests::exchange(stream, &address, "GET", "/readyz", &[], "").await;
        if answer.status == 503 {
            break answer.body;
        }
        if started.elapsed() > stockade_tests::PATIENCE {
            break answer.body;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let _ = child.kill();
    let _ = child.wait();
    assert!(body.contains("log writer"), "{body}");
}

#[tokio::test]
async fn the_probe_goes_the_whole_way_and_leaves_nothing() {
    for flags in [&[][..], &["--shm-name", ""]] {
        let server = Server::start(flags);
        for round in 0..2 {
            if round > 0 {
                // An answer is kept for a second, and a new one is wanted.
                tokio::time::sleep(Duration::from_millis(1050)).await;
            }
            let report = server.json("/v1/health/probe").await;
            assert_eq!(
                (&report["status"], &report["bytes"]),
                (&"healthy".into(), &16.into()),
                "{report}"
            );
        }
        let status = server.json("/status").await;
        let l1 = &status["storage_manager"]["l1_manager"];
        assert_eq!(l1["total_object_count"], 0, "{l1}");
        assert_eq!(
            (&l1["memory_used_bytes"], &l1["owned_locks"]),
            (&0.into(), &0.into()),
            "{l1}"
        );
        assert_eq!(status["active_sessions"], 0);
        assert_eq!(
            status["registered_non_cuda_instance_ids"],
            serde_json::json!([])
        );
    }
}

#[tokio::test]
async fn a_pool_without_room_fails_the_probe_with_a_sentence() {
    // Slots as large as the pool: one chunk fills it.
    let flags = ["--l1-align-bytes", "67108864", "--eviction-policy", "noop"];
    let server = Server::start(&flags);
    let mut worker = stockade_tests::Worker::register(&server, 1, "m").await;
    let key = stockade_tests::Key::new("m", &stockade_tests::tokens(16, 1), Some(0), "fill");
    assert!(worker.store(&key, |_| 1).await);
    let answer = server.http("GET", "/v1/health/probe", "").await;
    assert!(
        answer.0 == 503 && answer.1.contains("data-path") && answer.1.contains("store"),
        "{answer:?}"
    );
    assert_eq!(
        server.http("GET", "/readyz", "").await.0,
        200,
        "full is not sick"
    );
}
