//! Sandboxed modules and scripts beside the server: what they get, and that nothing of them stays.

use std::{fs, time::Instant};

use rustix::process::Signal;
use stockade_tests::{Server, root, wait_for};

/// A directory of plugins.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

/// Processes whose command line contains `mark`.
fn processes(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(mark) && !line.contains("stockade serve") {
            found.push(line);
        }
    }
    found
}

#[tokio::test]
async fn the_example_scripts_and_a_module_log_their_lines() {
    let examples = root().join("examples");
    let (scripts, module) = (
        examples.join("mp_runtime_plugins"),
        examples.join("hello.wat"),
    );
    let locations = [scripts.to_str().unwrap(), module.to_str().unwrap()];
    let mut server = Server::start(&["--runtime-plugin-locations", locations[0], locations[1]]);
    let port = server.addr.rsplit(':').next().unwrap().to_owned();
    server.wait_for_line("[hello] Hello");
    server.wait_for_line(&format!(
        "[mp_plugin] MP server: host=127.0.0.1 port={port} chunk_size=16"
    ));
    server.wait_for_line("[mp_plugin] Storage: L1=0.1GB eviction=LRU watermark=0.8");
    server.wait_for_line(&format!(
        "[mp_heartbeat] MP server: host=127.0.0.1 port={port}"
    ));
    let plugins = server.json("/v1/plugins").await;
    assert_eq!(plugins["plugins"].as_array().unwrap().len(), 3);
    server.signal(Signal::TERM);
    assert_eq!(server.wait(), Some(0));
    let log = server.log().join("\n");
    for end in [
        "plugin `mp_plugin` exited with code 0",
        "plugin `mp_heartbeat` exited with code 0",
    ] {
        assert!(log.contains(end), "{log}");
    }
}

#[tokio::test]
async fn a_guest_sees_the_contract_and_no_secret() {
    let guests = root().join("tests/guests");
    let module = guests.join("print_environ.wat");
    let script = directory(&[("env_of.sh", "env; echo done-env")]);
    let mut server = Server::start_with_env(
        &[
            "--runtime-plugin-config",
            "{\"k\": 1}",
            "--runtime-plugin-locations",
            module.to_str().unwrap(),
            script.path().to_str().unwrap(),
        ],
        &[
            ("CANARY_SECRET", "5up3r"),
            ("AWS_SECRET_ACCESS_KEY", "5up3r"),
        ],
    );
    server.wait_for_line("[env_of] done-env");
    server.wait_for_line("plugin `print_environ` exited with code 0");
    let log = server.log();
    for plugin in ["print_environ", "env_of"] {
        for variable in [
            "LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG={\"k\":1}",
            "LMCACHE_RUNTIME_PLUGIN_CONFIG={\"mp_config\":",
            "LMCACHE_RUNTIME_PLUGIN_ROLE=",
            "LMCACHE_RUNTIME_PLUGIN_WORKER_COUNT=1",
            "LMCACHE_RUNTIME_PLUGIN_WORKER_ID=0",
            "LMCACHE_PLUGIN_WORKER_ID=0",
        ] {
            let line = format!("[{plugin}] {variable}");
            assert!(
                log.iter().any(|it| it.contains(&line)),
                "{line} is missing:\n{}",
                log.join("\n")
            );
        }
    }
    assert!(
        !log.iter()
            .any(|line| line.contains("5up3r") || line.contains("CANARY")),
        "{}",
        log.join("\n")
    );
    assert!(
        !log.iter()
            .any(|line| line.contains("[print_environ] PATH="))
    );
}

#[tokio::test]
async fn a_looping_guest_does_not_keep_anybody_waiting() {
    let guests = root().join("tests/guests");
    let flags = ["--runtime-plugin-locations"];
    let (spin, hello) = (guests.join("endless_loop.wat"), guests.join("hello.wat"));
    let mut server = Server::start(
        &[
            &flags[..],
            &[spin.to_str().unwrap(), hello.to_str().unwrap()],
        ]
        .concat(),
    );
    server.wait_for_line("plugin `hello` exited with code 0");
    let mut client = stockade_tests::Client::connect(&server.url).await;
    for _ in 0..100 {
        client.call(24, &[]).await.value();
    }
    // A plugin's own manifest may give it less than the default grace of five seconds.
    assert_eq!(
        server
            .http("POST", "/v1/plugins/endless_loop/stop", "")
            .await
            .0,
        202
    );
    server.wait_for_line("plugin `endless_loop` was killed");
}

#[tokio::test]
async fn what_fails_is_started_again_and_what_is_done_stays_done() {
    let scripts = directory(&[("crash.sh", "echo again; exit 3"), ("fine.sh", "echo once")]);
    let mut server = Server::start(&[
        "--runtime-plugin-locations",
        scripts.path().to_str().unwrap(),
    ]);
    server.wait_for_line("plugin `crash` exited with code 3");
    wait_for("a second start", || {
        (server
            .log()
            .iter()
            .filter(|line| line.contains("[crash] again"))
            .count()
            > 1)
        .then_some(())
    });
    server.wait_for_line("plugin `fine` exited with code 0");
    let fine = server.json("/v1/plugins/fine").await;
    assert_eq!(
        (&fine["state"], &fine["restarts"]),
        (&"exited".into(), &0.into())
    );
    assert_eq!(
        server.http("POST", "/v1/plugins/fine/restart", "").await.0,
        202
    );
    wait_for("its restart", || {
        (server
            .log()
            .iter()
            .filter(|line| line.contains("[fine] once"))
            .count()
            == 2)
            .then_some(())
    });
    let logs = server.json("/v1/plugins/fine/logs").await;
    assert_eq!(logs["lines"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn what_cannot_be_run_is_named_and_costs_only_itself() {
    let plugins = directory(&[
        ("fine.sh", "echo fine\nsleep 1000\n"),
        ("bad_manifest.sh", "echo never\n"),
        ("bad_manifest.plugin.toml", "[limits]\nmemory_mb = 1\n"),
        ("bad_pin.sh", "echo never\n"),
        (
            "needs_more.wat",
            "(module (import \"env\" \"foo\" (func)) (func (export \"_start\")))",
        ),
        ("no_start.wat", "(module)"),
        ("nonsense.wasm", "this is no module"),
    ]);
    let path = |name: &str| plugins.path().join(name);
    let large = std::fs::File::create(path("too_large.wasm")).unwrap();
    large.set_len((16 << 20) + 1).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", path("unreadable.wasm")).unwrap();
    let config = path("stockade.toml");
    let pin = format!("[plugins.bad_pin]\nsha256 = '{}'\n", "0".repeat(64));
    std::fs::write(&config, pin).unwrap();
    let mut server = Server::start(&[
        "--config",
        config.to_str().unwrap(),
        "--runtime-plugin-locations",
        plugins.path().to_str().unwrap(),
    ]);
    let refused = [
        ("bad_manifest", "bad_manifest.plugin.toml"),
        ("bad_manifest", "memory_mb"),
        ("bad_pin", "pins sha256 to 0000"),
        ("needs_more", "env"),
        ("no_start", "_start"),
        ("nonsense", "not a WebAssembly module"),
        ("too_large", "16777217 bytes, more than the 16777216"),
        ("unreadable", "unreadable.wasm cannot be read"),
    ];
    for (name, reason) in refused {
        let line = server.wait_for_line(&format!("plugin `{name}` is refused"));
        assert!(line.contains(reason), "{line}");
        assert!(line.contains("ERROR"), "{line}");
        let shown = server.json(&format!("/v1/plugins/{name}")).await;
        assert_eq!(shown["state"], "refused", "{shown}");
        let end = shown["last_end"].as_str().unwrap();
        assert!(end.contains(reason), "{shown}");
    }
    server.wait_for_line("[fine] fine");
    let listed = server.json("/v1/plugins").await;
    assert_eq!(listed["plugins"].as_array().unwrap().len(), 8, "{listed}");
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    let hit = "stockade_plugin_limit_hits_total{plugin=\"too_large\",limit=\"module_bytes\"} 1";
    assert!(metrics.contains(hit), "{metrics}");
    let states = metrics.matches("state=\"refused\"} 1").count();
    assert_eq!(states, 7, "{metrics}");
    // Noted, and no reason to take the server out of service.
    let health = server.json("/v1/health").await;
    let notes = health["notes"].as_array().unwrap();
    assert!(
        health["status"] == "healthy" && notes.len() == 7,
        "{health}"
    );
    for (name, reason) in refused {
        let start = format!("plugin `{name}` is refused: ");
        let said = |note: &serde_json::Value| {
            let note = note.as_str().unwrap();
            note.starts_with(&start) && note.contains(reason)
        };
        assert!(notes.iter().any(said), "{name}: {health}");
    }
    let status = std::process::Command::new(stockade_tests::binary())
        .args(["status", "--server", &format!("http://{}", server.http)])
        .output()
        .unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert_eq!(status.matches("note: plugin `").count(), 7, "{status}");
}

#[test]
fn nothing_survives_a_killed_server() {
    let mark = format!("survivor-{}", std::process::id());
    let stubborn = format!(
        "trap '' TERM\n(setsid sh -c 'trap \"\" TERM; while :; do sleep 0.1; done' {mark} &)\necho up\nwhile :; do sleep 0.1; done\n"
    );
    let python = format!("import time  # {mark}\nprint('up', flush=True)\ntime.sleep(1000)\n");
    let plugins = directory(&[("stubborn.sh", &stubborn), ("sleeper.py", &python)]);
    let hello = root().join("tests/guests/endless_loop.wat");
    for round in 0..3 {
        let mut server = Server::start(&[
            "--runtime-plugin-locations",
            plugins.path().to_str().unwrap(),
            hello.to_str().unwrap(),
        ]);
        server.wait_for_line("[stubborn] up");
        server.wait_for_line("[sleeper] up");
        let directory = plugins.path().to_str().unwrap().to_owned();
        assert!(!processes(&directory).is_empty(), "the scripts run");
        server.signal(Signal::KILL);
        server.wait();
        let killed = Instant::now();
        wait_for("the end of all plugins", || {
            (processes(&directory).is_empty() && processes(&mark).is_empty()).then_some(())
        });
        assert!(
            killed.elapsed().as_secs_f64() < 2.0,
            "round {round}: they lived {:?}",
            killed.elapsed()
        );
    }
}
