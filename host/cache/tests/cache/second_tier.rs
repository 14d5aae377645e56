//! What a second tier needs of the cache: copies of committed objects, objects that one request
//! needs, and lookups that grow.

use std::sync::{Arc, Mutex};

use stockade_cache::{CacheObserver, ObjectKey, RemoveReason};

use crate::fixture::*;

#[test]
fn a_copy_is_no_use_and_a_corrupt_object_is_not_copied() {
    let cache = private(2);
    cache.store(&keys(0..2), 0);
    let mut out = b"before".to_vec();
    assert!(cache.copy_committed(&keys([0])[0], &mut out).unwrap());
    assert_eq!(out, [b"before".to_vec(), bytes_of(0, OBJECT)].concat());
    assert!(!cache.copy_committed(&keys([7])[0], &mut out).unwrap());
    // A store tells which one is the oldest: still chunk 1, the later one of its prefix.
    cache.store(&keys([9]), 9);
    assert_eq!(cache.readable(&keys([0, 1, 9])), [true, false, true]);

    let owner = cache.new_owner();
    let reserved = cache.reserve(owner, &keys([5]), OBJECT).unwrap();
    assert!(
        !cache.copy_committed(&keys([5])[0], &mut out).unwrap(),
        "a reserved object is not committed"
    );
    cache.abort(owner, reserved.lease.unwrap()).unwrap();
    cache.check_invariants().unwrap();
}

#[test]
fn a_lookup_grows_in_one_step() {
    let cache = private(8);
    cache.store(&keys(0..2), 0);
    let owner = cache.new_owner();
    let rows = [keys(0..4)];
    let old = cache.lock_prefix(owner, &rows, 2);
    assert_eq!(old.hit_chunks, 2);
    cache.store(&keys(2..4), 2);
    let grown = cache.renew_prefix(owner, old.lease, &rows, 2);
    assert_eq!(grown.hit_chunks, 4);
    assert_eq!(cache.status().object_locks, 8);
    assert_eq!(cache.release_prefix(owner, old.lease.unwrap(), 0..4, 1), 0);
    assert_eq!(
        cache.release_prefix(owner, grown.lease.unwrap(), 0..4, 2),
        8
    );
    cache.check_invariants().unwrap();
}

#[derive(Default)]
struct Removed(Mutex<Vec<(ObjectKey, RemoveReason)>>);

impl CacheObserver for Removed {
    fn removed(&self, keys: &[ObjectKey], reason: RemoveReason) {
        let mut removed = self.0.lock().unwrap();
        removed.extend(keys.iter().map(|key| (key.clone(), reason)));
    }
}

#[test]
fn a_temporary_object_goes_with_its_last_lock_and_not_before() {
    let cache = private(8);
    let removed = Arc::new(Removed::default());
    cache.set_observer(Arc::clone(&removed) as _);
    let loader = cache.new_owner();
    let key = keys([0]);
    let lease = cache.reserve(loader, &key, OBJECT).unwrap().lease.unwrap();
    cache
        .write(
            loader,
            lease,
            0,
            &mut [&bytes_of(0, OBJECT)[..]].into_iter(),
        )
        .unwrap();
    assert_eq!(cache.commit_temporary(loader, lease).unwrap().admitted, 1);
    // Neither a copy nor a store beside it is its end.
    cache.copy_committed(&key[0], &mut Vec::new()).unwrap();
    let beside = cache.reserve(loader, &keys([0, 1]), OBJECT).unwrap();
    assert_eq!(beside.slots.len(), 1);
    assert_eq!(cache.readable(&key), [true]);

    let (first, second) = (cache.new_owner(), cache.new_owner());
    let rows = [key.clone()];
    let found = cache.lock_prefix(first, &rows, 1);
    let again = cache.lock_prefix(second, &rows, 1);
    cache.release_prefix(first, found.lease.unwrap(), 0..1, 1);
    assert_eq!(
        cache.readable(&key),
        [true],
        "the second one still holds it"
    );
    let read = cache
        .begin_read(second, again.lease.unwrap(), second, 0, 0..1)
        .unwrap();
    assert!(cache.finish_read(second, read.lease));
    assert_eq!(cache.readable(&key), [false]);
    assert_eq!(
        *removed.0.lock().unwrap(),
        [(key[0].clone(), RemoveReason::Released)]
    );
    cache.check_invariants().unwrap();
}

#[test]
fn a_released_object_waits_for_its_readers() {
    let cache = private(8);
    cache.store(&keys(0..2), 0);
    let owner = cache.new_owner();
    let found = cache.lock_prefix(owner, &[keys(0..1)], 1);
    assert_eq!(cache.release(&keys([0, 1, 7])), 2);
    assert_eq!(cache.readable(&keys(0..2)), [true, false]);
    cache.release_prefix(owner, found.lease.unwrap(), 0..1, 1);
    assert_eq!(cache.readable(&keys([0])), [false]);
    assert_eq!(cache.status().used_bytes, 0);
    cache.check_invariants().unwrap();
}
