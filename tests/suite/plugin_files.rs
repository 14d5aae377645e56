//! Whose plugins run, with what, and how a file is exchanged: the configuration and the command line.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use stockade_tests::{Server, binary, root};

fn guest(name: &str) -> PathBuf {
    root().join("tests/guests").join(format!("{name}.wat"))
}

fn stockade(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn the_file_says_whose_plugins_run_and_with_what() {
    let directory = tempfile::tempdir().unwrap();
    let plugins = directory.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    let key = directory.path().join("key");
    let made = stockade(&["plugin", "keygen", path(&key)]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let public = text(&made.stdout).trim().to_owned();
    for name in ["signed", "unsigned"] {
        fs::copy(guest("sleeper"), plugins.join(format!("{name}.wat"))).unwrap();
    }
    let manifest = "[limits]\nmemory_mib = 60\n";
    fs::write(plugins.join("signed.plugin.toml"), manifest).unwrap();
    let signed = plugins.join("signed.wat");
    let made = stockade(&["plugin", "sign", path(&signed), "--key", path(&key)]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let config = directory.path().join("stockade.toml");
    let policy = format!(
        "[plugins]\nrequire_signatures = true\ntrusted_keys = ['{public}']\n[plugins.signed]\nlimits = {{ memory_mib = 9 }}\n"
    );
    fs::write(&config, policy).unwrap();

    let mut server = Server::start(&[
        "--config",
        path(&config),
        "--runtime-plugin-locations",
        path(&plugins),
    ]);
    server.wait_for_line("plugin `unsigned` is refused: it is not signed");
    let mut shown = server.json("/v1/plugins/signed").await;
    while shown["state"] != "running" {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        shown = server.json("/v1/plugins/signed").await;
    }
    assert_eq!(shown["origin"], format!("signed by {public}"));
    let limits = shown["limits"].as_array().unwrap();
    let memory = limits.iter().find(|it| it["limit"] == "memory_bytes");
    assert_eq!(memory.unwrap()["declared"], 9 << 20);
    let (status, metrics) = server.http("GET", "/metrics", "").await;
    assert_eq!(status, 200);
    let sha256 = shown["sha256"].as_str().unwrap();
    for line in [
        "stockade_plugin_limit{plugin=\"signed\",limit=\"memory_bytes\"} 9437184".to_owned(),
        "stockade_plugin_limit_hits_total{plugin=\"signed\",limit=\"memory_bytes\"} 0".to_owned(),
        format!("stockade_plugin_info{{plugin=\"signed\",sha256=\"{sha256}\""),
    ] {
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }

    // Looked at without a server, they are the same.
    let inspect = |file: &Path| {
        stockade(&[
            "plugin",
            "inspect",
            path(file),
            "--config",
            path(&config),
            "--json",
        ])
    };
    let shown = inspect(&signed);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["asks_for"]["limits"]["memory_mib"], 60);
    assert_eq!(shown["granted"]["limits"]["memory_mib"], 9);
    assert_eq!(shown["sha256"], sha256);
    let refused = inspect(&plugins.join("unsigned.wat"));
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("it is not signed"));
}

#[test]
fn a_wrong_plugin_table_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("stockade.toml");
    for (table, named) in [
        ("[plugins]\nrequire_signatures = true", "trusted_keys"),
        ("[plugins.it]\nlimits = { memory = 1 }", "memory"),
        ("[plugins.it]\nmemory = 1", "memory"),
    ] {
        fs::write(&config, table).unwrap();
        let refused = stockade(&["serve", "--l1-size-gb", "0.01", "--config", path(&config)]);
        assert_eq!(refused.status.code(), Some(64));
        let reason = text(&refused.stderr);
        assert!(reason.contains(named), "{reason}");
    }
}

#[tokio::test]
async fn a_running_plugin_is_exchanged_from_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("it.wat");
    fs::copy(guest("waits_for_stop"), &file).unwrap();
    let mut server = Server::start(&["--runtime-plugin-locations", path(directory.path())]);
    server.wait_for_line("[it] ready");
    let url = format!("http://{}", server.http);
    fs::copy(guest("trap_unreachable"), &file).unwrap();
    let failed = stockade(&["plugin", "reload", "it", "--server", &url]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(text(&failed.stderr).contains("its new version trapped"));
    fs::copy(guest("sleeper"), &file).unwrap();
    let done = stockade(&["plugin", "reload", "it", "--server", &url]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    server.wait_for_line("[it] goodbye");
    assert_eq!(server.json("/v1/plugins/it").await["state"], "running");
}

#[test]
fn watched_plugins_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let plugins = path(directory.path());
    let mut server = Server::start(&["--plugin-watch", "--runtime-plugin-locations", plugins]);
    let file = directory.path().join("it.wat");
    fs::copy(guest("waits_for_stop"), &file).unwrap();
    server.wait_for_line("[it] ready");
    fs::remove_file(&file).unwrap();
    server.wait_for_line("[it] goodbye");
}

/// Green with every limiter on; with any of them off, the exit code says so and its name is told.
#[test]
fn limits_are_proven_from_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    // One that has all grants and is held to little, so that attacks are over soon, and one
    // without grants.
    let (all, none) = (
        directory.path().join("all.wat"),
        directory.path().join("none.wat"),
    );
    for file in [&all, &none] {
        fs::copy(guest("hello"), file).unwrap();
    }
    let manifest = format!(
        "env = ['GRANTED']\ncache = ['events']\n[directories]\n'/data' = {{ host = '{}', access = 'read-write' }}\n\
         [[http]]\nhost = 'collector.example.com'\nport = 443\n\
         [limits]\nmemory_mib = 8\ntable_elements = 10000\ncpu_percent = 1\ncpu_burst_ms = 20\n\
         start_seconds = 1\nrun_seconds = 2\nhost_call_seconds = 1\nenvironment_kib = 4\nopen_files = 4\n\
         directory_mib = 1\nlog_lines_per_second = 10\nlog_kib_per_second = 64\n\
         http_timeout_ms = 200\nhttp_body_kib = 64\nhttp_per_second = 5\n\
         state_kib = 64\ncall_ms = 200\nmetrics = 3\nqueued_events = 640\n",
        path(directory.path())
    );
    fs::write(directory.path().join("all.plugin.toml"), manifest).unwrap();
    let config = directory.path().join("stockade.toml");
    fs::write(
        &config,
        "[plugins]\ncompile_seconds = 1\ncompile_memory_mib = 1024\n",
    )
    .unwrap();
    let prove = |file: &Path, more: &[&str]| {
        let arguments = [
            "plugin",
            "prove",
            path(file),
            "--config",
            path(&config),
            "--json",
        ];
        let proven = stockade(&[&arguments, more].concat());
        let proofs: Vec<serde_json::Value> =
            serde_json::from_slice(&proven.stdout).unwrap_or_default();
        (proven, proofs)
    };
    let (proven, proofs) = prove(&all, &[]);
    let holds = |proof: &serde_json::Value| proof["holds"] == true;
    assert_eq!(proven.status.success(), proofs.iter().all(holds));
    let limits: Vec<&str> = proofs
        .iter()
        .map(|it| it["limit"].as_str().unwrap())
        .collect();
    assert!(limits.len() >= 30, "{limits:?}");
    // Beside other tests a deadline may be seconds late: each gets another chance.
    for proof in proofs.iter().filter(|proof| !holds(proof)) {
        let limit = proof["limit"].as_str().unwrap();
        let again = (0..5).any(|_| prove(&all, &["--only", limit]).0.status.success());
        assert!(again, "{proof}");
    }

    let nothing = stockade(&["plugin", "prove", "--only", "nonsense"]);
    assert_eq!(nothing.status.code(), Some(1));

    // A release build has no way to lift a limit, so there is nothing to see.
    if !cfg!(debug_assertions) {
        return;
    }
    let (all, none, prove) = (&all, &none, &prove);
    for some in limits.chunks(4) {
        std::thread::scope(|scope| {
            for &limit in some {
                scope.spawn(move || {
                    let file = match limit {
                        "directories" => none,
                        _ => all,
                    };
                    // Beside other tests an attack may get too little of a processor.
                    let found = (0..5).any(|_| {
                        let (proven, proofs) = prove(file, &["--only", limit, "--without", limit]);
                        let reason = text(&proven.stderr);
                        proven.status.code() == Some(1)
                            && reason.contains(&format!("1 of 1 limits do not hold: {limit}"))
                            && proofs[0]["holds"] == false
                    });
                    assert!(found, "{limit} is lifted and holds");
                });
            }
        });
    }
}
