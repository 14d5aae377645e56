//! Hostile and harmless guests in the sandbox: how each ends and what it gets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    future::Future,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_sandbox::wasm::{
    Access, CompileLimits, Compiler, Directory, GUEST_STACK, GuestOutput, GuestStream, Launch,
    ModuleForm, WasmConfig, WasmEnd, WasmError, WasmLimits, WasmModule, WasmRun, WasmRuntime,
};
use stockade_sandbox::{Limit, LogLevel};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What a condition gets on a loaded machine before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A kill that needed the guest would never end; on a machine that gives low priorities nothing, it waits
/// for a turn. How long it takes otherwise is measured by `examples/density.rs`.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// A sink that keeps the start of what it gets, and takes `budget` bytes in all.
struct Sink {
    stdout: Mutex<Vec<u8>>,
    stderr: Mutex<Vec<u8>>,
    log: Mutex<Vec<String>>,
    budget: AtomicUsize,
    changed: Notify,
}

impl Sink {
    fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self {
            stdout: Mutex::default(),
            stderr: Mutex::default(),
            log: Mutex::default(),
            budget: AtomicUsize::new(budget),
            changed: Notify::new(),
        })
    }

    fn stdout(&self) -> String {
        String::from_utf8(self.stdout.lock().clone()).unwrap()
    }

    fn stderr(&self) -> String {
        String::from_utf8(self.stderr.lock().clone()).unwrap()
    }

    fn lines(&self) -> usize {
        let stdout = self.stdout.lock();
        stdout.iter().filter(|byte| **byte == b'\n').count()
    }

    fn allow(&self, more: usize) {
        self.budget.fetch_add(more, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Waits until what it got satisfies `condition`.
    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            loop {
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.stdout()));
    }
}

impl GuestOutput for Sink {
    fn log(&self, level: LogLevel, line: &[u8]) {
        let mut log = self.log.lock();
        log.push(format!(
            "{} {}",
            level.name(),
            String::from_utf8_lossy(line)
        ));
        self.changed.notify_waiters();
    }

    fn push(&self, stream: GuestStream, bytes: &[u8]) {
        let left = self.budget.load(Ordering::SeqCst);
        assert!(
            bytes.len() <= left,
            "{} bytes with room for {left}",
            bytes.len()
        );
        self.budget.fetch_sub(bytes.len(), Ordering::SeqCst);
        match stream {
            GuestStream::Stdout => self.stdout.lock().extend_from_slice(bytes),
            GuestStream::Stderr => self.stderr.lock().extend_from_slice(bytes),
        }
        self.changed.notify_waiters();
    }

    fn budget(&self) -> usize {
        self.budget.load(Ordering::SeqCst)
    }

    fn ready(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            loop {
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if self.budget() > 0 {
                    return;
                }
                changed.await;
            }
        })
    }
}

/// A runtime with a cache of its own.
struct Sandbox {
    runtime: WasmRuntime,
    directory: tempfile::TempDir,
}

/// One guest and the ends of what it was given.
struct Guest {
    run: WasmRun,
    sink: Arc<Sink>,
    stop: CancellationToken,
    kill: CancellationToken,
}

fn keeper() -> Compiler {
    Compiler::Child {
        program: PathBuf::from(env!("CARGO_BIN_EXE_stockade-keeper")),
    }
}

fn start(cache_dir: &Path, compiler: Compiler) -> Result<WasmRuntime, WasmError> {
    WasmRuntime::start(WasmConfig {
        cache_dir: cache_dir.to_owned(),
        compiler,
        compile_limits: CompileLimits::default(),
        form: ModuleForm::default(),
        network: Arc::default(),
        stack_bytes: GUEST_STACK,
    })
}

fn source(guest: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/guests")
        .join(guest)
        .with_extension("wat");
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Sandbox {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = start(&directory.path().join("cache"), keeper()).unwrap();
        Self { runtime, directory }
    }

    fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    fn module(&self, guest: &str) -> WasmModule {
        self.runtime.prepare(guest, &source(guest)).unwrap()
    }

    fn refusal(&self, guest: &str) -> String {
        let refused = self.runtime.prepare(guest, &source(guest));
        refused.unwrap_err().to_string()
    }

    fn spawn(&self, guest: &str) -> Guest {
        self.spawn_with(
            &self.module(guest),
            &WasmLimits::default(),
            Sink::new(1 << 20),
        )
    }

    fn spawn_with(&self, module: &WasmModule, limits: &WasmLimits, sink: Arc<Sink>) -> Guest {
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let output = Arc::clone(&sink) as Arc<dyn GuestOutput>;
        let launch = Launch {
            arguments: vec!["guest".to_owned()],
            limits: limits.clone(),
            stop: stop.clone(),
            kill: kill.clone(),
            ..Launch::new(output)
        };
        let run = self.runtime.spawn(module, launch);
        Guest {
            run,
            sink,
            stop,
            kill,
        }
    }

    /// Runs a guest to its end.
    async fn end_of(&self, guest: &str) -> (WasmEnd, Arc<Sink>) {
        let guest = self.spawn(guest);
        (guest.end().await, guest.sink)
    }

    /// The one artefact in the cache.
    fn artefact(&self) -> PathBuf {
        let mut found: Vec<PathBuf> = fs::read_dir(self.cache())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|it| it == "cwasm"))
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }
}

impl Guest {
    async fn end(&self) -> WasmEnd {
        tokio::time::timeout(PATIENCE, self.run.ended())
            .await
            .expect("the guest goes on")
    }

    /// Kills the guest; how long that took.
    async fn kill(&self) -> Duration {
        let asked = Instant::now();
        self.kill.cancel();
        assert_eq!(self.end().await, WasmEnd::Killed);
        asked.elapsed()
    }
}

#[tokio::test]
async fn guests_end_as_they_should() {
    let sandbox = Sandbox::new();
    let cases = [
        ("hello", WasmEnd::Exited(0), "hello world\n"),
        ("no_newline", WasmEnd::Exited(0), "half line"),
        ("exit_code_3", WasmEnd::Exited(3), ""),
        ("memory_hog", WasmEnd::Exited(0), "refused\n"),
        ("ask_for_randomness", WasmEnd::Exited(0), ""),
        ("open_root", WasmEnd::Exited(8), ""),
        (
            "trap_unreachable",
            WasmEnd::Trapped("wasm trap: wasm `unreachable` instruction executed".to_owned()),
            "",
        ),
        (
            "stack_overflow",
            WasmEnd::Trapped("wasm trap: call stack exhausted".to_owned()),
            "",
        ),
    ];
    for (guest, end, output) in cases {
        let (found, sink) = sandbox.end_of(guest).await;
        // A refused random_get may also end the guest; what counts is that it got nothing.
        if guest == "ask_for_randomness" {
            assert_ne!(found, WasmEnd::Exited(1));
            continue;
        }
        assert_eq!(found, end, "{guest}");
        assert_eq!(sink.stdout(), output, "{guest}");
    }
}

#[tokio::test]
async fn modules_that_do_not_fit_are_refused_by_name_and_reason() {
    let sandbox = Sandbox::new();
    for (guest, reason) in [
        ("unknown_import", "imports env.foo, which is not granted"),
        ("no_start", "exports no _start"),
        ("shared_memory", "needs threads"),
        ("component", "no wasi:cli/run"),
        ("two_memories", "multiple memories"),
    ] {
        let refusal = sandbox.refusal(guest);
        assert!(refusal.contains(reason), "{refusal}");
        assert!(refusal.contains(guest), "{refusal}");
    }
    for (bytes, reason) in [
        (&b"\x7fELF\x02\x01\x01"[..], "is not a WebAssembly module"),
        (b"(module (func", "is not a WebAssembly module"),
        (
            b"\0asm\x01\0\0\0\x01\x02\xff\xff",
            "is not a WebAssembly module",
        ),
        (b"\0asm\x01\0\0\0\x01\x02\x01\x00", "is refused"),
    ] {
        let refusal = sandbox
            .runtime
            .prepare("junk", bytes)
            .unwrap_err()
            .to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
    let mut large = b"\0asm\x01\0\0\0".to_vec();
    large.resize(17 << 20, 0);
    let refusal = sandbox.runtime.prepare("large", &large).unwrap_err();
    assert!(matches!(refusal, WasmError::TooLarge { .. }), "{refusal}");
    let left: Vec<_> = fs::read_dir(sandbox.cache())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().ends_with(".tmp"))
        .collect();
    assert!(left.is_empty(), "refusals leave files: {left:?}");
}

/// What compilers of the three languages make is taken, and of later proposals none.
#[tokio::test]
async fn proposals_are_allowed_by_name() {
    let sandbox = Sandbox::new();
    let prepared = |field: &str| {
        let text = format!("(module (func (export \"_start\")) {field})");
        // What the text parser does not know would be refused for that.
        wat::parse_str(&text).unwrap();
        sandbox.runtime.prepare("proposal", text.as_bytes())
    };
    for allowed in [
        "(global (export \"g\") (mut i32) (i32.const 0))",
        "(func (drop (i32.trunc_sat_f64_s (f64.const 1))))",
        "(func (drop (i32.extend8_s (i32.const 1))))",
        "(table 1 funcref) (func (table.set (i32.const 0) (ref.null func)))",
        "(func (result i32 i32) (i32.const 1) (i32.const 2))",
        "(memory 1) (func (memory.fill (i32.const 0) (i32.const 0) (i32.const 1)))",
        "(global i32 (i32.add (i32.const 1) (i32.const 2)))",
    ] {
        prepared(allowed).unwrap_or_else(|error| panic!("{allowed}: {error}"));
    }
    for refused in [
        "(func (drop (v128.const i64x2 0 0)))",
        "(func (param v128) (drop (i8x16.relaxed_swizzle (local.get 0) (local.get 0))))",
        "(memory 1) (func (drop (i32.atomic.load (i32.const 0))))",
        "(memory 1 1 shared)",
        "(memory i64 1)",
        "(memory 1) (memory 1)",
        "(memory 1 (pagesize 1))",
        "(table i64 1 funcref)",
        "(func $f (return_call $f))",
        "(tag)",
        "(type $f (func)) (func (param (ref $f)))",
        "(type (struct (field i32)))",
        "(func (param externref))",
        "(func (param i64) (result i64 i64) (i64.add128 (local.get 0) (local.get 0) (local.get 0) (local.get 0)))",
        "(type $f (func)) (type (cont $f))",
    ] {
        let refusal = match prepared(refused) {
            Ok(_) => panic!("{refused} is taken"),
            Err(refusal) => refusal,
        };
        assert!(
            matches!(
                refusal,
                WasmError::Invalid { .. } | WasmError::Threads { .. }
            ),
            "{refused}: {refusal}"
        );
    }
}

#[tokio::test]
async fn a_compiler_that_fails_is_an_error_and_nothing_is_cached() {
    let directory = tempfile::tempdir().unwrap();
    for program in ["/bin/false", "/bin/true", "/nonexistent/compiler"] {
        let cache = directory.path().join("cache");
        let program = PathBuf::from(program);
        let runtime = start(&cache, Compiler::Child { program }).unwrap();
        let refused = runtime.prepare("hello", &source("hello")).unwrap_err();
        assert!(
            matches!(refused, WasmError::CompilerFailed { .. }),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn memory_is_held_to_its_limit_and_reported() {
    let sandbox = Sandbox::new();
    let limits = WasmLimits {
        memory_bytes: 20 << 20,
        ..WasmLimits::default()
    };
    let hog = sandbox.spawn_with(&sandbox.module("memory_hog"), &limits, Sink::new(1 << 20));
    assert_eq!(hog.end().await, WasmEnd::Exited(0));
    let usage = hog.run.usage();
    assert_eq!(usage.peak_memory_bytes, (19 << 20) + 65536);
    assert_eq!((usage.memory_bytes, usage.hits.of(Limit::Memory)), (0, 1));
    assert!(usage.cpu_time > Duration::ZERO);

    for (guest, reason) in [
        ("memory_at_start", "it needs 33554432 bytes of memory"),
        ("memory_hog_that_aborts", "and gave up"),
    ] {
        let guest = sandbox.spawn_with(&sandbox.module(guest), &limits, Sink::new(0));
        let WasmEnd::LimitHit(limit) = guest.end().await else {
            panic!("no limit was hit");
        };
        assert!(limit.contains(reason), "{limit}");
    }
}

#[tokio::test]
async fn a_guest_sees_what_it_is_passed_and_nothing_else() {
    assert!(std::env::vars().count() > 0, "there is something to leak");
    let sandbox = Sandbox::new();
    let sink = Sink::new(1 << 20);
    let launch = Launch {
        arguments: vec!["me".to_owned(), "an argument".to_owned()],
        environment: vec![
            ("ROLE".to_owned(), String::new()),
            ("ID".to_owned(), "0".to_owned()),
        ],
        ..Launch::new(Arc::clone(&sink) as Arc<dyn GuestOutput>)
    };
    let run = sandbox.runtime.spawn(&sandbox.module("print_env"), launch);
    assert_eq!(run.ended().await, WasmEnd::Exited(0));
    assert_eq!(sink.stdout(), "me\0an argument\0");
    assert_eq!(sink.stderr(), "ROLE=\0ID=0\0");
}

#[tokio::test]
async fn endless_loops_are_killed_while_a_neighbour_goes_on() {
    let sandbox = Sandbox::new();
    let neighbour = sandbox.spawn("sleep_loop");
    for guest in [
        "endless_loop",
        "endless_loop_in_start_function",
        "log_flood",
    ] {
        let looping = sandbox.spawn_with(
            &sandbox.module(guest),
            &WasmLimits {
                cpu_percent: 100,
                ..WasmLimits::default()
            },
            Sink::new(usize::MAX >> 1),
        );
        let before = neighbour.sink.lines();
        let ticks = |sink: &Sink| sink.lines() >= before + 5;
        neighbour
            .sink
            .until("the neighbour stands still", ticks)
            .await;
        assert!(looping.run.usage().cpu_time > Duration::ZERO, "{guest}");
        let took = looping.kill().await;
        assert!(took < KILL_LIMIT, "{guest} took {took:?}");
    }
    assert!(neighbour.kill().await < KILL_LIMIT);
}

#[tokio::test]
async fn dropping_the_last_handle_kills_the_guest() {
    let sandbox = Sandbox::new();
    let looping = sandbox.spawn("endless_loop");
    let output = Arc::downgrade(&looping.sink);
    let second = looping.run.clone();
    drop(looping);
    // The guest holds its output for as long as it lives.
    assert!(output.upgrade().is_some());
    drop(second);
    let deadline = Instant::now() + PATIENCE;
    while output.upgrade().is_some() {
        assert!(Instant::now() < deadline, "the guest lives on");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn dropping_the_runtime_ends_its_guests_and_threads() {
    let sandbox = Sandbox::new();
    let module = sandbox.module("endless_loop");
    let looping = sandbox.spawn("endless_loop");
    let sleeping = sandbox.spawn("sleep_loop");
    sleeping
        .sink
        .until("no tick", |sink| sink.lines() > 0)
        .await;
    drop(sandbox);
    assert_eq!(looping.end().await, WasmEnd::Killed);
    assert_eq!(sleeping.end().await, WasmEnd::Killed);
    drop(module);
}

#[tokio::test]
async fn a_quota_is_kept() {
    let sandbox = Sandbox::new();
    let module = sandbox.module("endless_loop");
    let limits = WasmLimits {
        cpu_percent: 10,
        ..WasmLimits::default()
    };
    let looping = sandbox.spawn_with(&module, &limits, Sink::new(0));
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    // A machine that is busy gives it nothing for longer than that.
    while looping.run.usage().cpu_time <= Duration::from_millis(20) {
        assert!(started.elapsed() < PATIENCE, "it never runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (used, elapsed) = (looping.run.usage().cpu_time, started.elapsed());
    // A tenth, and what a guest may run ahead by; what it gets on a busy machine is less.
    let allowed = elapsed / 10 + Duration::from_millis(50);
    assert!(used <= allowed, "{used:?} in {elapsed:?}");
    assert!(looping.kill().await < KILL_LIMIT);
}

#[tokio::test]
async fn stdin_is_silent_until_stop_and_then_at_its_end() {
    let sandbox = Sandbox::new();
    let ticks = sandbox.spawn("sleep_loop");
    for (guest, said) in [("wait_for_stdin_eof", "bye\n"), ("poll_stdin", "woken\n")] {
        let waiting = sandbox.spawn(guest);
        let before = ticks.sink.lines();
        let later = |sink: &Sink| sink.lines() >= before + 3;
        ticks.sink.until("no tick", later).await;
        assert_eq!(waiting.sink.stdout(), "", "{guest} was woken too early");
        waiting.stop.cancel();
        assert_eq!(waiting.end().await, WasmEnd::Exited(0), "{guest}");
        assert_eq!(waiting.sink.stdout(), said);
    }
}

#[tokio::test]
async fn a_sink_without_room_makes_the_guest_wait_and_only_it() {
    let sandbox = Sandbox::new();
    let module = sandbox.module("log_flood");
    let flood = sandbox.spawn_with(&module, &WasmLimits::default(), Sink::new(10_000));
    let full = |sink: &Sink| sink.budget() == 0;
    flood.sink.until("the flood dries up", full).await;
    let neighbour = sandbox.spawn("hello");
    assert_eq!(neighbour.end().await, WasmEnd::Exited(0));
    let idle = flood.run.usage().cpu_time;
    let ticks = sandbox.spawn("sleep_loop");
    ticks.sink.until("no tick", |sink| sink.lines() >= 10).await;
    let waiting = flood.run.usage().cpu_time - idle;
    assert!(waiting < Duration::from_millis(20), "it spins: {waiting:?}");
    assert_eq!(flood.sink.stdout.lock().len(), 10_000);

    flood.sink.allow(5_000);
    let more = |sink: &Sink| sink.stdout.lock().len() == 15_000;
    flood.sink.until("room is not noticed", more).await;
    assert!(flood.kill().await < KILL_LIMIT, "while it waits for room");
}

#[tokio::test]
async fn sleeping_guests_take_no_threads() {
    let threads = || fs::read_dir("/proc/self/task").unwrap().count();
    let sandbox = Sandbox::new();
    let module = sandbox.module("sleep_loop");
    let named = |name: &str| {
        fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|comm| comm.trim_end() == name)
            .count()
    };
    assert!(named("wasm-guests") >= 1 && named("wasm-epoch") >= 1);
    let before = threads();
    let sink = Sink::new(1 << 24);
    let guests: Vec<Guest> = (0..200)
        .map(|_| sandbox.spawn_with(&module, &WasmLimits::default(), Arc::clone(&sink)))
        .collect();
    sink.until("not all of them run", |sink| sink.lines() >= 400)
        .await;
    // Other tests of this process start and end a few of their own meanwhile.
    let grown = threads().saturating_sub(before);
    assert!(grown < 100, "{grown} more threads for 200 guests");
    for guest in &guests {
        guest.kill.cancel();
    }
    for guest in &guests {
        assert_eq!(guest.end().await, WasmEnd::Killed);
    }
}

#[tokio::test]
async fn a_module_is_compiled_once() {
    let sandbox = Sandbox::new();
    let first = sandbox.module("hello");
    let inode = || fs::metadata(sandbox.artefact()).unwrap().ino();
    let compiled = inode();
    assert_eq!(sandbox.module("hello").digest(), first.digest());
    assert_eq!(
        first.digest(),
        blake3::hash(&source("hello")).to_hex().as_str()
    );
    assert_eq!(inode(), compiled);

    // Without a compiler too, as another server on the same directory.
    let program = PathBuf::from("/bin/false");
    let second = start(&sandbox.cache(), Compiler::Child { program }).unwrap();
    second.prepare("hello", &source("hello")).unwrap();
    assert_eq!(inode(), compiled);
}

/// However many plugins have the same bytes, their code is mapped once, and for as long as one has it.
#[tokio::test]
async fn plugins_with_the_same_bytes_share_their_code() {
    let sandbox = Sandbox::new();
    let text = source("hello");
    let mapped = || {
        let artefact = sandbox.artefact();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter(|line| line.ends_with(path(&artefact)))
            .count()
    };
    let first = sandbox.runtime.prepare("first", &text).unwrap();
    let maps = mapped();
    assert!(maps > 0, "its artefact is not mapped");
    let others: Vec<_> = (0..20)
        .map(|number| {
            let name = format!("other-{number}");
            sandbox.runtime.prepare(&name, &text).unwrap()
        })
        .collect();
    assert_eq!(mapped(), maps);
    drop(first);
    let last = others.last().unwrap();
    let guest = sandbox.spawn_with(last, &WasmLimits::default(), Sink::new(100));
    assert_eq!(guest.end().await, WasmEnd::Exited(0));
    drop((others, guest));
    assert_eq!(mapped(), 0);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn damaged_artefacts_are_compiled_anew() {
    let sandbox = Sandbox::new();
    sandbox.module("hello");
    let path = sandbox.artefact();
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [
        &b""[..],
        &good[..good.len() - 1],
        &flipped,
        b"not an artefact",
    ] {
        fs::write(&path, damaged).unwrap();
        let (end, sink) = sandbox.end_of("hello").await;
        assert_eq!(
            (end, sink.stdout().as_str()),
            (WasmEnd::Exited(0), "hello world\n")
        );
        assert_ne!(fs::read(&path).unwrap(), damaged, "it was trusted");
    }

    let inode = fs::metadata(&path).unwrap().ino();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    sandbox.module("hello");
    assert_ne!(
        fs::metadata(&path).unwrap().ino(),
        inode,
        "others could write it"
    );
    fs::remove_file(path.with_extension("sum")).unwrap();
    sandbox.module("hello");
    assert!(path.with_extension("sum").exists());
}

#[tokio::test]
async fn a_cache_that_others_can_write_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("made/for/us");
    drop(start(&cache, keeper()).unwrap());
    assert_eq!(fs::metadata(&cache).unwrap().mode() & 0o777, 0o700);

    for mode in [0o770, 0o702, 0o777] {
        fs::set_permissions(&cache, fs::Permissions::from_mode(mode)).unwrap();
        let refused = start(&cache, keeper()).unwrap_err();
        assert!(
            matches!(refused, WasmError::CacheDirectory { .. }),
            "{refused}"
        );
    }
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o700)).unwrap();
    let link = directory.path().join("link");
    symlink(&cache, &link).unwrap();
    assert!(start(&link, keeper()).is_err(), "through a link");
    let file = directory.path().join("file");
    fs::write(&file, b"").unwrap();
    assert!(start(&file, keeper()).is_err(), "a file");
}

#[tokio::test]
async fn modules_can_be_compiled_in_process_for_embedding() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = start(&directory.path().join("cache"), Compiler::InProcess).unwrap();
    let module = runtime.prepare("hello", &source("hello")).unwrap();
    let sink = Sink::new(100);
    let run = runtime.spawn(
        &module,
        Launch::new(Arc::clone(&sink) as Arc<dyn GuestOutput>),
    );
    assert_eq!(run.ended().await, WasmEnd::Exited(0));
    assert_eq!(sink.stdout(), "hello world\n");
}

/// A directory with a note in it, granted as `/data`.
struct Granted {
    directory: tempfile::TempDir,
}

impl Granted {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("note"), "a note\n").unwrap();
        Self { directory }
    }

    fn run(&self, sandbox: &Sandbox, guest: &str, access: Access, limits: WasmLimits) -> Guest {
        let module = sandbox.module(guest);
        let sink = Sink::new(1 << 20);
        let kill = CancellationToken::new();
        let launch = Launch {
            directories: vec![Directory {
                guest: "/data".to_owned(),
                host: self.directory.path().to_owned(),
                access,
            }],
            limits,
            kill: kill.clone(),
            ..Launch::new(Arc::clone(&sink) as Arc<dyn GuestOutput>)
        };
        Guest {
            run: sandbox.runtime.spawn(&module, launch),
            sink,
            stop: CancellationToken::new(),
            kill,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[tokio::test]
async fn a_directory_is_read_or_written_as_granted_and_not_otherwise() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let limits = WasmLimits::default;
    let reader = granted.run(&sandbox, "read_note", Access::ReadOnly, limits());
    assert_eq!(reader.end().await, WasmEnd::Exited(0));
    assert_eq!(reader.sink.stdout(), "a note\n");

    let writer = granted.run(&sandbox, "write_note", Access::ReadOnly, limits());
    assert!(!matches!(writer.end().await, WasmEnd::Exited(0)));
    assert_eq!(fs::read(granted.path("note")).unwrap(), b"a note\n");
    let writer = granted.run(&sandbox, "write_note", Access::ReadWrite, limits());
    assert_eq!(writer.end().await, WasmEnd::Exited(0));
    assert_eq!(fs::read(granted.path("note")).unwrap(), b"note\n");

    // Without a grant there is no directory at all: 8 is badf.
    let (end, _) = sandbox.end_of("read_note").await;
    assert_eq!(end, WasmEnd::Exited(8));
    let nowhere = granted.path("nowhere");
    let launch = Launch {
        directories: vec![Directory {
            guest: "/data".to_owned(),
            host: nowhere,
            access: Access::ReadOnly,
        }],
        ..Launch::new(Sink::new(1))
    };
    let run = sandbox.runtime.spawn(&sandbox.module("hello"), launch);
    let WasmEnd::Refused(reason) = run.ended().await else {
        panic!("it ran");
    };
    assert!(reason.contains("nowhere"), "{reason}");
}

#[tokio::test]
async fn no_way_leads_out_of_a_directory() {
    let sandbox = Sandbox::new();
    for target in ["/etc/passwd", "../../../../../../../../etc/passwd"] {
        let granted = Granted::new();
        fs::remove_file(granted.path("note")).unwrap();
        symlink(target, granted.path("note")).unwrap();
        for guest in ["read_note", "write_note"] {
            let guest = granted.run(&sandbox, guest, Access::ReadWrite, WasmLimits::default());
            assert!(matches!(guest.end().await, WasmEnd::Exited(errno) if errno != 0));
            assert_eq!(guest.sink.stdout(), "");
        }
    }
    let granted = Granted::new();
    fs::remove_file(granted.path("note")).unwrap();
    let limits = WasmLimits::default;
    let escape = granted.run(&sandbox, "path_escape", Access::ReadWrite, limits());
    // It was given a directory, which it takes for an escape at once.
    assert_eq!(escape.end().await, WasmEnd::Exited(1));
    // 63 is perm: links would be followed by whoever works there on the host.
    let link = granted.run(&sandbox, "symlink_escape", Access::ReadWrite, limits());
    assert_eq!(link.end().await, WasmEnd::Exited(63));
    assert!(fs::symlink_metadata(granted.path("note")).is_err());
}

#[tokio::test]
async fn what_lies_in_writable_directories_is_bounded() {
    let sandbox = Sandbox::new();
    let limits = || WasmLimits {
        directory_bytes: 1 << 20,
        ..WasmLimits::default()
    };
    // 51 is nospc.
    let granted = Granted::new();
    let hog = granted.run(&sandbox, "disk_hog", Access::ReadWrite, limits());
    assert_eq!(hog.end().await, WasmEnd::Exited(51));
    let lies = fs::metadata(granted.path("hog")).unwrap().len();
    assert!((800 << 10..=1 << 20).contains(&lies), "{lies}");
    assert!(hog.run.usage().hits.of(Limit::DirectoryBytes) > 0);
    assert!(hog.run.usage().directory_bytes <= 1 << 20);

    // What was written before counts too, and so does what has no name any more.
    let again = granted.run(&sandbox, "disk_hog", Access::ReadWrite, limits());
    assert_eq!(again.end().await, WasmEnd::Exited(51));
    assert!(fs::metadata(granted.path("hog")).unwrap().len() <= 1 << 20);
    let granted = Granted::new();
    let hidden = granted.run(&sandbox, "unlinked_disk_hog", Access::ReadWrite, limits());
    assert_eq!(hidden.end().await, WasmEnd::Exited(51));
}

/// By a stream, by one that writes at once, and by the file: the guest tries all three.
#[tokio::test]
async fn what_components_write_is_bounded_too() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let limits = || WasmLimits {
        directory_bytes: 1 << 20,
        ..WasmLimits::default()
    };
    let hog = granted.run(&sandbox, "component_disk_hog", Access::ReadWrite, limits());
    assert_eq!(hog.end().await, WasmEnd::Exited(0));
    let size = || fs::metadata(granted.path("hog")).unwrap().len();
    assert!((900 << 10..=1 << 20).contains(&size()), "{}", size());
    let usage = hog.run.usage();
    assert!(usage.hits.of(Limit::DirectoryBytes) >= 3);
    assert!(usage.directory_bytes <= 1 << 20);
    // What the run before left counts, so that a file cannot even be created.
    let again = granted.run(&sandbox, "component_disk_hog", Access::ReadWrite, limits());
    assert_eq!(again.end().await, WasmEnd::Exited(1));
    assert!(size() <= 1 << 20);
    assert_eq!(again.run.usage().hits.of(Limit::DirectoryBytes), 1);
    // Without the grant it does not even open the file.
    let reader = granted.run(&sandbox, "component_disk_hog", Access::ReadOnly, limits());
    assert_eq!(reader.end().await, WasmEnd::Exited(1));
    assert_eq!(reader.run.usage().hits.of(Limit::DirectoryBytes), 0);
}

/// Buffers above what one call transfers are filled and written in parts.
#[tokio::test]
async fn reads_and_writes_of_any_size_work() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let limits = WasmLimits::default();
    let guest = granted.run(&sandbox, "large_transfers", Access::ReadWrite, limits);
    assert_eq!(guest.end().await, WasmEnd::Exited(0));
    assert_eq!(fs::read(granted.path("big")).unwrap(), [7; 2 << 20]);
}

/// What a run uses is told of each limit; here of those that no other test reads.
#[tokio::test]
async fn use_is_measured() {
    let sandbox = Sandbox::new();
    let hog = sandbox.spawn("memory_hog_over_memories");
    hog.end().await;
    let usage = hog.run.usage();
    assert_eq!(
        (usage.memories, usage.tables, usage.instances),
        (3, 0, 4),
        "three memories, and the instance of the program that fills them"
    );

    let spinner = sandbox.spawn("endless_loop");
    let limits = WasmLimits::default();
    // In debt, it has taken all of its burst.
    while spinner.run.usage().hits.of(Limit::Cpu) == 0
        || spinner.run.usage().cpu_burst < limits.cpu_burst
    {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let started = spinner.run.usage().start_time;
    assert!(started > Duration::ZERO);
    assert_eq!(started, spinner.run.usage().start_time, "it has started");
    spinner.kill().await;

    // Asleep, a guest earns its burst.
    let sleeper = sandbox.spawn("sleeper");
    while sleeper.run.usage().cpu_burst > Duration::ZERO {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    sleeper.kill().await;

    let overflow = sandbox.spawn("stack_overflow");
    overflow.end().await;
    assert_eq!(overflow.run.usage().peak_stack_bytes, GUEST_STACK as u64);
    let deep = |depth: u32| {
        format!(
            r#"(module
            (import "wasi_snapshot_preview1" "sched_yield" (func $yield (result i32)))
            (memory (export "memory") 1)
            (func $down (param $left i32)
              (drop (call $yield))
              (if (local.get $left) (then (call $down (i32.sub (local.get $left) (i32.const 1))))))
            (func (export "_start") (call $down (i32.const {depth}))))"#
        )
    };
    let mut depths = Vec::new();
    for depth in [0, 100, 1000] {
        let text = deep(depth);
        let module = sandbox.runtime.prepare("deep", text.as_bytes()).unwrap();
        let guest = sandbox.spawn_with(&module, &limits, Sink::new(0));
        assert_eq!(guest.end().await, WasmEnd::Exited(0));
        depths.push(guest.run.usage().peak_stack_bytes);
    }
    // Each call takes at least its return address and its frame's pointer.
    assert!(depths[1] >= depths[0] + 100 * 16, "{depths:?}");
    assert!(depths[2] >= depths[1] + 900 * 16, "{depths:?}");
    assert!(depths[2] < GUEST_STACK as u64, "{depths:?}");
}

/// The cache tells of a module what its compiler found.
#[tokio::test]
async fn what_a_module_is_made_of_is_kept_with_it() {
    let sandbox = Sandbox::new();
    let text = source("hello");
    let made = sandbox.module("hello").made();
    assert_eq!(made.bytes, text.len() as u64);
    assert_eq!((made.functions, made.instances), (1, 1));
    assert!(made.names >= 2, "{made:?}");
    assert!(made.compile_memory_bytes > 1 << 20, "{made:?}");
    let again = start(&sandbox.cache(), keeper()).unwrap();
    assert_eq!(again.prepare("hello", &text).unwrap().made(), made);
}

#[tokio::test]
async fn open_files_are_bounded() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let limits = WasmLimits {
        open_files: 5,
        ..WasmLimits::default()
    };
    let hog = granted.run(&sandbox, "open_files_hog", Access::ReadOnly, limits);
    // 33 is mfile.
    assert_eq!(hog.end().await, WasmEnd::Exited(33));
    let usage = hog.run.usage();
    assert_eq!(
        (usage.peak_open_files, usage.hits.of(Limit::OpenFiles)),
        (5, 1)
    );
}

#[tokio::test]
async fn open_files_of_components_are_bounded_streams_too() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    for guest in ["component_open_files_hog", "component_streams_hog"] {
        let limits = WasmLimits {
            open_files: 5,
            ..WasmLimits::default()
        };
        let hog = granted.run(&sandbox, guest, Access::ReadOnly, limits);
        assert_eq!(hog.end().await, WasmEnd::Exited(0), "{guest}");
        let usage = hog.run.usage();
        assert_eq!(
            (usage.peak_open_files, usage.hits.of(Limit::OpenFiles)),
            (5, 1),
            "{guest}"
        );
    }
}

#[tokio::test]
async fn a_stream_never_becomes_a_file() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let limits = WasmLimits::default();
    let guest = granted.run(&sandbox, "file_as_stream", Access::ReadWrite, limits);
    assert_eq!(guest.end().await, WasmEnd::Exited(0));
}

#[tokio::test]
async fn a_call_that_hangs_in_the_system_is_bounded_and_others_go_on() {
    let sandbox = Sandbox::new();
    let granted = Granted::new();
    let note = granted.path("note");
    fs::remove_file(&note).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &note,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    // Opening it waits for somebody who writes.
    let limits = WasmLimits {
        host_call_time: Duration::from_millis(200),
        ..WasmLimits::default()
    };
    for guest in ["read_note", "component_streams_hog"] {
        let hanging = granted.run(&sandbox, guest, Access::ReadOnly, limits.clone());
        let neighbour = sandbox.spawn("hello");
        assert_eq!(neighbour.end().await, WasmEnd::Exited(0));
        let WasmEnd::LimitHit(reason) = hanging.end().await else {
            panic!("{guest}: no limit was hit");
        };
        assert!(
            reason.contains("host call took longer than 200 ms"),
            "{guest}: {reason}"
        );
        assert_eq!(hanging.run.usage().hits.of(Limit::HostCallTime), 1);
    }
    // The threads that open it are let go.
    drop(fs::OpenOptions::new().read(true).write(true).open(&note));
}

#[tokio::test]
async fn wall_time_is_bounded_for_the_start_and_for_the_run() {
    let sandbox = Sandbox::new();
    let limits = WasmLimits {
        start_time: Duration::from_millis(100),
        run_time: Some(Duration::from_millis(400)),
        ..WasmLimits::default()
    };
    for (guest, limit, reason) in [
        (
            "endless_loop_in_start_function",
            Limit::StartTime,
            "not instantiated within 100 ms",
        ),
        ("endless_loop", Limit::RunTime, "not over after 400 ms"),
        ("sleeper", Limit::RunTime, "not over after 400 ms"),
        (
            "endless_loop_in_component",
            Limit::RunTime,
            "not over after 400 ms",
        ),
    ] {
        let guest = sandbox.spawn_with(&sandbox.module(guest), &limits, Sink::new(100));
        let WasmEnd::LimitHit(found) = guest.end().await else {
            panic!("no limit was hit");
        };
        assert!(found.contains(reason), "{found}");
        assert_eq!(guest.run.usage().hits.of(limit), 1);
    }
}

#[tokio::test]
async fn an_environment_that_is_too_large_is_refused() {
    let sandbox = Sandbox::new();
    let launch = Launch {
        environment: vec![("A".to_owned(), "x".repeat(2000))],
        limits: WasmLimits {
            environment_bytes: 2000,
            ..WasmLimits::default()
        },
        ..Launch::new(Sink::new(100))
    };
    let run = sandbox.runtime.spawn(&sandbox.module("hello"), launch);
    let WasmEnd::LimitHit(reason) = run.ended().await else {
        panic!("it ran");
    };
    assert!(reason.contains("of 2000 at most"), "{reason}");
    assert_eq!(run.usage().hits.of(Limit::Environment), 1);
}

#[tokio::test]
async fn components_run_under_the_same_limits() {
    let sandbox = Sandbox::new();
    assert_eq!(
        sandbox.end_of("component_command").await.0,
        WasmEnd::Exited(0)
    );
    let (end, sink) = sandbox.end_of("component_hello").await;
    assert_eq!(end, WasmEnd::Exited(0));
    assert_eq!(sink.stdout(), "hello from a component\n");
    // From the cache now.
    assert_eq!(
        sandbox.end_of("component_hello").await.0,
        WasmEnd::Exited(0)
    );

    let limits = WasmLimits {
        memory_bytes: 20 << 20,
        ..WasmLimits::default()
    };
    let module = sandbox.module("memory_hog_over_memories");
    let hog = sandbox.spawn_with(&module, &limits, Sink::new(0));
    assert_eq!(hog.end().await, WasmEnd::Exited(0));
    let usage = hog.run.usage();
    // Each memory began with a page, and the first took what was left in whole megabytes.
    assert_eq!(usage.peak_memory_bytes, (19 << 20) + 3 * 65536);
    assert_eq!(usage.hits.of(Limit::Memory), 3);

    let looping = sandbox.spawn("endless_loop_in_component");
    let runs = |looping: &Guest| looping.run.usage().cpu_time > Duration::ZERO;
    while !runs(&looping) {
        tokio::task::yield_now().await;
    }
    assert!(looping.kill().await < KILL_LIMIT);

    let refusal = sandbox.refusal("component_wants_http");
    assert!(
        refusal.contains("imports wasi:http/outgoing-handler@0.2.0"),
        "{refusal}"
    );
}

/// Modules whose compiling takes far more than their size says.
#[tokio::test]
async fn compile_bombs_are_defused() {
    let directory = tempfile::tempdir().unwrap();
    let tight = |time: u64, memory_bytes: u64| {
        WasmRuntime::start(WasmConfig {
            cache_dir: directory.path().join("cache"),
            compiler: keeper(),
            compile_limits: CompileLimits {
                time: Duration::from_secs(time),
                memory_bytes,
            },
            form: ModuleForm::default(),
            network: Arc::default(),
            stack_bytes: GUEST_STACK,
        })
        .unwrap()
    };
    let many_exports: String = (0..10_000)
        .map(|number| format!("(export \"e{number}\" (func 0))"))
        .collect();
    let many_exports = format!("(module (func) {many_exports})");
    let runtime = tight(60, 4 << 30);
    // The text is parsed in the compiler's process only.
    let refused = runtime.prepare("many_exports", many_exports.as_bytes());
    let reason = refused.unwrap_err().to_string();
    assert!(reason.contains("too many names"), "{reason}");
    let binary = wat::parse_str(&many_exports).unwrap();
    let refused = runtime.prepare("many_exports", &binary).unwrap_err();
    assert_eq!(refused.limit(), Some(Limit::Names), "{refused}");

    let functions = format!(
        "(module (func (export \"_start\")) {})",
        "(func)".repeat(100_001)
    );
    let binary = wat::parse_str(&functions).unwrap();
    let refused = runtime.prepare("many_functions", &binary).unwrap_err();
    assert_eq!(refused.limit(), Some(Limit::Functions), "{refused}");

    let bomb = source("compile_bomb");
    let begun = Instant::now();
    let refused = tight(1, 4 << 30).prepare("bomb", &bomb).unwrap_err();
    assert_eq!(refused.limit(), Some(Limit::CompileTime), "{refused}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    // Tiny functions take the most memory for their size.
    let tiny =
        "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))".repeat(90_000);
    let tiny = wat::parse_str(format!("(module {tiny} (func (export \"_start\")))")).unwrap();
    let refused = tight(120, 200 << 20).prepare("tiny", &tiny).unwrap_err();
    assert_eq!(refused.limit(), Some(Limit::CompileMemory), "{refused}");
}

#[tokio::test]
async fn processor_time_goes_by_weight() {
    let sandbox = Sandbox::new();
    let module = sandbox.module("endless_loop");
    let spin = |cpu_weight| {
        let limits = WasmLimits {
            cpu_percent: 100,
            cpu_weight,
            ..WasmLimits::default()
        };
        sandbox.spawn_with(&module, &limits, Sink::new(0))
    };
    let (light, heavy) = (spin(100), spin(400));
    let taken = |guest: &Guest| guest.run.usage().cpu_time;
    let deadline = Instant::now() + PATIENCE;
    while taken(&light) + taken(&heavy) < Duration::from_millis(800) {
        assert!(Instant::now() < deadline, "the machine has no time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ratio = taken(&heavy).as_secs_f64() / taken(&light).as_secs_f64();
    assert!((2.5..6.0).contains(&ratio), "{ratio}");
}
