//! Read locks: taken by lookups, handed to readers, given back.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::lease::{Ending, Holding, Lease, LeaseId, LookupLease, OwnerId, ReadingLease};
use super::{Contents, L1, Object, ObjectId, Pinned, ScopeCursor};
use crate::engine::{PrefixLock, ReadLease};
use crate::error::{LeaseError, ReadError};
use crate::key::ObjectKey;
use crate::shm_pool::Slot;

/// Most read locks one lookup may take per object, as in LMCache's `l1_manager.py`.
const MAX_READERS: u32 = 128;

impl L1 {
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
                    self.uses.asked(object, now, chunk);
                    if let Some(found) = self.objects.get(object) {
                        self.tenants.touch(found.tenant, found.place);
                    }
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

    /// Takes the locks of a lookup anew over what is readable by now, before the old ones go.
    pub(crate) fn renew_prefix(
        &mut self,
        now: Instant,
        owner: OwnerId,
        old: Option<LeaseId>,
        rows: &[Vec<ObjectKey>],
        readers: u32,
    ) -> PrefixLock {
        let renewed = self.lock_prefix(now, owner, rows, readers);
        if let Some(old) = old {
            self.release_prefix(owner, old, 0..usize::MAX, MAX_READERS);
        }
        renewed
    }

    /// Which of `keys` are readable.
    pub(crate) fn readable(&self, keys: &[ObjectKey]) -> Vec<bool> {
        let mut cursor = ScopeCursor::default();
        keys.iter()
            .map(|key| {
                let id = self.find(&mut cursor, key);
                id.and_then(|id| self.objects.get(id))
                    .is_some_and(Object::is_readable)
            })
            .collect()
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
            // It holds nothing any more, so nothing is left to settle.
            let _ = self.leases.end(owner, id, Ending::LastLock);
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
            // Its reader holds its locks now.
            let _ = self.leases.end(lookup_owner, lookup_id, Ending::LastLock);
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

    /// Starts a copy out of a readable object that needs no lease: the copy itself holds it, and
    /// is no use of it. `None` if the key is not readable or its bytes are lost.
    pub(crate) fn begin_copy_of(&mut self, key: &ObjectKey) -> Option<Pinned> {
        let id = self.find(&mut ScopeCursor::default(), key)?;
        let object = self.objects.get(id).filter(|object| object.is_readable())?;
        let checksum = match object.contents {
            Contents::Written { checksum } => checksum,
            Contents::Unwritten => None,
            Contents::Writing | Contents::Lost => return None,
        };
        let slot = object.slot();
        self.pin(id);
        Some(Pinned {
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
        self.end_lease(reader, lease, Ending::Finish).is_ok()
    }

    pub(crate) fn touch(&mut self, now: Instant, keys: &[ObjectKey], request: Option<&Arc<str>>) {
        let mut cursor = ScopeCursor::default();
        for (chunk, key) in keys.iter().enumerate().rev() {
            if let Some(id) = self.find(&mut cursor, key)
                && let Some(object) = self.objects.get(id)
                && object.is_readable()
            {
                self.tenants.session_ended(object.tenant, object.place);
                self.uses.ended(id, now, chunk, request);
            }
        }
    }
}
