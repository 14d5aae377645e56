//! What calls across the border of the sandbox cost: from the guest for the functions of
//! `stockade:plugin/v1`, to the guest and back for a served call, for events that it pulls or is
//! brought, and for candidates that it ranks.
//!
//! `cargo run --release --workspace --example host_calls [-- CALLS]`; without a number, a million
//! guest calls a measurement, and a hundredth of that of all that goes through a queue.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement is read on a terminal, and fails by panicking"
)]

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_sandbox::{
    Compiler, Contract, PluginHost, PluginState, RankFailure, RankRequest, Services, Supervisor,
    SupervisorConfig, WasmConfig,
    host_api::{
        Backlog, CacheChange, CacheEvent, CacheRequest, CacheStats, CacheWork, EventBatch,
        EventSource, KeysPage, KeysQuery, Pending, PluginRun, RankCandidate, Refusal, Subscription,
    },
};

/// Guest calls of one measurement.
const CALLS: u32 = 1_000_000;
/// How often each is measured; the median is shown.
const ROUNDS: usize = 7;
/// Events of a message.
const BATCH: usize = 256;

/// A plugin has all the time and processor that it wants, and every grant.
const MANIFEST: &str = "restart = 'never'\ncalls = true\nrank = true\n\
    cache = ['stats', 'keys', 'events', 'pin']\n\
    [limits]\ncpu_percent = 100\ncpu_burst_ms = 10000\ncall_ms = 600000\nrank_ms = 1000\nstate_kib = 4\n\
    queued_events = 65536\n";

/// What a guest calls: name, imports, and one call of it.
const CALLERS: [(&str, &str, &str); 8] = [
    ("(an empty loop)", "", "(i32.const 0)"),
    (
        "answer_length",
        "(import \"stockade:plugin/v1\" \"answer_length\" (func $f (result i32)))",
        "(call $f)",
    ),
    (
        "clock_ms",
        "(import \"stockade:plugin/v1\" \"clock_ms\" (func $f (result i64)))",
        "(block (result i32) (drop (call $f)) (i32.const 0))",
    ),
    (
        "answer_read, 64 bytes",
        "(import \"stockade:plugin/v1\" \"answer_read\" (func $f (param i32 i32) (result i32)))",
        "(call $f (i32.const 1024) (i32.const 64))",
    ),
    (
        "metric_add",
        "(import \"stockade:plugin/v1\" \"metric_add\" (func $f (param i32 i32 f64) (result i32)))",
        "(call $f (i32.const 0) (i32.const 1) (f64.const 1))",
    ),
    (
        "state_set, 8 bytes",
        "(import \"stockade:plugin/v1\" \"state_set\" (func $f (param i32 i32 i32 i32) (result i32)))",
        "(call $f (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 8))",
    ),
    (
        "state_get, 8 bytes",
        "(import \"stockade:plugin/v1\" \"state_get\" (func $f (param i32 i32) (result i32)))
         (import \"stockade:plugin/v1\" \"state_set\" (func $set (param i32 i32 i32 i32) (result i32)))",
        "(call $f (i32.const 0) (i32.const 1))",
    ),
    (
        "timer_set",
        "(import \"stockade:plugin/v1\" \"timer_set\" (func $f (param i32 i32 i32 i32) (result i32)))",
        "(call $f (i32.const 0) (i32.const 1) (i32.const 600000) (i32.const 0))",
    ),
];

/// As [`CALLERS`], for calls that are worked on by another thread while the guest sleeps.
const ASIDE: [(&str, &str, &str); 2] = [
    (
        "cache_stats",
        "(import \"stockade:plugin/v1\" \"cache_stats\" (func $f (result i32)))",
        "(call $f)",
    ),
    (
        "cache_request, 1 key",
        "(import \"stockade:plugin/v1\" \"cache_request\" (func $f (param i32 i32) (result i32)))",
        "(call $f (i32.const 64) (i32.const 25))",
    ),
];

/// A reactor that makes the call as often as the number says that it is called with, 4 bytes.
fn caller(imports: &str, call: &str) -> String {
    // What is to be got has to be there.
    let setup = match imports.contains("$set") {
        true => "(drop (call $set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 8)))",
        false => "",
    };
    format!(
        "(module {imports}
           (import \"stockade:plugin/v1\" \"message_body_read\" (func $body (param i32 i32) (result i32)))
           (import \"stockade:plugin/v1\" \"reply\" (func $reply (param i32 i32) (result i32)))
           (memory (export \"memory\") 1) (data (i32.const 0) \"k\")
           (data (i32.const 64) \"{{\\22op\\22:\\22pin\\22,\\22keys\\22:[\\22k\\22]}}\")
           (func (export \"stockade_call\") (param i32) (result i32) (local $left i32)
             {setup}
             (drop (call $body (i32.const 512) (i32.const 4)))
             (local.set $left (i32.load (i32.const 512)))
             (block $done
               (loop $again
                 (br_if $done (i32.eqz (local.get $left)))
                 (if (i32.lt_s {call} (i32.const 0)) (then unreachable))
                 (local.set $left (i32.sub (local.get $left) (i32.const 1)))
                 (br $again)))
             (drop (call $reply (i32.const 0) (i32.const 1)))
             (i32.const 0)))"
    )
}

/// A reactor that reads what it is brought, and leaves the order as it is.
const READER: &str = "(module
    (import \"stockade:plugin/v1\" \"message_read\" (func $read (param i32 i32) (result i32)))
    (import \"stockade:plugin/v1\" \"reply\" (func $reply (param i32 i32) (result i32)))
    (import \"stockade:plugin/v1\" \"events_subscribe\" (func $subscribe (param i32 i32) (result i32)))
    (memory (export \"memory\") 64) (data (i32.const 0) \"{}[]\")
    (func (export \"stockade_call\") (param $length i32) (result i32)
        (drop (call $subscribe (i32.const 0) (i32.const 2)))
        (drop (call $reply (i32.const 0) (i32.const 1)))
        (i32.const 0))
    (func (export \"stockade_events\") (param $length i32) (result i32)
        (drop (call $read (i32.const 4096) (local.get $length)))
        (i32.const 0))
    (func (export \"stockade_rank\") (param $length i32) (result i32)
        (drop (call $read (i32.const 4096) (local.get $length)))
        (call $reply (i32.const 2) (i32.const 2))))";

/// A command that waits for messages, reads each, and subscribes when it is called.
const PULLER: &str = "(module
    (import \"stockade:plugin/v1\" \"next_message\" (func $next (param i32) (result i32)))
    (import \"stockade:plugin/v1\" \"message_read\" (func $read (param i32 i32) (result i32)))
    (import \"stockade:plugin/v1\" \"reply\" (func $reply (param i32 i32) (result i32)))
    (import \"stockade:plugin/v1\" \"events_subscribe\" (func $subscribe (param i32 i32) (result i32)))
    (memory (export \"memory\") 64) (data (i32.const 0) \"{}\")
    (func (export \"_start\") (local $length i32)
        (loop $again
            (local.set $length (call $next (i32.const -1)))
            (drop (call $read (i32.const 4096) (local.get $length)))
            ;; {\"kind\":\"c
            (if (i32.eq (i32.load8_u (i32.const 4105)) (i32.const 99))
              (then
                (drop (call $subscribe (i32.const 0) (i32.const 2)))
                (drop (call $reply (i32.const 0) (i32.const 1)))))
            (br_if $again (i32.ne (i32.load8_u (i32.const 4105)) (i32.const 115))))))";

/// A server whose events are there as fast as they are taken, so many times a message.
struct Flood {
    events: usize,
    messages: u64,
    /// When the first and the last were asked for.
    times: Arc<Mutex<(Option<Instant>, Option<Instant>)>>,
}

struct FloodOfEvents {
    events: usize,
    left: u64,
    times: Arc<Mutex<(Option<Instant>, Option<Instant>)>>,
}

fn event(number: usize) -> CacheEvent {
    CacheEvent::Stored {
        key: format!("model@01000100@0@{number:064x}"),
        salt: String::new(),
        model: "model".to_owned(),
        bytes: 4096,
        request: Some("request".to_owned()),
        tokens: 256,
    }
}

impl EventSource for FloodOfEvents {
    fn backlog(&self) -> Backlog {
        Backlog::new(|| 0)
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        let mut times = self.times.lock();
        times.0.get_or_insert_with(Instant::now);
        times.1 = Some(Instant::now());
        drop(times);
        let batch = self.left.checked_sub(1).map(|left| {
            self.left = left;
            let events = self.events;
            EventBatch {
                cursor: left,
                lost: 0,
                events: Box::new(move || (0..events).map(event).collect()),
            }
        });
        Box::pin(std::future::ready(batch))
    }
}

impl PluginHost for Flood {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        None
    }

    fn stats(&self, _run: &PluginRun) -> Result<CacheStats, Refusal> {
        Ok(CacheStats::default())
    }

    fn keys(&self, _run: &PluginRun, _query: &KeysQuery) -> Result<KeysPage, Refusal> {
        Ok(KeysPage::default())
    }

    fn request(&self, _run: &PluginRun, _request: &CacheRequest) -> Result<CacheWork, Refusal> {
        Ok(CacheWork::Done(CacheChange::default()))
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        _subscription: &Subscription,
        _most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        let source = FloodOfEvents {
            events: self.events,
            left: self.messages,
            times: Arc::clone(&self.times),
        };
        Ok((0, Box::new(source)))
    }

    fn ended(&self, _run: &PluginRun) {}
}

/// One plugin that runs.
struct Bench {
    supervisor: Supervisor,
    times: Arc<Mutex<(Option<Instant>, Option<Instant>)>>,
    _directory: tempfile::TempDir,
}

impl Bench {
    async fn start(module: &str, events: usize, messages: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let plugins = directory.path().join("plugins");
        fs::create_dir(&plugins).unwrap();
        fs::write(plugins.join("it.wat"), module).unwrap();
        fs::write(plugins.join("it.plugin.toml"), MANIFEST).unwrap();
        let wasm = WasmConfig::new(directory.path().join("cache"), Compiler::InProcess);
        let config = SupervisorConfig::new(vec![plugins], wasm);
        let supervisor = Supervisor::discover(config).unwrap();
        let times = Arc::default();
        let host = Flood {
            events,
            messages,
            times: Arc::clone(&times),
        };
        supervisor.provide(Services {
            host: Some(Arc::new(host)),
            ..Services::default()
        });
        supervisor.start(&Contract::default()).unwrap();
        loop {
            let status = supervisor.status("it").unwrap();
            match status.state {
                PluginState::Running => break,
                PluginState::Discovered | PluginState::Prepared => {}
                _ => panic!("it does not run: {:?}", status.last_end),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self {
            supervisor,
            times,
            _directory: directory,
        }
    }

    async fn call(&self, number: u32) -> Duration {
        let payload = number.to_le_bytes().to_vec();
        let begun = Instant::now();
        let reply = self.supervisor.call("it.x", "", "bench", payload.into());
        reply.await.expect("the call failed");
        begun.elapsed()
    }

    async fn end(self) {
        self.supervisor.shutdown(Duration::ZERO).await;
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let place = (sorted.len() as f64 * share) as usize;
    sorted[place.min(sorted.len() - 1)].as_nanos() as f64
}

fn row(what: &str, nanoseconds: f64) {
    let rate = 1e9 / nanoseconds.max(0.1);
    println!("{what:<44} {nanoseconds:>12.1} {rate:>16.0}");
}

fn head(what: &str, unit: &str) {
    println!(
        "\n{what:<44} {:>12} {:>16}",
        format!("ns {unit}"),
        "a second"
    );
}

/// Nanoseconds of one call that a guest makes, its share of the loop included.
async fn guest_calls(imports: &str, call: &str, calls: u32) -> f64 {
    let bench = Bench::start(&caller(imports, call), 0, 0).await;
    bench.call(calls / 10).await;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let with = bench.call(calls).await;
        let without = bench.call(0).await;
        rounds.push(with.saturating_sub(without).as_nanos() as f64 / f64::from(calls));
    }
    bench.end().await;
    median(rounds)
}

/// Nanoseconds of one message with so many events, from the server's queue to the guest.
async fn events(module: &str, events: usize, messages: u64) -> f64 {
    let bench = Bench::start(module, events, messages).await;
    bench.call(0).await;
    loop {
        let (begun, ended) = *bench.times.lock();
        let counts = bench.supervisor.status("it").unwrap().counts.handlers;
        let heard: u64 = counts
            .iter()
            .filter(|it| it.handler.kind() == "events")
            .map(|it| it.count)
            .sum();
        if let (Some(begun), Some(ended)) = (begun, ended)
            && heard + 1 >= messages
        {
            let spent = ended - begun;
            bench.end().await;
            return spent.as_nanos() as f64 / messages as f64;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Sorted times of rankings of so many candidates.
async fn rankings(count: usize, times: usize) -> Vec<Duration> {
    let bench = Bench::start(READER, 0, 0).await;
    let supervisor = bench.supervisor;
    let work = tokio::task::spawn_blocking(move || {
        let mut spent = Vec::new();
        while spent.len() < times {
            let request = RankRequest {
                tenant: "everybody else".into(),
                bytes_wanted: 4096 * count as u64 / 2,
                count,
                candidates: Box::new(move || (0..count).zip(0..).map(candidate).collect()),
            };
            let begun = Instant::now();
            match supervisor.rank("it", request) {
                Ok(_) => spent.push(begun.elapsed()),
                // Its reply is out before its handler has returned.
                Err(RankFailure::Busy) => std::thread::yield_now(),
                Err(failure) => panic!("the ranking failed: {}", failure.name()),
            }
        }
        (supervisor, spent)
    });
    let (supervisor, mut spent) = work.await.unwrap();
    supervisor.shutdown(Duration::ZERO).await;
    spent.sort_unstable();
    spent
}

fn candidate((number, id): (usize, u32)) -> RankCandidate {
    RankCandidate {
        id,
        key: format!("model@01000100@0@{number:064x}"),
        salt: String::new(),
        model: "model".to_owned(),
        bytes: 4096,
        chunk: Some(id % 64),
        idle_ms: 1000,
        age_ms: 20_000,
        uses: id % 5,
        request: Some(format!("request-{}", id / 64)),
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let calls = std::env::args().nth(1).map_or(CALLS, |text| {
        text.parse().expect("give the number of guest calls")
    });
    let queued = (calls / 100).max(10);

    head("guest to host, done at once", "a call");
    let mut loop_cost = 0.0;
    for (name, imports, call) in CALLERS {
        let each = guest_calls(imports, call, calls).await;
        if imports.is_empty() {
            loop_cost = each;
            row(name, each);
        } else {
            row(name, (each - loop_cost).max(0.0));
        }
    }

    head("guest to host, worked on beside the guest", "a call");
    for (name, imports, call) in ASIDE {
        row(name, guest_calls(imports, call, queued).await);
    }

    head("host to guest and back", "a call");
    let bench = Bench::start(&caller("", "(i32.const 0)"), 0, 0).await;
    let mut served = Vec::new();
    for _ in 0..queued {
        served.push(bench.call(0).await);
    }
    bench.end().await;
    served.sort_unstable();
    row("server_module_call, p50", quantile(&served, 0.5));
    row("server_module_call, p99", quantile(&served, 0.99));

    for count in [1, BATCH] {
        head(&format!("messages of {count} events"), "a message");
        let messages = u64::from(queued) / if count == 1 { 1 } else { 8 } + 2;
        let pulled = events(PULLER, count, messages).await;
        row("pulled by a command (next_message)", pulled);
        let brought = events(READER, count, messages).await;
        row("brought to a reactor (stockade_events)", brought);
        if count > 1 {
            row("pulled, one event of it", pulled / count as f64);
            row("brought, one event of it", brought / count as f64);
        }
    }

    head("ranking", "a batch");
    for count in [1, 64, 512] {
        let times = rankings(count, (queued as usize / count).max(20)).await;
        row(&format!("{count} candidates, p50"), quantile(&times, 0.5));
        row(&format!("{count} candidates, p99"), quantile(&times, 0.99));
    }
}
