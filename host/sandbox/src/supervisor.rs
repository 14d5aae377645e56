//! Runs plugins of all kinds: starts them, restarts what failed, stops them in time.
//!
//! One task per plugin follows one state machine, whatever the plugin is:
//! `prepared -> running -> exited | failed -> backoff -> running ... -> quarantined | stopped`.
//! A plugin that cannot be run at all (a module that is refused) is `refused`.

mod watch;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    host_api::{
        self, CallFailure, Counter, Link, PluginCounts, PluginRun, RankFailure, RankRequest,
        Services, Tally, Terms,
    },
    limit::{Limit, LimitHits, LimitUse},
    loader::{self, Found, LoadError, PluginKind, Refusal},
    log_stream::{LogCounts, LogLevel, LogLine, LogStream, OutputStream},
    manifest::{Manifest, Restart},
    native_script::{
        Granted, NativeConfig, NativePolicy, NativeScript, ProcessEnd, ScriptOutput, passed_on,
    },
    outbound::OutboundLimits,
    policy::{Origin, Policy},
    provenance::Sha256Digest,
    python::{self, PythonError, PythonScript},
    wasm::{
        self, CompileLimits, GuestOutput, GuestStream, Launch, Made, WasmConfig, WasmEnd,
        WasmError, WasmLimits, WasmModule, WasmRun, WasmRuntime, WasmUsage,
    },
};

/// Default delay before the first restart; it doubles with each failure in a row.
pub const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// Longest delay before a restart.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// A run of this length makes earlier failures forgotten.
const HEALTHY_UPTIME: Duration = Duration::from_secs(60);
/// Failures in a row after which a plugin is left alone until someone restarts it.
const QUARANTINE_AFTER: u32 = 8;
/// How long a reloaded plugin must have run before it takes the old one's place.
pub const PROBE_TIME: Duration = Duration::from_secs(1);
/// What the end of a plugin may take beyond its grace.
const KILL_LIMIT: Duration = Duration::from_secs(3);
/// What a script's keeper gets, of that, to kill and report; then it is left to itself.
const KEEPER_LIMIT: Duration = Duration::from_secs(1);
/// How many modules are read or compiled at once, so that a directory of compile bombs
/// cannot take every thread the server has for blocking work.
const PREPARING_AT_ONCE: usize = 4;
/// How often lines that were dropped are reported while no other line comes.
const DROP_REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The environment contract of LMCache, the same for all kinds
/// (`v1/plugin/runtime_plugin_launcher.py` and `v1/multiprocess/mp_runtime_plugin_launcher.py`).
#[derive(Debug, Clone, Default)]
pub struct Contract {
    /// `LMCACHE_RUNTIME_PLUGIN_CONFIG`: the aggregated configuration as JSON.
    pub config_json: String,
    /// `LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG`: the operator's extra configuration as JSON.
    pub extra_config_json: String,
}

impl Contract {
    /// The variables, with their legacy twins.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, String)> {
        let values = [
            ("ROLE", ""),
            ("CONFIG", &self.config_json),
            ("WORKER_COUNT", "1"),
            ("WORKER_ID", "0"),
        ];
        let mut variables = vec![(
            "LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG".to_owned(),
            self.extra_config_json.clone(),
        )];
        for (name, value) in values {
            variables.push((format!("LMCACHE_RUNTIME_PLUGIN_{name}"), value.to_owned()));
            variables.push((format!("LMCACHE_PLUGIN_{name}"), value.to_owned()));
        }
        variables
    }
}

/// Where a plugin is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PluginState {
    /// Found, not checked yet.
    Discovered,
    /// Compiled and checked, about to run.
    Prepared,
    /// Running.
    Running,
    /// Ended by itself with exit code 0, or as its restart policy wants.
    Exited,
    /// Ended badly and not to be restarted.
    Failed,
    /// Ended badly, waiting for its restart.
    Backoff,
    /// Ended badly too often; waiting for somebody to restart it.
    Quarantined,
    /// Cannot be run at all.
    Refused,
    /// Stopped by hand or by the end of the server.
    Stopped,
}

impl PluginState {
    /// The name in the API and in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Discovered => "discovered",
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::Backoff => "backoff",
            Self::Quarantined => "quarantined",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
        }
    }
}

/// What is known of a plugin.
#[derive(Debug, Clone)]
pub struct PluginStatus {
    /// Its name, unique in the server.
    pub name: Arc<str>,
    /// What it is.
    pub kind: PluginKind,
    /// Its file.
    pub path: PathBuf,
    /// Where it is in its life.
    pub state: PluginState,
    /// Of the bytes that run, or are refused; `None` where they could not be read.
    pub sha256: Option<Sha256Digest>,
    /// How much is known of where those bytes come from; `None` when they are refused for it.
    pub origin: Option<Origin>,
    /// Restarts since the server's start.
    pub restarts: u64,
    /// How the last run ended, or why it is refused.
    pub last_end: Option<String>,
    /// How the last reload ended.
    pub last_reload: Option<String>,
    /// Milliseconds since the Unix epoch at which the current run began.
    pub running_since_unix_ms: Option<u64>,
    /// Linear memory of a sandboxed plugin in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU time of a sandboxed plugin's current run.
    pub cpu_time: Option<Duration>,
    /// What it is held to, with what it uses and how often that held.
    pub limits: Vec<LimitUse>,
    /// What holds it: the sandbox, or what holds a script's processes together.
    pub containment: Option<&'static str>,
    /// What the kernel holds a script's current or latest run to.
    pub granted: Option<Granted>,
    /// What it printed.
    pub logs: LogCounts,
    /// What it may do with the cache.
    pub cache: Vec<host_api::CacheGrant>,
    /// Whether it serves calls.
    pub calls: bool,
    /// Whether it ranks candidates for eviction.
    pub rank: bool,
    /// What it asked of the server, and the server of it.
    pub counts: PluginCounts,
}

/// Settings of the supervisor.
#[derive(Debug)]
pub struct SupervisorConfig {
    /// Plugin files and directories.
    pub locations: Vec<PathBuf>,
    /// What the server grants of what manifests ask for.
    pub policy: Policy,
    /// Whether files that come, change and go while the server runs are noticed.
    pub watch: bool,
    /// How modules are compiled and where artefacts are kept.
    pub wasm: WasmConfig,
    /// How scripts run; each plugin gets its own grants on top.
    pub native: NativeConfig,
    /// The server's environment, of which plugins see what their manifests name.
    pub server_environment: Vec<(OsString, OsString)>,
    /// A CPython that is a WASI command; with it Python scripts run in the sandbox.
    pub python: Option<PathBuf>,
    /// Delay before the first restart; it doubles with each failure in a row.
    pub first_backoff: Duration,
}

impl SupervisorConfig {
    /// Plugins that get what their manifests ask for, nothing of the server's environment, and no
    /// new version while they run.
    #[must_use]
    pub fn new(locations: Vec<PathBuf>, wasm: WasmConfig) -> Self {
        Self {
            locations,
            policy: Policy::default(),
            watch: false,
            wasm,
            native: NativeConfig::new(Vec::new(), &[]),
            server_environment: Vec::new(),
            python: None,
            first_backoff: FIRST_BACKOFF,
        }
    }
}

/// Why plugins cannot be managed as asked.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The locations cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The sandbox cannot be set up.
    #[error(transparent)]
    Wasm(#[from] WasmError),
    /// There is no plugin of this name.
    #[error("plugin `{0}` is not loaded; GET /v1/plugins lists those that are")]
    NotFound(String),
    /// The plugin's task has ended or has too many requests waiting.
    #[error(
        "plugin `{0}` cannot take the request now: the server is stopping, or other requests wait"
    )]
    Busy(String),
    /// A reload came to nothing; what ran before it goes on.
    #[error("plugin `{name}` was not reloaded: {reason}")]
    NotReloaded {
        /// The plugin.
        name: String,
        /// Why.
        reason: String,
    },
}

/// What somebody asks of a plugin.
#[derive(Debug)]
enum Request {
    Start,
    Stop,
    Restart,
    /// Takes the file as it is now, and answers when it runs or why it does not.
    Reload(oneshot::Sender<Result<(), String>>),
}

struct Plugin {
    name: Arc<str>,
    kind: PluginKind,
    path: PathBuf,
    logs: Arc<LogStream>,
    shared: Mutex<Shared>,
    restarts: AtomicU64,
    requests: mpsc::Sender<Request>,
    compile_limits: CompileLimits,
    /// The end of the server, or of this plugin alone when its file is gone.
    over: CancellationToken,
    /// The run that its messages go to.
    current: host_api::Current,
    tally: Arc<Tally>,
}

struct Shared {
    state: PluginState,
    sha256: Option<Sha256Digest>,
    origin: Option<Origin>,
    /// What its manifest asks for, as far as it is granted.
    manifest: Manifest,
    made: Made,
    last_end: Option<String>,
    last_reload: Option<String>,
    running_since: Option<SystemTime>,
    usage: Option<WasmRun>,
    script: Option<Arc<NativeScript>>,
    is_sandboxed: bool,
    kept: Option<Arc<host_api::StateMap>>,
    /// Of runs that are over.
    hits: LimitHits,
}

/// All plugins of a server. Dropping it kills them.
pub struct Supervisor {
    shared: Arc<Plugins>,
}

/// What the supervisor and the watch of its files share.
struct Plugins {
    config: Arc<SupervisorConfig>,
    registry: RwLock<Registry>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    ending: Ending,
    epoch_ticks: OnceLock<Arc<AtomicU64>>,
    services: Mutex<Services>,
    counter: OnceLock<Arc<Counter>>,
}

struct Registry {
    compile_limits: CompileLimits,
    shutdown: CancellationToken,
    plugins: Vec<Arc<Plugin>>,
    /// Those that `start` has yet to give a task.
    waiting: Vec<(Arc<Plugin>, mpsc::Receiver<Request>, Found)>,
}

/// The end of the server, as every plugin's task hears of it.
#[derive(Clone, Default)]
struct Ending {
    shutdown: CancellationToken,
    /// Set before `shutdown`: what plugins get at most, whatever their manifests say.
    grace: Arc<OnceLock<Duration>>,
    kill: CancellationToken,
}

impl Supervisor {
    /// Finds and reads the plugins; runs nothing yet, so that the caller can still refuse to start.
    ///
    /// # Errors
    /// [`SupervisorError::Load`], which names the path and the way out.
    pub fn discover(config: SupervisorConfig) -> Result<Self, SupervisorError> {
        let ending = Ending::default();
        let mut registry = Registry {
            compile_limits: config.wasm.compile_limits,
            shutdown: ending.shutdown.clone(),
            plugins: Vec::new(),
            waiting: Vec::new(),
        };
        for found in loader::find(&config.locations, &config.policy)? {
            registry.add(found);
        }
        Ok(Self {
            shared: Arc::new(Plugins {
                config: Arc::new(config),
                registry: RwLock::new(registry),
                tasks: Mutex::default(),
                ending,
                epoch_ticks: OnceLock::new(),
                services: Mutex::default(),
                counter: OnceLock::new(),
            }),
        })
    }

    /// Says what the server has for its plugins; to be called before [`start`](Self::start).
    pub fn provide(&self, services: Services) {
        *self.shared.services.lock() = services;
    }

    /// Starts every plugin, once; must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SupervisorError::Wasm`] when there are sandboxed plugins and no sandbox can be had.
    pub fn start(&self, contract: &Contract) -> Result<(), SupervisorError> {
        let shared = &self.shared;
        let mut tasks = shared.tasks.lock();
        if !tasks.is_empty() {
            return Ok(());
        }
        let waiting = std::mem::take(&mut shared.registry.write().waiting);
        let services = shared.services.lock().clone();
        let counter = Counter::new(services, &contract.config_json);
        let counter = shared.counter.get_or_init(|| counter);
        let workshop = Arc::new(Workshop {
            counter: Arc::clone(counter),
            config: Arc::clone(&shared.config),
            contract: contract.variables(),
            runtime: Mutex::default(),
            python: Mutex::default(),
            preparing: Semaphore::new(PREPARING_AT_ONCE),
        });
        if waiting
            .iter()
            .any(|(plugin, ..)| plugin.kind == PluginKind::Wasm)
        {
            let runtime = workshop.runtime()?;
            shared.epoch_ticks.get_or_init(|| runtime.ticks());
        }
        for (plugin, inbox, found) in waiting {
            let life = Life::new(plugin, &workshop, inbox, &shared.ending);
            tasks.push(tokio::spawn(life.run(found)));
        }
        let (plugins, shutdown) = (Arc::downgrade(shared), shared.ending.shutdown.clone());
        tasks.push(tokio::spawn(async move {
            let report = async {
                loop {
                    tokio::time::sleep(DROP_REPORT_INTERVAL).await;
                    let Some(plugins) = plugins.upgrade() else {
                        return;
                    };
                    for plugin in &plugins.registry.read().plugins {
                        plugin.logs.report_drops();
                    }
                }
            };
            let _ended = shutdown.run_until_cancelled(report).await;
        }));
        if shared.config.watch {
            let watch = watch::run(Arc::downgrade(shared), workshop);
            let shutdown = shared.ending.shutdown.clone();
            tasks.push(tokio::spawn(async move {
                let _ended = shutdown.run_until_cancelled(watch).await;
            }));
        }
        Ok(())
    }

    /// What is known of each plugin, in the order they were found.
    #[must_use]
    pub fn snapshot(&self) -> Vec<PluginStatus> {
        let plugins = self.shared.registry.read().plugins.clone();
        plugins.iter().map(|plugin| plugin.status()).collect()
    }

    /// What is known of one plugin.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub fn status(&self, name: &str) -> Result<PluginStatus, SupervisorError> {
        self.plugin(name).map(|plugin| plugin.status())
    }

    /// The newest `count` log lines of a plugin, oldest first.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub fn logs(&self, name: &str, count: usize) -> Result<Vec<LogLine>, SupervisorError> {
        self.plugin(name).map(|plugin| plugin.logs.tail(count))
    }

    /// Log lines of a plugin that came after the first `seen`, oldest first and at most `most`
    /// of the newest, and how many there were in all.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`].
    pub fn logs_since(
        &self,
        name: &str,
        seen: u64,
        most: usize,
    ) -> Result<(Vec<LogLine>, u64), SupervisorError> {
        self.plugin(name)
            .map(|plugin| plugin.logs.since(seen, most))
    }

    /// A number that counts up while sandboxed plugins are made to take turns; `None` when
    /// there are none.
    #[must_use]
    pub fn epoch_ticks(&self) -> Option<Arc<AtomicU64>> {
        self.shared.epoch_ticks.get().cloned()
    }

    /// Starts a plugin that is not running; a running one goes on.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`] or [`SupervisorError::Busy`].
    pub fn start_plugin(&self, name: &str) -> Result<(), SupervisorError> {
        self.ask(name, Request::Start)
    }

    /// Stops a plugin until it is started again.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`] or [`SupervisorError::Busy`].
    pub fn stop_plugin(&self, name: &str) -> Result<(), SupervisorError> {
        self.ask(name, Request::Stop)
    }

    /// Stops a plugin if it runs and starts it, quarantined or not.
    ///
    /// # Errors
    /// [`SupervisorError::NotFound`] or [`SupervisorError::Busy`].
    pub fn restart_plugin(&self, name: &str) -> Result<(), SupervisorError> {
        self.ask(name, Request::Restart)
    }

    /// Takes a plugin's files as they are now: the new one is compiled, checked and started
    /// beside the running one, and takes its place when it is still well after
    /// [`PROBE_TIME`]; the old one is told to stop then. When anything of that fails, the old
    /// one goes on. Waits for the outcome, which compiling can make a minute.
    ///
    /// # Errors
    /// [`SupervisorError::NotReloaded`] with the reason, [`SupervisorError::NotFound`] or
    /// [`SupervisorError::Busy`].
    pub async fn reload_plugin(&self, name: &str) -> Result<(), SupervisorError> {
        let (reply, outcome) = oneshot::channel();
        self.ask(name, Request::Reload(reply))?;
        match outcome.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(reason)) => Err(SupervisorError::NotReloaded {
                name: name.to_owned(),
                reason,
            }),
            Err(_) => Err(SupervisorError::Busy(name.to_owned())),
        }
    }

    fn ask(&self, name: &str, request: Request) -> Result<(), SupervisorError> {
        let plugin = self.plugin(name)?;
        plugin
            .requests
            .try_send(request)
            .map_err(|_| SupervisorError::Busy(name.to_owned()))
    }

    fn plugin(&self, name: &str) -> Result<Arc<Plugin>, SupervisorError> {
        let registry = self.shared.registry.read();
        let found = registry.plugins.iter().find(|plugin| &*plugin.name == name);
        found
            .cloned()
            .ok_or_else(|| SupervisorError::NotFound(name.to_owned()))
    }

    /// Ends all plugins: each is told, has its grace, and is killed. Nothing of them is left
    /// when this returns, at most `grace` and three seconds later.
    pub async fn shutdown(&self, grace: Duration) {
        // Set once: a second caller waits for what the first began.
        let ending = &self.shared.ending;
        let _ = ending.grace.set(grace);
        ending.shutdown.cancel();
        let tasks = std::mem::take(&mut *self.shared.tasks.lock());
        let deadline = tokio::time::Instant::now() + grace;
        let mut left = Vec::new();
        for mut task in tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                left.push(task);
            }
        }
        ending.kill.cancel();
        let deadline = tokio::time::Instant::now() + KILL_LIMIT;
        for mut task in left {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::error!("a plugin did not end {KILL_LIMIT:?} after it was killed");
                task.abort();
            }
        }
        if let Some(counter) = self.shared.counter.get().cloned() {
            let flushed = tokio::task::spawn_blocking(move || counter.states.flush());
            // A panic there was reported there.
            let _ = flushed.await;
        }
    }

    /// The plugin that a method belongs to: the one with the longest name that is all that stands
    /// before a dot of it.
    #[must_use]
    pub fn serving(&self, method: &str) -> Option<Arc<str>> {
        let registry = self.shared.registry.read();
        let serves = |plugin: &&Arc<Plugin>| {
            method
                .strip_prefix(&*plugin.name)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        let serving = registry.plugins.iter().filter(serves);
        serving
            .max_by_key(|plugin| plugin.name.len())
            .map(|plugin| Arc::clone(&plugin.name))
    }

    /// Calls a method of the plugin that it belongs to. Waits for the reply, at most for the
    /// plugin's `call_ms`.
    ///
    /// # Errors
    /// [`CallFailure`], whose text is for the caller.
    pub async fn call(
        &self,
        method: &str,
        cache_salt: &str,
        caller: &'static str,
        payload: bytes::Bytes,
    ) -> Result<bytes::Bytes, CallFailure> {
        let nobody = || CallFailure::NoPlugin(method.chars().take(128).collect());
        let name = self.serving(method).ok_or_else(nobody)?;
        let plugin = self.plugin(&name).map_err(|_| nobody())?;
        let (terms, stage) = {
            let shared = plugin.shared.lock();
            (Terms::of(&shared.manifest), shared.state)
        };
        let name = &plugin.name;
        if !terms.calls {
            return Err(CallFailure::NotGranted(Arc::clone(name)));
        }
        if payload.len() > host_api::MAX_PAYLOAD_BYTES {
            return Err(CallFailure::TooLarge {
                bytes: payload.len(),
                limit: host_api::MAX_PAYLOAD_BYTES,
            });
        }
        let link = plugin.current.get().ok_or(CallFailure::NotRunning {
            plugin: Arc::clone(name),
            state: stage.name(),
        })?;
        let (reply, replied) = oneshot::channel();
        let ask = host_api::CallAsk {
            method: method.to_owned(),
            cache_salt: cache_salt.to_owned(),
            caller,
            payload,
            reply,
        };
        link.call(name, ask)?;
        match tokio::time::timeout(terms.call_time, replied).await {
            Ok(Ok(Ok(payload))) => Ok(payload),
            Ok(Ok(Err(reason))) => Err(CallFailure::Failed(reason)),
            Ok(Err(_)) => Err(CallFailure::Ended(Arc::clone(name))),
            Err(_) => Err(CallFailure::Timeout {
                plugin: Arc::clone(name),
                milliseconds: u64::try_from(terms.call_time.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }

    /// Forgets what a plugin keeps, in memory and on the disk, and says how many keys that were.
    /// Blocks.
    ///
    /// # Errors
    /// What the system says when the file cannot be removed; nothing when there are no plugins yet.
    pub fn purge_state(&self, plugin: &str) -> std::io::Result<usize> {
        match self.shared.counter.get() {
            Some(counter) => counter.states.purge(&plugin.into()),
            None => Ok(0),
        }
    }

    /// The plugins that rank candidates for eviction, in the order they were found.
    #[must_use]
    pub fn rankers(&self) -> Vec<Arc<str>> {
        let registry = self.shared.registry.read();
        let ranks = |plugin: &&Arc<Plugin>| plugin.shared.lock().manifest.rank;
        let rankers = registry.plugins.iter().filter(ranks);
        rankers.map(|plugin| Arc::clone(&plugin.name)).collect()
    }

    /// Has a plugin rank candidates for eviction, and waits for that, at most for its `rank_ms`:
    /// to be called where blocking is allowed and no lock is held. The order names candidates
    /// by their place; those left out follow in the order in which they were given.
    ///
    /// # Errors
    /// [`RankFailure`], which is counted for the plugin.
    pub fn rank(&self, plugin: &str, request: RankRequest) -> Result<Vec<u32>, RankFailure> {
        let found = self.plugin(plugin).map_err(|_| RankFailure::NotRunning)?;
        let deadline = Terms::of(&found.shared.lock().manifest).rank_time;
        self.rank_within(plugin, request, deadline)
    }

    /// As [`rank`](Self::rank), waiting for so long instead of the plugin's `rank_ms`.
    ///
    /// # Errors
    /// [`RankFailure`], which is counted for the plugin.
    pub fn rank_within(
        &self,
        plugin: &str,
        request: RankRequest,
        deadline: Duration,
    ) -> Result<Vec<u32>, RankFailure> {
        let plugin = self.plugin(plugin).map_err(|_| RankFailure::NotRunning)?;
        let order = plugin.rank(request, deadline);
        plugin.tally.ranked(order.as_ref().err().copied());
        order
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.shared.ending.kill.cancel();
        for task in self.shared.tasks.lock().drain(..) {
            task.abort();
        }
    }
}

impl Registry {
    /// A plugin that was found; `start` gives it its task.
    fn add(&mut self, found: Found) -> Arc<Plugin> {
        let (requests, inbox) = mpsc::channel(8);
        let kind = found.kind;
        let plugin = Arc::new(Plugin {
            name: Arc::clone(&found.name),
            kind: found.kind,
            path: found.path.clone(),
            logs: Arc::new(LogStream::new(
                Arc::clone(&found.name),
                found.manifest.log_limits(),
            )),
            shared: Mutex::new(Shared {
                state: PluginState::Discovered,
                sha256: found.sha256,
                origin: found.origin.as_ref().ok().copied(),
                manifest: found.manifest.clone(),
                made: made_of(&found),
                last_end: None,
                last_reload: None,
                running_since: None,
                usage: None,
                script: None,
                kept: None,
                is_sandboxed: kind == PluginKind::Wasm,
                hits: LimitHits::default(),
            }),
            restarts: AtomicU64::new(0),
            requests,
            compile_limits: self.compile_limits,
            over: self.shutdown.child_token(),
            current: host_api::Current::default(),
            tally: Arc::default(),
        });
        self.plugins.push(Arc::clone(&plugin));
        self.waiting.push((Arc::clone(&plugin), inbox, found));
        plugin
    }
}

impl Plugin {
    fn rank(&self, request: RankRequest, deadline: Duration) -> Result<Vec<u32>, RankFailure> {
        let link = self.current.get().ok_or(RankFailure::NotRunning)?;
        let begun = Instant::now();
        let order = link.order(request, deadline);
        self.tally.rank_took(begun.elapsed());
        order
    }

    fn status(&self) -> PluginStatus {
        let shared = self.shared.lock();
        let usage = shared.usage.as_ref().map(WasmRun::usage);
        PluginStatus {
            name: Arc::clone(&self.name),
            kind: self.kind,
            path: self.path.clone(),
            state: shared.state,
            sha256: shared.sha256,
            origin: shared.origin,
            restarts: self.restarts.load(Ordering::Relaxed),
            last_end: shared.last_end.clone(),
            last_reload: shared.last_reload.clone(),
            running_since_unix_ms: shared.running_since.map(|since| {
                let since_epoch = since.duration_since(UNIX_EPOCH).unwrap_or_default();
                u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
            }),
            memory_bytes: usage.as_ref().map(|usage| usage.memory_bytes),
            cpu_time: usage.as_ref().map(|usage| usage.cpu_time),
            limits: self.limits(&shared, usage.unwrap_or_default()),
            containment: match &shared.script {
                Some(script) => script.containment().map(|it| it.name()),
                None => shared.is_sandboxed.then_some("sandbox"),
            },
            granted: shared.script.as_ref().and_then(|script| script.granted()),
            logs: self.logs.counts(),
            cache: shared.manifest.cache.iter().copied().collect(),
            calls: shared.manifest.calls,
            rank: shared.manifest.rank,
            counts: self.tally.counts(),
        }
    }

    /// The limits of a sandboxed plugin, then those that all kinds have.
    fn limits(&self, shared: &Shared, mut usage: WasmUsage) -> Vec<LimitUse> {
        let mut limits = Vec::new();
        if shared.is_sandboxed {
            usage.hits.add_all(&shared.hits);
            limits = usage.limits(&wasm_limits(&shared.manifest));
            limits.extend(self.contract_limits(shared, usage.longest_call, &usage.hits));
            limits.extend(wasm::module_limits(
                shared.made,
                self.compile_limits,
                &shared.hits,
            ));
        }
        limits.extend(self.logs.limits());
        limits
    }

    /// The limits of what it asks of the server.
    fn contract_limits(
        &self,
        shared: &Shared,
        longest_call: Duration,
        hits: &LimitHits,
    ) -> Vec<LimitUse> {
        let terms = Terms::of(&shared.manifest);
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let counts = self.tally.counts();
        let late = counts
            .rank_failures
            .iter()
            .find(|(failure, _)| *failure == RankFailure::Timeout)
            .map_or(0, |(_, count)| *count);
        let rows = [
            (
                Limit::CallTime,
                milliseconds(terms.call_time),
                milliseconds(longest_call),
                None,
            ),
            (
                Limit::RankTime,
                milliseconds(terms.rank_time),
                milliseconds(self.tally.longest_rank()),
                Some(late),
            ),
            (
                Limit::StateBytes,
                terms.state_bytes,
                shared.kept.as_ref().map_or(0, |kept| kept.bytes()),
                None,
            ),
            (
                Limit::QueuedEvents,
                terms.queued_events,
                self.tally.waiting_events(),
                Some(counts.events_lost),
            ),
            (
                Limit::Metrics,
                terms.metrics as u64,
                counts.custom.len() as u64,
                None,
            ),
        ];
        rows.into_iter()
            .map(|(limit, declared, used, counted)| LimitUse {
                limit,
                declared,
                used,
                hits: counted.unwrap_or_else(|| hits.of(limit)),
            })
            .collect()
    }

    fn enter(&self, state: PluginState) {
        let mut shared = self.shared.lock();
        shared.state = state;
        shared.running_since = (state == PluginState::Running).then(SystemTime::now);
        if state != PluginState::Running {
            shared.usage = None;
            self.current.set(None);
        }
    }

    /// Makes `generation` the one that counts.
    fn adopt(&self, generation: &Generation, usage: Option<WasmRun>) {
        self.logs.set_limits(generation.manifest.log_limits());
        let mut shared = self.shared.lock();
        shared.sha256 = generation.sha256;
        shared.origin = Some(generation.origin);
        shared.manifest = generation.manifest.clone();
        shared.made = generation.made;
        shared.kept = Some(Arc::clone(&generation.kept));
        shared.script = match &generation.runner {
            Runner::Script(script) => Some(Arc::clone(script)),
            Runner::Wasm { .. } => None,
        };
        shared.is_sandboxed = matches!(generation.runner, Runner::Wasm { .. });
        shared.usage = usage;
    }
}

/// What plugins are made ready with.
struct Workshop {
    counter: Arc<Counter>,
    config: Arc<SupervisorConfig>,
    contract: Vec<(String, String)>,
    /// Started with the first sandboxed plugin.
    runtime: Mutex<Option<Arc<WasmRuntime>>>,
    /// Compiled with the first Python script that runs in the sandbox.
    python: Mutex<Option<WasmModule>>,
    preparing: Semaphore,
}

/// What can be told of a file before it is compiled.
fn made_of(found: &Found) -> Made {
    Made {
        bytes: found.bytes.len() as u64,
        ..Made::default()
    }
}

/// A plugin's files at one time, ready to run.
struct Generation {
    runner: Runner,
    manifest: Manifest,
    variables: Vec<(String, String)>,
    sha256: Option<Sha256Digest>,
    origin: Origin,
    made: Made,
    kept: Arc<host_api::StateMap>,
    counter: Arc<Counter>,
}

enum Runner {
    Wasm {
        runtime: Arc<WasmRuntime>,
        module: WasmModule,
        /// What the module, which is Python then, runs.
        script: Option<PythonScript>,
    },
    Script(Arc<NativeScript>),
}

impl From<WasmError> for Refusal {
    fn from(error: WasmError) -> Self {
        Self {
            reason: error.to_string(),
            limit: error.limit(),
        }
    }
}

impl Workshop {
    fn runtime(&self) -> Result<Arc<WasmRuntime>, WasmError> {
        let mut runtime = self.runtime.lock();
        if let Some(runtime) = &*runtime {
            return Ok(Arc::clone(runtime));
        }
        let started = Arc::new(WasmRuntime::start(self.config.wasm.clone())?);
        *runtime = Some(Arc::clone(&started));
        Ok(started)
    }

    /// Reads a plugin's files again, off the async threads.
    async fn read(self: &Arc<Self>, plugin: &Plugin) -> Result<Found, String> {
        let (workshop, name) = (Arc::clone(self), Arc::clone(&plugin.name));
        let (path, kind) = (plugin.path.clone(), plugin.kind);
        let reading = tokio::task::spawn_blocking(move || {
            loader::read(name, &path, kind, &workshop.config.policy)
        });
        reading.await.map_err(|error| error.to_string())
    }

    /// Compiles and checks, off the async threads. What runs are the bytes of `found`, which
    /// were checked, and not whatever its file holds by now.
    async fn prepare(self: &Arc<Self>, found: Found) -> Result<Generation, Refusal> {
        let origin = found.origin.clone()?;
        let variables = self.variables_of(&found.manifest);
        let turn = self.preparing.acquire().await;
        let _turn = turn.map_err(|error| error.to_string())?;
        let (workshop, sha256, manifest) = (Arc::clone(self), found.sha256, found.manifest.clone());
        let uncompiled = made_of(&found);
        let making = tokio::task::spawn_blocking(move || {
            let runner = workshop.runner(&found)?;
            let keeps_state = found.manifest.limits.state_kib > 0;
            let kept = match keeps_state {
                true => workshop.counter.states.open(&found.name),
                false => Arc::default(),
            };
            Ok::<_, Refusal>((runner, kept))
        });
        let (runner, kept) = making.await.map_err(|error| error.to_string())??;
        let made = match &runner {
            Runner::Wasm { module, .. } => module.made(),
            Runner::Script(_) => uncompiled,
        };
        Ok(Generation {
            runner,
            manifest,
            variables,
            sha256,
            origin,
            made,
            kept,
            counter: Arc::clone(&self.counter),
        })
    }

    fn runner(&self, found: &Found) -> Result<Runner, Refusal> {
        if found.kind == PluginKind::Wasm {
            let runtime = self.runtime()?;
            let module = runtime.prepare(&found.name, &found.bytes)?;
            return Ok(Runner::Wasm {
                runtime,
                module,
                script: None,
            });
        }
        // Somebody vouches for these bytes, so it is they that run, from a copy that only our
        // user can write. Other scripts run where they lie, beside what they may refer to.
        let path = match found.origin {
            Ok(origin) if origin.is_checked() => sealed_copy(&self.config.wasm.cache_dir, found)
                .map_err(|error| {
                    format!(
                        "a copy of it cannot be put into {}: {error}",
                        self.config.wasm.cache_dir.display()
                    )
                })?,
            _ => found.path.clone(),
        };
        let is_python = found.path.extension().is_some_and(|it| it == "py");
        if let Some(command) = &self.config.python
            && is_python
            && found.manifest.sandbox
        {
            return self
                .python(command, &path)
                .map_err(|error| error.to_string().into());
        }
        if self.config.native.policy == NativePolicy::Deny {
            return Err(Refusal::from(
                "this server runs no scripts; start it with --native-plugins=confined, or make the plugin a sandboxed one"
                    .to_owned(),
            ));
        }
        let mut native = self.config.native.clone();
        let environment = self.config.server_environment.iter().cloned();
        native.passed_on = passed_on(environment, &found.manifest.env);
        let script = NativeScript::new(&*found.name, path, native, found.manifest.clone());
        Ok(Runner::Script(Arc::new(script)))
    }

    /// A Python script in the sandbox.
    fn python(&self, command: &Path, path: &Path) -> Result<Runner, PythonError> {
        let home = self.config.server_environment.iter();
        let home = home
            .filter(|(name, _)| name == "HOME")
            .map(|(_, home)| home.as_os_str())
            .next();
        let script = PythonScript::new(path, home)?;
        let runtime = self.runtime()?;
        let mut prepared = self.python.lock();
        let module = match &*prepared {
            Some(module) => module.clone(),
            None => prepared.insert(python::prepare(&runtime, command)?).clone(),
        };
        Ok(Runner::Wasm {
            runtime,
            module,
            script: Some(script),
        })
    }

    /// The contract and what the manifest names of the server's environment.
    fn variables_of(&self, manifest: &Manifest) -> Vec<(String, String)> {
        let granted = self
            .config
            .server_environment
            .iter()
            .filter_map(|(name, value)| {
                let (name, value) = (name.to_str()?, value.to_str()?);
                manifest
                    .env
                    .iter()
                    .any(|granted| granted == name)
                    .then(|| (name.to_owned(), value.to_owned()))
            });
        granted.chain(self.contract.iter().cloned()).collect()
    }
}

/// Puts a script's bytes into a directory of ours, under their digest, and returns the path.
fn sealed_copy(cache_dir: &Path, found: &Found) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
    let file_name = found.path.file_name().unwrap_or_default();
    let sha256 = Sha256Digest::of(&found.bytes);
    let directory = cache_dir.join("scripts").join(sha256.to_string());
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)?;
    for ours in [cache_dir, &cache_dir.join("scripts"), &directory] {
        let metadata = fs::symlink_metadata(ours)?;
        let is_ours = metadata.is_dir()
            && metadata.uid() == rustix::process::geteuid().as_raw()
            && metadata.mode() & 0o022 == 0;
        if !is_ours {
            return Err(std::io::Error::other(format!(
                "{} is not a directory that only the server's user can write",
                ours.display()
            )));
        }
    }
    let path = directory.join(file_name);
    if fs::read(&path).is_ok_and(|bytes| bytes == *found.bytes) {
        return Ok(path);
    }
    let temporary = directory.join(format!(".{}.tmp", uuid_like()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o500)
        .open(&temporary)?;
    std::io::Write::write_all(&mut file, &found.bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    Ok(path)
}

/// A name that no other thread or process of ours uses now.
fn uuid_like() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// How a run ended.
struct End {
    is_clean: bool,
    /// Whether another run would end in the same way.
    is_refused: bool,
    description: String,
}

/// What comes after a run.
enum Next {
    Again,
    Wait(PluginState),
    Over,
}

type Run = Pin<Box<dyn Future<Output = End> + Send>>;

/// A run and the ends it is held by. Dropping it kills.
struct Running {
    run: Run,
    link: Option<Link>,
    stop: CancellationToken,
    started: Instant,
    usage: Option<WasmRun>,
}

/// What a reload leads to: the new version and its run, or why the old one goes on.
type Reloaded = Result<(Arc<Generation>, Running), String>;

/// A reload under way, and who waits for it.
struct Reload {
    outcome: Pin<Box<dyn Future<Output = Reloaded> + Send>>,
    reply: oneshot::Sender<Result<(), String>>,
}

/// One plugin's life, from when it is found to the end of the server.
struct Life {
    plugin: Arc<Plugin>,
    workshop: Arc<Workshop>,
    inbox: mpsc::Receiver<Request>,
    ending: Ending,
}

impl Life {
    fn new(
        plugin: Arc<Plugin>,
        workshop: &Arc<Workshop>,
        inbox: mpsc::Receiver<Request>,
        ending: &Ending,
    ) -> Self {
        Self {
            ending: Ending {
                shutdown: plugin.over.clone(),
                ..ending.clone()
            },
            plugin,
            workshop: Arc::clone(workshop),
            inbox,
        }
    }

    async fn run(mut self, found: Found) {
        let ending = self.ending.clone();
        let mut read = Ok(found);
        let mut reply: Option<oneshot::Sender<Result<(), String>>> = None;
        let mut generation = loop {
            let preparing = async {
                match read {
                    Ok(found) => self.workshop.prepare(found).await,
                    Err(reason) => Err(Refusal::from(reason)),
                }
            };
            // Compiling may take a minute, which the end of the server does not wait for.
            let Some(prepared) = ending.shutdown.run_until_cancelled(preparing).await else {
                return self.plugin.enter(PluginState::Stopped);
            };
            let refusal = match prepared {
                Ok(generation) => break Arc::new(generation),
                Err(refusal) => refusal,
            };
            let (name, reason) = (&self.plugin.name, refusal.reason);
            {
                let mut shared = self.plugin.shared.lock();
                if let Some(limit) = refusal.limit {
                    shared.hits.add(limit, 1);
                }
                shared.last_end = Some(reason.clone());
            }
            self.plugin.enter(PluginState::Refused);
            // Who reads the line finds the state that it speaks of.
            tracing::error!(plugin = &**name, "plugin `{name}` is refused: {reason}");
            if let Some(reply) = reply.take() {
                let _ = reply.send(Err(reason));
            }
            // Whoever asks again may have mended the file.
            match self.wait_for_start(PluginState::Refused).await {
                None => return,
                Some(asked) => reply = asked,
            }
            read = self.workshop.read(&self.plugin).await;
            if let Ok(found) = &read {
                let mut shared = self.plugin.shared.lock();
                shared.sha256 = found.sha256;
                shared.origin = found.origin.as_ref().ok().copied();
                shared.manifest = found.manifest.clone();
                shared.made = made_of(found);
            }
        };
        self.plugin.adopt(&generation, None);
        self.plugin.enter(PluginState::Prepared);
        if let Some(reply) = reply.take() {
            let _ = reply.send(Ok(()));
        }
        let mut failures = Failures::default();
        loop {
            match self.run_once(&mut generation, &mut failures).await {
                Next::Again => {}
                Next::Over => return self.plugin.enter(PluginState::Stopped),
                Next::Wait(state) => {
                    self.plugin.enter(state);
                    if !self.rest(&mut generation).await {
                        return;
                    }
                    failures = Failures::default();
                }
            }
            self.plugin.restarts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until a plugin that does not run is started, or reloaded with success; `false`
    /// when the server ends first.
    async fn rest(&mut self, generation: &mut Arc<Generation>) -> bool {
        loop {
            let reply = match self.wait_for_start(PluginState::Stopped).await {
                None => return false,
                Some(None) => return true,
                Some(Some(reply)) => reply,
            };
            let loading = load(&self.workshop, &self.plugin);
            let Some(loaded) = self.ending.shutdown.run_until_cancelled(loading).await else {
                return false;
            };
            let loaded = loaded.map(|loaded| {
                *generation = Arc::new(loaded);
                self.plugin.adopt(generation, None);
            });
            let is_loaded = loaded.is_ok();
            self.tell(reply, loaded);
            if is_loaded {
                return true;
            }
        }
    }

    /// Waits until somebody starts or reloads the plugin, the latter with who waits for that;
    /// `None` when the server ends first. `stopped` is what somebody stopping it makes of it.
    async fn wait_for_start(
        &mut self,
        stopped: PluginState,
    ) -> Option<Option<oneshot::Sender<Result<(), String>>>> {
        loop {
            tokio::select! {
                () = self.ending.shutdown.cancelled() => return None,
                request = self.inbox.recv() => match request {
                    Some(Request::Start | Request::Restart) => return Some(None),
                    Some(Request::Reload(reply)) => return Some(Some(reply)),
                    Some(Request::Stop) => self.plugin.enter(stopped),
                    None => return None,
                },
            }
        }
    }

    /// One run, with what replaces it meanwhile, and if it failed the delay before the next.
    async fn run_once(
        &mut self,
        generation: &mut Arc<Generation>,
        failures: &mut Failures,
    ) -> Next {
        if self.ending.shutdown.is_cancelled() {
            return Next::Over;
        }
        let mut current = start(&self.plugin, generation, &self.ending);
        // Who sees it running can ask it something.
        self.plugin.current.set(current.link.clone());
        self.plugin.enter(PluginState::Running);
        self.plugin.shared.lock().usage = current.usage.clone();
        let mut asked = None;
        let mut reload: Option<Reload> = None;
        let mut draining: Option<Run> = None;
        let end = loop {
            let reloaded = async {
                match &mut reload {
                    Some(reload) => reload.outcome.as_mut().await,
                    None => std::future::pending().await,
                }
            };
            let drained = async {
                match &mut draining {
                    Some(run) => run.as_mut().await,
                    None => std::future::pending().await,
                }
            };
            let outcome = tokio::select! {
                outcome = reloaded => outcome,
                end = &mut current.run => {
                    // What is being tried takes the place, if it is well.
                    match &mut reload {
                        Some(reload) if asked.is_none() && !self.ending.shutdown.is_cancelled() => {
                            match self.ending.shutdown.run_until_cancelled(reload.outcome.as_mut()).await {
                                Some(outcome @ Ok(_)) => outcome,
                                _ => break end,
                            }
                        }
                        _ => break end,
                    }
                }
                end = drained => {
                    draining = None;
                    let name = &self.plugin.name;
                    tracing::info!(plugin = &**name, "the version of plugin `{name}` that was replaced {}", end.description);
                    continue;
                }
                () = self.ending.shutdown.cancelled(), if !current.stop.is_cancelled() => {
                    current.stop.cancel();
                    continue;
                }
                request = self.inbox.recv() => {
                    match request {
                        Some(Request::Start) => {}
                        Some(Request::Reload(reply)) => {
                            if reload.is_some() || draining.is_some() || asked.is_some() {
                                let _ = reply.send(Err("it is being reloaded or stopped already; try again when that is over".to_owned()));
                            } else {
                                let trial = try_out(Arc::clone(&self.workshop), Arc::clone(&self.plugin), self.ending.clone());
                                reload = Some(Reload { outcome: Box::pin(trial), reply });
                            }
                        }
                        Some(request @ (Request::Stop | Request::Restart)) => {
                            asked = Some(request);
                            current.stop.cancel();
                        }
                        // The supervisor is gone, and with it this task's reason.
                        None => return Next::Over,
                    }
                    continue;
                }
            };
            let Some(Reload { reply, .. }) = reload.take() else {
                continue;
            };
            let outcome = outcome.map(|(fresh, running)| {
                let old = std::mem::replace(&mut current, running);
                old.stop.cancel();
                draining = Some(old.run);
                self.plugin.adopt(&fresh, current.usage.clone());
                self.plugin.current.set(current.link.clone());
                self.plugin.shared.lock().running_since = Some(SystemTime::now());
                *generation = fresh;
                *failures = Failures::default();
            });
            self.tell(reply, outcome);
        };
        if let Some(Reload { reply, .. }) = reload.take() {
            self.tell(
                reply,
                Err("it ended while its new version was tried".to_owned()),
            );
        }
        if let Some(run) = draining {
            run.await;
        }
        self.plugin.logs.finish();
        let name = &self.plugin.name;
        tracing::info!(plugin = &**name, "plugin `{name}` {}", end.description);
        self.plugin.shared.lock().last_end = Some(end.description);
        if self.ending.shutdown.is_cancelled() {
            return Next::Over;
        }
        match asked {
            Some(Request::Stop) => return Next::Wait(PluginState::Stopped),
            Some(_) => {
                *failures = Failures::default();
                return Next::Again;
            }
            None => {}
        }
        if end.is_refused {
            return Next::Wait(PluginState::Refused);
        }
        let policy = generation.manifest.restart;
        let first_backoff = self.workshop.config.first_backoff;
        let uptime = current.started.elapsed();
        match failures.after(end.is_clean, uptime, policy, first_backoff) {
            After::Rest(state) => {
                if state == PluginState::Quarantined {
                    tracing::error!(
                        plugin = &**name,
                        "plugin `{name}` failed {QUARANTINE_AFTER} times in a row and is left alone; restart it by hand"
                    );
                }
                Next::Wait(state)
            }
            After::Restart(delay) => self.back_off(generation, delay).await,
        }
    }

    async fn back_off(&mut self, generation: &mut Arc<Generation>, delay: Duration) -> Next {
        self.plugin.enter(PluginState::Backoff);
        // Plugins that failed together, for one cause, should not all come back together, and
        // not each time in the same order.
        let restarts = self.plugin.restarts.load(Ordering::Relaxed);
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.plugin.name.as_bytes());
        hasher.update(&restarts.to_le_bytes());
        let jitter = f64::from(hasher.finalize().as_bytes()[0]) / 255.0 * 0.25;
        let delay = delay.mul_f64(1.0 + jitter);
        let name = &self.plugin.name;
        tracing::info!(
            plugin = &**name,
            "plugin `{name}` starts again in {:.1} s",
            delay.as_secs_f64()
        );
        let reply = tokio::select! {
            () = tokio::time::sleep(delay) => return Next::Again,
            () = self.ending.shutdown.cancelled() => return Next::Over,
            request = self.inbox.recv() => match request {
                Some(Request::Start | Request::Restart) => return Next::Again,
                Some(Request::Stop) => return Next::Wait(PluginState::Stopped),
                Some(Request::Reload(reply)) => reply,
                None => return Next::Over,
            },
        };
        let loading = load(&self.workshop, &self.plugin);
        let Some(loaded) = self.ending.shutdown.run_until_cancelled(loading).await else {
            return Next::Over;
        };
        let loaded = loaded.map(|loaded| {
            *generation = Arc::new(loaded);
            self.plugin.adopt(generation, None);
        });
        self.tell(reply, loaded);
        Next::Again
    }

    /// Notes how a reload ended and tells who waits for it.
    fn tell(&self, reply: oneshot::Sender<Result<(), String>>, outcome: Result<(), String>) {
        let name = &self.plugin.name;
        let noted = match &outcome {
            Ok(()) => {
                let sha256 = self.plugin.shared.lock().sha256;
                let sha256 = sha256.map_or_else(String::new, |it| it.to_string());
                tracing::info!(
                    plugin = &**name,
                    "plugin `{name}` was reloaded, sha256 {sha256}"
                );
                "done".to_owned()
            }
            Err(reason) => {
                tracing::warn!(
                    plugin = &**name,
                    "plugin `{name}` was not reloaded: {reason}"
                );
                format!("rolled back: {reason}")
            }
        };
        self.plugin.shared.lock().last_reload = Some(noted);
        // Whoever asked may have gone.
        let _ = reply.send(outcome);
    }
}

/// A plugin's files as they are now, ready to run.
async fn load(workshop: &Arc<Workshop>, plugin: &Plugin) -> Result<Generation, String> {
    let found = workshop.read(plugin).await?;
    if !found.manifest.enabled {
        return Err("its manifest or [plugins] has enabled = false".to_owned());
    }
    let prepared = workshop.prepare(found).await;
    prepared.map_err(|refusal| refusal.reason)
}

/// Starts a plugin's new version beside the old one, and says whether it is well.
async fn try_out(
    workshop: Arc<Workshop>,
    plugin: Arc<Plugin>,
    ending: Ending,
) -> Result<(Arc<Generation>, Running), String> {
    let generation = Arc::new(load(&workshop, &plugin).await?);
    let mut running = start(&plugin, &generation, &ending);
    let ended = tokio::time::timeout(PROBE_TIME, running.run.as_mut()).await;
    match ended {
        Ok(end) if !end.is_clean => Err(format!("its new version {}", end.description)),
        Ok(end) => {
            running.run = Box::pin(std::future::ready(end));
            Ok((generation, running))
        }
        Err(_) => Ok((generation, running)),
    }
}

/// What comes after a run that ended by itself.
#[derive(Debug, PartialEq, Eq)]
enum After {
    Restart(Duration),
    Rest(PluginState),
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Failures(u32);

impl Failures {
    /// Counts a run of length `uptime`. Runs that end well never count, however short: a
    /// plugin that is always restarted may be one that does its work and exits.
    fn after(
        &mut self,
        is_clean: bool,
        uptime: Duration,
        policy: Restart,
        first_backoff: Duration,
    ) -> After {
        match (is_clean, policy) {
            (true, Restart::Never | Restart::OnFailure) => return After::Rest(PluginState::Exited),
            (false, Restart::Never) => return After::Rest(PluginState::Failed),
            (true, Restart::Always) => self.0 = 0,
            (false, Restart::OnFailure | Restart::Always) if uptime >= HEALTHY_UPTIME => self.0 = 1,
            (false, Restart::OnFailure | Restart::Always) => self.0 += 1,
        }
        if self.0 >= QUARANTINE_AFTER {
            return After::Rest(PluginState::Quarantined);
        }
        let doublings = self.0.saturating_sub(1);
        After::Restart(
            first_backoff
                .saturating_mul(1 << doublings)
                .min(LONGEST_BACKOFF),
        )
    }
}

/// The limits of a manifest as a sandboxed run takes them.
#[must_use]
pub fn wasm_limits(manifest: &Manifest) -> WasmLimits {
    let limits = &manifest.limits;
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    WasmLimits {
        memory_bytes: u64::from(limits.memory_mib) << 20,
        table_elements: limits.table_elements.into(),
        cpu_percent: limits.cpu_percent,
        cpu_burst: Duration::from_millis(limits.cpu_burst_ms.into()),
        cpu_weight: limits.cpu_weight,
        start_time: seconds(limits.start_seconds),
        run_time: (limits.run_seconds > 0).then(|| seconds(limits.run_seconds)),
        host_call_time: seconds(limits.host_call_seconds),
        environment_bytes: u64::from(limits.environment_kib) << 10,
        open_files: limits.open_files,
        directory_bytes: u64::from(limits.directory_mib) << 20,
        outbound: OutboundLimits {
            grants: manifest.http.clone(),
            timeout: Duration::from_millis(limits.http_timeout_ms.into()),
            body_bytes: u64::from(limits.http_body_kib) << 10,
            per_second: limits.http_per_second,
        },
        ..WasmLimits::default()
    }
}

/// The directories of a manifest as a sandboxed run takes them.
#[must_use]
pub fn wasm_directories(manifest: &Manifest) -> Vec<wasm::Directory> {
    let granted = manifest.directories.iter();
    granted
        .map(|(guest, directory)| wasm::Directory {
            guest: guest.clone(),
            host: directory.host.clone(),
            access: directory.access,
        })
        .collect()
}

/// Starts a run. When it is told to stop it has its grace, or what the end of the server leaves
/// of that; then it is made to.
fn start(plugin: &Arc<Plugin>, generation: &Arc<Generation>, ending: &Ending) -> Running {
    let stop = CancellationToken::new();
    let (run, usage, link): (Run, _, _) = match &generation.runner {
        Runner::Wasm {
            runtime,
            module,
            script,
        } => {
            let must_end = ending.kill.child_token();
            let mut environment = generation.variables.clone();
            let mut directories = wasm_directories(&generation.manifest);
            let arguments = match script {
                Some(script) => {
                    environment.extend(PythonScript::variables());
                    directories.push(script.directory());
                    script.arguments()
                }
                None => vec![plugin.name.to_string()],
            };
            let (link, access) = contract(plugin, generation, ending, &stop);
            let run = runtime.spawn_with(
                module,
                Launch {
                    arguments,
                    environment,
                    directories,
                    limits: wasm_limits(&generation.manifest),
                    output: Arc::new(GuestLog(Arc::clone(&plugin.logs))),
                    stop: stop.clone(),
                    kill: must_end.clone(),
                },
                access,
            );
            let over = guest_run(
                Arc::clone(plugin),
                Arc::clone(generation),
                run.clone(),
                stop.clone(),
                must_end,
                ending.clone(),
            );
            (Box::pin(over), Some(run), Some(link))
        }
        Runner::Script(script) => {
            let over = script_run(
                Arc::clone(plugin),
                Arc::clone(generation),
                Arc::clone(script),
                stop.clone(),
                ending.clone(),
            );
            (Box::pin(over), None, None)
        }
    };
    Running {
        run,
        link,
        stop,
        started: Instant::now(),
        usage,
    }
}

/// What a sandboxed run is granted of the server, and the link to it. A Python script has the
/// interpreter's imports, which are none of the namespace.
fn contract(
    plugin: &Arc<Plugin>,
    generation: &Arc<Generation>,
    ending: &Ending,
    stop: &CancellationToken,
) -> (Link, host_api::Access) {
    let (link, inbox) = host_api::link(stop.clone());
    let (own, ending) = (Arc::clone(generation), ending.clone());
    let access = host_api::Access {
        run: PluginRun::new(Arc::clone(&plugin.name)),
        terms: Terms::of(&generation.manifest),
        inbox,
        tally: Arc::clone(&plugin.tally),
        state: Arc::clone(&generation.kept),
        counter: Arc::clone(&generation.counter),
        grace: Box::new(move || own.grace(&ending)),
    };
    (link, access)
}

impl Generation {
    /// What a run gets to stop. Known when it is asked for only: the end of the server may leave
    /// less than the manifest.
    fn grace(&self, ending: &Ending) -> Duration {
        let own = Duration::from_secs(self.manifest.stop_grace_seconds.into());
        ending.grace.get().map_or(own, |servers| own.min(*servers))
    }
}

/// A guest's run to its end.
async fn guest_run(
    plugin: Arc<Plugin>,
    generation: Arc<Generation>,
    run: WasmRun,
    stop: CancellationToken,
    must_end: CancellationToken,
    ending: Ending,
) -> End {
    let ended = run.ended();
    tokio::pin!(ended);
    let end = tokio::select! {
        end = &mut ended => end,
        () = async { stop.cancelled().await; tokio::time::sleep(generation.grace(&ending)).await } => {
            must_end.cancel();
            ended.await
        }
    };
    {
        let mut shared = plugin.shared.lock();
        shared.hits.add_all(&run.usage().hits);
        // What is shown of a run includes its hits, which now count as past.
        shared.usage = shared.usage.take().filter(|shown| !shown.is_same(&run));
    }
    let (is_clean, description) = match end {
        WasmEnd::Exited(code) => (code == 0, format!("exited with code {code}")),
        WasmEnd::Trapped(trap) => (false, format!("trapped: {trap}")),
        WasmEnd::LimitHit(limit) => (false, format!("was ended by a limit: {limit}")),
        WasmEnd::Refused(reason) => (false, format!("could not run: {reason}")),
        WasmEnd::Killed => (false, "was killed".to_owned()),
    };
    End {
        is_clean,
        is_refused: false,
        description,
    }
}

/// A script's run to its end.
async fn script_run(
    plugin: Arc<Plugin>,
    generation: Arc<Generation>,
    script: Arc<NativeScript>,
    stop: CancellationToken,
    ending: Ending,
) -> End {
    let kill = &ending.kill;
    let contract = generation
        .variables
        .iter()
        .map(|(name, value)| (name.into(), value.into()));
    let mut output = ScriptLog(Arc::clone(&plugin.logs));
    let told = async {
        tokio::select! {
            () = stop.cancelled() => generation.grace(&ending),
            () = kill.cancelled() => Duration::ZERO,
        }
    };
    let run = script.run_once(
        contract.collect::<Vec<(OsString, OsString)>>(),
        &mut output,
        told,
    );
    // Dropping the run kills everything without the rest of the grace.
    let end = tokio::select! {
        end = run => end,
        () = async { kill.cancelled().await; tokio::time::sleep(KEEPER_LIMIT).await } => {
            return End { is_clean: false, is_refused: false, description: "was killed".to_owned() };
        }
    };
    match end {
        Ok(end) => {
            let mut description = match end.process {
                Some(ProcessEnd::Exited(code)) => format!("exited with code {code}"),
                Some(ProcessEnd::Signaled(signal)) => format!("was ended by signal {signal}"),
                None => "ended in a way that its keeper could not tell".to_owned(),
            };
            if end.killed > 0 {
                description.push_str(&format!("; {} processes had to be killed", end.killed));
            }
            if end.stuck > 0 {
                description.push_str(&format!(
                    "; {} processes are stuck in the kernel",
                    end.stuck
                ));
            }
            End {
                is_clean: end.process == Some(ProcessEnd::Exited(0)),
                is_refused: false,
                description,
            }
        }
        Err(error) => End {
            is_clean: false,
            is_refused: error.is_final(),
            description: format!("could not run: {error}"),
        },
    }
}

/// A guest's output as it enters its log.
pub(crate) struct GuestLog(pub(crate) Arc<LogStream>);

impl GuestOutput for GuestLog {
    fn push(&self, stream: GuestStream, bytes: &[u8]) {
        let stream = match stream {
            GuestStream::Stdout => OutputStream::Stdout,
            GuestStream::Stderr => OutputStream::Stderr,
        };
        self.0.push(stream, bytes);
    }

    fn log(&self, level: LogLevel, line: &[u8]) {
        self.0.log(level, line);
    }

    fn budget(&self) -> usize {
        self.0.budget()
    }

    fn ready(&self) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.0.ready())
    }
}

/// A script's output as it enters its log.
struct ScriptLog(Arc<LogStream>);

impl ScriptOutput for ScriptLog {
    async fn write(&mut self, bytes: &[u8]) {
        self.0.ready().await;
        self.0.push(OutputStream::Stdout, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(1);

    #[test]
    fn failures_back_off_up_to_quarantine() {
        let mut failures = Failures::default();
        let delays: Vec<_> = std::iter::from_fn(|| {
            match failures.after(false, SHORT, Restart::OnFailure, FIRST_BACKOFF) {
                After::Restart(delay) => Some(delay.as_millis()),
                After::Rest(state) => {
                    assert_eq!(state, PluginState::Quarantined);
                    None
                }
            }
        })
        .collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 16000, 32000]);
    }

    #[test]
    fn a_healthy_run_makes_failures_forgotten() {
        let mut failures = Failures(QUARANTINE_AFTER - 1);
        let after = failures.after(false, HEALTHY_UPTIME, Restart::OnFailure, FIRST_BACKOFF);
        assert_eq!(after, After::Restart(FIRST_BACKOFF));
        assert_eq!(failures.0, 1);
    }

    #[test]
    fn the_policy_decides_who_comes_back() {
        let after =
            |is_clean, policy| Failures::default().after(is_clean, SHORT, policy, FIRST_BACKOFF);
        let rest = After::Rest;
        assert_eq!(after(true, Restart::OnFailure), rest(PluginState::Exited));
        assert_eq!(after(true, Restart::Never), rest(PluginState::Exited));
        assert_eq!(after(false, Restart::Never), rest(PluginState::Failed));
        assert_eq!(
            after(false, Restart::OnFailure),
            After::Restart(FIRST_BACKOFF)
        );
    }

    #[test]
    fn doing_its_work_again_and_again_is_no_crash_loop() {
        let mut failures = Failures::default();
        for _ in 0..100 {
            let after = failures.after(true, SHORT, Restart::Always, FIRST_BACKOFF);
            assert_eq!(after, After::Restart(FIRST_BACKOFF));
        }
    }

    #[test]
    fn the_contract_has_the_legacy_names_too() {
        let contract = Contract {
            config_json: "{\"a\":1}".to_owned(),
            extra_config_json: "{}".to_owned(),
        };
        let variables = contract.variables();
        let has =
            |name: &str, value: &str| variables.contains(&(name.to_owned(), value.to_owned()));
        for prefix in ["LMCACHE_RUNTIME_PLUGIN_", "LMCACHE_PLUGIN_"] {
            assert!(has(&format!("{prefix}CONFIG"), "{\"a\":1}"), "{prefix}");
            assert!(has(&format!("{prefix}ROLE"), ""), "{prefix}");
            assert!(has(&format!("{prefix}WORKER_COUNT"), "1"), "{prefix}");
            assert!(has(&format!("{prefix}WORKER_ID"), "0"), "{prefix}");
        }
        assert!(has("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG", "{}"));
    }
}
