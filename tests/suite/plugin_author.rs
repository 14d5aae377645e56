//! What the author of a plugin gets: `stockade plugin new`, `check`, `run`, `test`, `bench`, `pack`.
//! What the compilers make of the SDKs is tried in `tests/plugins/`.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use stockade_tests::{Key, Server, Worker, binary, lookup, root, tokens as tokens_of};

/// A reactor that logs at its start, answers `ping` calls, and ranks backwards two candidates.
const REACTOR: &str = r#"(module
    (import "stockade:plugin/v1" "log" (func $log (param i32 i32 i32) (result i32)))
    (import "stockade:plugin/v1" "reply" (func $reply (param i32 i32) (result i32)))
    (import "stockade:plugin/v1" "metric_add" (func $add (param i32 i32 f64) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 0) "hello from the startpongpings[1,0]")
    (func (export "stockade_start") (param i32) (result i32)
        (drop (call $log (i32.const 2) (i32.const 0) (i32.const 20)))
        (i32.const 0))
    (func (export "stockade_call") (param i32) (result i32)
        (drop (call $add (i32.const 24) (i32.const 5) (f64.const 1)))
        (drop (call $reply (i32.const 20) (i32.const 4)))
        (i32.const 0))
    (func (export "stockade_rank") (param i32) (result i32)
        (drop (call $reply (i32.const 29) (i32.const 5)))
        (i32.const 0)))"#;

/// A module with an empty `_start`.
const COMMAND: &[u8] =
    b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x0a\x01\x06_start\0\0\x0a\x04\x01\x02\0\x0b";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `stockade plugin`; whether it succeeded, and what it printed.
    fn stockade(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(binary())
            .arg("plugin")
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    #[track_caller]
    fn succeeds(&self, arguments: &[&str]) -> String {
        let (is_success, text) = self.stockade(arguments);
        assert!(is_success, "{arguments:?}: {text}");
        text
    }

    #[track_caller]
    fn fails(&self, arguments: &[&str], why: &str) -> String {
        let (is_success, text) = self.stockade(arguments);
        assert!(!is_success, "{arguments:?}: {text}");
        assert!(text.contains(why), "no {why:?} in {text}");
        text
    }
}

fn exists(path: &Path) -> bool {
    path.try_exists().unwrap()
}

#[test]
fn new_makes_a_folder_once() {
    let folder = Folder::new();
    for (language, source) in [("rust", "src/lib.rs"), ("go", "main.go")] {
        let name = format!("my-{language}");
        let made = folder.succeeds(&["--json", "new", "--lang", language, &name]);
        let made: Value = serde_json::from_str(&made).unwrap();
        for file in made["files"].as_array().unwrap() {
            let path = folder.path(&name).join(file.as_str().unwrap());
            assert!(exists(&path), "{path:?}");
            assert!(
                !fs::read_to_string(&path).unwrap().contains("../../rust")
                    && !fs::read_to_string(&path).unwrap().contains("my_plugin"),
                "{path:?}"
            );
        }
        let source = fs::read_to_string(folder.path(&name).join(source)).unwrap();
        assert!(source.contains(&format!("my_{language}.seconds")));
        folder.fails(&["new", "--lang", language, &name], "is there already");
    }
    folder.fails(&["new", "--lang", "rust", "../x"], "no name for a plugin");
    assert!(!exists(&folder.path("x")));
}

#[test]
fn check_names_the_import_and_the_line_to_add() {
    let folder = Folder::new();
    folder.write("it.wat", REACTOR);
    let text = folder.succeeds(&["check", "it.wat"]);
    assert!(text.contains("it: a reactor"), "{text}");
    assert!(
        text.contains("add to it.plugin.toml: calls = true"),
        "{text}"
    );
    let imports = r#"(import "stockade:plugin/v1" "cache_stats" (func (result i32)))"#;
    folder.write(
        "it.wat",
        format!("(module {imports} (func (export \"_start\")))"),
    );
    let text = folder.succeeds(&["check", "it.wat"]);
    assert!(
        text.contains("warning: cache_stats is not granted"),
        "{text}"
    );
    assert!(
        text.contains("add to it.plugin.toml: cache = [\"stats\"]"),
        "{text}"
    );
    folder.fails(&["check", "--strict", "it.wat"], "--strict");
    // Granted by the manifest, then taken away by the server's file.
    folder.write("it.plugin.toml", "cache = [\"stats\", \"evict\"]\n");
    let text = folder.succeeds(&["check", "--strict", "it.wat"]);
    assert!(
        text.contains("granted cache = [\"evict\"] and has no use for it"),
        "{text}"
    );
    folder.write("stockade.toml", "[plugins.it]\ncache = []\n");
    let text = folder.succeeds(&["check", "it.wat", "--config", "stockade.toml"]);
    assert!(text.contains("the server's file takes it away"), "{text}");
    let json = folder.succeeds(&["--json", "check", "it.wat"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["style"], "command");
    assert_eq!(json["needs"][0]["granted"], true);
}

#[test]
fn check_says_why_a_module_would_not_run() {
    let folder = Folder::new();
    let start = "(func (export \"_start\"))";
    for (module, why, fix) in [
        (
            format!("(module (import \"stockade:plugin/v2\" \"log\" (func)) {start})"),
            "stockade:plugin/v2.log",
            "this server has stockade:plugin/v1",
        ),
        (
            format!("(module (import \"stockade:plugin/v1\" \"fly\" (func)) {start})"),
            "stockade:plugin/v1.fly",
            "SDK of this server",
        ),
        (
            format!("(module (import \"env\" \"puts\" (func)) {start})"),
            "env.puts",
            "wasm32-wasip1",
        ),
        (
            "(module)".to_owned(),
            "neither _start nor a handler",
            "export_plugin!",
        ),
        ("(module".to_owned(), "text", ""),
    ] {
        folder.write("it.wat", &module);
        let text = folder.fails(&["check", "it.wat"], why);
        assert!(text.contains(fix), "{module}: {text}");
    }
    folder.write("it.sh", "#!/bin/sh\n");
    folder.fails(&["check", "it.sh"], "is a script");
    folder.fails(&["check", "none.wasm"], "none.wasm");
}

#[test]
fn test_files_say_what_must_come_of_what() {
    let folder = Folder::new();
    folder.write("it.wat", REACTOR);
    folder.write(
        "it.plugin.toml",
        "calls = true\nrank = true\n[limits]\nrank_ms = 1000\n",
    );
    let good = r#"
        [[step]]
        send = "nothing"
        logs = ["hello", ]
        no_logs = ["goodbye"]
        calls = []
        [[step]]
        send = "call"
        method = "it.ping"
        reply = "pong"
        metrics = { pings = 1 }
        [[step]]
        send = "rank"
        candidates = [{ bytes = 1 }, { bytes = 2 }]
        order = [1, 0]
        [[step]]
        send = "shutdown"
    "#;
    folder.write("it.test.toml", good);
    let text = folder.succeeds(&["test", "--module", "it.wat"]);
    assert!(text.contains("4 steps passed"), "{text}");
    for (from, to, why) in [
        ("\"hello\"", "\"bonjour\"", "no line with \"bonjour\""),
        ("\"goodbye\"", "\"from the\"", "no_logs has \"from the\""),
        ("calls = []", "calls = [\"pin\"]", "calls has [\"pin\"]"),
        ("\"pong\"", "\"ping\"", "the reply is \"pong\""),
        ("pings = 1", "pings = 2", "metric pings is Some(1.0)"),
        ("order = [1", "order = [0", "the order is [1, 0]"),
        ("send = \"rank\"", "send = \"fly\"", "fly"),
        (
            "send = \"nothing\"",
            "send = \"nothing\"\nwithin_ms = 300\nfoo = 1",
            "foo",
        ),
    ] {
        // What never comes is not waited for longer than this test has patience.
        let bad = good.replace("send = \"nothing\"", "send = \"nothing\"\nwithin_ms = 300");
        let bad = bad.replace("reply =", "within_ms = 300\nreply =");
        let bad = match from {
            "send = \"nothing\"" => good.replace(from, to),
            from => bad.replace(from, to),
        };
        assert_ne!(bad, good, "{from}");
        folder.write("it.test.toml", &bad);
        let text = folder.fails(&["test", "--module", "it.wat"], why);
        if !["fly", "foo"].contains(&why) {
            assert!(text.contains("| hello from the start"), "{text}");
        }
    }
    folder.write("it.test.toml", good);
    folder.fails(&["test"], "stockade plugin build");
}

/// State, requests over HTTP and the second tier, each as it happened and in no other way.
#[test]
fn test_files_say_what_a_plugin_does_with_its_state_and_over_http() {
    let folder = Folder::new();
    let guest = root().join("tests/guests/abi-v1/relays.wat");
    fs::copy(guest, folder.path("relays.wat")).unwrap();
    folder.write(
        "relays.plugin.toml",
        "calls = true\ncache = ['keys', 'prefetch']\n[limits]\nstate_kib = 1\n",
    );
    let good = r#"
        [cache]
        second_tier = [{ key = "m@1@0@ff", bytes = 7 }]
        [[step]]
        send = "call"
        method = "relays.x"
        body = "wvalue"
        state = ["state_set counter"]
        calls = []
        http = []
        [[step]]
        send = "call"
        method = "relays.x"
        body = "g"
        reply = "+value"
        state = ["state_get counter"]
        [[step]]
        send = "call"
        method = "relays.x"
        body = '''r{"op":"prefetch","keys":["m@1@0@ff","m@1@0@00"]}'''
        reply = '''+{"done":1,"missing":1,"denied":0}'''
        calls = ["prefetch"]
        state = []
        [[step]]
        send = "call"
        method = "relays.x"
        body = "k{}"
        reply = '''+{"keys":[{"key":"m@1@0@ff","bytes":7,"idle_ms":null,"pinned":false}],"next":null}'''
    "#;
    folder.write("relays.test.toml", good);
    let text = folder.succeeds(&["test", "--module", "relays.wat"]);
    assert!(text.contains("4 steps passed"), "{text}");
    for (from, to, why) in [
        (
            "state_set counter",
            "state_set other",
            "state has [\"state_set other\"]",
        ),
        (
            "state = []",
            "state = [\"state_get x\"]",
            "state has [\"state_get x\"]",
        ),
        (
            "http = []",
            "http = [\"GET http://h/ 200\"]",
            "http has [\"GET http://h/ 200\"]",
        ),
        ("second_tier =", "keys =", "there is no second tier here"),
    ] {
        // What never comes is not waited for longer than this test has patience.
        let bad = good.replacen("send = \"call\"", "send = \"call\"\nwithin_ms = 300", 3);
        folder.write("relays.test.toml", bad.replace(from, to));
        folder.fails(&["test", "--module", "relays.wat"], why);
    }
}

#[test]
fn test_files_say_which_requests_a_plugin_sends() {
    let folder = Folder::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        assert!(peer.read(&mut request).unwrap() > 0);
        let answer = "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
        peer.write_all(answer.as_bytes()).unwrap();
    });
    let granted = format!("http://127.0.0.1:{port}/x");
    for (name, url, outcome) in [
        ("granted", &*granted, "204"),
        ("other", "http://h/", "denied"),
    ] {
        let request = format!("{{\"method\":\"GET\",\"url\":\"{url}\"}}");
        let escaped = request.replace('"', "\\22");
        let module = format!(
            "(module (import \"stockade:plugin/v1\" \"http_request\"
                 (func $http (param i32 i32 i32 i32) (result i32)))
               (memory (export \"memory\") 1) (data (i32.const 0) \"{escaped}\")
               (func (export \"stockade_start\") (param i32) (result i32)
                 (drop (call $http (i32.const 0) (i32.const {}) (i32.const 0) (i32.const 0)))
                 (i32.const 0)))",
            request.len()
        );
        let (module_file, test) = (format!("{name}.wat"), format!("{name}.test.toml"));
        folder.write(&module_file, module);
        folder.write(
            &format!("{name}.plugin.toml"),
            format!("[[http]]\nhost = \"127.0.0.1\"\nport = {port}\nmethods = [\"GET\"]\n"),
        );
        let step = format!("[[step]]\nsend = \"nothing\"\nhttp = [\"GET {url} {outcome}\"]\n");
        folder.write(&test, step);
        folder.succeeds(&["test", &test, "--module", &module_file]);
    }
}

#[test]
fn a_call_that_fails_may_be_what_is_wanted() {
    let folder = Folder::new();
    folder.write("it.wat", REACTOR);
    let step = "[[step]]\nsend = \"call\"\nmethod = \"it.ping\"\nfails = \"calls\"\n";
    folder.write("it.test.toml", step);
    // Without the grant.
    folder.succeeds(&["test", "--module", "it.wat"]);
    folder.write("it.plugin.toml", "calls = true\n");
    folder.fails(
        &["test", "--module", "it.wat"],
        "the call had the reply \"pong\"",
    );
}

#[test]
fn run_shows_the_log_and_how_it_ended() {
    let folder = Folder::new();
    folder.write("it.wat", REACTOR);
    let text = folder.succeeds(&["run", "it.wat", "--seconds", "0.2"]);
    assert!(text.contains("info  hello from the start"), "{text}");
    folder.write(
        "trap.wat",
        "(module (func (export \"_start\") unreachable))",
    );
    folder.fails(&["run", "trap.wat"], "unreachable");
    folder.fails(&["run", "it.wat", "--settings", "[]"], "--settings");
}

/// The plugin is in this process, and what it is told of is the server's.
#[tokio::test]
async fn run_beside_a_server_shows_its_cache_and_changes_nothing() {
    let folder = Folder::new();
    let guest = root().join("tests/guests/abi-v1/asks.wat");
    fs::copy(guest, folder.path("asks.wat")).unwrap();
    folder.write(
        "asks.plugin.toml",
        "restart = 'never'\ncache = ['stats', 'keys', 'pin', 'evict', 'events']\n",
    );
    let tokens = folder.write(
        "tokens.toml",
        "[[token]]\nname = 'grafana'\nrole = 'read-only'\ntoken = 'reader-0123456789abcdef0123456789'\n",
    );
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
    let token = folder.write("token", "reader-0123456789abcdef0123456789");
    let settings = "{\"asks.colour\": \"blue\", \"asks.size\": 1}";
    let config = folder.write(
        "stockade.toml",
        "[tenants.red]\nsalts = ['red']\nplugins = ['asks']\n[tenants.blue]\nsalts = ['blue']\n",
    );
    let server = Server::start(&[
        "--http-token-file",
        tokens.to_str().unwrap(),
        "--runtime-plugin-config",
        settings,
        "--config",
        config.to_str().unwrap(),
    ]);
    let url = format!("http://{}", server.http);
    folder.fails(&["run", "asks.wat", "--live", "--server", &url], "token");
    let mut worker = Worker::register(&server, 1, "org/m").await;
    let prompt = tokens_of(32, 5);
    for salt in ["red", "blue"] {
        let key = Key {
            salt: salt.to_owned(),
            ..Key::new("org/m", &prompt, Some(0), salt)
        };
        assert!(worker.store(&key, |_| 1).await);
    }
    let mut run = Command::new(binary())
        .args(["plugin", "--server", &url, "--token-file"])
        .arg(&token)
        .args(["run", "asks.wat", "--live"])
        .args(["--settings", "{\"asks.size\": 2}"])
        .current_dir(folder.0.path())
        .env("XDG_CACHE_HOME", folder.path("cache"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
    let mut next = || lines.next().expect("it ended").unwrap();
    let config = next();
    let config: Value = serde_json::from_str(config.split_once(' ').unwrap().1.trim()).unwrap();
    assert_eq!(config["mp_config"]["chunk_size"], 16, "{config}");
    let extra = &config["runtime_plugin_extra_config"];
    assert_eq!(extra["asks.colour"], "blue");
    assert_eq!(extra["asks.size"], 2, "what is given here goes over it");
    let stats = next();
    assert!(
        stats.contains("\"objects\":2,") && stats.contains("\"name\":\"red\""),
        "{stats}"
    );
    let keys = next();
    assert!(
        keys.contains("org/m@01000100@") && keys.matches("@red").count() == 2,
        "{keys}"
    );
    next();
    for _ in ["pin", "evict"] {
        let refused = next();
        assert!(
            refused.contains("looks at the server and changes nothing"),
            "{refused}"
        );
    }
    for _ in ["state", "http"] {
        next();
    }
    let subscribed = next();
    assert!(subscribed.contains("{\"cursor\":"), "{subscribed}");
    // Only what was there before the plugin listened is not told.
    let key = Key {
        salt: "red".to_owned(),
        ..Key::new("org/m", &prompt, Some(0), "red")
    };
    assert_eq!(lookup(&mut worker.client, &key).await, 2);
    worker
        .client
        .call("end_session", &["red".into()])
        .await
        .value();
    assert_eq!(
        worker.client.call("clear", &[true.into()]).await.value(),
        rmpv::Value::Nil
    );
    let mut evicted = 0;
    while evicted < 2 {
        let told = next();
        assert!(
            told.contains("\"type\":\"evicted\"") && !told.contains("blue"),
            "{told}"
        );
        evicted += told.matches("\"type\":\"evicted\"").count();
    }
    // The end of the server ends the trial, with the reason.
    drop(server);
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(!run.wait().unwrap().success(), "{rest:?}");
}

#[test]
fn bench_measures_calls_and_rankings() {
    let folder = Folder::new();
    folder.write("it.wat", REACTOR);
    folder.write(
        "it.plugin.toml",
        "calls = true\nrank = true\n[limits]\nrank_ms = 1000\n",
    );
    for what in [&["--method", "it.ping"][..], &["--rank", "2"]] {
        let arguments = [&["--json", "bench", "it.wat", "--seconds", "0.1"][..], what].concat();
        let text = folder.succeeds(&arguments);
        let found: Value = serde_json::from_str(&text).unwrap();
        assert!(found["calls"].as_u64().unwrap() > 0, "{text}");
        assert!(found["nanoseconds"]["p50"].as_u64().unwrap() > 0, "{text}");
    }
    folder.fails(&["bench", "it.wat"], "--method");
    folder.fails(
        &["bench", "it.wat", "--method", "other.ping"],
        "other.ping failed",
    );
    // One that fails has said why in its log.
    let fails = REACTOR.replace(
        "(drop (call $reply (i32.const 20) (i32.const 4)))\n        (i32.const 0))",
        "(drop (call $log (i32.const 0) (i32.const 6) (i32.const 14)))\n        (i32.const 1))",
    );
    folder.write("it.wat", fails);
    let text = folder.fails(
        &["bench", "it.wat", "--method", "it.ping"],
        "it.ping failed",
    );
    assert!(text.contains("| from the start"), "{text}");
}

#[test]
fn a_pack_is_checked_on_both_sides() {
    let folder = Folder::new();
    folder.write("it.wasm", COMMAND);
    folder.write("it.plugin.toml", "restart = \"never\"\n");
    let public = folder.succeeds(&["keygen", "my.key"]);
    let text = folder.succeeds(&["pack", "it.wasm", "--key", "my.key"]);
    assert!(text.contains("3 files, signed"), "{text}");
    let again = folder.succeeds(&["pack", "it.wasm", "--key", "my.key", "-o", "again.tar"]);
    let digest = |text: &str| text.rsplit(' ').next().unwrap().to_owned();
    assert_eq!(digest(&text), digest(&again));

    let trusting = format!(
        "[plugins]\nrequire_signatures = true\ntrusted_keys = [\"{}\"]\n",
        public.trim()
    );
    folder.write("stockade.toml", &trusting);
    let unpack = [
        "unpack",
        "it.plugin.tar",
        "--into",
        "there",
        "--config",
        "stockade.toml",
    ];
    folder.succeeds(&unpack);
    assert_eq!(fs::read(folder.path("there/it.wasm")).unwrap(), COMMAND);
    assert!(exists(&folder.path("there/it.plugin.toml")));

    // An unsigned pack, and one of somebody else, change nothing there.
    folder.write("it.plugin.toml", "restart = \"always\"\n");
    folder.succeeds(&["pack", "it.wasm"]);
    folder.fails(&unpack, "is refused");
    folder.succeeds(&["keygen", "their.key"]);
    folder.succeeds(&["pack", "it.wasm", "--key", "their.key"]);
    folder.fails(&unpack, "is refused");
    let kept = fs::read_to_string(folder.path("there/it.plugin.toml")).unwrap();
    assert_eq!(kept, "restart = \"never\"\n");
    let left: Vec<_> = fs::read_dir(folder.path("there")).unwrap().collect();
    assert_eq!(left.len(), 3);

    // A byte of the module in the pack.
    let mut bytes = fs::read(folder.path("again.tar")).unwrap();
    let place = bytes.windows(4).position(|it| it == b"\0asm").unwrap() + 4;
    bytes[place] ^= 2;
    folder.write("it.plugin.tar", &bytes);
    folder.fails(&unpack, "damaged");
    folder.write("bad.wasm", "no module");
    folder.fails(&["pack", "bad.wasm"], "the server would not run");
}
