//! Runs plugins of all kinds: starts them, restarts what failed, stops them in time.
//!
//! One task per plugin follows one state machine, whatever the plugin is:
//! `prepared -> running -> exited | failed -> backoff -> running ... -> quarantined | stopped`.
//! A plugin that cannot be run at all (a module that is refused) is `refused`.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    loader::{self, Found, LoadError, PluginKind},
    log_stream::{LogCounts, LogLine, LogStream, OutputStream},
    manifest::Restart,
    native_script::{NativeConfig, NativeScript, ProcessEnd, ScriptOutput, passed_on},
    wasm::{
        GuestOutput, GuestStream, WasmConfig, WasmEnd, WasmError, WasmLimits, WasmModule, WasmRun,
        WasmRuntime,
    },
};

/// Delay before the first restart; it doubles with each failure in a row.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// Longest delay before a restart.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// A run of this length makes earlier failures forgotten.
const HEALTHY_UPTIME: Duration = Duration::from_secs(60);
/// Failures in a row after which a plugin is left alone until someone restarts it.
const QUARANTINE_AFTER: u32 = 8;
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
    /// blake3 of a module's bytes.
    pub digest: Option<String>,
    /// Restarts since the server's start.
    pub restarts: u64,
    /// How the last run ended, or why it is refused.
    pub last_end: Option<String>,
    /// Milliseconds since the Unix epoch at which the current run began.
    pub running_since_unix_ms: Option<u64>,
    /// Linear memory of a sandboxed plugin in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU time of a sandboxed plugin's current run.
    pub cpu_time: Option<Duration>,
    /// How often a sandboxed plugin's current run was refused memory or table elements.
    pub refused_growths: Option<u64>,
    /// What holds a script's processes together.
    pub containment: Option<&'static str>,
    /// What it printed.
    pub logs: LogCounts,
}

/// Settings of the supervisor.
#[derive(Debug)]
pub struct SupervisorConfig {
    /// Plugin files and directories.
    pub locations: Vec<PathBuf>,
    /// How modules are compiled and where artefacts are kept.
    pub wasm: WasmConfig,
    /// How scripts run; each plugin gets its own grants on top.
    pub native: NativeConfig,
    /// The server's environment, of which plugins see what their manifests name.
    pub server_environment: Vec<(OsString, OsString)>,
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
}

/// What somebody asks of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Start,
    Stop,
    Restart,
}

struct Plugin {
    found: Found,
    logs: Arc<LogStream>,
    shared: Mutex<Shared>,
    restarts: AtomicU64,
    requests: mpsc::Sender<Request>,
}

struct Shared {
    state: PluginState,
    digest: Option<String>,
    last_end: Option<String>,
    running_since: Option<SystemTime>,
    usage: Option<WasmRun>,
    script: Option<Arc<NativeScript>>,
}

/// All plugins of a server. Dropping it kills them.
pub struct Supervisor {
    config: SupervisorConfig,
    plugins: Vec<Arc<Plugin>>,
    by_name: HashMap<Arc<str>, usize>,
    /// Of each plugin, for the task that `start` gives it.
    inboxes: Mutex<Vec<Inbox>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    ending: Ending,
}

/// A plugin's requests and its module's bytes.
type Inbox = (mpsc::Receiver<Request>, Option<Arc<[u8]>>);

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
        let mut plugins = Vec::new();
        let mut inboxes = Vec::new();
        let mut by_name = HashMap::new();
        for mut found in loader::find(&config.locations)? {
            let module = found.module.take();
            let (requests, inbox) = mpsc::channel(8);
            by_name.insert(Arc::clone(&found.name), plugins.len());
            inboxes.push((inbox, module.clone()));
            plugins.push(Arc::new(Plugin {
                logs: Arc::new(LogStream::new(
                    Arc::clone(&found.name),
                    found.manifest.log_limits(),
                )),
                shared: Mutex::new(Shared {
                    state: PluginState::Discovered,
                    digest: module
                        .as_ref()
                        .map(|bytes| blake3::hash(bytes).to_hex().to_string()),
                    last_end: None,
                    running_since: None,
                    usage: None,
                    script: None,
                }),
                restarts: AtomicU64::new(0),
                requests,
                found,
            }));
        }
        Ok(Self {
            config,
            plugins,
            by_name,
            inboxes: Mutex::new(inboxes),
            tasks: Mutex::default(),
            ending: Ending::default(),
        })
    }

    /// Starts every plugin, once; must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SupervisorError::Wasm`] when there are sandboxed plugins and no sandbox can be had.
    pub fn start(&self, contract: &Contract) -> Result<(), SupervisorError> {
        let inboxes = std::mem::take(&mut *self.inboxes.lock());
        let needs_wasm = self
            .plugins
            .iter()
            .any(|plugin| plugin.found.kind == PluginKind::Wasm);
        let runtime = match needs_wasm {
            true => Some(Arc::new(WasmRuntime::start(self.config.wasm.clone())?)),
            false => None,
        };
        let variables = contract.variables();
        let mut tasks = self.tasks.lock();
        if inboxes.is_empty() {
            return Ok(());
        }
        let preparing = Arc::new(Semaphore::new(PREPARING_AT_ONCE));
        for (plugin, (inbox, bytes)) in self.plugins.iter().zip(inboxes) {
            let runner = match (&runtime, bytes) {
                (Some(runtime), Some(bytes)) => Runner::Wasm {
                    runtime: Arc::clone(runtime),
                    module: Module::Unprepared {
                        bytes,
                        preparing: Arc::clone(&preparing),
                    },
                },
                _ => {
                    let mut native = self.config.native.clone();
                    let environment = self.config.server_environment.iter().cloned();
                    native.passed_on = passed_on(environment, &plugin.found.manifest.env);
                    let script = Arc::new(NativeScript::new(
                        &*plugin.found.name,
                        &plugin.found.path,
                        native,
                    ));
                    plugin.shared.lock().script = Some(Arc::clone(&script));
                    Runner::Script(script)
                }
            };
            let life = Life {
                plugin: Arc::clone(plugin),
                runner,
                variables: self.variables_of(&plugin.found, &variables),
                inbox,
                ending: self.ending.clone(),
            };
            tasks.push(tokio::spawn(life.run()));
        }
        let (plugins, shutdown) = (self.plugins.clone(), self.ending.shutdown.clone());
        tasks.push(tokio::spawn(async move {
            let report = async {
                loop {
                    tokio::time::sleep(DROP_REPORT_INTERVAL).await;
                    plugins.iter().for_each(|plugin| plugin.logs.report_drops());
                }
            };
            let _ended = shutdown.run_until_cancelled(report).await;
        }));
        Ok(())
    }

    /// The contract and what the manifest names of the server's environment.
    fn variables_of(&self, found: &Found, contract: &[(String, String)]) -> Vec<(String, String)> {
        let granted = self
            .config
            .server_environment
            .iter()
            .filter_map(|(name, value)| {
                let (name, value) = (name.to_str()?, value.to_str()?);
                found
                    .manifest
                    .env
                    .iter()
                    .any(|granted| granted == name)
                    .then(|| (name.to_owned(), value.to_owned()))
            });
        granted.chain(contract.iter().cloned()).collect()
    }

    /// What is known of each plugin, in the order they were found.
    #[must_use]
    pub fn snapshot(&self) -> Vec<PluginStatus> {
        self.plugins.iter().map(|plugin| plugin.status()).collect()
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

    fn ask(&self, name: &str, request: Request) -> Result<(), SupervisorError> {
        let plugin = self.plugin(name)?;
        plugin
            .requests
            .try_send(request)
            .map_err(|_| SupervisorError::Busy(name.to_owned()))
    }

    fn plugin(&self, name: &str) -> Result<&Arc<Plugin>, SupervisorError> {
        let index = self
            .by_name
            .get(name)
            .ok_or_else(|| SupervisorError::NotFound(name.to_owned()))?;
        Ok(&self.plugins[*index])
    }

    /// Ends all plugins: each is told, has its grace, and is killed. Nothing of them is left
    /// when this returns, at most `grace` and three seconds later.
    pub async fn shutdown(&self, grace: Duration) {
        // Set once: a second caller waits for what the first began.
        let _ = self.ending.grace.set(grace);
        self.ending.shutdown.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let deadline = tokio::time::Instant::now() + grace;
        let mut left = Vec::new();
        for mut task in tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                left.push(task);
            }
        }
        self.ending.kill.cancel();
        let deadline = tokio::time::Instant::now() + KILL_LIMIT;
        for mut task in left {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::error!("a plugin did not end {KILL_LIMIT:?} after it was killed");
                task.abort();
            }
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ending.kill.cancel();
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
    }
}

impl Plugin {
    fn status(&self) -> PluginStatus {
        let shared = self.shared.lock();
        let usage = shared.usage.as_ref().map(WasmRun::usage);
        PluginStatus {
            name: Arc::clone(&self.found.name),
            kind: self.found.kind,
            path: self.found.path.clone(),
            state: shared.state,
            digest: shared.digest.clone(),
            restarts: self.restarts.load(Ordering::Relaxed),
            last_end: shared.last_end.clone(),
            running_since_unix_ms: shared.running_since.map(|since| {
                let since_epoch = since.duration_since(UNIX_EPOCH).unwrap_or_default();
                u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
            }),
            memory_bytes: usage.as_ref().map(|usage| usage.memory_bytes),
            cpu_time: usage.as_ref().map(|usage| usage.cpu_time),
            refused_growths: usage.as_ref().map(|usage| usage.refused_growths),
            containment: shared
                .script
                .as_ref()
                .and_then(|script| script.containment())
                .map(|it| it.name()),
            logs: self.logs.counts(),
        }
    }

    fn enter(&self, state: PluginState) {
        let mut shared = self.shared.lock();
        shared.state = state;
        shared.running_since = (state == PluginState::Running).then(SystemTime::now);
        if state != PluginState::Running {
            shared.usage = None;
        }
    }
}

enum Runner {
    Wasm {
        runtime: Arc<WasmRuntime>,
        module: Module,
    },
    Script(Arc<NativeScript>),
}

enum Module {
    /// The bytes are given up when they have been compiled.
    Unprepared {
        bytes: Arc<[u8]>,
        preparing: Arc<Semaphore>,
    },
    Prepared(WasmModule),
}

/// How a run ended.
struct End {
    is_clean: bool,
    description: String,
}

/// What comes after a run.
enum Next {
    Again,
    Wait(PluginState),
    Over,
}

/// One plugin's life, from the start of the server to its end.
struct Life {
    plugin: Arc<Plugin>,
    runner: Runner,
    variables: Vec<(String, String)>,
    inbox: mpsc::Receiver<Request>,
    ending: Ending,
}

impl Life {
    async fn run(mut self) {
        let ending = self.ending.clone();
        loop {
            // Compiling may take a minute, which the end of the server does not wait for.
            let Some(prepared) = ending.shutdown.run_until_cancelled(self.prepare()).await else {
                return self.plugin.enter(PluginState::Stopped);
            };
            let Err(reason) = prepared else { break };
            let name = &self.plugin.found.name;
            tracing::error!(plugin = &**name, "plugin `{name}` is refused: {reason}");
            self.plugin.shared.lock().last_end = Some(reason);
            self.plugin.enter(PluginState::Refused);
            if !self.wait_for_start(PluginState::Refused).await {
                return;
            }
        }
        self.plugin.enter(PluginState::Prepared);
        let mut failures = Failures::default();
        loop {
            match self.run_once(&mut failures).await {
                Next::Again => {}
                Next::Over => return self.plugin.enter(PluginState::Stopped),
                Next::Wait(state) => {
                    self.plugin.enter(state);
                    if !self.wait_for_start(PluginState::Stopped).await {
                        return;
                    }
                    failures = Failures::default();
                }
            }
            self.plugin.restarts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Compiles a module, off the async threads.
    async fn prepare(&mut self) -> Result<(), String> {
        let Runner::Wasm { runtime, module } = &mut self.runner else {
            return Ok(());
        };
        let Module::Unprepared { bytes, preparing } = module else {
            return Ok(());
        };
        let turn = Arc::clone(preparing).acquire_owned().await;
        let turn = turn.map_err(|error| error.to_string())?;
        let (runtime, bytes) = (Arc::clone(runtime), Arc::clone(bytes));
        let name = Arc::clone(&self.plugin.found.name);
        let compile = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            runtime.prepare(&name, &bytes)
        });
        let prepared = compile.await.map_err(|error| error.to_string())?;
        *module = Module::Prepared(prepared.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Waits until somebody starts the plugin; `false` when the server ends first. `stopped` is
    /// what somebody stopping it makes of it.
    async fn wait_for_start(&mut self, stopped: PluginState) -> bool {
        loop {
            tokio::select! {
                () = self.ending.shutdown.cancelled() => return false,
                request = self.inbox.recv() => match request {
                    Some(Request::Start | Request::Restart) => return true,
                    Some(Request::Stop) => self.plugin.enter(stopped),
                    None => return false,
                },
            }
        }
    }

    /// One run and, if it failed, the delay before the next.
    async fn run_once(&mut self, failures: &mut Failures) -> Next {
        if self.ending.shutdown.is_cancelled() {
            return Next::Over;
        }
        let stop = CancellationToken::new();
        let started = Instant::now();
        self.plugin.enter(PluginState::Running);
        let mut asked = None;
        let end = {
            let run = execute(
                &self.plugin,
                &self.runner,
                &self.variables,
                &stop,
                &self.ending,
            );
            tokio::pin!(run);
            loop {
                tokio::select! {
                    end = &mut run => break end,
                    () = self.ending.shutdown.cancelled(), if !stop.is_cancelled() => stop.cancel(),
                    request = self.inbox.recv() => match request {
                        Some(Request::Start) => {}
                        Some(request) => {
                            asked = Some(request);
                            stop.cancel();
                        }
                        // The supervisor is gone, and with it this task's reason.
                        None => return Next::Over,
                    },
                }
            }
        };
        self.plugin.logs.finish();
        let name = &self.plugin.found.name;
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
        let policy = self.plugin.found.manifest.restart;
        match failures.after(end.is_clean, started.elapsed(), policy) {
            After::Rest(state) => {
                if state == PluginState::Quarantined {
                    tracing::error!(
                        plugin = &**name,
                        "plugin `{name}` failed {QUARANTINE_AFTER} times in a row and is left alone; restart it by hand"
                    );
                }
                Next::Wait(state)
            }
            After::Restart(delay) => self.back_off(delay).await,
        }
    }

    async fn back_off(&mut self, delay: Duration) -> Next {
        self.plugin.enter(PluginState::Backoff);
        // Plugins that failed together, for one cause, should not all come back together.
        let name_hash = blake3::hash(self.plugin.found.name.as_bytes());
        let jitter = f64::from(name_hash.as_bytes()[0]) / 255.0 * 0.25;
        let delay = delay.mul_f64(1.0 + jitter);
        let name = &self.plugin.found.name;
        tracing::info!(
            plugin = &**name,
            "plugin `{name}` starts again in {:.1} s",
            delay.as_secs_f64()
        );
        tokio::select! {
            () = tokio::time::sleep(delay) => Next::Again,
            () = self.ending.shutdown.cancelled() => Next::Over,
            request = self.inbox.recv() => match request {
                Some(Request::Start | Request::Restart) => Next::Again,
                Some(Request::Stop) => Next::Wait(PluginState::Stopped),
                None => Next::Over,
            },
        }
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
    fn after(&mut self, is_clean: bool, uptime: Duration, policy: Restart) -> After {
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
            FIRST_BACKOFF
                .saturating_mul(1 << doublings)
                .min(LONGEST_BACKOFF),
        )
    }
}

/// Runs a plugin to its end. `stop` tells it to end; after its grace, or when the server
/// waits no longer, it is made to.
async fn execute(
    plugin: &Plugin,
    runner: &Runner,
    variables: &[(String, String)],
    stop: &CancellationToken,
    ending: &Ending,
) -> End {
    let kill = &ending.kill;
    // Known when it is asked for only: the end of the server may leave less than the manifest.
    let grace = || {
        let own = Duration::from_secs(plugin.found.manifest.stop_grace_seconds.into());
        ending.grace.get().map_or(own, |servers| own.min(*servers))
    };
    match runner {
        Runner::Wasm {
            runtime,
            module: Module::Prepared(module),
        } => {
            let limits = &plugin.found.manifest.limits;
            let limits = WasmLimits {
                memory_bytes: u64::from(limits.memory_mib) << 20,
                cpu_percent: limits.cpu_percent,
                ..WasmLimits::default()
            };
            let must_end = kill.child_token();
            let output = Arc::new(GuestLog(Arc::clone(&plugin.logs)));
            let arguments = vec![plugin.found.name.to_string()];
            let run = runtime.spawn(
                module,
                arguments,
                variables.to_vec(),
                &limits,
                output,
                stop.clone(),
                must_end.clone(),
            );
            plugin.shared.lock().usage = Some(run.clone());
            let ended = run.ended();
            tokio::pin!(ended);
            let end = tokio::select! {
                end = &mut ended => end,
                () = async { stop.cancelled().await; tokio::time::sleep(grace()).await } => {
                    must_end.cancel();
                    ended.await
                }
            };
            match end {
                WasmEnd::Exited(0) => End {
                    is_clean: true,
                    description: "exited with code 0".to_owned(),
                },
                WasmEnd::Exited(code) => End {
                    is_clean: false,
                    description: format!("exited with code {code}"),
                },
                WasmEnd::Trapped(trap) => End {
                    is_clean: false,
                    description: format!("trapped: {trap}"),
                },
                WasmEnd::LimitHit(limit) => End {
                    is_clean: false,
                    description: format!("was ended by a limit: {limit}"),
                },
                WasmEnd::Killed => End {
                    is_clean: false,
                    description: "was killed".to_owned(),
                },
            }
        }
        // Nothing is run before `prepare` succeeded.
        Runner::Wasm {
            module: Module::Unprepared { .. },
            ..
        } => End {
            is_clean: false,
            description: "was not prepared".to_owned(),
        },
        Runner::Script(script) => {
            let contract = variables
                .iter()
                .map(|(name, value)| (name.into(), value.into()));
            let mut output = ScriptLog(Arc::clone(&plugin.logs));
            let told = async {
                tokio::select! {
                    () = stop.cancelled() => grace(),
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
                    return End { is_clean: false, description: "was killed".to_owned() };
                }
            };
            match end {
                Ok(end) => {
                    let mut description = match end.process {
                        Some(ProcessEnd::Exited(code)) => format!("exited with code {code}"),
                        Some(ProcessEnd::Signaled(signal)) => {
                            format!("was ended by signal {signal}")
                        }
                        None => "ended in a way that its keeper could not tell".to_owned(),
                    };
                    if end.killed > 0 {
                        description
                            .push_str(&format!("; {} processes had to be killed", end.killed));
                    }
                    if end.stuck > 0 {
                        description.push_str(&format!(
                            "; {} processes are stuck in the kernel",
                            end.stuck
                        ));
                    }
                    End {
                        is_clean: end.process == Some(ProcessEnd::Exited(0)),
                        description,
                    }
                }
                Err(error) => End {
                    is_clean: false,
                    description: format!("could not run: {error}"),
                },
            }
        }
    }
}

/// A guest's output as it enters its log.
struct GuestLog(Arc<LogStream>);

impl GuestOutput for GuestLog {
    fn push(&self, stream: GuestStream, bytes: &[u8]) {
        let stream = match stream {
            GuestStream::Stdout => OutputStream::Stdout,
            GuestStream::Stderr => OutputStream::Stderr,
        };
        self.0.push(stream, bytes);
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
        let delays: Vec<_> =
            std::iter::from_fn(|| match failures.after(false, SHORT, Restart::OnFailure) {
                After::Restart(delay) => Some(delay.as_millis()),
                After::Rest(state) => {
                    assert_eq!(state, PluginState::Quarantined);
                    None
                }
            })
            .collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 16000, 32000]);
    }

    #[test]
    fn a_healthy_run_makes_failures_forgotten() {
        let mut failures = Failures(QUARANTINE_AFTER - 1);
        let after = failures.after(false, HEALTHY_UPTIME, Restart::OnFailure);
        assert_eq!(after, After::Restart(FIRST_BACKOFF));
        assert_eq!(failures.0, 1);
    }

    #[test]
    fn the_policy_decides_who_comes_back() {
        let after = |is_clean, policy| Failures::default().after(is_clean, SHORT, policy);
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
            let after = failures.after(true, SHORT, Restart::Always);
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
