//! What a call costs: guest to host for the cheap functions of `stockade:plugin/v1`, and host to
//! guest and back for a served call.
//!
//! `cargo run --release -p stockade-sandbox --example host_calls`
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "an example prints, and fails by panicking"
)]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use stockade_sandbox::{
    CompileLimits, Compiler, Contract, FIRST_BACKOFF, ModuleForm, NativeConfig, PluginState,
    Policy, Supervisor, SupervisorConfig, WasmConfig,
};

/// Calls of one measurement.
const CALLS: u32 = 1_000_000;
/// Served calls of one measurement.
const SERVED: u32 = 2000;

/// A command that makes a call so many times and ends.
fn caller(name: &str, import: &str, call: &str) -> (String, String) {
    let text = format!(
        "(module (import \"stockade:plugin/v1\" {import})
           (memory (export \"memory\") 1) (data (i32.const 0) \"k\")
           (func (export \"_start\") (local $left i32)
             (local.set $left (i32.const {CALLS}))
             (loop $again
               (drop {call})
               (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))"
    );
    (name.to_owned(), text)
}

fn start(directory: &Path) -> Supervisor {
    let supervisor = Supervisor::discover(SupervisorConfig {
        locations: vec![directory.join("plugins")],
        policy: Policy::default(),
        watch: false,
        wasm: WasmConfig {
            cache_dir: directory.join("cache"),
            compiler: Compiler::InProcess,
            compile_limits: CompileLimits::default(),
            form: ModuleForm::default(),
            stack_bytes: stockade_sandbox::wasm::GUEST_STACK,
            network: Default::default(),
        },
        native: NativeConfig::new(Vec::new(), &[]),
        server_environment: Vec::new(),
        python: None,
        first_backoff: FIRST_BACKOFF,
    });
    let supervisor = supervisor.unwrap();
    supervisor.start(&Contract::default()).unwrap();
    supervisor
}

async fn until(supervisor: &Supervisor, name: &str, state: PluginState) -> Duration {
    loop {
        let status = supervisor.status(name).unwrap();
        if status.state == state {
            return status.cpu_time.unwrap_or_default();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let callers = [
        caller(
            "answer_length",
            "\"answer_length\" (func $f (result i32))",
            "(call $f)",
        ),
        caller(
            "clock_ms",
            "\"clock_ms\" (func $f (result i64))",
            "(i32.wrap_i64 (call $f))",
        ),
        caller(
            "metric_add",
            "\"metric_add\" (func $f (param i32 i32 f64) (result i32))",
            "(call $f (i32.const 0) (i32.const 1) (f64.const 1))",
        ),
        caller(
            "state_get, denied",
            "\"state_get\" (func $f (param i32 i32) (result i32))",
            "(call $f (i32.const 0) (i32.const 1))",
        ),
    ];
    println!("{:<24} {:>12}", "guest to host", "ns a call");
    for (name, text) in callers {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("plugins")).unwrap();
        fs::write(directory.path().join("plugins/it.wat"), text).unwrap();
        let manifest = "restart = 'never'\n[limits]\ncpu_percent = 100\ncpu_burst_ms = 10000\n";
        fs::write(directory.path().join("plugins/it.plugin.toml"), manifest).unwrap();
        let supervisor = start(directory.path());
        until(&supervisor, "it", PluginState::Running).await;
        let begun = Instant::now();
        until(&supervisor, "it", PluginState::Exited).await;
        let each = begun.elapsed().as_nanos() / u128::from(CALLS);
        println!("{name:<24} {each:>12}");
        supervisor.shutdown(Duration::ZERO).await;
    }

    let directory = tempfile::tempdir().unwrap();
    let plugins = directory.path().join("plugins");
    fs::create_dir(&plugins).unwrap();
    let text = "(module (import \"stockade:plugin/v1\" \"reply\" (func $reply (param i32 i32) (result i32)))
        (memory (export \"memory\") 1)
        (func (export \"stockade_call\") (param i32) (result i32) (call $reply (i32.const 0) (i32.const 8))))";
    fs::write(plugins.join("it.wat"), text).unwrap();
    let manifest = "calls = true\n[limits]\ncpu_percent = 100\ncpu_burst_ms = 10000\n";
    fs::write(plugins.join("it.plugin.toml"), manifest).unwrap();
    let supervisor = start(directory.path());
    until(&supervisor, "it", PluginState::Running).await;
    let mut times = Vec::new();
    for _ in 0..SERVED {
        let begun = Instant::now();
        let reply = supervisor
            .call("it.x", "", "bench", bytes::Bytes::new())
            .await;
        times.push(begun.elapsed());
        assert_eq!(reply.unwrap().len(), 8);
    }
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100].as_micros();
    println!(
        "\nhost to guest and back: p50 {} us, p99 {} us",
        at(50),
        at(99)
    );
    supervisor.shutdown(Duration::ZERO).await;
}
