//! Loading up: what a lookup lacks in memory is looked for in storage and loaded into the pool.
//!
//! Follows `prefetch_controller.py` and `prefetch_policy.py` of LMCache 0.5.6, with a deadline, and
//! with loads of the same object shared. The prefix is loaded in order, so that whatever ends it
//! early leaves a shorter hit and no gap.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream};
use stockade_cache::{LeaseId, ObjectKey, ReserveError};
use stockade_l2::{AdapterError, BreakerState, Form, ObjectName};

use super::{PrefetchPolicy, Tier, name_of};

/// Objects that one call asks an adapter for.
const FIND_BATCH: usize = 256;
/// Objects that are reserved at once.
const WINDOW: usize = 32;
/// Loads of one request at once.
const CONCURRENCY: usize = 8;
/// Lookups that may wait for their turn; beyond it they end with what memory has.
const MAX_WAITING: u64 = 1024;

/// An object that storage has.
struct Planned {
    key: ObjectKey,
    name: ObjectName,
    /// The adapters that have it, in the order in which they are asked.
    sources: Vec<usize>,
}

/// Slots that this request is filling. Dropped without a commit, they are given back.
struct Window<'t> {
    tier: &'t Tier,
    lease: Option<LeaseId>,
    keys: Vec<ObjectKey>,
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            // One that has expired has given its slots back already.
            let _ = self.tier.engine.abort(self.tier.owner, lease);
        }
        let mut loading = self.tier.loading.lock();
        for key in &self.keys {
            loading.remove(key);
        }
        drop(loading);
        self.tier.settled.notify_waiters();
    }
}

/// How objects are loaded.
#[derive(Debug, Clone, Copy)]
struct Manner {
    /// They stay in memory.
    retain: bool,
    /// What comes after one that cannot be had is of no use.
    is_prefix: bool,
}

/// What a load has brought so far, locked, so that loading the rest does not push it out again.
/// Dropped, the locks go; the request that it was loaded for has its own by then.
pub struct Held<'t> {
    tier: &'t Tier,
    leases: Vec<LeaseId>,
}

impl Held<'_> {
    /// Locks `keys`, from the first on; returns how many of them are readable.
    fn lock(&mut self, keys: Vec<ObjectKey>) -> usize {
        let engine = &self.tier.engine;
        let found = engine.lock_prefix(self.tier.owner, &[keys], 1);
        self.leases.extend(found.lease);
        found.hit_chunks
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for lease in self.leases.drain(..) {
            let engine = &self.tier.engine;
            engine.release_prefix(self.tier.owner, lease, 0..usize::MAX, u32::MAX);
        }
    }
}

/// What a reservation came to.
enum Reserved<'t> {
    /// Slots for these indexes of the keys.
    Ours(Window<'t>, LeaseId, Vec<usize>),
    /// All are readable.
    Nothing,
    /// Another request is loading some of them.
    Elsewhere,
    /// A worker is storing some of them.
    Contended,
    /// There is no room.
    NoRoom,
}

impl Tier {
    /// Whether a lookup could find anything here: there is an adapter that is not left alone.
    #[must_use]
    pub fn may_find(&self) -> bool {
        self.backends
            .iter()
            .any(|backend| backend.guarded.reads().state() != BreakerState::Open)
    }

    /// Loads what memory lacks of the prefix behind its first `hit` chunks, so that a lookup of
    /// `rows` finds more than before. Ends within the deadline of prefetches; dropped, it gives
    /// everything back.
    ///
    /// `rows` are the keys of each rank in chunk order, objects have `bytes` each. What was loaded
    /// is to be locked before the result is dropped.
    #[must_use]
    pub async fn load_prefix(&self, rows: &[Vec<ObjectKey>], hit: usize, bytes: u64) -> Held<'_> {
        let deadline = Instant::now() + self.config.prefetch_deadline;
        let manner = Manner {
            retain: self.config.prefetch_policy == PrefetchPolicy::Retain,
            is_prefix: true,
        };
        self.load(rows, hit, bytes, manner, deadline).await
    }

    /// Loads objects that nobody has asked for yet, to stay in memory: for plugins that know what
    /// comes. One that cannot be had keeps no other away. Returns how many of `keys` are in memory
    /// after that, and ends within the deadline of prefetches; dropped, it gives everything back.
    ///
    /// All calls of this share one turn at loading, a few objects at a time, so that lookups find
    /// the others free.
    pub async fn prefetch(&self, keys: &[ObjectKey], bytes: u64) -> usize {
        let deadline = Instant::now() + self.config.prefetch_deadline;
        let manner = Manner {
            retain: true,
            is_prefix: false,
        };
        for part in keys.chunks(WINDOW) {
            let turn = tokio::time::timeout_at(deadline.into(), self.unasked.acquire());
            let Ok(Ok(_turn)) = turn.await else {
                self.metrics.prefetch_ended("deadline");
                break;
            };
            let rows = [part.to_vec()];
            let loaded = self.load(&rows, 0, bytes, manner, deadline).await;
            // Nobody waits for it, so it holds no room that somebody may need.
            drop(loaded);
        }
        let readable = self.engine.readable(keys);
        readable.iter().filter(|&&it| it).count()
    }

    async fn load(
        &self,
        rows: &[Vec<ObjectKey>],
        hit: usize,
        bytes: u64,
        manner: Manner,
        deadline: Instant,
    ) -> Held<'_> {
        let mut held = Held {
            tier: self,
            leases: Vec::new(),
        };
        let Some(_waiting) = self.metrics.wait(MAX_WAITING) else {
            self.metrics.prefetch_ended("too_many");
            return held;
        };
        let turn = tokio::time::timeout_at(deadline.into(), self.in_flight.acquire());
        let Ok(Ok(_turn)) = turn.await else {
            self.metrics.prefetch_ended("deadline");
            return held;
        };
        let began = Instant::now();
        let plan = self.plan(rows, hit, manner, deadline).await;
        if plan.is_empty() {
            return held;
        }
        let mut loaded = 0;
        while loaded < plan.len() {
            let window = &plan[loaded..plan.len().min(loaded + WINDOW)];
            let outcome = self.load_window(window, bytes, manner.retain, deadline);
            match outcome.await {
                Ok(count) => {
                    let keys = window.iter().take(count).map(|it| it.key.clone());
                    if held.lock(keys.collect()) < count {
                        // Somebody else's store took its room at once.
                        self.metrics.prefetch_ended("l1_contended");
                        break;
                    }
                    loaded += count;
                }
                Err(reason) => {
                    self.metrics.prefetch_ended(reason);
                    let is_hopeless = ["deadline", "l1_oom", "stopping"].contains(&reason);
                    if manner.is_prefix || is_hopeless {
                        break;
                    }
                    // The rest may be had without the one that failed.
                    let keys: Vec<_> = window.iter().map(|it| it.key.clone()).collect();
                    let readable = self.engine.readable(&keys);
                    loaded += 1 + readable.iter().take_while(|&&it| it).count();
                }
            }
        }
        self.metrics.prefetched(began.elapsed());
        held
    }

    /// What storage has of the prefix, in its order.
    async fn plan(
        &self,
        rows: &[Vec<ObjectKey>],
        hit: usize,
        manner: Manner,
        deadline: Instant,
    ) -> Vec<Planned> {
        let chunks: Range<usize> = hit..rows.iter().map(Vec::len).min().unwrap_or(0);
        // Chunk by chunk, all ranks of one before the next: a chunk counts only as a whole.
        let keys: Vec<ObjectKey> = chunks
            .flat_map(|chunk| rows.iter().filter_map(move |row| row.get(chunk)))
            .cloned()
            .collect();
        let in_memory = self.engine.readable(&keys);
        let missing = keys
            .into_iter()
            .zip(in_memory)
            .filter(|(_, is_there)| !is_there)
            // A name that storage cannot have ends the prefix.
            .map_while(|(key, _)| Some((name_of(&key).ok()?, key)))
            .collect::<Vec<_>>();
        let deadline = deadline.min(Instant::now() + self.config.lookup_deadline);
        let mut plan = Vec::new();
        for batch in missing.chunks(FIND_BATCH) {
            self.metrics
                .lookup_submitted(batch.iter().map(|(_, key)| key));
            let names: Vec<_> = batch.iter().map(|(name, _)| name.clone()).collect();
            let ask = self
                .backends
                .iter()
                .enumerate()
                .map(async |(index, backend)| {
                    let found = backend.guarded.find(&names, deadline).await;
                    found.unwrap_or_else(|error| {
                        self.metrics.read_failed(index, "lookup", error.reason());
                        vec![false; names.len()]
                    })
                });
            let found = join_all(ask).await;
            for (at, (name, key)) in batch.iter().enumerate() {
                let has = |index: &usize| found[*index].get(at) == Some(&true);
                let sources: Vec<_> = (0..found.len()).filter(has).collect();
                if sources.is_empty() {
                    match manner.is_prefix {
                        true => return plan,
                        false => continue,
                    }
                }
                plan.push(Planned {
                    key: key.clone(),
                    name: name.clone(),
                    sources,
                });
            }
        }
        plan
    }

    /// Loads a part of the plan. Returns how many of it, from the first on, are readable now.
    ///
    /// # Errors
    /// Why the prefix ends within it.
    async fn load_window(
        &self,
        window: &[Planned],
        bytes: u64,
        retain: bool,
        deadline: Instant,
    ) -> Result<usize, &'static str> {
        let mut window = window;
        loop {
            // Listened to before the look, so that what settles in between is not missed.
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            let keys: Vec<_> = window.iter().map(|planned| planned.key.clone()).collect();
            match self.reserve(&keys, bytes) {
                Reserved::Nothing => return Ok(window.len()),
                Reserved::Ours(slots, lease, indexes) => {
                    self.fill(slots, lease, window, &indexes, bytes, retain, deadline)
                        .await?;
                }
                Reserved::Elsewhere => {
                    if tokio::time::timeout_at(deadline.into(), settled)
                        .await
                        .is_err()
                    {
                        return Err("deadline");
                    }
                }
                Reserved::Contended => return Err("l1_contended"),
                // A shorter prefix may still fit.
                Reserved::NoRoom if window.len() > 1 => window = &window[..window.len() / 2],
                Reserved::NoRoom => {
                    self.metrics.no_room(&keys);
                    return Err("l1_oom");
                }
            }
            if Instant::now() >= deadline {
                return Err("deadline");
            }
        }
    }

    fn reserve(&self, keys: &[ObjectKey], bytes: u64) -> Reserved<'_> {
        // Held over the reservation, so that a key that is reserved by a load is always in here.
        let mut loading = self.loading.lock();
        match self.engine.reserve(self.owner, keys, bytes) {
            Ok(reservation) => {
                let Some(lease) = reservation.lease else {
                    return match self.engine.readable(keys).iter().all(|&it| it) {
                        true => Reserved::Nothing,
                        false if keys.iter().any(|key| loading.contains(key)) => {
                            Reserved::Elsewhere
                        }
                        false => Reserved::Contended,
                    };
                };
                let indexes: Vec<usize> =
                    reservation.slots.iter().map(|&(index, _)| index).collect();
                let ours: Vec<_> = indexes
                    .iter()
                    .filter_map(|&index| keys.get(index).cloned())
                    .collect();
                loading.extend(ours.iter().cloned());
                let window = Window {
                    tier: self,
                    lease: Some(lease),
                    keys: ours,
                };
                Reserved::Ours(window, lease, indexes)
            }
            Err(ReserveError::PoolFull { .. } | ReserveError::CapReached { .. }) => {
                Reserved::NoRoom
            }
            Err(error) => {
                tracing::debug!("nothing can be loaded: {error}");
                Reserved::Contended
            }
        }
    }

    /// Fills reserved slots from storage and publishes what came, up to the first that did not.
    #[expect(clippy::too_many_arguments, reason = "one step of one loop")]
    async fn fill(
        &self,
        mut slots: Window<'_>,
        lease: LeaseId,
        window: &[Planned],
        indexes: &[usize],
        bytes: u64,
        retain: bool,
        deadline: Instant,
    ) -> Result<(), &'static str> {
        let loads = indexes
            .iter()
            .filter_map(|&index| Some((index, window.get(index)?)));
        let load = |(index, planned)| self.load_one(lease, index, planned, bytes, deadline);
        let mut loads = stream::iter(loads.map(load).collect::<Vec<_>>()).buffered(CONCURRENCY);
        let mut came = 0;
        let mut result = Ok(());
        while let Some(loaded) = loads.next().await {
            if let Err(reason) = loaded {
                result = Err(reason);
                break;
            }
            came += 1;
        }
        drop(loads);
        slots.lease = None;
        let committed = match retain {
            true => self.engine.commit(self.owner, lease),
            false => self.engine.commit_temporary(self.owner, lease),
        };
        if let Err(error) = committed {
            tracing::warn!("what was loaded cannot be published: {error}");
            return Err("l1_contended");
        }
        if !retain && let Some(beyond) = slots.keys.get(came..) {
            // Loaded beside one that failed: nobody will lock it.
            self.engine.release(beyond);
        }
        result
    }

    /// Loads one object from the first adapter that gives it, into its slot.
    async fn load_one(
        &self,
        lease: LeaseId,
        slot: usize,
        planned: &Planned,
        bytes: u64,
        deadline: Instant,
    ) -> Result<(), &'static str> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let room = self.loading_kib.acquire_many(kib.min(super::LOADING_KIB));
        let Ok(Ok(_room)) = tokio::time::timeout_at(deadline.into(), room).await else {
            return Err("deadline");
        };
        let form = Form {
            length: bytes,
            layout: planned.key.scope.object_group_id,
        };
        let mut reason = "not_found";
        for &source in &planned.sources {
            let Some(backend) = self.backends.get(source) else {
                continue;
            };
            let began = Instant::now();
            self.metrics.load_submitted(source, &planned.key);
            let _loading = self.metrics.loading(source, bytes);
            match backend.guarded.load(&planned.name, form, deadline).await {
                Ok(value) => {
                    self.metrics
                        .load_completed(source, &planned.key, bytes, began.elapsed());
                    let keys = vec![planned.key.clone()];
                    self.report(|it| it.loaded(backend.place, keys));
                    return self.put(lease, slot, value).await;
                }
                Err(error) => {
                    reason = error.reason();
                    self.note_failure(source, &planned.name, &error);
                }
            }
        }
        Err(reason)
    }

    fn note_failure(&self, source: usize, name: &ObjectName, error: &AdapterError) {
        self.metrics.read_failed(source, "load", error.reason());
        if let AdapterError::Damaged { what, moved } = error {
            self.metrics.quarantined(source, *moved);
            tracing::warn!(%name, moved, "a stored value is damaged and counts as a miss: {what}");
        }
    }

    /// Copies a value into its slot.
    async fn put(&self, lease: LeaseId, slot: usize, value: Bytes) -> Result<(), &'static str> {
        let (engine, owner) = (Arc::clone(&self.engine), self.owner);
        let write = tokio::task::spawn_blocking(move || {
            engine.write(owner, lease, slot, &mut std::iter::once(&value[..]))
        });
        match write.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                tracing::warn!("a loaded value cannot be put into its slot: {error}");
                Err("l1_contended")
            }
            Err(_) => Err("stopping"),
        }
    }
}
