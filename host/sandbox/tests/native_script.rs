//! Scripts as real processes: what they get, and that nothing of them survives.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and the server that is killed talks by its stdout"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use stockade_sandbox::{
    Containment, Manifest, NativeConfig, NativePolicy, NativeScript, ProcessEnd, ScriptEnd,
    ScriptError, ScriptOutput,
};
use tokio::{sync::oneshot, task::JoinHandle};

/// What a condition gets on a loaded machine before the test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the product promises.
const SURVIVAL_LIMIT: Duration = Duration::from_secs(2);

const GRACE: Duration = Duration::from_millis(200);

/// A directory whose path is in the command line of every process of its scripts:
/// `$NAP` is `sleep` under a name there, and children run through files there.
struct Den {
    directory: tempfile::TempDir,
}

impl Den {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        symlink("/bin/sleep", directory.path().join("nap")).unwrap();
        Self { directory }
    }

    fn script(&self, name: &str, body: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        let nap = self.directory.path().join("nap");
        let text = body.replace("$NAP", nap.to_str().unwrap());
        fs::write(&path, text).unwrap();
        // Not executable: the interpreter reads it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The processes of this den's scripts, keepers included.
    fn living(&self) -> Vec<(i32, String)> {
        let token = self.directory.path().to_str().unwrap();
        processes()
            .filter(|(_, command)| command.contains(token))
            .collect()
    }

    fn assert_empty_within(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.living().is_empty() {
            assert!(Instant::now() < deadline, "survivors: {:?}", self.living());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Den {
    fn drop(&mut self) {
        for (pid, _) in self.living() {
            let _ = rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// All living processes with their command lines (zombies have none).
fn processes() -> impl Iterator<Item = (i32, String)> {
    let own = std::process::id().cast_signed();
    fs::read_dir("/proc").unwrap().filter_map(move |entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        (pid != own && !command.is_empty()).then_some((pid, command))
    })
}

fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn config(containment: Containment) -> NativeConfig {
    let mut config = NativeConfig::new(std::env::vars_os(), &[]);
    config.keeper_program = env!("CARGO_BIN_EXE_stockade-keeper").into();
    config.containments = vec![containment];
    config.grace = GRACE;
    // What holds of processes holds whatever they may open; what they may open has its own tests.
    config.policy = NativePolicy::Allow;
    config
}

fn contract() -> Vec<(OsString, OsString)> {
    vec![("LMCACHE_RUNTIME_PLUGIN_ROLE".into(), "".into())]
}

#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Collected {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, part: &str) {
        eventually(part, || self.text().contains(part).then_some(()));
    }
}

impl ScriptOutput for Collected {
    async fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

/// A log that never takes anything.
struct Stuck;

impl ScriptOutput for Stuck {
    async fn write(&mut self, _bytes: &[u8]) {
        std::future::pending().await
    }
}

struct Run {
    task: JoinHandle<Result<ScriptEnd, ScriptError>>,
    output: Collected,
    stop: Option<oneshot::Sender<Duration>>,
}

impl Run {
    fn start(path: &Path, config: NativeConfig) -> Self {
        let output = Collected::default();
        let (stop, stopped) = oneshot::channel();
        let script = NativeScript::new("test", path, config, Manifest::default());
        let mut sink = output.clone();
        let task = tokio::spawn(async move {
            let stopped = async {
                match stopped.await {
                    Ok(grace) => grace,
                    Err(_) => std::future::pending().await,
                }
            };
            script.run_once(contract(), &mut sink, stopped).await
        });
        let stop = Some(stop);
        Self { task, output, stop }
    }

    fn stop(&mut self, grace: Duration) {
        self.stop.take().unwrap().send(grace).unwrap();
    }

    async fn end(self) -> (Result<ScriptEnd, ScriptError>, String) {
        let end = tokio::time::timeout(PATIENCE, self.task)
            .await
            .expect("the run ends in time")
            .unwrap();
        (end, self.output.text())
    }

    async fn ended(self) -> (ScriptEnd, String) {
        let (end, text) = self.end().await;
        (end.unwrap(), text)
    }
}

/// The containments that this machine gives this user; the weakest is always there.
async fn containments() -> Vec<Containment> {
    let den = Den::new();
    let script = den.script("probe.sh", "exit 0\n");
    let mut available = Vec::new();
    for containment in [
        Containment::PidNamespace,
        Containment::UserPidNamespace,
        Containment::Subreaper,
    ] {
        match Run::start(&script, config(containment)).end().await.0 {
            Ok(_) => available.push(containment),
            Err(ScriptError::NoContainment { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(available.contains(&Containment::Subreaper));
    available
}

/// Runs a script to its end under each containment.
async fn run_everywhere(name: &str, body: &str, check: impl Fn(Containment, ScriptEnd, &str)) {
    for containment in containments().await {
        let den = Den::new();
        let script = den.script(name, body);
        let (end, text) = Run::start(&script, config(containment)).ended().await;
        check(containment, end, &text);
        den.assert_empty_within(Duration::ZERO);
    }
}

/// Starts a script under each containment, stops it once it says `ready`, and finds nothing left.
async fn stop_everywhere(
    name: &str,
    body: &str,
    grace: Duration,
    check: impl Fn(Containment, ScriptEnd, &str),
) {
    for containment in containments().await {
        let den = Den::new();
        let script = den.script(name, body);
        let mut run = Run::start(&script, config(containment));
        run.output.wait_for("ready\n");
        run.stop(grace);
        let (end, text) = run.ended().await;
        assert!(end.was_stopped);
        assert_eq!(end.stuck, 0);
        den.assert_empty_within(Duration::ZERO);
        check(containment, end, &text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_stdout_and_stderr_come_in_the_order_written() {
    let body = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done\n";
    run_everywhere("a.sh", body, |containment, end, text| {
        let expected: String = (1..10).map(|i| format!("out {i}\nerr {i}\n")).collect();
        assert_eq!(text, expected, "{containment:?}");
        assert_eq!(end.process, Some(ProcessEnd::Exited(0)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_and_signals_are_told_apart() {
    for (body, expected) in [
        ("exit 0", ProcessEnd::Exited(0)),
        ("exit 41", ProcessEnd::Exited(41)),
        ("exit 137", ProcessEnd::Exited(137)),
        ("kill -9 $$", ProcessEnd::Signaled(9)),
        ("kill -TERM $$", ProcessEnd::Signaled(15)),
    ] {
        run_everywhere("a.sh", body, |containment, end, _| {
            assert_eq!(end.process, Some(expected), "{body} {containment:?}");
            assert!(!end.was_stopped);
            assert_eq!(end.killed, 0);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn python_runs_unbuffered_under_its_first_line() {
    let body = "#!/usr/bin/env -S python3 -X utf8\n\
                import sys, time, os\n\
                print('ready', sys.flags.utf8_mode, os.path.basename(sys.argv[0]))\n\
                print('ready')\n\
                time.sleep(1000)\n";
    stop_everywhere("p.py", body, PATIENCE, |_, end, text| {
        assert!(text.starts_with("ready 1 p.py\n"), "{text}");
        assert_eq!(end.process, Some(ProcessEnd::Signaled(15)));
        assert_eq!(end.killed, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_is_the_contract_and_what_is_granted() {
    // `cat /proc/self/environ SCRIPT`: exactly what the process was given.
    let body = "#!/usr/bin/env -S cat /proc/self/environ\n";
    run_everywhere("env", body, |containment, _, text| {
        let given: BTreeMap<&str, &str> = text
            .split('\0')
            .filter_map(|variable| variable.split_once('='))
            .collect();
        let mut expected: BTreeSet<&str> =
            BTreeSet::from(["LMCACHE_RUNTIME_PLUGIN_ROLE", "PATH", "PYTHONUNBUFFERED"]);
        for name in ["HOME", "LANG", "LC_ALL", "TMPDIR"] {
            if std::env::var_os(name).is_some() {
                expected.insert(name);
            }
        }
        let names: BTreeSet<&str> = given.keys().copied().collect();
        assert_eq!(names, expected, "{containment:?}");
        assert_eq!(given["LMCACHE_RUNTIME_PLUGIN_ROLE"], "");
        assert_eq!(given["PYTHONUNBUFFERED"], "1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keeper_knows_no_more_than_the_script() {
    let den = Den::new();
    let script = den.script("a.sh", "tr '\\0' '\\n' < /proc/$PPID/environ\n");
    let (_, text) = Run::start(&script, config(Containment::Subreaper))
        .ended()
        .await;
    assert!(text.contains("PYTHONUNBUFFERED=1\n"), "{text}");
    for line in text.lines() {
        let name = line.split('=').next().unwrap();
        let known = [
            "LMCACHE_RUNTIME_PLUGIN_ROLE",
            "PATH",
            "PYTHONUNBUFFERED",
            "HOME",
            "LANG",
            "LC_ALL",
            "TMPDIR",
        ];
        assert!(known.contains(&name), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_hides_the_servers_environment_and_processes() {
    let secret = format!("/proc/{}/environ", std::process::id());
    let body = format!(
        "cat {secret} >/dev/null 2>&1 && echo leaked; echo $$ $PPID; \
         cd /proc; for p in [0-9]*; do readlink $p/exe; done; echo own $(cat /proc/$$/comm)\n"
    );
    run_everywhere("a.sh", &body, |containment, _, text| {
        if containment == Containment::Subreaper {
            return assert!(text.contains("leaked"), "{text}");
        }
        assert!(!text.contains("leaked"), "{text}");
        assert!(text.starts_with("2 0\n"), "{text}");
        assert!(text.contains("own bash\n"), "{text}");
        // Process 1, the script, and what it runs itself.
        assert!(text.lines().count() <= 6, "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_gets_no_descriptors_no_privileges_and_no_one_elses_session() {
    // Survives exec, unlike what Rust opens: as if the server's parent had left it open.
    let leak = rustix::io::dup(fs::File::open("/dev/null").unwrap()).unwrap();
    let body = "ls -l /proc/self/fd | awk '{print $9, $10, $11}'; umask; ulimit -c; ulimit -n\n\
                grep -E '^(NoNewPrivs|SigBlk|SigIgn)' /proc/self/status\n\
                set -- $(cat /proc/$$/stat); test $1 = $5 && test $1 = $6 && echo leader\n";
    run_everywhere("a.sh", body, |containment, _, text| {
        let descriptors: BTreeSet<&str> = text
            .lines()
            .filter(|line| line.contains("->"))
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        // 3 is the listing itself.
        assert_eq!(descriptors, BTreeSet::from(["0", "1", "2", "3"]), "{text}");
        assert!(text.contains("0 -> /dev/null"), "{text}");
        assert!(text.contains("\n0077\n0\n1024\n"), "{text}");
        assert!(text.contains("NoNewPrivs:\t1\n"), "{text}");
        assert!(text.contains("SigBlk:\t0000000000000000\n"), "{text}");
        // Rust programs ignore SIGPIPE themselves; a script must die of it.
        let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t"));
        let ignored = u64::from_str_radix(ignored.unwrap(), 16).unwrap();
        assert_eq!(ignored >> (Signal::PIPE.as_raw() - 1) & 1, 0, "{text}");
        if containment == Containment::Subreaper {
            assert!(text.contains("leader\n"), "{text}");
        }
    })
    .await;
    drop(leak);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_reach_the_script() {
    let den = Den::new();
    let script = den.script("a.sh", "ulimit -n; ulimit -v; ulimit -t; ulimit -f\n");
    let mut config = config(Containment::Subreaper);
    config.limits.open_files = Some(77);
    config.limits.address_space_bytes = Some(512 << 20);
    config.limits.cpu_seconds = Some(9);
    config.limits.file_size_bytes = Some(2 << 20);
    let (_, text) = Run::start(&script, config).ended().await;
    assert_eq!(text, "77\n524288\n9\n2048\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_obeys_sigterm_may_clean_up() {
    let body = "trap 'echo bye; exit 6' TERM; echo ready; $NAP 1000 & wait\n";
    stop_everywhere("a.sh", body, PATIENCE, |containment, end, text| {
        assert_eq!(text, "ready\nbye\n", "{containment:?}");
        assert_eq!(end.process, Some(ProcessEnd::Exited(6)));
        assert_eq!(end.killed, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_ignores_sigterm_is_killed_after_the_grace() {
    let body = "trap '' TERM; echo ready; while :; do $NAP 1000; done\n";
    stop_everywhere("a.sh", body, GRACE, |containment, end, _| {
        assert_eq!(
            end.process,
            Some(ProcessEnd::Signaled(9)),
            "{containment:?}"
        );
        assert_eq!(end.killed, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_that_ignore_sigterm_do_not_survive() {
    // Its own session, two forks, SIGTERM ignored, the script long gone.
    let body = "trap '' TERM\n\
                (setsid bash -c 'exec >/dev/null 2>&1; ($NAP 1000 &)'; setsid $NAP 1001 &)\n\
                echo ready\n";
    stop_everywhere("a.sh", body, GRACE, |containment, end, _| {
        assert_eq!(end.process, Some(ProcessEnd::Exited(0)), "{containment:?}");
        assert_eq!(end.killed, 2, "{containment:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_lives_until_it_ends_or_is_stopped() {
    let body = "(setsid bash -c 'echo from the daemon; read < $DOOR; echo done' &)\nexit 0\n";
    for containment in containments().await {
        let den = Den::new();
        let door = den.file("door");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &door,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let script = den.script("a.sh", &body.replace("$DOOR", door.to_str().unwrap()));
        let run = Run::start(&script, config(containment));
        run.output.wait_for("from the daemon");
        assert!(!run.task.is_finished());
        let opened = tokio::task::spawn_blocking(move || fs::write(door, "\n"));
        opened.await.unwrap().unwrap();
        let (end, text) = run.ended().await;
        assert_eq!(text, "from the daemon\ndone\n", "{containment:?}");
        assert_eq!(end.process, Some(ProcessEnd::Exited(0)));
        assert_eq!(end.killed, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_script_leaves_behind_dies_with_it() {
    let body = "(setsid $NAP 1000 &); $NAP 1000 & exit 3\n";
    run_everywhere("a.sh", body, |containment, end, _| {
        assert_eq!(end.process, Some(ProcessEnd::Exited(3)));
        assert_eq!(end.killed, 2, "{containment:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_children_in_fifty_sessions_die() {
    let body = "trap '' TERM; for i in $(seq 50); do setsid $NAP 1000 & done; \
                echo ready; wait; $NAP 1000\n";
    stop_everywhere("a.sh", body, GRACE, |containment, end, _| {
        assert!(end.killed >= 51, "{containment:?} {end:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_loop_cannot_outrun_the_kill() {
    let body = "trap '' TERM; loop() { while :; do (setsid $NAP 1000 &); done; }\n\
                loop & loop & echo ready; wait\n";
    stop_everywhere("a.sh", body, GRACE, |_, _, _| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_closes_its_output_is_still_watched() {
    let body = "echo ready; exec >&- 2>&- ; $NAP 0.3; exit 9\n";
    run_everywhere("a.sh", body, |containment, end, text| {
        assert_eq!(text, "ready\n", "{containment:?}");
        assert_eq!(end.process, Some(ProcessEnd::Exited(9)));
    })
    .await;
    let forever = "exec 3>&1; echo ready; exec >&- 2>&- 3>&-; $NAP 1000\n";
    stop_everywhere("a.sh", forever, GRACE, |_, end, _| {
        assert_eq!(end.process, Some(ProcessEnd::Signaled(15)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_megabytes_without_a_newline_pass_through() {
    let body = "head -c 10000000 /dev/zero | tr '\\0' x\n";
    run_everywhere("a.sh", body, |containment, end, text| {
        assert_eq!(text.len(), 10_000_000, "{containment:?}");
        assert_eq!(end.process, Some(ProcessEnd::Exited(0)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_takes_nothing_does_not_delay_the_end() {
    let den = Den::new();
    let mark = den.file("started");
    let body = format!("touch {}; yes\n", mark.display());
    let script = den.script("a.sh", &body);
    let native = NativeScript::new(
        "test",
        script,
        config(Containment::Subreaper),
        Manifest::default(),
    );
    let started = async {
        while !mark.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        GRACE
    };
    let mut log = Stuck;
    let run = native.run_once(contract(), &mut log, started);
    let end = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap();
    assert!(end.was_stopped);
    den.assert_empty_within(Duration::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_run_kills_everything() {
    for containment in containments().await {
        let den = Den::new();
        let body = "trap '' TERM; (setsid $NAP 1000 &); echo ready; $NAP 1000\n";
        let script = den.script("a.sh", body);
        let run = Run::start(&script, config(containment));
        run.output.wait_for("ready\n");
        assert!(den.living().len() >= 3);
        run.task.abort();
        den.assert_empty_within(SURVIVAL_LIMIT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_told_by_signal_passes_it_on() {
    for containment in containments().await {
        let den = Den::new();
        let body = "trap 'echo bye; exit 0' TERM; echo ready; $NAP 1000 & wait\n";
        let script = den.script("a.sh", body);
        let run = Run::start(&script, config(containment));
        run.output.wait_for("ready\n");
        let keeper = den.keeper();
        rustix::process::kill_process(keeper, Signal::TERM).unwrap();
        let (end, text) = run.ended().await;
        assert_eq!(text, "ready\nbye\n");
        assert_eq!(end.process, Some(ProcessEnd::Exited(0)));
        den.assert_empty_within(Duration::ZERO);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_keeper_is_killed_the_script_dies_too() {
    for containment in containments().await {
        let den = Den::new();
        let body = "trap '' TERM; $NAP 1000 & echo ready; $NAP 1000\n";
        let script = den.script("a.sh", body);
        let run = Run::start(&script, config(containment));
        run.output.wait_for("ready\n");
        rustix::process::kill_process(den.keeper(), Signal::KILL).unwrap();
        let (end, _) = run.end().await;
        assert!(
            matches!(end, Err(ScriptError::KeeperLost { .. })),
            "{end:?}"
        );
        den.assert_empty_within(SURVIVAL_LIMIT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_in_a_namespace_cannot_kill_its_keepers() {
    let body = "kill -9 1; kill -STOP 1; kill -9 $PPID 2>/dev/null; exit 5\n";
    for containment in containments().await {
        if containment == Containment::Subreaper {
            continue;
        }
        let den = Den::new();
        // In a namespace $PPID is 0, and `kill -9 0` would hit the script's own group.
        let script = den.script("a.sh", &body.replace("kill -9 $PPID 2>/dev/null; ", ""));
        let (end, _) = Run::start(&script, config(containment)).ended().await;
        assert_eq!(end.process, Some(ProcessEnd::Exited(5)), "{containment:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why() {
    let den = Den::new();
    let script = den.script("a.sh", "exit 0\n");

    let mut none = config(Containment::Subreaper);
    none.containments.clear();
    let (end, _) = Run::start(&script, none).end().await;
    assert!(
        matches!(end, Err(ScriptError::NoContainment { .. })),
        "{end:?}"
    );

    let mut no_keeper = config(Containment::Subreaper);
    no_keeper.keeper_program = den.file("absent");
    let error = Run::start(&script, no_keeper).end().await.0.unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");

    // Its interpreter is an executable file that cannot be executed after all.
    let interpreter = den.script("interpreter", "#!/nowhere/at/all\n");
    fs::set_permissions(&interpreter, fs::Permissions::from_mode(0o755)).unwrap();
    let broken = den.script("broken.sh", &format!("#!{}\n", interpreter.display()));
    for containment in containments().await {
        let error = Run::start(&broken, config(containment))
            .end()
            .await
            .0
            .unwrap_err();
        assert!(matches!(error, ScriptError::Start { .. }), "{error:?}");
        assert!(
            error.to_string().contains("interpreter cannot be executed"),
            "{error}"
        );
    }
    den.assert_empty_within(Duration::ZERO);
}

const KILLED_SERVER_DEN: &str = "STOCKADE_TEST_DEN";
const KILLED_SERVER_CONTAINMENT: &str = "STOCKADE_TEST_CONTAINMENT";

/// Scripts that resist in different ways; each writes `ready` once it does.
const RESISTING: [&str; 5] = [
    "echo ready; $NAP 1000\n",
    "trap '' TERM HUP INT; echo ready; while :; do $NAP 1000; done\n",
    "(setsid bash -c 'trap \"\" TERM HUP; ($NAP 1000 &); $NAP 1001' &) ; echo ready; $NAP 1002\n",
    "(setsid $NAP 1000 >/dev/null 2>&1 &); echo ready; exit 0\n",
    "for i in $(seq 10); do setsid $NAP 1000 & done; echo ready; exec >&- 2>&-; wait\n",
];

/// Not a test: the server that the next test kills, in a process of its own.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a process of the test that kills it"]
async fn server_to_be_killed() {
    let Some(directory) = std::env::var_os(KILLED_SERVER_DEN) else {
        return;
    };
    let containment = match std::env::var(KILLED_SERVER_CONTAINMENT).unwrap().as_str() {
        "pid-namespace" => Containment::PidNamespace,
        "user-pid-namespace" => Containment::UserPidNamespace,
        _ => Containment::Subreaper,
    };
    let mut runs = Vec::new();
    for index in 0..RESISTING.len() {
        let path = Path::new(&directory).join(format!("{index}.sh"));
        runs.push(Run::start(&path, config(containment)));
    }
    for run in &runs {
        run.output.wait_for("ready\n");
    }
    println!("all ready");
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
}

/// Ends with the test that started it, also when that fails.
struct Server(std::process::Child);

impl Server {
    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server in a process of its own, with the resisting scripts all started.
fn start_server(den: &Den, containment: Containment) -> Server {
    for (index, body) in RESISTING.iter().enumerate() {
        den.script(&format!("{index}.sh"), body);
    }
    let server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "server_to_be_killed", "--ignored", "--nocapture"])
        .env(KILLED_SERVER_DEN, den.directory.path())
        .env(KILLED_SERVER_CONTAINMENT, containment.name())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Server(server);
    let lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    let ready = lines
        .map_while(Result::ok)
        .any(|line| line.contains("all ready"));
    let living = den.living();
    assert!(
        ready && living.len() >= 15,
        "the server did not start all scripts: {living:?}"
    );
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_survives_a_killed_server_in_twenty_rounds() {
    let containments = containments().await;
    for round in 0..20 {
        let den = Den::new();
        let server = start_server(&den, containments[round % containments.len()]);
        drop(server);
        den.assert_empty_within(SURVIVAL_LIMIT);
    }
    // Processes 1 carry no path: none may have lost its keeper.
    for (pid, command) in processes().filter(|(_, command)| command.contains("__keeper init")) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(!status.contains("PPid:\t1\n"), "{pid} {command}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_die_with_their_keepers_when_no_server_can_act() {
    for containment in containments().await {
        let den = Den::new();
        let server = start_server(&den, containment);
        server.signal(Signal::STOP);
        for (pid, command) in den.living() {
            if command.contains("__keeper guard") {
                let keeper = Pid::from_raw(pid).unwrap();
                rustix::process::kill_process(keeper, Signal::KILL).unwrap();
            }
        }
        if containment == Containment::Subreaper {
            // Only the scripts themselves; with the server alive their groups die too.
            eventually("the scripts' end", || {
                let is_script = |(_, command): &(i32, String)| command.trim_end().ends_with(".sh");
                (!den.living().iter().any(is_script)).then_some(())
            });
        } else {
            den.assert_empty_within(SURVIVAL_LIMIT);
        }
    }
}

impl Den {
    /// The guard of this den's only script.
    fn keeper(&self) -> Pid {
        let (pid, _) = self
            .living()
            .into_iter()
            .find(|(_, command)| command.contains("__keeper guard"))
            .expect("a keeper");
        Pid::from_raw(pid).unwrap()
    }
}
