//! Attacks the limits of a plugin as it would run here, and measures what comes through.
//!
//! Each attack is a guest that takes what it can get, run by the same runtime, the same log and
//! under the same grants as the plugin, in a process of its own. What was declared and what is
//! applied come in two values, which are one and the same outside tests: a test lifts one limit
//! of what is applied, and sees that its attack succeeds.

mod arena;
mod contract;
mod grants;
mod http;
#[cfg(debug_assertions)]
mod lift;
mod memory;
mod module;
mod output;
mod time;

use std::{path::Path, sync::Arc};

use self::arena::Arena;
use crate::{
    grants::Access,
    host_api::{CacheGrant, EventSource, Subscription, Terms},
    limit::Limit,
    log_stream::LogLimits,
    manifest::Manifest,
    outbound::Network,
    supervisor::wasm_limits,
    wasm::{
        CompileLimits, Compiler, GUEST_STACK, Lift, ModuleForm, WasmConfig, WasmError, WasmLimits,
        WasmRuntime,
    },
};

/// 18 KiB of code that take the compiler minutes and gigabytes.
const BOMB_DEPTH: usize = 1000;
/// Names of attacks that are not those of one limit.
const MEMORIES: &str = "memory_bytes over three memories";
const KILL: &str = Lift::KILL.name();
const ENVIRONMENT: &str = "environment";
const DIRECTORIES: &str = "directories";
const NETWORK: &str = Lift::NETWORK.name();
const LINKS: &str = Lift::LINKS.name();
const ADDRESSES: &str = "http addresses";
const COMPILE: &str = "compile_ms, compile_memory_bytes";

/// All attacks, in the order in which they are made: one for each [`Limit`], under its name, and
/// those on what is no number. One plugin meets those that its grants give a ground for.
pub const ATTACKS: [&str; 37] = [
    Limit::Memory.name(),
    MEMORIES,
    Limit::Memories.name(),
    Limit::TableElements.name(),
    Limit::Tables.name(),
    Limit::Instances.name(),
    Limit::Stack.name(),
    Limit::Cpu.name(),
    Limit::CpuBurst.name(),
    Limit::StartTime.name(),
    Limit::RunTime.name(),
    KILL,
    Limit::Environment.name(),
    ENVIRONMENT,
    DIRECTORIES,
    NETWORK,
    LINKS,
    Limit::OpenFiles.name(),
    Limit::HostCallTime.name(),
    Limit::DirectoryBytes.name(),
    Limit::HttpHosts.name(),
    ADDRESSES,
    Limit::HttpRequests.name(),
    Limit::HttpTime.name(),
    Limit::HttpBody.name(),
    Limit::CallTime.name(),
    Limit::RankTime.name(),
    Limit::StateBytes.name(),
    Limit::QueuedEvents.name(),
    Limit::Metrics.name(),
    Limit::LogLines.name(),
    Limit::LogBytes.name(),
    Limit::LogLineBytes.name(),
    Limit::ModuleBytes.name(),
    Limit::Functions.name(),
    Limit::Names.name(),
    COMPILE,
];

/// Everything that a plugin is held to.
#[derive(Debug, Clone)]
pub struct Held {
    /// What a run may use.
    pub limits: WasmLimits,
    /// What its stack may take, in bytes.
    pub stack_bytes: usize,
    /// What it may print.
    pub log: LogLimits,
    /// What compiling may take.
    pub compile: CompileLimits,
    /// What a module may be made of.
    pub form: ModuleForm,
    /// Loops within loops of the module that the compiler is attacked with; the more, the more
    /// generous a limit it reaches.
    pub bomb_depth: usize,
    /// Directories in place of those that the manifest names, which an attack must not touch:
    /// none, for a plugin that has none.
    pub directories: Option<Access>,
    /// How many of an attack's two hosts are granted, in place of those that the manifest names.
    pub http_hosts: usize,
    /// Whether names of hosts may lead to this machine.
    #[cfg(debug_assertions)]
    trusts_names: bool,
    /// What it may do by the calls of the contract.
    terms: Terms,
    /// The environment of a run.
    pub environment: Vec<(String, String)>,
}

impl Held {
    /// What a manifest and the server's settings hold a plugin to.
    #[must_use]
    pub fn new(manifest: &Manifest, compile: CompileLimits) -> Self {
        let most = manifest.directories.values().map(|it| it.access).max();
        Self {
            limits: wasm_limits(manifest),
            stack_bytes: GUEST_STACK,
            log: manifest.log_limits(),
            compile,
            form: ModuleForm::default(),
            bomb_depth: BOMB_DEPTH,
            directories: most,
            http_hosts: usize::from(!manifest.http.is_empty()),
            #[cfg(debug_assertions)]
            trusts_names: false,
            terms: Terms::of(manifest),
            environment: manifest
                .env
                .iter()
                .map(|name| (name.clone(), "granted".to_owned()))
                .collect(),
        }
    }

    fn network(&self) -> Network {
        let network = Network::default().with_resolver(Arc::new(http::LeadsHere));
        #[cfg(debug_assertions)]
        if self.trusts_names {
            return network.trusting_names();
        }
        network
    }

    /// Whether a plugin that is held to this gives an attack anything to try.
    fn is_attacked(&self, what: &str) -> bool {
        let files = [
            LINKS,
            Limit::OpenFiles.name(),
            Limit::HostCallTime.name(),
            Limit::DirectoryBytes.name(),
        ];
        let requests = [
            Limit::HttpRequests.name(),
            Limit::HttpTime.name(),
            Limit::HttpBody.name(),
        ];
        if files.contains(&what) {
            self.directories.is_some()
        } else if requests.contains(&what) {
            self.http_hosts > 0
        } else if what == Limit::QueuedEvents.name() {
            self.terms.cache.contains(&CacheGrant::Events)
        } else if what == Limit::RunTime.name() {
            self.limits.run_time.is_some()
        } else {
            true
        }
    }
}

/// What one attack came to.
#[derive(Debug, Clone)]
pub struct Proof {
    /// What was attacked, one of [`ATTACKS`].
    pub what: &'static str,
    /// What was declared.
    pub declared: String,
    /// What was measured.
    pub measured: String,
    /// Whether it held.
    pub holds: bool,
}

/// A server whose events come as they are asked for. It is what keeps [`Limit::QueuedEvents`], so
/// the attack on that needs its own.
#[derive(Clone)]
pub struct Flood {
    /// Begins a subscription, as [`PluginHost::subscribe`](crate::PluginHost::subscribe).
    pub subscribe: Arc<Subscribe>,
    /// Makes so many events happen.
    pub events: Arc<dyn Fn(u64) + Send + Sync>,
}

/// Of a subscription and how far it may be behind: the number of the event before its first, and its
/// events.
pub type Subscribe = dyn Fn(&Subscription, u64) -> (u64, Box<dyn EventSource>) + Send + Sync;

/// Why nothing could be proven.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The sandbox or a guest cannot be had.
    #[error(transparent)]
    Wasm(#[from] WasmError),
    /// A directory or a listener for the attacks cannot be made.
    #[error("the attacks need a directory and a port: {0}")]
    Directory(#[from] std::io::Error),
}

/// Attacks every limit of `declared` in a sandbox that applies `applied`, with `scratch` as
/// the directory to work in, or the one attack that `only` names. Calls `tell` with each proof as
/// it comes; takes half a minute, and as long as starting, host calls and compiling may take.
/// `declared` and `applied` are the same outside tests. `flood` is the server's part in the attack
/// on `queued_events`.
///
/// # Errors
/// [`ProveError`] when the attacks could not be made.
pub async fn prove(
    declared: &Held,
    applied: &Held,
    compiler: Compiler,
    scratch: &Path,
    only: Option<&str>,
    flood: Flood,
    mut tell: impl FnMut(&Proof),
) -> Result<Vec<Proof>, ProveError> {
    let runtime = WasmRuntime::start(WasmConfig {
        cache_dir: scratch.join("cache"),
        compiler,
        compile_limits: applied.compile,
        form: applied.form,
        network: Arc::new(applied.network()),
        stack_bytes: applied.stack_bytes,
    })?;
    let arena = Arena {
        runtime: Arc::new(runtime),
        declared,
        applied,
        scratch: scratch.to_owned(),
        flood,
    };
    let mut proofs = Vec::new();
    for what in ATTACKS {
        if only.is_some_and(|only| only != what) || !declared.is_attacked(what) {
            continue;
        }
        let proof = arena.make(what).await?;
        tell(&proof);
        proofs.push(proof);
    }
    Ok(proofs)
}

impl Arena<'_> {
    async fn make(&self, what: &'static str) -> Result<Proof, ProveError> {
        let limit = Limit::ALL.into_iter().find(|limit| limit.name() == what);
        let Some(limit) = limit else {
            return match what {
                MEMORIES => self.memories().await,
                KILL => self.kill().await,
                ENVIRONMENT => self.environment().await,
                DIRECTORIES => self.no_directory().await,
                NETWORK => self.network().await,
                LINKS => self.escape().await,
                ADDRESSES => self.http_addresses().await,
                _ => Ok(self.compile().await),
            };
        };
        match limit {
            Limit::Memory => self.memory().await,
            Limit::Memories => self.memory_count().await,
            Limit::TableElements => self.table_elements().await,
            Limit::Tables => self.tables().await,
            Limit::Instances => self.instances().await,
            Limit::Stack => self.stack().await,
            Limit::Cpu => self.cpu().await,
            Limit::CpuBurst => self.cpu_burst().await,
            Limit::StartTime => self.start_time().await,
            Limit::RunTime => self.run_time().await,
            Limit::HostCallTime => self.host_call_time().await,
            Limit::Environment => self.environment_size().await,
            Limit::OpenFiles => self.open_files().await,
            Limit::DirectoryBytes => self.directory_bytes().await,
            Limit::LogLines => self.log_lines().await,
            Limit::LogBytes => self.log_bytes().await,
            Limit::LogLineBytes => self.log_line().await,
            Limit::ModuleBytes | Limit::Functions | Limit::Names => Ok(self.module_form(limit)),
            Limit::CompileTime | Limit::CompileMemory => Ok(self.compile().await),
            Limit::HttpHosts => self.http_hosts().await,
            Limit::HttpRequests => self.http_rate().await,
            Limit::HttpTime => self.http_time().await,
            Limit::HttpBody => self.http_body().await,
            Limit::CallTime => self.call_time().await,
            Limit::RankTime => self.rank_time().await,
            Limit::StateBytes => self.state_bytes().await,
            Limit::QueuedEvents => self.queued_events().await,
            Limit::Metrics => self.metrics().await,
        }
    }
}
