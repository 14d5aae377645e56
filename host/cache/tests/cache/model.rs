//! Random operations go to the engine and to a plain model; both must agree after each.
//!
//! The model knows nothing of indexes, lists or leases' inner workings: it keeps every
//! object, lock and reservation in `BTreeMap`s and looks through all of them each time.
//! It does not predict which objects are evicted; it checks that each of them might go,
//! that its place was needed, and that a refusal had no way around it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use stockade_cache::{
    Backing, CacheObserver, EngineConfig, LeaseError, LeaseId, ObjectKey, OwnerId, PolicyKind,
    ReadError, RemoveReason, ReserveError, Slot,
};

use crate::fixture::*;

const PAGES: u64 = 12;

#[derive(Debug, Clone)]
enum Op {
    NewOwner,
    EndOwner(usize),
    Reserve {
        owner: usize,
        chunks: Vec<u32>,
        pages: u64,
    },
    Write {
        actor: usize,
        lease: usize,
        index: usize,
        cut: bool,
    },
    Commit {
        actor: usize,
        lease: usize,
    },
    Abort {
        actor: usize,
        lease: usize,
    },
    Lookup {
        owner: usize,
        rows: Vec<Vec<u32>>,
        readers: u32,
    },
    Release {
        actor: usize,
        lease: usize,
        start: usize,
        end: usize,
        readers: u32,
    },
    BeginRead {
        actor: usize,
        lease: usize,
        reader: usize,
        row: usize,
        start: usize,
        end: usize,
    },
    Read {
        actor: usize,
        lease: usize,
        index: usize,
    },
    FinishRead {
        actor: usize,
        lease: usize,
    },
    Touch(Vec<u32>),
    Clear(bool),
    Advance(u64),
    Maintain,
}

fn op() -> impl Strategy<Value = Op> {
    let (who, which) = (0..6_usize, 0..12_usize);
    // Mostly the newest owner and lease, so that conversations come to something.
    let who = prop_oneof![3 => Just(0_usize), 1 => who];
    let which = prop_oneof![2 => Just(0_usize), 2 => which];
    let chunks = prop::collection::vec(0..14_u32, 1..5);
    let prefix = (0..12_u32, 1..4_u32).prop_map(|(start, len)| (start..start + len).collect());
    let bounds = (0..4_usize, 0..5_usize);
    prop_oneof![
        2 => Just(Op::NewOwner),
        1 => who.clone().prop_map(Op::EndOwner),
        6 => (who.clone(), prop_oneof![chunks.clone(), prefix.clone()], 1..4_u64)
            .prop_map(|(owner, chunks, pages)| Op::Reserve { owner, chunks, pages }),
        6 => (who.clone(), which.clone(), 0..5_usize, prop::bool::weighted(0.1))
            .prop_map(|(actor, lease, index, cut)| Op::Write { actor, lease, index, cut }),
        5 => (who.clone(), which.clone()).prop_map(|(actor, lease)| Op::Commit { actor, lease }),
        1 => (who.clone(), which.clone()).prop_map(|(actor, lease)| Op::Abort { actor, lease }),
        5 => (who.clone(), prop::collection::vec(prefix, 1..3), 1..4_u32)
            .prop_map(|(owner, rows, readers)| Op::Lookup { owner, rows, readers }),
        2 => (who.clone(), which.clone(), bounds.clone(), 1..4_u32)
            .prop_map(|(actor, lease, (start, end), readers)| {
                Op::Release { actor, lease, start, end, readers }
            }),
        4 => (who.clone(), which.clone(), who.clone(), 0..2_usize, bounds)
            .prop_map(|(actor, lease, reader, row, (start, end))| {
                Op::BeginRead { actor, lease, reader, row, start, end }
            }),
        4 => (who.clone(), which.clone(), 0..3_usize)
            .prop_map(|(actor, lease, index)| Op::Read { actor, lease, index }),
        2 => (who, which).prop_map(|(actor, lease)| Op::FinishRead { actor, lease }),
        1 => chunks.prop_map(Op::Touch),
        1 => any::<bool>().prop_map(Op::Clear),
        2 => (1..400_u64).prop_map(Op::Advance),
        1 => Just(Op::Maintain),
    ]
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Reserved,
    Readable,
    Withdrawn,
}

#[derive(Debug, Clone)]
struct Object {
    chunk: u32,
    slot: Slot,
    state: State,
    /// Seed of the bytes that were written; `None` if they were not, or not in full.
    seed: Option<u64>,
}

#[derive(Debug, Clone)]
enum Held {
    /// Index in the call and object.
    Write {
        objects: Vec<(usize, u64)>,
        through_engine: bool,
    },
    /// Locks left by (row, chunk).
    Lookup {
        objects: Vec<Vec<u64>>,
        left: Vec<Vec<u32>>,
    },
    Read {
        objects: Vec<u64>,
    },
}

#[derive(Debug, Clone)]
struct Lease {
    owner: OwnerId,
    until: Duration,
    held: Held,
}

/// Whose a lease was, and whether it ran out.
type Ended = (OwnerId, bool);

#[derive(Default)]
struct Removals(Mutex<Vec<(u32, RemoveReason)>>);

impl CacheObserver for Removals {
    fn removed(&self, keys: &[ObjectKey], reason: RemoveReason) {
        self.0.lock().extend(keys.iter().map(|key| {
            let number: [u8; 4] = key.chunk_hash.0[..4].try_into().unwrap();
            (u32::from_be_bytes(number), reason)
        }));
    }
}

struct Model {
    cache: Cache,
    is_shared: bool,
    removals: Arc<Removals>,
    now: Duration,
    next: u64,
    owners: Vec<OwnerId>,
    ended: Vec<OwnerId>,
    /// All leases ever, newest last; an ended one with its owner and whether it ran out.
    leases: Vec<(LeaseId, Result<Lease, Ended>)>,
    objects: BTreeMap<u64, Object>,
}

impl Model {
    fn new(is_shared: bool, policy: PolicyKind) -> Self {
        let backing = if is_shared {
            Backing::Shm {
                name: unique_name(),
            }
        } else {
            Backing::Private
        };
        let cache = open(EngineConfig {
            policy,
            trigger_watermark: 0.7,
            eviction_ratio: 0.3,
            ..config(PAGES, backing)
        });
        let removals = Arc::new(Removals::default());
        cache.set_observer(Arc::clone(&removals) as _);
        let owners = vec![cache.new_owner()];
        Self {
            cache,
            is_shared,
            removals,
            now: Duration::ZERO,
            next: 0,
            owners,
            ended: Vec::new(),
            leases: Vec::new(),
            objects: BTreeMap::new(),
        }
    }

    /// Counting from the newest; beyond the live ones come those that have ended.
    fn owner(&self, nth: usize) -> OwnerId {
        let all = self.owners.iter().rev().chain(&self.ended);
        *all.cycle().nth(nth).unwrap()
    }

    fn lease(&self, nth: usize) -> Option<LeaseId> {
        let count = self.leases.len().max(1);
        Some(self.leases.iter().rev().nth(nth % count)?.0)
    }

    fn find(&self, chunk: u32) -> Option<u64> {
        let indexed = |object: &Object| object.chunk == chunk && object.state != State::Withdrawn;
        let found = self.objects.iter().find(|(_, object)| indexed(object));
        found.map(|(&id, _)| id)
    }

    fn is_readable(&self, id: u64) -> bool {
        self.objects[&id].state == State::Readable
    }

    fn live(&self) -> impl Iterator<Item = &Lease> {
        self.leases
            .iter()
            .filter_map(|(_, lease)| lease.as_ref().ok())
    }

    fn locks(&self, id: u64) -> u32 {
        let of = |lease: &Lease| match &lease.held {
            Held::Write { .. } => 0,
            Held::Lookup { objects, left } => {
                let pairs = objects.iter().flatten().zip(left.iter().flatten());
                pairs
                    .filter(|&(&object, _)| object == id)
                    .map(|(_, &left)| left)
                    .sum()
            }
            Held::Read { objects } => objects.iter().filter(|&&object| object == id).count() as u32,
        };
        self.live().map(of).sum()
    }

    fn may_go(&self, id: u64) -> bool {
        self.is_readable(id) && self.locks(id) == 0
    }

    /// What the engine must say to `actor` about this lease; `Ok` if it is live and theirs.
    fn verdict(&self, actor: OwnerId, id: LeaseId) -> Result<&Lease, LeaseError> {
        let (_, lease) = self.leases.iter().find(|(known, _)| *known == id).unwrap();
        match lease {
            Ok(lease) if lease.owner == actor => Ok(lease),
            Ok(_) => Err(LeaseError::NotOwner),
            // Only the owner is told that it was too late; others learn nothing.
            Err((owner, true)) if *owner == actor => Err(LeaseError::Expired),
            Err(_) => Err(LeaseError::Unknown),
        }
    }

    fn close(&mut self, id: LeaseId, ran_out: bool) -> Lease {
        let (_, lease) = self
            .leases
            .iter_mut()
            .find(|(known, _)| *known == id)
            .unwrap();
        let owner = lease.as_ref().unwrap().owner;
        let lease = std::mem::replace(lease, Err((owner, ran_out))).unwrap();
        if let Held::Write { objects, .. } = &lease.held {
            for (_, object) in objects {
                let gone = self.objects.remove(object).unwrap();
                assert_eq!(gone.state, State::Reserved);
            }
        }
        self.sweep();
        lease
    }

    fn edit(&mut self, id: LeaseId) -> &mut Held {
        let (_, lease) = self
            .leases
            .iter_mut()
            .find(|(known, _)| *known == id)
            .unwrap();
        &mut lease.as_mut().unwrap().held
    }

    /// Withdrawn objects go with their last lock; lookups without locks are over.
    fn sweep(&mut self) {
        for (_, lease) in &mut self.leases {
            if let Ok(Lease {
                owner,
                held: Held::Lookup { left, .. },
                ..
            }) = lease
                && left.iter().flatten().all(|&left| left == 0)
            {
                *lease = Err((*owner, false));
            }
        }
        let unheld: Vec<u64> = self
            .objects
            .iter()
            .filter(|(_, object)| object.state == State::Withdrawn)
            .map(|(&id, _)| id)
            .filter(|&id| self.locks(id) == 0)
            .collect();
        for id in unheld {
            self.objects.remove(&id);
        }
    }

    /// Takes in what the engine says it removed, which must be things it could remove.
    fn take_removals(&mut self, expected: RemoveReason) -> Vec<Object> {
        let removed = std::mem::take(&mut *self.removals.0.lock());
        let mut objects = Vec::new();
        for (chunk, reason) in removed {
            assert_eq!(reason, expected);
            let id = self
                .find(chunk)
                .expect("an object that was not there was removed");
            assert!(self.is_readable(id));
            if reason == RemoveReason::Evicted {
                assert!(self.may_go(id), "evicted in spite of a lock");
            }
            objects.push(self.objects[&id].clone());
            self.objects.get_mut(&id).unwrap().state = State::Withdrawn;
        }
        self.sweep();
        objects
    }

    fn pages_of(length: u64) -> u64 {
        length.div_ceil(PAGE)
    }

    /// Whether `count` slots fit between everything that must stay.
    fn could_fit(&self, count: usize, pages: u64, keep: &[u64]) -> bool {
        let mut walls: Vec<(u64, u64)> = self
            .objects
            .iter()
            .filter(|&(id, _)| !self.may_go(*id) || keep.contains(id))
            .map(|(_, object)| {
                let start = object.slot.offset / PAGE;
                (start, start + Self::pages_of(object.slot.length))
            })
            .collect();
        walls.sort_unstable();
        walls.push((PAGES, PAGES));
        let (mut from, mut room) = (0, 0);
        for (start, end) in walls {
            room += (start - from) / pages;
            from = end;
        }
        room >= count as u64
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::NewOwner => self.owners.push(self.cache.new_owner()),
            Op::EndOwner(nth) => self.end_owner(self.owner(*nth)),
            Op::Reserve {
                owner,
                chunks,
                pages,
            } => self.reserve(self.owner(*owner), chunks, *pages),
            Op::Write {
                actor,
                lease,
                index,
                cut,
            } => {
                if let Some(lease) = self.lease(*lease) {
                    self.write(self.owner(*actor), lease, *index, *cut);
                }
            }
            Op::Commit { actor, lease } => {
                if let Some(lease) = self.lease(*lease) {
                    self.commit(self.owner(*actor), lease);
                }
            }
            Op::Abort { actor, lease } => {
                if let Some(lease) = self.lease(*lease) {
                    self.abort(self.owner(*actor), lease);
                }
            }
            Op::Lookup {
                owner,
                rows,
                readers,
            } => self.lookup(self.owner(*owner), rows, *readers),
            Op::Release {
                actor,
                lease,
                start,
                end,
                readers,
            } => {
                if let Some(lease) = self.lease(*lease) {
                    self.release(self.owner(*actor), lease, *start..*end, *readers);
                }
            }
            Op::BeginRead {
                actor,
                lease,
                reader,
                row,
                start,
                end,
            } => {
                if let Some(lease) = self.lease(*lease) {
                    let (actor, reader) = (self.owner(*actor), self.owner(*reader));
                    self.begin_read(actor, lease, reader, *row, *start..*end);
                }
            }
            Op::Read {
                actor,
                lease,
                index,
            } => {
                if let Some(lease) = self.lease(*lease) {
                    self.read(self.owner(*actor), lease, *index);
                }
            }
            Op::FinishRead { actor, lease } => {
                if let Some(lease) = self.lease(*lease) {
                    self.finish_read(self.owner(*actor), lease);
                }
            }
            Op::Touch(chunks) => self.cache.touch(&keys(chunks.iter().copied())),
            Op::Clear(force) => self.clear(*force),
            Op::Advance(seconds) => self.advance(Duration::from_secs(*seconds)),
            Op::Maintain => self.maintain(),
        }
    }

    fn end_owner(&mut self, owner: OwnerId) {
        let of_owner: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.as_ref().is_ok_and(|lease| lease.owner == owner))
            .map(|&(id, _)| id)
            .collect();
        let (mut aborted, mut released) = (0, 0);
        for id in of_owner {
            match self.close(id, false).held {
                Held::Write { objects, .. } => aborted += objects.len(),
                Held::Lookup { left, .. } => released += left.iter().flatten().sum::<u32>(),
                Held::Read { objects } => released += objects.len() as u32,
            }
        }
        let ended = self.cache.end_owner(owner);
        assert_eq!(ended.aborted_objects, aborted);
        assert_eq!(ended.released_locks, u64::from(released));
        self.owners.retain(|&known| known != owner);
        if !self.ended.contains(&owner) {
            self.ended.push(owner);
        }
        if self.owners.is_empty() {
            self.owners.push(self.cache.new_owner());
        }
    }

    fn reserve(&mut self, owner: OwnerId, chunks: &[u32], pages: u64) {
        let length = pages * PAGE - 17;
        let result = self
            .cache
            .reserve(owner, &keys(chunks.iter().copied()), length);
        if !self.owners.contains(&owner) {
            assert_eq!(result, Err(ReserveError::OwnerEnded));
            return;
        }
        let mut wanted: Vec<usize> = Vec::new();
        let mut keep = Vec::new();
        for (index, &chunk) in chunks.iter().enumerate() {
            match self.find(chunk) {
                Some(id) => keep.push(id),
                None if chunks[..index].contains(&chunk) => {}
                None => wanted.push(index),
            }
        }
        let fits = self.could_fit(wanted.len(), pages, &keep);
        let gone = self.take_removals(RemoveReason::Evicted);
        let reservation = match result {
            Ok(reservation) => reservation,
            Err(error) => {
                assert!(matches!(error, ReserveError::PoolFull { .. }), "{error:?}");
                assert!(!fits, "refused although there was a way");
                assert!(gone.is_empty(), "refused, yet something was evicted");
                return;
            }
        };
        let indexes: Vec<usize> = reservation.slots.iter().map(|&(index, _)| index).collect();
        assert_eq!(indexes, wanted);
        assert_eq!(reservation.lease.is_some(), !wanted.is_empty());
        let taken: Vec<(u64, u64)> = reservation
            .slots
            .iter()
            .map(|(_, slot)| (slot.offset, slot.offset + pages * PAGE))
            .collect();
        for object in &gone {
            let start = object.slot.offset;
            let end = start + Self::pages_of(object.slot.length) * PAGE;
            let is_needed = taken.iter().any(|&(from, to)| from < end && start < to);
            assert!(is_needed, "evicted for nothing");
            let is_front = keep.iter().any(|id| !self.objects.contains_key(id));
            assert!(!is_front, "evicted the front of the prefix that is stored");
        }
        let Some(lease) = reservation.lease else {
            return;
        };
        let mut objects = Vec::new();
        for (index, slot) in reservation.slots {
            assert_eq!(slot.length, length);
            let mut seed = None;
            if self.is_shared {
                // The worker has the segment open and writes at once.
                seed = Some(self.next);
                self.cache.worker_write(slot, &bytes_of(self.next, length));
            }
            let object = Object {
                chunk: chunks[index],
                slot,
                state: State::Reserved,
                seed,
            };
            self.objects.insert(self.next, object);
            objects.push((index, self.next));
            self.next += 1;
        }
        let held = Held::Write {
            objects,
            through_engine: false,
        };
        self.file(lease, owner, WRITE_TTL, held);
    }

    fn file(&mut self, id: LeaseId, owner: OwnerId, ttl: Duration, held: Held) {
        let until = self.now + ttl;
        assert!(
            self.leases.iter().all(|(known, _)| *known != id),
            "an id came twice"
        );
        self.leases.push((id, Ok(Lease { owner, until, held })));
    }

    fn write(&mut self, actor: OwnerId, lease: LeaseId, index: usize, cut: bool) {
        let seed = self.next;
        self.next += 1;
        let object = match self.verdict(actor, lease) {
            Ok(Lease {
                held: Held::Write { objects, .. },
                ..
            }) => objects
                .iter()
                .find(|&&(at, _)| at == index)
                .map(|&(_, id)| id)
                .ok_or(LeaseError::NoSuchIndex { index }),
            Ok(_) => Err(LeaseError::Unknown),
            Err(error) => Err(error),
        };
        let length = object
            .as_ref()
            .map_or(10, |id| self.objects[id].slot.length);
        let bytes = bytes_of(seed, length - u64::from(cut));
        let result = self
            .cache
            .write(actor, lease, index, &mut bytes.chunks(3000));
        match object {
            Err(error) => assert_eq!(result, Err(error)),
            Ok(id) => {
                assert_eq!(result.is_err(), cut);
                self.objects.get_mut(&id).unwrap().seed = (!cut).then_some(seed);
                if let Held::Write {
                    objects,
                    through_engine,
                } = self.edit(lease)
                    && !std::mem::replace(through_engine, true)
                {
                    // What a worker wrote into the others does not count any more.
                    for (_, other) in objects.clone() {
                        if other != id {
                            self.objects.get_mut(&other).unwrap().seed = None;
                        }
                    }
                }
            }
        }
    }

    fn commit(&mut self, actor: OwnerId, lease: LeaseId) {
        let verdict = match self.verdict(actor, lease) {
            Ok(Lease {
                held: Held::Write { objects, .. },
                ..
            }) => Ok(objects.clone()),
            Ok(_) => Err(LeaseError::Unknown),
            Err(error) => Err(error),
        };
        let result = self.cache.commit(actor, lease);
        match verdict {
            Err(error) => assert_eq!(result, Err(error)),
            Ok(objects) => {
                let committed = result.unwrap();
                let written = objects
                    .iter()
                    .filter(|(_, id)| self.objects[id].seed.is_some());
                let written: Vec<u64> = written.map(|&(_, id)| id).collect();
                assert_eq!(committed.admitted, written.len());
                assert_eq!(committed.discarded, objects.len() - written.len());
                if let Held::Write { objects, .. } = self.edit(lease) {
                    objects.retain(|(_, id)| !written.contains(id));
                }
                for id in written {
                    self.objects.get_mut(&id).unwrap().state = State::Readable;
                }
                self.close(lease, false);
            }
        }
    }

    fn abort(&mut self, actor: OwnerId, lease: LeaseId) {
        let verdict = match self.verdict(actor, lease) {
            Ok(Lease {
                held: Held::Write { objects, .. },
                ..
            }) => Ok(objects.len()),
            Ok(_) => Err(LeaseError::Unknown),
            Err(error) => Err(error),
        };
        let result = self.cache.abort(actor, lease);
        match verdict {
            Err(error) => assert_eq!(result, Err(error)),
            Ok(count) => {
                assert_eq!(result, Ok(count));
                self.close(lease, false);
            }
        }
    }

    fn lookup(&mut self, owner: OwnerId, rows: &[Vec<u32>], readers: u32) {
        let row_keys: Vec<_> = rows.iter().map(|row| keys(row.iter().copied())).collect();
        let found = self.cache.lock_prefix(owner, &row_keys, readers);
        let hit = |row: &Vec<u32>| {
            let readable = |&&chunk: &&u32| self.find(chunk).is_some_and(|id| self.is_readable(id));
            row.iter().take_while(readable).count()
        };
        let mut hits = rows.iter().map(hit).min().unwrap();
        if !self.owners.contains(&owner) {
            hits = 0;
        }
        assert_eq!(found.hit_chunks, hits);
        assert_eq!(found.lease.is_some(), hits > 0);
        let Some(lease) = found.lease else { return };
        let of_row = |row: &Vec<u32>| {
            row[..hits]
                .iter()
                .map(|&chunk| self.find(chunk).unwrap())
                .collect()
        };
        let objects: Vec<Vec<u64>> = rows.iter().map(of_row).collect();
        let left = vec![vec![readers; hits]; rows.len()];
        self.file(lease, owner, READ_TTL, Held::Lookup { objects, left });
    }

    fn release(
        &mut self,
        actor: OwnerId,
        lease: LeaseId,
        chunks: std::ops::Range<usize>,
        readers: u32,
    ) {
        let is_theirs = self.verdict(actor, lease).is_ok();
        let result = self
            .cache
            .release_prefix(actor, lease, chunks.clone(), readers);
        let mut released = 0;
        if is_theirs && let Held::Lookup { left, .. } = self.edit(lease) {
            for row in left {
                for (chunk, left) in row.iter_mut().enumerate() {
                    if chunks.contains(&chunk) {
                        let count = readers.min(*left);
                        *left -= count;
                        released += count;
                    }
                }
            }
        }
        self.sweep();
        assert_eq!(result as u32, released);
    }

    fn begin_read(
        &mut self,
        actor: OwnerId,
        lease: LeaseId,
        reader: OwnerId,
        row: usize,
        chunks: std::ops::Range<usize>,
    ) {
        let result = self
            .cache
            .begin_read(actor, lease, reader, row, chunks.clone());
        let mut expected = None;
        if let Ok(Lease {
            held: Held::Lookup { objects, left },
            ..
        }) = self.verdict(actor, lease)
            && self.owners.contains(&reader)
            && row < objects.len()
            && chunks.start < chunks.end
            && chunks.end <= objects[row].len()
            && left[row][chunks.clone()].iter().all(|&left| left > 0)
        {
            let ids = objects[row][chunks.clone()].to_vec();
            if ids.iter().all(|&id| self.is_readable(id)) {
                expected = Some(ids);
            }
        }
        match (result, expected) {
            (None, None) => {}
            (Some(read), Some(objects)) => {
                let slots: Vec<Slot> = objects.iter().map(|id| self.objects[id].slot).collect();
                assert_eq!(read.slots, slots);
                if let Held::Lookup { left, .. } = self.edit(lease) {
                    left[row][chunks].iter_mut().for_each(|left| *left -= 1);
                }
                self.file(read.lease, reader, READ_TTL, Held::Read { objects });
                self.sweep();
            }
            (result, expected) => panic!("{result:?} instead of {expected:?}"),
        }
    }

    fn read(&mut self, actor: OwnerId, lease: LeaseId, index: usize) {
        let verdict = match self.verdict(actor, lease) {
            Ok(Lease {
                held: Held::Read { objects },
                ..
            }) => objects
                .get(index)
                .copied()
                .ok_or(LeaseError::NoSuchIndex { index }),
            Ok(_) => Err(LeaseError::Unknown),
            Err(error) => Err(error),
        };
        let mut out = Vec::new();
        let result = self.cache.read(actor, lease, index, &mut out);
        match verdict {
            Ok(id) => {
                result.unwrap();
                let object = &self.objects[&id];
                assert!(
                    out == bytes_of(object.seed.unwrap(), object.slot.length),
                    "wrong bytes"
                );
            }
            Err(error) => {
                assert_eq!(result, Err(ReadError::Lease(error)));
                assert!(out.is_empty());
            }
        }
    }

    fn finish_read(&mut self, actor: OwnerId, lease: LeaseId) {
        let is_read = self
            .verdict(actor, lease)
            .is_ok_and(|lease| matches!(lease.held, Held::Read { .. }));
        assert_eq!(self.cache.finish_read(actor, lease), is_read);
        if is_read {
            self.close(lease, false);
        }
    }

    fn clear(&mut self, force: bool) {
        let ids: Vec<u64> = self.objects.keys().copied().collect();
        let goes = |&&id: &&u64| self.is_readable(id) && (force || self.locks(id) == 0);
        let removed = ids.iter().filter(goes).count();
        let kept = ids
            .iter()
            .filter(|id| self.objects[id].state != State::Withdrawn)
            .count();
        let cleared = self.cache.clear(force);
        assert_eq!((cleared.removed, cleared.kept), (removed, kept - removed));
        assert_eq!(self.take_removals(RemoveReason::Cleared).len(), removed);
    }

    fn advance(&mut self, by: Duration) {
        self.cache.clock.advance(by);
        self.now += by;
        let now = self.now;
        let due: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.as_ref().is_ok_and(|lease| lease.until <= now))
            .map(|&(id, _)| id)
            .collect();
        for id in due {
            self.close(id, true);
        }
    }

    fn used_pages(&self) -> u64 {
        let pages = self
            .objects
            .values()
            .map(|object| Self::pages_of(object.slot.length));
        pages.sum()
    }

    fn maintain(&mut self) {
        let used = self.used_pages();
        self.cache.maintain();
        let gone = self.take_removals(RemoveReason::Evicted);
        let freed: u64 = gone
            .iter()
            .map(|object| Self::pages_of(object.slot.length))
            .sum();
        if (used as f64) < 0.7 * PAGES as f64 {
            assert_eq!(freed, 0);
            return;
        }
        let wanted = (used as f64 * 0.3).ceil() as u64;
        let could_more = self.objects.keys().any(|&id| self.may_go(id));
        assert!(freed >= wanted || !could_more, "freed {freed} of {wanted}");
        let last = gone
            .last()
            .map_or(0, |object| Self::pages_of(object.slot.length));
        assert!(freed - last < wanted, "went on after enough was free");
    }

    fn agree(&self) {
        self.cache.check_invariants().unwrap();
        assert!(
            self.removals.0.lock().is_empty(),
            "something went that should not"
        );
        let status = self.cache.status();
        let count = |state: State| {
            let all = self.objects.values();
            all.filter(|object| object.state == state).count()
        };
        assert_eq!(status.readable_objects, count(State::Readable));
        assert_eq!(status.reserved_objects, count(State::Reserved));
        assert_eq!(status.withdrawn_objects, count(State::Withdrawn));
        assert_eq!(status.used_bytes, self.used_pages() * PAGE);
        let locks: u32 = self.objects.keys().map(|&id| self.locks(id)).sum();
        assert_eq!(status.object_locks, u64::from(locks));
        assert_eq!(status.owned_locks, u64::from(locks));
        assert_eq!(status.leases, self.live().count());
        assert_eq!(status.owners, self.owners.len());
        assert_eq!(status.corrupt_objects, 0);
    }
}

/// Operations to try: a few thousand, or as many as `STOCKADE_MODEL_OPS` says.
fn wanted_operations() -> usize {
    let asked = std::env::var("STOCKADE_MODEL_OPS").ok();
    asked.map_or(15_000, |text| text.parse().unwrap())
}

/// One life of an engine; both must agree after each operation.
fn live(is_shared: bool, policy: PolicyKind, ops: &[Op]) {
    let mut model = Model::new(is_shared, policy);
    for op in ops {
        model.apply(op);
        model.agree();
    }
    for owner in model.owners.clone() {
        model.end_owner(owner);
    }
    model.agree();
    model.clear(false);
    assert_eq!(model.cache.status().used_bytes, 0);
}

#[test]
fn the_engine_agrees_with_the_model() {
    let wanted = wanted_operations();
    let done = AtomicUsize::new(0);
    let lives = (
        any::<bool>(),
        prop::sample::select(&PolicyKind::ALL[..4]),
        prop::collection::vec(op(), 1..120),
    );
    while done.load(Ordering::Relaxed) < wanted {
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 64,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let result = runner.run(&lives, |(is_shared, policy, ops)| {
            live(is_shared, policy, &ops);
            done.fetch_add(ops.len(), Ordering::Relaxed);
            Ok(())
        });
        if let Err(failure) = result {
            panic!("{failure}");
        }
    }
}
