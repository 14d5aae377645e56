//! One plugin in the real sandbox beside a cache, which is mostly made up: what `run`, `test` and
//! `bench` stand on.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use stockade_sandbox::{
    Contract, LogLine, NativeConfig, PluginState, PluginStatus, Services, Supervisor,
    SupervisorConfig,
    host_api::{
        Backlog, CacheChange, CacheEvent, CacheOperation, CacheRequest, CacheStats, CacheWork,
        Code, EventBatch, EventKind, EventSource, KeyFacts, KeysPage, KeysQuery, Pending,
        PluginHost, PluginRun, Refusal, Subscription, Witness,
    },
};
use tokio::sync::mpsc;

use super::local::{self, Local};
use crate::{config::PluginSettings, server::wasm_config};

/// The settings of a server of LMCache 0.5.6, which a plugin is shown where nothing else is said.
const CONFIG: &str = include_str!("../../../../plugin-sdk/abi/lmcache-0.5.6-config.json");

/// Time that a plugin has to start, compiling included, and then to end.
const START_PATIENCE: Duration = Duration::from_secs(120);
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Time between two looks at what has happened.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Lines fetched in one look.
const LINES_AT_ONCE: usize = 1000;

/// Batches of events that may wait for the plugin.
const WAITING_BATCHES: usize = 64;

/// A cache without bytes: keys and numbers as they were given, and a record of what was asked.
#[derive(Default)]
pub(super) struct MadeUpCache {
    state: Mutex<CacheState>,
}

#[derive(Default)]
struct CacheState {
    stats: CacheStats,
    keys: Vec<KeyFacts>,
    /// What the second tier has; `None` where there is none.
    second_tier: Option<Vec<KeyFacts>>,
    pins: HashMap<String, Instant>,
    asked: Vec<String>,
    listener: Option<Listener>,
    cursor: u64,
}

struct Listener {
    types: Option<BTreeSet<EventKind>>,
    events: mpsc::Sender<Vec<CacheEvent>>,
}

/// The events of one subscription.
struct Events {
    batches: mpsc::Receiver<Vec<CacheEvent>>,
    cursor: u64,
}

impl EventSource for Events {
    /// What is made up is made when it is asked for.
    fn backlog(&self) -> Backlog {
        Backlog::new(|| 0)
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        Box::pin(async move {
            let events = self.batches.recv().await?;
            self.cursor += events.len() as u64;
            Some(EventBatch {
                cursor: self.cursor,
                lost: 0,
                events: Box::new(|| events),
            })
        })
    }
}

fn kind(event: &CacheEvent) -> EventKind {
    match event {
        CacheEvent::Stored { .. } => EventKind::Stored,
        CacheEvent::Retrieved { .. } => EventKind::Retrieved,
        CacheEvent::Evicted { .. } => EventKind::Evicted,
        CacheEvent::Lookup { .. } => EventKind::Lookup,
        CacheEvent::SessionEnd { .. } => EventKind::SessionEnd,
    }
}

impl MadeUpCache {
    pub(super) fn set_stats(&self, stats: CacheStats) {
        self.state.lock().stats = stats;
    }

    pub(super) fn set_keys(&self, keys: Vec<KeyFacts>) {
        self.state.lock().keys = keys;
    }

    pub(super) fn set_second_tier(&self, keys: Option<Vec<KeyFacts>>) {
        self.state.lock().second_tier = keys;
    }

    /// What was asked since the last time, such as `cache_stats`, `pin`, `state_set counter` and
    /// `GET http://host/ 200`.
    pub(super) fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().asked)
    }

    /// Notes what is asked of others than the cache.
    fn witness(self: &Arc<Self>) -> Witness {
        let cache = Arc::clone(self);
        Arc::new(move |what| cache.state.lock().asked.push(what))
    }

    /// Hands events to the plugin; false where it has not subscribed.
    pub(super) async fn send(&self, events: Vec<CacheEvent>) -> bool {
        let (sender, wanted) = {
            let state = self.state.lock();
            let Some(listener) = &state.listener else {
                return false;
            };
            let is_wanted = |event: &CacheEvent| {
                let types = listener.types.as_ref();
                types.is_none_or(|types| types.contains(&kind(event)))
            };
            let wanted: Vec<_> = events.into_iter().filter(is_wanted).collect();
            (listener.events.clone(), wanted)
        };
        wanted.is_empty() || sender.send(wanted).await.is_ok()
    }
}

impl PluginHost for MadeUpCache {
    fn tenant_of(&self, _plugin: &str) -> Option<Arc<str>> {
        None
    }

    fn stats(&self, _run: &PluginRun) -> Result<CacheStats, Refusal> {
        let mut state = self.state.lock();
        state.asked.push("cache_stats".to_owned());
        Ok(state.stats.clone())
    }

    fn keys(&self, _run: &PluginRun, query: &KeysQuery) -> Result<KeysPage, Refusal> {
        let mut state = self.state.lock();
        state.asked.push("cache_keys".to_owned());
        let limit = query.limit.unwrap_or(100);
        let is_wanted = |facts: &&KeyFacts| {
            let mut parts = facts.key.split('@');
            let (model, salt) = (parts.next(), parts.nth(3).unwrap_or_default());
            query.after.as_ref().is_none_or(|after| facts.key > *after)
                && query.model.as_deref().is_none_or(|it| Some(it) == model)
                && query.salt.as_deref().is_none_or(|it| it == salt)
        };
        let mut keys: Vec<KeyFacts> = state.keys.iter().filter(is_wanted).cloned().collect();
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        let has_more = keys.len() > limit;
        keys.truncate(limit);
        let next = keys
            .last()
            .filter(|_| has_more)
            .map(|facts| facts.key.clone());
        Ok(KeysPage { keys, next })
    }

    fn request(&self, _run: &PluginRun, request: &CacheRequest) -> Result<CacheWork, Refusal> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let name = match request.op {
            CacheOperation::Pin => "pin",
            CacheOperation::Unpin => "unpin",
            CacheOperation::Evict => "evict",
            CacheOperation::Prefetch => "prefetch",
        };
        state.asked.push(name.to_owned());
        if request.op == CacheOperation::Prefetch {
            let lower = state.second_tier.as_ref().ok_or_else(|| {
                let reason = "there is no second tier here: a test has one with cache.second_tier";
                Refusal::new(Code::Unavailable, reason)
            })?;
            let is_asked = |facts: &&KeyFacts| request.keys.contains(&facts.key);
            let is_new = |facts: &&KeyFacts| state.keys.iter().all(|it| it.key != facts.key);
            let loaded = lower.iter().filter(is_asked).filter(is_new).cloned();
            let loaded: Vec<_> = loaded.collect();
            state.keys.extend(loaded);
        }
        let mut change = CacheChange::default();
        for key in &request.keys {
            let Some(place) = state.keys.iter().position(|facts| facts.key == *key) else {
                change.missing += 1;
                continue;
            };
            change.done += 1;
            match request.op {
                CacheOperation::Pin => {
                    let ttl = Duration::from_millis(request.ttl_ms.unwrap_or(3_600_000));
                    state.pins.insert(key.clone(), Instant::now() + ttl);
                }
                CacheOperation::Unpin => drop(state.pins.remove(key)),
                CacheOperation::Evict => drop(state.keys.remove(place)),
                CacheOperation::Prefetch => {}
            }
        }
        Ok(CacheWork::Done(change))
    }

    fn subscribe(
        &self,
        _run: &PluginRun,
        subscription: &Subscription,
        _most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        let (events, batches) = mpsc::channel(WAITING_BATCHES);
        let mut state = self.state.lock();
        state.asked.push("events_subscribe".to_owned());
        let cursor = subscription.cursor.unwrap_or(state.cursor);
        state.listener = Some(Listener {
            types: subscription.types.clone(),
            events,
        });
        Ok((cursor, Box::new(Events { batches, cursor })))
    }

    fn ended(&self, _run: &PluginRun) {
        let mut state = self.state.lock();
        state.listener = None;
        state.pins.clear();
    }
}

/// A plugin on trial.
pub(super) struct Trial {
    supervisor: Arc<Supervisor>,
    /// Empty and unused beside another cache.
    pub(super) cache: Arc<MadeUpCache>,
    pub(super) name: Arc<str>,
    /// Lines that were fetched.
    seen: u64,
}

impl Trial {
    /// Starts the plugin of a file with these settings of its own, as `--runtime-plugin-config` has
    /// them, beside a made-up cache. Within a runtime.
    ///
    /// # Errors
    /// When it cannot be started at all; one that ends by itself has started.
    pub(super) async fn start(
        file: &Path,
        local: &Local,
        settings: Map<String, Value>,
    ) -> anyhow::Result<Self> {
        let config =
            serde_json::from_str(CONFIG).context("the settings that come with this program")?;
        let cache = Arc::new(MadeUpCache::default());
        let host = Services {
            host: Some(Arc::clone(&cache) as _),
            witness: Some(cache.witness()),
            ..Services::default()
        };
        let mut trial = Self::beside(file, local, settings, config, host).await?;
        trial.cache = cache;
        Ok(trial)
    }

    /// As [`start`](Self::start), beside this cache and with the configuration of its server, over
    /// whose settings for plugins these go.
    ///
    /// # Errors
    /// When it cannot be started at all; one that ends by itself has started.
    pub(super) async fn beside(
        file: &Path,
        local: &Local,
        settings: Map<String, Value>,
        mut config: Value,
        services: Services,
    ) -> anyhow::Result<Self> {
        let server = PluginSettings::load(local.config())?;
        let found = local::read(file, &server)?;
        if let Err(reason) = &found.origin {
            bail!("{} would be refused: {reason}", file.display());
        }
        let environment: Vec<_> = std::env::vars_os().collect();
        let wasm = wasm_config(server.cache_dir.as_deref(), &server.policy)?;
        let supervisor = Supervisor::discover(SupervisorConfig {
            policy: server.policy.clone(),
            native: NativeConfig::new(environment.iter().cloned(), &[]),
            server_environment: environment,
            first_backoff: Duration::from_secs(3600),
            ..SupervisorConfig::new(vec![PathBuf::from(file)], wasm)
        })?;
        supervisor.provide(services);
        let place = &config["mp_config"]["runtime_plugin_config"]["extra_config"];
        let mut extra = place.as_object().cloned().unwrap_or_default();
        extra.extend(settings);
        let extra = Value::Object(extra);
        ensure!(
            config.is_object(),
            "the server's configuration is no object"
        );
        config["runtime_plugin_extra_config"] = extra.clone();
        config["mp_config"]["runtime_plugin_config"]["extra_config"] = extra.clone();
        config["mp_config"]["runtime_plugin_locations"] = json!([file.to_string_lossy()]);
        supervisor.start(&Contract {
            config_json: config.to_string(),
            extra_config_json: extra.to_string(),
        })?;
        let status = supervisor
            .snapshot()
            .pop()
            .with_context(|| format!("{} is no plugin", file.display()))?;
        let mut trial = Self {
            supervisor: Arc::new(supervisor),
            cache: Arc::default(),
            name: status.name,
            seen: 0,
        };
        trial.started().await?;
        Ok(trial)
    }

    async fn started(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + START_PATIENCE;
        loop {
            let status = self.status()?;
            match status.state {
                PluginState::Discovered | PluginState::Prepared => {}
                PluginState::Refused => {
                    let reason = status.last_end.unwrap_or_default();
                    bail!("{} is refused: {reason}", self.name);
                }
                _ => return Ok(()),
            }
            if Instant::now() > until {
                bail!("{} did not start within {START_PATIENCE:?}", self.name);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// What is known of it.
    pub(super) fn status(&self) -> anyhow::Result<PluginStatus> {
        Ok(self.supervisor.status(&self.name)?)
    }

    /// Whether it runs.
    pub(super) fn is_running(&self) -> bool {
        self.status()
            .is_ok_and(|it| it.state == PluginState::Running)
    }

    /// Lines since the last time.
    pub(super) fn take_lines(&mut self) -> anyhow::Result<Vec<LogLine>> {
        let (lines, seen) = self
            .supervisor
            .logs_since(&self.name, self.seen, LINES_AT_ONCE)?;
        self.seen = seen;
        Ok(lines)
    }

    /// The supervisor that runs it.
    pub(super) fn supervisor(&self) -> &Arc<Supervisor> {
        &self.supervisor
    }

    /// Waits until `done` says so, or the time is over; whether it did.
    pub(super) async fn wait(
        &mut self,
        time: Duration,
        mut done: impl FnMut(&mut Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let until = Instant::now() + time;
        loop {
            if done(self)? {
                return Ok(true);
            }
            if Instant::now() > until {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Tells it to end and waits for that.
    pub(super) async fn end(&self) -> anyhow::Result<PluginStatus> {
        self.supervisor.shutdown(END_PATIENCE).await;
        self.status()
    }
}

/// A runtime for a trial: one thread for it, and those for what blocks.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?)
}
