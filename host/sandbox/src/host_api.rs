//! What a plugin may ask of the server and the server of a plugin: the types and rules of
//! `plugin-sdk/abi/README.md`, version 1.
//!
//! The functions that modules import are in `wasm/imports.rs`, the handlers that they export are
//! called by `wasm/reactor.rs`. The cache is behind [`PluginHost`], which the server implements.

mod link;
mod messages;
mod state;
mod tally;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::{runtime::Handle, sync::Semaphore};

pub(crate) use link::{CallAsk, Inbox, Incoming, Link, RankAsk, link};
pub use link::{CallFailure, RankFailure};
pub use messages::{CacheEvent, MakeCandidates, RankCandidate, RankRequest};
pub(crate) use messages::{Message, Wants};
pub(crate) use state::{PluginState as StateMap, StateStore};
pub(crate) use tally::Tally;
pub use tally::{CustomMetric, HandlerCount, Outcome, PluginCounts};

use crate::{log_stream::LogLevel, manifest::Manifest, wasm::WasmError};

/// The imported module's name.
pub const NAMESPACE: &str = "stockade:plugin/v1";
/// What every version's name begins with.
pub const NAMESPACE_FAMILY: &str = "stockade:plugin/";
/// The version's number, as `start` messages tell it.
pub const VERSION: u32 = 1;

/// Longest JSON request, name or key list of one call, in bytes.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Longest payload or reply of a call, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Longest key of a plugin's state, in bytes.
pub const MAX_STATE_KEY_BYTES: usize = 512;
/// Longest name of a timer or a metric, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Timers that one run may have.
pub const MAX_TIMERS: usize = 64;
/// Most keys of one page, or of one request.
pub const MAX_KEYS: usize = 1000;
/// Longest that a pin may last, in milliseconds.
pub const MAX_PIN_MS: u64 = 3_600_000;
/// Most events of one message.
pub const MAX_EVENT_BATCH: usize = 1024;
/// Calls of all plugins that work on the cache at once.
const CACHE_CALLS_AT_ONCE: usize = 2;

/// One thing that a plugin may do with the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheGrant {
    /// Read counters and usage.
    Stats,
    /// List keys.
    Keys,
    /// Hear what happens.
    Events,
    /// Have objects evicted last, for a time.
    Pin,
    /// Have objects evicted now.
    Evict,
    /// Have objects loaded from the second tier.
    Prefetch,
}

impl CacheGrant {
    /// The name in manifests.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stats => "stats",
            Self::Keys => "keys",
            Self::Events => "events",
            Self::Pin => "pin",
            Self::Evict => "evict",
            Self::Prefetch => "prefetch",
        }
    }

    /// The line that grants it.
    #[must_use]
    pub fn line(self) -> String {
        format!("cache = [\"{}\"]", self.name())
    }
}

/// What a function of the namespace needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// `state_kib` above 0.
    State,
    /// One of these; which, depends on the request.
    Cache(&'static [CacheGrant]),
    /// An `[[http]]` table.
    Http,
}

/// The functions of the namespace, and what each needs.
pub const FUNCTIONS: [(&str, Needs); 23] = [
    ("answer_read", Needs::Nothing),
    ("answer_length", Needs::Nothing),
    ("message_read", Needs::Nothing),
    ("message_body_read", Needs::Nothing),
    ("next_message", Needs::Nothing),
    ("reply", Needs::Nothing),
    ("log", Needs::Nothing),
    ("config", Needs::Nothing),
    ("clock_ms", Needs::Nothing),
    ("timer_set", Needs::Nothing),
    ("timer_cancel", Needs::Nothing),
    ("state_get", Needs::State),
    ("state_set", Needs::State),
    ("state_delete", Needs::State),
    ("state_keys", Needs::State),
    ("metric_add", Needs::Nothing),
    ("metric_set", Needs::Nothing),
    ("cache_stats", Needs::Cache(&[CacheGrant::Stats])),
    ("cache_keys", Needs::Cache(&[CacheGrant::Keys])),
    (
        "cache_request",
        Needs::Cache(&[CacheGrant::Pin, CacheGrant::Evict, CacheGrant::Prefetch]),
    ),
    ("events_subscribe", Needs::Cache(&[CacheGrant::Events])),
    ("http_request", Needs::Http),
    ("http_body_read", Needs::Http),
];

/// What a module may export for the server to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Handler {
    /// `stockade_start`.
    Start,
    /// `stockade_timer`.
    Timer,
    /// `stockade_events`.
    Events,
    /// `stockade_call`.
    Call,
    /// `stockade_rank`.
    Rank,
    /// `stockade_shutdown`.
    Shutdown,
}

impl Handler {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Start,
        Self::Timer,
        Self::Events,
        Self::Call,
        Self::Rank,
        Self::Shutdown,
    ];

    /// The export.
    #[must_use]
    pub const fn export(self) -> &'static str {
        match self {
            Self::Start => "stockade_start",
            Self::Timer => "stockade_timer",
            Self::Events => "stockade_events",
            Self::Call => "stockade_call",
            Self::Rank => "stockade_rank",
            Self::Shutdown => "stockade_shutdown",
        }
    }

    /// The kind of its messages, and its name in metrics.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Timer => "timer",
            Self::Events => "events",
            Self::Call => "call",
            Self::Rank => "rank",
            Self::Shutdown => "shutdown",
        }
    }
}

/// What a module wants of the namespace, and whether its plugin gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Requirement {
    /// The imported function or the exported handler.
    pub function: String,
    /// The line of the manifest that grants it; `None` when it needs none.
    pub grant: Option<String>,
    /// Whether the manifest, as far as the server allows, grants it.
    pub granted: bool,
}

/// Looks through a module's imports and exports for what needs a grant.
///
/// `imports` are pairs of module and field; those of other modules are left out.
#[must_use]
pub fn requirements(
    imports: &[(String, String)],
    exports: &[String],
    manifest: &Manifest,
) -> Vec<Requirement> {
    let mut found = Vec::new();
    for (module, field) in imports {
        if module != NAMESPACE {
            continue;
        }
        let needs = FUNCTIONS.iter().find(|(name, _)| name == field);
        let (grant, granted) = match needs.map(|(_, needs)| *needs) {
            None | Some(Needs::Nothing) => (None, needs.is_some()),
            Some(Needs::State) => (
                Some("limits.state_kib = 64".to_owned()),
                manifest.limits.state_kib > 0,
            ),
            Some(Needs::Cache(grants)) => {
                let names: Vec<_> = grants
                    .iter()
                    .map(|grant| format!("\"{}\"", grant.name()))
                    .collect();
                let granted = grants.iter().any(|grant| manifest.cache.contains(grant));
                (Some(format!("cache = [{}]", names.join(", "))), granted)
            }
            Some(Needs::Http) => (
                Some("[[http]] with host, port and methods".to_owned()),
                !manifest.http.is_empty(),
            ),
        };
        found.push(Requirement {
            function: field.clone(),
            grant,
            granted,
        });
    }
    for (handler, grant, granted) in [
        (Handler::Call, "calls = true", manifest.calls),
        (Handler::Rank, "rank = true", manifest.rank),
        (
            Handler::Events,
            "cache = [\"events\"]",
            manifest.cache.contains(&CacheGrant::Events),
        ),
    ] {
        if exports.iter().any(|export| export == handler.export()) {
            found.push(Requirement {
                function: handler.export().to_owned(),
                grant: Some(grant.to_owned()),
                granted,
            });
        }
    }
    found
}

/// Refuses a version of the namespace that this server does not have, and functions that a
/// version does not have. `imports` are pairs of module and field.
///
/// # Errors
/// [`WasmError::ContractVersion`] and [`WasmError::ContractFunction`].
pub fn check_imports<'a>(
    name: &str,
    imports: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<(), WasmError> {
    for (module, field) in imports {
        let is_served = module == NAMESPACE;
        if !is_served && module.starts_with(NAMESPACE_FAMILY) {
            return Err(WasmError::ContractVersion {
                name: name.to_owned(),
                wanted: module.to_owned(),
                served: NAMESPACE,
            });
        }
        let mut functions = FUNCTIONS.iter().map(|(function, _)| *function);
        if is_served && !functions.any(|function| function == field) {
            return Err(WasmError::ContractFunction {
                name: name.to_owned(),
                version: NAMESPACE,
                function: field.to_owned(),
            });
        }
    }
    Ok(())
}

/// Why a call of a plugin came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// Not granted.
    Denied,
    /// Not what the contract says.
    Invalid,
    /// No such thing.
    NotFound,
    /// The plugin's own limit is used up.
    Limit,
    /// It took too long.
    Timeout,
    /// The other side is not there.
    Unavailable,
    /// It makes no sense now.
    State,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Denied,
        Self::Invalid,
        Self::NotFound,
        Self::Limit,
        Self::Timeout,
        Self::Unavailable,
        Self::State,
    ];

    /// The number that the guest gets.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::Denied => -1,
            Self::Invalid => -2,
            Self::NotFound => -3,
            Self::Limit => -4,
            Self::Timeout => -5,
            Self::Unavailable => -6,
            Self::State => -7,
        }
    }

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Limit => "limit",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::State => "state",
        }
    }
}

/// A call that came to nothing: its code, and a sentence for the plugin's author.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// The code.
    pub code: Code,
    /// Why, and the way out.
    pub reason: String,
}

impl Refusal {
    /// A refusal with a reason.
    pub fn new(code: Code, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }

    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::new(Code::Invalid, reason)
    }
}

/// One run of a plugin, as the server knows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PluginRun {
    /// The plugin's name.
    pub plugin: Arc<str>,
    /// Tells its runs apart, also from those of other plugins.
    pub run: u64,
}

impl PluginRun {
    pub(crate) fn new(plugin: Arc<str>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            plugin,
            run: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }
}

/// What `cache_stats` answers; bytes and counts since the server's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheStats {
    /// Size of the pool, or the tenant's cap where the plugin has a tenant with one.
    pub capacity_bytes: u64,
    /// In use, reservations included.
    pub used_bytes: u64,
    /// Objects in the pool.
    pub objects: u64,
    /// Lookups.
    pub lookups: u64,
    /// Tokens that they asked for.
    pub lookup_tokens: u64,
    /// Tokens that they found.
    pub hit_tokens: u64,
    /// Chunks stored.
    pub stored_chunks: u64,
    /// Chunks retrieved.
    pub retrieved_chunks: u64,
    /// Objects evicted.
    pub evicted_objects: u64,
    /// The tenants that the plugin sees.
    pub tenants: Vec<TenantStats>,
}

/// One tenant in [`CacheStats`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TenantStats {
    /// Its name.
    pub name: String,
    /// In use, reservations included.
    pub used_bytes: u64,
    /// What nobody can push it below.
    pub floor_bytes: u64,
    /// What it cannot go beyond.
    pub cap_bytes: Option<u64>,
    /// Its objects.
    pub objects: u64,
}

/// What `cache_keys` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct KeysQuery {
    /// Only keys of this salt.
    pub salt: Option<String>,
    /// Only keys of this model.
    pub model: Option<String>,
    /// Only keys that come after this one.
    pub after: Option<String>,
    /// At most this many, up to [`MAX_KEYS`]; 100 where it is left out.
    pub limit: Option<usize>,
}

impl KeysQuery {
    /// # Errors
    /// A [`Refusal`] that names the field that no query may have so.
    pub fn check(&self) -> Result<(), Refusal> {
        within("limit", self.limit, MAX_KEYS)
    }
}

/// Whether a field, where there is one, is a number from 1 to `most`.
fn within(field: &str, given: Option<usize>, most: usize) -> Result<(), Refusal> {
    match given {
        Some(given) if given == 0 || given > most => Err(Refusal::invalid(format!(
            "{field} is {given}: give 1 to {most}"
        ))),
        _ => Ok(()),
    }
}

/// What `cache_keys` answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeysPage {
    /// The keys.
    pub keys: Vec<KeyFacts>,
    /// `after` of the next page; `None` when this is the last.
    pub next: Option<String>,
}

/// One object in a [`KeysPage`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyFacts {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// Milliseconds since it was last asked for; `None` where nobody keeps count.
    pub idle_ms: Option<u64>,
    /// Whether a plugin has pinned it.
    pub pinned: bool,
}

/// What is to be done with objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheOperation {
    /// Have them evicted last.
    Pin,
    /// End the plugin's pins on them.
    Unpin,
    /// Have them evicted now, unless somebody reads them.
    Evict,
    /// Have them loaded from the second tier.
    Prefetch,
}

impl CacheOperation {
    /// The grant that it needs.
    #[must_use]
    pub const fn grant(self) -> CacheGrant {
        match self {
            Self::Pin | Self::Unpin => CacheGrant::Pin,
            Self::Evict => CacheGrant::Evict,
            Self::Prefetch => CacheGrant::Prefetch,
        }
    }
}

/// What `cache_request` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CacheRequest {
    /// What is to be done.
    pub op: CacheOperation,
    /// With which objects; at most [`MAX_KEYS`].
    pub keys: Vec<String>,
    /// How long a pin lasts; at most [`MAX_PIN_MS`], which it is where it is left out.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
}

/// What `cache_request` answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CacheChange {
    /// Objects with which it was done.
    pub done: u64,
    /// Objects that are not there, or, of an eviction, in use.
    pub missing: u64,
    /// Objects of other tenants.
    pub denied: u64,
}

/// How a `cache_request` goes on.
pub enum CacheWork {
    /// It is done.
    Done(CacheChange),
    /// It goes on, on the server's runtime; dropped, it is given up.
    Pending(Pending<'static, CacheChange>),
}

impl fmt::Debug for CacheWork {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(change) => formatter.debug_tuple("Done").field(change).finish(),
            Self::Pending(_) => formatter.write_str("Pending"),
        }
    }
}

/// A kind of event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// An object became readable.
    Stored,
    /// An object was handed to a worker.
    Retrieved,
    /// An object is gone.
    Evicted,
    /// A request asked how much of its prefix is there.
    Lookup,
    /// A request has ended.
    SessionEnd,
}

/// What `http_request` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HttpRequest {
    /// One of the grant's, in capitals.
    pub method: String,
    /// Absolute, `http` or `https`.
    pub url: String,
    /// Names and values.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Most milliseconds that it may take; the limit holds besides.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// What `http_request` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HttpHead {
    /// The status; a redirect is one like any other.
    pub status: u16,
    /// Names in small letters; values of one name are joined by a comma and a space.
    pub headers: BTreeMap<String, String>,
    /// What `http_body_read` will give.
    pub body_bytes: usize,
}

/// What `events_subscribe` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Subscription {
    /// Only these kinds; all where it is left out.
    pub types: Option<BTreeSet<EventKind>>,
    /// Go on after this event, as far as the server still has what followed; from now on
    /// where it is left out.
    pub cursor: Option<u64>,
    /// Most events of one message, up to [`MAX_EVENT_BATCH`]; 256 where it is left out.
    pub max_batch: Option<usize>,
}

impl Subscription {
    /// # Errors
    /// A [`Refusal`] that names the field that no subscription may have so.
    pub fn check(&self) -> Result<(), Refusal> {
        within("max_batch", self.max_batch, MAX_EVENT_BATCH)
    }
}

/// Events that a plugin is to hear.
pub struct EventBatch {
    /// Number of the last event that was looked at.
    pub cursor: u64,
    /// Events that were dropped before these, because the plugin was behind.
    pub lost: u64,
    /// Makes the events, on the plugin's own time.
    pub events: Box<dyn FnOnce() -> Vec<CacheEvent> + Send>,
}

impl fmt::Debug for EventBatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("EventBatch")
            .field("cursor", &self.cursor)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

/// A future that is boxed.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How many events wait for a subscriber; cheap to clone.
#[derive(Clone)]
pub struct Backlog(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Backlog {
    /// One that `count` counts, which may be called at any time and must not wait.
    pub fn new(count: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(count))
    }

    /// Events that wait now.
    #[must_use]
    pub fn events(&self) -> u64 {
        (self.0)()
    }

    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Backlog {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("Backlog")
            .field(&self.events())
            .finish()
    }
}

/// A subscription's events. Polled on the server's runtime, never on the plugins' thread.
pub trait EventSource: Send + 'static {
    /// How many events wait for it.
    fn backlog(&self) -> Backlog;

    /// The next events, once there are any; `None` when there will be none.
    fn next(&mut self) -> Pending<'_, Option<EventBatch>>;
}

/// The server as plugins see it.
///
/// The methods may block for a short lock. They are called from threads for blocking work, a few
/// at a time over all plugins. What a plugin may do at all is checked before; what belongs to
/// another tenant than the plugin's is for the implementation to refuse.
pub trait PluginHost: Send + Sync + 'static {
    /// The tenant that a plugin belongs to, if it belongs to one.
    fn tenant_of(&self, plugin: &str) -> Option<Arc<str>>;

    /// Counters and usage.
    ///
    /// # Errors
    /// [`Refusal`] with the plugin's answer.
    fn stats(&self, run: &PluginRun) -> Result<CacheStats, Refusal>;

    /// A page of keys.
    ///
    /// # Errors
    /// [`Refusal`] with the plugin's answer.
    fn keys(&self, run: &PluginRun, query: &KeysQuery) -> Result<KeysPage, Refusal>;

    /// Does something with objects, or begins it where it takes longer than a short lock.
    ///
    /// # Errors
    /// [`Refusal`] with the plugin's answer.
    fn request(&self, run: &PluginRun, request: &CacheRequest) -> Result<CacheWork, Refusal>;

    /// Begins a subscription. A plugin that is more than `most_behind` events behind loses the
    /// oldest. Returns the number of the event before the first that it gets.
    ///
    /// # Errors
    /// [`Refusal`] with the plugin's answer.
    fn subscribe(
        &self,
        run: &PluginRun,
        subscription: &Subscription,
        most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal>;

    /// A run has ended, and with it what it holds.
    fn ended(&self, run: &PluginRun);
}

/// What the server has for its plugins.
#[derive(Clone, Default)]
pub struct Services {
    /// The server; without it the calls that need one are `UNAVAILABLE`.
    pub host: Option<Arc<dyn PluginHost>>,
    /// Where plugins' state is kept; without it, in memory until the server ends.
    pub state_dir: Option<PathBuf>,
    /// Who is told of each call of the state and of HTTP, for tests of plugins.
    pub witness: Option<Witness>,
}

/// Is told of a call in a few words, such as `state_set counter` and `GET http://host/ 200`. Called
/// on the guests' thread, so it may not wait.
pub type Witness = Arc<dyn Fn(String) + Send + Sync>;

impl fmt::Debug for Services {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Services")
            .field("host", &self.host.is_some())
            .field("state_dir", &self.state_dir)
            .finish()
    }
}

/// The services as runs use them.
pub(crate) struct Counter {
    pub(crate) host: Option<Arc<dyn PluginHost>>,
    pub(crate) states: StateStore,
    pub(crate) config_json: Arc<str>,
    pub(crate) runtime: Option<Handle>,
    pub(crate) cache_calls: Semaphore,
    pub(crate) witness: Option<Witness>,
}

impl Counter {
    /// Within a runtime, on which what may wait for a lock is done.
    pub(crate) fn new(services: Services, config_json: &str) -> Arc<Self> {
        let runtime = Handle::try_current().ok();
        Arc::new(Self {
            host: services.host,
            states: StateStore::new(services.state_dir, runtime.clone()),
            config_json: config_json.into(),
            runtime,
            cache_calls: Semaphore::new(CACHE_CALLS_AT_ONCE),
            witness: services.witness,
        })
    }
}

/// What a run is granted and held to, as far as the namespace is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) cache: BTreeSet<CacheGrant>,
    pub(crate) calls: bool,
    pub(crate) rank: bool,
    pub(crate) state_bytes: u64,
    pub(crate) call_time: Duration,
    pub(crate) rank_time: Duration,
    pub(crate) queued_events: u64,
    pub(crate) metrics: usize,
}

impl Terms {
    pub(crate) fn of(manifest: &Manifest) -> Self {
        let limits = &manifest.limits;
        Self {
            cache: manifest.cache.clone(),
            calls: manifest.calls,
            rank: manifest.rank,
            state_bytes: u64::from(limits.state_kib) << 10,
            call_time: Duration::from_millis(limits.call_ms.into()),
            rank_time: Duration::from_millis(limits.rank_ms.into()),
            queued_events: limits.queued_events.into(),
            metrics: limits.metrics as usize,
        }
    }

    /// # Errors
    /// [`Code::Denied`], with the line to add.
    pub(crate) fn check_cache(&self, grant: CacheGrant) -> Result<(), Refusal> {
        if self.cache.contains(&grant) {
            return Ok(());
        }
        Err(Refusal::new(
            Code::Denied,
            format!(
                "it is not granted: add {} to the plugin's manifest, and leave it to it in the server's [plugins]",
                grant.line()
            ),
        ))
    }
}

/// What one run gets besides WASI: the plugin's terms, its mail, and what outlives the run.
pub(crate) struct Access {
    pub(crate) run: PluginRun,
    pub(crate) terms: Terms,
    pub(crate) inbox: Inbox,
    pub(crate) tally: Arc<Tally>,
    pub(crate) state: Arc<StateMap>,
    pub(crate) counter: Arc<Counter>,
    /// What the plugin gets to end, as known when it is told.
    pub(crate) grace: Box<dyn Fn() -> Duration + Send + Sync>,
}

impl Access {
    /// For modules that run outside a supervisor: the calls that need nothing, and no mail but
    /// the end.
    pub(crate) fn none(name: Arc<str>, stop: tokio_util::sync::CancellationToken) -> Self {
        let (_, inbox) = link(stop);
        Self {
            run: PluginRun::new(name),
            terms: Terms {
                call_time: Duration::from_secs(1),
                metrics: 32,
                ..Terms::default()
            },
            inbox,
            tally: Arc::default(),
            state: Arc::default(),
            counter: Counter::new(Services::default(), "{}"),
            grace: Box::new(|| Duration::ZERO),
        }
    }
}

/// The link to the run that a plugin's messages go to now.
#[derive(Debug, Default)]
pub(crate) struct Current(RwLock<Option<Link>>);

impl Current {
    pub(crate) fn set(&self, link: Option<Link>) {
        *self.0.write() = link;
    }

    pub(crate) fn get(&self) -> Option<Link> {
        self.0.read().clone()
    }
}

/// Level of a line that a plugin logs, as its number says.
pub(crate) fn level(number: i32) -> Result<LogLevel, Refusal> {
    match number {
        0 => Ok(LogLevel::Error),
        1 => Ok(LogLevel::Warn),
        2 => Ok(LogLevel::Info),
        3 => Ok(LogLevel::Debug),
        4 => Ok(LogLevel::Trace),
        other => Err(Refusal::invalid(format!(
            "level is {other}: give 0 (error) to 4 (trace)"
        ))),
    }
}
