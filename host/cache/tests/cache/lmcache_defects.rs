//! One test for each defect of LMCache 0.5.6 that this engine must not share.

use std::time::Duration;

use stockade_cache::{LeaseError, PolicyKind};

use crate::fixture::*;

/// Unregistering or reaping a worker turned its never-written slots into readable hits,
/// so one tenant could read another's old bytes under its own salt.
#[test]
fn the_end_of_a_worker_does_not_publish_its_reservations() {
    let cache = shared(2);
    cache.store(&keys_of("tenant-a", 0, 0..2), 1);
    cache.clear(false);
    let worker = cache.new_owner();
    let prefix = keys_of("tenant-b", 0, 0..2);
    let (lease, _) = cache.reserve_all(worker, &prefix);
    assert_eq!(cache.end_owner(worker).aborted_objects, 2);
    assert_eq!(cache.hits(&prefix), 0);
    assert_eq!(cache.commit(worker, lease), Err(LeaseError::Unknown));
    assert_eq!(cache.hits(&prefix), 0);
    assert_eq!(cache.status().used_bytes, 0);
    cache.check_invariants().unwrap();
}

/// Locks were one anonymous counter per object: after a lease expired, the late release
/// of its reader took the lock of the reader that came after it.
#[test]
fn a_late_release_does_not_steal_the_lock_of_a_later_reader() {
    let cache = private(2);
    cache.store(&keys(0..1), 5);
    let (early, late) = (cache.new_owner(), cache.new_owner());
    let lookup = cache.lock_prefix(early, &[keys(0..1)], 1).lease.unwrap();
    let stale = cache
        .begin_read(early, lookup, early, 0, 0..1)
        .unwrap()
        .lease;
    cache.clock.advance(READ_TTL + Duration::from_secs(1));
    let fresh_lookup = cache.lock_prefix(late, &[keys(0..1)], 1).lease.unwrap();
    let fresh = cache
        .begin_read(late, fresh_lookup, late, 0, 0..1)
        .unwrap()
        .lease;
    assert!(!cache.finish_read(early, stale));
    assert_eq!(cache.release_prefix(early, lookup, 0..1, 128), 0);
    cache.end_owner(early);
    assert_eq!(
        cache.status().object_locks,
        1,
        "the later reader still has its lock"
    );
    // And so its object cannot be evicted under it.
    cache.store(&keys(10..11), 0);
    assert!(cache.reserve(late, &keys(20..22), OBJECT).is_err());
    let mut out = Vec::new();
    cache.read(late, fresh, 0, &mut out).unwrap();
    assert_eq!(out, bytes_of(5, OBJECT));
    cache.check_invariants().unwrap();
}

/// A second lookup under the same request replaced the first, whose locks leaked for
/// 300 s. Here both belong to the request's owner and end with it.
#[test]
fn two_lookups_of_one_request_leak_no_lock() {
    let cache = private(2);
    cache.store(&keys(0..1), 0);
    let owner = cache.new_owner();
    cache.lock_prefix(owner, &[keys(0..1)], 1);
    cache.lock_prefix(owner, &[keys(0..1)], 1);
    assert_eq!(cache.status().object_locks, 2);
    assert_eq!(cache.end_owner(owner).released_locks, 2);
    assert_eq!(cache.status().object_locks, 0);
}

/// A write could be finished, and its bytes read, after its lease had run out and its
/// memory had been handed to the next writer.
#[test]
fn a_write_is_not_readable_after_its_lease_expired() {
    let cache = shared(1);
    let (slow, next) = (cache.new_owner(), cache.new_owner());
    let (expired, slots) = cache.reserve_all(slow, &keys(0..1));
    cache.worker_write(slots[0], &bytes_of(1, OBJECT));
    cache.clock.advance(WRITE_TTL);
    assert_eq!(cache.commit(slow, expired), Err(LeaseError::Expired));
    assert_eq!(cache.hits(&keys(0..1)), 0);
    // The same slot goes to the next writer of the same key; the late commit of the first
    // does not publish the second's half-written bytes.
    let (lease, slots) = cache.reserve_all(next, &keys(0..1));
    assert_eq!(cache.commit(slow, expired), Err(LeaseError::Expired));
    assert_eq!(cache.commit(slow, lease), Err(LeaseError::NotOwner));
    assert_eq!(cache.hits(&keys(0..1)), 0);
    cache.worker_write(slots[0], &bytes_of(2, OBJECT));
    assert_eq!(cache.commit(next, lease).unwrap().admitted, 1);
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(2, OBJECT));
    cache.check_invariants().unwrap();
}

/// A store that failed between reserve and finish (wrong shape, missing chunk) left its
/// slots locked for 600 s; a correct store of the same chunk then stored nothing.
#[test]
fn a_failed_commit_leaves_no_reservation_behind() {
    let cache = private(4);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..2));
    cache.write_bytes(owner, lease, 0, &bytes_of(0, OBJECT));
    assert!(
        cache
            .write(owner, lease, 1, &mut [&b"wrong shape"[..]].into_iter())
            .is_err()
    );
    let committed = cache.commit(owner, lease).unwrap();
    assert_eq!((committed.admitted, committed.discarded), (1, 1));
    let status = cache.status();
    assert_eq!((status.reserved_objects, status.staging_bytes), (0, 0));
    // The correct store that follows does store.
    let reservation = cache.reserve(owner, &keys(0..2), OBJECT).unwrap();
    assert_eq!(reservation.slots.len(), 1);
    let lease = reservation.lease.unwrap();
    cache.write_bytes(owner, lease, 1, &bytes_of(1, OBJECT));
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 1);
    assert_eq!(cache.hits(&keys(0..2)), 2);
    // An aborted one leaves nothing either.
    let (lease, _) = cache.reserve_all(owner, &keys(8..10));
    assert_eq!(cache.abort(owner, lease), Ok(2));
    assert_eq!(cache.status().used_bytes, 2 * PAGE);
    cache.check_invariants().unwrap();
}

/// The first crossing of the watermark with IsolatedLRU ended the eviction thread.
#[test]
fn isolated_lru_evicts_at_the_watermark() {
    let cache = open(stockade_cache::EngineConfig {
        trigger_watermark: 0.8,
        eviction_ratio: 0.25,
        policy: PolicyKind::IsolatedLru,
        ..config(10, stockade_cache::Backing::Private)
    });
    cache.store(&keys_of("small", 0, 0..2), 0);
    cache.store(&keys_of("large", 0, 0..6), 0);
    cache.maintain();
    assert_eq!(cache.status().evicted_objects, 2);
    assert_eq!(
        cache.hits(&keys_of("small", 0, 0..2)),
        2,
        "the small tenant loses nothing"
    );
    assert_eq!(cache.hits(&keys_of("large", 0, 0..6)), 4);
}

/// A key that occurred twice, or a range that began below zero, got a slot that nobody
/// ever committed or freed.
#[test]
fn duplicate_keys_get_one_slot_and_bad_ranges_none() {
    let cache = private(8);
    let owner = cache.new_owner();
    let twice = keys([3, 4, 3, 4, 3]);
    let reservation = cache.reserve(owner, &twice, OBJECT).unwrap();
    let indexes: Vec<_> = reservation.slots.iter().map(|&(index, _)| index).collect();
    assert_eq!(indexes, [0, 1]);
    let lease = reservation.lease.unwrap();
    for index in indexes {
        cache.write_bytes(owner, lease, index, &bytes_of(index as u64, OBJECT));
    }
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 2);
    assert_eq!(cache.status().used_bytes, 2 * PAGE);
    // Equal keys with separate scopes are the same key.
    let other_scope = keys([3, 4]);
    assert_eq!(
        cache.reserve(owner, &other_scope, OBJECT).unwrap().lease,
        None
    );
    // A lookup that names a key twice locks it twice and gives both back.
    let found = cache.lock_prefix(owner, std::slice::from_ref(&twice), 1);
    assert_eq!((found.hit_chunks, cache.status().object_locks), (5, 5));
    let lookup = found.lease.unwrap();
    assert_eq!(
        cache.begin_read(owner, lookup, owner, 0, usize::MAX - 1..usize::MAX),
        None
    );
    assert_eq!(cache.release_prefix(owner, lookup, 0..usize::MAX, 1), 5);
    cache.check_invariants().unwrap();
}

/// `clear(force=True)` freed memory that a transfer was still reading.
#[test]
fn forced_clearing_does_not_free_what_a_reader_still_reads() {
    let cache = shared(1);
    cache.store(&keys(0..1), 1);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..1)], 1).lease.unwrap();
    let read = cache.begin_read(owner, lookup, owner, 0, 0..1).unwrap();
    cache.clear(true);
    let writer = cache.new_owner();
    assert!(
        cache.reserve(writer, &keys(5..6), OBJECT).is_err(),
        "the slot is not free"
    );
    let mut out = Vec::new();
    cache.read(owner, read.lease, 0, &mut out).unwrap();
    assert_eq!(out, bytes_of(1, OBJECT));
    assert!(cache.finish_read(owner, read.lease));
    assert!(cache.reserve(writer, &keys(5..6), OBJECT).is_ok());
}
