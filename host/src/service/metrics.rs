//! Counters of the request path.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use stockade_wire::Operation;

use super::latencies::Latencies;

/// Tenants and models get series of their own up to this many; further ones share `other`.
const MAX_LABEL_VALUES: usize = 256;
/// Pairs of a model and a tenant get series of their own up to this many; else each of the two
/// alone being bounded would allow their product.
const MAX_LABEL_PAIRS: usize = 512;
/// Longest label value in bytes.
const MAX_LABEL_BYTES: usize = 128;

/// A label whose values come from clients: bounded in number and length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClientLabel(Arc<str>);

impl EncodeLabelValue for ClientLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        (&*self.0).encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct SaltLabels {
    cache_salt: ClientLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelSaltLabels {
    model_name: ClientLabel,
    cache_salt: ClientLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    during: &'static str,
    model_name: ClientLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    operation: &'static str,
    reason: &'static str,
}

/// What clients may name, remembered so that their number has a bound.
#[derive(Default)]
pub(crate) struct Names(Mutex<std::collections::HashSet<Arc<str>>>);

impl Names {
    /// The labels of a tenant's salt.
    pub(crate) fn labels(&self, cache_salt: &str) -> SaltLabels {
        SaltLabels {
            cache_salt: self.label(cache_salt),
        }
    }

    fn label(&self, name: &str) -> ClientLabel {
        let end = name.floor_char_boundary(MAX_LABEL_BYTES);
        let mut known = self.0.lock();
        if let Some(name) = known.get(&name[..end]) {
            return ClientLabel(Arc::clone(name));
        }
        if known.len() >= MAX_LABEL_VALUES {
            return ClientLabel(Arc::from("other"));
        }
        let name: Arc<str> = Arc::from(&name[..end]);
        known.insert(Arc::clone(&name));
        ClientLabel(name)
    }

    /// Forgets a name; its label if it had one of its own.
    /// Gives a salt's label back, so that its series can be removed.
    pub(crate) fn forget_labels(&self, cache_salt: &str) -> Option<SaltLabels> {
        let cache_salt = self.forget(cache_salt)?;
        Some(SaltLabels { cache_salt })
    }

    fn forget(&self, name: &str) -> Option<ClientLabel> {
        let end = name.floor_char_boundary(MAX_LABEL_BYTES);
        self.0.lock().take(&name[..end]).map(ClientLabel)
    }

    /// Those that have a label of their own.
    fn all(&self) -> Vec<ClientLabel> {
        let known = self.0.lock();
        known
            .iter()
            .map(|name| ClientLabel(Arc::clone(name)))
            .collect()
    }
}

/// The pairs of them that were seen.
#[derive(Default)]
struct Pairs(Mutex<std::collections::HashSet<ModelSaltLabels>>);

impl Pairs {
    fn bounded(&self, labels: ModelSaltLabels) -> ModelSaltLabels {
        let mut known = self.0.lock();
        if known.contains(&labels) {
            return labels;
        }
        if known.len() >= MAX_LABEL_PAIRS {
            let other = ClientLabel(Arc::from("other"));
            return ModelSaltLabels {
                model_name: other.clone(),
                cache_salt: other,
            };
        }
        known.insert(labels.clone());
        labels
    }
}

/// Metrics of the request path; LMCache's names where the meaning is LMCache's
/// (`docs/design/v1/mp_observability/METRICS.md` there).
pub(crate) struct ServiceMetrics {
    salts: Names,
    models: Names,
    pairs: Pairs,
    lookups: Family<ModelSaltLabels, Counter>,
    lookup_requested_tokens: Family<ModelSaltLabels, Counter>,
    lookup_hit_tokens: Family<ModelSaltLabels, Counter>,
    lookup_hit_l1_tokens: Family<ModelSaltLabels, Counter>,
    lookup_hit_l2_tokens: Family<ModelSaltLabels, Counter>,
    early_exits: Family<ReasonLabels, Counter>,
    written_chunks: Family<SaltLabels, Counter>,
    read_chunks: Family<SaltLabels, Counter>,
    allocation_failures: Family<ModelLabels, Counter>,
    read_failures: Family<ModelLabels, Counter>,
    submitted_stores: Counter,
    finished_stores: Counter,
    submitted_retrieves: Counter,
    finished_retrieves: Counter,
    loaded_chunks: Family<ModelSaltLabels, Counter>,
    store_throughput: Histogram,
    load_throughput: Histogram,
    stored_bytes: Family<SaltLabels, Counter>,
    retrieved_bytes: Family<SaltLabels, Counter>,
    block_allocations: Counter,
    errors: Family<ErrorLabels, Counter>,
    seconds: Latencies,
    totals: Totals,
}

/// Sums over all labels, for those who draw curves.
#[derive(Default)]
struct Totals {
    requested_tokens: AtomicU64,
    hit_tokens: AtomicU64,
    stored_bytes: AtomicU64,
    retrieved_bytes: AtomicU64,
    errors: AtomicU64,
}

/// What was done for some salts since the server's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SaltCounts {
    pub(crate) lookups: u64,
    pub(crate) lookup_tokens: u64,
    pub(crate) hit_tokens: u64,
    pub(crate) stored_chunks: u64,
    pub(crate) retrieved_chunks: u64,
}

/// What the server has done since its start.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    /// Tokens in whole chunks that were looked up.
    pub requested_tokens: u64,
    /// Those of them that were found.
    pub hit_tokens: u64,
    /// Bytes of KV stored.
    pub stored_bytes: u64,
    /// Bytes of KV retrieved.
    pub retrieved_bytes: u64,
    /// Requests answered with an error or a negative result.
    pub errors: u64,
    /// Requests by operation and time.
    pub requests: Vec<(Operation, super::latencies::Snapshot)>,
}

/// GB a second, as LMCache counts them; its own bounds are the SDK's defaults, too coarse here.
pub(crate) fn throughput() -> Histogram {
    Histogram::new([0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
}

impl ServiceMetrics {
    /// Registers everything in `registry`, which comes without a prefix.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            salts: Names::default(),
            models: Names::default(),
            pairs: Pairs::default(),
            lookups: Family::default(),
            lookup_requested_tokens: Family::default(),
            lookup_hit_tokens: Family::default(),
            lookup_hit_l1_tokens: Family::default(),
            lookup_hit_l2_tokens: Family::default(),
            early_exits: Family::default(),
            written_chunks: Family::default(),
            read_chunks: Family::default(),
            allocation_failures: Family::default(),
            read_failures: Family::default(),
            submitted_stores: Counter::default(),
            finished_stores: Counter::default(),
            submitted_retrieves: Counter::default(),
            finished_retrieves: Counter::default(),
            loaded_chunks: Family::default(),
            store_throughput: throughput(),
            load_throughput: throughput(),
            stored_bytes: Family::default(),
            retrieved_bytes: Family::default(),
            block_allocations: Counter::default(),
            errors: Family::default(),
            seconds: Latencies::default(),
            totals: Totals::default(),
        };
        let lmcache = registry.sub_registry_with_prefix("lmcache_mp");
        lmcache.register("lookups_requests", "Lookups", metrics.lookups.clone());
        lmcache.register(
            "lookup_requested_tokens",
            "Tokens in whole chunks that were looked up",
            metrics.lookup_requested_tokens.clone(),
        );
        lmcache.register(
            "lookup_hit_tokens",
            "Tokens that a lookup found",
            metrics.lookup_hit_tokens.clone(),
        );
        lmcache.register(
            "lookup_hit_l1_tokens",
            "Tokens that a lookup found in memory",
            metrics.lookup_hit_l1_tokens.clone(),
        );
        lmcache.register(
            "lookup_hit_l2_tokens",
            "Tokens that a lookup found in the second tier",
            metrics.lookup_hit_l2_tokens.clone(),
        );
        lmcache.register(
            "lookup_early_exit_requests",
            "Lookups that asked for nothing we could hold",
            metrics.early_exits.clone(),
        );
        lmcache.register(
            "l1_write_chunks",
            "Chunks stored",
            metrics.written_chunks.clone(),
        );
        lmcache.register(
            "l1_read_chunks",
            "Chunks retrieved",
            metrics.read_chunks.clone(),
        );
        lmcache.register(
            "l1_allocation_failure_chunks",
            "Chunks not stored for want of memory",
            metrics.allocation_failures.clone(),
        );
        lmcache.register(
            "l1_read_failure_chunks",
            "Chunks asked for without a lock on them",
            metrics.read_failures.clone(),
        );
        lmcache.register(
            "num_submitted_stores",
            "Transfers into the pool that began",
            metrics.submitted_stores.clone(),
        );
        lmcache.register(
            "num_finished_stores",
            "Transfers into the pool that ended with a commit",
            metrics.finished_stores.clone(),
        );
        lmcache.register(
            "num_submitted_retrieves",
            "Transfers out of the pool that began",
            metrics.submitted_retrieves.clone(),
        );
        lmcache.register(
            "num_finished_retrieves",
            "Transfers out of the pool that ended with a commit",
            metrics.finished_retrieves.clone(),
        );
        lmcache.register(
            "num_chunks_loaded",
            "Chunks that workers got",
            metrics.loaded_chunks.clone(),
        );
        lmcache.register(
            "l0_l1_store_throughput_GB_per_second",
            "Bytes of a store over the time from its begin to its commit",
            metrics.store_throughput.clone(),
        );
        lmcache.register(
            "l0_l1_load_throughput_GB_per_second",
            "Bytes of a retrieve over the time from its begin to its commit",
            metrics.load_throughput.clone(),
        );
        let own = registry.sub_registry_with_prefix("stockade");
        own.register(
            "stored_bytes",
            "Bytes of KV stored",
            metrics.stored_bytes.clone(),
        );
        own.register(
            "retrieved_bytes",
            "Bytes of KV retrieved",
            metrics.retrieved_bytes.clone(),
        );
        own.register(
            "block_allocations",
            "Block allocation records reported by engines",
            metrics.block_allocations.clone(),
        );
        own.register(
            "request_errors",
            "Requests answered with an error or a negative result",
            metrics.errors.clone(),
        );
        own.register(
            "request_seconds",
            "Time from a request's last byte to its answer",
            metrics.seconds.clone(),
        );
        metrics
    }

    /// A lookup of `requested` tokens found `hit`, of which `in_memory` were there already.
    pub(crate) fn looked_up(
        &self,
        model: &str,
        salt: &str,
        requested: usize,
        hit: usize,
        in_memory: usize,
    ) {
        let labels = self.pairs.bounded(ModelSaltLabels {
            model_name: self.models.label(model),
            cache_salt: self.salts.label(salt),
        });
        self.totals
            .requested_tokens
            .fetch_add(requested as u64, Ordering::Relaxed);
        self.totals
            .hit_tokens
            .fetch_add(hit as u64, Ordering::Relaxed);
        self.lookups.get_or_create(&labels).inc();
        self.lookup_requested_tokens
            .get_or_create(&labels)
            .inc_by(requested as u64);
        self.lookup_hit_tokens
            .get_or_create(&labels)
            .inc_by(hit as u64);
        self.lookup_hit_l1_tokens
            .get_or_create(&labels)
            .inc_by(in_memory as u64);
        self.lookup_hit_l2_tokens
            .get_or_create(&labels)
            .inc_by(hit.saturating_sub(in_memory) as u64);
    }

    /// What was done for the salts that are wanted; those that share a label count for none.
    pub(crate) fn counts_of(&self, wanted: impl Fn(&str) -> bool) -> SaltCounts {
        let mut counts = SaltCounts::default();
        let models = self.models.all();
        for cache_salt in self.salts.all() {
            if !wanted(&cache_salt.0) {
                continue;
            }
            for model_name in &models {
                let labels = ModelSaltLabels {
                    model_name: model_name.clone(),
                    cache_salt: cache_salt.clone(),
                };
                let of = |family: &Family<ModelSaltLabels, Counter>| {
                    family.get(&labels).map_or(0, |counter| counter.get())
                };
                counts.lookups += of(&self.lookups);
                counts.lookup_tokens += of(&self.lookup_requested_tokens);
                counts.hit_tokens += of(&self.lookup_hit_tokens);
            }
            let labels = SaltLabels { cache_salt };
            let of = |family: &Family<SaltLabels, Counter>| {
                family.get(&labels).map_or(0, |counter| counter.get())
            };
            counts.stored_chunks += of(&self.written_chunks);
            counts.retrieved_chunks += of(&self.read_chunks);
        }
        counts
    }

    /// Drops the series of a salt, and its name; returns how many there were.
    pub(crate) fn forget(&self, salt: &str) -> usize {
        let Some(cache_salt) = self.salts.forget(salt) else {
            return 0;
        };
        let labels = SaltLabels {
            cache_salt: cache_salt.clone(),
        };
        let mut forgotten = 0;
        for family in [
            &self.written_chunks,
            &self.read_chunks,
            &self.stored_bytes,
            &self.retrieved_bytes,
        ] {
            forgotten += usize::from(family.remove(&labels));
        }
        let others = ClientLabel(Arc::from("other"));
        for model_name in self.models.all().into_iter().chain([others]) {
            let labels = ModelSaltLabels {
                model_name,
                cache_salt: cache_salt.clone(),
            };
            for family in [
                &self.lookups,
                &self.lookup_requested_tokens,
                &self.lookup_hit_tokens,
                &self.lookup_hit_l1_tokens,
                &self.lookup_hit_l2_tokens,
                &self.loaded_chunks,
            ] {
                forgotten += usize::from(family.remove(&labels));
            }
        }
        forgotten
    }

    pub(crate) fn early_exit(&self, reason: &'static str) {
        self.early_exits
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    pub(crate) fn store_began(&self) {
        self.submitted_stores.inc();
    }

    /// A commit made `chunks` readable; `time` since the store began.
    pub(crate) fn stored(&self, salt: &str, chunks: usize, bytes: u64, time: Duration) {
        let labels = SaltLabels {
            cache_salt: self.salts.label(salt),
        };
        self.finished_stores.inc();
        self.written_chunks
            .get_or_create(&labels)
            .inc_by(chunks as u64);
        self.stored_bytes.get_or_create(&labels).inc_by(bytes);
        self.totals.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        observe_throughput(&self.store_throughput, bytes, time);
    }

    /// A worker was given `chunks` to read.
    pub(crate) fn retrieve_began(&self, model: &str, salt: &str, chunks: usize, bytes: u64) {
        let labels = SaltLabels {
            cache_salt: self.salts.label(salt),
        };
        self.submitted_retrieves.inc();
        self.read_chunks
            .get_or_create(&labels)
            .inc_by(chunks as u64);
        self.retrieved_bytes.get_or_create(&labels).inc_by(bytes);
        self.totals
            .retrieved_bytes
            .fetch_add(bytes, Ordering::Relaxed);
        let labels = self.pairs.bounded(ModelSaltLabels {
            model_name: self.models.label(model),
            cache_salt: labels.cache_salt,
        });
        self.loaded_chunks
            .get_or_create(&labels)
            .inc_by(chunks as u64);
    }

    /// A worker is done with what it was given; `time` since then.
    pub(crate) fn retrieved(&self, bytes: u64, time: Duration) {
        self.finished_retrieves.inc();
        observe_throughput(&self.load_throughput, bytes, time);
    }

    /// Everything so far.
    pub(crate) fn activity(&self) -> Activity {
        let read = |total: &AtomicU64| total.load(Ordering::Relaxed);
        Activity {
            requested_tokens: read(&self.totals.requested_tokens),
            hit_tokens: read(&self.totals.hit_tokens),
            stored_bytes: read(&self.totals.stored_bytes),
            retrieved_bytes: read(&self.totals.retrieved_bytes),
            errors: read(&self.totals.errors),
            requests: self.seconds.snapshot(),
        }
    }

    pub(crate) fn allocation_failed(&self, model: &str, chunks: usize) {
        let labels = ModelLabels {
            during: "l1_store",
            model_name: self.models.label(model),
        };
        self.allocation_failures
            .get_or_create(&labels)
            .inc_by(chunks as u64);
    }

    pub(crate) fn read_failed(&self, model: &str, chunks: usize) {
        let labels = ModelLabels {
            during: "l1_retrieve",
            model_name: self.models.label(model),
        };
        self.read_failures
            .get_or_create(&labels)
            .inc_by(chunks as u64);
    }

    pub(crate) fn blocks_allocated(&self, records: usize) {
        self.block_allocations.inc_by(records as u64);
    }

    pub(crate) fn failed(&self, operation: Option<Operation>, reason: &'static str) {
        let operation = operation.map_or("unknown", Operation::name);
        self.totals.errors.fetch_add(1, Ordering::Relaxed);
        self.errors
            .get_or_create(&ErrorLabels { operation, reason })
            .inc();
    }

    pub(crate) fn answered(&self, operation: Operation, time: Duration) {
        self.seconds.observe(operation, time);
    }
}

/// Notes that `bytes` took `time`.
pub(crate) fn observe_throughput(throughput: &Histogram, bytes: u64, time: Duration) {
    if !time.is_zero() {
        throughput.observe(bytes as f64 / 1e9 / time.as_secs_f64());
    }
}
