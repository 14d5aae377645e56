//! Counters of the request path.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use stockade_wire::Operation;

/// Tenants and models get series of their own up to this many; further ones share `other`.
const MAX_LABEL_VALUES: usize = 256;
/// Longest label value in bytes.
const MAX_LABEL_BYTES: usize = 128;

/// A label whose values come from clients: bounded in number and length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ClientLabel(Arc<str>);

impl EncodeLabelValue for ClientLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        (&*self.0).encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SaltLabels {
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
struct OperationLabels {
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    operation: &'static str,
    reason: &'static str,
}

/// What clients may name, remembered so that their number has a bound.
#[derive(Default)]
struct Names(Mutex<std::collections::HashSet<Arc<str>>>);

impl Names {
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
}

/// Metrics of the request path; LMCache's names where the meaning is LMCache's
/// (`docs/design/v1/mp_observability/METRICS.md` there).
pub(crate) struct ServiceMetrics {
    salts: Names,
    models: Names,
    lookups: Family<ModelSaltLabels, Counter>,
    lookup_requested_tokens: Family<ModelSaltLabels, Counter>,
    lookup_hit_tokens: Family<ModelSaltLabels, Counter>,
    lookup_hit_l1_tokens: Family<ModelSaltLabels, Counter>,
    early_exits: Family<ReasonLabels, Counter>,
    written_chunks: Family<SaltLabels, Counter>,
    read_chunks: Family<SaltLabels, Counter>,
    allocation_failures: Family<ModelLabels, Counter>,
    read_failures: Family<ModelLabels, Counter>,
    stored_bytes: Counter,
    block_allocations: Counter,
    errors: Family<ErrorLabels, Counter>,
    seconds: Family<OperationLabels, Histogram>,
}

fn latency() -> Histogram {
    Histogram::new([
        5e-6, 2e-5, 1e-4, 5e-4, 2e-3, 1e-2, 5e-2, 0.25, 1.0, 5.0, 30.0,
    ])
}

impl ServiceMetrics {
    /// Registers everything in `registry`, which comes without a prefix.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            salts: Names::default(),
            models: Names::default(),
            lookups: Family::default(),
            lookup_requested_tokens: Family::default(),
            lookup_hit_tokens: Family::default(),
            lookup_hit_l1_tokens: Family::default(),
            early_exits: Family::default(),
            written_chunks: Family::default(),
            read_chunks: Family::default(),
            allocation_failures: Family::default(),
            read_failures: Family::default(),
            stored_bytes: Counter::default(),
            block_allocations: Counter::default(),
            errors: Family::default(),
            seconds: Family::new_with_constructor(latency),
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
        let own = registry.sub_registry_with_prefix("stockade");
        own.register(
            "stored_bytes",
            "Bytes of KV stored",
            metrics.stored_bytes.clone(),
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

    pub(crate) fn looked_up(&self, model: &str, salt: &str, requested: usize, hit: usize) {
        let labels = ModelSaltLabels {
            model_name: self.models.label(model),
            cache_salt: self.salts.label(salt),
        };
        self.lookups.get_or_create(&labels).inc();
        self.lookup_requested_tokens
            .get_or_create(&labels)
            .inc_by(requested as u64);
        self.lookup_hit_tokens
            .get_or_create(&labels)
            .inc_by(hit as u64);
        self.lookup_hit_l1_tokens
            .get_or_create(&labels)
            .inc_by(hit as u64);
    }

    pub(crate) fn early_exit(&self, reason: &'static str) {
        self.early_exits
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    pub(crate) fn stored(&self, salt: &str, chunks: usize, bytes: u64) {
        self.written_chunks
            .get_or_create(&SaltLabels {
                cache_salt: self.salts.label(salt),
            })
            .inc_by(chunks as u64);
        self.stored_bytes.inc_by(bytes);
    }

    pub(crate) fn retrieved(&self, salt: &str, chunks: usize) {
        self.read_chunks
            .get_or_create(&SaltLabels {
                cache_salt: self.salts.label(salt),
            })
            .inc_by(chunks as u64);
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
        self.errors
            .get_or_create(&ErrorLabels { operation, reason })
            .inc();
    }

    pub(crate) fn answered(&self, operation: &'static str, time: Duration) {
        self.seconds
            .get_or_create(&OperationLabels { operation })
            .observe(time.as_secs_f64());
    }
}
