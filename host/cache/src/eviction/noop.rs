//! Never evicts: for a pool that something else empties.
//! Follows LMCache's `v1/distributed/eviction_policy/noop.py`.

use super::{EntryFacts, EntryId, EvictionPolicy};

/// Keeps no order and offers no victim, so it also tracks no object.
#[derive(Debug, Default)]
pub struct Noop;

impl EvictionPolicy for Noop {
    fn insert(&mut self, _id: EntryId, _facts: EntryFacts) {}
    fn touch(&mut self, _id: EntryId) {}
    fn take(&mut self) -> Option<EntryId> {
        None
    }
    fn park(&mut self, _id: EntryId) {}
    fn restore(&mut self, _id: EntryId) {}
    fn evicted(&mut self, _id: EntryId) {}
    fn remove(&mut self, _id: EntryId) {}
    fn len(&self) -> usize {
        0
    }
}
