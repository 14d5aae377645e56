//! What sleeping plugins cost: memory and threads of 1 to 10 000 of them, how soon one prints its
//! first line and how soon an endless loop is gone, beside `python3` and `bash` children.
//!
//! `cargo run --release -p stockade-sandbox --example density -- [--short] [GUEST.wasm[=COUNT]...]`;
//! guests that are named are measured too, 1 and COUNT of each, 500 where that is left out. The one
//! in Go is made by `plugin-sdk/toolchain.sh go && plugin-sdk/build.sh examples/mp-heartbeat-go`:
//! `target/plugins/mp_heartbeat_go.wasm=500`. With more instances than the process may have maps
//! for, it shows how the next one is refused. `--short` is to see that it works.
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

/// Starts sleepers in rising numbers and shows what each of those costs that came since the last
/// number; the first has with it what the sandbox itself takes.
async fn sleepers(runtime: &WasmRuntime, name: &str, module: &WasmModule, counts: &[usize]) {
    let measured = || (kib("self", "Rss:"), kib("self", "Pss:"), maps());
    let mut before = (0, measured());
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
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let took = begun.elapsed();
        // Let the last of them reach its sleep.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (new, now) = (runs.len() - before.0, measured());
        let each = |now: f64, before: f64| (now - before).max(0.0) / new.max(1) as f64;
        println!(
            "{name:>24} {:>6}  {:>8.1} KiB RSS each  {:>8.1} KiB PSS each  {:>4.1} maps each  {:>3} threads  started in {:.3} ms each",
            runs.len(),
            each(now.0 as f64, before.1.0 as f64),
            each(now.1 as f64, before.1.1 as f64),
            each(now.2 as f64, before.1.2 as f64),
            threads(),
            took.as_secs_f64() * 1000.0 / new.max(1) as f64,
        );
        before = (runs.len(), now);
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
    if times.is_empty() {
        println!("{name:>24}  prints no line");
        return;
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

/// One part of the measurement, in a process of its own: memory that an earlier part has freed
/// would hide what the next one takes.
#[derive(Clone)]
enum Part {
    /// Compiles a guest into the cache.
    Compile { guest: String },
    /// From spawn to the first line.
    FirstLine { guest: String, rounds: usize },
    /// From kill to the end.
    Kill { neighbours: usize, rounds: usize },
    /// Numbers of sleepers.
    Sleep { guest: String, counts: Vec<usize> },
    /// Processes beside which all this stands.
    Children { program: String, count: usize },
}

impl Part {
    /// As arguments of the process that does it.
    fn arguments(&self) -> Vec<String> {
        let numbers = |numbers: &[usize]| {
            let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
            numbers.join(",")
        };
        match self {
            Self::Compile { guest } => vec!["compile".into(), guest.clone(), String::new()],
            Self::FirstLine { guest, rounds } => {
                vec!["first-line".into(), guest.clone(), numbers(&[*rounds])]
            }
            Self::Kill { neighbours, rounds } => {
                vec![
                    "kill".into(),
                    "spinner".into(),
                    numbers(&[*neighbours, *rounds]),
                ]
            }
            Self::Sleep { guest, counts } => vec!["sleep".into(), guest.clone(), numbers(counts)],
            Self::Children { program, count } => {
                vec!["children".into(), program.clone(), numbers(&[*count])]
            }
        }
    }

    fn from_arguments(kind: &str, subject: &str, numbers: &str) -> Self {
        let subject = subject.to_owned();
        let mut numbers: Vec<usize> = numbers
            .split(',')
            .filter_map(|number| number.parse().ok())
            .collect();
        let mut next = || numbers.pop().expect("a number");
        match kind {
            "compile" => Self::Compile { guest: subject },
            "first-line" => Self::FirstLine {
                guest: subject,
                rounds: next(),
            },
            "kill" => {
                let rounds = next();
                Self::Kill {
                    neighbours: next(),
                    rounds,
                }
            }
            "children" => Self::Children {
                program: subject,
                count: next(),
            },
            _ => Self::Sleep {
                guest: subject,
                counts: numbers,
            },
        }
    }

    async fn measure(self, cache: &Path) {
        if let Self::Children { program, count } = &self {
            return match program.as_str() {
                "bash" => children(
                    "bash",
                    &["-c", "echo x; read -t 600 < <(:) ; sleep 600"],
                    *count,
                ),
                program => children(
                    program,
                    &["-c", "print('x', flush=True); import time; time.sleep(600)"],
                    *count,
                ),
            };
        }
        let runtime = WasmRuntime::start(WasmConfig {
            cache_dir: cache.to_owned(),
            compiler: Compiler::InProcess,
            compile_limits: CompileLimits::default(),
            form: ModuleForm::default(),
            network: Arc::default(),
            stack_bytes: GUEST_STACK,
        })
        .expect("a runtime");
        let prepare = |guest: &str| {
            let bytes = match guest {
                "sleeper" => SLEEPER.as_bytes().to_vec(),
                "hello" => HELLO.as_bytes().to_vec(),
                "spinner" => SPINNER.as_bytes().to_vec(),
                path => fs::read(path).expect(path),
            };
            runtime.prepare(guest, &bytes).expect(guest)
        };
        let name = |guest: &str| {
            let stem = Path::new(guest).file_stem();
            stem.map_or_else(String::new, |it| it.to_string_lossy().into())
        };
        match self {
            Self::Compile { guest } => drop(prepare(&guest)),
            Self::FirstLine { guest, rounds } => {
                first_line(&runtime, &name(&guest), &prepare(&guest), rounds).await;
            }
            Self::Kill { neighbours, rounds } => {
                kill(&runtime, &prepare("spinner"), neighbours, rounds).await;
            }
            Self::Sleep { guest, counts } => {
                sleepers(&runtime, &name(&guest), &prepare(&guest), &counts).await;
            }
            Self::Children { .. } => {}
        }
    }
}

fn parts(guests: &[(String, usize)], is_short: bool) -> Vec<Part> {
    let many = |long: usize, short: usize| if is_short { short } else { long };
    let sleeper_counts = if is_short {
        vec![1, 100]
    } else {
        vec![1, 100, 1000, 10_000, 12_000]
    };
    let own = ["sleeper", "hello", "spinner"].map(str::to_owned);
    let all = own.iter().chain(guests.iter().map(|(guest, _)| guest));
    let mut parts: Vec<_> = all.cloned().map(|guest| Part::Compile { guest }).collect();
    parts.push(Part::FirstLine {
        guest: "hello".into(),
        rounds: many(1000, 20),
    });
    for program in ["bash", "python3"] {
        parts.push(Part::Children {
            program: program.into(),
            count: many(20, 3),
        });
    }
    for neighbours in [0, 3, 50] {
        parts.push(Part::Kill {
            neighbours,
            rounds: many(500, 20),
        });
    }
    parts.push(Part::Sleep {
        guest: "sleeper".into(),
        counts: sleeper_counts,
    });
    for (guest, count) in guests {
        parts.push(Part::FirstLine {
            guest: guest.clone(),
            rounds: many(100, 3),
        });
        parts.push(Part::Sleep {
            guest: guest.clone(),
            counts: vec![1, many(*count, 3)],
        });
    }
    parts
}

#[tokio::main]
async fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [part, cache, kind, subject, numbers] = arguments.as_slice()
        && part == "--part"
    {
        let part = Part::from_arguments(kind, subject, numbers);
        return part.measure(Path::new(cache)).await;
    }
    let is_short = arguments.iter().any(|it| it == "--short");
    arguments.retain(|it| it != "--short");
    let guests: Vec<(String, usize)> = arguments
        .into_iter()
        .map(|argument| match argument.split_once('=') {
            Some((path, count)) => (path.to_owned(), count.parse().expect("a count")),
            None => (argument, 500),
        })
        .collect();
    println!("budgets: first line 1 ms p50, 64 KiB each at 1 000 and 10 000, gone after 20 ms");
    let cache = std::env::temp_dir().join(format!("stockade-density-{}", std::process::id()));
    let program = std::env::current_exe().expect("this program");
    let mut has_failed = false;
    for part in parts(&guests, is_short) {
        let done = Command::new(&program)
            .arg("--part")
            .arg(&cache)
            .args(part.arguments())
            .status();
        has_failed |= !done.is_ok_and(|status| status.success());
    }
    let _ = fs::remove_dir_all(cache);
    assert!(!has_failed, "a part has failed");
}
