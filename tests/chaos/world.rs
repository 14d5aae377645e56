//! The server of a run, its plugins, and what was done to it.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead as _, BufReader},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::process::{Pid, PidfdFlags, Signal};
use stockade_tests::{PATIENCE, Server, binary, root, wait_for};

/// Faults that are told when a round fails.
const HISTORY: usize = 12;
/// Slots of 128 KiB make the pool of the harness hold 512 chunks, so that eviction runs all the time.
const SLOT_BYTES: u64 = 128 << 10;
/// Leases that end only when their owner does: what that leaves behind is not hidden by their expiry.
const LONG_LEASES: &str = "3600";
/// Leases that run out before anybody is missed.
const SHORT_LEASES: &str = "1";

/// Everything that faults happen to.
pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) directory: tempfile::TempDir,
    /// Whether `/dev/shm` is ours to fill.
    pub(crate) has_own_shm: bool,
    /// Where the second tier is kept, on a disk that can be stopped.
    pub(crate) disk: Option<PathBuf>,
    /// The library that shifts the server's wall clock, where it is installed.
    pub(crate) clock_library: Option<PathBuf>,
    /// Chunks whose bytes an audit has compared.
    pub(crate) chunks_compared: u64,
    history: VecDeque<String>,
    restarts: usize,
}

impl World {
    /// Starts a server with two plugins.
    pub(crate) fn begin(seed: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let plugins = directory.path().join("plugins");
        fs::create_dir(&plugins).unwrap();
        fs::copy(
            root().join("tests/guests/sleep_loop.wat"),
            plugins.join("ticker.wat"),
        )
        .unwrap();
        fs::write(
            plugins.join("looper.sh"),
            "while :; do sleep 0.5; echo tick; done\n",
        )
        .unwrap();
        let clock_library = find_clock_library();
        let disk = super::setting("DISK").map(PathBuf::from);
        fs::write(directory.path().join("clock"), "+0").unwrap();
        let server = start(
            &directory,
            disk.as_deref(),
            clock_library.as_deref(),
            LONG_LEASES,
        );
        let mut world = Self {
            server,
            directory,
            has_own_shm: super::setting("OWN_SHM").is_some(),
            disk,
            clock_library,
            chunks_compared: 0,
            history: VecDeque::new(),
            restarts: 0,
        };
        world.note(format!("began with seed {seed}"));
        world
    }

    /// The local socket that survives restarts.
    pub(crate) fn ipc(&self) -> String {
        format!("ipc://{}", self.directory.path().join("socket").display())
    }

    /// TCP or the local socket.
    pub(crate) fn any_url(&self, rng: &mut fastrand::Rng) -> String {
        // Over TCP nothing tells of a client's death, so that its leases must run out: slower rounds.
        if rng.u8(..5) == 0 {
            self.server.url.clone()
        } else {
            self.ipc()
        }
    }

    /// Remembers what happened, for the case that the round fails.
    pub(crate) fn note(&mut self, what: String) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(what);
    }

    /// The last things that happened.
    pub(crate) fn history(&self) -> String {
        Vec::from(self.history.clone()).join("\n")
    }

    /// The end of the server's log.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.server.log();
        log[log.len().saturating_sub(60)..].join("\n")
    }

    /// Kills the server and starts it again as it was; returns when the start began.
    pub(crate) fn restart_after_kill(&mut self) -> Instant {
        let below: Vec<OwnedFd> = descendants(self.server.pid())
            .into_iter()
            .filter_map(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
            .collect();
        self.server.signal(Signal::KILL);
        let killed = Instant::now();
        self.server.wait();
        for process in &below {
            wait_for("the end of a killed server's processes", || {
                has_ended(process).then_some(())
            });
        }
        let outlived = killed.elapsed();
        self.note(format!(
            "{} processes outlived the server for {outlived:?}",
            below.len()
        ));
        let started = Instant::now();
        self.restarts += 1;
        let leases = [LONG_LEASES, SHORT_LEASES][self.restarts % 2];
        self.server = start(
            &self.directory,
            self.disk.as_deref(),
            self.clock_library.as_deref(),
            leases,
        );
        started
    }

    /// Shifts the server's wall clock by seconds, and sees that it has.
    pub(crate) async fn shift_clock(&self, seconds: i64) {
        fs::write(self.directory.path().join("clock"), format!("{seconds:+}")).unwrap();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let expected = i64::try_from(since_epoch.as_millis()).unwrap() / 1000 + seconds;
        becomes("another time at the server", || async {
            let stats = self.server.json("/v1/stats").await;
            let now = stats["unix_ms"].as_i64().unwrap_or(0) / 1000;
            let is_there = (now - expected).abs() < 60;
            is_there
                .then_some(())
                .ok_or(format!("{now}, not {expected}"))
        })
        .await;
    }

    /// Another server on the same `/dev/shm`, which is expected to give up: its exit code and log.
    pub(crate) fn try_another_server(&self) -> (Option<i32>, String) {
        let mut command = Command::new("timeout");
        command.args(["30", binary().to_str().unwrap(), "serve"]);
        command.args(["--port", "0", "--http-port", "0", "--l1-size-gb", "0.0625"]);
        command.args(["--shm-name", "stockade-chaos-another"]);
        let output = command.output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), log)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_file(format!("/dev/shm/{}", segment_name()));
    }
}

fn segment_name() -> String {
    format!("stockade-chaos-{}", std::process::id())
}

/// One footprint: all chunks of the harness are smaller than a slot.
pub(crate) fn slot_bytes() -> u64 {
    SLOT_BYTES
}

fn start(
    directory: &tempfile::TempDir,
    disk: Option<&Path>,
    clock_library: Option<&Path>,
    lease_seconds: &str,
) -> Server {
    let path = |name: &str| directory.path().join(name).display().to_string();
    let ipc = format!("ipc://{}", path("socket"));
    let plugins = path("plugins");
    let name = segment_name();
    let slot = SLOT_BYTES.to_string();
    let flags = [
        ["--shm-name", &name],
        ["--listen", &ipc],
        ["--l1-align-bytes", &slot],
        // Short, so that what the dead have left is soon seen to be gone.
        ["--worker-reap-timeout-seconds", "0.4"],
        ["--worker-registration-grace-seconds", "0.4"],
        ["--session-ttl-seconds", "0.4"],
        ["--l1-write-ttl-seconds", lease_seconds],
        ["--l1-read-ttl-seconds", lease_seconds],
        ["--runtime-plugin-locations", &plugins],
    ];
    let mut flags = flags.as_flattened().to_vec();
    // Small, so that its own eviction runs too.
    let tier = disk.map(|path| {
        serde_json::json!({
            "type": "fs",
            "base_path": path.join("objects"),
            "max_capacity_gb": 0.1,
            "eviction": {"eviction_policy": "LRU"},
        })
        .to_string()
    });
    if let Some(tier) = &tier {
        flags.extend(["--l2-adapter", tier.as_str()]);
    }
    let clock = path("clock");
    let library = clock_library.map(|path| path.display().to_string());
    let mut environment = Vec::new();
    if let Some(library) = &library {
        environment.extend([
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", &clock),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]);
    }
    Server::start_with_env(&flags, &environment)
}

/// A disk on which no write goes on, until this is dropped.
pub(crate) struct StoppedDisk(Child);

impl StoppedDisk {
    /// Stops it. A process of its own starts it again after five seconds at the latest, also when this
    /// one is killed: who writes to a stopped disk cannot be.
    pub(crate) fn stop(disk: &Path) -> Self {
        let script =
            "fsfreeze -f \"$0\" && echo stopped; timeout 5 cat > /dev/null; fsfreeze -u \"$0\"";
        let mut child = Command::new("sh")
            .args(["-c", script, disk.to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line, "stopped\n", "the disk cannot be stopped");
        Self(child)
    }
}

impl Drop for StoppedDisk {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Debian's libfaketime.
fn find_clock_library() -> Option<PathBuf> {
    let name = format!(
        "/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1",
        std::env::consts::ARCH
    );
    Some(PathBuf::from(name)).filter(|path| path.exists())
}

/// All processes below one, nearest first.
pub(crate) fn descendants(pid: i32) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(pid) = open.pop() {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let child: i32 = child.parse().unwrap();
                open.push(child);
                found.extend(Pid::from_raw(child));
            }
        }
    }
    found
}

/// Whether the process of a pidfd is gone.
pub(crate) fn has_ended(process: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).unwrap() > 0
}

/// Waits for an asynchronous condition, 5 ms between two looks.
pub(crate) async fn becomes<F>(what: &str, mut condition: impl FnMut() -> F)
where
    F: Future<Output = Result<(), String>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match condition().await {
            Ok(()) => return,
            Err(now) => assert!(Instant::now() < deadline, "{what} does not come: {now}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
