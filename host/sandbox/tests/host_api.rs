//! Plugins of version 1 of the contract: what they ask of the server, and the server of them.
//! The modules in `tests/guests/abi-v1` are kept as they are, so that an old plugin works on
//! every later server.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_sandbox::{
    CallFailure, Compiler, Contract, Limit, PluginHost, PluginState, PluginStatus, RankFailure,
    RankRequest, Services, Supervisor, SupervisorConfig, WasmConfig,
    host_api::{
        self, Backlog, CacheChange, CacheEvent, CacheOperation, CacheRequest, CacheStats,
        CacheWork, Code, EventBatch, EventSource, Handler, KeyFacts, KeysPage, KeysQuery, Outcome,
        Pending, PluginRun, RankCandidate, Refusal, Subscription,
    },
};
use tokio::sync::mpsc;

/// What a condition gets on a loaded machine before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Handlers have a minute: guests have the lowest priority, and the machine may be busy.
const PATIENT: &str = "restart = 'never'\ncalls = true\nrank = true\n\
    [limits]\ncall_ms = 60000\nrank_ms = 1000\nstate_kib = 8\n";

/// Where a test's plugins, and what is made of them, lie.
struct Den(tempfile::TempDir);

impl Den {
    fn new() -> Self {
        let den = Self(tempfile::tempdir().unwrap());
        fs::create_dir(den.path("plugins")).unwrap();
        den
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// One of the guests under a name of its own.
    fn guest(&self, name: &str, guest: &str, manifest: &str) {
        let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests/abi-v1");
        let text = fs::read_to_string(guests.join(format!("{guest}.wat"))).unwrap();
        self.module(name, &text, manifest);
    }

    fn module(&self, name: &str, text: &str, manifest: &str) {
        let plugins = self.path("plugins");
        fs::write(plugins.join(format!("{name}.wat")), text).unwrap();
        fs::write(plugins.join(format!("{name}.plugin.toml")), manifest).unwrap();
    }

    fn start(&self, host: Option<Arc<dyn PluginHost>>) -> Arc<Supervisor> {
        let wasm = WasmConfig::new(self.path("cache"), Compiler::InProcess);
        let config = SupervisorConfig::new(vec![self.path("plugins")], wasm);
        let supervisor = Supervisor::discover(config).unwrap();
        supervisor.provide(Services {
            host,
            state_dir: Some(self.path("state")),
            ..Services::default()
        });
        let contract = Contract {
            config_json: "{\"port\":5555}".to_owned(),
            extra_config_json: "{}".to_owned(),
        };
        supervisor.start(&contract).unwrap();
        Arc::new(supervisor)
    }
}

fn lines(supervisor: &Supervisor, name: &str) -> Vec<String> {
    let lines = supervisor.logs(name, usize::MAX).unwrap();
    lines
        .iter()
        .map(|line| format!("{}: {}", line.level.name(), line.text))
        .collect()
}

async fn until(
    supervisor: &Supervisor,
    name: &str,
    wanted: impl Fn(&PluginStatus, &[String]) -> bool,
) -> PluginStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = supervisor.status(name).unwrap();
        let lines = lines(supervisor, name);
        if wanted(&status, &lines) {
            return status;
        }
        assert!(
            Instant::now() < deadline,
            "still {status:?}, having printed {lines:#?}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn until_told(supervisor: &Supervisor, name: &str, part: &str) {
    let told = |_: &PluginStatus, lines: &[String]| lines.iter().any(|line| line.contains(part));
    until(supervisor, name, told).await;
}

async fn until_state(supervisor: &Supervisor, name: &str, state: PluginState) -> PluginStatus {
    until(supervisor, name, |status, _| status.state == state).await
}

fn times(status: &PluginStatus, handler: Handler, outcome: Outcome) -> u64 {
    let counts = status.counts.handlers.iter();
    counts
        .filter(|it| (it.handler, it.outcome) == (handler, outcome))
        .map(|it| it.count)
        .sum()
}

#[tokio::test]
async fn a_reactor_hears_of_everything_and_keeps_its_state() {
    let den = Den::new();
    den.guest("echo", "echo", PATIENT);
    let supervisor = den.start(None);
    until_told(
        &supervisor,
        "echo",
        "\"kind\":\"timer\",\"seq\":2,\"name\":\"tick\"",
    )
    .await;
    let reply = supervisor
        .call("echo.any.thing", "salt", "zmq", (&b"pay\0load"[..]).into())
        .await;
    assert_eq!(reply.unwrap(), &b"pay\0load"[..]);
    let is_counted =
        |status: &PluginStatus, _: &[String]| times(status, Handler::Call, Outcome::Ok) == 1;
    let status = until(&supervisor, "echo", is_counted).await;
    assert_eq!(times(&status, Handler::Timer, Outcome::Ok), 1);
    let custom = &status.counts.custom;
    assert_eq!((&*custom[0].name, custom[0].value), ("calls", 1.0));
    let state = |status: &PluginStatus| {
        let limits = status.limits.iter();
        limits
            .filter(|it| it.limit == Limit::StateBytes)
            .map(|it| it.used)
            .sum::<u64>()
    };
    assert_eq!(state(&status), 4 + 8);
    supervisor.shutdown(PATIENCE).await;
    let lines = lines(&supervisor, "echo");
    assert_eq!(lines[0], "debug: initialized");
    assert!(
        lines[1].starts_with("info: {\"kind\":\"start\",\"seq\":1,\"plugin\":\"echo\",\"abi\":1"),
        "{lines:?}"
    );
    let call = "info: {\"kind\":\"call\",\"seq\":3,\"method\":\"echo.any.thing\",\"cache_salt\":\"salt\",\"caller\":\"zmq\",\"body_bytes\":8}";
    assert_eq!(lines[3], call);
    let last = "info: {\"kind\":\"shutdown\",\"seq\":4,\"grace_ms\":5000}";
    assert_eq!(lines.last().unwrap(), last);
    let end = supervisor.status("echo").unwrap().last_end;
    assert_eq!(end.as_deref(), Some("exited with code 0"));
    // Another server finds what it kept.
    let next = den.start(None);
    let kept = until(&next, "echo", |status, _| state(status) > 0).await;
    assert_eq!(state(&kept), 4 + 8);
    assert_eq!(next.purge_state("echo").unwrap(), 1);
}

#[tokio::test]
async fn a_command_waits_for_messages() {
    let den = Den::new();
    den.guest("waits", "waits", PATIENT);
    let supervisor = den.start(None);
    until_told(&supervisor, "waits", "nothing yet").await;
    let reply = supervisor.call("waits.x", "", "http", "".into()).await;
    let reply = String::from_utf8(reply.unwrap().to_vec()).unwrap();
    assert!(
        reply.starts_with("{\"kind\":\"call\",\"seq\":1,\"method\":\"waits.x\""),
        "{reply}"
    );
    supervisor.shutdown(PATIENCE).await;
    let status = supervisor.status("waits").unwrap();
    assert_eq!(status.last_end.as_deref(), Some("exited with code 0"));
    assert!(lines(&supervisor, "waits")[2].contains("\"kind\":\"shutdown\""));
}

/// A server with two keys, that notes what it is asked.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    events: Mutex<Option<mpsc::Receiver<EventBatch>>>,
    ended: Mutex<Vec<PluginRun>>,
    /// Prefetches that never end and were given up.
    given_up: Arc<AtomicUsize>,
}

struct GivenUp(Arc<AtomicUsize>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Fake {
    /// Waits for so many loads to be dropped.
    async fn until_given_up(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.given_up.load(Ordering::Relaxed) < count {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

struct FakeEvents(mpsc::Receiver<EventBatch>);

impl EventSource for FakeEvents {
    fn backlog(&self) -> Backlog {
        Backlog::new(|| 4)
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        Box::pin(self.0.recv())
    }
}

impl PluginHost for Fake {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        Some("blue".into())
    }

    fn stats(&self, run: &PluginRun) -> Result<CacheStats, Refusal> {
        self.asked.lock().push(format!("stats {}", run.plugin));
        Ok(CacheStats {
            capacity_bytes: 4096,
            ..CacheStats::default()
        })
    }

    fn keys(&self, _run: &PluginRun, query: &KeysQuery) -> Result<KeysPage, Refusal> {
        self.asked.lock().push(format!("keys {:?}", query.limit));
        Ok(KeysPage {
            keys: vec![KeyFacts {
                key: "m@1@0@ff".to_owned(),
                bytes: 7,
                idle_ms: Some(3),
                pinned: false,
            }],
            next: None,
        })
    }

    fn request(&self, _run: &PluginRun, request: &CacheRequest) -> Result<CacheWork, Refusal> {
        if request.op == CacheOperation::Prefetch {
            let loading = GivenUp(Arc::clone(&self.given_up));
            return Ok(CacheWork::Pending(Box::pin(async move {
                let _loading = loading;
                std::future::pending().await
            })));
        }
        self.asked.lock().push(format!(
            "{:?} {:?} {:?}",
            request.op, request.keys, request.ttl_ms
        ));
        Ok(CacheWork::Done(CacheChange {
            done: 1,
            ..CacheChange::default()
        }))
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        subscription: &Subscription,
        most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        self.asked.lock().push(format!("events {most_behind}"));
        let events = self.events.lock().take();
        let events = events.ok_or_else(|| Refusal::new(Code::Unavailable, "taken"))?;
        Ok((subscription.cursor.unwrap(), Box::new(FakeEvents(events))))
    }

    fn ended(&self, run: &PluginRun) {
        self.ended.lock().push(run.clone());
    }
}

#[tokio::test]
async fn what_is_granted_is_answered_and_what_is_not_says_so() {
    let den = Den::new();
    let manifest = "restart = 'never'\ncache = ['stats', 'keys', 'pin', 'events']\n[limits]\nqueued_events = 9";
    den.guest("asks", "asks", manifest);
    den.guest("beggar", "asks", "restart = 'never'");
    let (send, receive) = mpsc::channel(4);
    let host = Arc::new(Fake {
        events: Mutex::new(Some(receive)),
        ..Fake::default()
    });
    let supervisor = den.start(Some(Arc::clone(&host) as _));
    until(&supervisor, "asks", |_, lines| lines.len() == 9).await;
    let told = lines(&supervisor, "asks");
    let expected = [
        "info: {\"port\":5555}",
        "info: {\"capacity_bytes\":4096,",
        "info: {\"keys\":[{\"key\":\"m@1@0@ff\",\"bytes\":7,\"idle_ms\":3,\"pinned\":false}],\"next\":null}",
        "warn: limit is 0: give 1 to 1000",
        "info: {\"done\":1,\"missing\":0,\"denied\":0}",
        "warn: it is not granted: add cache = [\"evict\"]",
        "warn: it keeps no state: add state_kib",
        "warn: h:80 is not granted: add [[http]] host = \"h\", port = 80",
        "info: {\"cursor\":7}",
    ];
    for (line, start) in told.iter().zip(expected) {
        assert!(line.starts_with(start), "{line} is not {start}");
    }
    let batch = |cursor, lost| EventBatch {
        cursor,
        lost,
        events: Box::new(|| {
            vec![CacheEvent::Evicted {
                key: "k".to_owned(),
                salt: String::new(),
                model: "m".to_owned(),
                bytes: 5,
                why: "pressure".to_owned(),
            }]
        }),
    };
    send.send(batch(8, 0)).await.unwrap();
    send.send(batch(12, 3)).await.unwrap();
    let event = "\"events\":[{\"type\":\"evicted\",\"key\":\"k\",\"salt\":\"\",\"model\":\"m\",\"bytes\":5,\"why\":\"pressure\"}]}";
    let second = format!("{{\"kind\":\"events\",\"seq\":2,\"cursor\":12,\"lost\":3,{event}");
    until_told(&supervisor, "asks", &second).await;
    let status = supervisor.status("asks").unwrap();
    assert_eq!(status.counts.events_lost, 3);
    let queued = status
        .limits
        .iter()
        .find(|it| it.limit == Limit::QueuedEvents);
    assert_eq!(queued.map(|it| (it.used, it.hits)), Some((4, 3)));
    let refused = [(Code::Denied, 3), (Code::Invalid, 1)];
    assert_eq!(status.counts.refused, refused);
    assert_eq!(
        *host.asked.lock(),
        [
            "stats asks",
            "keys Some(2)",
            "Pin [\"k\"] Some(5)",
            "events 9"
        ]
        .map(str::to_owned)
        .to_vec()
    );
    // Without any grant the host is not even asked.
    until(&supervisor, "beggar", |_, lines| lines.len() == 9).await;
    let status = supervisor.status("beggar").unwrap();
    assert_eq!(status.counts.refused, [(Code::Denied, 8)]);
    supervisor.shutdown(PATIENCE).await;
    let deadline = Instant::now() + PATIENCE;
    while host.ended.lock().len() < 2 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Three plugins wait for loads that never end, one more than calls of the cache are worked on at
/// once, and others are answered meanwhile; the loads end with the time of a call, or the plugin.
#[tokio::test]
async fn a_load_that_hangs_keeps_nobody_waiting_and_ends_with_its_plugin() {
    let den = Den::new();
    let manifest = |seconds: u32| {
        format!(
            "restart = 'never'\ncalls = true\ncache = ['stats', 'prefetch']\n\
             [limits]\ncall_ms = 60000\nhost_call_seconds = {seconds}"
        )
    };
    for (name, seconds) in [("one", 60), ("two", 60), ("three", 60), ("late", 1)] {
        den.guest(name, "relays", &manifest(seconds));
    }
    den.guest("asks", "relays", &manifest(60));
    let host = Arc::new(Fake::default());
    let supervisor = den.start(Some(Arc::clone(&host) as _));
    for name in ["one", "two", "three", "late", "asks"] {
        until_state(&supervisor, name, PluginState::Running).await;
    }
    let load = "r{\"op\":\"prefetch\",\"keys\":[\"k\"]}";
    let mut loads = tokio::task::JoinSet::new();
    for name in ["one", "two", "three"] {
        let supervisor = Arc::clone(&supervisor);
        let method = format!("{name}.x");
        loads.spawn(async move { supervisor.call(&method, "", "http", load.into()).await });
    }
    let late = supervisor.call("late.x", "", "http", load.into()).await;
    let late = String::from_utf8(late.unwrap().to_vec()).unwrap();
    assert!(
        late.starts_with("-it took longer than host_call_seconds, 1 s"),
        "{late}"
    );
    // The plugin may have its answer a moment before the load is dropped.
    host.until_given_up(1).await;
    let stats = supervisor.call("asks.x", "", "http", "s".into()).await;
    assert!(stats.unwrap().starts_with(b"+{\"capacity_bytes\":4096"));
    assert_eq!(host.given_up.load(Ordering::Relaxed), 1);
    supervisor.shutdown(Duration::ZERO).await;
    loads.join_all().await;
    host.until_given_up(4).await;
}

#[tokio::test]
async fn a_handler_that_loops_is_ended_and_its_plugin_has_failed() {
    let den = Den::new();
    den.guest(
        "loops",
        "timer_loops",
        "restart = 'never'\n[limits]\ncall_ms = 50",
    );
    let supervisor = den.start(None);
    let status = until_state(&supervisor, "loops", PluginState::Failed).await;
    let end = status.last_end.clone().unwrap();
    assert!(
        end.contains("stockade_timer was not over after its call_ms of 50 ms"),
        "{end}"
    );
    assert_eq!(times(&status, Handler::Timer, Outcome::Timeout), 1);
    let limit = status.limits.iter().find(|it| it.limit == Limit::CallTime);
    assert_eq!(limit.map(|it| (it.declared, it.hits)), Some((50, 1)));
}

#[tokio::test]
async fn what_the_contract_does_not_have_is_refused_by_name() {
    let den = Den::new();
    let refusals = [
        (
            "wants_v2",
            "imports stockade:plugin/v2, which this server does not have; it has stockade:plugin/v1",
        ),
        (
            "wants_unknown_function",
            "imports stockade:plugin/v1.read_minds, which that version does not have",
        ),
        (
            "wrong_handler_type",
            "exports stockade_timer with another type than (i32) -> i32",
        ),
    ];
    for (guest, _) in refusals {
        den.guest(guest, guest, "");
    }
    let supervisor = den.start(None);
    for (guest, reason) in refusals {
        let status = until_state(&supervisor, guest, PluginState::Refused).await;
        let end = status.last_end.unwrap();
        assert!(end.contains(reason), "{end}");
    }
}

/// Each function is given ranges that do not lie in the memory, and the guest lives.
#[tokio::test]
async fn no_pointer_reaches_beyond_the_memory() {
    // Pointer and length, in a memory of one page.
    let ranges: [(i64, i64); 8] = [
        (65_536, 1),
        (65_535, 2),
        (0, 65_537),
        (-1, 1),
        (-8, 16),
        (1, -1),
        (0x7fff_ffff, 0x7fff_ffff),
        (-2_147_483_648, -2_147_483_648),
    ];
    // Parameters of each function: `p` a pointer and its length, `i` a number, `f` a float.
    let functions = [
        ("log", "ip"),
        ("reply", "p"),
        ("timer_set", "pii"),
        ("timer_cancel", "p"),
        ("state_get", "p"),
        ("state_set", "pp"),
        ("state_delete", "p"),
        ("state_keys", "p"),
        ("metric_add", "pf"),
        ("metric_set", "pf"),
        ("cache_keys", "p"),
        ("cache_request", "p"),
        ("events_subscribe", "p"),
        ("http_request", "pp"),
    ];
    let mut imports = String::new();
    let mut calls = String::new();
    for (name, parameters) in functions {
        let types: String = parameters
            .chars()
            .map(|it| match it {
                'p' => " i32 i32",
                'f' => " f64",
                _ => " i32",
            })
            .collect();
        imports.push_str(&format!(
            "(import \"stockade:plugin/v1\" \"{name}\" (func ${name} (param{types}) (result i32)))"
        ));
        for (pointer, length) in ranges {
            let arguments: String = parameters
                .chars()
                .map(|it| match it {
                    'p' => format!("(i32.const {pointer}) (i32.const {length})"),
                    'f' => "(f64.const 1)".to_owned(),
                    _ => "(i32.const 0)".to_owned(),
                })
                .collect();
            // Anything but a refusal is a trap, which the test sees.
            calls.push_str(&format!(
                "(if (i32.ge_s (call ${name} {arguments}) (i32.const 0)) (then unreachable))"
            ));
        }
    }
    // Those that write into the guest refuse what does not lie in it, too.
    imports.push_str(
        "(import \"stockade:plugin/v1\" \"config\" (func $config (result i32)))\
         (import \"stockade:plugin/v1\" \"answer_read\" (func $answer_read (param i32 i32) (result i32)))\
         (import \"stockade:plugin/v1\" \"message_read\" (func $message_read (param i32 i32) (result i32)))\
         (import \"stockade:plugin/v1\" \"message_body_read\" (func $body_read (param i32 i32) (result i32)))",
    );
    for pointer in [65_530_i64, 65_536, -1, -2_147_483_648] {
        calls.push_str(&format!(
            "(drop (call $config))\
             (if (i32.ne (call $answer_read (i32.const {pointer}) (i32.const -1)) (i32.const -2)) (then unreachable))\
             (if (i32.ge_s (call $message_read (i32.const {pointer}) (i32.const -1)) (i32.const 0)) (then unreachable))\
             (if (i32.ge_s (call $body_read (i32.const {pointer}) (i32.const -1)) (i32.const 0)) (then unreachable))"
        ));
    }
    let manifest = "restart = 'never'\ncache = ['stats', 'keys', 'events', 'pin', 'evict', 'prefetch']\n[limits]\nstate_kib = 1";
    let den = Den::new();
    let module =
        |memory: &str| format!("(module {imports} {memory} (func (export \"_start\") {calls}))");
    den.module(
        "one_page",
        &module("(memory (export \"memory\") 1)"),
        manifest,
    );
    den.module("no_memory", &module(""), manifest);
    let supervisor = den.start(Some(Arc::new(Fake::default())));
    for name in ["one_page", "no_memory"] {
        let status = until(&supervisor, name, |status, _| status.last_end.is_some()).await;
        assert_eq!(
            status.last_end.as_deref(),
            Some("exited with code 0"),
            "{name}"
        );
        let calls = (functions.len() * ranges.len() + 4 * 4) as u64;
        assert_eq!(status.counts.host_calls, calls, "{name}");
    }
}

#[tokio::test]
async fn every_call_that_fails_says_why() {
    let den = Den::new();
    let quick = PATIENT.replace("call_ms = 60000", "call_ms = 200");
    den.guest("bad", "bad_calls", PATIENT);
    den.guest("late", "bad_calls", &quick);
    den.guest("deaf", "rank_traps", PATIENT);
    den.guest("closed", "echo", "");
    let supervisor = den.start(None);
    for name in ["bad", "late", "deaf", "closed"] {
        until_state(&supervisor, name, PluginState::Running).await;
    }
    let call = |method: &'static str, payload: Vec<u8>| {
        let supervisor = Arc::clone(&supervisor);
        async move {
            let failed = supervisor.call(method, "", "zmq", payload.into()).await;
            failed.unwrap_err()
        }
    };
    let failed = |reason: &str| CallFailure::Failed(reason.to_owned());
    assert_eq!(
        call("bad.x", vec![0]).await,
        failed("the plugin returned without a reply")
    );
    assert_eq!(
        call("bad.x", vec![1]).await,
        failed("stockade_call returned 7")
    );
    let twice = supervisor.call("bad.x", "", "zmq", vec![3].into()).await;
    assert_eq!(twice.unwrap(), "ok");
    assert_eq!(
        call("deaf.x", vec![]).await,
        failed("plugin `deaf` exports no stockade_call")
    );
    assert_eq!(
        call("nobody.x", vec![]).await,
        CallFailure::NoPlugin("nobody.x".to_owned())
    );
    assert!(matches!(
        call("closed.x", vec![]).await,
        CallFailure::NotGranted(_)
    ));
    assert!(matches!(
        call("bad.x", vec![0; host_api::MAX_PAYLOAD_BYTES + 1]).await,
        CallFailure::TooLarge { .. }
    ));
    assert!(matches!(
        call("late.x", vec![2]).await,
        CallFailure::Timeout {
            milliseconds: 200,
            ..
        } | CallFailure::Ended(_)
    ));
    assert!(matches!(
        call("bad.x", vec![4]).await,
        CallFailure::Ended(_)
    ));
    let status = until_state(&supervisor, "bad", PluginState::Failed).await;
    assert_eq!(times(&status, Handler::Call, Outcome::Trap), 1);
    assert_eq!(times(&status, Handler::Call, Outcome::Failed), 2);
    assert!(matches!(
        call("bad.x", vec![3]).await,
        CallFailure::NotRunning {
            state: "failed",
            ..
        }
    ));
}

fn candidates() -> RankRequest {
    RankRequest {
        tenant: "default".into(),
        bytes_wanted: 1,
        count: 2,
        candidates: Box::new(|| {
            (0..2)
                .map(|id| RankCandidate {
                    id,
                    key: "k".to_owned(),
                    salt: String::new(),
                    model: "m".to_owned(),
                    bytes: 1,
                    chunk: None,
                    idle_ms: 0,
                    age_ms: 0,
                    uses: 0,
                    request: None,
                })
                .collect()
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_order_has_its_reason_and_is_counted() {
    let den = Den::new();
    let hasty = "restart = 'never'\nrank = true\n[limits]\ncall_ms = 60000\nrank_ms = 20";
    let cases = [
        ("rank_reverses", PATIENT, Ok(vec![1, 0])),
        ("rank_garbage", PATIENT, Err(RankFailure::Garbage)),
        ("rank_foreign", PATIENT, Err(RankFailure::Foreign)),
        ("rank_twice", PATIENT, Err(RankFailure::Duplicate)),
        ("rank_says_nothing", PATIENT, Err(RankFailure::Missing)),
        ("rank_traps", PATIENT, Err(RankFailure::Trap)),
        ("rank_loops", hasty, Err(RankFailure::Timeout)),
        ("rank_slow", hasty, Err(RankFailure::Timeout)),
        ("timer_loops", PATIENT, Err(RankFailure::Missing)),
    ];
    for (guest, manifest, _) in &cases {
        if *guest != "timer_loops" {
            den.guest(guest, guest, manifest);
        }
    }
    den.guest("timer_loops", "bad_calls", PATIENT);
    let supervisor = den.start(None);
    assert_eq!(supervisor.rankers().len(), cases.len());
    for (guest, _, expected) in &cases {
        until_state(&supervisor, guest, PluginState::Running).await;
        let (asked, name) = (Arc::clone(&supervisor), *guest);
        let order = tokio::task::spawn_blocking(move || asked.rank(name, candidates()))
            .await
            .unwrap();
        assert_eq!(&order, expected, "{guest}");
        let counts = supervisor.status(guest).unwrap().counts;
        match expected {
            Ok(_) => assert_eq!((counts.ranked, counts.rank_failures), (1, Vec::new())),
            Err(failure) => {
                assert_eq!(
                    (counts.ranked, counts.rank_failures),
                    (0, vec![(*failure, 1)])
                );
            }
        }
    }
    // One that has not finished is not asked again.
    let again = Arc::clone(&supervisor);
    let order = tokio::task::spawn_blocking(move || again.rank("rank_loops", candidates()));
    assert_eq!(order.await.unwrap(), Err(RankFailure::Busy));
    // One that was slow is asked again once it is done.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let again = Arc::clone(&supervisor);
        let order = tokio::task::spawn_blocking(move || again.rank("rank_slow", candidates()));
        match order.await.unwrap() {
            Err(RankFailure::Busy) => {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            order => {
                assert_eq!(order, Err(RankFailure::Timeout));
                break;
            }
        }
    }
}
