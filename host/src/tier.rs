//! The second tier: what no longer fits in memory is kept in storage, and comes back from there.
//!
//! This is where the cache and the adapters of `stockade-l2` meet; neither knows the other.
//! `store` writes down what was committed, `prefetch` loads what a lookup lacks. Nothing on the
//! request path waits here: stores are queued or dropped, and a lookup that memory answers whole
//! never comes here. Follows `v1/distributed/storage_controllers/` of LMCache 0.5.6.

mod metrics;
mod objects;
mod prefetch;
mod store;

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value, json};
use stockade_cache::{CacheEngine, CacheSalt, ChunkHash, KeyScope, ObjectKey, OwnerId};
use stockade_l2::{
    AdapterError, AdapterSpec, BreakerState, Entry, Evictions, Guarded, NameError, ObjectName,
};
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::coordinator::{CoordinatorEvents, Place};

use metrics::TierMetrics;
use objects::WarmJobs;
use store::Lane;

pub use objects::{ObjectPage, ObjectsError, WarmStatus};
pub use store::StorePolicy;

/// KiB of values that may be on their way up at once, over all requests.
const LOADING_KIB: u32 = 512 << 10;
/// Time that a purge gives each batch of deletions.
const DELETE_DEADLINE: Duration = Duration::from_secs(30);
/// Names deleted by one call.
const DELETE_BATCH: usize = 256;

/// What becomes of an object that was loaded for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefetchPolicy {
    /// It goes from memory with the last lock on it: LMCache's `default`.
    Default,
    /// It stays like one that was stored: LMCache's `retain`.
    Retain,
}

/// How the second tier works.
#[derive(Debug, Clone)]
pub struct TierConfig {
    /// Where values are kept, in the order in which they are asked.
    pub adapters: Vec<AdapterSpec>,
    /// Whether what was written down stays in memory.
    pub store_policy: StorePolicy,
    /// Whether what was loaded stays in memory.
    pub prefetch_policy: PrefetchPolicy,
    /// Lookups that load at once; further ones wait within their deadline.
    pub prefetch_max_in_flight: usize,
    /// Time for asking storage what it has.
    pub lookup_deadline: Duration,
    /// Time for all that a lookup does in the second tier.
    pub prefetch_deadline: Duration,
    /// Time for writing one value.
    pub store_deadline: Duration,
    /// Objects that may wait to be written, for each adapter.
    pub store_queue_items: usize,
    /// Their bytes.
    pub store_queue_bytes: u64,
}

/// One adapter at work.
pub(crate) struct Backend {
    spec: AdapterSpec,
    guarded: Guarded,
    lane: Lane,
    /// What the coordinator calls it.
    place: Place,
}

/// The second tier of one server.
pub struct Tier {
    engine: Arc<CacheEngine>,
    config: TierConfig,
    backends: Vec<Backend>,
    /// Owner of the reservations that loads write to.
    owner: OwnerId,
    in_flight: Semaphore,
    /// The one load at a time that no lookup waits for: it takes its turn among theirs, and few.
    unasked: Semaphore,
    loading_kib: Semaphore,
    /// Keys that are being loaded: a second request for one of them waits for the first.
    loading: Mutex<HashSet<ObjectKey>>,
    /// Rings when some of `loading` are done.
    settled: Notify,
    metrics: Arc<TierMetrics>,
    /// Who tells the fleet's coordinator what is in storage.
    coordinator: OnceLock<CoordinatorEvents>,
    warm_jobs: WarmJobs,
}

/// What a bounded adapter removed, on its way to the metrics and the coordinator.
struct Evicted {
    metrics: Arc<TierMetrics>,
    coordinator: CoordinatorEvents,
    place: Place,
}

impl std::fmt::Debug for Evicted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evicted")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Evictions for Evicted {
    fn evicted(&self, names: &[ObjectName]) {
        let keys: Vec<_> = names.iter().filter_map(key_of).collect();
        self.metrics.evicted(&keys);
        self.coordinator.gone_from(self.place, keys);
    }
}

/// What an object is called in storage. LMCache's engine-driven workers store one group of layers,
/// number 0; the group of our keys stands for the layout, which goes into the seal instead.
fn name_of(key: &ObjectKey) -> Result<ObjectName, NameError> {
    let scope = &key.scope;
    ObjectName::new(
        Arc::clone(&scope.model_name),
        scope.kv_rank,
        0,
        key.chunk_hash.0,
        Arc::from(scope.cache_salt.as_str()),
    )
}

/// The key behind a name; `None` for a salt that no request can have.
pub(crate) fn key_of(name: &ObjectName) -> Option<ObjectKey> {
    let scope = KeyScope {
        model_name: Arc::clone(name.model_name()),
        kv_rank: name.kv_rank(),
        object_group_id: name.object_group_id(),
        cache_salt: CacheSalt::parse(name.cache_salt()).ok()?,
    };
    Some(ObjectKey::new(
        Arc::new(scope),
        ChunkHash(*name.chunk_hash()),
    ))
}

impl Tier {
    /// Opens the storage of all adapters. Blocks, and must be called within a Tokio runtime.
    ///
    /// # Errors
    /// One sentence that names the adapter, the field and the way out.
    pub fn open(engine: Arc<CacheEngine>, config: TierConfig) -> Result<Arc<Self>, String> {
        let backends = config
            .adapters
            .iter()
            .map(|spec| {
                let adapter = spec
                    .open()
                    .map_err(|error| format!("--l2-adapter {}: {error}", spec.type_name()))?;
                tracing::info!(adapter = %spec.redacted(), "L2 adapter opened");
                Ok(Backend {
                    spec: spec.clone(),
                    guarded: Guarded::new(adapter),
                    lane: Lane::new(spec.concurrency()),
                    place: Place::storage(spec.type_name(), spec.is_shared()),
                })
            })
            .collect::<Result<Vec<_>, String>>()?;
        Ok(Arc::new(Self {
            owner: engine.new_owner(),
            engine,
            in_flight: Semaphore::new(config.prefetch_max_in_flight),
            unasked: Semaphore::new(1),
            loading_kib: Semaphore::new(LOADING_KIB as usize),
            loading: Mutex::default(),
            settled: Notify::new(),
            metrics: Arc::new(TierMetrics::new(&config.adapters)),
            coordinator: OnceLock::new(),
            warm_jobs: WarmJobs::default(),
            backends,
            config,
        }))
    }

    /// Registers its metrics; the registry comes without a prefix.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// From now on tells a coordinator what is written, loaded and removed here. The first one
    /// stays.
    pub fn report_to(&self, coordinator: &CoordinatorEvents) {
        if self.coordinator.set(coordinator.clone()).is_err() {
            return;
        }
        for backend in &self.backends {
            backend.guarded.watch_evictions(Arc::new(Evicted {
                metrics: Arc::clone(&self.metrics),
                coordinator: coordinator.clone(),
                place: backend.place,
            }));
        }
    }

    fn report(&self, tell: impl FnOnce(&CoordinatorEvents)) {
        if let Some(coordinator) = self.coordinator.get() {
            tell(coordinator);
        }
    }

    /// Brings the gauges up to date that are asked of the adapters.
    pub fn refresh_metrics(&self) {
        for (index, backend) in self.backends.iter().enumerate() {
            if let Some(bytes) = backend.guarded.used_bytes() {
                self.metrics.used(index, bytes);
            }
        }
    }

    /// Starts to write down what [`stored`](Self::stored) is told. Must be called within a Tokio
    /// runtime.
    pub fn start(self: &Arc<Self>) -> Vec<tokio::task::JoinHandle<()>> {
        let mut tasks = Vec::new();
        for (index, backend) in self.backends.iter().enumerate() {
            for _ in 0..backend.spec.concurrency() {
                tasks.push(tokio::spawn(Arc::clone(self).write_down(index)));
            }
        }
        tasks
    }

    /// The values of a tenant's salt, or of all, in the first adapter that can list; at most
    /// `limit`.
    ///
    /// # Errors
    /// [`AdapterError`] of the last adapter, if none could list.
    pub async fn list(
        &self,
        salt: Option<&CacheSalt>,
        limit: usize,
    ) -> Result<Vec<Entry>, AdapterError> {
        let mut result = Err(AdapterError::Unsupported("there is no adapter"));
        for backend in &self.backends {
            let (sender, mut receiver) = mpsc::channel(64);
            let take = async {
                let mut entries = Vec::new();
                while entries.len() < limit
                    && let Some(entry) = receiver.recv().await
                {
                    entries.push(entry);
                }
                receiver.close();
                while receiver.recv().await.is_some() {}
                entries
            };
            let list = backend.guarded.list(salt.map(CacheSalt::as_str), sender);
            match tokio::join!(list, take) {
                (Ok(()), entries) => return Ok(entries),
                (Err(error), _) => result = Err(error),
            }
        }
        result
    }

    /// Removes all values of the salts that are wanted from all adapters, what waits to be
    /// written of them, and what lies beside them: damaged values that were moved aside,
    /// checksums and the temporary files of killed writers. Returns how many values there were.
    /// What is in memory is the caller's to remove first.
    ///
    /// `salts` are the wanted ones by name, so that only theirs are listed; none if they are
    /// those that remain.
    ///
    /// # Errors
    /// A sentence that names the adapters where values may be left.
    pub async fn purge(
        &self,
        salts: &[CacheSalt],
        wanted: &(dyn Fn(&CacheSalt) -> bool + Sync),
    ) -> Result<u64, String> {
        for backend in &self.backends {
            for descent in backend.lane.forget(wanted) {
                self.settle(&descent, false);
            }
        }
        // What is being written now would come after the purge.
        self.drain(self.config.store_deadline).await;
        let mut purged = 0;
        let mut left = Vec::new();
        for backend in &self.backends {
            match self.purge_from(backend, salts, wanted).await {
                Ok(count) => purged += count,
                Err(error) => left.push(format!("{}: {error}", backend.spec.type_name())),
            }
        }
        match left.is_empty() {
            true => Ok(purged),
            false => Err(format!("values may be left in {}", left.join(", "))),
        }
    }

    async fn purge_from(
        &self,
        backend: &Backend,
        salts: &[CacheSalt],
        wanted: &(dyn Fn(&CacheSalt) -> bool + Sync),
    ) -> Result<u64, AdapterError> {
        let mut purged = 0;
        match salts {
            [] => purged += self.purge_listed(backend, None, wanted).await?,
            salts => {
                for salt in salts {
                    let salt = Some(salt.as_str());
                    purged += self.purge_listed(backend, salt, wanted).await?;
                }
            }
        }
        let is_wanted = |salt: &str| CacheSalt::parse(salt).is_ok_and(|salt| wanted(&salt));
        let deadline = Instant::now() + DELETE_DEADLINE;
        purged += backend.guarded.discard_aside(&is_wanted, deadline).await?;
        Ok(purged)
    }

    async fn purge_listed(
        &self,
        backend: &Backend,
        salt: Option<&str>,
        wanted: &(dyn Fn(&CacheSalt) -> bool + Sync),
    ) -> Result<u64, AdapterError> {
        let is_wanted =
            |name: &ObjectName| CacheSalt::parse(name.cache_salt()).is_ok_and(|salt| wanted(&salt));
        let (sender, mut receiver) = mpsc::channel::<Entry>(DELETE_BATCH);
        let delete = async {
            let mut purged = 0;
            let mut names = Vec::new();
            loop {
                let entry = receiver.recv().await;
                let is_end = entry.is_none();
                names.extend(entry.map(|entry| entry.name).filter(is_wanted));
                if names.len() == DELETE_BATCH || (is_end && !names.is_empty()) {
                    let deadline = Instant::now() + DELETE_DEADLINE;
                    let deleted = backend.guarded.delete(&names, deadline).await?;
                    purged += deleted.into_iter().filter(|&was_there| was_there).count() as u64;
                    let keys = names.drain(..).filter_map(|name| key_of(&name)).collect();
                    self.report(|it| it.gone_from(backend.place, keys));
                }
                if is_end {
                    return Ok(purged);
                }
            }
        };
        let (purged, ()) = tokio::try_join!(delete, backend.guarded.list(salt, sender))?;
        Ok(purged)
    }

    /// Forgets the series of a salt; returns how many there were.
    pub fn forget_labels(&self, salt: &str) -> usize {
        self.metrics.forget(salt)
    }

    /// Adapters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.backends.len()
    }

    /// Whether there is no adapter.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty()
    }

    /// LMCache's `GET /config/adapters`: `{"adapters": [...]}`.
    #[must_use]
    pub fn adapters(&self) -> Value {
        let adapter = |(index, backend): (usize, &Backend)| {
            json!({
                "index": index,
                "type_name": backend.spec.type_name(),
                "tier": "l2",
                "primary": index == 0,
                "reconfigurable": false,
            })
        };
        let adapters: Vec<_> = self.backends.iter().enumerate().map(adapter).collect();
        json!({"adapters": adapters})
    }

    /// The parts of LMCache's `/status` that are about the second tier; asks no storage.
    #[must_use]
    pub fn status(&self) -> Map<String, Value> {
        let adapters: Vec<Value> = self
            .backends
            .iter()
            .map(|backend| {
                let mut status = backend.guarded.status();
                let (reads, writes) = (backend.guarded.reads(), backend.guarded.writes());
                let is_healthy = [reads, writes]
                    .iter()
                    .all(|breaker| breaker.state() == BreakerState::Closed);
                status.insert("is_healthy".into(), json!(is_healthy));
                status.insert("type".into(), json!(backend.spec.type_name()));
                status.insert("shared".into(), json!(backend.spec.is_shared()));
                let breakers = json!({
                    "reads": {"state": reads.state().as_str(), "openings": reads.openings()},
                    "writes": {"state": writes.state().as_str(), "openings": writes.openings()},
                });
                status.insert("breakers".into(), breakers);
                let (items, bytes) = backend.lane.waiting();
                status.insert("pending_keys_count".into(), json!(items));
                status.insert("pending_bytes".into(), json!(bytes));
                Value::Object(status)
            })
            .collect();
        let count = self.backends.len();
        let pending: usize = self.backends.iter().map(|it| it.lane.waiting().0).sum();
        let writing: usize = self.backends.iter().map(|it| it.lane.in_work()).sum();
        let max = self.config.prefetch_max_in_flight;
        let active = max.saturating_sub(self.in_flight.available_permits());
        let store = json!({
            "is_healthy": true,
            "thread_alive": true,
            "pending_keys_count": pending,
            "in_flight_task_count": writing,
            "num_l2_adapters": count,
            "num_active_adapters": count,
            "num_draining_adapters": 0,
        });
        let prefetch = json!({
            "is_healthy": true,
            "thread_alive": true,
            "max_in_flight": max,
            "submission_queue_size": 0,
            "pending_queue_size": self.metrics.waiting(),
            "in_flight_request_count": active,
            "lookup_phase_count": 0,
            "load_phase_count": self.loading.lock().len(),
            "completed_results_count": 0,
            "num_l2_adapters": count,
            "num_active_adapters": count,
            "num_draining_adapters": 0,
        });
        let mut status = Map::new();
        status.insert("store_controller".into(), store);
        status.insert("prefetch_controller".into(), prefetch);
        status.insert("l2_adapters".into(), json!(adapters));
        status.insert("num_l2_adapters".into(), json!(count));
        status
    }
}
