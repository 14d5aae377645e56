//! Adaptive replacement: a balance between recent and frequent use that learns from what
//! comes back.
//!
//! Follows LMCache's `v1/distributed/eviction_policy/arc.py` as its L1 drives it:
//! * resident entries are in T1 (seen once) or T2 (touched since); evicted ones leave a
//!   ghost in B1 or B2;
//! * an entry that comes back while its ghost is in B1 raises T1's target, from B2 lowers
//!   it, and either way it starts in T1 again, because its store is not yet a use;
//! * a victim comes from T1 while T1 is at or above its target, otherwise from T2;
//! * the capacity is the largest number of residents seen, since the pool is in bytes;
//! * entries removed for other reasons leave no ghost.

use std::collections::HashMap;

use super::order::{Links, List, Notes, Pair, Side};
use super::{EntryFacts, EntryId, EvictionPolicy};

const T1: Side = Side::First;
const T2: Side = Side::Second;

#[derive(Debug)]
struct Note {
    fingerprint: u64,
    /// T1 or T2, also while the entry is taken or parked.
    list: Side,
}

/// Keys that were evicted from one list, oldest first; bounded by the policy's trimming.
#[derive(Debug)]
struct Ghosts {
    links: Links,
    order: List,
    /// Fingerprint of each ghost, by its place in `links`.
    fingerprints: Notes<u64>,
    places: HashMap<u64, u32>,
    free: Vec<u32>,
}

impl Default for Ghosts {
    fn default() -> Self {
        Self {
            links: Links::default(),
            order: List::new(0),
            fingerprints: Notes::default(),
            places: HashMap::new(),
            free: Vec::new(),
        }
    }
}

impl Ghosts {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn push(&mut self, fingerprint: u64) {
        self.forget(fingerprint);
        let next = u32::try_from(self.fingerprints.len()).unwrap_or(u32::MAX - 1);
        let place = self.free.pop().unwrap_or(next);
        self.fingerprints.insert(place, fingerprint);
        self.places.insert(fingerprint, place);
        self.order.push_back(&mut self.links, place);
    }

    fn contains(&self, fingerprint: u64) -> bool {
        self.places.contains_key(&fingerprint)
    }

    fn forget(&mut self, fingerprint: u64) {
        if let Some(place) = self.places.remove(&fingerprint) {
            self.order.remove(&mut self.links, place);
            self.fingerprints.remove(place);
            self.free.push(place);
        }
    }

    fn pop_oldest(&mut self) {
        if let Some(place) = self.order.pop_front(&mut self.links) {
            if let Some(fingerprint) = self.fingerprints.remove(place) {
                self.places.remove(&fingerprint);
            }
            self.free.push(place);
        }
    }
}

/// Two resident lists, two ghost lists and the target size that moves between them.
#[derive(Debug, Default)]
pub struct Arc {
    residents: Pair,
    known: Notes<Note>,
    b1: Ghosts,
    b2: Ghosts,
    target_t1: f64,
    capacity: usize,
}

impl Arc {
    /// How far one ghost hit moves the target: more the rarer the list that was hit.
    fn step(hit: &Ghosts, other: &Ghosts) -> f64 {
        (other.len() as f64 / hit.len() as f64).max(1.0)
    }

    fn trim_ghosts(&mut self) {
        while self.residents.len(T1) + self.b1.len() > self.capacity && self.b1.len() > 0 {
            self.b1.pop_oldest();
        }
        while self.known.len() + self.b1.len() + self.b2.len() > 2 * self.capacity {
            if self.b2.len() > 0 {
                self.b2.pop_oldest();
            } else if self.b1.len() > 0 {
                self.b1.pop_oldest();
            } else {
                break;
            }
        }
    }
}

impl EvictionPolicy for Arc {
    fn insert(&mut self, id: EntryId, facts: EntryFacts) {
        self.remove(id);
        let fingerprint = facts.fingerprint;
        if self.b1.contains(fingerprint) {
            let raised = self.target_t1 + Self::step(&self.b1, &self.b2);
            self.target_t1 = raised.min(self.capacity as f64);
            self.b1.forget(fingerprint);
        } else if self.b2.contains(fingerprint) {
            let lowered = self.target_t1 - Self::step(&self.b2, &self.b1);
            self.target_t1 = lowered.max(0.0);
            self.b2.forget(fingerprint);
        }
        let list = T1;
        self.known.insert(id, Note { fingerprint, list });
        self.residents.push_back(T1, id);
        self.capacity = self.capacity.max(self.known.len());
        self.trim_ghosts();
    }

    fn touch(&mut self, id: EntryId) {
        let Some(note) = self.known.get_mut(id) else {
            return;
        };
        note.list = T2;
        self.residents.push_back(T2, id);
    }

    fn take(&mut self) -> Option<EntryId> {
        // The target is cut to whole entries, as in LMCache.
        let from_t1 = self.residents.len(T1) >= self.target_t1 as usize;
        let (first, second) = if from_t1 { (T1, T2) } else { (T2, T1) };
        let victim = self.residents.pop_front(first);
        victim.or_else(|| self.residents.pop_front(second))
    }

    fn park(&mut self, _id: EntryId) {}

    fn restore(&mut self, id: EntryId) {
        if let Some(note) = self.known.get(id) {
            self.residents.restore(note.list, id);
        }
    }

    fn evicted(&mut self, id: EntryId) {
        let Some(note) = self.known.remove(id) else {
            return;
        };
        self.residents.unlink(id);
        match note.list {
            T1 => self.b1.push(note.fingerprint),
            _ => self.b2.push(note.fingerprint),
        }
        self.trim_ghosts();
    }

    fn remove(&mut self, id: EntryId) {
        let Some(note) = self.known.remove(id) else {
            return;
        };
        self.residents.unlink(id);
        self.b1.forget(note.fingerprint);
        self.b2.forget(note.fingerprint);
        self.trim_ghosts();
    }

    fn len(&self) -> usize {
        self.known.len()
    }
}
