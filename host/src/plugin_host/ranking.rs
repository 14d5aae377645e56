//! Plugins that rank candidates for eviction, as the cache asks them.
//!
//! Eviction at the watermark asks the plugin of the tenant, or the server's, and takes the native
//! order whenever that has none to give. A plugin that fails again and again is left alone for a
//! while, so that eviction does not wait for its time limit each time.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_cache::{Candidate, Ranker};
use stockade_sandbox::{RankRequest, Supervisor, host_api::RankCandidate};

use super::{TenantScope, key_text, milliseconds};
use crate::tenancy::Tenancy;

/// Failures in a row after which a plugin is not asked for a while.
const FAILURES: u32 = 3;
/// The first such while; it doubles with each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a plugin has done.
#[derive(Debug, Default)]
struct Record {
    failures: u32,
    paused_until: Option<Instant>,
    /// Rounds that went without it meanwhile.
    skipped: u64,
}

impl Record {
    fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    fn note(&mut self, is_success: bool, now: Instant) {
        if is_success {
            self.failures = 0;
            self.paused_until = None;
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if let Some(further) = self.failures.checked_sub(FAILURES) {
            let pause = FIRST_PAUSE.saturating_mul(1 << further.min(16));
            self.paused_until = Some(now + pause.min(LONGEST_PAUSE));
        }
    }
}

/// What is shown of a ranking plugin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankerStatus {
    /// Whether it is left alone for now.
    pub is_paused: bool,
    /// Rounds of eviction that went without it because of that.
    pub skipped: u64,
}

#[derive(Debug, Default)]
struct Table {
    /// The plugin of each tenant that has one.
    by_tenant: HashMap<Arc<str>, Arc<str>>,
    /// The plugin of all others.
    general: Option<Arc<str>>,
    records: HashMap<Arc<str>, Record>,
}

impl Table {
    fn plugin(&self, tenant: &str) -> Option<&Arc<str>> {
        self.by_tenant.get(tenant).or(self.general.as_ref())
    }
}

/// [`Ranker`] by plugins.
#[derive(Debug)]
pub struct PluginRanker {
    supervisor: OnceLock<Weak<Supervisor>>,
    tenancy: Arc<Tenancy>,
    table: Mutex<Table>,
}

impl PluginRanker {
    /// One that asks nobody yet.
    #[must_use]
    pub fn new(tenancy: Arc<Tenancy>) -> Self {
        Self {
            supervisor: OnceLock::new(),
            tenancy,
            table: Mutex::default(),
        }
    }

    /// Asks these plugins from now on.
    pub fn ask(&self, supervisor: &Arc<Supervisor>) {
        let _ = self.supervisor.set(Arc::downgrade(supervisor));
        self.refresh();
    }

    /// Looks anew which plugins there are and whose. Of several for the same tenant the first
    /// is asked.
    pub fn refresh(&self) {
        let Some(supervisor) = self.supervisor.get().and_then(Weak::upgrade) else {
            return;
        };
        let rankers = supervisor.rankers();
        let mut by_tenant = HashMap::new();
        let mut general = None;
        for plugin in &rankers {
            match TenantScope::of_plugin(&self.tenancy, plugin).tenant() {
                Some(tenant) => {
                    by_tenant
                        .entry(Arc::clone(tenant))
                        .or_insert_with(|| Arc::clone(plugin));
                }
                None => {
                    general.get_or_insert_with(|| Arc::clone(plugin));
                }
            }
        }
        let mut table = self.table.lock();
        table.by_tenant = by_tenant;
        table.general = general;
        table.records.retain(|plugin, _| rankers.contains(plugin));
    }

    /// What is known of a plugin's ranking.
    #[must_use]
    pub fn status(&self, plugin: &str) -> RankerStatus {
        let table = self.table.lock();
        let record = table.records.get(plugin);
        record.map_or_else(RankerStatus::default, |record| RankerStatus {
            is_paused: record.is_paused(Instant::now()),
            skipped: record.skipped,
        })
    }
}

impl Ranker for PluginRanker {
    fn ranks(&self, tenant: &str) -> bool {
        let mut table = self.table.lock();
        let Some(plugin) = table.plugin(tenant).cloned() else {
            return false;
        };
        match table.records.get_mut(&plugin) {
            Some(record) if record.is_paused(Instant::now()) => {
                record.skipped += 1;
                false
            }
            _ => true,
        }
    }

    fn rank(
        &self,
        tenant: &Arc<str>,
        bytes_wanted: u64,
        candidates: Vec<Candidate>,
    ) -> Option<Vec<u32>> {
        let plugin = self.table.lock().plugin(tenant).cloned()?;
        let supervisor = self.supervisor.get()?.upgrade()?;
        let request = RankRequest {
            tenant: Arc::clone(tenant),
            bytes_wanted,
            count: candidates.len(),
            candidates: Box::new(move || candidates.into_iter().zip(0..).map(shown).collect()),
        };
        let order = supervisor.rank(&plugin, request);
        let mut table = self.table.lock();
        let record = table.records.entry(plugin).or_default();
        record.note(order.is_ok(), Instant::now());
        order.ok()
    }
}

/// A candidate as plugins see it, under that id.
pub(crate) fn shown((candidate, id): (Candidate, u32)) -> RankCandidate {
    RankCandidate {
        id,
        key: key_text(&candidate.key),
        salt: candidate.key.scope.cache_salt.to_string(),
        model: candidate.key.scope.model_name.to_string(),
        bytes: candidate.bytes,
        chunk: candidate.chunk,
        idle_ms: milliseconds(candidate.idle),
        age_ms: milliseconds(candidate.age),
        uses: candidate.uses,
        request: candidate.request.map(|request| request.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use std::path::Path;

    use stockade_cache::{
        Backing, CacheEngine, CacheSalt, ChunkHash, EngineConfig, KeyScope, ObjectKey, Prefault,
    };
    use stockade_sandbox::{
        Compiler, Contract, PluginState, RankFailure, SupervisorConfig, WasmConfig,
    };

    use super::*;

    #[test]
    fn failures_in_a_row_pause_for_longer_and_longer() {
        let now = Instant::now();
        let mut record = Record::default();
        for _ in 1..FAILURES {
            record.note(false, now);
            assert!(!record.is_paused(now));
        }
        record.note(false, now);
        assert!(record.is_paused(now) && !record.is_paused(now + FIRST_PAUSE));
        record.note(false, now);
        assert!(record.is_paused(now + FIRST_PAUSE));
        for _ in 0..100 {
            record.note(false, now);
        }
        assert!(!record.is_paused(now + LONGEST_PAUSE));
        record.note(true, now);
        record.note(false, now);
        assert!(!record.is_paused(now));
    }

    /// A pool of 16 pages that gives 8 back when 8 are used.
    fn engine() -> CacheEngine {
        CacheEngine::open(EngineConfig {
            trigger_watermark: 0.5,
            eviction_ratio: 1.0,
            prefault: Prefault::Nothing,
            ..EngineConfig::new(16 * 4096, Backing::Private)
        })
        .unwrap()
    }

    fn store(engine: &CacheEngine, chunk: u32) {
        let scope = Arc::new(KeyScope {
            model_name: "m".into(),
            kv_rank: 0,
            object_group_id: 0,
            cache_salt: CacheSalt::default(),
        });
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&chunk.to_be_bytes());
        let keys = [ObjectKey::new(scope, ChunkHash(hash))];
        let owner = engine.new_owner();
        let reservation = engine.reserve(owner, &keys, 4096).unwrap();
        let lease = reservation.lease.unwrap();
        engine
            .write(owner, lease, 0, &mut std::iter::once(&[0; 4096][..]))
            .unwrap();
        assert_eq!(engine.commit(owner, lease).unwrap().admitted, 1);
        engine.end_owner(owner);
    }

    fn start(directory: &Path, guest: &str) -> Arc<Supervisor> {
        let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guests/abi-v1");
        let plugins = directory.join("plugins");
        std::fs::create_dir(&plugins).unwrap();
        std::fs::copy(
            guests.join(format!("{guest}.wat")),
            plugins.join(format!("{guest}.wat")),
        )
        .unwrap();
        // Only one that loops is to be too late, however busy the machine.
        let rank_ms = if guest == "rank_loops" { 5 } else { 1000 };
        let manifest = format!(
            "restart = 'never'\nrank = true\n[limits]\ncall_ms = 60000\nrank_ms = {rank_ms}"
        );
        std::fs::write(plugins.join(format!("{guest}.plugin.toml")), manifest).unwrap();
        let wasm = WasmConfig::new(directory.join("cache"), Compiler::InProcess);
        let config = SupervisorConfig::new(vec![plugins], wasm);
        let supervisor = Supervisor::discover(config).unwrap();
        supervisor.start(&Contract::default()).unwrap();
        Arc::new(supervisor)
    }

    /// Every store succeeds and every round frees what it should; the plugin is asked three times,
    /// fails each time for its reason, and is then left alone.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn each_bad_plugin_costs_three_fallbacks_and_no_store() {
        for (guest, first, then) in [
            ("rank_garbage", RankFailure::Garbage, RankFailure::Garbage),
            ("rank_foreign", RankFailure::Foreign, RankFailure::Foreign),
            ("rank_twice", RankFailure::Duplicate, RankFailure::Duplicate),
            (
                "rank_says_nothing",
                RankFailure::Missing,
                RankFailure::Missing,
            ),
            ("rank_traps", RankFailure::Trap, RankFailure::NotRunning),
            ("rank_loops", RankFailure::Timeout, RankFailure::Busy),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let supervisor = start(directory.path(), guest);
            let deadline = Instant::now() + Duration::from_secs(60);
            while supervisor.status(guest).unwrap().state != PluginState::Running {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let ranker = Arc::new(PluginRanker::new(Arc::new(Tenancy::new(Arc::default(), 2))));
            ranker.ask(&supervisor);
            let asked = Arc::clone(&ranker);
            let work = tokio::task::spawn_blocking(move || {
                let engine = engine();
                engine.set_ranker(asked as _);
                for round in 0..5_u32 {
                    for nth in 0..8 {
                        store(&engine, round * 8 + nth);
                    }
                    engine.maintain();
                    assert_eq!(engine.status().used_bytes, 0, "round {round}");
                }
                engine.status()
            });
            let status = work.await.unwrap();
            assert_eq!(
                (status.evicted_objects, status.ranked_evicted_objects),
                (40, 0)
            );
            let counts = supervisor.status(guest).unwrap().counts;
            assert_eq!(counts.ranked, 0, "{guest}");
            let failures = counts.rank_failures;
            if first == then {
                assert_eq!(failures, [(first, 3)], "{guest}");
            } else {
                // One that has just died may still be on its way out at the next question.
                let all: u64 = failures.iter().map(|(_, count)| count).sum();
                assert_eq!(all, 3, "{guest}: {failures:?}");
                let is_first = |(failure, _): &(RankFailure, u64)| *failure == first;
                assert!(failures.iter().any(is_first), "{guest}: {failures:?}");
            }
            let status = ranker.status(guest);
            assert!(
                status.is_paused && status.skipped > 0,
                "{guest}: {status:?}"
            );
        }
    }
}
