//! What hit rate a policy and a pool size would have given, by replaying requests through
//! the engine's own table of objects, without bytes.
//!
//! Nothing here imitates the engine: lookups lock, stores reserve and commit, eviction runs
//! on demand and at the watermark after each request, all by the code that serves engines.

mod trace;
mod workload;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use trace::{Trace, TraceRequest};
pub use workload::{UnknownWorkload, Workload};

use crate::engine::Tenant;
use crate::error::BudgetError;
use crate::eviction::{PolicyKind, Ranker};
use crate::key::ObjectKey;
use crate::l1::lease::OwnerId;
use crate::l1::ranking::Orders;
use crate::l1::{L1, L1Settings};
use crate::shm_pool::slot_allocator::SlotAllocator;

/// Requests between two reports of progress.
const PROGRESS_STEP: usize = 1024;

/// Time from one request to the next, for who ranks by time.
const REQUEST_INTERVAL: Duration = Duration::from_millis(1);

/// Objects looked at per round of eviction at the watermark, as in the engine.
const EVICTION_STEP: usize = 256;

/// The pool to simulate; the fields mean what they mean in
/// [`EngineConfig`](crate::EngineConfig).
#[derive(Clone)]
pub struct SimulatedPool {
    /// Bytes of the pool.
    pub capacity_bytes: u64,
    /// What goes first when room is needed.
    pub policy: PolicyKind,
    /// Alignment of slots in bytes.
    pub align_bytes: u64,
    /// Share of the pool in use at which eviction starts.
    pub trigger_watermark: f64,
    /// Share of the used bytes that it then frees.
    pub eviction_ratio: f64,
    /// Who may use how much.
    pub tenants: Vec<Tenant>,
    /// Who ranks at the watermark in place of the policy, if anybody does.
    pub ranker: Option<Arc<dyn Ranker>>,
}

impl std::fmt::Debug for SimulatedPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimulatedPool")
            .field("capacity_bytes", &self.capacity_bytes)
            .field("policy", &self.policy)
            .field("is_ranked", &self.ranker.is_some())
            .finish_non_exhaustive()
    }
}

impl SimulatedPool {
    /// A pool with the server's defaults for all but size and policy.
    pub fn new(capacity_bytes: u64, policy: PolicyKind) -> Self {
        Self {
            capacity_bytes,
            policy,
            align_bytes: 4096,
            trigger_watermark: 0.8,
            eviction_ratio: 0.2,
            tenants: Vec::new(),
            ranker: None,
        }
    }
}

/// What came of a replay.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Simulated {
    /// Requests with a lookup.
    pub lookups: u64,
    /// Tokens that they asked for, the tail of an unfinished chunk included.
    pub tokens: u64,
    /// Tokens of the prefixes that were found.
    pub hit_tokens: u64,
    /// Objects evicted.
    pub evicted_objects: u64,
    /// Objects that found no room.
    pub refused_objects: u64,
}

impl Simulated {
    /// Share of the tokens that were found; the tail of an unfinished chunk never is. As
    /// in LMCache's `tools/cache_simulator`.
    pub fn token_hit_rate(&self) -> f64 {
        match self.tokens {
            0 => 0.0,
            tokens => self.hit_tokens as f64 / tokens as f64,
        }
    }
}

/// Replays a trace. `progress` is told the number of requests done, now and then.
///
/// # Errors
/// [`BudgetError`] if the pool cannot keep what its tenants are promised.
pub fn simulate(
    trace: &Trace,
    pool: &SimulatedPool,
    progress: &mut dyn FnMut(usize),
) -> Result<Simulated, BudgetError> {
    let mut replay = Replay::new(pool)?;
    for (nth, request) in trace.requests().enumerate() {
        if nth % PROGRESS_STEP == 0 {
            progress(nth);
        }
        replay.serve(&request);
    }
    progress(trace.len());
    Ok(replay.finish())
}

struct Replay {
    ranker: Option<Arc<dyn Ranker>>,
    l1: L1,
    owner: OwnerId,
    now: Instant,
    served: u64,
    done: Simulated,
}

impl Replay {
    fn new(pool: &SimulatedPool) -> Result<Self, BudgetError> {
        let forever = Duration::from_secs(1 << 30);
        let settings = L1Settings {
            write_ttl: forever,
            read_ttl: forever,
            trigger_watermark: pool.trigger_watermark,
            eviction_ratio: pool.eviction_ratio,
            // As a worker that wrote into the pool itself, so that no bytes are needed.
            shared: true,
        };
        let allocator = SlotAllocator::new(pool.capacity_bytes, pool.align_bytes);
        let mut l1 = L1::new(settings, allocator, pool.policy);
        for tenant in &pool.tenants {
            l1.configure_tenant(tenant)?;
        }
        let owner = l1.new_owner();
        Ok(Self {
            ranker: pool.ranker.clone(),
            l1,
            owner,
            now: Instant::now(),
            served: 0,
            done: Simulated::default(),
        })
    }

    /// What an engine does for one request: look up, read, compute and store the rest, end.
    fn serve(&mut self, request: &TraceRequest<'_>) {
        let rows: Vec<Vec<ObjectKey>> = request.rows().collect();
        // Only who ranks wants a clock and names.
        self.now += REQUEST_INTERVAL;
        self.served += 1;
        let ranked = self.ranker.is_some();
        let name: Option<Arc<str>> = ranked.then(|| format!("r{}", self.served).into());
        let mut hit_chunks = 0;
        if request.is_lookup {
            let found = self.l1.lock_prefix(self.now, self.owner, &rows, 1);
            if let Some(lease) = found.lease {
                let all = 0..found.hit_chunks;
                self.l1.release_prefix(self.owner, lease, all, 1);
            }
            hit_chunks = found.hit_chunks;
            self.done.lookups += 1;
            self.done.tokens += request.tokens;
            self.done.hit_tokens += hit_chunks as u64 * request.chunk_tokens;
        }
        for row in &rows {
            let missing = row.get(hit_chunks..).unwrap_or_default();
            self.store(missing, request.object_bytes);
            if request.is_lookup {
                self.l1.touch(self.now, row, name.as_ref());
            }
        }
        let mut wanted = self.l1.bytes_over_watermark();
        while wanted > 0 {
            let mut goal = wanted;
            let mut orders = Orders::default();
            if let Some(ranker) = &self.ranker {
                let (candidates, enough) = self.l1.candidates(self.now, wanted, &**ranker, None);
                if !candidates.is_empty() {
                    orders = Orders::ask(&**ranker, candidates);
                    goal = enough;
                }
            }
            let round = self
                .l1
                .evict_ordered(goal, EVICTION_STEP, &mut orders, None);
            wanted = wanted.saturating_sub(round.freed_bytes);
            if round.is_exhausted {
                break;
            }
        }
    }

    fn store(&mut self, keys: &[ObjectKey], object_bytes: u64) {
        let reserved = self.l1.reserve(self.now, self.owner, keys, object_bytes);
        match reserved.map(|reservation| reservation.lease) {
            Ok(Some(lease)) => {
                // The lease is fresh and ours, so this publishes all of it.
                let _ = self.l1.commit(self.now, self.owner, lease, None);
            }
            Ok(None) => {}
            Err(_) => self.done.refused_objects += keys.len() as u64,
        }
    }

    fn finish(self) -> Simulated {
        Simulated {
            evicted_objects: self.l1.status().evicted_objects,
            ..self.done
        }
    }
}
