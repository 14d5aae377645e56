//! The objects in the pool, their states, and who holds them.
//!
//! Everything here runs under the engine's one mutex and does no I/O. Time comes in as an
//! argument; notices for the observer are queued and go out after the mutex is released.

mod budgets;
mod inspection;
mod keep_hints;
pub(crate) mod lease;
mod listing;
mod notices;
pub(crate) mod ranking;
mod reading;
mod reclaim;
mod scope_table;
mod slab;
mod stage;
mod tally;
pub(crate) mod tenants;
mod uses;
mod withdrawing;
mod writing;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashTable};

pub(crate) use notices::{Notice, Notices};
use scope_table::{ScopeId, ScopeTable};
use slab::Slab;
use stage::{Event, Outcome, Stage};
use tally::Tally;
pub(crate) use tenants::TenantId;
use tenants::{Place, Tenants};
use uses::Uses;

use crate::engine::{EndedOwner, RemoveReason};
use crate::error::LeaseError;
use crate::eviction::PolicyKind;
use crate::key::{ChunkHash, KeyScope, ObjectKey};
use crate::shm_pool::Slot;
use crate::shm_pool::slot_allocator::SlotAllocator;
use keep_hints::KeepHints;
use lease::{Effect, Ending, Holding, Lease, LeaseId, LeaseTable, OwnerId};

/// Number of an object; also its number in the eviction policy.
pub(crate) type ObjectId = u32;

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
    /// Whom it counts for, and whose policy ranks it.
    tenant: TenantId,
    /// Where that policy has it.
    place: Place,
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
    /// Goes with the last lock on it.
    is_temporary: bool,
    /// That lock is gone: it goes as soon as nobody holds it.
    is_due: bool,
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
    ranked_objects: u64,
    corrupt_objects: u64,
    allocation_failures: u64,
    expired_write_leases: u64,
    expired_read_leases: u64,
}

/// What a lease left when it ended.
#[derive(Debug, Default)]
struct EndedLease {
    /// Objects that are readable now, in the order of their reservation.
    admitted: Vec<ObjectId>,
    aborted_objects: usize,
    released_locks: u64,
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
    tenants: Tenants,
    tally: Tally,
    /// Locks that leases hold, counted apart from those that objects carry.
    owned_locks: u64,
    counters: Counters,
    notices: Notices,
    uses: Uses,
    keep_hints: KeepHints,
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
    pub(crate) fn new(settings: L1Settings, allocator: SlotAllocator, policy: PolicyKind) -> Self {
        Self {
            settings,
            objects: Slab::default(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            scopes: ScopeTable::default(),
            leases: LeaseTable::default(),
            allocator,
            tenants: Tenants::new(policy),
            tally: Tally::default(),
            owned_locks: 0,
            counters: Counters::default(),
            notices: Notices::default(),
            uses: Uses::default(),
            keep_hints: KeepHints::default(),
        }
    }

    pub(crate) fn allocator(&mut self) -> &mut SlotAllocator {
        &mut self.allocator
    }

    pub(crate) fn notices(&mut self) -> &mut Notices {
        &mut self.notices
    }

    pub(crate) fn new_owner(&mut self) -> OwnerId {
        self.leases.new_owner()
    }

    pub(crate) fn end_owner(&mut self, owner: OwnerId) -> EndedOwner {
        let mut all = EndedOwner::default();
        for (id, lease) in self.leases.end_owner(owner) {
            let ended = self.settle_lease(id, lease, Ending::OwnerEnd);
            all.released_locks += ended.released_locks;
            all.aborted_objects += ended.aborted_objects;
        }
        all
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
            self.settle_lease(id, lease, Ending::Expiry);
        }
    }

    /// Ends the lease `id` of `owner` in the given way.
    fn end_lease(
        &mut self,
        owner: OwnerId,
        id: LeaseId,
        ending: Ending,
    ) -> Result<EndedLease, LeaseError> {
        let lease = self.leases.end(owner, id, ending)?;
        Ok(self.settle_lease(id, lease, ending))
    }

    /// Does to what a lease holds what the table of endings says; all leases end here.
    fn settle_lease(&mut self, id: LeaseId, lease: Lease, ending: Ending) -> EndedLease {
        let effect = lease::effect(&lease.holding, ending);
        let mut ended = EndedLease {
            released_locks: lease.holding.locks(),
            ..EndedLease::default()
        };
        self.owned_locks -= ended.released_locks;
        match lease.holding {
            Holding::Write(write) => {
                for &(_, object) in &write.objects {
                    let is_due = effect == Effect::Publish && self.may_publish(object, &write);
                    if is_due && self.publish(object, id) {
                        ended.admitted.push(object);
                    } else {
                        self.abort_object(object, id);
                        ended.aborted_objects += 1;
                    }
                }
            }
            Holding::Lookup(lookup) => {
                for (&object, &held) in lookup.objects.iter().zip(&lookup.held) {
                    if held > 0 {
                        self.unlock(object, u64::from(held));
                    }
                }
            }
            Holding::Read(read) => {
                for &object in &read.objects {
                    self.unlock(object, 1);
                }
            }
        }
        ended
    }

    /// Takes a reservation back: out of sight at once, its slot free when no copy into it
    /// is in progress.
    fn abort_object(&mut self, id: ObjectId, lease: LeaseId) {
        self.apply(id, Event::Abort(lease));
    }

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
            let could_go = object.is_evictable();
            self.tally.subtract(object);
            object.stage = after;
            self.tally.add(object);
            self.tenants.recount_evictable(object, could_go);
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
        self.keep_hints.forget(id);
        self.tally.subtract(&object);
        self.tenants.subtract(&object);
        self.scopes.subtract(object.scope, object.footprint);
        Some((object.offset, object.footprint))
    }

    /// Changes an object's holds and keeps the tally in step.
    fn change_hold(&mut self, id: ObjectId, change: impl FnOnce(&mut Object)) {
        if let Some(object) = self.objects.get_mut(id) {
            let could_go = object.is_evictable();
            self.tally.subtract(object);
            change(object);
            self.tally.add(object);
            self.tenants.recount_evictable(object, could_go);
        }
    }

    fn lock(&mut self, id: ObjectId, count: u64) {
        self.change_hold(id, |object| object.locks += count);
    }

    fn unlock(&mut self, id: ObjectId, count: u64) {
        self.change_hold(id, |object| {
            object.locks -= count;
            object.is_due |= object.is_temporary && object.locks == 0;
        });
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
            && let Some(object) = self.objects.get(id)
            && object.is_evictable()
        {
            if object.is_due {
                self.withdraw(id, RemoveReason::Released);
                return;
            }
            // It may have been parked while it was held.
            self.tenants.restore(object.tenant, object.place);
        }
    }
}
