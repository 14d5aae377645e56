//! The front door of the cache.

mod config;
mod listed;
mod observer;
mod status;
mod tenant;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;

pub use config::{EngineConfig, Prefault};
pub use listed::Listed;
pub use observer::{CacheObserver, RemoveReason};
pub use status::{
    Cleared, Committed, EndedOwner, EngineStatus, ObjectDigest, PrefixLock, ReadLease, Reservation,
    SaltUsage,
};

pub use tenant::{Budget, EVERYBODY_ELSE, MAX_TENANTS, Tenant, TenantUsage, check_tenants};

use crate::clock::{Clock, SystemClock};
use crate::error::{BudgetError, CacheError, LeaseError, ReadError, ReserveError};
use crate::eviction::Ranker;
use crate::key::{CacheSalt, KeyScope, ObjectKey};
use crate::l1::lease::{LeaseId, OwnerId};
use crate::l1::ranking::Orders;
use crate::l1::{L1, L1Settings, Notice, Pinned, TenantId};
use crate::shm_pool::prefault::{Goal, PrefaultTarget, PrefaultThread};
use crate::shm_pool::slot_allocator::SlotAllocator;
use crate::shm_pool::{ReadFault, SegmentHealth, ShmPool, Slot};
use crate::sync::{Mutex, MutexGuard, RwLock, unlock_fair};

/// Objects handled per hold of the mutex in work that nobody waits for. At well under a
/// microsecond each, a request never waits longer for it than for another request.
const BACKGROUND_BATCH: u32 = 256;

/// Such batches that one page of a listing looks through.
const LIST_STEPS: u32 = 64;

/// The cache of one server: keys, leases, pool and eviction behind one short mutex.
///
/// All methods take `&self`, may be called from any thread, and none waits for a disk, a
/// peer or the observer. Dropping the engine removes the shared-memory segment.
///
/// An *owner* stands for whoever must give things back: one per worker registration or
/// request session. Call [`end_owner`](Self::end_owner) for each
/// [`new_owner`](Self::new_owner); [`EngineStatus::owners`] shows whether that happens.
pub struct CacheEngine {
    // Declared first: the thread must have ended before the pool goes.
    prefault: Option<PrefaultThread>,
    inner: Arc<Inner>,
}

struct Inner {
    config: EngineConfig,
    pool: ShmPool,
    clock: Box<dyn Clock>,
    l1: Mutex<L1>,
    observer: RwLock<Option<Arc<dyn CacheObserver>>>,
    ranker: RwLock<Option<Arc<dyn Ranker>>>,
    /// Held by the one thread that tells the observer; others leave their notices to it.
    telling: Mutex<()>,
    /// Held by the one thread that evicts at the watermark.
    maintaining: Mutex<()>,
    /// Held by the one thread that mends the segment.
    mending: Mutex<()>,
    segment_repairs: AtomicU64,
}

impl CacheEngine {
    /// Makes the pool and an empty cache.
    ///
    /// # Errors
    /// [`CacheError`] if a setting is out of range, the pool does not fit, or its name is
    /// taken by a running server. A segment left by a dead server is replaced.
    pub fn open(config: EngineConfig) -> Result<Self, CacheError> {
        Self::open_with_clock(config, Box::new(SystemClock))
    }

    /// As [`open`](Self::open), with lease deadlines measured by `clock`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_clock(
        config: EngineConfig,
        clock: Box<dyn Clock>,
    ) -> Result<Self, CacheError> {
        config.check()?;
        let pool = ShmPool::create(&config.backing, config.capacity_bytes)?;
        let settings = L1Settings {
            write_ttl: config.write_ttl,
            read_ttl: config.read_ttl,
            trigger_watermark: config.trigger_watermark,
            eviction_ratio: config.eviction_ratio,
            shared: pool.is_shared(),
        };
        let allocator = SlotAllocator::new(config.capacity_bytes, config.align_bytes);
        let mut l1 = L1::new(settings, allocator, config.policy);
        for tenant in &config.tenants {
            l1.configure_tenant(tenant)?;
        }
        let (prefault, align) = (config.prefault, config.align_bytes);
        let inner = Arc::new(Inner {
            config,
            pool,
            clock,
            l1: Mutex::new(l1),
            observer: RwLock::new(None),
            ranker: RwLock::new(None),
            telling: Mutex::new(()),
            maintaining: Mutex::new(()),
            mending: Mutex::new(()),
            segment_repairs: AtomicU64::new(0),
        });
        let thread = if prefault != Prefault::Nothing {
            let target: Arc<dyn PrefaultTarget> = Arc::clone(&inner) as _;
            let thread = PrefaultThread::spawn(target, align).map_err(|source| CacheError::Os {
                step: "start the thread that prepares the pool",
                source,
            })?;
            Some(thread)
        } else {
            None
        };
        Ok(Self {
            prefault: thread,
            inner,
        })
    }

    /// The configuration the engine was opened with.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// The name by which workers open the segment, without a leading slash; `None` for
    /// private memory.
    pub fn shm_name(&self) -> Option<&str> {
        self.inner.pool.name()
    }

    /// Bytes of the pool as configured; the segment is exactly that long.
    pub fn capacity_bytes(&self) -> u64 {
        self.inner.config.capacity_bytes
    }

    /// Tells `observer` what happens from now on, in order; replaces the one before.
    pub fn set_observer(&self, observer: Arc<dyn CacheObserver>) {
        *self.inner.observer.write() = Some(observer);
        self.inner.l1.lock().notices().want();
    }

    /// A new owner, never given out before.
    pub fn new_owner(&self) -> OwnerId {
        self.inner.l1.lock().new_owner()
    }

    /// Ends an owner: its reservations are aborted, never published, and its read locks
    /// given back. Calls in its name find nothing from then on.
    pub fn end_owner(&self, owner: OwnerId) -> EndedOwner {
        self.inner.with_l1(|l1, _| l1.end_owner(owner))
    }

    /// Reserves a slot of `object_bytes` for each key that is neither readable nor
    /// reserved; keys that occur twice get one slot. All or nothing, after evicting what
    /// it takes. Follows `reserve_write` in LMCache's `v1/distributed/l1_manager.py`, with
    /// demand eviction added.
    ///
    /// The slots are invisible to readers until [`commit`](Self::commit), and are taken
    /// back when the write lease ends. After that a worker must not write to them any
    /// more; nothing can stop one that does, because it maps the whole pool.
    ///
    /// # Errors
    /// [`ReserveError`]; nothing is held or evicted then.
    pub fn reserve(
        &self,
        owner: OwnerId,
        keys: &[ObjectKey],
        object_bytes: u64,
    ) -> Result<Reservation, ReserveError> {
        self.inner
            .with_l1(|l1, now| l1.reserve(now, owner, keys, object_bytes))
    }

    /// Copies one object's bytes, the concatenation of `parts`, into its reserved slot.
    ///
    /// From the first call on, the lease publishes only objects that were written in full.
    /// Writing an object again replaces its bytes.
    ///
    /// # Errors
    /// [`LeaseError`]; the object counts as not written then. `WrongLength` if the parts
    /// do not add up to the slot's length; no byte outside the slot is touched.
    pub fn write(
        &self,
        owner: OwnerId,
        lease: LeaseId,
        key_index: usize,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), LeaseError> {
        // Writing behind the end of a cut segment would hide that it was cut.
        self.inner.check_segment();
        let pinned = self
            .inner
            .with_l1(|l1, _| l1.begin_write(owner, lease, key_index))?;
        let mut guard = WriteGuard {
            inner: &self.inner,
            lease,
            pinned,
            is_ended: false,
        };
        let result = self.inner.copy_in(&pinned, parts);
        let ended = guard.end(result.ok());
        result.map(|_| ()).and(ended)
    }

    /// Makes the lease's objects readable and ends the lease.
    ///
    /// In a shared pool the call vouches for what the worker wrote; objects that the
    /// engine itself should have been given through [`write`](Self::write), and was not,
    /// are discarded. Follows `finish_write` in LMCache's `v1/distributed/l1_manager.py`.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing is published then.
    pub fn commit(&self, owner: OwnerId, lease: LeaseId) -> Result<Committed, LeaseError> {
        self.commit_for(owner, lease, None)
    }

    /// As [`commit`](Self::commit), and names the request for the observer.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_for(
        &self,
        owner: OwnerId,
        lease: LeaseId,
        request: Option<&Arc<str>>,
    ) -> Result<Committed, LeaseError> {
        self.inner
            .with_l1(|l1, now| l1.commit(now, owner, lease, request))
    }

    /// As [`commit`](Self::commit), but the objects are withdrawn with the last lock on them: they
    /// were loaded for one request and are kept elsewhere. One that nobody locks stays until its
    /// rank lets it go. Follows `is_temporary` in LMCache's `v1/distributed/l1_manager.py`.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_temporary(
        &self,
        owner: OwnerId,
        lease: LeaseId,
    ) -> Result<Committed, LeaseError> {
        self.inner
            .with_l1(|l1, now| l1.commit_temporary(now, owner, lease))
    }

    /// Takes the lease's slots back; returns how many there were.
    ///
    /// # Errors
    /// [`LeaseError`] if there is no such write lease of this owner.
    pub fn abort(&self, owner: OwnerId, lease: LeaseId) -> Result<usize, LeaseError> {
        self.inner.with_l1(|l1, _| l1.abort(owner, lease))
    }

    /// Finds the longest prefix of chunks that is readable in every row, takes `readers`
    /// (1..=128, clamped) read locks on each object of it, and counts as a use of them.
    ///
    /// A row is the keys of one rank in chunk order; rows may share a scope or not.
    /// Follows the lookup of LMCache's `v1/distributed/storage_manager.py`.
    pub fn lock_prefix(&self, owner: OwnerId, rows: &[Vec<ObjectKey>], readers: u32) -> PrefixLock {
        self.inner
            .with_l1(|l1, now| l1.lock_prefix(now, owner, rows, readers))
    }

    /// Repeats a lookup after more of its chunks became readable: takes the locks of
    /// [`lock_prefix`](Self::lock_prefix) and gives back those of `old`, in one step, so that
    /// nothing of the prefix is free in between.
    pub fn renew_prefix(
        &self,
        owner: OwnerId,
        old: Option<LeaseId>,
        rows: &[Vec<ObjectKey>],
        readers: u32,
    ) -> PrefixLock {
        self.inner
            .with_l1(|l1, now| l1.renew_prefix(now, owner, old, rows, readers))
    }

    /// Which of `keys` are readable now; locks nothing and is no use of them.
    pub fn readable(&self, keys: &[ObjectKey]) -> Vec<bool> {
        self.inner.with_l1(|l1, _| l1.readable(keys))
    }

    /// Appends a committed object to `out`, for whoever keeps a copy of it elsewhere; returns
    /// whether it was there. No use of the object, and no lease: it cannot be evicted while it is
    /// being copied.
    ///
    /// # Errors
    /// [`ReadError`]; `out` is as before then. A corrupt object is withdrawn and counted.
    pub fn copy_committed(&self, key: &ObjectKey, out: &mut Vec<u8>) -> Result<bool, ReadError> {
        self.inner.check_segment();
        let Some(pinned) = self.inner.with_l1(|l1, _| l1.begin_copy_of(key)) else {
            return Ok(false);
        };
        let mut guard = CopyGuard {
            inner: &self.inner,
            pinned,
            is_corrupt: false,
        };
        let result = self.inner.copy_out(&pinned, out);
        guard.is_corrupt = result == Err(ReadError::Corrupt);
        result.map(|()| true)
    }

    /// Withdraws the readable ones among `keys`, those that are held with the last hold on them;
    /// returns how many there were.
    pub fn release(&self, keys: &[ObjectKey]) -> usize {
        self.inner.with_l1(|l1, _| l1.release(keys))
    }

    /// Gives back up to `readers` (1..=128, clamped) locks of a lookup on each object of
    /// `chunks`, in all rows; returns how many locks that were. Chunks outside the lookup
    /// are left out. A lookup without locks is over.
    pub fn release_prefix(
        &self,
        owner: OwnerId,
        lease: LeaseId,
        chunks: Range<usize>,
        readers: u32,
    ) -> usize {
        self.inner
            .with_l1(|l1, _| l1.release_prefix(owner, lease, chunks, readers))
    }

    /// Turns one lock of a lookup, on each object of `chunks` in `row`, into a read lease
    /// of `reader` with a full read TTL, and returns where the bytes are.
    ///
    /// `None`, and nothing changes, unless `chunks` is a non-empty range inside the lookup
    /// and every object still has a lock of it and has not been withdrawn.
    pub fn begin_read(
        &self,
        lookup_owner: OwnerId,
        lookup: LeaseId,
        reader: OwnerId,
        row: usize,
        chunks: Range<usize>,
    ) -> Option<ReadLease> {
        // Slots behind the end of a cut segment would be a SIGBUS in the worker.
        self.inner.check_segment();
        self.inner
            .with_l1(|l1, now| l1.begin_read(now, lookup_owner, lookup, reader, row, chunks))
    }

    /// Appends one object of a read lease to `out`, after checking its checksum if it has
    /// one.
    ///
    /// # Errors
    /// [`ReadError`]; `out` is as before then. A corrupt object is withdrawn and counted.
    pub fn read(
        &self,
        reader: OwnerId,
        lease: LeaseId,
        index: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let pinned = self
            .inner
            .with_l1(|l1, _| l1.begin_copy(reader, lease, index))?;
        let mut guard = CopyGuard {
            inner: &self.inner,
            pinned,
            is_corrupt: false,
        };
        let result = self.inner.copy_out(&pinned, out);
        guard.is_corrupt = result == Err(ReadError::Corrupt);
        result
    }

    /// Ends a read lease. `false` if there is none any more, which tells a worker that
    /// read from shared memory that its bytes may have been replaced under it.
    pub fn finish_read(&self, reader: OwnerId, lease: LeaseId) -> bool {
        self.inner.with_l1(|l1, _| l1.finish_read(reader, lease))
    }

    /// Makes the readable ones among `keys`, given in chunk order, the most recent ones. Later
    /// chunks become victims before earlier ones, as at the end of a session in LMCache
    /// (`end_session` in `v1/multiprocess/modules/lookup.py`).
    pub fn touch(&self, keys: &[ObjectKey]) {
        self.touch_for(keys, None);
    }

    /// As [`touch`](Self::touch), and names the request for who ranks.
    pub fn touch_for(&self, keys: &[ObjectKey], request: Option<&Arc<str>>) {
        self.inner.with_l1(|l1, now| l1.touch(now, keys, request));
    }

    /// Has `ranker` order the keys of the tenants that it ranks when [`maintain`](Self::maintain)
    /// evicts, in place of the one before.
    pub fn set_ranker(&self, ranker: Arc<dyn Ranker>) {
        *self.inner.ranker.write() = Some(ranker);
    }

    /// Readable objects whose scope is `wanted`, at most `most`, from the place `start` on; with
    /// where to go on, unless that was the end. Looks at so many objects at once only, so that
    /// pages may have less, or nothing. What changes meanwhile may be missed or come twice.
    pub fn list(
        &self,
        start: u32,
        most: usize,
        wanted: &dyn Fn(&KeyScope) -> bool,
    ) -> (Vec<Listed>, Option<u32>) {
        let mut found = Vec::new();
        let mut next = start;
        for _ in 0..LIST_STEPS {
            let end = next.saturating_add(BACKGROUND_BATCH);
            let step = self
                .inner
                .with_l1_fairly(|l1, now| l1.list_range(now, next..end, wanted, most, &mut found));
            match step {
                None => return (found, None),
                Some(at) if at < end => return (found, Some(at)),
                Some(at) => next = at,
            }
        }
        (found, Some(next))
    }

    /// Asks that the readable ones among `keys` be evicted last, for `time`; returns how many
    /// those are. `None`, and nothing changes, when too many objects would be kept so.
    pub fn keep(&self, keys: &[ObjectKey], holder: u64, time: Duration) -> Option<usize> {
        self.inner
            .with_l1(|l1, now| l1.keep(now, keys, holder, time))
    }

    /// Ends what [`keep`](Self::keep) began for this holder and these keys; returns how many
    /// there were.
    pub fn end_keeping(&self, keys: &[ObjectKey], holder: u64) -> usize {
        self.inner.with_l1(|l1, _| l1.end_keeping(keys, holder))
    }

    /// Ends all that [`keep`](Self::keep) began for this holder.
    pub fn end_holder(&self, holder: u64) {
        self.inner.with_l1(|l1, _| l1.end_holder(holder));
    }

    /// Withdraws all readable objects. Locked ones are kept unless `force`; with `force`
    /// no read of them can begin any more, and their bytes stay until the last live lease
    /// on them ends. Reservations are kept: what they store is newer than the clearing.
    ///
    /// Works in steps, so objects committed meanwhile may stay.
    pub fn clear(&self, force: bool) -> Cleared {
        self.clear_where(force, &|_| true)
    }

    /// As [`clear`](Self::clear), of the objects whose salts are `wanted`. It is called under
    /// the engine's mutex, once for neighbours of one scope, so it must be quick.
    pub fn clear_where(&self, force: bool, wanted: &dyn Fn(&CacheSalt) -> bool) -> Cleared {
        let mut cleared = Cleared::default();
        let mut start = 0_u32;
        loop {
            let end = start.saturating_add(BACKGROUND_BATCH);
            let step = self
                .inner
                .with_l1_fairly(|l1, _| l1.clear_range(start..end, force, wanted));
            let Some((removed, kept)) = step else {
                return cleared;
            };
            cleared.removed += removed;
            cleared.kept += kept;
            start = end;
        }
    }

    /// Sets what the tenant of a salt may use, from now on; a salt without a tenant becomes
    /// one of its own. LMCache's `PUT /quota/{cache_salt}` sets the cap. A cap below what
    /// the tenant uses is enforced by the next [`maintain`](Self::maintain).
    ///
    /// Objects of the salt that exist already are ranked anew, roughly by their age.
    ///
    /// # Errors
    /// [`BudgetError`]; nothing changes then.
    pub fn set_budget(&self, salt: &CacheSalt, budget: Budget) -> Result<(), BudgetError> {
        self.inner.with_l1(|l1, _| l1.set_budget(salt, budget))?;
        self.move_objects();
        Ok(())
    }

    /// Puts the tenants `after` in the place of `before`, those of the last configuration.
    /// Tenants that are the same in both keep what [`set_budget`](Self::set_budget) gave them;
    /// those that were made by it alone stay, but for the salts that `after` names.
    ///
    /// # Errors
    /// [`BudgetError`]; nothing changes then.
    pub fn replace_tenants(&self, before: &[Tenant], after: &[Tenant]) -> Result<(), BudgetError> {
        self.inner
            .with_l1(|l1, _| l1.replace_tenants(before, after))?;
        self.move_objects();
        Ok(())
    }

    /// Takes a salt from its tenant, so that it counts with all others; `false` if it had
    /// none. A tenant without salts is gone.
    pub fn remove_budget(&self, salt: &CacheSalt) -> bool {
        let removed = self.inner.with_l1(|l1, _| l1.remove_budget(salt));
        if removed {
            self.move_objects();
        }
        removed
    }

    /// All tenants, their budgets and what they use; first the one of all other salts.
    pub fn budgets(&self) -> Vec<TenantUsage> {
        self.inner.with_l1(|l1, _| l1.tenant_usage())
    }

    /// Lets existing objects count for the tenants that their salts have now.
    fn move_objects(&self) {
        let mut start = 0_u32;
        loop {
            let end = start.saturating_add(BACKGROUND_BATCH);
            let is_more = self
                .inner
                .with_l1_fairly(|l1, _| l1.move_objects(start..end));
            if !is_more {
                return;
            }
            start = end;
        }
    }

    /// The BLAKE3 of readable objects whose salts are `wanted`, of at most `most` of them, and how
    /// many there are altogether. Copies every byte of those, so it takes its time.
    pub fn digests(
        &self,
        wanted: &dyn Fn(&CacheSalt) -> bool,
        most: usize,
    ) -> (Vec<ObjectDigest>, usize) {
        let mut digests = Vec::new();
        let mut count = 0;
        let mut start = 0_u32;
        loop {
            let end = start.saturating_add(BACKGROUND_BATCH);
            let left = most - digests.len();
            let Some((pinned, found)) = self
                .inner
                .with_l1_fairly(|l1, _| l1.pin_range(start..end, wanted, left))
            else {
                return (digests, count);
            };
            count += found;
            for pinned in pinned {
                digests.extend(self.inner.digest(&pinned));
                self.inner
                    .with_l1_fairly(|l1, _| l1.unpin_one(pinned.object));
            }
            start = end;
        }
    }

    /// Makes the policies of tenants forget what they remember of objects that are gone, of those
    /// tenants among the salts' that have no objects; returns how many policies that were.
    pub fn forget_histories(&self, salts: &[CacheSalt]) -> usize {
        self.inner.with_l1(|l1, _| l1.forget_histories(salts))
    }

    /// Overwrites with zeros whatever holds no object: free memory, and what alignment leaves
    /// behind the end of objects. Returns the bytes overwritten.
    ///
    /// Works in steps of a few MiB, which are out of reach for reservations meanwhile. What other
    /// threads free while it runs may be left out.
    ///
    /// # Errors
    /// The number of the operating system's error.
    pub fn scrub(&self) -> Result<u64, i32> {
        const STEP_BYTES: u64 = 4 << 20;
        let zeros = vec![0; 1 << 20];
        let mut scrubbed = 0;
        let mut from = 0;
        while let Some((offset, length)) = self
            .inner
            .with_l1_fairly(|l1, _| l1.allocator().claim_next(from, STEP_BYTES))
        {
            let written = self.inner.zero(offset, length, &zeros);
            self.inner
                .with_l1_fairly(|l1, _| l1.allocator().free(offset, length));
            written.map_err(|errno| errno.raw_os_error())?;
            scrubbed += length;
            from = offset + length;
        }
        let mut start = 0_u32;
        loop {
            let end = start.saturating_add(BACKGROUND_BATCH);
            // Under the mutex, or the range could have another object by then. It is less than a
            // page each.
            let step = self.inner.with_l1_fairly(|l1, _| {
                let tails = l1.tails(start..end)?;
                Some(tails.into_iter().try_fold(0, |sum, (offset, length)| {
                    self.inner.zero(offset, length, &zeros)?;
                    Ok::<u64, Errno>(sum + length)
                }))
            });
            match step {
                None => return Ok(scrubbed),
                Some(Ok(bytes)) => scrubbed += bytes,
                Some(Err(errno)) => return Err(errno.raw_os_error()),
            }
            start = end;
        }
    }

    /// Withdraws those of `keys` that are readable and that nobody holds; returns how many.
    pub fn withdraw(&self, keys: &[ObjectKey]) -> usize {
        self.inner.with_l1(|l1, _| l1.withdraw_unheld(keys))
    }

    /// Whether [`maintain`](Self::maintain) has something to do that should not wait for its turn: the
    /// pool is above its watermark, or part of its memory is not prepared yet.
    ///
    /// To be asked after a store, so that one that needs no eviction wakes no thread.
    #[must_use]
    pub fn wants_maintenance(&self) -> bool {
        let is_prepared = self.prefault.as_ref().is_none_or(PrefaultThread::has_ended);
        !is_prepared || self.inner.with_l1(|l1, _| l1.bytes_over_watermark() > 0)
    }

    /// Those of `keys` that are readable and in use now.
    pub fn held(&self, keys: &[ObjectKey]) -> Vec<ObjectKey> {
        self.inner.with_l1(|l1, _| l1.held(keys))
    }

    /// Does what time brings: ends leases whose deadline has come, evicts above the
    /// watermark, and looks after the segment. To be called every 100 ms to 1 s.
    ///
    /// Tenants above a cap that was lowered lose keys down to it. One whose keys are ranked from
    /// outside is held to the watermark of its cap as all are to that of the pool. When at least
    /// `trigger_watermark` of the pool is used, reservations included, it
    /// evicts until `eviction_ratio` of the used *bytes* are free, in small steps that let
    /// requests through. Held objects are passed over and the next ones go instead.
    pub fn maintain(&self) {
        self.inner.check_segment();
        self.inner.pool.report_unlinked_name();
        if let Some(thread) = &self.prefault {
            thread.nudge();
        }
        let Some(_maintaining) = self.inner.maintaining.try_lock() else {
            return;
        };
        let steps = BACKGROUND_BATCH as usize;
        while !self
            .inner
            .with_l1_fairly(|l1, _| l1.evict_over_caps(steps))
            .is_exhausted
        {}
        let ranker = self.inner.ranker.read().clone();
        self.inner.with_l1(|l1, now| l1.expire_hints(now));
        if let Some(ranker) = &ranker {
            for (tenant, wanted) in self.inner.with_l1(|l1, _| l1.near_caps()) {
                self.evict_to_order(Some(&**ranker), wanted, Some(tenant));
            }
        }
        let wanted = self.inner.with_l1(|l1, _| l1.bytes_over_watermark());
        self.evict_to_order(ranker.as_deref(), wanted, None);
    }

    /// Evicts `wanted` bytes in the order of the ranker, and in the native one where it has none;
    /// of one tenant only while it is ranked.
    fn evict_to_order(&self, ranker: Option<&dyn Ranker>, mut wanted: u64, only: Option<TenantId>) {
        let steps = BACKGROUND_BATCH as usize;
        while wanted > 0 {
            // How much is freed before the ranker is asked again, and in which order.
            let mut goal = wanted;
            let mut orders = Orders::default();
            if let Some(ranker) = ranker {
                let (candidates, enough) = self
                    .inner
                    .with_l1_fairly(|l1, now| l1.candidates(now, wanted, ranker, only));
                if !candidates.is_empty() {
                    orders = Orders::ask(ranker, candidates);
                    goal = enough;
                } else if only.is_some() {
                    return;
                }
            }
            while goal > 0 {
                let round = self
                    .inner
                    .with_l1_fairly(|l1, _| l1.evict_ordered(goal, steps, &mut orders, only));
                wanted = wanted.saturating_sub(round.freed_bytes);
                goal = goal.saturating_sub(round.freed_bytes);
                if round.is_exhausted {
                    return;
                }
            }
        }
    }

    /// Counts and sums as of now.
    pub fn status(&self) -> EngineStatus {
        let mut status = self.inner.with_l1(|l1, _| l1.status());
        status.huge_pages = self.inner.pool.huge_pages();
        status.segment_repairs = self.inner.segment_repairs.load(Ordering::Relaxed);
        status.salts.sort_unstable_by(|a, b| {
            let by_bytes = b.bytes.cmp(&a.bytes);
            by_bytes.then_with(|| a.cache_salt.cmp(&b.cache_salt))
        });
        status
    }

    /// Checks every sum, index and lease against all others. Takes time in proportion to
    /// the objects, under the mutex: for tests and for looking into a suspected fault.
    ///
    /// # Errors
    /// A sentence on the first thing that does not hold.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.inner.with_l1(|l1, _| l1.check())
    }
}

impl std::fmt::Debug for CacheEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CacheEngine")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// Runs `work` under the mutex, after ending what has run out, and tells the observer
    /// after releasing it.
    fn with_l1<R>(&self, work: impl FnOnce(&mut L1, Instant) -> R) -> R {
        self.with_l1_then(work, |l1| drop(l1))
    }

    /// As [`with_l1`](Self::with_l1), for work in a loop that nobody waits for: hands the
    /// mutex to whoever is waiting instead of taking it again at once.
    fn with_l1_fairly<R>(&self, work: impl FnOnce(&mut L1, Instant) -> R) -> R {
        self.with_l1_then(work, unlock_fair)
    }

    fn with_l1_then<R>(
        &self,
        work: impl FnOnce(&mut L1, Instant) -> R,
        unlock: impl FnOnce(MutexGuard<'_, L1>),
    ) -> R {
        let now = self.clock.now();
        let mut l1 = self.l1.lock();
        l1.expire_due(now);
        let result = work(&mut l1, now);
        let has_news = !l1.notices().is_empty();
        unlock(l1);
        if has_news {
            self.tell_observer();
        }
        result
    }

    /// Tells the observer all that waits, in order, from one thread at a time.
    fn tell_observer(&self) {
        loop {
            let Some(telling) = self.telling.try_lock() else {
                return; // Whoever holds it looks again below.
            };
            let notices = self.l1.lock().notices().take();
            let observer = self.observer.read().clone();
            if let Some(observer) = observer {
                for notice in notices {
                    match notice {
                        Notice::Stored {
                            keys,
                            object_bytes,
                            request,
                        } => observer.stored_for(&keys, object_bytes, request.as_ref()),
                        Notice::Removed {
                            keys,
                            bytes,
                            reason,
                        } => observer.removed_with(&keys, &bytes, reason),
                        Notice::AllocationFailed {
                            needed_bytes,
                            free_bytes,
                            evictable_bytes,
                        } => observer.allocation_failed(needed_bytes, free_bytes, evictable_bytes),
                    }
                }
            }
            drop(telling);
            // A notice that came while this thread was telling was left to it.
            if self.l1.lock().notices().is_empty() {
                return;
            }
        }
    }

    /// Copies parts into a slot; returns the checksum if checksums are on.
    fn copy_in(
        &self,
        pinned: &Pinned,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<Option<u32>, LeaseError> {
        let expected = pinned.slot.length;
        let mut written = 0_u64;
        let mut checksum = 0;
        for part in parts {
            let end = written.saturating_add(part.len() as u64);
            if end > expected {
                return Err(LeaseError::WrongLength { expected, got: end });
            }
            let sum = |step: &[u8]| {
                if self.config.checksum {
                    checksum = crc32c::crc32c_append(checksum, step);
                }
            };
            self.pool
                .write_at(pinned.slot.offset + written, part, sum)
                .map_err(|errno| LeaseError::Io {
                    errno: errno.raw_os_error(),
                })?;
            written = end;
        }
        if written != expected {
            return Err(LeaseError::WrongLength {
                expected,
                got: written,
            });
        }
        Ok(self.config.checksum.then_some(checksum))
    }

    fn copy_out(&self, pinned: &Pinned, out: &mut Vec<u8>) -> Result<(), ReadError> {
        let start = out.len();
        let length = pinned.slot.length;
        let mut checksum = 0;
        let sum = |step: &[u8]| {
            if pinned.checksum.is_some() {
                checksum = crc32c::crc32c_append(checksum, step);
            }
        };
        match self.pool.read_at(pinned.slot.offset, length, out, sum) {
            Ok(()) => {}
            Err(ReadFault::Lost) => return Err(ReadError::Corrupt),
            Err(ReadFault::OutOfMemory) => return Err(ReadError::OutOfMemory { bytes: length }),
        }
        match pinned.checksum {
            Some(expected) if checksum != expected => {
                out.truncate(start);
                Err(ReadError::Corrupt)
            }
            _ => Ok(()),
        }
    }

    /// Writes zeros, from a buffer of some.
    fn zero(&self, offset: u64, length: u64, zeros: &[u8]) -> Result<(), Errno> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            // At most the buffer's length, so it fits.
            let part = zeros.get(..step as usize).unwrap_or_default();
            self.pool.write_at(at, part, |_| {})?;
            at += step;
        }
        Ok(())
    }

    /// The BLAKE3 of a pinned object; `None` if it cannot be read.
    fn digest(&self, pinned: &Pinned) -> Option<ObjectDigest> {
        const STEP_BYTES: u64 = 1 << 20;
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        let Slot { offset, length } = pinned.slot;
        let mut done = 0;
        while done < length {
            let step = (length - done).min(STEP_BYTES);
            bytes.clear();
            self.pool
                .read_at(offset + done, step, &mut bytes, |_| {})
                .ok()?;
            hasher.update(&bytes);
            done += step;
        }
        Some(ObjectDigest {
            slot: pinned.slot,
            blake3: *hasher.finalize().as_bytes(),
        })
    }

    /// If a peer changed the segment's length, withdraws what was cut off, and only then
    /// gives the segment its length back, so that zeros are never taken for data.
    ///
    /// A peer that cuts the segment and lengthens it again in between is not noticed: it
    /// could as well have overwritten the bytes. Checksums notice both.
    fn check_segment(&self) {
        if self.pool.health() == SegmentHealth::Intact {
            return;
        }
        let _mending = self.mending.lock();
        let SegmentHealth::Resized { bytes } = self.pool.health() else {
            return; // Another thread has mended it meanwhile.
        };
        self.segment_repairs.fetch_add(1, Ordering::Relaxed);
        let lost = self.with_l1(|l1, _| l1.lose_behind(bytes));
        let restored = self.pool.restore_length();
        tracing::error!(
            found_bytes = bytes,
            lost_objects = lost,
            restored = restored.is_ok(),
            "another process changed the length of the shared-memory segment"
        );
    }
}

impl PrefaultTarget for Inner {
    fn goal(&self) -> Goal {
        let mut l1 = self.l1.lock();
        let allocator = l1.allocator();
        let end = allocator.capacity();
        let wanted = self.config.prefault.wanted_bytes(allocator.used_bytes());
        Goal {
            wanted: wanted.min(end),
            end,
        }
    }

    fn populate(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.pool.populate(offset, length)
    }

    fn mark_touched(&self, up_to: u64) {
        self.l1.lock().allocator().mark_touched(up_to);
    }

    fn give_up_cold(&self) -> u64 {
        self.l1.lock().allocator().give_up_cold()
    }
}

/// Ends a copy into a slot even if the iterator of parts panics.
struct WriteGuard<'e> {
    inner: &'e Inner,
    lease: LeaseId,
    pinned: Pinned,
    is_ended: bool,
}

impl WriteGuard<'_> {
    fn end(&mut self, written: Option<Option<u32>>) -> Result<(), LeaseError> {
        self.is_ended = true;
        let (lease, object) = (self.lease, self.pinned.object);
        self.inner
            .with_l1(|l1, _| l1.end_write(lease, object, written))
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if !self.is_ended {
            // The copy failed half-way, so there is nothing to report beyond that.
            let _ = self.end(None);
        }
    }
}

/// Ends a copy out of a slot.
struct CopyGuard<'e> {
    inner: &'e Inner,
    pinned: Pinned,
    is_corrupt: bool,
}

impl Drop for CopyGuard<'_> {
    fn drop(&mut self) {
        let (object, is_corrupt) = (self.pinned.object, self.is_corrupt);
        self.inner.with_l1(|l1, _| l1.end_copy(object, is_corrupt));
    }
}
