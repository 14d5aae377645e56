//! The HTTP API and the command line in front of it: documents, errors, log level, logs.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use stockade_tests::{Client, Key, Server, Worker, binary, root, tokens, wait_for};

/// Compares with a file of the repository; `STOCKADE_BLESS=1` writes it.
fn golden(name: &str, text: &str) {
    let path = root().join(name);
    if std::env::var_os("STOCKADE_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == text,
        "{} is not what the server says; look at the change and run the test with STOCKADE_BLESS=1.\nIt says:\n{text}",
        path.display()
    );
}

fn stockade(server: &Server, args: &[&str]) -> (bool, String) {
    let output = Command::new(binary())
        .args(args)
        .env("STOCKADE_SERVER", format!("http://{}", server.http))
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn the_openapi_document_is_the_golden_one() {
    let server = Server::start(&[]);
    let document = server.json("/v1/openapi.json").await;
    golden("tests/golden/openapi.json", &format!("{document:#}\n"));
}

#[tokio::test]
async fn every_error_is_a_problem_with_a_code() {
    let server = Server::start(&[]);
    let large = format!("{{\"tier\": \"{}\"}}", "x".repeat(100_000));
    for (method, path, body, status, code) in [
        ("GET", "/no/such", "", 404, "no-such-route"),
        ("DELETE", "/status", "", 405, "method-not-allowed"),
        ("POST", "/cache/clear", "{\"tier\": 7}", 400, "bad-json"),
        ("POST", "/cache/clear", "not json", 400, "bad-json"),
        (
            "POST",
            "/cache/clear",
            "{\"teir\": \"l1\"}",
            400,
            "bad-json",
        ),
        (
            "POST",
            "/cache/clear",
            "{\"tier\": \"l2\"}",
            400,
            "bad-clear-request",
        ),
        ("POST", "/cache/clear", &large, 413, "body-too-large"),
        ("GET", "/v1/plugins/nobody", "", 404, "plugin-not-found"),
        (
            "GET",
            "/v1/plugins/nobody/logs?lines=many",
            "",
            400,
            "bad-query",
        ),
        ("GET", "/v1/plugins/%FF", "", 400, "bad-request"),
        (
            "POST",
            "/v1/plugins/nobody/dance",
            "",
            404,
            "no-such-action",
        ),
        (
            "PUT",
            "/v1/log-level",
            "{\"level\": \"loud\"}",
            400,
            "bad-level",
        ),
        ("PUT", "/v1/log-level", "", 400, "bad-json"),
        ("GET", "/env", "", 404, "no-such-route"),
        ("POST", "/run_script", "", 404, "no-such-route"),
    ] {
        let answer = server.request(method, path, &[], body).await;
        let problem = answer.json();
        let what = format!("{method} {path}: {answer:?}");
        assert_eq!(answer.status, status, "{what}");
        assert!(
            answer
                .head
                .contains("content-type: application/problem+json"),
            "{what}"
        );
        assert_eq!(problem["code"], code, "{what}");
        assert_eq!(problem["status"], status, "{what}");
        assert_eq!(
            problem["type"],
            format!("urn:stockade:problem:{code}"),
            "{what}"
        );
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.len() > 10 && problem["error"] == detail, "{what}");
    }
}

/// The names in /metrics, each with its type, after every operation was used once.
#[tokio::test]
async fn metrics_have_the_golden_names_and_the_documented_ones() {
    let hello = root().join("tests/guests/sleep_loop.wat");
    let measures = root().join("tests/guests/abi-v1/measures.wat");
    let mut server = Server::start(&[
        "--runtime-plugin-locations",
        hello.to_str().unwrap(),
        measures.to_str().unwrap(),
        "--enable-tracing",
        "--otlp-endpoint",
        "127.0.0.1:1",
        // Nobody is there, and what is counted of that is.
        "--coordinator-url",
        "http://127.0.0.1:1",
    ]);
    server.wait_for_line("serving on");
    let mut worker = Worker::register(&server, 7, "m").await;
    let key = Key::new("m", &tokens(32, 1), Some(0), "r");
    assert!(worker.store(&key, |_| 3).await);
    let mut client = Client::connect(&server.url).await;
    assert_eq!(stockade_tests::lookup(&mut client, &key).await, 2);
    assert!(worker.retrieve(&key).await.is_some());
    // Series of what goes wrong exist once it went wrong.
    let _ = client.call("ping", &[]).await.error();
    let unread = Key::new("m", &tokens(32, 9), Some(0), "unread");
    assert!(worker.retrieve(&unread).await.is_none());
    let unknown = Key::new("unknown", &tokens(32, 1), None, "u");
    assert_eq!(stockade_tests::lookup(&mut client, &unknown).await, 0);
    let flood = Key::new("m", &tokens(16 * 20_000, 2), Some(0), "flood");
    assert!(worker.prepare_store(&flood).await.is_empty());
    while server.json("/v1/plugins/sleep_loop").await["state"] != "running"
        || server.json("/v1/plugins/measures").await["metrics"]["level"] != 0.5
    {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let text = server.http("GET", "/metrics", "").await.1;
    assert!(text.ends_with("# EOF\n"), "{text}");
    let of_second_tier = metrics_of_a_second_tier().await;
    let mut metrics = std::collections::BTreeMap::<&str, (&str, &str)>::new();
    for line in text.lines().chain(of_second_tier.lines()) {
        if let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|it| it.split_once(' '))
        {
            metrics.entry(name).or_default().1 = help.trim_end_matches('.');
        }
        if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|it| it.split_once(' '))
        {
            metrics.entry(name).or_default().0 = kind;
        }
    }
    let list: String = metrics
        .iter()
        .map(|(name, (kind, _))| format!("{name} {kind}\n"))
        .collect();
    golden("tests/golden/metrics.txt", &list);
    golden("docs/metrics.md", &metrics_page(&metrics));
    for sample in [
        "lmcache_mp_lookup_hit_tokens_total{model_name=\"m\",cache_salt=\"\"} 32",
        "lmcache_mp_num_finished_stores_total 1",
        "lmcache_mp_num_finished_retrieves_total 1",
        "lmcache_mp_num_chunks_loaded_total{model_name=\"m\",cache_salt=\"\"} 2",
        "lmcache_mp_l0_l1_store_throughput_GB_per_second_count 1",
        "stockade_request_seconds_count{operation=\"lookup\"} 2",
        "stockade_salt_objects{cache_salt=\"\"} 2",
    ] {
        assert!(text.contains(sample), "{sample} is not in\n{text}");
    }
}

/// What a server with a directory shows after a store, a load, and a value that was damaged.
async fn metrics_of_a_second_tier() -> String {
    let directory = tempfile::tempdir().unwrap();
    let adapter = serde_json::json!({"type": "fs", "base_path": directory.path(),
        "max_capacity_gb": 1})
    .to_string();
    let server = Server::start(&["--l2-adapter", &adapter]);
    let mut worker = Worker::register(&server, 7, "m").await;
    let key = Key::new("m", &tokens(32, 1), Some(0), "w");
    assert!(worker.store(&key, |_| 3).await);
    let stored = "lmcache_mp_l2_store_completed_requests_total";
    server.metric_becomes(stored, |count| count == 2.0).await;
    server.http("POST", "/cache/clear", "").await;
    assert!(worker.store(&key, |_| 3).await);
    server
        .metric_becomes("stockade_l2_store_present_objects_total", |count| {
            count == 2.0
        })
        .await;
    server.http("POST", "/cache/clear", "").await;
    for file in std::fs::read_dir(directory.path()).unwrap() {
        std::fs::write(file.unwrap().path(), "damaged").unwrap();
    }
    let one = Key::new("m", &tokens(16, 5), Some(0), "one");
    assert!(worker.store(&one, |_| 4).await);
    server.metric_becomes(stored, |count| count == 3.0).await;
    server.http("POST", "/cache/clear", "").await;
    for (request, tokens, hit) in [("damaged", &key.tokens, 0), ("good", &one.tokens, 1)] {
        let key = Key::new("m", tokens, None, request);
        worker
            .client
            .call(8, &[key.value(), 1.into()])
            .await
            .value();
        let found = worker.client.call(10, &[request.into(), 60.0.into()]).await;
        assert_eq!(found.value().as_u64(), Some(hit), "{request}");
    }
    server.http("GET", "/metrics", "").await.1
}

/// The page in the documentation: written by the test, so that it cannot be wrong for long.
fn metrics_page(metrics: &std::collections::BTreeMap<&str, (&str, &str)>) -> String {
    let mut page = "# Metrics\n\n\
        OpenMetrics text at `/metrics`, on the HTTP port and on `--prometheus-port`. This page is\n\
        written by a test (`STOCKADE_BLESS=1 cargo test --workspace --test suite metrics`).\n\n\
        Labels whose values come from clients (`cache_salt`, `model_name`) are bounded: counters have 256\n\
        values each and one, `other`, for the rest, and 512 pairs of both; `stockade_salt_*` has the 256\n\
        salts with the most bytes. Series of what has not happened yet are absent. What the data-path probe does counts\n\
        under the salt `stockade-probe`.\n"
        .to_owned();
    for (prefix, title) in [
        ("lmcache_mp_", "With LMCache's names and meaning"),
        ("stockade_", "Stockade's own"),
    ] {
        page.push_str(&format!(
            "\n## {title}\n\n| name | type | meaning |\n|---|---|---|\n"
        ));
        for (name, (kind, help)) in metrics.iter().filter(|(name, _)| name.starts_with(prefix)) {
            let suffix = if *kind == "counter" { "_total" } else { "" };
            page.push_str(&format!("| `{name}{suffix}` | {kind} | {help} |\n"));
        }
    }
    page
}

/// Clients name tenants and models; how many series that makes is for us to say.
#[tokio::test]
async fn names_that_clients_choose_make_a_bounded_number_of_series() {
    const NAMES: usize = 300;
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.url).await;
    let long = "x".repeat(500);
    for number in 0..NAMES {
        let model = format!("model-{number}-{long}");
        let mut worker = Worker::register(&server, number as u64, &model).await;
        let mut key = Key::new(&model, &tokens(16, 1), Some(0), &format!("r{number}"));
        key.salt = format!("salt-{number}");
        assert!(worker.store(&key, |_| 3).await);
        assert_eq!(stockade_tests::lookup(&mut client, &key).await, 1);
        // Further pairs of names that are known already.
        for other in 1..4 {
            key.salt = format!("salt-{}", (number + other * 50) % 200);
            assert_eq!(stockade_tests::lookup(&mut client, &key).await, 0);
        }
        // Operations are named by clients, too.
        let _ = client.call(format!("operation-{number}"), &[]).await;
    }
    let text = server.http("GET", "/metrics", "").await.1;
    const LABELS: [&str; 3] = ["cache_salt", "model_name", "operation"];
    let mut series = BTreeMap::<&str, usize>::new();
    let mut values = BTreeMap::<(&str, &str), BTreeSet<&str>>::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels)) = line.split_once('{') else {
            continue;
        };
        *series.entry(name).or_default() += 1;
        for label in LABELS {
            let Some((_, value)) = labels.split_once(&format!("{label}=\"")) else {
                continue;
            };
            let value = value.split('"').next().unwrap();
            assert!(value.len() <= 128, "{line}");
            values.entry((name, label)).or_default().insert(value);
        }
    }
    for ((name, label), values) in &values {
        // 256 of their own and one for the rest.
        assert!(
            values.len() <= 257,
            "{name} has {} of {label}",
            values.len()
        );
        let foreign = values.iter().find(|it| it.starts_with("operation-"));
        assert_eq!(foreign, None, "{name}");
    }
    let salts = &values[&("stockade_stored_bytes_total", "cache_salt")];
    assert!(salts.len() == 257 && salts.contains("other"), "{salts:?}");
    // Each of them may be bounded, and their pairs must be as well.
    assert_eq!(series["lmcache_mp_lookups_requests_total"], 513);
    let (name, most) = series.iter().max_by_key(|(_, count)| **count).unwrap();
    assert!(*most <= 1000, "{name} has {most} series");
    assert!(!text.contains(&"x".repeat(129)), "a name is cut");
}

/// The queries of LMCache's own Grafana dashboard over the tiers that exist here.
#[tokio::test]
async fn lmcaches_dashboard_finds_its_series() {
    let server = Server::start(&[]);
    let mut worker = Worker::register(&server, 7, "m").await;
    let key = Key::new("m", &tokens(32, 1), Some(0), "r");
    assert!(worker.store(&key, |_| 3).await);
    let mut client = Client::connect(&server.url).await;
    stockade_tests::lookup(&mut client, &key).await;
    assert!(worker.retrieve(&key).await.is_some());
    let text = server.http("GET", "/metrics", "").await.1;
    for series in [
        "lmcache_mp_l1_eviction_loop_ticks_total",
        "lmcache_mp_l1_memory_usage_bytes",
        "lmcache_mp_l1_usage_ratio",
        "lmcache_mp_l1_read_chunks_total",
        "lmcache_mp_l1_write_chunks_total",
        "lmcache_mp_l1_evicted_chunks_total",
        "lmcache_mp_active_prefetch_jobs",
        "lmcache_mp_event_bus_dropped_events_total",
        "lmcache_mp_num_submitted_stores_total",
        "lmcache_mp_num_finished_stores_total",
        "lmcache_mp_num_submitted_retrieves_total",
        "lmcache_mp_num_finished_retrieves_total",
        "lmcache_mp_l0_l1_store_throughput_GB_per_second_sum",
        "lmcache_mp_l0_l1_load_throughput_GB_per_second_count",
        "lmcache_mp_lookup_requested_tokens_total",
        "lmcache_mp_lookup_hit_tokens_total",
        "lmcache_mp_num_chunks_loaded_total",
    ] {
        let found = text.lines().any(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        assert!(found, "{series} has no sample in\n{text}");
    }
}

/// The answers of a running 0.5.6 server, in their shapes.
#[tokio::test]
async fn quotas_answer_as_lmcaches_do() {
    let server = Server::start(&[]);
    let ask = async |method: &str, path: &str, body: &str| {
        server.request(method, path, &[], body).await.json()
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for (method, path, body, expected) in [
        ("GET", "/quota", "", "{\"users\":{}}"),
        (
            "GET",
            "/quota/abc",
            "",
            "{\"cache_salt\":\"abc\",\"limit_gb\":0.0,\"current_usage_gb\":0.0,\"exists\":false}",
        ),
        (
            "PUT",
            "/quota/t1",
            "{\"limit_gb\": 1.5}",
            "{\"cache_salt\":\"t1\",\"limit_gb\":1.5,\"status\":\"ok\"}",
        ),
        (
            "PUT",
            "/quota/t2",
            "{\"limit_gb\": \"0.5\"}",
            "{\"cache_salt\":\"t2\",\"limit_gb\":0.5,\"status\":\"ok\"}",
        ),
        (
            "GET",
            "/quota/t1",
            "",
            "{\"cache_salt\":\"t1\",\"limit_gb\":1.5,\"current_usage_gb\":0.0,\"exists\":true}",
        ),
        (
            "DELETE",
            "/quota/t2",
            "",
            "{\"cache_salt\":\"t2\",\"status\":\"removed\"}",
        ),
        (
            "DELETE",
            "/quota/t2",
            "",
            "{\"cache_salt\":\"t2\",\"status\":\"not_found\"}",
        ),
        (
            "GET",
            "/quota",
            "",
            "{\"users\":{\"t1\":{\"limit_gb\":1.5,\"current_usage_gb\":0.0}}}",
        ),
        (
            "PUT",
            "/quota/_default",
            "{\"limit_gb\": 1}",
            "{\"cache_salt\":\"_default\",\"limit_gb\":1.0,\"status\":\"ok\"}",
        ),
        (
            "DELETE",
            "/quota/_default",
            "",
            "{\"cache_salt\":\"_default\",\"status\":\"removed\"}",
        ),
    ] {
        let mut answer = ask(method, path, body).await;
        // Ours, beside LMCache's fields: this server has no --state-dir.
        let ours = answer.as_object_mut().unwrap().remove("survives_restart");
        assert_eq!(ours.is_some(), method != "GET", "{method} {path}");
        assert_ne!(ours, Some(true.into()), "{method} {path}");
        assert_eq!(answer, json(expected), "{method} {path} {body}");
    }
    for body in [
        "{\"limit_gb\": -1}",
        "{\"limit_gb\": \"x\"}",
        "{\"limit_gb\": 1e300}",
        "nojson",
        "{}",
        "[]",
        "{\"limit_gb\": null}",
    ] {
        let problem = ask("PUT", "/quota/t1", body).await;
        assert!(
            problem["status"] == 400 && problem["error"].is_string(),
            "{body}: {problem}"
        );
    }
    assert_eq!(
        ask("PUT", "/quota/a@b", "{\"limit_gb\": 1}").await["code"],
        "bad-salt"
    );
    let (ok, text) = stockade(&server, &["tenant", "list"]);
    assert!(
        ok && text.contains("t1") && text.contains("1.5 GiB"),
        "{text}"
    );
    let (ok, text) = stockade(&server, &["tenant", "unlimit", "t1"]);
    assert!(
        ok && text.contains("no limit, until the server ends"),
        "{text}"
    );
}

#[tokio::test]
async fn the_log_level_changes_while_it_runs() {
    let mut server = Server::start(&[]);
    let (ok, text) = stockade(&server, &["log-level", "warn"]);
    assert!(ok && text == "warn\n", "{text}");
    server.http("POST", "/cache/clear", "").await;
    let (ok, text) = stockade(&server, &["log-level", "debug"]);
    assert!(ok && text == "debug\n", "{text}");
    server.wait_for_line("set the log level to DEBUG");
    assert!(
        !server
            .log()
            .iter()
            .any(|line| line.contains("cache cleared"))
    );
    server.http("POST", "/cache/clear", "").await;
    server.wait_for_line("cache cleared");
    // LMCache's frontend sets it by GET, in Python's words.
    let answer = server
        .http("GET", "/loglevel?logger_name=x&level=WARNING", "")
        .await;
    assert_eq!(answer.0, 200, "{answer:?}");
    assert_eq!(server.json("/v1/log-level").await["level"], "warn");
}

#[tokio::test]
async fn lines_of_a_plugin_are_followed_as_they_come() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("teller.sh");
    std::fs::write(
        &script,
        "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done\n",
    )
    .unwrap();
    let mut server = Server::start(&["--runtime-plugin-locations", script.to_str().unwrap()]);
    server.wait_for_line("[teller] line 1");
    let child = Command::new(binary())
        .args(["plugin", "logs", "teller", "--follow", "--server"])
        .arg(format!("http://{}", server.http))
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    let lines: Vec<String> =
        std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()))
            .map_while(Result::ok)
            .take(20)
            .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let first: u32 = lines[0].strip_prefix("line ").unwrap().parse().unwrap();
    let expected: Vec<String> = (first..first + 20).map(|n| format!("line {n}")).collect();
    assert_eq!(lines, expected, "each line once and in order");
    // A follower that stays connected does not hold the end of the server up.
    let mut follower = Command::new(binary())
        .args(["plugin", "logs", "teller", "--follow", "--server"])
        .arg(format!("http://{}", server.http))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    wait_for("the end of the follower", || follower.try_wait().unwrap());
}

#[tokio::test]
async fn the_command_line_shows_a_server_and_checks_settings() {
    let hello = root().join("tests/guests/sleep_loop.wat");
    let server = Server::start(&["--runtime-plugin-locations", hello.to_str().unwrap()]);
    while server.json("/v1/plugins/sleep_loop").await["state"] != "running" {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (ok, text) = stockade(&server, &["status"]);
    for part in ["healthy", "pool", "hit rate", "sleep_loop", "running"] {
        assert!(ok && text.contains(part), "{text}");
    }
    let (ok, text) = stockade(&server, &["status", "--json"]);
    let stats: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(ok && stats["pool"]["capacity_bytes"] == 64 << 20, "{text}");
    let (ok, text) = stockade(&server, &["config", "check", "--l1-size-gb", "1", "--json"]);
    assert!(ok && text.contains("storage_manager_config"), "{text}");
    let (ok, text) = stockade(&server, &["config", "check", "--l1-size-gb=-1"]);
    assert!(!ok && text.contains("--l1-size-gb"), "{text}");
    for shell in ["bash", "zsh", "fish"] {
        let (ok, text) = stockade(&server, &["completions", shell]);
        assert!(ok && text.contains("log-level"), "{shell}: {text}");
    }
    let (ok, text) = stockade(&server, &["man", "serve"]);
    assert!(ok && text.contains("l1\\-size\\-gb"), "{text}");
    drop(server);
}

#[tokio::test]
async fn the_metrics_port_has_the_probes_and_nothing_else() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let server = Server::start(&["--prometheus-port", &port.to_string()]);
    let ask = async |path: &str| {
        let address = format!("127.0.0.1:{port}");
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        stockade_tests::exchange(stream, &address, "GET", path, &[], "").await
    };
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(ask(path).await.status, 200, "{path}");
    }
    for path in ["/status", "/v1/plugins", "/ui"] {
        assert_eq!(ask(path).await.status, 404, "{path}");
    }
    drop(server);
}

#[tokio::test]
async fn the_dashboard_asks_nothing_of_other_hosts() {
    let server = Server::start(&[]);
    for (path, media) in [
        ("/ui", "text/html"),
        ("/ui/app.js", "text/javascript"),
        ("/ui/style.css", "text/css"),
    ] {
        let answer = server.request("GET", path, &[], "").await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(
            answer.head.contains(media) && answer.head.contains("default-src 'none'"),
            "{answer:?}"
        );
        let elsewhere = answer.body.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !elsewhere.contains("http://") && !elsewhere.contains("https://"),
            "{path}"
        );
    }
}
