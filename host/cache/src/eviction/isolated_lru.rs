//! Least recently used first, within the cache salt that holds most.
//!
//! LMCache's policy of this name (`v1/distributed/eviction_policy/isolated_lru.py`) can
//! only be asked for victims of a named salt, and its L1 asks without one, which ends its
//! eviction thread. Here the policy finds the salt itself: every salt has an equal share
//! of the pool, so the one furthest above its share is the one with most bytes. A salt
//! that stays within its share loses nothing to one that does not.

use std::collections::BTreeSet;
use std::collections::HashMap;

use super::order::{Links, List, Notes};
use super::{EntryFacts, EntryId, EvictionPolicy};

#[derive(Debug)]
struct Bucket {
    order: List,
    /// Bytes of this salt's entries, except those taken and not yet answered for.
    bytes: u64,
    /// Entries known, in the order or not.
    entries: usize,
}

#[derive(Debug)]
struct Note {
    salt: u32,
    weight: u64,
    /// Taken: its weight is left out, so that a row of takes looks ahead.
    taken: bool,
}

/// One least-recently-used list per salt.
#[derive(Debug, Default)]
pub struct IsolatedLru {
    links: Links,
    known: Notes<Note>,
    buckets: HashMap<u32, Bucket>,
    /// (bytes, salt) of the salts that have an entry in their order.
    ranking: BTreeSet<(u64, u32)>,
}

impl IsolatedLru {
    /// Changes one bucket and keeps the ranking in step; an emptied bucket goes away.
    fn with_bucket(&mut self, salt: u32, change: impl FnOnce(&mut Bucket, &mut Links)) {
        let bucket = self.buckets.entry(salt).or_insert_with(|| Bucket {
            order: List::new(salt),
            bytes: 0,
            entries: 0,
        });
        let (ranked, bytes) = (bucket.order.len() > 0, bucket.bytes);
        change(bucket, &mut self.links);
        let now = (bucket.order.len() > 0, bucket.bytes);
        let gone = bucket.entries == 0;
        if now != (ranked, bytes) {
            if ranked {
                self.ranking.remove(&(bytes, salt));
            }
            if now.0 {
                self.ranking.insert((now.1, salt));
            }
        }
        if gone {
            self.buckets.remove(&salt);
        }
    }

    /// Ends the taken state; returns the entry's salt and the weight to count again.
    fn settle(&mut self, id: EntryId) -> Option<(u32, u64)> {
        let note = self.known.get_mut(id)?;
        let back = if std::mem::take(&mut note.taken) {
            note.weight
        } else {
            0
        };
        Some((note.salt, back))
    }
}

impl EvictionPolicy for IsolatedLru {
    fn insert(&mut self, id: EntryId, facts: EntryFacts) {
        self.remove(id);
        self.known.insert(
            id,
            Note {
                salt: facts.salt,
                weight: facts.weight,
                taken: false,
            },
        );
        self.with_bucket(facts.salt, |bucket, links| {
            bucket.entries += 1;
            bucket.bytes += facts.weight;
            bucket.order.push_back(links, id);
        });
    }

    fn touch(&mut self, id: EntryId) {
        let Some((salt, back)) = self.settle(id) else {
            return;
        };
        self.with_bucket(salt, |bucket, links| {
            bucket.bytes += back;
            bucket.order.remove(links, id);
            bucket.order.push_back(links, id);
        });
    }

    fn take(&mut self) -> Option<EntryId> {
        let &(_, salt) = self.ranking.last()?;
        let mut taken = None;
        let known = &mut self.known;
        let mut weight = 0;
        if let Some(bucket) = self.buckets.get_mut(&salt) {
            let bytes = bucket.bytes;
            self.ranking.remove(&(bytes, salt));
            taken = bucket.order.pop_front(&mut self.links);
            if let Some(note) = taken.and_then(|id| known.get_mut(id)) {
                note.taken = true;
                weight = note.weight;
            }
            bucket.bytes -= weight;
            if bucket.order.len() > 0 {
                self.ranking.insert((bucket.bytes, salt));
            }
        }
        taken
    }

    fn park(&mut self, id: EntryId) {
        if let Some((salt, back)) = self.settle(id) {
            self.with_bucket(salt, |bucket, _| bucket.bytes += back);
        }
    }

    fn restore(&mut self, id: EntryId) {
        let Some((salt, back)) = self.settle(id) else {
            return;
        };
        self.with_bucket(salt, |bucket, links| {
            bucket.bytes += back;
            if !bucket.order.contains(links, id) {
                bucket.order.push_front(links, id);
            }
        });
    }

    fn evicted(&mut self, id: EntryId) {
        self.remove(id);
    }

    fn remove(&mut self, id: EntryId) {
        let Some(note) = self.known.remove(id) else {
            return;
        };
        self.with_bucket(note.salt, |bucket, links| {
            bucket.entries -= 1;
            if !note.taken {
                bucket.bytes -= note.weight;
            }
            bucket.order.remove(links, id);
        });
    }

    fn len(&self) -> usize {
        self.known.len()
    }
}
