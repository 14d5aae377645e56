//! S3-FIFO: three queues that let one-time objects pass through quickly.
//!
//! After Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023): new
//! entries pass a small queue of about a tenth of the cache; those touched there move to
//! the main queue, the others leave and are remembered in a ghost queue; an entry that
//! comes back while remembered starts in the main queue. A touch only raises a counter.
//! Not in LMCache.

use std::collections::{HashMap, VecDeque};

use super::order::{Notes, Pair, Side};
use super::{EntryFacts, EntryId, EvictionPolicy};

const SMALL: Side = Side::First;
const MAIN: Side = Side::Second;

/// Touches beyond this number do not count, so that an old favourite can still leave.
const MAX_USES: u8 = 3;

/// The small queue gives way while it holds more than one entry in this many.
const SMALL_SHARE: usize = 10;

/// Entries spared for their uses in one search for a victim. Where everything has been
/// used, one search would otherwise go round the whole cache while requests wait.
const MAX_SPARED: u32 = 256;

#[derive(Debug)]
struct Note {
    fingerprint: u64,
    queue: Side,
    uses: u8,
}

/// The small, main and ghost queues.
#[derive(Debug, Default)]
pub struct S3Fifo {
    residents: Pair,
    known: Notes<Note>,
    /// (fingerprint, generation), oldest first; an entry counts only while the map agrees.
    ghost_order: VecDeque<(u64, u64)>,
    ghosts: HashMap<u64, u64>,
    ghost_generation: u64,
}

impl S3Fifo {
    fn remember(&mut self, fingerprint: u64) {
        self.ghost_generation += 1;
        self.ghosts.insert(fingerprint, self.ghost_generation);
        self.ghost_order
            .push_back((fingerprint, self.ghost_generation));
        // As many ghosts as residents; superseded ones leave the queue like the others.
        while self.ghost_order.len() > self.known.len().max(1) {
            if let Some((oldest, generation)) = self.ghost_order.pop_front()
                && self.ghosts.get(&oldest) == Some(&generation)
            {
                self.ghosts.remove(&oldest);
            }
        }
    }

    /// Takes from the small queue, moving on what was used there.
    fn take_small(&mut self) -> Option<EntryId> {
        for spared in 0.. {
            let id = self.residents.pop_front(SMALL)?;
            match self.known.get_mut(id) {
                Some(note) if note.uses > 0 && spared < MAX_SPARED => {
                    note.uses = 0;
                    note.queue = MAIN;
                    self.residents.push_back(MAIN, id);
                }
                _ => return Some(id),
            }
        }
        None
    }

    /// Takes from the main queue; what was used goes round once more for each use.
    fn take_main(&mut self) -> Option<EntryId> {
        for spared in 0.. {
            let id = self.residents.pop_front(MAIN)?;
            match self.known.get_mut(id) {
                Some(note) if note.uses > 0 && spared < MAX_SPARED => {
                    note.uses -= 1;
                    self.residents.push_back(MAIN, id);
                }
                _ => return Some(id),
            }
        }
        None
    }
}

impl EvictionPolicy for S3Fifo {
    fn insert(&mut self, id: EntryId, facts: EntryFacts) {
        self.remove(id);
        let fingerprint = facts.fingerprint;
        let known_before = self.ghosts.remove(&fingerprint).is_some();
        let queue = if known_before { MAIN } else { SMALL };
        self.known.insert(
            id,
            Note {
                fingerprint,
                queue,
                uses: 0,
            },
        );
        self.residents.push_back(queue, id);
    }

    fn touch(&mut self, id: EntryId) {
        if let Some(note) = self.known.get_mut(id) {
            note.uses = (note.uses + 1).min(MAX_USES);
            self.restore(id);
        }
    }

    fn session_ended(&mut self, id: EntryId) {
        self.restore(id);
    }

    fn take(&mut self) -> Option<EntryId> {
        let small = self.residents.len(SMALL);
        if small * SMALL_SHARE > small + self.residents.len(MAIN) {
            self.take_small().or_else(|| self.take_main())
        } else {
            self.take_main().or_else(|| self.take_small())
        }
    }

    fn park(&mut self, _id: EntryId) {}

    fn restore(&mut self, id: EntryId) {
        if let Some(note) = self.known.get(id) {
            self.residents.restore(note.queue, id);
        }
    }

    fn evicted(&mut self, id: EntryId) {
        self.residents.unlink(id);
        if let Some(note) = self.known.remove(id)
            && note.queue == SMALL
        {
            self.remember(note.fingerprint);
        }
    }

    fn remove(&mut self, id: EntryId) {
        self.residents.unlink(id);
        self.known.remove(id);
    }

    fn len(&self) -> usize {
        self.known.len()
    }
}
