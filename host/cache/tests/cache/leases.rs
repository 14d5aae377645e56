//! Who holds what, and what ends it.

use std::time::Duration;

use stockade_cache::{LeaseError, ReadError, ReserveError};

use crate::fixture::*;

#[test]
fn a_stored_prefix_is_found_locked_read_and_given_back() {
    let cache = private(16);
    cache.store(&keys(0..4), 100);
    let (scheduler, worker) = (cache.new_owner(), cache.new_owner());
    // Chunk 4 is missing, so 5 would not help even if it were there.
    cache.store(&keys([5]), 0);
    let found = cache.lock_prefix(scheduler, &[keys(0..6)], 2);
    assert_eq!(found.hit_chunks, 4);
    let lookup = found.lease.unwrap();
    assert_eq!(cache.status().object_locks, 8);

    let read = cache
        .begin_read(scheduler, lookup, worker, 0, 1..3)
        .unwrap();
    assert_eq!(read.slots.len(), 2);
    assert_eq!(
        cache.status().owned_locks,
        8,
        "locks change hands, none is added"
    );
    let mut out = b"before".to_vec();
    cache.read(worker, read.lease, 1, &mut out).unwrap();
    assert_eq!(out, [b"before".to_vec(), bytes_of(102, OBJECT)].concat());

    assert!(cache.finish_read(worker, read.lease));
    assert!(!cache.finish_read(worker, read.lease), "only once");
    assert_eq!(cache.status().object_locks, 6);
    assert_eq!(cache.release_prefix(scheduler, lookup, 0..4, 1), 4);
    assert_eq!(cache.release_prefix(scheduler, lookup, 0..9, 128), 2);
    assert_eq!(cache.release_prefix(scheduler, lookup, 0..9, 128), 0);
    let status = cache.status();
    assert_eq!((status.object_locks, status.leases), (0, 0));
    cache.check_invariants().unwrap();
}

#[test]
fn the_prefix_must_be_there_in_every_row() {
    let cache = private(16);
    cache.store(&keys_of("", 1, 0..4), 0);
    cache.store(&keys_of("", 2, 0..2), 10);
    let owner = cache.new_owner();
    let rows = [keys_of("", 1, 0..4), keys_of("", 2, 0..4)];
    let found = cache.lock_prefix(owner, &rows, 1);
    assert_eq!(found.hit_chunks, 2);
    assert_eq!(cache.status().object_locks, 4);
    let lookup = found.lease.unwrap();
    let read = cache.begin_read(owner, lookup, owner, 1, 0..2).unwrap();
    let mut out = Vec::new();
    cache.read(owner, read.lease, 0, &mut out).unwrap();
    assert_eq!(out, bytes_of(10, OBJECT));
    // Release covers all rows; the row that was handed to the reader has none left.
    assert_eq!(cache.release_prefix(owner, lookup, 0..2, 1), 2);
    assert!(cache.finish_read(owner, read.lease));

    for rows in [vec![], vec![vec![]], vec![keys(0..1), keys(7..8)]] {
        let found = cache.lock_prefix(owner, &rows, 1);
        assert_eq!((found.hit_chunks, found.lease), (0, None));
    }
    // Rows of different length count as far as the shortest.
    let rows = [keys_of("", 1, 0..4), keys_of("", 2, 0..1)];
    assert_eq!(cache.lock_prefix(owner, &rows, 1).hit_chunks, 1);
    cache.check_invariants().unwrap();
}

#[test]
fn the_number_of_readers_is_clamped_as_in_lmcache() {
    let cache = private(4);
    cache.store(&keys(0..1), 0);
    for (asked, taken) in [(0, 1), (1, 1), (128, 128), (129, 128), (u32::MAX, 128)] {
        let owner = cache.new_owner();
        let found = cache.lock_prefix(owner, &[keys(0..1)], asked);
        assert_eq!(cache.status().object_locks, taken);
        let released = cache.release_prefix(owner, found.lease.unwrap(), 0..1, asked);
        assert_eq!(released as u64, taken);
    }
}

#[test]
fn salts_ranks_and_models_do_not_see_each_other() {
    let cache = private(16);
    cache.store(&keys_of("a", 1, 0..2), 0);
    assert_eq!(cache.hits(&keys_of("a", 1, 0..2)), 2);
    assert_eq!(cache.hits(&keys_of("b", 1, 0..2)), 0);
    assert_eq!(cache.hits(&keys_of("", 1, 0..2)), 0);
    assert_eq!(cache.hits(&keys_of("a", 2, 0..2)), 0);
    cache.store(&keys_of("b", 1, 0..1), 50);
    assert_eq!(
        cache.fetch(&keys_of("b", 1, 0..1)).unwrap()[0],
        bytes_of(50, OBJECT)
    );
    assert_eq!(
        cache.fetch(&keys_of("a", 1, 0..1)).unwrap()[0],
        bytes_of(0, OBJECT)
    );
    let salts = cache.status().salts;
    let usage: Vec<_> = salts
        .iter()
        .map(|salt| (salt.cache_salt.as_str(), salt.bytes))
        .collect();
    assert_eq!(usage, [("a", 2 * PAGE), ("b", PAGE)]);
    cache.clear(false);
    assert_eq!(cache.status().salts, []);
}

#[test]
fn equal_chunks_of_many_salts_are_never_confused() {
    let cache = private(1000);
    let chunk_of = |tenant: u32| tenant % 2;
    for tenant in 0..1000 {
        let chunk = chunk_of(tenant);
        cache.store_unchecked(&keys_of(&format!("t{tenant}"), 0, [chunk]), tenant.into());
    }
    for tenant in 0..1000 {
        let salt = format!("t{tenant}");
        let chunk = chunk_of(tenant);
        assert_eq!(cache.hits(&keys_of(&salt, 0, [1 - chunk])), 0, "{salt}");
        let read = cache.fetch(&keys_of(&salt, 0, [chunk])).unwrap();
        assert_eq!(read[0], bytes_of(tenant.into(), OBJECT));
    }
    cache.check_invariants().unwrap();
}

#[test]
fn a_foreign_owner_can_do_nothing_with_a_lease() {
    let cache = private(16);
    cache.store(&keys(0..2), 0);
    let (owner, other) = (cache.new_owner(), cache.new_owner());
    let (write, _) = cache.reserve_all(owner, &keys(5..6));
    let lookup = cache.lock_prefix(owner, &[keys(0..2)], 2).lease.unwrap();
    let read = cache
        .begin_read(owner, lookup, owner, 0, 0..2)
        .unwrap()
        .lease;

    let before = cache.status();
    assert_eq!(cache.commit(other, write), Err(LeaseError::NotOwner));
    assert_eq!(cache.abort(other, write), Err(LeaseError::NotOwner));
    let mut parts = std::iter::empty();
    assert_eq!(
        cache.write(other, write, 0, &mut parts),
        Err(LeaseError::NotOwner)
    );
    assert_eq!(cache.release_prefix(other, lookup, 0..2, 1), 0);
    assert_eq!(cache.begin_read(other, lookup, other, 0, 0..1), None);
    let foreign = cache.read(other, read, 0, &mut Vec::new());
    assert_eq!(foreign, Err(ReadError::Lease(LeaseError::NotOwner)));
    assert!(!cache.finish_read(other, read));
    // Nor can the owner use a lease for what it is not.
    assert_eq!(cache.commit(owner, lookup), Err(LeaseError::Unknown));
    assert_eq!(cache.commit(owner, read), Err(LeaseError::Unknown));
    assert_eq!(cache.release_prefix(owner, write, 0..2, 1), 0);
    assert!(!cache.finish_read(owner, lookup));
    assert_eq!(cache.status(), before);
    cache.check_invariants().unwrap();
}

#[test]
fn a_read_begins_only_inside_the_lookup_and_with_locks_left() {
    let cache = private(16);
    cache.store(&keys(0..3), 0);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..3)], 1).lease.unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    let bad = [0..4, 3..4, 2..1, 1..1, 0..usize::MAX, usize::MAX..0];
    for chunks in bad {
        assert_eq!(cache.begin_read(owner, lookup, owner, 0, chunks), None);
    }
    assert_eq!(cache.begin_read(owner, lookup, owner, 1, 0..1), None);
    assert_eq!(
        cache.begin_read(owner, lookup, owner, usize::MAX, 0..1),
        None
    );
    assert_eq!(cache.release_prefix(owner, lookup, 1..2, 1), 1);
    assert_eq!(
        cache.begin_read(owner, lookup, owner, 0, 0..3),
        None,
        "chunk 1 has no lock left"
    );
    assert_eq!(
        cache.status().object_locks,
        2,
        "nothing was taken for chunk 0 either"
    );
    assert!(cache.begin_read(owner, lookup, owner, 0, 2..3).is_some());
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    let inverted = 2..0;
    assert_eq!(cache.release_prefix(owner, lookup, inverted, 1), 0);
    cache.check_invariants().unwrap();
}

#[test]
fn a_lease_is_over_at_its_deadline_and_not_a_moment_earlier() {
    let cache = private(16);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..2));
    cache.write_bytes(owner, lease, 0, &bytes_of(0, OBJECT));
    cache.write_bytes(owner, lease, 1, &bytes_of(1, OBJECT));
    cache.clock.advance(WRITE_TTL - Duration::from_nanos(1));
    assert_eq!(cache.status().reserved_objects, 2);
    cache.clock.advance(Duration::from_nanos(1));
    assert_eq!(cache.status().reserved_objects, 0);
    assert_eq!(cache.commit(owner, lease), Err(LeaseError::Expired));
    assert_eq!(cache.abort(owner, lease), Err(LeaseError::Expired));
    assert_eq!(cache.hits(&keys(0..2)), 0);
    assert_eq!(cache.status().used_bytes, 0);

    cache.store(&keys(0..1), 0);
    let found = cache.lock_prefix(owner, &[keys(0..1)], 3);
    let read = cache
        .begin_read(owner, found.lease.unwrap(), owner, 0, 0..1)
        .unwrap();
    cache.clock.advance(READ_TTL);
    assert_eq!(cache.status().object_locks, 0);
    let late = cache.read(owner, read.lease, 0, &mut Vec::new());
    assert_eq!(late, Err(ReadError::Lease(LeaseError::Expired)));
    assert!(
        !cache.finish_read(owner, read.lease),
        "the worker learns that it was late"
    );
    let status = cache.status();
    assert_eq!(
        (status.expired_write_leases, status.expired_read_leases),
        (1, 2)
    );
    cache.check_invariants().unwrap();
}

#[test]
fn a_read_gets_its_own_time_and_outlives_the_lookup() {
    let cache = private(4);
    cache.store(&keys(0..1), 7);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..1)], 2).lease.unwrap();
    cache.clock.advance(READ_TTL - Duration::from_secs(1));
    let read = cache
        .begin_read(owner, lookup, owner, 0, 0..1)
        .unwrap()
        .lease;
    cache.clock.advance(Duration::from_secs(2));
    assert_eq!(
        cache.status().object_locks,
        1,
        "the lookup's other lock is gone"
    );
    let mut out = Vec::new();
    cache.read(owner, read, 0, &mut out).unwrap();
    assert_eq!(out, bytes_of(7, OBJECT));
    assert!(cache.finish_read(owner, read));
}

#[test]
fn the_end_of_an_owner_gives_everything_back_and_publishes_nothing() {
    let cache = private(16);
    cache.store(&keys(0..3), 0);
    let (owner, other) = (cache.new_owner(), cache.new_owner());
    let (lease, _) = cache.reserve_all(owner, &keys(10..12));
    cache.write_bytes(owner, lease, 0, &bytes_of(0, OBJECT));
    cache.lock_prefix(owner, &[keys(0..3)], 4);
    let lookup = cache.lock_prefix(other, &[keys(0..3)], 1).lease.unwrap();
    cache.begin_read(other, lookup, owner, 0, 0..1).unwrap();

    let ended = cache.end_owner(owner);
    assert_eq!((ended.aborted_objects, ended.released_locks), (2, 13));
    assert_eq!(
        cache.status().object_locks,
        2,
        "the other owner keeps its own"
    );
    assert_eq!(cache.hits(&keys(10..12)), 0);
    assert_eq!(cache.status().used_bytes, 3 * PAGE);

    // Calls in its name find nothing, and nothing new can be held.
    assert_eq!(cache.end_owner(owner), Default::default());
    assert_eq!(cache.commit(owner, lease), Err(LeaseError::Unknown));
    assert_eq!(
        cache.reserve(owner, &keys(10..12), OBJECT),
        Err(ReserveError::OwnerEnded)
    );
    assert_eq!(cache.lock_prefix(owner, &[keys(0..3)], 1).lease, None);
    assert_eq!(cache.begin_read(other, lookup, owner, 0, 1..2), None);
    cache.check_invariants().unwrap();
}

#[test]
fn a_key_that_is_readable_or_reserved_gets_no_second_slot() {
    let cache = private(16);
    cache.store(&keys(0..1), 0);
    let (first, second) = (cache.new_owner(), cache.new_owner());
    let (lease, _) = cache.reserve_all(first, &keys(1..2));
    let reservation = cache.reserve(second, &keys(0..4), OBJECT).unwrap();
    let indexes: Vec<_> = reservation.slots.iter().map(|&(index, _)| index).collect();
    assert_eq!(indexes, [2, 3]);
    assert_eq!(
        cache.reserve(second, &keys(0..2), OBJECT).unwrap(),
        Default::default()
    );
    // Slots are addressed by the index in the call, gaps included.
    let second_lease = reservation.lease.unwrap();
    cache.write_bytes(second, second_lease, 3, &bytes_of(3, OBJECT));
    let mut parts = std::iter::empty();
    for index in [0, 1, 4, usize::MAX] {
        let result = cache.write(second, second_lease, index, &mut parts);
        assert_eq!(result, Err(LeaseError::NoSuchIndex { index }));
    }
    assert_eq!(cache.abort(first, lease), Ok(1));
    assert_eq!(cache.reserve_all(second, &keys(1..2)).1.len(), 1);
    cache.check_invariants().unwrap();
}

#[test]
fn empty_and_oversized_requests_are_refused_before_anything_is_taken() {
    let cache = private(4);
    let owner = cache.new_owner();
    assert_eq!(
        cache.reserve(owner, &keys(0..1), 0),
        Err(ReserveError::ZeroLength)
    );
    for object_bytes in [4 * PAGE + 1, u64::MAX, u64::MAX - 4096] {
        let error = cache.reserve(owner, &keys(0..1), object_bytes).unwrap_err();
        assert_eq!(
            error,
            ReserveError::TooLarge {
                object_bytes,
                capacity_bytes: 4 * PAGE
            }
        );
    }
    assert_eq!(
        cache.reserve(owner, &[], OBJECT).unwrap(),
        Default::default()
    );
    let status = cache.status();
    assert_eq!(
        (status.used_bytes, status.leases, status.allocation_failures),
        (0, 0, 0)
    );
}

#[test]
fn clearing_keeps_what_is_in_use_unless_forced() {
    let cache = private(16);
    cache.store(&keys(0..4), 20);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..2)], 1).lease.unwrap();
    let (lease, _) = cache.reserve_all(owner, &keys(8..9));
    let cleared = cache.clear(false);
    assert_eq!((cleared.removed, cleared.kept), (2, 3));
    assert_eq!(cache.present(&keys(0..4)), [true, true, false, false]);

    let read = cache.begin_read(owner, lookup, owner, 0, 0..1).unwrap();
    let cleared = cache.clear(true);
    assert_eq!((cleared.removed, cleared.kept), (2, 1));
    assert_eq!(cache.present(&keys(0..2)), [false, false]);
    // No read of a withdrawn object begins, but one that has begun ends with its bytes.
    assert_eq!(cache.begin_read(owner, lookup, owner, 0, 1..2), None);
    assert_eq!(cache.status().withdrawn_objects, 2);
    cache.store(&keys(0..2), 70);
    let mut out = Vec::new();
    cache.read(owner, read.lease, 0, &mut out).unwrap();
    assert_eq!(out, bytes_of(20, OBJECT), "its slot was not given away");
    assert!(cache.finish_read(owner, read.lease));
    assert_eq!(cache.status().withdrawn_objects, 1);
    cache.end_owner(owner);
    assert_eq!(cache.status().withdrawn_objects, 0);
    assert_eq!(cache.commit(owner, lease), Err(LeaseError::Unknown));
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(70, OBJECT));
    cache.check_invariants().unwrap();
}

#[test]
fn a_store_that_began_before_clearing_may_finish_after_it() {
    let cache = private(4);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    cache.clear(true);
    cache.write_bytes(owner, lease, 0, &bytes_of(1, OBJECT));
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 1);
    assert_eq!(cache.hits(&keys(0..1)), 1);
}

/// Each row of the table of endings, seen from outside: what can be found afterwards, what
/// is in use, and what is locked. Object 0 is stored before, 5 is what is being stored.
#[test]
fn every_end_of_a_lease_does_what_the_table_says() {
    /// Stands for the calls that end leases.
    #[derive(Debug, Clone, Copy)]
    enum End {
        Commit,
        Abort,
        Expiry,
        Owner,
        Finish,
        LastLock,
        Clear,
        ForcedClear,
    }
    use End::*;
    // (what happens, chunks found of [0, 5], pages in use, locks)
    let writes = [
        (Commit, [true, true], 2, 0),
        (Abort, [true, false], 1, 0),
        (Expiry, [true, false], 1, 0),
        (Owner, [true, false], 1, 0),
        (Finish, [true, false], 2, 0),
        (LastLock, [true, false], 2, 0),
        (Clear, [false, false], 1, 0),
        (ForcedClear, [false, false], 1, 0),
    ];
    let lookups = [
        (Commit, [true, false], 1, 2),
        (Abort, [true, false], 1, 2),
        (Expiry, [true, false], 1, 0),
        (Owner, [true, false], 1, 0),
        (Finish, [true, false], 1, 2),
        (LastLock, [true, false], 1, 0),
        (Clear, [true, false], 1, 2),
        (ForcedClear, [false, false], 1, 2),
    ];
    let reads = [
        (Commit, [true, false], 1, 1),
        (Abort, [true, false], 1, 1),
        (Expiry, [true, false], 1, 0),
        (Owner, [true, false], 1, 0),
        (Finish, [true, false], 1, 0),
        (LastLock, [true, false], 1, 1),
        (Clear, [true, false], 1, 1),
        (ForcedClear, [false, false], 1, 1),
    ];
    for (kind, rows) in [("write", writes), ("lookup", lookups), ("read", reads)] {
        for (end, found, pages, locks) in rows {
            let cache = private(4);
            cache.store(&keys(0..1), 0);
            let owner = cache.new_owner();
            let lease = match kind {
                "write" => {
                    let (lease, _) = cache.reserve_all(owner, &keys(5..6));
                    cache.write_bytes(owner, lease, 0, &bytes_of(5, OBJECT));
                    lease
                }
                "lookup" => cache.lock_prefix(owner, &[keys(0..1)], 2).lease.unwrap(),
                _ => {
                    let other = cache.new_owner();
                    let lookup = cache.lock_prefix(other, &[keys(0..1)], 1).lease.unwrap();
                    let read = cache.begin_read(other, lookup, owner, 0, 0..1);
                    read.unwrap().lease
                }
            };
            match end {
                Commit => drop(cache.commit(owner, lease)),
                Abort => drop(cache.abort(owner, lease)),
                Expiry => cache.clock.advance(WRITE_TTL),
                Owner => drop(cache.end_owner(owner)),
                Finish => drop(cache.finish_read(owner, lease)),
                LastLock => drop(cache.release_prefix(owner, lease, 0..1, 128)),
                Clear => drop(cache.clear(false)),
                ForcedClear => drop(cache.clear(true)),
            }
            let status = cache.status();
            let what = format!("{end:?} of a {kind} lease: {status:?}");
            assert_eq!(status.used_bytes, pages * PAGE, "{what}");
            assert_eq!(
                (status.object_locks, status.owned_locks),
                (locks, locks),
                "{what}"
            );
            assert_eq!(cache.present(&keys([0, 5])), found, "{what}");
            cache.check_invariants().unwrap();
            // Whatever was left goes with the owner.
            cache.end_owner(owner);
            cache.clear(false);
            assert_eq!(cache.status().used_bytes, 0, "{what}");
        }
    }
}
