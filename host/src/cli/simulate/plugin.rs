//! A plugin that ranks, as a policy of the simulator.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use stockade_cache::{Candidate, Ranker};
use stockade_sandbox::{
    Contract, NativeConfig, NativePolicy, PluginState, Policy, RankRequest, Supervisor,
    SupervisorConfig,
};
use tokio::runtime::Runtime;

use crate::{plugin_host::shown, server::wasm_config};

/// What a ranking gets here: not the manifest's `rank_ms`, because what is asked is which order
/// the plugin gives and not how fast this machine is.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a plugin gets to be compiled and started.
const START: Duration = Duration::from_secs(120);
/// What it gets to end.
const END: Duration = Duration::from_secs(1);

/// One plugin in a sandbox of its own, without a server.
pub(super) struct PluginPolicy {
    runtime: Runtime,
    supervisor: Arc<Supervisor>,
    name: Arc<str>,
    fallbacks: AtomicU64,
}

impl PluginPolicy {
    /// Starts the plugin of a file.
    ///
    /// # Errors
    /// When it cannot be run, or does not rank.
    pub(super) fn start(file: &Path) -> anyhow::Result<Arc<Self>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let policy = Policy::default();
        let wasm = wasm_config(None, &policy)?;
        let mut native = NativeConfig::new(Vec::new(), &[]);
        native.policy = NativePolicy::Deny;
        let supervisor = Supervisor::discover(SupervisorConfig {
            policy,
            native,
            ..SupervisorConfig::new(vec![file.to_owned()], wasm)
        })?;
        let supervisor = Arc::new(supervisor);
        let Some(name) = supervisor.rankers().into_iter().next() else {
            bail!(
                "{} does not rank: its manifest needs rank = true",
                file.display()
            );
        };
        {
            let _within = runtime.enter();
            let contract = Contract {
                config_json: "{}".to_owned(),
                extra_config_json: "{}".to_owned(),
            };
            supervisor.start(&contract)?;
        }
        let deadline = Instant::now() + START;
        loop {
            let status = supervisor.status(&name)?;
            match status.state {
                PluginState::Running => break,
                PluginState::Discovered | PluginState::Prepared if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => bail!(
                    "{} does not run: {}",
                    file.display(),
                    status
                        .last_end
                        .unwrap_or_else(|| "it did not start in time".to_owned())
                ),
            }
        }
        Ok(Arc::new(Self {
            runtime,
            supervisor,
            name,
            fallbacks: AtomicU64::new(0),
        }))
    }

    /// Rounds of eviction that took the native order, because the plugin gave none.
    pub(super) fn fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }
}

impl Ranker for PluginPolicy {
    fn ranks(&self, _tenant: &str) -> bool {
        true
    }

    fn rank(
        &self,
        tenant: &Arc<str>,
        bytes_wanted: u64,
        candidates: Vec<Candidate>,
    ) -> Option<Vec<u32>> {
        let request = RankRequest {
            tenant: Arc::clone(tenant),
            bytes_wanted,
            count: candidates.len(),
            candidates: Box::new(move || candidates.into_iter().zip(0..).map(shown).collect()),
        };
        let order = self.supervisor.rank_within(&self.name, request, PATIENCE);
        if order.is_err() {
            self.fallbacks.fetch_add(1, Ordering::Relaxed);
        }
        order.ok()
    }
}

impl Drop for PluginPolicy {
    fn drop(&mut self) {
        self.runtime.block_on(self.supervisor.shutdown(END));
    }
}

/// A policy as `--policy` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PolicyChoice {
    /// One of the server's own.
    Native(stockade_cache::PolicyKind),
    /// A plugin over LRU: `plugin:FILE`.
    Plugin(PathBuf),
}

impl PolicyChoice {
    /// The name in tables.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Native(kind) => kind.name().to_owned(),
            Self::Plugin(file) => {
                let name = file.file_stem().unwrap_or_default();
                format!("plugin:{}", name.to_string_lossy())
            }
        }
    }
}

impl std::str::FromStr for PolicyChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text.strip_prefix("plugin:") {
            Some(file) => Ok(Self::Plugin(file.into())),
            None => text.parse().map(Self::Native).map_err(
                |error: stockade_cache::eviction::UnknownPolicy| {
                    anyhow!("{error}, or plugin:FILE for a plugin that ranks")
                },
            ),
        }
    }
}
