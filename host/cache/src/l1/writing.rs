//! Slots for writers: reserved, written, then committed or aborted.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashTable;

use super::lease::{Ending, Holding, Lease, LeaseId, OwnerId, WriteLease};
use super::reclaim::Shortage;
use super::stage::{Event, Outcome, Stage};
use super::tenants::{NOWHERE, Search, TenantId};
use super::{Contents, EndedLease, L1, Notice, Object, ObjectId, Pinned, ScopeCursor};
use crate::engine::{Committed, Reservation};
use crate::error::{LeaseError, ReserveError};
use crate::eviction::EntryFacts;
use crate::key::{KeyScope, ObjectKey};
use crate::shm_pool::Slot;

impl L1 {
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
        let wants = self.wants(keys, &wanted, footprint);
        let offsets = self.allocate_slots(&wants, wanted.len(), footprint);
        for &object in &resident {
            self.unpin(object);
        }
        let offsets =
            offsets.map_err(|shortage| self.no_room(shortage, &wants, wanted.len(), footprint))?;
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

    /// What each tenant wants, in bytes; nearly always there is one.
    fn wants(&self, keys: &[ObjectKey], wanted: &[usize], footprint: u64) -> Vec<(TenantId, u64)> {
        let mut wants: Vec<(TenantId, u64)> = Vec::with_capacity(1);
        let mut last: Option<(&Arc<KeyScope>, TenantId)> = None;
        for key in wanted.iter().filter_map(|&index| keys.get(index)) {
            let tenant = match last {
                Some((scope, tenant)) if Arc::ptr_eq(scope, &key.scope) => tenant,
                _ => self.tenants.of_salt(&key.scope.cache_salt),
            };
            last = Some((&key.scope, tenant));
            match wants.iter_mut().find(|(known, _)| *known == tenant) {
                Some((_, bytes)) => *bytes = bytes.saturating_add(footprint),
                None => wants.push((tenant, footprint)),
            }
        }
        wants
    }

    fn no_room(
        &mut self,
        shortage: Shortage,
        wants: &[(TenantId, u64)],
        count: usize,
        footprint: u64,
    ) -> ReserveError {
        let needed_bytes = (count as u64).saturating_mul(footprint);
        let search = Search::on_behalf_of(wants.iter().map(|&(tenant, _)| tenant));
        let error = match shortage {
            Shortage::Pool => ReserveError::PoolFull {
                needed_bytes,
                free_bytes: self.allocator.free_bytes(),
                evictable_bytes: self.tenants.reclaimable_bytes(&search),
            },
            Shortage::Cap { tenant, cap_bytes } => ReserveError::CapReached {
                needed_bytes,
                cap_bytes,
                used_bytes: self.tenants.used_bytes(tenant),
                evictable_bytes: self.tenants.evictable_bytes(tenant),
            },
        };
        self.counters.allocation_failures += 1;
        self.notices.push(Notice::AllocationFailed {
            needed_bytes,
            free_bytes: self.allocator.free_bytes(),
            evictable_bytes: self.tenants.reclaimable_bytes(&search),
        });
        error
    }

    fn insert_reserved(
        &mut self,
        key: &ObjectKey,
        slot: Slot,
        footprint: u64,
        lease: LeaseId,
    ) -> Option<ObjectId> {
        let tenants = &self.tenants;
        let scope = self
            .scopes
            .add(&key.scope, footprint, |salt| tenants.of_salt(salt))?;
        let hash = self.key_hash(self.scopes.fingerprint(scope), &key.chunk_hash);
        let object = Object {
            scope,
            tenant: self.scopes.tenant_of(scope),
            place: NOWHERE,
            chunk_hash: key.chunk_hash,
            hash,
            offset: slot.offset,
            length: slot.length,
            footprint,
            stage: Stage::Reserved(lease),
            contents: Contents::Unwritten,
            locks: 0,
            pins: 0,
            is_temporary: false,
            is_due: false,
        };
        let Some(id) = self.objects.insert(object) else {
            self.scopes.subtract(scope, footprint);
            return None;
        };
        if let Some(object) = self.objects.get(id) {
            self.tally.add(object);
            self.tenants.add(object);
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
        now: Instant,
        owner: OwnerId,
        lease: LeaseId,
        request: Option<&Arc<str>>,
    ) -> Result<Committed, LeaseError> {
        let EndedLease {
            admitted,
            aborted_objects: discarded,
            ..
        } = self.end_lease(owner, lease, Ending::Commit)?;
        // Last chunk first, so that of one prefix the later chunks are evicted first.
        for &id in admitted.iter().rev() {
            self.rank(id);
            self.uses.stored(id, now);
        }
        if self.notices.is_wanted() && !admitted.is_empty() {
            let keys = admitted.iter().filter_map(|&id| self.key_of(id)).collect();
            let first = admitted.first().and_then(|&id| self.objects.get(id));
            self.notices.push(Notice::Stored {
                keys,
                object_bytes: first.map_or(0, |object| object.length),
                request: request.cloned(),
            });
        }
        Ok(Committed {
            admitted: admitted.len(),
            discarded,
        })
    }

    /// As [`commit`](Self::commit), for objects that are to go with the last lock on them.
    pub(crate) fn commit_temporary(
        &mut self,
        now: Instant,
        owner: OwnerId,
        lease: LeaseId,
    ) -> Result<Committed, LeaseError> {
        if let Holding::Write(write) = &self.leases.get(owner, lease)?.holding {
            for &(_, id) in &write.objects {
                if let Some(object) = self.objects.get_mut(id) {
                    object.is_temporary = true;
                }
            }
        }
        self.commit(now, owner, lease, None)
    }

    /// Gives a readable object a place in its tenant's order.
    pub(super) fn rank(&mut self, id: ObjectId) {
        if let Some(object) = self.objects.get_mut(id) {
            let facts = EntryFacts {
                fingerprint: object.hash,
                salt: self.scopes.salt_of(object.scope),
                weight: object.footprint,
            };
            object.place = self.tenants.rank(object.tenant, id, facts);
        }
    }

    /// A slot may be served if all its bytes are known to have come in: through the
    /// engine, or from a worker that can reach the pool and says so by committing.
    pub(super) fn may_publish(&self, id: ObjectId, write: &WriteLease) -> bool {
        match self.objects.get(id).map(|object| object.contents) {
            Some(Contents::Written { .. }) => true,
            Some(Contents::Unwritten) => self.settings.shared && !write.copied,
            Some(Contents::Writing | Contents::Lost) | None => false,
        }
    }

    pub(super) fn publish(&mut self, id: ObjectId, lease: LeaseId) -> bool {
        self.apply(id, Event::Commit(lease)) == Outcome::Now(Stage::Readable)
    }

    pub(crate) fn abort(&mut self, owner: OwnerId, lease: LeaseId) -> Result<usize, LeaseError> {
        let ended = self.end_lease(owner, lease, Ending::Abort)?;
        Ok(ended.aborted_objects)
    }
}
