//! Who holds what, and until when.
//!
//! A lease belongs to one owner, has one deadline and lists exactly what it holds. Ids
//! are never given twice, so a late call with the id of an ended lease can hit no other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::time::Instant;

use super::ObjectId;
use crate::error::LeaseError;

/// Ended-by-time leases that are remembered, so that a late call learns why it failed.
const REMEMBERED_EXPIRIES: usize = 4096;

/// One holder of leases: a worker's registration or a request's session. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(u64);

/// One lease. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(u64);

impl OwnerId {
    /// The number behind the id, for logs.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl LeaseId {
    /// The number behind the id, for logs.
    pub fn get(self) -> u64 {
        self.0
    }

    #[cfg(test)]
    pub(super) fn test(id: u64) -> Self {
        Self(id)
    }
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "owner-{}", self.0)
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease-{}", self.0)
    }
}

/// The slots of one reservation.
#[derive(Debug)]
pub(super) struct WriteLease {
    /// (index into the caller's keys, object), by rising index.
    pub(super) objects: Vec<(usize, ObjectId)>,
    /// Bytes come through the engine, so what was not written must not be published.
    pub(super) copied: bool,
}

impl WriteLease {
    pub(super) fn object_at(&self, key_index: usize) -> Option<ObjectId> {
        let at = self
            .objects
            .binary_search_by_key(&key_index, |&(index, _)| index)
            .ok()?;
        self.objects.get(at).map(|&(_, object)| object)
    }
}

/// The locks of one lookup: `rows` times `chunks` objects, row by row.
#[derive(Debug)]
pub(super) struct LookupLease {
    pub(super) rows: usize,
    pub(super) chunks: usize,
    pub(super) objects: Vec<ObjectId>,
    /// Locks still held on each. An object whose count is zero may be gone.
    pub(super) held: Vec<u8>,
    /// Sum of `held`.
    pub(super) remaining: u64,
}

impl LookupLease {
    /// Places of a row's chunks in `objects`; `None` unless all lie inside.
    pub(super) fn places(
        &self,
        row: usize,
        chunks: &std::ops::Range<usize>,
    ) -> Option<std::ops::Range<usize>> {
        if row >= self.rows || chunks.start > chunks.end || chunks.end > self.chunks {
            return None;
        }
        let start = row * self.chunks;
        Some(start + chunks.start..start + chunks.end)
    }
}

/// One lock on each of some objects, for one reader.
#[derive(Debug)]
pub(super) struct ReadingLease {
    pub(super) objects: Vec<ObjectId>,
}

/// What a lease holds.
#[derive(Debug)]
pub(super) enum Holding {
    Write(WriteLease),
    Lookup(LookupLease),
    Read(ReadingLease),
}

impl Holding {
    /// Read locks held.
    pub(super) fn locks(&self) -> u64 {
        match self {
            Self::Write(_) => 0,
            Self::Lookup(lookup) => lookup.remaining,
            Self::Read(read) => read.objects.len() as u64,
        }
    }
}

/// Everything that can end a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its owner committed it.
    Commit,
    /// Its owner gave it up.
    Abort,
    /// Its deadline came.
    Expiry,
    /// Its owner ended: it unregistered, was reaped, its process died, or its session ended.
    OwnerEnd,
    /// Its reader is done.
    Finish,
    /// Its last lock was given back or handed to a reader.
    LastLock,
}

/// What an ending means for what a lease holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// What was written becomes readable; slots that were not written are taken back.
    Publish,
    /// Slots are taken back, locks given back; nothing becomes readable.
    GiveBack,
    /// A lease of that kind has no such end.
    Refused,
}

/// The table of endings. All ways out of a lease go through it, and its first row is the
/// only one that makes anything readable.
///
/// | | write | lookup | read |
/// |---|---|---|---|
/// | commit | publishes | refused | refused |
/// | abort | gives back | refused | refused |
/// | expiry | gives back | gives back | gives back |
/// | end of the owner (death of the client, unregistering, end of the session) | gives back | gives back | gives back |
/// | reader is done | refused | refused | gives back |
/// | last lock released or handed on | refused | gives back | refused |
///
/// Clearing the cache ends no lease. Without `force` it leaves objects that a lease holds
/// alone; with `force` it withdraws readable ones at once, so that no lookup finds them and
/// no read of them begins, and their slots become free with the last lease that holds them.
/// Reservations stay either way.
pub(super) fn effect(holding: &Holding, ending: Ending) -> Effect {
    use Ending::{Abort, Commit, Expiry, Finish, LastLock, OwnerEnd};
    match (holding, ending) {
        (Holding::Write(_), Commit) => Effect::Publish,
        (Holding::Write(_), Abort)
        | (Holding::Read(_), Finish)
        | (Holding::Lookup(_), LastLock)
        | (_, Expiry | OwnerEnd) => Effect::GiveBack,
        (Holding::Write(_), Finish | LastLock)
        | (Holding::Lookup(_), Commit | Abort | Finish)
        | (Holding::Read(_), Commit | Abort | LastLock) => Effect::Refused,
    }
}

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) owner: OwnerId,
    pub(super) deadline: Instant,
    pub(super) holding: Holding,
}

/// All live leases and owners.
#[derive(Debug, Default)]
pub(super) struct LeaseTable {
    leases: HashMap<LeaseId, Lease>,
    by_owner: BTreeSet<(OwnerId, LeaseId)>,
    by_deadline: BTreeSet<(Instant, LeaseId)>,
    owners: HashSet<OwnerId>,
    expired: BTreeMap<LeaseId, OwnerId>,
    expired_order: VecDeque<LeaseId>,
    last_owner: u64,
    last_lease: u64,
}

impl LeaseTable {
    pub(super) fn new_owner(&mut self) -> OwnerId {
        self.last_owner += 1;
        let owner = OwnerId(self.last_owner);
        self.owners.insert(owner);
        owner
    }

    pub(super) fn is_live(&self, owner: OwnerId) -> bool {
        self.owners.contains(&owner)
    }

    pub(super) fn owners(&self) -> usize {
        self.owners.len()
    }

    /// Ends the owner and hands over its leases.
    pub(super) fn end_owner(&mut self, owner: OwnerId) -> Vec<(LeaseId, Lease)> {
        self.owners.remove(&owner);
        let range = (owner, LeaseId(0))..=(owner, LeaseId(u64::MAX));
        let ids: Vec<_> = self.by_owner.range(range).map(|&(_, id)| id).collect();
        ids.into_iter()
            .filter_map(|id| Some((id, self.take(id)?)))
            .collect()
    }

    /// The id that the next [`insert`](Self::insert) uses up, for those who must note it
    /// in what the lease will hold.
    pub(super) fn reserve_id(&mut self) -> LeaseId {
        self.last_lease += 1;
        LeaseId(self.last_lease)
    }

    /// Files a lease under an id from [`reserve_id`](Self::reserve_id).
    pub(super) fn insert(&mut self, id: LeaseId, lease: Lease) {
        self.by_owner.insert((lease.owner, id));
        self.by_deadline.insert((lease.deadline, id));
        self.leases.insert(id, lease);
    }

    /// Removes a lease without a word on why.
    fn take(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.leases.remove(&id)?;
        self.by_owner.remove(&(lease.owner, id));
        self.by_deadline.remove(&(lease.deadline, id));
        Some(lease)
    }

    /// Removes and hands over one lease whose deadline has come.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(LeaseId, Lease)> {
        let &(deadline, id) = self.by_deadline.first()?;
        if deadline > now {
            return None;
        }
        let lease = self.take(id)?;
        self.expired.insert(id, lease.owner);
        self.expired_order.push_back(id);
        if self.expired_order.len() > REMEMBERED_EXPIRIES
            && let Some(oldest) = self.expired_order.pop_front()
        {
            self.expired.remove(&oldest);
        }
        Some((id, lease))
    }

    /// The live lease `id` of `owner`.
    ///
    /// # Errors
    /// `NotOwner`, `Expired` (only told to the owner) or `Unknown`.
    pub(super) fn get(&mut self, owner: OwnerId, id: LeaseId) -> Result<&mut Lease, LeaseError> {
        match self.leases.get_mut(&id) {
            Some(lease) if lease.owner == owner => Ok(lease),
            Some(_) => Err(LeaseError::NotOwner),
            None if self.expired.get(&id) == Some(&owner) => Err(LeaseError::Expired),
            None => Err(LeaseError::Unknown),
        }
    }

    /// Removes the live lease `id` of `owner` if it may end that way.
    ///
    /// # Errors
    /// As [`get`](Self::get), and `Unknown` for a lease of another kind.
    pub(super) fn end(
        &mut self,
        owner: OwnerId,
        id: LeaseId,
        ending: Ending,
    ) -> Result<Lease, LeaseError> {
        if effect(&self.get(owner, id)?.holding, ending) == Effect::Refused {
            return Err(LeaseError::Unknown);
        }
        self.take(id).ok_or(LeaseError::Unknown)
    }

    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (LeaseId, &Lease)> {
        self.leases.iter().map(|(&id, lease)| (id, lease))
    }

    /// Checks that the three indexes agree.
    pub(super) fn check(&self) -> Result<(), String> {
        let count = self.leases.len();
        if self.by_owner.len() != count || self.by_deadline.len() != count {
            return Err("lease indexes differ in number".to_owned());
        }
        for (&id, lease) in &self.leases {
            if !self.by_owner.contains(&(lease.owner, id))
                || !self.by_deadline.contains(&(lease.deadline, id))
            {
                return Err(format!("{id} is missing from an index"));
            }
            if !self.owners.contains(&lease.owner) {
                return Err(format!("{id} belongs to {}, who has ended", lease.owner));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_commit_of_a_write_makes_anything_readable() {
        let holdings = [
            Holding::Write(WriteLease {
                objects: Vec::new(),
                copied: false,
            }),
            Holding::Lookup(LookupLease {
                rows: 0,
                chunks: 0,
                objects: Vec::new(),
                held: Vec::new(),
                remaining: 0,
            }),
            Holding::Read(ReadingLease {
                objects: Vec::new(),
            }),
        ];
        use Effect::{GiveBack, Publish, Refused};
        let table = [
            (Ending::Commit, [Publish, Refused, Refused]),
            (Ending::Abort, [GiveBack, Refused, Refused]),
            (Ending::Expiry, [GiveBack, GiveBack, GiveBack]),
            (Ending::OwnerEnd, [GiveBack, GiveBack, GiveBack]),
            (Ending::Finish, [Refused, Refused, GiveBack]),
            (Ending::LastLock, [Refused, GiveBack, Refused]),
        ];
        for (ending, row) in table {
            let found = [0, 1, 2].map(|kind: usize| effect(&holdings[kind], ending));
            assert_eq!(found, row, "{ending:?}");
        }
    }
}
