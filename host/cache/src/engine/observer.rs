//! Who is told what happens in the cache.

use std::sync::Arc;

use crate::key::ObjectKey;

/// Why an object is no longer found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemoveReason {
    /// Its room was needed.
    Evicted,
    /// Somebody cleared the cache.
    Cleared,
    /// Its bytes were not those that were committed, or were cut off.
    Corrupt,
    /// It was only to stay until its readers were done.
    Released,
}

/// Is told of changes in the order in which they happened, from one thread at a time and
/// never under the engine's mutex, so it may call the engine.
///
/// It runs on the thread of some request, so it must be quick: put things into a channel.
/// If it falls behind, notices are dropped and counted in
/// [`EngineStatus::dropped_notices`](crate::EngineStatus::dropped_notices).
pub trait CacheObserver: Send + Sync {
    /// These objects became readable, in the order of their reservation.
    fn stored(&self, keys: &[ObjectKey]) {
        let _ = keys;
    }

    /// As [`stored`](Self::stored), which it calls, with the bytes of each object and the request
    /// that they were stored for.
    fn stored_for(&self, keys: &[ObjectKey], object_bytes: u64, request: Option<&Arc<str>>) {
        let _ = (object_bytes, request);
        self.stored(keys);
    }

    /// As [`removed`](Self::removed), which it calls, with the bytes of each object.
    fn removed_with(&self, keys: &[ObjectKey], bytes: &[u64], reason: RemoveReason) {
        let _ = bytes;
        self.removed(keys, reason);
    }

    /// These objects are not found any more.
    fn removed(&self, keys: &[ObjectKey], reason: RemoveReason) {
        let _ = (keys, reason);
    }

    /// A reservation found no room; all sizes in bytes.
    fn allocation_failed(&self, needed_bytes: u64, free_bytes: u64, evictable_bytes: u64) {
        let _ = (needed_bytes, free_bytes, evictable_bytes);
    }
}
