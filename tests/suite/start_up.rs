//! What cannot work is said in one sentence, with the exit code of its kind, before anything is bound.

use std::process::{Command, Output};

use stockade_tests::{Server, binary};

fn run(args: &[&str]) -> Output {
    Command::new(binary())
        .args(args)
        .env_remove("STOCKADE_PORT")
        .output()
        .unwrap()
}

#[track_caller]
fn refused(args: &[&str], code: i32, sentence: &str) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(stderr.contains(sentence), "{args:?}: {stderr}");
    assert_eq!(
        stderr.trim_end().lines().count(),
        1,
        "one sentence: {stderr}"
    );
}

#[test]
fn wrong_flags_exit_with_64() {
    for (args, sentence) in [
        (&["serve", "--no-such-flag"][..], "--no-such-flag"),
        (&["serve"], "--l1-size-gb"),
        (&["serve", "--l1-size-gb", "0"], "--l1-size-gb"),
        (&["serve", "--l1-size-gb", "nan"], "--l1-size-gb"),
        (&["serve", "--l1-size-gb", "100000"], "--l1-align-bytes"),
        (&["serve", "--l1-size-gb", "1", "--port", "70000"], "70000"),
        (
            &["serve", "--l1-size-gb", "1", "--eviction-policy", "FIFO"],
            "--eviction-policy",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--eviction-ratio", "1.5"],
            "--eviction-ratio",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--chunk-size", "0"],
            "--chunk-size",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--shm-name", "a/b"],
            "--shm-name",
        ),
        (
            &[
                "serve",
                "--l1-size-gb",
                "1",
                "--runtime-plugin-config",
                "[1]",
            ],
            "--runtime-plugin-config",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--hash-algorithm", "builtin"],
            "blake3",
        ),
        (
            &[
                "serve",
                "--l1-size-gb",
                "1",
                "--supported-transfer-mode",
                "p2p",
            ],
            "engine_driven",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--config", "/nowhere.toml"],
            "/nowhere.toml",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--run-script-api-enabled"],
            "--run-script-api-enabled: ",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--l2-adapter", "{}"],
            "--l2-adapter type is missing: ",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--listen", "udp://x"],
            "udp://x",
        ),
        (
            &["serve", "--l1-size-gb", "1", "--server-module", "{}"],
            "--server-module: ",
        ),
    ] {
        refused(args, 64, sentence);
    }
}

#[test]
fn what_cannot_be_had_exits_with_69() {
    let quiet = [
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--http-port",
        "0",
        "--log-level",
        "error",
    ];
    let with = |args: &[&'static str]| [&quiet[..], args].concat();
    refused(&with(&["--l1-size-gb", "10000"]), 69, "--l1-size-gb");
    refused(
        &with(&[
            "--l1-size-gb",
            "0.01",
            "--runtime-plugin-locations",
            "/nowhere",
        ]),
        69,
        "/nowhere",
    );
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    let mut args = vec![
        "serve",
        "--host",
        "127.0.0.1",
        "--log-level",
        "error",
        "--l1-size-gb",
        "0.01",
    ];
    args.extend(["--port", &port, "--http-port", "0"]);
    refused(&args, 69, &port);
    let segment = std::path::Path::new("/dev/shm").join(format!("stockade-{port}"));
    assert!(
        !segment.exists(),
        "a server that did not start leaves no segment"
    );
}

#[test]
fn a_running_servers_segment_is_not_taken() {
    let name = format!("stockade-busy-{}", std::process::id());
    let _server = Server::start(&["--shm-name", &name]);
    let args = [
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--http-port",
        "0",
        "--log-level",
        "error",
    ];
    refused(
        &[&args[..], &["--l1-size-gb", "0.01", "--shm-name", &name]].concat(),
        69,
        &name,
    );
}

#[test]
fn flags_that_only_tune_python_are_taken_with_a_warning() {
    let mut server = Server::start(&[
        "--max-workers",
        "4",
        "--enable-gc-monitor",
        "--no-isolated-ipc",
    ]);
    server.wait_for_line("--max-workers has no effect");
    server.wait_for_line("--enable-gc-monitor has no effect");
    assert!(
        !server
            .log()
            .iter()
            .any(|line| line.contains("isolated-ipc"))
    );
}

#[tokio::test]
async fn a_file_gives_settings_that_flags_and_environment_override() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    std::fs::write(
        &file,
        "[serve]\neviction-policy = 'ARC'\nsession-ttl-seconds = 7.0\nkv-event-log-size = 5\n",
    )
    .unwrap();
    let flags = [
        "--config",
        file.to_str().unwrap(),
        "--eviction-policy",
        "S3FIFO",
    ];
    let server = Server::start_with_env(&flags, &[("STOCKADE_SESSION_TTL_SECONDS", "8")]);
    let config = server.json("/config").await;
    assert_eq!(
        config["storage_manager"]["eviction_config"]["eviction_policy"],
        "S3FIFO"
    );
    assert_eq!(config["mp"]["session_ttl_seconds"], 8.0);
    assert_eq!(config["mp"]["kv_event_log_size"], 5);
    std::fs::write(&file, "[serve]\nevicton-policy = 'ARC'\n").unwrap();
    refused(
        &[
            "serve",
            "--l1-size-gb",
            "1",
            "--config",
            file.to_str().unwrap(),
        ],
        64,
        "evicton-policy",
    );
}

#[tokio::test]
async fn tenants_of_the_file_are_shown_and_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    std::fs::write(
        &file,
        "[tenants.team]\nsalts = ['a', 'b']\nfloor_gb = 0.015625\nweight = 3\ncap_gb = 0.03125\n\
         [tenants.visitors]\ncap_gb = 0.015625\n",
    )
    .unwrap();
    for _ in 0..2 {
        let server = Server::start(&["--config", file.to_str().unwrap()]);
        let status = server.json("/status").await;
        let tenants = &status["storage_manager"]["l1_manager"]["tenants"];
        assert_eq!(tenants["team"]["floor_bytes"], 16 << 20, "{tenants}");
        assert_eq!(tenants["team"]["cap_bytes"], 32 << 20);
        assert_eq!(tenants["team"]["salts"], serde_json::json!(["a", "b"]));
        assert_eq!(tenants["visitors"]["cap_bytes"], 16 << 20);
        // Three quarters of the 48 MiB beyond the floor, but not beyond the cap.
        assert_eq!(tenants["team"]["share_bytes"], 32 << 20);
        let (_, metrics) = server.http("GET", "/metrics", "").await;
        let line = "stockade_tenant_floor_bytes{tenant=\"team\"} 16777216";
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[test]
fn tenants_that_cannot_be_honoured_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("stockade.toml");
    let path = file.to_str().unwrap();
    for (text, sentence) in [
        (
            "[tenants.a]\nsalts = ['x']\nfloor_gb = 2",
            "tenant `a` does not fit",
        ),
        (
            "[tenants.a]\nsalts = ['x']\n[tenants.b]\nsalts = ['x']",
            "cache_salt `x` belongs to tenant `a` already",
        ),
        (
            "[tenants.a]\nsalts = ['x@y']",
            "tenants.a.salts: cache_salt contains '@'",
        ),
        ("[tenants.a]\nsalts = []", "tenants.a.salts is empty"),
        ("[tenants.a]\n[tenants.b]", "tenants.b.salts is missing"),
        ("[tenants.a]\nweight = 0", "tenants.a.weight 0: give"),
        ("[tenants.a]\ncap_gb = -1.0", "tenants.a.cap_gb -1: give"),
        ("[tenants.a]\nflor_gb = 1.0", "flor_gb"),
    ] {
        std::fs::write(&file, text).unwrap();
        refused(
            &["serve", "--l1-size-gb", "1", "--config", path],
            64,
            sentence,
        );
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for flag in ["--help", "--version"] {
        let output = run(&[flag]);
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
    }
    assert!(
        String::from_utf8(run(&["serve", "--help"]).stdout)
            .unwrap()
            .contains("--l1-size-gb")
    );
}
