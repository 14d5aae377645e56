//! Several observers of the engine, which has room for one.

use std::sync::Arc;

use stockade_cache::{CacheObserver, ObjectKey, RemoveReason};

/// Tells all of them, in this order.
pub(super) struct Observers(pub(super) Vec<Arc<dyn CacheObserver>>);

impl CacheObserver for Observers {
    fn stored_for(&self, keys: &[ObjectKey], object_bytes: u64, request: Option<&Arc<str>>) {
        for observer in &self.0 {
            observer.stored_for(keys, object_bytes, request);
        }
    }

    fn removed_with(&self, keys: &[ObjectKey], bytes: &[u64], reason: RemoveReason) {
        for observer in &self.0 {
            observer.removed_with(keys, bytes, reason);
        }
    }

    fn allocation_failed(&self, needed_bytes: u64, free_bytes: u64, evictable_bytes: u64) {
        for observer in &self.0 {
            observer.allocation_failed(needed_bytes, free_bytes, evictable_bytes);
        }
    }
}
