//! Which object goes first when room is needed.
//!
//! A policy only orders objects. It knows nothing of locks, leases or free memory: the
//! core asks for the next victim, decides whether it may go, and tells the policy what
//! became of it.

pub mod arc;
pub mod isolated_lru;
pub mod lru;
pub mod noop;
mod order;
mod ranker;
pub mod s3_fifo;

pub use ranker::{Candidate, Ranker};

use std::fmt;
use std::str::FromStr;

/// A small dense number that stands for one object while the core holds it. The core may
/// give the number to another object once the policy was told of the end of the first.
pub type EntryId = u32;

/// What a policy may know of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryFacts {
    /// A hash of the object's key, by which it is recognised when it comes back.
    pub fingerprint: u64,
    /// Stands for the cache salt; equal for objects of one salt.
    pub salt: u32,
    /// The object's share of the pool, in bytes.
    pub weight: u64,
}

/// Orders objects by how well they can be spared.
///
/// The core calls, for each object: [`insert`](Self::insert) once; any number of
/// [`touch`](Self::touch) and [`session_ended`](Self::session_ended); and whenever room is needed [`take`](Self::take), which must be
/// answered before the next call on that object by exactly one of
/// [`evicted`](Self::evicted) (it is gone), [`park`](Self::park) (it is in use) or
/// [`restore`](Self::restore) (it was not needed after all). [`remove`](Self::remove) ends
/// an object from any state. Every call must be constant or logarithmic in time, so that a
/// victim costs no scan; calls with unknown ids must do nothing.
pub trait EvictionPolicy: Send {
    /// A new object, read or written just now.
    fn insert(&mut self, id: EntryId, facts: EntryFacts);

    /// The object was asked for. A parked object goes back into the order.
    fn touch(&mut self, id: EntryId);

    /// The session that asked for the object, or stored it, has ended. As in LMCache this
    /// makes it the most recent one again; a policy that counts uses must not count it,
    /// because every object that is stored has such an end.
    fn session_ended(&mut self, id: EntryId) {
        self.touch(id);
    }

    /// Takes the object that can best be spared out of the order.
    fn take(&mut self) -> Option<EntryId>;

    /// The object just taken cannot go now. It stays out of the order, so that it is not
    /// met again and again, until it is restored or touched.
    fn park(&mut self, id: EntryId);

    /// Puts an object that was taken or parked back as the next to be taken. Does nothing
    /// if it is in the order. Undoing several `take`s goes in reverse.
    fn restore(&mut self, id: EntryId);

    /// The object (the one just taken, or one in the order whose place was needed) has been
    /// evicted; policies with a memory remember it.
    fn evicted(&mut self, id: EntryId);

    /// The object is gone for another reason, and forgotten.
    fn remove(&mut self, id: EntryId);

    /// Objects known, in the order or parked.
    fn len(&self) -> usize;

    /// Whether no object is known.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The policies that can be chosen. Names are LMCache's where it has the policy
/// (`v1/distributed/eviction_policy/factory.py`) and are matched exactly, as there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// Least recently used first.
    Lru,
    /// Adaptive between recent and frequent use.
    Arc,
    /// Least recently used first, within the salt that holds most.
    IsolatedLru,
    /// Three queues; one-time objects go first. Not in LMCache.
    S3Fifo,
    /// Never evicts.
    Noop,
}

impl PolicyKind {
    /// All policies, in the order in which help texts name them.
    pub const ALL: [Self; 5] = [
        Self::Lru,
        Self::Arc,
        Self::IsolatedLru,
        Self::S3Fifo,
        Self::Noop,
    ];

    /// The name used in flags and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "LRU",
            Self::Arc => "ARC",
            Self::IsolatedLru => "IsolatedLRU",
            Self::S3Fifo => "S3FIFO",
            Self::Noop => "noop",
        }
    }

    /// A fresh policy of this kind.
    pub fn build(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Lru => Box::<lru::Lru>::default(),
            Self::Arc => Box::<arc::Arc>::default(),
            Self::IsolatedLru => Box::<isolated_lru::IsolatedLru>::default(),
            Self::S3Fifo => Box::<s3_fifo::S3Fifo>::default(),
            Self::Noop => Box::<noop::Noop>::default(),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no eviction policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("eviction policy `{0}` is unknown: use LRU, ARC, IsolatedLRU, S3FIFO or noop")]
pub struct UnknownPolicy(String);

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| UnknownPolicy(text.to_owned()))
    }
}
#[cfg(test)]
mod tests;
