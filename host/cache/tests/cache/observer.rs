//! What the observer hears.

use std::sync::Arc;

use parking_lot::Mutex;
use stockade_cache::{CacheEngine, CacheObserver, ObjectKey, RemoveReason};

use crate::fixture::*;

/// Writes down what it hears as one line each.
#[derive(Default)]
struct Diary {
    lines: Mutex<Vec<String>>,
    engine: Mutex<Option<std::sync::Weak<CacheEngine>>>,
}

fn chunks(keys: &[ObjectKey]) -> String {
    let first = |key: &ObjectKey| u32::from_be_bytes(key.chunk_hash.0[..4].try_into().unwrap());
    let numbers: Vec<_> = keys.iter().map(|key| first(key).to_string()).collect();
    numbers.join(" ")
}

impl CacheObserver for Diary {
    fn stored(&self, keys: &[ObjectKey]) {
        self.lines.lock().push(format!("stored {}", chunks(keys)));
        let engine = self
            .engine
            .lock()
            .as_ref()
            .and_then(std::sync::Weak::upgrade);
        if let Some(engine) = engine {
            // Calling back must not deadlock, and what comes of it is told in its turn.
            engine.clear(false);
        }
    }

    fn removed(&self, keys: &[ObjectKey], reason: RemoveReason) {
        self.lines
            .lock()
            .push(format!("removed {} {reason:?}", chunks(keys)));
    }

    fn allocation_failed(&self, needed: u64, free: u64, evictable: u64) {
        let pages = [needed, free, evictable].map(|bytes| bytes / PAGE);
        self.lines.lock().push(format!("failed {pages:?}"));
    }
}

impl Diary {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock())
    }
}

#[test]
fn changes_are_told_in_order_with_their_reason() {
    let cache = shared(4);
    cache.store(&keys(90..91), 0);
    let diary = Arc::new(Diary::default());
    cache.set_observer(Arc::clone(&diary) as _);
    cache.store(&keys(0..3), 0);
    assert_eq!(diary.take(), ["stored 0 1 2"]);

    cache.store(&keys(3..5), 0);
    assert_eq!(diary.take(), ["removed 90 2 Evicted", "stored 3 4"]);

    let owner = cache.new_owner();
    cache.lock_prefix(owner, &[keys(0..2)], 1);
    assert!(cache.reserve(owner, &keys(10..13), OBJECT).is_err());
    assert_eq!(diary.take(), ["failed [3, 0, 2]"]);

    let (lease, _) = cache.reserve_all(owner, &keys(10..11));
    assert_eq!(diary.take(), ["removed 4 Evicted"]);
    cache.abort(owner, lease).unwrap();
    assert_eq!(
        diary.take(),
        [""; 0],
        "what was never readable is never told of"
    );

    cache.clear(false);
    cache.clear(true);
    assert_eq!(diary.take(), ["removed 3 Cleared", "removed 0 1 Cleared"]);
    cache.store(&keys(20..21), 0);
    cache.segment_file().set_len(0).unwrap();
    cache.maintain();
    assert_eq!(diary.take(), ["stored 20", "removed 20 Corrupt"]);
}

#[test]
fn an_observer_may_call_the_engine() {
    let engine = CacheEngine::open(config(4, stockade_cache::Backing::Private)).unwrap();
    let engine = Arc::new(engine);
    let diary = Arc::new(Diary::default());
    *diary.engine.lock() = Some(Arc::downgrade(&engine));
    engine.set_observer(Arc::clone(&diary) as _);
    let owner = engine.new_owner();
    let reservation = engine.reserve(owner, &keys(0..2), OBJECT).unwrap();
    let lease = reservation.lease.unwrap();
    let bytes = bytes_of(0, OBJECT);
    for index in 0..2 {
        engine
            .write(owner, lease, index, &mut [&bytes[..]].into_iter())
            .unwrap();
    }
    engine.commit(owner, lease).unwrap();
    assert_eq!(diary.take(), ["stored 0 1", "removed 0 1 Cleared"]);
}
