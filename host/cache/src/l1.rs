//! The objects in the pool, their states, and who holds them.
//!
//! Everything here runs under the engine's one mutex and does no I/O. Time comes in as an
//! argument; notices for the observer are queued and go out after the mutex is released.

pub(crate) mod lease;
mod notices;
mod reclaim;
mod scope_table;
mod slab;
mod stage;
mod tally;

use std::hash::BuildHasher;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashTable};

pub(crate) use notices::{Notice, Notices};
use scope_table::{ScopeId, ScopeTable};
use slab::Slab;
use stage::{Event, Outcome, Stage};
use tally::Tally;

use crate::engine::{
    Committed, EndedOwner, EngineStatus, PrefixLock, ReadLease, RemoveReason, Reservation,
    SaltUsage,
};
use crate::error::{LeaseError, ReadError, ReserveError};
use crate::eviction::{EntryFacts, EvictionPolicy};
use crate::key::{ChunkHash, KeyScope, ObjectKey};
use crate::shm_pool::Slot;
use crate::shm_pool::slot_allocator::SlotAllocator;
use lease::{Holding, Lease, LeaseId, LeaseTable, LookupLease, OwnerId, ReadingLease, WriteLease};

/// Number of an object; also its number in the eviction policy.
pub(crate) type ObjectId = u32;

/// Most read locks one lookup may take per object, as in LMCache's `l1_manager.py`.
const MAX_READERS: u32 = 128;

/// What is known of a slot's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// The engine has written nothing; a worker may have, if it can reach the pool.
    Unwritten,
    /// A copy into the slot is in progress.
    Writing,
    /// Written in full through the engine, with its checksum if that is on.
    Written { checksum: Option<u32> },
    /// Found wrong or cut off: never to be served.
    Lost,
}

#[derive(Debug)]
struct Object {
    scope: ScopeId,
    chunk_hash: ChunkHash,
    /// Hash of the whole key: its place in the index, and its name in ghost lists.
    hash: u64,
    offset: u64,
    length: u64,
    /// `length` rounded up to the pool's alignment.
    footprint: u64,
    stage: Stage,
    contents: Contents,
    /// Read locks, all of them owned by leases.
    locks: u64,
    /// Copies in progress in this process, and objects a reservation in progress keeps.
    pins: u32,
}

impl Object {
    fn is_held(&self) -> bool {
        self.locks > 0 || self.pins > 0
    }

    fn is_readable(&self) -> bool {
        self.stage == Stage::Readable
    }

    fn is_evictable(&self) -> bool {
        self.is_readable() && !self.is_held()
    }

    fn slot(&self) -> Slot {
        Slot {
            offset: self.offset,
            length: self.length,
        }
    }
}

/// A slot that is being copied into or out of, outside the mutex.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pinned {
    pub(crate) object: ObjectId,
    pub(crate) slot: Slot,
    /// What the bytes must add up to, if that is known.
    pub(crate) checksum: Option<u32>,
}

/// What the table of objects is run with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct L1Settings {
    pub(crate) write_ttl: Duration,
    pub(crate) read_ttl: Duration,
    /// Share of the capacity at which eviction starts.
    pub(crate) trigger_watermark: f64,
    /// Share of the used bytes that it then frees.
    pub(crate) eviction_ratio: f64,
    /// Whether workers can write into the pool themselves.
    pub(crate) shared: bool,
}

/// Things that happened since the engine was opened.
#[derive(Debug, Default, Clone, Copy)]
struct Counters {
    evicted_objects: u64,
    evicted_bytes: u64,
    demand_evicted_objects: u64,
    corrupt_objects: u64,
    allocation_failures: u64,
    expired_write_leases: u64,
    expired_read_leases: u64,
}

/// The table of objects and leases.
pub(crate) struct L1 {
    settings: L1Settings,
    objects: Slab<Object>,
    /// Reserved and readable objects by key: at most one per key.
    index: HashTable<ObjectId>,
    hasher: DefaultHashBuilder,
    scopes: ScopeTable,
    leases: LeaseTable,
    allocator: SlotAllocator,
    policy: Box<dyn EvictionPolicy>,
    tally: Tally,
    /// Locks that leases hold, counted apart from those that objects carry.
    owned_locks: u64,
    counters: Counters,
    notices: Notices,
}

/// Finds scopes by address first: keys of one row share theirs.
#[derive(Default)]
struct ScopeCursor<'k> {
    last: Option<&'k Arc<KeyScope>>,
    /// Number and fingerprint of the last scope.
    found: Option<(ScopeId, u64)>,
}

impl<'k> ScopeCursor<'k> {
    /// Number and fingerprint of the scope, if any object uses it.
    fn find(&mut self, scopes: &ScopeTable, scope: &'k Arc<KeyScope>) -> Option<(ScopeId, u64)> {
        if !self.last.is_some_and(|last| Arc::ptr_eq(last, scope)) {
            self.last = Some(scope);
            self.found = scopes.find(scope).map(|id| (id, scopes.fingerprint(id)));
        }
        self.found
    }
}

impl L1 {
    pub(crate) fn new(
        settings: L1Settings,
        allocator: SlotAllocator,
        policy: Box<dyn EvictionPolicy>,
    ) -> Self {
        Self {
            settings,
            objects: Slab::default(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            scopes: ScopeTable::default(),
            leases: LeaseTable::default(),
            allocator,
            policy,
            tally: Tally::default(),
            owned_locks: 0,
            counters: Counters::default(),
            notices: Notices::default(),
        }
    }

    pub(crate) fn allocator(&mut self) -> &mut SlotAllocator {
        &mut self.allocator
    }

    pub(crate) fn notices(&mut self) -> &mut Notices {
        &mut self.notices
    }

    // ---- owners and leases ------------------------------------------------------------

    pub(crate) fn new_owner(&mut self) -> OwnerId {
        self.leases.new_owner()
    }

    pub(crate) fn end_owner(&mut self, owner: OwnerId) -> EndedOwner {
        let mut ended = EndedOwner::default();
        for (id, lease) in self.leases.end_owner(owner) {
            ended.released_locks += lease.holding.locks();
            ended.aborted_objects += self.give_back(id, lease.holding);
        }
        ended
    }

    /// Ends every lease whose deadline has come. Called first in every operation, so a
    /// lease is over at its deadline and not when somebody gets round to it.
    pub(crate) fn expire_due(&mut self, now: Instant) {
        while let Some((id, lease)) = self.leases.take_due(now) {
            match &lease.holding {
                Holding::Write(_) => self.counters.expired_write_leases += 1,
                Holding::Lookup(_) | Holding::Read(_) => self.counters.expired_read_leases += 1,
            }
            tracing::debug!(lease = %id, owner = %lease.owner, "lease expired");
            self.give_back(id, lease.holding);
        }
    }

    /// Undoes exactly what one lease holds; returns the number of reservations aborted.
    fn give_back(&mut self, id: LeaseId, holding: Holding) -> usize {
        self.owned_locks -= holding.locks();
        match holding {
            Holding::Write(write) => {
                for &(_, object) in &write.objects {
                    self.abort_object(object, id);
                }
                write.objects.len()
            }
            Holding::Lookup(lookup) => {
                for (&object, &held) in lookup.objects.iter().zip(&lookup.held) {
                    if held > 0 {
                        self.unlock(object, u64::from(held));
                    }
                }
                0
            }
            Holding::Read(read) => {
                for &object in &read.objects {
                    self.unlock(object, 1);
                }
                0
            }
        }
    }

    // ---- writing ----------------------------------------------------------------------

    pub(crate) fn reserve(
        &mut self,
        now: Instant,
        owner: OwnerId,
        keys: &[ObjectKey],
        object_bytes: u64,
    ) -> Result<Reservation, ReserveError> {
        if !self.leases.is_live(owner) {
            return Err(ReserveError::OwnerEnded);
        }
        if object_bytes == 0 {
            return Err(ReserveError::ZeroLength);
        }
        let capacity_bytes = self.allocator.capacity();
        let footprint = self
            .allocator
            .footprint(object_bytes)
            .filter(|&footprint| footprint <= capacity_bytes)
            .ok_or(ReserveError::TooLarge {
                object_bytes,
                capacity_bytes,
            })?;
        let (wanted, resident) = self.missing_keys(keys);
        if wanted.is_empty() {
            return Ok(Reservation::default());
        }
        // Making room must not evict the front of the very prefix that is being stored.
        for &object in &resident {
            self.pin(object);
        }
        let offsets = self.allocate_slots(wanted.len(), footprint);
        for &object in &resident {
            self.unpin(object);
        }
        let Some(offsets) = offsets else {
            return Err(self.pool_full(wanted.len(), footprint));
        };
        let lease = self.leases.reserve_id();
        let mut slots = Vec::with_capacity(wanted.len());
        let mut objects = Vec::with_capacity(wanted.len());
        for (index, offset) in wanted.into_iter().zip(offsets) {
            let Some(key) = keys.get(index) else { continue };
            let slot = Slot {
                offset,
                length: object_bytes,
            };
            match self.insert_reserved(key, slot, footprint, lease) {
                Some(object) => {
                    objects.push((index, object));
                    slots.push((index, slot));
                }
                None => {
                    self.allocator.free(offset, footprint);
                }
            }
        }
        let holding = Holding::Write(WriteLease {
            objects,
            copied: false,
        });
        let deadline = now + self.settings.write_ttl;
        self.leases.insert(
            lease,
            Lease {
                owner,
                deadline,
                holding,
            },
        );
        Ok(Reservation {
            lease: Some(lease),
            slots,
        })
    }

    /// Indexes of the keys to reserve (each key once), and the objects that are readable
    /// already.
    fn missing_keys(&self, keys: &[ObjectKey]) -> (Vec<usize>, Vec<ObjectId>) {
        let mut cursor = ScopeCursor::default();
        let mut wanted = Vec::with_capacity(keys.len());
        let mut resident = Vec::new();
        let mut seen: HashTable<usize> = HashTable::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            if let Some(object) = self.find(&mut cursor, key) {
                if self.objects.get(object).is_some_and(Object::is_readable) {
                    resident.push(object);
                }
                continue;
            }
            let hash = self.hasher.hash_one(key.chunk_hash);
            let is_seen = seen.find(hash, |&earlier| keys.get(earlier) == Some(key));
            if is_seen.is_none() {
                let rehash = |&earlier: &usize| {
                    let earlier = keys.get(earlier).map(|key| key.chunk_hash);
                    earlier.map_or(0, |chunk_hash| self.hasher.hash_one(chunk_hash))
                };
                seen.insert_unique(hash, index, rehash);
                wanted.push(index);
            }
        }
        (wanted, resident)
    }

    fn pool_full(&mut self, count: usize, footprint: u64) -> ReserveError {
        let needed_bytes = (count as u64).saturating_mul(footprint);
        let free_bytes = self.allocator.free_bytes();
        let evictable_bytes = self.reclaimable_bytes();
        self.counters.allocation_failures += 1;
        self.notices.push(Notice::AllocationFailed {
            needed_bytes,
            free_bytes,
            evictable_bytes,
        });
        ReserveError::PoolFull {
            needed_bytes,
            free_bytes,
            evictable_bytes,
        }
    }

    fn insert_reserved(
        &mut self,
        key: &ObjectKey,
        slot: Slot,
        footprint: u64,
        lease: LeaseId,
    ) -> Option<ObjectId> {
        let scope = self.scopes.add(&key.scope, footprint)?;
        let hash = self.key_hash(self.scopes.fingerprint(scope), &key.chunk_hash);
        let object = Object {
            scope,
            chunk_hash: key.chunk_hash,
            hash,
            offset: slot.offset,
            length: slot.length,
            footprint,
            stage: Stage::Reserved(lease),
            contents: Contents::Unwritten,
            locks: 0,
            pins: 0,
        };
        let Some(id) = self.objects.insert(object) else {
            self.scopes.subtract(scope, footprint);
            return None;
        };
        if let Some(object) = self.objects.get(id) {
            self.tally.add(object);
        }
        let objects = &self.objects;
        self.index.insert_unique(hash, id, |&other| {
            objects.get(other).map_or(0, |object| object.hash)
        });
        Some(id)
    }

    /// Starts a copy into a reserved slot.
    pub(crate) fn begin_write(
        &mut self,
        owner: OwnerId,
        lease: LeaseId,
        key_index: usize,
    ) -> Result<Pinned, LeaseError> {
        let Holding::Write(write) = &mut self.leases.get(owner, lease)?.holding else {
            return Err(LeaseError::Unknown);
        };
        let id = write
            .object_at(key_index)
            .ok_or(LeaseError::NoSuchIndex { index: key_index })?;
        let object = self.objects.get_mut(id).ok_or(LeaseError::Unknown)?;
        // Only a copy in progress pins a reserved object.
        if object.pins > 0 {
            return Err(LeaseError::WriteInProgress);
        }
        object.contents = Contents::Writing;
        write.copied = true;
        let slot = object.slot();
        self.pin(id);
        Ok(Pinned {
            object: id,
            slot,
            checksum: None,
        })
    }

    /// Ends a copy into a slot. `written` is its checksum (or `None` without checksums) if
    /// all bytes went in. Fails if the lease ended meanwhile; the bytes then count for
    /// nothing.
    pub(crate) fn end_write(
        &mut self,
        lease: LeaseId,
        object: ObjectId,
        written: Option<Option<u32>>,
    ) -> Result<(), LeaseError> {
        let mut live = false;
        if let Some(found) = self.objects.get_mut(object) {
            live = found.stage == Stage::Reserved(lease);
            if found.contents == Contents::Writing {
                found.contents = match written {
                    Some(checksum) => Contents::Written { checksum },
                    None => Contents::Unwritten,
                };
            }
        }
        self.unpin(object);
        if live {
            Ok(())
        } else {
            Err(LeaseError::Expired)
        }
    }

    pub(crate) fn commit(
        &mut self,
        owner: OwnerId,
        lease: LeaseId,
    ) -> Result<Committed, LeaseError> {
        let write = self.take_write_lease(owner, lease)?;
        let mut admitted = Vec::with_capacity(write.objects.len());
        let mut discarded = 0;
        for &(_, id) in &write.objects {
            if self.may_publish(id, &write) && self.publish(id, lease) {
                admitted.push(id);
            } else {
                self.abort_object(id, lease);
                discarded += 1;
            }
        }
        // Last chunk first, so that of one prefix the later chunks are evicted first.
        for &id in admitted.iter().rev() {
            if let Some(object) = self.objects.get(id) {
                let facts = EntryFacts {
                    fingerprint: object.hash,
                    salt: self.scopes.salt_of(object.scope),
                    weight: object.footprint,
                };
                self.policy.insert(id, facts);
            }
        }
        if self.notices.is_wanted() && !admitted.is_empty() {
            let keys = admitted.iter().filter_map(|&id| self.key_of(id)).collect();
            self.notices.push(Notice::Stored(keys));
        }
        Ok(Committed {
            admitted: admitted.len(),
            discarded,
        })
    }

    /// A slot may be served if all its bytes are known to have come in: through the
    /// engine, or from a worker that can reach the pool and says so by committing.
    fn may_publish(&self, id: ObjectId, write: &WriteLease) -> bool {
        match self.objects.get(id).map(|object| object.contents) {
            Some(Contents::Written { .. }) => true,
            Some(Contents::Unwritten) => self.settings.shared && !write.copied,
            Some(Contents::Writing | Contents::Lost) | None => false,
        }
    }

    fn publish(&mut self, id: ObjectId, lease: LeaseId) -> bool {
        self.apply(id, Event::Commit(lease)) == Outcome::Now(Stage::Readable)
    }

    pub(crate) fn abort(&mut self, owner: OwnerId, lease: LeaseId) -> Result<usize, LeaseError> {
        let write = self.take_write_lease(owner, lease)?;
        Ok(self.give_back(lease, Holding::Write(write)))
    }

    fn take_write_lease(
        &mut self,
        owner: OwnerId,
        lease: LeaseId,
    ) -> Result<WriteLease, LeaseError> {
        if !matches!(self.leases.get(owner, lease)?.holding, Holding::Write(_)) {
            return Err(LeaseError::Unknown);
        }
        match self.leases.take(lease).map(|lease| lease.holding) {
            Some(Holding::Write(write)) => Ok(write),
            _ => Err(LeaseError::Unknown),
        }
    }

    /// Takes a reservation back: out of sight at once, its slot free when no copy into it
    /// is in progress.
    fn abort_object(&mut self, id: ObjectId, lease: LeaseId) {
        self.apply(id, Event::Abort(lease));
    }

    // ---- reading ----------------------------------------------------------------------

    pub(crate) fn lock_prefix(
        &mut self,
        now: Instant,
        owner: OwnerId,
        rows: &[Vec<ObjectKey>],
        readers: u32,
    ) -> PrefixLock {
        let readers = readers.clamp(1, MAX_READERS);
        if !self.leases.is_live(owner) {
            return PrefixLock::default();
        }
        let (mut objects, chunks) = self.readable_prefix(rows);
        if chunks == 0 {
            return PrefixLock::default();
        }
        // Last chunk first, and within a chunk the last row first: the order in which
        // LMCache touches the keys of a lookup.
        for chunk in (0..chunks).rev() {
            for row in (0..rows.len()).rev() {
                if let Some(&object) = objects.get(row * chunks + chunk) {
                    self.lock(object, u64::from(readers));
                    self.policy.touch(object);
                }
            }
        }
        objects.shrink_to_fit();
        let remaining = objects.len() as u64 * u64::from(readers);
        self.owned_locks += remaining;
        let lease = self.leases.reserve_id();
        let holding = Holding::Lookup(LookupLease {
            rows: rows.len(),
            chunks,
            // At most 128, so it fits.
            held: vec![readers as u8; objects.len()],
            objects,
            remaining,
        });
        let deadline = now + self.settings.read_ttl;
        self.leases.insert(
            lease,
            Lease {
                owner,
                deadline,
                holding,
            },
        );
        PrefixLock {
            lease: Some(lease),
            hit_chunks: chunks,
        }
    }

    /// The longest prefix of chunks that is readable in every row: its objects, row by
    /// row, and its length.
    fn readable_prefix(&self, rows: &[Vec<ObjectKey>]) -> (Vec<ObjectId>, usize) {
        let mut limit = rows.iter().map(Vec::len).min().unwrap_or(0);
        let mut cursor = ScopeCursor::default();
        let mut found: Vec<Vec<ObjectId>> = Vec::with_capacity(rows.len());
        for row in rows {
            let mut hits = Vec::with_capacity(limit);
            for key in row.iter().take(limit) {
                match self.find(&mut cursor, key) {
                    Some(id) if self.objects.get(id).is_some_and(Object::is_readable) => {
                        hits.push(id);
                    }
                    _ => break,
                }
            }
            limit = hits.len();
            if limit == 0 {
                return (Vec::new(), 0);
            }
            found.push(hits);
        }
        let mut rows_found = found.into_iter();
        let mut objects = rows_found.next().unwrap_or_default();
        objects.truncate(limit);
        for hits in rows_found {
            objects.extend(hits.into_iter().take(limit));
        }
        (objects, limit)
    }

    pub(crate) fn release_prefix(
        &mut self,
        owner: OwnerId,
        id: LeaseId,
        chunks: Range<usize>,
        readers: u32,
    ) -> usize {
        let readers = u8::try_from(readers.clamp(1, MAX_READERS)).unwrap_or(u8::MAX);
        let Ok(Lease {
            holding: Holding::Lookup(lookup),
            ..
        }) = self.leases.get(owner, id)
        else {
            return 0;
        };
        let chunks = chunks.start.min(lookup.chunks)..chunks.end.min(lookup.chunks);
        let mut released = Vec::new();
        for row in 0..lookup.rows {
            let Some(places) = lookup.places(row, &chunks) else {
                return 0; // An inverted range.
            };
            for place in places {
                if let (Some(held), Some(&object)) =
                    (lookup.held.get_mut(place), lookup.objects.get(place))
                {
                    let count = (*held).min(readers);
                    if count > 0 {
                        *held -= count;
                        released.push((object, u64::from(count)));
                    }
                }
            }
        }
        let total: u64 = released.iter().map(|&(_, count)| count).sum();
        lookup.remaining -= total;
        if lookup.remaining == 0 {
            self.leases.take(id);
        }
        self.owned_locks -= total;
        for (object, count) in released {
            self.unlock(object, count);
        }
        usize::try_from(total).unwrap_or(usize::MAX)
    }

    pub(crate) fn begin_read(
        &mut self,
        now: Instant,
        lookup_owner: OwnerId,
        lookup_id: LeaseId,
        reader: OwnerId,
        row: usize,
        chunks: Range<usize>,
    ) -> Option<ReadLease> {
        if !self.leases.is_live(reader) {
            return None;
        }
        let Holding::Lookup(lookup) = &mut self.leases.get(lookup_owner, lookup_id).ok()?.holding
        else {
            return None;
        };
        let places = lookup
            .places(row, &chunks)
            .filter(|places| !places.is_empty())?;
        let held = lookup.held.get_mut(places.clone())?;
        let ids = lookup.objects.get(places)?.to_vec();
        if held.contains(&0) {
            return None;
        }
        let slots: Option<Vec<Slot>> = ids
            .iter()
            .map(|&id| {
                let object = self.objects.get(id)?;
                let intact = object.is_readable() && object.contents != Contents::Lost;
                intact.then(|| object.slot())
            })
            .collect();
        let slots = slots?;
        // The locks change hands: neither the objects' counts nor the sum moves.
        held.iter_mut().for_each(|held| *held -= 1);
        lookup.remaining -= ids.len() as u64;
        if lookup.remaining == 0 {
            self.leases.take(lookup_id);
        }
        let lease = self.leases.reserve_id();
        self.leases.insert(
            lease,
            Lease {
                owner: reader,
                deadline: now + self.settings.read_ttl,
                holding: Holding::Read(ReadingLease { objects: ids }),
            },
        );
        Some(ReadLease { lease, slots })
    }

    /// Starts a copy out of one object of a read lease.
    pub(crate) fn begin_copy(
        &mut self,
        reader: OwnerId,
        lease: LeaseId,
        index: usize,
    ) -> Result<Pinned, ReadError> {
        let Holding::Read(read) = &self.leases.get(reader, lease)?.holding else {
            return Err(LeaseError::Unknown.into());
        };
        let &id = read
            .objects
            .get(index)
            .ok_or(LeaseError::NoSuchIndex { index })?;
        let object = self.objects.get(id).ok_or(ReadError::Corrupt)?;
        let checksum = match object.contents {
            Contents::Written { checksum } => checksum,
            Contents::Unwritten => None,
            Contents::Writing | Contents::Lost => return Err(ReadError::Corrupt),
        };
        let slot = object.slot();
        self.pin(id);
        Ok(Pinned {
            object: id,
            slot,
            checksum,
        })
    }

    /// Ends a copy out of an object; one found corrupt is never served again.
    pub(crate) fn end_copy(&mut self, object: ObjectId, is_corrupt: bool) {
        if is_corrupt {
            self.quarantine(object);
        }
        self.unpin(object);
    }

    pub(crate) fn finish_read(&mut self, reader: OwnerId, lease: LeaseId) -> bool {
        let Ok(Lease {
            holding: Holding::Read(_),
            ..
        }) = self.leases.get(reader, lease)
        else {
            return false;
        };
        match self.leases.take(lease) {
            Some(ended) => {
                self.give_back(lease, ended.holding);
                true
            }
            None => false,
        }
    }

    pub(crate) fn touch(&mut self, keys: &[ObjectKey]) {
        let mut cursor = ScopeCursor::default();
        for key in keys.iter().rev() {
            if let Some(id) = self.find(&mut cursor, key)
                && self.objects.get(id).is_some_and(Object::is_readable)
            {
                self.policy.touch(id);
            }
        }
    }

    // ---- withdrawing ------------------------------------------------------------------

    /// Clears the objects numbered `range`; see `CacheEngine::clear`. Returns how many
    /// were withdrawn and how many stay, or `None` when there are no such numbers.
    pub(crate) fn clear_range(&mut self, range: Range<u32>, force: bool) -> Option<(usize, usize)> {
        if range.start as usize >= self.objects.numbers() {
            return None;
        }
        let (mut removed, mut kept) = (0, 0);
        for id in range {
            let Some(object) = self.objects.get(id) else {
                continue;
            };
            match object.stage {
                Stage::Readable if force || !object.is_held() => {
                    self.withdraw(id, RemoveReason::Cleared);
                    removed += 1;
                }
                Stage::Readable | Stage::Reserved(_) => kept += 1,
                Stage::Withdrawn => {}
            }
        }
        Some((removed, kept))
    }

    /// Withdraws all objects with bytes at or behind `length`; what is being written there
    /// will not be published. Returns the number of readable objects lost.
    pub(crate) fn lose_behind(&mut self, length: u64) -> usize {
        let lost: Vec<ObjectId> = self
            .objects
            .iter()
            .filter(|(_, object)| object.offset.saturating_add(object.length) > length)
            .map(|(id, _)| id)
            .collect();
        lost.into_iter().filter(|&id| self.quarantine(id)).count()
    }

    /// Marks an object's bytes as wrong and withdraws it; returns whether it was readable.
    fn quarantine(&mut self, id: ObjectId) -> bool {
        let Some(object) = self.objects.get_mut(id) else {
            return false;
        };
        object.contents = Contents::Lost;
        let was_readable = object.is_readable();
        if was_readable {
            self.counters.corrupt_objects += 1;
            self.withdraw(id, RemoveReason::Corrupt);
        }
        was_readable
    }

    /// Takes a readable object out of sight for another reason than its rank.
    fn withdraw(&mut self, id: ObjectId, reason: RemoveReason) {
        self.policy.remove(id);
        self.notice_removal(id, reason);
        self.apply(id, Event::Withdraw);
    }

    fn notice_removal(&mut self, id: ObjectId, reason: RemoveReason) {
        if self.notices.is_wanted()
            && let Some(key) = self.key_of(id)
        {
            self.notices.push_removed(key, reason);
        }
    }

    // ---- objects ----------------------------------------------------------------------

    fn key_hash(&self, scope_fingerprint: u64, chunk_hash: &ChunkHash) -> u64 {
        self.hasher.hash_one((scope_fingerprint, chunk_hash))
    }

    /// The reserved or readable object of a key.
    fn find<'k>(&self, cursor: &mut ScopeCursor<'k>, key: &'k ObjectKey) -> Option<ObjectId> {
        let (scope, fingerprint) = cursor.find(&self.scopes, &key.scope)?;
        let hash = self.key_hash(fingerprint, &key.chunk_hash);
        let matches = |&id: &ObjectId| {
            self.objects
                .get(id)
                .is_some_and(|object| object.chunk_hash == key.chunk_hash && object.scope == scope)
        };
        self.index.find(hash, matches).copied()
    }

    fn key_of(&self, id: ObjectId) -> Option<ObjectKey> {
        let object = self.objects.get(id)?;
        let scope = Arc::clone(self.scopes.scope(object.scope)?);
        Some(ObjectKey::new(scope, object.chunk_hash))
    }

    /// Sends an event through the table of states and does what follows from it.
    fn apply(&mut self, id: ObjectId, event: Event) -> Outcome {
        let (outcome, freed) = self.transition(id, event);
        if let Some((offset, footprint)) = freed {
            self.allocator.free(offset, footprint);
        }
        outcome
    }

    /// As [`apply`](Self::apply), but the range of an object that ends (offset, length in
    /// bytes) is left to the caller.
    fn transition(&mut self, id: ObjectId, event: Event) -> (Outcome, Option<(u64, u64)>) {
        let Some(object) = self.objects.get_mut(id) else {
            return (Outcome::Refused, None);
        };
        let before = object.stage;
        let outcome = stage::next(before, event, object.is_held());
        let after = match outcome {
            Outcome::Refused => return (outcome, None),
            Outcome::Now(after) => Some(after),
            Outcome::Gone => None,
        };
        if let Some(after) = after {
            self.tally.subtract(object);
            object.stage = after;
            self.tally.add(object);
        }
        let was_indexed = before != Stage::Withdrawn;
        if was_indexed && matches!(after, None | Some(Stage::Withdrawn)) {
            self.unindex(id);
        }
        let freed = if after.is_none() {
            self.forget(id)
        } else {
            None
        };
        (outcome, freed)
    }

    fn unindex(&mut self, id: ObjectId) {
        let Some(hash) = self.objects.get(id).map(|object| object.hash) else {
            return;
        };
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == id) {
            entry.remove();
        }
    }

    /// Drops an object's entry; its range is left to the caller.
    fn forget(&mut self, id: ObjectId) -> Option<(u64, u64)> {
        let object = self.objects.remove(id)?;
        self.tally.subtract(&object);
        self.scopes.subtract(object.scope, object.footprint);
        Some((object.offset, object.footprint))
    }

    /// Changes an object's holds and keeps the tally in step.
    fn change_hold(&mut self, id: ObjectId, change: impl FnOnce(&mut Object)) {
        if let Some(object) = self.objects.get_mut(id) {
            self.tally.subtract(object);
            change(object);
            self.tally.add(object);
        }
    }

    fn lock(&mut self, id: ObjectId, count: u64) {
        self.change_hold(id, |object| object.locks += count);
    }

    fn unlock(&mut self, id: ObjectId, count: u64) {
        self.change_hold(id, |object| object.locks -= count);
        self.after_release(id);
    }

    fn pin(&mut self, id: ObjectId) {
        self.change_hold(id, |object| object.pins += 1);
    }

    fn unpin(&mut self, id: ObjectId) {
        self.change_hold(id, |object| object.pins -= 1);
        self.after_release(id);
    }

    fn after_release(&mut self, id: ObjectId) {
        if self.apply(id, Event::Released) == Outcome::Now(Stage::Readable)
            && self.objects.get(id).is_some_and(Object::is_evictable)
        {
            // It may have been parked while it was held.
            self.policy.restore(id);
        }
    }

    // ---- looking ----------------------------------------------------------------------

    pub(crate) fn status(&self) -> EngineStatus {
        let capacity_bytes = self.allocator.capacity();
        let used_bytes = self.allocator.used_bytes();
        EngineStatus {
            readable_objects: self.tally.readable,
            reserved_objects: self.tally.reserved,
            withdrawn_objects: self.tally.withdrawn,
            read_locked_objects: self.tally.locked,
            object_locks: self.tally.locks,
            owned_locks: self.owned_locks,
            owners: self.leases.owners(),
            leases: self.leases.len(),
            used_bytes,
            staging_bytes: self.tally.staging_bytes,
            evictable_bytes: self.tally.evictable_bytes,
            capacity_bytes,
            usage_ratio: if capacity_bytes == 0 {
                0.0
            } else {
                used_bytes as f64 / capacity_bytes as f64
            },
            largest_free_bytes: self.allocator.largest_free(),
            touched_bytes: self.allocator.cold_start(),
            evicted_objects: self.counters.evicted_objects,
            evicted_bytes: self.counters.evicted_bytes,
            demand_evicted_objects: self.counters.demand_evicted_objects,
            corrupt_objects: self.counters.corrupt_objects,
            allocation_failures: self.counters.allocation_failures,
            expired_write_leases: self.counters.expired_write_leases,
            expired_read_leases: self.counters.expired_read_leases,
            segment_repairs: 0,
            dropped_notices: self.notices.dropped(),
            salts: self
                .scopes
                .salts()
                .map(|entry| SaltUsage {
                    cache_salt: entry.salt.clone(),
                    bytes: entry.bytes,
                    objects: entry.objects,
                })
                .collect(),
        }
    }

    fn recount(&self) -> Tally {
        let mut tally = Tally::default();
        for (_, object) in self.objects.iter() {
            tally.add(object);
        }
        tally
    }

    /// Checks everything against everything; see `CacheEngine::check_invariants`.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.allocator.check()?;
        self.leases.check()?;
        if self.recount() != self.tally {
            return Err(format!("tally {:?} but {:?}", self.tally, self.recount()));
        }
        if self.owned_locks != self.tally.locks {
            return Err(format!(
                "leases own {} locks, objects carry {}",
                self.owned_locks, self.tally.locks
            ));
        }
        self.check_slots()?;
        self.check_holds()?;
        let indexed = self.tally.readable + self.tally.reserved;
        if self.index.len() != indexed {
            return Err(format!(
                "{} keys indexed for {indexed} objects",
                self.index.len()
            ));
        }
        let known = self.policy.len();
        if known != 0 && known != self.tally.readable {
            return Err(format!(
                "policy knows {known} of {} objects",
                self.tally.readable
            ));
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), String> {
        let mut ranges: Vec<_> = self
            .objects
            .iter()
            .map(|(id, object)| (object.offset, object.footprint, id))
            .collect();
        ranges.sort_unstable();
        let mut end = 0;
        let mut used = 0;
        for (offset, footprint, id) in ranges {
            if offset < end {
                return Err(format!("slot of object {id} overlaps the one before"));
            }
            end = offset + footprint;
            used += footprint;
        }
        if end > self.allocator.capacity() || used != self.allocator.used_bytes() {
            return Err(format!(
                "slots take {used} bytes, the pool counts {}",
                self.allocator.used_bytes()
            ));
        }
        let salted: u64 = self.scopes.salts().map(|entry| entry.bytes).sum();
        if salted != used {
            return Err(format!("salts account for {salted} of {used} bytes"));
        }
        Ok(())
    }

    /// Each object's locks and reservation must be found again in the leases.
    fn check_holds(&self) -> Result<(), String> {
        let mut locks = std::collections::HashMap::<ObjectId, u64>::new();
        let mut reserved = std::collections::HashMap::<ObjectId, LeaseId>::new();
        for (id, lease) in self.leases.iter() {
            match &lease.holding {
                Holding::Write(write) => {
                    reserved.extend(write.objects.iter().map(|&(_, object)| (object, id)));
                }
                Holding::Lookup(lookup) => {
                    let sum: u64 = lookup.held.iter().map(|&held| u64::from(held)).sum();
                    if sum != lookup.remaining || sum == 0 {
                        return Err(format!("{id} holds {sum}, counts {}", lookup.remaining));
                    }
                    for (&object, &held) in lookup.objects.iter().zip(&lookup.held) {
                        if held > 0 {
                            *locks.entry(object).or_default() += u64::from(held);
                        }
                    }
                }
                Holding::Read(read) => {
                    for &object in &read.objects {
                        *locks.entry(object).or_default() += 1;
                    }
                }
            }
        }
        for (id, object) in self.objects.iter() {
            if locks.remove(&id).unwrap_or(0) != object.locks {
                return Err(format!("object {id} carries {} locks", object.locks));
            }
            let holder = reserved.remove(&id);
            let expected = match object.stage {
                Stage::Reserved(lease) => Some(lease),
                Stage::Readable | Stage::Withdrawn => None,
            };
            if holder != expected {
                return Err(format!(
                    "object {id} is {:?}, held by {holder:?}",
                    object.stage
                ));
            }
            if object.stage == Stage::Withdrawn && !object.is_held() {
                return Err(format!("object {id} is withdrawn but nobody holds it"));
            }
        }
        match (locks.is_empty(), reserved.is_empty()) {
            (true, true) => Ok(()),
            _ => Err("a lease holds an object that is gone".to_owned()),
        }
    }
}
