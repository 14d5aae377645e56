//! One operation, one function: a decoded request becomes calls on the cache and a reply.
//!
//! Around each of them stand a deadline and a panic fence, so that every request with an
//! address is answered. Follows the handlers in `lmcache/v1/multiprocess/modules/`.

mod control;
mod hash_log;
mod hints;
mod kv_events;
mod lapsed;
mod latencies;
mod lmcache_driven;
mod metrics;
mod modules;
mod observers;
mod probe;
mod purge;
mod retrieve;
mod sessions;
mod store;
#[cfg(test)]
mod tests;
mod warm;
mod workers;

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
};
use serde_json::{Value, json};
use stockade_cache::{CacheEngine, CacheSalt, KeyScope, TokenHasher, kv_rank};
use stockade_sandbox::Supervisor;
use stockade_transport::{
    DisconnectReason, Frames, Handler, Limit, Message, Outcome, Peer, PeerAddress, ProtocolError,
    Turn,
};
use stockade_wire::{
    CacheKey, Envelope, InstanceId, Operation, Request, Response, error_reply, reply,
};

use self::{
    control::P2pTasks,
    hash_log::HashLog,
    hints::Expiry,
    kv_events::KvEvents,
    lapsed::{Lapsed, RECONNECT_WINDOW},
    lmcache_driven::Copies,
    metrics::ServiceMetrics,
    observers::Observers,
    sessions::SessionId,
    sessions::Sessions,
    store::TransferRange,
    workers::{Orphan, TransferKey, Worker, WorkerId, Workers},
};
use tokio::{runtime::Handle, sync::Notify};

use crate::coordinator::CoordinatorEvents;
use crate::{
    plugin_host::EventLog,
    telemetry::CauseLimiter,
    tenancy::{
        self, Caller, DENIED_SALT, Denial, Denied, GivingWay, Realm, Tenancy, TooManyInFlight,
    },
    tier::Tier,
    traces::{Answered, Place, Traces},
};

pub use hash_log::HashLogSettings;
pub use latencies::Snapshot as LatencySnapshot;
pub use metrics::Activity;
pub(crate) use metrics::{Names, SaltCounts, SaltLabels, observe_throughput, throughput};
pub use probe::{PROBE_TENANT, ProbeReport};
pub use purge::{Leaving, PurgeError, digest_of, seal};
pub use warm::{WarmError, WarmKeys};

/// Requests up to this size are handled where they were read; larger ones take milliseconds,
/// and go to a thread of their own so that the connections beside them do not wait.
const INLINE_BYTES: usize = 192 << 10;

/// A reply, or the sentence for the error reply.
type Answer = Result<Response, String>;

/// Settings of the request path.
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    /// Time in which every request is answered.
    pub deadline: Duration,
    /// Silence after which a worker that pinged is reaped; zero never.
    pub worker_reap_timeout: Duration,
    /// Silence after which a worker that never pinged is reaped.
    pub worker_registration_grace: Duration,
    /// Idle time after which a session is reaped.
    pub session_ttl: Duration,
    /// Life of a write reservation.
    pub write_ttl: Duration,
    /// Life of a read lease.
    pub read_ttl: Duration,
    /// Records kept for KV-event subscribers.
    pub kv_event_log_size: usize,
    /// Where the spans of requests go.
    pub traces: Traces,
    /// Who tells the fleet's coordinator what is here.
    pub coordinator: CoordinatorEvents,
    /// Who may copy.
    pub transfer_mode: TransferMode,
    /// The block id that engines pass for blocks that hold nothing.
    pub null_block_id: i64,
    /// Where lookups are logged, if they are.
    pub lookup_hash_log: Option<HashLogSettings>,
}

/// Who copies KV between engine and cache, as LMCache's `--supported-transfer-mode` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferMode {
    /// Whoever the engine's registration says.
    Auto,
    /// Engines only.
    EngineDriven,
    /// This server only.
    LmcacheDriven,
}

impl TransferMode {
    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "auto" => Self::Auto,
            "engine_driven" => Self::EngineDriven,
            "lmcache_driven" => Self::LmcacheDriven,
            _ => return None,
        })
    }

    fn serves(self, operation: Operation) -> bool {
        match operation {
            Operation::RegisterKvCache
            | Operation::UnregisterKvCache
            | Operation::Store
            | Operation::Retrieve => self != Self::EngineDriven,
            Operation::RegisterKvCacheEngineDrivenContext
            | Operation::PrepareStore
            | Operation::PrepareRetrieve => self != Self::LmcacheDriven,
            _ => true,
        }
    }
}

/// Shortest and longest time between two looks at a process whose connection has closed. A
/// process that dies closes its connections just before.
const DEATH_CHECK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

/// The request path: all operations over one cache engine.
pub struct Service {
    engine: Arc<CacheEngine>,
    hasher: TokenHasher,
    tenancy: Arc<Tenancy>,
    settings: ServiceSettings,
    limits: stockade_wire::Limits,
    workers: Workers,
    sessions: Sessions,
    events: Arc<KvEvents>,
    plugin_events: Arc<EventLog>,
    plugins: OnceLock<Weak<Supervisor>>,
    hash_log: Option<HashLog>,
    p2p: P2pTasks,
    tier: Option<Arc<Tier>>,
    metrics: ServiceMetrics,
    log: CauseLimiter,
    lapsed: Lapsed,
    copies: Copies,
    expiry: Expiry,
    started: Instant,
    stored: Notify,
    maintenance_rounds: AtomicU64,
    draining: AtomicBool,
}

impl Service {
    /// A service over `engine` and perhaps a second tier; becomes the engine's observer and
    /// registers its metrics.
    ///
    /// # Errors
    /// When lookups cannot be logged.
    pub fn new(
        engine: Arc<CacheEngine>,
        hasher: TokenHasher,
        tenancy: Arc<Tenancy>,
        settings: ServiceSettings,
        tier: Option<Arc<Tier>>,
        registry: &mut Registry,
    ) -> io::Result<Arc<Self>> {
        let metrics = ServiceMetrics::register(registry);
        if let Some(tier) = &tier {
            tier.register(registry);
            tier.report_to(&settings.coordinator);
        }
        let counts = hash_log::Counts::register(registry);
        let hash_log = match &settings.lookup_hash_log {
            Some(wanted) => Some(HashLog::open(wanted.clone(), counts)?),
            None => None,
        };
        let events = Arc::new(KvEvents::new(
            settings.kv_event_log_size,
            Arc::clone(&tenancy),
        ));
        let plugin_events = EventLog::new(hasher.chunk_size());
        engine.set_observer(Arc::new(Observers(vec![
            Arc::clone(&events) as _,
            Arc::new(settings.coordinator.clone()),
            Arc::clone(&plugin_events) as _,
        ])));
        let sessions = Sessions::new(settings.traces.clone());
        Ok(Arc::new(Self {
            engine,
            hasher,
            tenancy,
            settings,
            limits: stockade_wire::Limits {
                between: tenancy::breathe,
                ..stockade_wire::Limits::default()
            },
            workers: Workers::default(),
            sessions,
            events,
            plugin_events,
            plugins: OnceLock::new(),
            hash_log,
            p2p: P2pTasks::default(),
            tier,
            metrics,
            log: CauseLimiter::default(),
            lapsed: Lapsed::default(),
            copies: Copies::default(),
            expiry: Expiry::default(),
            started: Instant::now(),
            stored: Notify::new(),
            maintenance_rounds: AtomicU64::new(0),
            draining: AtomicBool::new(false),
        }))
    }

    /// Writes what is still to be logged of lookups and denials, as far as a moment allows. May
    /// block.
    pub fn end_logs(&self) {
        self.tenancy.audit().end();
        if let Some(log) = &self.hash_log {
            log.end();
        }
    }

    /// Who tells the fleet's coordinator what is here.
    #[must_use]
    pub fn coordinator(&self) -> &CoordinatorEvents {
        &self.settings.coordinator
    }

    /// The engine behind it.
    #[must_use]
    pub fn engine(&self) -> &CacheEngine {
        &self.engine
    }

    /// What happens, for plugins that want to hear of it.
    pub(crate) fn plugin_events(&self) -> Arc<EventLog> {
        Arc::clone(&self.plugin_events)
    }

    /// What was done for the salts that are wanted, as far as they have a label of their own.
    pub(crate) fn counts_of(&self, wanted: impl Fn(&str) -> bool) -> SaltCounts {
        self.metrics.counts_of(wanted)
    }

    /// Has these plugins serve `server_module_call`.
    pub fn serve_modules(&self, plugins: &Arc<Supervisor>) {
        let _ = self.plugins.set(Arc::downgrade(plugins));
    }

    /// The bytes of the objects of a scope, while a worker is registered that has such.
    pub(crate) fn object_bytes(&self, scope: &KeyScope) -> Option<u64> {
        self.workers
            .object_bytes(&scope.model_name, scope.object_group_id)
    }

    /// The second tier, if there is one.
    #[must_use]
    pub fn tier(&self) -> Option<&Arc<Tier>> {
        self.tier.as_ref()
    }

    /// Who calls, and what they may.
    #[must_use]
    pub fn tenancy(&self) -> &Arc<Tenancy> {
        &self.tenancy
    }

    /// Whether a worker's KV goes through the shared segment.
    fn shares_memory(&self, worker: &Worker) -> bool {
        worker.has_segment && self.engine.shm_name().is_some()
    }

    /// Runs a decoded request; streams and control frames are handled by the caller.
    fn run(&self, caller: &Caller, peer: &Peer, request: &Request, deadline: Instant) -> Answer {
        if let Some(operation) = request.operation()
            && !self.settings.transfer_mode.serves(operation)
        {
            return Err(control::way_out(operation));
        }
        match request {
            Request::Noop => Ok(Response::Ok),
            Request::GetChunkSize => Ok(Response::Int(self.hasher.chunk_size() as i64)),
            Request::GetExperimental => self.experimental(),
            Request::Ping { instance_id } => self.ping(caller, peer, *instance_id),
            Request::Register(context) => self.register(caller, peer, context),
            Request::Unregister { instance_id } => self.unregister(caller, *instance_id),
            Request::RegisterKvCache(registration) => {
                self.register_kv_cache(caller, peer, registration)
            }
            Request::UnregisterKvCache { instance_id } => {
                self.unregister_kv_cache(caller, peer, *instance_id)
            }
            Request::Store {
                key,
                instance_id,
                block_ids,
            } => self.store(caller, peer, key, *instance_id, block_ids, deadline),
            Request::Retrieve {
                key,
                instance_id,
                block_ids,
                skip_tokens,
            } => {
                let skip = *skip_tokens;
                self.retrieve(caller, peer, key, *instance_id, block_ids, skip, deadline)
            }
            Request::PrepareStore { key, instance_id } => {
                self.prepare_store(caller, peer, key, *instance_id)
            }
            Request::CommitStore {
                key,
                instance_id,
                data,
            } => self.commit_store(caller, key, *instance_id, data),
            Request::PrepareRetrieve { key, instance_id } => {
                self.prepare_retrieve(caller, key, *instance_id)
            }
            Request::CommitRetrieve { key, instance_id } => {
                self.commit_retrieve(caller, key, *instance_id)
            }
            Request::Lookup { key } => self.lookup(caller, key),
            Request::FreeLookupLocks { key } => self.free_lookup_locks(caller, key),
            Request::QueryPrefetchStatus { request_id }
            | Request::WaitPrefetchStatus { request_id, .. } => {
                self.prefetch_status(caller, request_id)
            }
            Request::EndSession { request_id } => self.end_session(caller, request_id),
            Request::Clear { force } => self.clear(caller, *force),
            Request::ReportBlockAllocation { records, .. } => {
                self.metrics.blocks_allocated(records.len());
                Ok(Response::None)
            }
            // As a 0.5.6 server without P2P answers: a task that finds nothing.
            Request::P2pLookupAndLock { keys } => {
                Ok(Response::Int(self.p2p.begin(caller.realm(), *keys)))
            }
            Request::P2pQueryLookupResults { task_id } => Ok(self
                .p2p
                .collect(caller.realm(), *task_id)
                .map_or(Response::None, Response::P2pAddresses)),
            Request::P2pUnlockObjects => Ok(Response::None),
            Request::Unsupported(operation) => Err(control::way_out(*operation)),
            other => Err(format!(
                "{} is not served",
                other.operation().map_or("a stream", Operation::name)
            )),
        }
    }

    /// Decodes, runs and encodes one request.
    fn answer(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        frames: Frames,
        started: Instant,
    ) -> Option<Frames> {
        let traces = &self.settings.traces;
        let began = traces.is_on().then(SystemTime::now);
        let (envelope, request) = match stockade_wire::decode(frames, &self.limits) {
            Ok(decoded) => decoded,
            Err(rejected) => {
                if let Some(began) = began {
                    let reason = rejected.error.reason();
                    let span = Answered::rejected(rejected.operation, reason);
                    traces.answered(&Place::Alone, began, span);
                }
                return self.reject(peer, &rejected);
            }
        };
        match &request {
            Request::StreamAck => {
                self.events.acknowledge(peer.id(), &envelope.uid);
                return None;
            }
            Request::StreamCancel => {
                self.events.cancel(peer.id(), &envelope.uid);
                return None;
            }
            _ => {}
        }
        let operation = request.operation()?;
        let caller = self.tenancy.caller(peer);
        // Before, because the request may end its session; held until its span is handed in.
        let place = began.map(|_| self.sessions.place(&caller, &request));
        let run = || match &request {
            Request::SubscribeKvEvents {
                instance_id,
                model_name,
                cursor,
                max_events,
            } => {
                let model_name = Arc::clone(model_name);
                self.events
                    .subscribe(
                        &caller,
                        peer,
                        &envelope,
                        *instance_id,
                        model_name,
                        *cursor,
                        *max_events,
                    )
                    .map(|()| None)
            }
            request => self
                .run(&caller, peer, request, started + self.settings.deadline)
                .map(Some),
        };
        let mut failure = "refused";
        let answer = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
            failure = "panic";
            self.metrics.failed(Some(operation), "panic");
            Err("the server failed at this request and goes on; its log says more".to_owned())
        });
        self.metrics.answered(operation, started.elapsed());
        if let (Some(began), Some(place)) = (began, place) {
            // Or the request began it.
            let place = match place {
                Place::Alone => self.sessions.place(&caller, &request),
                known => known,
            };
            let span = Answered::of(&request, self.hasher.chunk_size());
            let span = match &answer {
                Ok(response) => span.with(response.as_ref()),
                Err(_) => span.failed(failure),
            };
            traces.answered(&place, began, span);
        }
        match answer {
            Ok(response) => response.map(|response| reply(&envelope, &response)),
            Err(sentence) => {
                self.metrics.failed(Some(operation), "refused");
                self.log.warn("refused", || {
                    format!("{} from {}: {sentence}", operation.name(), peer.address())
                });
                Some(self.refusal(&envelope, Some(operation), &sentence))
            }
        }
    }

    /// The reply to a request that is not served: the negative result that the operation has in
    /// its type, or else an error reply.
    ///
    /// An engine takes the first for a miss, or for a store that did not happen; the second
    /// becomes an exception in its worker.
    fn refusal(&self, envelope: &Envelope, operation: Option<Operation>, sentence: &str) -> Frames {
        let served = operation.filter(|&it| self.settings.transfer_mode.serves(it));
        let negative = match served {
            Some(Operation::CommitStore | Operation::CommitRetrieve) => Response::Bool(false),
            Some(Operation::PrepareRetrieve) => retrieve::miss(),
            Some(Operation::Store | Operation::Retrieve) => lmcache_driven::not_done(),
            Some(Operation::QueryPrefetchStatus | Operation::WaitPrefetchStatus) => {
                Response::OptionalInt(Some(0))
            }
            _ => return error_reply(envelope, sentence),
        };
        reply(envelope, &negative)
    }

    fn reject(&self, peer: &Peer, rejected: &stockade_wire::Rejected) -> Option<Frames> {
        let reason = rejected.error.reason();
        self.metrics.failed(rejected.operation, reason);
        self.log.warn(reason, || {
            format!(
                "request from {} refused: {}",
                peer.address(),
                rejected.error
            )
        });
        let envelope = rejected.envelope.as_ref()?;
        let sentence = rejected.error.to_string();
        Some(self.refusal(envelope, rejected.operation, &sentence))
    }

    /// Counts and logs a negative result that the operation has in its type.
    fn refused(&self, operation: &'static str, field: &'static str, problem: &str) {
        self.metrics
            .failed(Operation::from_name(operation), "negative");
        self.log
            .warn(operation, || format!("{operation}: {field}: {problem}"));
    }

    fn worker(&self, caller: &Caller, instance_id: InstanceId) -> Result<Arc<Worker>, String> {
        let id = WorkerId::new(caller, instance_id);
        let Some(worker) = self.workers.get(&id) else {
            self.lapsed.note(&id);
            return Err(format!(
                "instance_id {instance_id} is not registered, or was reaped: register it again"
            ));
        };
        if worker.paged.is_some() {
            return Err(format!(
                "instance_id {instance_id} left the copying to the server: use store and retrieve, or register_kv_cache_engine_driven_context"
            ));
        }
        worker.touch();
        Ok(worker)
    }

    /// Whether a connection may be that of an engine that outlived the last server.
    fn is_survivor(&self, peer: &Peer) -> bool {
        peer.connected_at().saturating_duration_since(self.started) < RECONNECT_WINDOW
    }

    /// The salt that a key is about: the one place where what a request says becomes what it
    /// may have.
    ///
    /// A salt that is not the caller's becomes one that has no objects, so that the request goes
    /// the whole way of one that finds nothing and its time tells nothing either.
    fn salt(
        &self,
        caller: &Caller,
        operation: &'static str,
        key: &CacheKey,
    ) -> Result<CacheSalt, String> {
        let asked = CacheSalt::parse(&key.cache_salt)
            .map_err(|error| format!("cache_salt of key: {error}"))?;
        Ok(caller.salt(&asked).unwrap_or_else(|denial| {
            let audit = self.tenancy.audit();
            audit.denied(caller, denial, operation, Some(asked.as_str()));
            caller.denied_salt()
        }))
    }

    fn scope(
        &self,
        key: &CacheKey,
        rank: u32,
        object_group_id: u32,
        cache_salt: CacheSalt,
    ) -> Result<Arc<KeyScope>, String> {
        let kv_rank = kv_rank(key.world_size, rank).ok_or_else(|| {
            format!(
                "worker_id {rank} of key is not below world_size {}",
                key.world_size
            )
        })?;
        Ok(Arc::new(KeyScope {
            model_name: Arc::clone(&key.model_name),
            kv_rank,
            object_group_id,
            cache_salt,
        }))
    }

    /// Checks a key that a worker wants to transfer, and names its chunks.
    fn transfer_range(
        &self,
        caller: &Caller,
        operation: &'static str,
        key: &CacheKey,
        worker: &Worker,
    ) -> Result<TransferRange, String> {
        if *key.model_name != *worker.model_name || key.world_size != worker.world_size {
            return Err(format!(
                "key is of model `{}` with world_size {} but instance_id {} registered `{}` with {}: register it for this model",
                key.model_name,
                key.world_size,
                worker.id.instance,
                worker.model_name,
                worker.world_size
            ));
        }
        let rank = key
            .worker_id
            .ok_or("worker_id of key is nil: a transfer needs the worker's rank")?;
        let chunk_size = self.hasher.chunk_size() as u64;
        let (start, end, tokens) = (key.start, key.end, key.tokens.len() as u64);
        if start > end || end > tokens || start % chunk_size != 0 || end % chunk_size != 0 {
            return Err(format!(
                "range [{start}, {end}) of key: start and end must be multiples of {chunk_size}, in order and within its {tokens} tokens"
            ));
        }
        // Within the number of tokens that arrived, so it fits.
        let (first, last) = ((start / chunk_size) as usize, (end / chunk_size) as usize);
        let scope = self.scope(
            key,
            rank,
            worker.object_group_id,
            self.salt(caller, operation, key)?,
        )?;
        let session = self
            .sessions
            .get_or_create(SessionId::new(caller, &key.request_id), &self.engine);
        let mut session = session.lock();
        let hashes = session.chunk_hashes(&self.hasher, &key.tokens, last);
        let chunks = hashes
            .get(first..last)
            .ok_or("token_ids of key could not be hashed")?;
        Ok(TransferRange {
            hashes: chunks.to_vec(),
            parent: first
                .checked_sub(1)
                .and_then(|before| hashes.get(before).copied()),
            transfer: TransferKey {
                scope,
                chunks: first..last,
                last_hash: chunks.last().copied(),
            },
        })
    }

    /// Waits for the next store. Eviction above the watermark should follow it at once: later
    /// it would race with the lookups that say what is worth keeping.
    pub async fn stored(&self) {
        self.stored.notified().await;
    }

    /// Does what time brings: reaps silent workers, idle sessions and dead processes, and
    /// lets the engine expire and evict. To be called about every 250 ms, off the data path.
    pub fn maintain(&self) {
        self.maintenance_rounds.fetch_add(1, Ordering::Relaxed);
        let settings = &self.settings;
        for worker in self.workers.reap(
            settings.worker_reap_timeout,
            settings.worker_registration_grace,
        ) {
            self.lapsed.note(&worker.id);
            self.end_worker(&worker, "silent for too long");
        }
        self.events.reap(settings.worker_reap_timeout);
        let sessions = self.sessions.reap(settings.session_ttl, &self.engine);
        if sessions > 0 {
            tracing::info!(sessions, "idle sessions ended");
        }
        self.tenancy.audit().settle();
        self.expiry.end_due(Instant::now(), |keys| {
            self.engine.withdraw(keys);
            self.engine.held(keys)
        });
        self.engine.maintain();
    }

    fn end_worker(&self, worker: &Worker, why: &str) {
        let ended = self.engine.end_owner(worker.owner);
        self.events.drop_instance(&worker.id);
        tracing::warn!(
            instance_id = %worker.id,
            aborted_objects = ended.aborted_objects,
            released_locks = ended.released_locks,
            "worker reaped: {why}"
        );
    }

    /// Ends a worker once its process is dead, as long as it is heard on no other connection.
    async fn await_death(self: Arc<Self>, orphan: Orphan) {
        let mut pause = DEATH_CHECK.0;
        while !has_ended(&orphan.process) {
            if !self.workers.is_orphan(&orphan) {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(DEATH_CHECK.1);
        }
        if let Some(worker) = self.workers.take_orphan(&orphan) {
            self.end_worker(&worker, "its connection is closed and its process dead");
        }
    }

    /// The `/status` document of LMCache (`http_apis/info_api.py`) for what is served here.
    #[must_use]
    pub fn status(&self) -> Value {
        let engine = self.engine.status();
        let config = self.engine.config();
        let events = self.events.status();
        let workers = self.workers.list();
        let copied_for = || workers.iter().filter(|worker| worker.paged.is_some());
        let copying = || workers.iter().filter(|worker| worker.paged.is_none());
        let (sessions, jobs) = self.sessions.counts();
        let eviction = json!({
            "is_healthy": true,
            "thread_alive": true,
            "eviction_policy": config.policy.to_string(),
            "trigger_watermark": config.trigger_watermark,
            "eviction_ratio": config.eviction_ratio,
        });
        let l1 = json!({
            "is_healthy": true,
            "total_object_count": engine.readable_objects,
            "write_locked_count": engine.reserved_objects,
            "read_locked_count": engine.read_locked_objects,
            "temporary_count": 0,
            "staging_object_count": engine.reserved_objects,
            "staging_bytes": engine.staging_bytes,
            "memory_used_bytes": engine.used_bytes,
            "memory_total_bytes": engine.capacity_bytes,
            "memory_configured_bytes": engine.capacity_bytes,
            "capacity_bytes_by_backend": {"dram": engine.capacity_bytes},
            "memory_touched_bytes": engine.touched_bytes,
            "huge_pages": engine.huge_pages,
            "memory_usage_ratio": engine.usage_ratio,
            "write_ttl_seconds": config.write_ttl.as_secs(),
            "read_ttl_seconds": config.read_ttl.as_secs(),
            "object_locks": engine.object_locks,
            "owned_locks": engine.owned_locks,
            "withdrawn_count": engine.withdrawn_objects,
            "evicted_objects": engine.evicted_objects,
            "evicted_bytes": engine.evicted_bytes,
            "demand_evicted_objects": engine.demand_evicted_objects,
            "corrupt_objects": engine.corrupt_objects,
            "allocation_failures": engine.allocation_failures,
            "expired_write_leases": engine.expired_write_leases,
            "expired_read_leases": engine.expired_read_leases,
            "tenants": engine.tenants.iter().map(|it| (it.tenant.name.to_string(), json!({
                "salts": it.tenant.salts.iter().take(100).map(CacheSalt::as_str).collect::<Vec<_>>(),
                "floor_bytes": it.tenant.budget.floor_bytes,
                "weight": it.tenant.budget.weight,
                "cap_bytes": it.tenant.budget.cap_bytes,
                "share_bytes": it.share_bytes,
                "used_bytes": it.used_bytes,
                "objects": it.objects,
                "evicted_bytes": it.evicted_bytes,
            }))).collect::<serde_json::Map<_, _>>(),
            "bytes_by_cache_salt": engine.salts.iter().take(1000).map(|it| (it.cache_salt.as_str().to_owned(), it.bytes.into())).collect::<serde_json::Map<_, _>>(),
        });
        let no_store = json!({
            "is_healthy": true,
            "thread_alive": true,
            "pending_keys_count": 0,
            "in_flight_task_count": 0,
            "num_l2_adapters": 0,
            "num_active_adapters": 0,
            "num_draining_adapters": 0,
        });
        let mut status = json!({
            "is_healthy": !self.is_draining(),
            "engine_type": "Stockade",
            "chunk_size": self.hasher.chunk_size(),
            "hash_algorithm": "blake3",
            "active_sessions": sessions,
            "storage_manager": {
                "is_healthy": true,
                "l1_managers": {"_default": l1},
                "l1_manager": l1,
                "l1_eviction_controllers": {"_default": eviction},
                "l1_eviction_controller": eviction,
                // `lmcache describe kvcache` still reads this former place.
                "eviction_controller": eviction,
                "store_controllers": {"_default": no_store},
                "store_controller": no_store,
                "prefetch_controller": {
                    "is_healthy": true,
                    "thread_alive": true,
                    "max_in_flight": 0,
                    "submission_queue_size": 0,
                    "pending_queue_size": 0,
                    "in_flight_request_count": 0,
                    "lookup_phase_count": 0,
                    "load_phase_count": 0,
                    "completed_results_count": jobs,
                    "num_l2_adapters": 0,
                    "num_active_adapters": 0,
                    "num_draining_adapters": 0,
                },
                "l2_eviction_controller": {"is_healthy": true, "thread_alive": true, "adapters": []},
                "l2_adapters": [],
                "num_l2_adapters": 0,
                "l1_usage": [engine.used_bytes, engine.capacity_bytes],
                "l1_capacity_bytes_by_backend": {"dram": engine.capacity_bytes},
            },
            "active_prefetch_jobs": jobs,
            "active_p2p_lookup_jobs": 0,
            "p2p_enabled": false,
            "p2p_state": "unregistered",
            "p2p_peer_count": 0,
            "p2p_peers": [],
            "worker_liveness": {
                "enabled": !self.settings.worker_reap_timeout.is_zero(),
                "reap_timeout_seconds": self.settings.worker_reap_timeout.as_secs_f64(),
                "registration_grace_seconds": self.settings.worker_registration_grace.as_secs_f64(),
                "tracked_instances": workers.len(),
            },
            "kv_events": {
                "enabled": events.enabled,
                "incarnation": events.incarnation,
                "log_depth": events.log_depth,
                "log_capacity": events.log_capacity,
                "next_seq": events.next_seq,
                "lost_markers": 0,
                "unbound_stores": 0,
                "subscribers": events.subscribers,
            },
            "registered_gpu_ids": copied_for().map(|worker| number(worker.id.instance)).collect::<Vec<_>>(),
            "cache_context_meta": copied_for().map(|worker| (worker.id.instance.to_string(), json!({
                "model_name": &*worker.model_name,
                "world_size": worker.world_size,
                "kv_cache_layout": worker.paged.as_ref().map(|paged| paged.report()),
            }))).collect::<serde_json::Map<_, _>>(),
            "registered_non_cuda_instance_ids": copying().map(|worker| number(worker.id.instance)).collect::<Vec<_>>(),
            "non_cuda_context_meta": copying().map(|worker| (worker.id.instance.to_string(), json!({
                "model_name": &*worker.model_name,
                "world_size": worker.world_size,
                "block_size": worker.block_size,
                "use_mla": worker.use_mla,
            }))).collect::<serde_json::Map<_, _>>(),
        });
        if let Some(tier) = &self.tier
            && let Some(storage) = status
                .get_mut("storage_manager")
                .and_then(Value::as_object_mut)
        {
            let mut parts = tier.status();
            if let Some(store) = parts.get("store_controller") {
                storage.insert("store_controllers".to_owned(), json!({"_default": store}));
            }
            storage.append(&mut parts);
        }
        status
    }

    /// What it has done since its start.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.metrics.activity()
    }

    /// Ends all sessions, when no request can come any more; their traces become whole.
    pub fn end_sessions(&self) {
        self.sessions.reap(Duration::ZERO, &self.engine);
    }

    /// Where the spans of requests go.
    #[must_use]
    pub fn traces(&self) -> &Traces {
        &self.settings.traces
    }

    /// Request sessions, and those of them whose lookup nobody has asked for yet.
    #[must_use]
    pub fn sessions(&self) -> (usize, usize) {
        self.sessions.counts()
    }

    /// How often it was maintained.
    #[must_use]
    pub fn maintenance_rounds(&self) -> u64 {
        self.maintenance_rounds.load(Ordering::Relaxed)
    }

    /// Registered workers.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.list().len()
    }

    /// Records in the log of KV events.
    #[must_use]
    pub fn kv_event_log_depth(&self) -> usize {
        self.events.status().log_depth
    }

    /// Empties the cache; locked objects stay unless `force`.
    pub fn clear_cache(&self, force: bool) {
        self.clear_owned(force, |_| true);
    }

    /// Whether the server is going down.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Says to `/status` that the server is going down.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

/// Whether the process behind a pidfd has ended, whether or not its parent has noticed.
fn has_ended(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Instance ids are msgpack integers, so they fit one of JSON's two integer ranges.
fn number(id: InstanceId) -> Value {
    u64::try_from(id.0)
        .map(Value::from)
        .or_else(|_| i64::try_from(id.0).map(Value::from))
        .unwrap_or_default()
}

/// [`Service`] as the transport sees it.
pub struct ServiceHandler(pub Arc<Service>);

impl Handler for ServiceHandler {
    fn refused(&self, address: &PeerAddress, listener: &str, error: ProtocolError) {
        let is_about_who = matches!(
            error,
            ProtocolError::MechanismMismatch
                | ProtocolError::AuthenticationFailed
                | ProtocolError::UnknownKey
                | ProtocolError::CurveBox
        );
        if is_about_who {
            self.0.tenancy.audit().record(Denied {
                realm: &Realm::open(),
                origin: &format!("{address} through listener {listener}"),
                reason: Denial::Unauthenticated,
                operation: "connect",
                salt: None,
            });
        }
    }

    fn message(&self, peer: &Arc<Peer>, message: Message) -> Outcome {
        let service = &self.0;
        let frames = match message {
            Message::Frames(frames) => frames,
            Message::TooLarge {
                frames_before,
                announced,
                limit,
            } => {
                return too_large(service, peer, frames_before, announced, limit);
            }
        };
        let arrived = Instant::now();
        let envelope = envelope(&frames);
        let operation = envelope
            .as_ref()
            .and_then(|envelope| envelope.known_operation(&service.limits));
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        if service.tenancy.is_over_rate(peer) {
            return over_rate(service, peer, operation, envelope);
        }
        if operation == Some(Operation::ServerModuleCall) {
            let reply = Arc::clone(service).module_call(Arc::clone(peer), frames);
            return Outcome::Later(Box::pin(reply));
        }
        if operation == Some(Operation::WaitPrefetchStatus)
            && let Some((mut done, timeout)) = service.awaited_by(peer, &frames)
        {
            let (service, peer) = (Arc::clone(service), Arc::clone(peer));
            return Outcome::Later(Box::pin(async move {
                // Whichever comes first, and also the end of the one who would tell.
                let is_done = done.wait_for(|&is_done| is_done);
                let _ = tokio::time::timeout(timeout, is_done).await;
                service.answer(&peer, frames, arrived)
            }));
        }
        let is_slow = |it| it == Operation::Clear || lmcache_driven::is_slow(it);
        if bytes <= INLINE_BYTES && !operation.is_some_and(is_slow) {
            return service
                .answer(peer, frames, arrived)
                .map_or(Outcome::Nothing, Outcome::Reply);
        }
        let caller = service.tenancy.caller(peer);
        let (worker, peer) = (Arc::clone(service), Arc::clone(peer));
        let service = Arc::clone(service);
        let deadline = arrived + service.settings.deadline;
        Outcome::Later(Box::pin(async move {
            let answer = move || worker.answer(&peer, frames, arrived);
            let copies = operation.is_some_and(lmcache_driven::copies);
            let line = match copies {
                true => service.tenancy.copies(),
                false => service.tenancy.large(),
            };
            let (realm, share) = (caller.realm(), caller.share());
            let has_company = service.tenancy.has_company(realm);
            let place = line.admit(realm, share, bytes, has_company);
            let answer = match tokio::time::timeout_at(deadline.into(), place).await {
                Ok(Ok(place)) => {
                    // The place is given back when the work is done, whoever still waits.
                    let work = tokio::task::spawn_blocking(move || {
                        let _giving_way = has_company.then(GivingWay::begin);
                        let reply = answer();
                        drop(place);
                        reply
                    });
                    // A copy looks at the deadline itself, and is waited for: nothing may be
                    // written into an engine's memory after the reply.
                    let work = match copies {
                        true => Ok(work.await),
                        false => tokio::time::timeout_at(deadline.into(), work).await,
                    };
                    work.ok().and_then(Result::ok)
                }
                Ok(Err(TooManyInFlight { .. })) => {
                    let name = operation.map_or("request", Operation::name);
                    let audit = service.tenancy.audit();
                    audit.denied(&caller, Denial::InFlight, name, None);
                    let envelope = envelope?;
                    service.metrics.failed(operation, "in_flight");
                    service.log.warn("in_flight", || {
                        "a tenant has as many large requests in flight as it may".to_owned()
                    });
                    return Some(service.refusal(
                        &envelope,
                        operation,
                        "this tenant has as many large requests in flight as it may: send fewer at once, or raise max_in_flight of its table",
                    ));
                }
                Err(_) => None,
            };
            if let Some(reply) = answer {
                return reply;
            }
            let envelope = envelope?;
            service.metrics.failed(operation, "deadline");
            let name = operation.map_or("a request", Operation::name);
            service.log.warn("deadline", || {
                format!("{name} was not done within its deadline")
            });
            let sentence =
                "the server could not do this within --request-deadline-seconds: try again";
            Some(service.refusal(&envelope, operation, sentence))
        }))
    }

    fn poll_turn(&self, peer: &Arc<Peer>, cx: &mut Context<'_>) -> Poll<Turn> {
        self.0.tenancy.poll_turn(peer, cx)
    }

    fn turn_over(&self, peer: &Arc<Peer>, used: Turn, wants_more: bool) {
        self.0.tenancy.turn_over(peer, used, wants_more);
    }

    fn disconnected(&self, peer: &Arc<Peer>, _reason: DisconnectReason) {
        let service = &self.0;
        service.tenancy.gone(peer);
        service.events.disconnected(peer.id());
        // Without a runtime the server is being taken down, and the workers with it.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        for orphan in service.workers.left_by(peer.id()) {
            runtime.spawn(Arc::clone(service).await_death(orphan));
        }
    }
}

/// The answer to what has waited for its tenant's rate for as long as anything should.
fn over_rate(
    service: &Service,
    peer: &Peer,
    operation: Option<Operation>,
    envelope: Option<Envelope>,
) -> Outcome {
    let caller = service.tenancy.caller(peer);
    let name = operation.map_or("request", Operation::name);
    let audit = service.tenancy.audit();
    audit.denied(&caller, Denial::OverRate, name, None);
    service.metrics.failed(operation, "over_rate");
    service.log.warn("over_rate", || {
        format!(
            "{name} from {} refused: its tenant is over its rate",
            peer.address()
        )
    });
    envelope.map_or(Outcome::Nothing, |envelope| {
        Outcome::Reply(service.refusal(
            &envelope,
            operation,
            "this tenant is over its rate: send less, or raise requests_per_second of its table",
        ))
    })
}

fn too_large(
    service: &Service,
    peer: &Peer,
    frames_before: Frames,
    announced: u64,
    limit: Limit,
) -> Outcome {
    let envelope = envelope(&frames_before);
    let operation = envelope
        .as_ref()
        .and_then(|envelope| envelope.known_operation(&service.limits));
    service.metrics.failed(operation, "too_large");
    let sentence = match limit {
        Limit::Frames => "the message has too many frames".to_owned(),
        Limit::FrameBytes | Limit::MessageBytes => {
            format!(
                "the request of {announced} bytes is too large: raise --max-message-mib, or store fewer chunks at once"
            )
        }
    };
    service.log.warn("too_large", || {
        let name = operation.map_or("request", Operation::name);
        format!("{name} from {} refused: {sentence}", peer.address())
    });
    envelope.map_or(Outcome::Nothing, |envelope| {
        Outcome::Reply(service.refusal(&envelope, operation, &sentence))
    })
}

fn envelope(frames: &[Bytes]) -> Option<Envelope> {
    let [uid, operation, ..] = frames else {
        return None;
    };
    Some(Envelope {
        uid: uid.clone(),
        operation: operation.clone(),
    })
}
