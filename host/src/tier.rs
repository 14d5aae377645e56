//! The second tier: what no longer fits in memory is kept in storage, and comes back from there.
//!
//! This is where the cache and the adapters of `stockade-l2` meet; neither knows the other.
//! `store` writes down what was committed, `prefetch` loads what a lookup lacks. Nothing on the
//! request path waits here: stores are queued or dropped, and a lookup that memory answers whole
//! never comes here. Follows `v1/distributed/storage_controllers/` of LMCache 0.5.6.

mod metrics;
mod prefetch;
mod store;

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value, json};
use stockade_cache::{CacheEngine, CacheSalt, ObjectKey, OwnerId};
use stockade_l2::{AdapterError, AdapterSpec, BreakerState, Entry, Guarded, NameError, ObjectName};
use tokio::sync::{Notify, Semaphore, mpsc};

use metrics::TierMetrics;
use store::Lane;

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
    metrics: TierMetrics,
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
                    lane: Lane::default(),
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
            metrics: TierMetrics::new(&config.adapters),
            backends,
            config,
        }))
    }

    /// Registers its metrics; the registry comes without a prefix.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
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

    /// Removes all values of the salts that are wanted from all adapters, and what waits to be
    /// written of them; returns how many values there were. What is in memory is the caller's to
    /// remove first. Damaged values that were moved aside are not looked through.
    ///
    /// # Errors
    /// A sentence that names the adapters where values may be left.
    pub async fn purge(&self, wanted: &(dyn Fn(&CacheSalt) -> bool + Sync)) -> Result<u64, String> {
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
            match self.purge_from(backend, wanted).await {
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
                    names.clear();
                }
                if is_end {
                    return Ok(purged);
                }
            }
        };
        let (purged, ()) = tokio::try_join!(delete, backend.guarded.list(None, sender))?;
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
