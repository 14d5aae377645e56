//! Counters of the second tier; LMCache's names where the meaning is LMCache's
//! (`docs/design/v1/mp_observability/METRICS.md` there).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use stockade_cache::ObjectKey;
use stockade_l2::AdapterSpec;

use crate::service::{Names, SaltLabels, observe_throughput, throughput};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdapterLabels {
    l2_name: &'static str,
    adapter_index: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    l2_name: &'static str,
    adapter_index: u64,
    during: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QuarantineLabels {
    l2_name: &'static str,
    adapter_index: u64,
    moved: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    reason: &'static str,
}

type BySalt = Family<SaltLabels, Counter>;
type ByAdapter = Family<AdapterLabels, Counter>;

/// See the module.
pub(super) struct TierMetrics {
    types: Vec<&'static str>,
    salts: Names,
    store_submitted: BySalt,
    store_submitted_requests: ByAdapter,
    store_completed: BySalt,
    store_completed_requests: ByAdapter,
    store_present: ByAdapter,
    failures: Family<FailureLabels, Counter>,
    lookups: Counter,
    lookup_chunks: BySalt,
    load_submitted: BySalt,
    load_submitted_requests: ByAdapter,
    load_completed: BySalt,
    load_completed_requests: ByAdapter,
    inflight_loads: Family<AdapterLabels, Gauge>,
    inflight_load_bytes: Family<AdapterLabels, Gauge>,
    inflight_stores: Family<AdapterLabels, Gauge>,
    usage: Family<AdapterLabels, Gauge>,
    evicted: BySalt,
    quarantined: Family<QuarantineLabels, Counter>,
    allocation_failures: Counter,
    ended_early: Family<EndLabels, Counter>,
    prefetch_seconds: Histogram,
    store_throughput: Histogram,
    load_throughput: Histogram,
    waiting: Arc<AtomicU64>,
}

/// A lookup that waits or loads; counted until it is dropped.
pub(super) struct Waiting(Arc<AtomicU64>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl TierMetrics {
    pub(super) fn new(adapters: &[AdapterSpec]) -> Self {
        let metrics = Self {
            types: adapters.iter().map(AdapterSpec::type_name).collect(),
            salts: Names::default(),
            store_submitted: Family::default(),
            store_submitted_requests: Family::default(),
            store_completed: Family::default(),
            store_completed_requests: Family::default(),
            store_present: Family::default(),
            failures: Family::default(),
            lookups: Counter::default(),
            lookup_chunks: Family::default(),
            load_submitted: Family::default(),
            load_submitted_requests: Family::default(),
            load_completed: Family::default(),
            load_completed_requests: Family::default(),
            inflight_loads: Family::default(),
            inflight_load_bytes: Family::default(),
            inflight_stores: Family::default(),
            usage: Family::default(),
            evicted: Family::default(),
            quarantined: Family::default(),
            allocation_failures: Counter::default(),
            ended_early: Family::default(),
            prefetch_seconds: Histogram::new([
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
            ]),
            store_throughput: throughput(),
            load_throughput: throughput(),
            waiting: Arc::default(),
        };
        // Series of what may not happen for long are there from the start, so that a rate over
        // them is right from the first time on.
        let everybody = metrics.salts.labels("");
        drop(metrics.evicted.get_or_create(&everybody));
        for index in 0..adapters.len() {
            let labels = metrics.adapter(index);
            for counters in [
                &metrics.store_submitted_requests,
                &metrics.store_completed_requests,
                &metrics.store_present,
                &metrics.load_submitted_requests,
                &metrics.load_completed_requests,
            ] {
                drop(counters.get_or_create(&labels));
            }
            for gauges in [
                &metrics.inflight_loads,
                &metrics.inflight_load_bytes,
                &metrics.inflight_stores,
            ] {
                drop(gauges.get_or_create(&labels));
            }
            for moved in [true, false] {
                metrics.quarantine(index, moved);
            }
        }
        metrics
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let lmcache = registry.sub_registry_with_prefix("lmcache_mp");
        lmcache.register(
            "l2_store_submitted_objects_chunks",
            "Objects queued for an L2 adapter",
            self.store_submitted.clone(),
        );
        lmcache.register(
            "l2_store_submitted_requests",
            "Writes to an L2 adapter that began",
            self.store_submitted_requests.clone(),
        );
        lmcache.register(
            "l2_store_completed_objects_chunks",
            "Objects written to an L2 adapter",
            self.store_completed.clone(),
        );
        lmcache.register(
            "l2_store_completed_requests",
            "Writes to an L2 adapter",
            self.store_completed_requests.clone(),
        );
        lmcache.register(
            "l2_prefetch_lookup_requests",
            "Calls that asked the L2 adapters what they have",
            self.lookups.clone(),
        );
        lmcache.register(
            "l2_prefetch_lookup_objects_chunks",
            "Objects that the L2 adapters were asked for",
            self.lookup_chunks.clone(),
        );
        lmcache.register(
            "l2_prefetch_load_submitted_objects_chunks",
            "Objects whose load began",
            self.load_submitted.clone(),
        );
        lmcache.register(
            "l2_prefetch_load_submitted_requests",
            "Loads that began",
            self.load_submitted_requests.clone(),
        );
        lmcache.register(
            "l2_prefetch_load_completed_chunks",
            "Objects loaded",
            self.load_completed.clone(),
        );
        lmcache.register(
            "l2_load_completed_requests",
            "Loads that succeeded",
            self.load_completed_requests.clone(),
        );
        lmcache.register(
            "num_inflight_l2_loads",
            "Loads on their way",
            self.inflight_loads.clone(),
        );
        lmcache.register(
            "inflight_load_memory_usage_bytes",
            "Memory reserved for loads on their way",
            self.inflight_load_bytes.clone(),
        );
        lmcache.register(
            "num_inflight_l2_stores",
            "Writes on their way",
            self.inflight_stores.clone(),
        );
        lmcache.register(
            "l2_usage_bytes",
            "Bytes in an L2 adapter that keeps count: one with max_capacity_gb, or mock",
            self.usage.clone(),
        );
        lmcache.register(
            "l2_evicted_chunks",
            "Objects that a bounded L2 adapter removed to make room",
            self.evicted.clone(),
        );
        lmcache.register(
            "l2_store_throughput_GBs",
            "Bytes of a write over its time",
            self.store_throughput.clone(),
        );
        lmcache.register(
            "l2_load_throughput_GBs",
            "Bytes of a load over its time",
            self.load_throughput.clone(),
        );
        let own = registry.sub_registry_with_prefix("stockade");
        own.register(
            "l2_store_present_objects",
            "Objects that an L2 adapter had already",
            self.store_present.clone(),
        );
        own.register(
            "l2_failures",
            "Objects not written, and calls that failed, by what was done and why",
            self.failures.clone(),
        );
        own.register(
            "l2_quarantined_objects",
            "Damaged values found, and whether they could be moved aside",
            self.quarantined.clone(),
        );
        own.register(
            "l2_allocation_failure_objects",
            "Objects not loaded for want of memory",
            self.allocation_failures.clone(),
        );
        own.register(
            "l2_prefetch_ended_early",
            "Prefixes that ended before what the adapters have, by why",
            self.ended_early.clone(),
        );
        own.register(
            "l2_prefetch_seconds",
            "Time of a lookup's work in the second tier",
            self.prefetch_seconds.clone(),
        );
    }

    /// Forgets the series of a salt; returns how many there were.
    pub(super) fn forget(&self, salt: &str) -> usize {
        let Some(labels) = self.salts.forget_labels(salt) else {
            return 0;
        };
        let families = [
            &self.store_submitted,
            &self.store_completed,
            &self.lookup_chunks,
            &self.load_submitted,
            &self.load_completed,
            &self.evicted,
        ];
        families.iter().filter(|it| it.remove(&labels)).count()
    }

    fn adapter(&self, index: usize) -> AdapterLabels {
        AdapterLabels {
            l2_name: self.types.get(index).copied().unwrap_or("unknown"),
            adapter_index: index as u64,
        }
    }

    fn salt(&self, key: &ObjectKey) -> SaltLabels {
        self.salts.labels(key.scope.cache_salt.as_str())
    }

    fn failed(&self, index: usize, during: &'static str, reason: &'static str) {
        let AdapterLabels {
            l2_name,
            adapter_index,
        } = self.adapter(index);
        let labels = FailureLabels {
            l2_name,
            adapter_index,
            during,
            reason,
        };
        self.failures.get_or_create(&labels).inc();
    }

    pub(super) fn store_submitted(&self, key: &ObjectKey) {
        self.store_submitted.get_or_create(&self.salt(key)).inc();
    }

    pub(super) fn store_dropped(&self, index: usize, reason: &'static str) {
        self.failed(index, "store", reason);
    }

    pub(super) fn store_present(&self, index: usize) {
        self.store_present.get_or_create(&self.adapter(index)).inc();
    }

    pub(super) fn store_completed(
        &self,
        index: usize,
        key: &ObjectKey,
        bytes: u64,
        time: Duration,
    ) {
        self.store_completed.get_or_create(&self.salt(key)).inc();
        self.store_completed_requests
            .get_or_create(&self.adapter(index))
            .inc();
        observe_throughput(&self.store_throughput, bytes, time);
    }

    pub(super) fn lookup_submitted<'k>(&self, keys: impl Iterator<Item = &'k ObjectKey>) {
        self.lookups.inc();
        for key in keys {
            self.lookup_chunks.get_or_create(&self.salt(key)).inc();
        }
    }

    pub(super) fn read_failed(&self, index: usize, during: &'static str, reason: &'static str) {
        self.failed(index, during, reason);
    }

    pub(super) fn load_submitted(&self, index: usize, key: &ObjectKey) {
        self.load_submitted.get_or_create(&self.salt(key)).inc();
        self.load_submitted_requests
            .get_or_create(&self.adapter(index))
            .inc();
    }

    /// Counts a load of `bytes` as on its way until what it returns is dropped.
    pub(super) fn loading(&self, index: usize, bytes: u64) -> (OnItsWay, OnItsWay) {
        let labels = self.adapter(index);
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        (
            OnItsWay::count(&self.inflight_loads, &labels, 1),
            OnItsWay::count(&self.inflight_load_bytes, &labels, bytes),
        )
    }

    /// Counts a write as begun, and as on its way until what it returns is dropped.
    pub(super) fn storing(&self, index: usize) -> OnItsWay {
        let labels = self.adapter(index);
        self.store_submitted_requests.get_or_create(&labels).inc();
        OnItsWay::count(&self.inflight_stores, &labels, 1)
    }

    /// Sets what an adapter holds.
    pub(super) fn used(&self, index: usize, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.usage.get_or_create(&self.adapter(index)).set(bytes);
    }

    pub(super) fn evicted(&self, keys: &[ObjectKey]) {
        for key in keys {
            self.evicted.get_or_create(&self.salt(key)).inc();
        }
    }

    pub(super) fn load_completed(&self, index: usize, key: &ObjectKey, bytes: u64, time: Duration) {
        self.load_completed.get_or_create(&self.salt(key)).inc();
        self.load_completed_requests
            .get_or_create(&self.adapter(index))
            .inc();
        observe_throughput(&self.load_throughput, bytes, time);
    }

    pub(super) fn quarantined(&self, index: usize, moved: bool) {
        self.quarantine(index, moved).inc();
    }

    fn quarantine(&self, index: usize, moved: bool) -> Counter {
        let AdapterLabels {
            l2_name,
            adapter_index,
        } = self.adapter(index);
        let labels = QuarantineLabels {
            l2_name,
            adapter_index,
            moved: if moved { "yes" } else { "no" },
        };
        self.quarantined.get_or_create_owned(&labels)
    }

    pub(super) fn no_room(&self, keys: &[ObjectKey]) {
        self.allocation_failures.inc_by(keys.len() as u64);
    }

    pub(super) fn prefetch_ended(&self, reason: &'static str) {
        self.ended_early.get_or_create(&EndLabels { reason }).inc();
    }

    pub(super) fn prefetched(&self, time: Duration) {
        self.prefetch_seconds.observe(time.as_secs_f64());
    }

    /// Counts a lookup as waiting; `None` if `most` do already.
    pub(super) fn wait(&self, most: u64) -> Option<Waiting> {
        let count = self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting(Arc::clone(&self.waiting));
        (count < most).then_some(waiting)
    }

    pub(super) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// A transfer on its way, or its bytes.
pub(super) struct OnItsWay(Gauge, i64);

impl OnItsWay {
    fn count(gauges: &Family<AdapterLabels, Gauge>, labels: &AdapterLabels, amount: i64) -> Self {
        let gauge = gauges.get_or_create_owned(labels);
        gauge.inc_by(amount);
        Self(gauge, amount)
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.0.dec_by(self.1);
    }
}
