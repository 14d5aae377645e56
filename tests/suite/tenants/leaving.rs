//! What a purged tenant's plugins leave behind.

use super::*;

const NEEDLE: &[u8] = b"what the plugin of a had learnt: 8d1f";

/// How many files under a directory have the bytes.
fn files_with(directory: &Path, needle: &[u8]) -> usize {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    let count = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => files_with(&entry.path(), needle),
        _ => std::fs::read(entry.path())
            .is_ok_and(|bytes| bytes.windows(needle.len()).any(|part| part == needle))
            .into(),
    });
    count.sum()
}

#[tokio::test]
async fn a_purged_tenants_plugins_end_and_keep_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let plugins = directory.path().join("plugins");
    std::fs::create_dir(&plugins).unwrap();
    let guest = stockade_tests::root().join("tests/guests/abi-v1/echo.wat");
    let manifest = "calls = true\n[limits]\ncall_ms = 60000\nstate_kib = 4\n";
    for name in ["of_a", "of_b"] {
        std::fs::copy(&guest, plugins.join(format!("{name}.wat"))).unwrap();
        std::fs::write(plugins.join(format!("{name}.plugin.toml")), manifest).unwrap();
    }
    let tables = format!(
        "[tenants.a]\nsalts = ['{SALT_A}']\nlisteners = ['a']\nplugins = ['of_a', 'not_there']\n\
         [tenants.b]\nsalts = ['{SALT_B}']\nlisteners = ['b']\nplugins = ['of_b']\n"
    );
    let flags = [
        "--state-dir",
        state.to_str().unwrap(),
        "--runtime-plugin-locations",
        plugins.to_str().unwrap(),
    ];
    let house = House::start(&["a", "b"], &tables, &flags);
    let keep = async |listener: &str, name: &str, what: &[u8]| {
        let mut client = Client::connect(&house.url(listener)).await;
        let deadline = std::time::Instant::now() + stockade_tests::PATIENCE;
        loop {
            let request = stockade_tests::map(&[
                ("method", format!("{name}.keep").into()),
                ("payload", Value::Binary(what.to_vec())),
            ]);
            let called = client.call("server_module_call", &[request]).await.value();
            if field(&called, "success") == &Value::from(true) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{called}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let of_b = b"and that of b";
    keep("a", "of_a", NEEDLE).await;
    keep("b", "of_b", of_b).await;
    // A state is written beside its file first, and takes its name then.
    let file = stockade_tests::wait_for("the states of both", || {
        let is_state = |path: &std::path::PathBuf| {
            path.extension().is_some_and(|it| it == "state")
                && path.to_string_lossy().contains("of_a")
        };
        let mut files = std::fs::read_dir(state.join("plugin-state"))
            .ok()?
            .flatten();
        let file = files.find_map(|entry| Some(entry.path()).filter(is_state))?;
        let are_there = files_with(&state, NEEDLE) + files_with(&state, of_b) == 2;
        are_there.then_some(file)
    });
    // What a crash leaves.
    std::fs::copy(&file, file.with_extension("tmp")).unwrap();
    std::fs::copy(&file, file.with_extension("damaged")).unwrap();
    assert_eq!(files_with(&state, NEEDLE), 3);

    let (status, receipt) = house.server.http("POST", "/v1/tenants/a/purge", "").await;
    assert_eq!(status, 200, "{receipt}");
    let receipt: serde_json::Value = serde_json::from_str(&receipt).unwrap();
    assert_eq!(receipt["complete"], true, "{receipt:#}");
    let entries = serde_json::json!([
        {"plugin": "not_there", "state_keys": 0},
        {"plugin": "of_a", "state_keys": 1},
    ]);
    assert_eq!(receipt["plugins"], entries, "{receipt:#}");
    assert_eq!(files_with(&state, NEEDLE), 0);
    assert_eq!(files_with(&state, of_b), 1, "b's is b's");
    assert_eq!(
        house.server.json("/v1/plugins/of_a").await["state"],
        "stopped"
    );
    assert_eq!(
        house.server.json("/v1/plugins/of_b").await["state"],
        "running"
    );
    // Nor does the server write it again when it stops.
    drop(house);
    assert_eq!(files_with(&state, NEEDLE), 0);
    assert_eq!(files_with(&state, of_b), 1);
}
