//! Bash and Python plugins as LMCache runs them, held so that nothing of them survives.
//!
//! A script is found its interpreter ([`interpreter`]), gets an environment of its own
//! ([`environment`]) and runs under a keeper process ([`keeper`]), which the server starts
//! and listens to ([`keeper_link`]). Follows LMCache's `v1/plugin/runtime_plugin_launcher.py`
//! and `v1/multiprocess/mp_runtime_plugin_launcher.py`, except where those leave processes
//! behind, hand out secrets or lose output.

mod confinement;
mod environment;
mod error;
mod interpreter;
mod keeper;
mod keeper_link;
mod messages;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::Instant};
use tokio_util::sync::CancellationToken;

pub(crate) use self::confinement::own_directory;
use self::{
    confinement::Restrictions, interpreter::CommandLine, keeper_link::KeeperLink, messages::Report,
};
pub use self::{
    confinement::{Granted, NativePolicy, Protection},
    environment::passed_on,
    error::ScriptError,
    keeper::{KEEPER_ARGUMENT, keeper_main},
    messages::{Containment, ProcessEnd, ProcessLimits},
};
use crate::manifest::Manifest;

/// What one read takes from a script: a full pipe of the default size.
const READ_BYTES: usize = 64 * 1024;

/// How long the end of a killed tree may take, from the kill to the keeper's word.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// What a keeper gets beyond grace and [`KILL_LIMIT`] on a loaded machine, before it counts as dead.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// How long the log may take for what was still in the pipe when the last process ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// How scripts run; one value for all of them.
#[derive(Clone, Debug)]
pub struct NativeConfig {
    /// The program that calls [`keeper_main`]; by default the running one itself.
    pub keeper_program: PathBuf,
    /// What scripts see of the server's environment, as from [`passed_on`].
    pub passed_on: BTreeMap<OsString, OsString>,
    /// Where scripts start. `None`: where the server was started, as with LMCache, so that
    /// relative paths in existing plugins mean the same.
    pub working_directory: Option<PathBuf>,
    /// How far scripts are trusted.
    pub policy: NativePolicy,
    /// What the kernel limits per process, where the manifest says nothing.
    pub limits: ProcessLimits,
    /// The containments that may be used; the first that works is. None left: no script runs.
    pub containments: Vec<Containment>,
    /// What a script gets between SIGTERM and SIGKILL when its keeper is told by a signal to
    /// stop, as a service manager does that signals all processes.
    pub grace: Duration,
}

impl NativeConfig {
    /// The defaults for a server with this environment (`std::env::vars_os`): confined, all
    /// containments, strongest first, [`ProcessLimits::default`], 5 s of grace, and besides
    /// what every program needs only the `granted` variables.
    pub fn new(
        server_environment: impl IntoIterator<Item = (OsString, OsString)>,
        granted: &[String],
    ) -> Self {
        Self {
            keeper_program: PathBuf::from(keeper::OWN_BINARY),
            passed_on: passed_on(server_environment, granted),
            working_directory: None,
            policy: NativePolicy::default(),
            limits: ProcessLimits::default(),
            containments: vec![
                Containment::PidNamespace,
                Containment::UserPidNamespace,
                Containment::Subreaper,
            ],
            grace: Duration::from_secs(5),
        }
    }
}

/// Where a script's output goes: merged stdout and stderr, in pieces that end anywhere.
pub trait ScriptOutput {
    /// Takes `bytes`; while this waits, the pipe fills and then the script waits.
    fn write(&mut self, bytes: &[u8]) -> impl Future<Output = ()> + Send;
}

/// How a run of a script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScriptEnd {
    /// How the script's own process ended; `None` when the keeper could not tell.
    pub process: Option<ProcessEnd>,
    /// Whether it had been told to stop.
    pub was_stopped: bool,
    /// How many processes did not end by themselves.
    pub killed: usize,
    /// Processes that not even SIGKILL ended in time; the keeper goes on trying.
    pub stuck: usize,
}

/// One `.py` or `.sh` plugin, or any other executable file that the configuration names.
#[derive(Debug)]
pub struct NativeScript {
    name: String,
    path: PathBuf,
    config: NativeConfig,
    manifest: Manifest,
    containment: Mutex<Option<Containment>>,
    granted: Mutex<Option<Granted>>,
}

impl NativeScript {
    /// A script that can be run, again and again; nothing is read or started yet. `name`
    /// is the plugin's in logs; `manifest` says what it may use.
    pub fn new(
        name: impl Into<String>,
        path: impl Into<PathBuf>,
        config: NativeConfig,
        manifest: Manifest,
    ) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            config,
            manifest,
            containment: Mutex::new(None),
            granted: Mutex::new(None),
        }
    }

    /// The script's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far it is trusted.
    pub fn policy(&self) -> NativePolicy {
        self.config.policy
    }

    /// What holds the processes of the current or the latest run together; `None` before the
    /// first one that started.
    pub fn containment(&self) -> Option<Containment> {
        *self.containment.lock()
    }

    /// What of its confinement the kernel granted to the current or the latest run; `None`
    /// before the first one that started.
    pub fn granted(&self) -> Option<Granted> {
        self.granted.lock().clone()
    }

    /// Runs the script once, with the variables of `contract`, until it and all that it
    /// started are gone. `stop` resolves to the grace period when the script shall end.
    ///
    /// A script that exits with code 0 and leaves processes behind, as daemons do, counts as
    /// running until those end. After any other end they are killed at once. Dropping the
    /// future kills everything without grace.
    ///
    /// # Errors
    /// When the script cannot be started, or its keeper dies.
    pub async fn run_once(
        &self,
        contract: impl IntoIterator<Item = (OsString, OsString)>,
        output: &mut impl ScriptOutput,
        stop: impl Future<Output = Duration>,
    ) -> Result<ScriptEnd, ScriptError> {
        let variables = environment::build(&self.config.passed_on, contract)?;
        let (variables, command, restrictions) = self.prepare(variables).await?;
        if let Some(missing) = &command.missing {
            tracing::warn!(
                plugin = self.name,
                "interpreter `{missing}` does not exist here, {} is used",
                command.program.display()
            );
        }
        let (keeper, pipe) = self.start(&restrictions, &command, &variables).await?;
        tracing::info!(
            plugin = self.name,
            containment = self.containment().map(Containment::name),
            "started {} with {}, held to {}",
            self.path.display(),
            command.program.display(),
            self.granted().unwrap_or_default()
        );
        let over = CancellationToken::new();
        let watch = async {
            let _over = over.clone().drop_guard();
            self.watch(keeper, stop).await
        };
        let (end, ()) = tokio::join!(watch, self.pump(pipe, output, &over));
        end
    }

    /// The command line and what it may touch, found on a thread that may wait for a slow file
    /// system.
    async fn prepare(
        &self,
        variables: BTreeMap<OsString, OsString>,
    ) -> Result<(BTreeMap<OsString, OsString>, CommandLine, Restrictions), ScriptError> {
        let unreadable = |cause| ScriptError::Unreadable {
            path: self.path.clone(),
            cause,
        };
        // The keeper may start elsewhere, where a relative path would mean another file.
        let path = std::path::absolute(&self.path).map_err(unreadable)?;
        let (policy, limits) = (self.config.policy, self.config.limits.clone());
        let manifest = self.manifest.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            let search_path = variables.get(std::ffi::OsStr::new("PATH"));
            let search_path = search_path.map(OsString::as_os_str).unwrap_or_default();
            let command = interpreter::resolve(&path, search_path)?;
            let restrictions =
                Restrictions::of(policy, limits, &manifest, &path, &command, &variables)?;
            Ok((variables, command, restrictions))
        });
        prepared
            .await
            .map_err(|_| unreadable(io::Error::other("the reader was cancelled")))?
    }

    /// Starts the script under the first containment that works.
    async fn start(
        &self,
        restrictions: &Restrictions,
        command: &CommandLine,
        variables: &BTreeMap<OsString, OsString>,
    ) -> Result<(KeeperLink, pipe::Receiver), ScriptError> {
        let mut reasons = Vec::new();
        for &containment in &self.config.containments {
            let (mut keeper, pipe) =
                KeeperLink::start(&self.config, containment, restrictions, command, variables)
                    .map_err(|cause| ScriptError::Keeper {
                        path: self.path.clone(),
                        program: self.config.keeper_program.clone(),
                        cause,
                    })?;
            let reason = match keeper.first_report().await {
                Some(Report::Started { granted, .. }) => {
                    *self.granted.lock() = Some(granted);
                    *self.containment.lock() = Some(containment);
                    return Ok((keeper, pipe));
                }
                Some(Report::Unavailable { reason }) => {
                    keeper.finish(ANSWER_LIMIT).await;
                    tracing::debug!(
                        plugin = self.name,
                        containment = containment.name(),
                        reason,
                        "containment is not available"
                    );
                    reasons.push(format!("{}: {reason}", containment.name()));
                    continue;
                }
                Some(Report::Refused { reason }) => {
                    keeper.finish(ANSWER_LIMIT).await;
                    let path = self.path.clone();
                    return Err(ScriptError::Required { path, reason });
                }
                Some(Report::Failed { reason }) => {
                    keeper.finish(ANSWER_LIMIT).await;
                    reason
                }
                _ => {
                    keeper.abandon(KILL_LIMIT).await;
                    "its keeper did not answer".to_owned()
                }
            };
            let path = self.path.clone();
            return Err(ScriptError::Start { path, reason });
        }
        Err(ScriptError::NoContainment {
            path: self.path.clone(),
            reasons: reasons.join("; "),
        })
    }

    /// Follows the keeper's reports until nothing of the script is left.
    async fn watch(
        &self,
        mut keeper: KeeperLink,
        stop: impl Future<Output = Duration>,
    ) -> Result<ScriptEnd, ScriptError> {
        let mut stop = pin!(stop);
        let mut answer_by: Option<Instant> = None;
        let mut end = ScriptEnd {
            process: None,
            was_stopped: false,
            killed: 0,
            stuck: 0,
        };
        loop {
            let overdue = async {
                match answer_by {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                report = keeper.report() => match report {
                    Some(Report::Ended { end: process }) => {
                        end.process = Some(process);
                        // Whoever asked for the run tells the operator; this is when it happened.
                        tracing::debug!(plugin = self.name, ?process, "the script's own process ended");
                    }
                    Some(Report::Detached { processes }) => tracing::info!(
                        plugin = self.name,
                        processes,
                        "the script left processes running in the background; they count as the plugin"
                    ),
                    Some(Report::Gone { killed }) => {
                        end.killed = killed;
                        break;
                    }
                    Some(Report::Stuck { processes }) => {
                        end.stuck = processes;
                        break;
                    }
                    Some(_) => {}
                    None => return self.keeper_lost(keeper).await,
                },
                grace = &mut stop, if !end.was_stopped => {
                    end.was_stopped = true;
                    keeper.stop(grace).await;
                    answer_by = Instant::now()
                        .checked_add(grace.saturating_add(KILL_LIMIT + ANSWER_LIMIT));
                }
                () = overdue => return self.keeper_lost(keeper).await,
            }
        }
        if end.stuck > 0 {
            tracing::error!(
                plugin = self.name,
                processes = end.stuck,
                "processes did not die of SIGKILL; they are stuck in the kernel"
            );
        } else {
            tracing::info!(
                plugin = self.name,
                killed = end.killed,
                "no process of the script is left"
            );
        }
        keeper.finish(ANSWER_LIMIT).await;
        Ok(end)
    }

    async fn keeper_lost(&self, keeper: KeeperLink) -> Result<ScriptEnd, ScriptError> {
        let is_gone = keeper.abandon(KILL_LIMIT).await;
        tracing::error!(
            plugin = self.name,
            is_gone,
            "the script's keeper was killed or does not answer"
        );
        Err(ScriptError::KeeperLost {
            path: self.path.clone(),
        })
    }

    /// Carries output from the pipe to the log until every process has closed it, or a
    /// little longer than there are processes.
    async fn pump(
        &self,
        mut pipe: pipe::Receiver,
        output: &mut impl ScriptOutput,
        over: &CancellationToken,
    ) {
        let mut pumping = pin!(async {
            let mut buffer = vec![0; READ_BYTES];
            loop {
                match pipe.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(count) => output.write(buffer.get(..count).unwrap_or_default()).await,
                }
            }
        });
        tokio::select! {
            () = &mut pumping => {}
            () = over.cancelled() => {
                if tokio::time::timeout(DRAIN_LIMIT, pumping).await.is_err() {
                    tracing::warn!(
                        plugin = self.name,
                        "the end of the script's output was lost: the log did not take it in time"
                    );
                }
            }
        }
    }
}
