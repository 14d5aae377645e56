//! What sleeping plugins cost: memory and threads of 1 to 10 000 of them, how soon one prints its
//! first line and how soon an endless loop is gone, beside `python3` and `bash` children.
//!
//! `cargo run --release -p stockade-sandbox --example density -- [GUEST.wasm[=COUNT]...]`; guests
//! that are named are measured too, 1 and COUNT of each, 500 where that is left out. The one in
//! Go is made by `plugin-sdk/toolchain.sh go && plugin-sdk/build.sh examples/mp-heartbeat-go`:
//! `target/plugins/mp_heartbeat_go.wasm=500`. With more instances than the process may have maps
//! for, it shows how the next one is refused.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement is read on a terminal, and fails by panicking"
)]

use std::{
    fs,
    future::Future,
    io::{BufRead as _, BufReader},
    path::Path,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_sandbox::wasm::{
    CompileLimits, Compiler, GUEST_STACK, GuestOutput, GuestStream, Launch, ModuleForm, WasmConfig,
    WasmLimits, WasmModule, WasmRun, WasmRuntime,
};

const SLEEPER: &str = include_str!("../../../tests/guests/sleeper.wat");
const HELLO: &str = include_str!("../../../tests/guests/hello.wat");
const SPINNER: &str = include_str!("../../../tests/guests/endless_loop.wat");

/// Notes when the first byte comes.
#[derive(Default)]
struct FirstByte(Mutex<Option<Instant>>);

impl GuestOutput for FirstByte {
    fn log(&self, _level: stockade_sandbox::LogLevel, _line: &[u8]) {}

    fn push(&self, _stream: GuestStream, _bytes: &[u8]) {
        self.0.lock().get_or_insert_with(Instant::now);
    }

    fn budget(&self) -> usize {
        1 << 20
    }

    fn ready(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// KiB of a process, by a line of `smaps_rollup`.
fn kib(process: &str, line: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    text.lines()
        .find_map(|it| {
            it.strip_prefix(line)?
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or_default()
}

fn maps() -> usize {
    fs::read_to_string("/proc/self/maps").map_or(0, |text| text.lines().count())
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times.get(last * percent / 100).copied().unwrap_or_default()
}

fn is_asleep(run: &WasmRun) -> bool {
    run.usage().cpu_time > Duration::ZERO && run.usage().memory_bytes > 0
}

/// Starts sleepers in rising numbers and shows what each costs.
async fn sleepers(runtime: &WasmRuntime, name: &str, module: &WasmModule, counts: &[usize]) {
    let (rss, pss, base_maps) = (kib("self", "Rss:"), kib("self", "Pss:"), maps());
    let mut runs: Vec<WasmRun> = Vec::new();
    for &count in counts {
        let begun = Instant::now();
        let mut refused = None;
        while runs.len() < count {
            let launch = Launch {
                limits: WasmLimits {
                    cpu_percent: 100,
                    ..WasmLimits::default()
                },
                ..Launch::new(Arc::new(FirstByte::default()))
            };
            let run = runtime.spawn(module, launch);
            let ended = tokio::time::timeout(Duration::ZERO, run.ended()).await;
            if let Ok(end) = ended {
                refused = Some(end);
                break;
            }
            runs.push(run);
        }
        while !runs.iter().all(is_asleep) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let took = begun.elapsed();
        // Let the last of them reach its sleep.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let each = |now: u64, before: u64| now.saturating_sub(before) as f64 / runs.len() as f64;
        println!(
            "{name:>24} {:>6}  {:>8.1} KiB RSS each  {:>8.1} KiB PSS each  {:>4.1} maps each  {:>3} threads  {took:.1?}",
            runs.len(),
            each(kib("self", "Rss:"), rss),
            each(kib("self", "Pss:"), pss),
            (maps() as f64 - base_maps as f64) / runs.len() as f64,
            threads(),
        );
        if let Some(end) = refused {
            println!("{name:>24}         the next one: {end:?}");
            break;
        }
    }
}

/// Children that print a line and sleep.
fn children(program: &str, arguments: &[&str], count: usize) {
    let mut times = Vec::new();
    let mut running: Vec<Child> = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        let Ok(mut child) = Command::new(program)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
        else {
            println!("{program:>24}         is not installed");
            return;
        };
        let mut line = String::new();
        let _ = BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line);
        times.push(begun.elapsed());
        running.push(child);
    }
    let sum = |line| {
        let each = running
            .iter()
            .map(|child| kib(&child.id().to_string(), line));
        each.sum::<u64>() as f64 / running.len() as f64
    };
    println!(
        "{program:>24} {count:>6}  {:>8.1} KiB RSS each  {:>8.1} KiB PSS each  first line p50 {:.2?} p99 {:.2?}",
        sum("Rss:"),
        sum("Pss:"),
        percentile(&mut times, 50),
        percentile(&mut times, 99),
    );
    for mut child in running {
        let _ = child.kill();
        let _ = child.wait();
    }
}

async fn first_line(runtime: &WasmRuntime, name: &str, module: &WasmModule, rounds: usize) {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let output = Arc::new(FirstByte::default());
        let begun = Instant::now();
        let launch = Launch::new(Arc::clone(&output) as Arc<dyn GuestOutput>);
        let run = runtime.spawn(module, launch);
        let _ended = tokio::time::timeout(Duration::from_millis(200), run.ended()).await;
        if let Some(came) = *output.0.lock() {
            times.push(came - begun);
        }
    }
    println!(
        "{name:>24}  first line p50 {:.2?} p99 {:.2?} of {}",
        percentile(&mut times, 50),
        percentile(&mut times, 99),
        times.len()
    );
}

/// How soon an endless loop is gone once it is killed, beside so many others that go on.
async fn kill(runtime: &WasmRuntime, module: &WasmModule, neighbours: usize, rounds: usize) {
    let spin = || {
        let launch = Launch::new(Arc::new(FirstByte::default()));
        let kill = launch.kill.clone();
        (runtime.spawn(module, launch), kill)
    };
    let others: Vec<_> = (0..neighbours).map(|_| spin()).collect();
    let mut times = Vec::new();
    for _ in 0..rounds {
        let (run, kill) = spin();
        while run.usage().cpu_time.is_zero() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let begun = Instant::now();
        kill.cancel();
        run.ended().await;
        times.push(begun.elapsed());
    }
    drop(others);
    println!(
        "{:>24}  gone after p50 {:.2?} p99 {:.2?} of {rounds}, beside {neighbours} others",
        "endless loop",
        percentile(&mut times, 50),
        percentile(&mut times, 99)
    );
}

#[tokio::main]
async fn main() {
    let guests: Vec<(String, usize)> = std::env::args()
        .skip(1)
        .map(|argument| match argument.split_once('=') {
            Some((path, count)) => (path.to_owned(), count.parse().expect("a count")),
            None => (argument, 500),
        })
        .collect();
    let cache = std::env::temp_dir().join(format!("stockade-density-{}", std::process::id()));
    let runtime = WasmRuntime::start(WasmConfig {
        cache_dir: cache.clone(),
        compiler: Compiler::InProcess,
        compile_limits: CompileLimits::default(),
        form: ModuleForm::default(),
        network: Arc::default(),
        stack_bytes: GUEST_STACK,
    })
    .expect("a runtime");
    let prepare = |name: &str, bytes: &[u8]| runtime.prepare(name, bytes).expect(name);
    let (sleeper, hello, spinner) = (
        prepare("sleeper", SLEEPER.as_bytes()),
        prepare("hello", HELLO.as_bytes()),
        prepare("endless loop", SPINNER.as_bytes()),
    );
    first_line(&runtime, "wat guest", &hello, 200).await;
    kill(&runtime, &spinner, 0, 200).await;
    kill(&runtime, &spinner, 3, 200).await;
    kill(&runtime, &spinner, 50, 50).await;
    children(
        "python3",
        &["-c", "print('x', flush=True); import time; time.sleep(600)"],
        10,
    );
    children(
        "bash",
        &["-c", "echo x; read -t 600 < <(:) ; sleep 600"],
        10,
    );
    // Before the larger guests, whose freed memory would hide theirs.
    sleepers(
        &runtime,
        "wat guest",
        &sleeper,
        &[1, 100, 1000, 10_000, 12_000],
    )
    .await;
    for (path, count) in &guests {
        let bytes = fs::read(path).expect("the guest can be read");
        let name = Path::new(path)
            .file_stem()
            .map_or_else(String::new, |it| it.to_string_lossy().into());
        let module = prepare(&name, &bytes);
        first_line(&runtime, &name, &module, 100).await;
        sleepers(&runtime, &name, &module, &[1, *count]).await;
    }
    drop(runtime);
    let _ = fs::remove_dir_all(cache);
}
