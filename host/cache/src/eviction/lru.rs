//! Least recently used first.
//!
//! Follows LMCache's `v1/distributed/eviction_policy/lru.py`. That a later chunk of a
//! prefix goes before an earlier one is the caller's doing: it inserts and touches the
//! chunks of a request from the last to the first.

use super::order::{Links, List, Notes};
use super::{EntryFacts, EntryId, EvictionPolicy};

/// One list from the entry touched longest ago to the one touched last.
#[derive(Debug)]
pub struct Lru {
    links: Links,
    order: List,
    known: Notes<()>,
}

impl Default for Lru {
    fn default() -> Self {
        Self {
            links: Links::default(),
            order: List::new(0),
            known: Notes::default(),
        }
    }
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, id: EntryId, _facts: EntryFacts) {
        self.known.insert(id, ());
        self.touch(id);
    }

    fn touch(&mut self, id: EntryId) {
        if self.known.get(id).is_some() {
            self.order.remove(&mut self.links, id);
            self.order.push_back(&mut self.links, id);
        }
    }

    fn take(&mut self) -> Option<EntryId> {
        self.order.pop_front(&mut self.links)
    }

    fn park(&mut self, _id: EntryId) {}

    fn restore(&mut self, id: EntryId) {
        if self.known.get(id).is_some() && !self.order.contains(&self.links, id) {
            self.order.push_front(&mut self.links, id);
        }
    }

    fn evicted(&mut self, id: EntryId) {
        self.remove(id);
    }

    fn remove(&mut self, id: EntryId) {
        self.known.remove(id);
        self.order.remove(&mut self.links, id);
    }

    fn len(&self) -> usize {
        self.known.len()
    }
}
