//! Bytes come out as they went in, or not at all.

use std::os::unix::fs::FileExt;

use stockade_cache::{EngineConfig, LeaseError, ReadError};

use crate::fixture::*;

#[test]
fn an_object_is_the_concatenation_of_its_parts() {
    let cache = private(4);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    let bytes = bytes_of(9, OBJECT);
    let (head, tail) = bytes.split_at(13);
    cache
        .write(owner, lease, 0, &mut [head, &[], tail].into_iter())
        .unwrap();
    cache.commit(owner, lease).unwrap();
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes);
}

#[test]
fn a_large_object_is_summed_and_copied_in_pieces() {
    let length = (1 << 20) + 12_345;
    let cache = shared(300);
    let owner = cache.new_owner();
    let lease = cache
        .reserve(owner, &keys(0..1), length)
        .unwrap()
        .lease
        .unwrap();
    let bytes = bytes_of(3, length);
    cache
        .write(owner, lease, 0, &mut bytes.chunks(700_001))
        .unwrap();
    cache.commit(owner, lease).unwrap();
    assert!(cache.fetch(&keys(0..1)).unwrap()[0] == bytes);
    cache
        .segment_file()
        .write_all_at(&[!bytes[1 << 20]], 1 << 20)
        .unwrap();
    assert!(cache.fetch(&keys(0..1)).is_none());
    assert_eq!(cache.status().corrupt_objects, 1);
}

#[test]
fn an_object_of_the_wrong_length_is_not_published_and_touches_no_neighbour() {
    let cache = private(4);
    let owner = cache.new_owner();
    let (first, slots) = cache.reserve_all(owner, &keys(0..1));
    cache.store(&keys(1..2), 40);
    cache.abort(owner, first).unwrap();
    for length in [0, OBJECT - 1, OBJECT + 1, 3 * PAGE] {
        let (lease, again) = cache.reserve_all(owner, &keys(0..1));
        assert_eq!(again, slots, "right before its neighbour");
        let bytes = bytes_of(1, length);
        let result = cache.write(owner, lease, 0, &mut bytes.chunks(1500));
        let Err(LeaseError::WrongLength {
            expected: OBJECT, ..
        }) = result
        else {
            panic!("{length} bytes: {result:?}");
        };
        let committed = cache.commit(owner, lease).unwrap();
        assert_eq!((committed.admitted, committed.discarded), (0, 1));
        assert_eq!(cache.hits(&keys(0..1)), 0);
    }
    assert_eq!(cache.fetch(&keys(1..2)).unwrap()[0], bytes_of(40, OBJECT));
    assert_eq!(cache.status().used_bytes, PAGE);
}

#[test]
fn what_the_engine_was_not_given_is_not_published() {
    // Nobody but the engine can write to private memory.
    let cache = private(4);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..2));
    cache.write_bytes(owner, lease, 1, &bytes_of(1, OBJECT));
    let committed = cache.commit(owner, lease).unwrap();
    assert_eq!((committed.admitted, committed.discarded), (1, 1));
    assert_eq!(cache.present(&keys(0..2)), [false, true]);

    // In a shared pool a worker may have written, unless bytes go through the engine.
    let cache = shared(4);
    let owner = cache.new_owner();
    let (lease, slots) = cache.reserve_all(owner, &keys(0..1));
    cache.worker_write(slots[0], &bytes_of(5, OBJECT));
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 1);
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(5, OBJECT));
    let (lease, _) = cache.reserve_all(owner, &keys(1..3));
    cache.write_bytes(owner, lease, 0, &bytes_of(1, OBJECT));
    assert_eq!(cache.commit(owner, lease).unwrap().discarded, 1);
    assert_eq!(cache.present(&keys(1..3)), [true, false]);
    cache.check_invariants().unwrap();
}

#[test]
fn a_failed_write_can_be_made_good_and_the_last_write_counts() {
    let cache = private(4);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    assert!(
        cache
            .write(owner, lease, 0, &mut [&b"short"[..]].into_iter())
            .is_err()
    );
    cache.write_bytes(owner, lease, 0, &bytes_of(1, OBJECT));
    cache.write_bytes(owner, lease, 0, &bytes_of(2, OBJECT));
    cache.commit(owner, lease).unwrap();
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(2, OBJECT));
    let late = cache.write(owner, lease, 0, &mut std::iter::empty());
    assert_eq!(
        late,
        Err(LeaseError::Unknown),
        "nothing can be written after the commit"
    );
}

/// Flips one byte of the object of `keys(0..1)` behind the engine's back.
fn scribble(cache: &Cache) {
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..1)], 1).lease.unwrap();
    let slot = cache
        .begin_read(owner, lookup, owner, 0, 0..1)
        .unwrap()
        .slots[0];
    let file = cache.segment_file();
    let mut byte = [0];
    file.read_exact_at(&mut byte, slot.offset + 77).unwrap();
    file.write_all_at(&[byte[0] ^ 1], slot.offset + 77).unwrap();
    cache.end_owner(owner);
}

#[test]
fn a_flipped_bit_is_found_and_the_object_withdrawn() {
    let cache = shared(4);
    cache.store(&keys(0..2), 0);
    scribble(&cache);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..2)], 2).lease.unwrap();
    let read = cache
        .begin_read(owner, lookup, owner, 0, 0..2)
        .unwrap()
        .lease;
    let mut out = b"kept".to_vec();
    assert_eq!(
        cache.read(owner, read, 0, &mut out),
        Err(ReadError::Corrupt)
    );
    assert_eq!(out, b"kept");
    assert_eq!(
        cache.read(owner, read, 0, &mut out),
        Err(ReadError::Corrupt),
        "for good"
    );
    cache.read(owner, read, 1, &mut out).unwrap();
    // The other reader of the same lookup does not get it any more.
    assert_eq!(cache.begin_read(owner, lookup, owner, 0, 0..1), None);
    let status = cache.status();
    assert_eq!((status.corrupt_objects, status.withdrawn_objects), (1, 1));
    cache.end_owner(owner);
    assert_eq!(cache.hits(&keys(0..2)), 0);
    cache.store(&keys(0..1), 30);
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(30, OBJECT));
    cache.check_invariants().unwrap();
}

#[test]
fn without_checksums_bytes_are_served_as_they_are() {
    let backing = stockade_cache::Backing::Shm {
        name: unique_name(),
    };
    let cache = open(EngineConfig {
        checksum: false,
        ..config(4, backing)
    });
    cache.store(&keys(0..1), 0);
    scribble(&cache);
    let mut expected = bytes_of(0, OBJECT);
    expected[77] ^= 1;
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], expected);
}

#[test]
fn a_lease_that_ends_during_a_write_publishes_nothing_and_keeps_the_slot_until_then() {
    let cache = private(2);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    let bytes = bytes_of(1, OBJECT);
    // The iterator runs in the middle of the copy.
    let mut step = 0;
    let mut parts = std::iter::from_fn(|| {
        step += 1;
        match step {
            1 => Some(&bytes[..100]),
            2 => {
                let again = cache.write(owner, lease, 0, &mut std::iter::empty());
                assert_eq!(again, Err(LeaseError::WriteInProgress));
                cache.clock.advance(WRITE_TTL);
                assert_eq!(cache.commit(owner, lease), Err(LeaseError::Expired));
                assert_eq!(cache.status().withdrawn_objects, 1);
                // The key is free again, and gets the other slot.
                cache.store(&keys(0..1), 60);
                Some(&bytes[100..])
            }
            _ => None,
        }
    });
    let result = cache.write(owner, lease, 0, &mut parts);
    assert_eq!(result, Err(LeaseError::Expired));
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], bytes_of(60, OBJECT));
    assert_eq!(cache.status().used_bytes, PAGE);
    cache.check_invariants().unwrap();
}

#[test]
fn a_commit_during_a_write_does_not_publish_half_an_object() {
    let cache = private(2);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    let bytes = bytes_of(1, OBJECT);
    let mut halves = bytes.chunks(OBJECT as usize / 2);
    let mut parts = std::iter::from_fn(|| {
        if halves.len() == 1 {
            let committed = cache.commit(owner, lease).unwrap();
            assert_eq!((committed.admitted, committed.discarded), (0, 1));
        }
        halves.next()
    });
    assert!(cache.write(owner, lease, 0, &mut parts).is_err());
    assert_eq!(cache.hits(&keys(0..1)), 0);
    assert_eq!(cache.status().used_bytes, 0);
    cache.check_invariants().unwrap();
}

#[test]
fn a_panic_in_the_source_of_the_bytes_leaves_no_trace() {
    let cache = private(2);
    let owner = cache.new_owner();
    let (lease, _) = cache.reserve_all(owner, &keys(0..1));
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut parts = std::iter::from_fn(|| -> Option<&[u8]> { panic!("as a test does") });
        let _ = cache.write(owner, lease, 0, &mut parts);
    }));
    assert!(caught.is_err());
    cache.write_bytes(owner, lease, 0, &bytes_of(3, OBJECT));
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 1);
    cache.check_invariants().unwrap();
}

#[test]
fn a_short_read_is_an_error_even_without_a_checksum() {
    let cache = shared(2);
    let owner = cache.new_owner();
    let (lease, slots) = cache.reserve_all(owner, &keys(0..1));
    cache.worker_write(slots[0], &bytes_of(1, OBJECT));
    cache.commit(owner, lease).unwrap();
    let lookup = cache.lock_prefix(owner, &[keys(0..1)], 1).lease.unwrap();
    let read = cache
        .begin_read(owner, lookup, owner, 0, 0..1)
        .unwrap()
        .lease;
    cache.segment_file().set_len(OBJECT - 1).unwrap();
    let mut out = Vec::new();
    assert_eq!(
        cache.read(owner, read, 0, &mut out),
        Err(ReadError::Corrupt)
    );
    assert!(out.is_empty());
    assert_eq!(cache.hits(&keys(0..1)), 0);
}

#[test]
fn a_write_does_not_hide_that_the_segment_was_cut() {
    let cache = shared(2);
    let owner = cache.new_owner();
    let (lease, slots) = cache.reserve_all(owner, &keys(0..1));
    cache.worker_write(slots[0], &bytes_of(1, OBJECT));
    cache.commit(owner, lease).unwrap();
    let reservation = cache.reserve(owner, &keys(1..2), PAGE).unwrap();
    cache.segment_file().set_len(0).unwrap();
    // This fills the last page, which gives the segment its full length again.
    let bytes = bytes_of(2, PAGE);
    let lease = reservation.lease.unwrap();
    cache
        .write(owner, lease, 0, &mut [&bytes[..]].into_iter())
        .unwrap();
    assert_eq!(
        cache.fetch(&keys(0..1)),
        None,
        "zeros are not what was committed"
    );
    assert_eq!(cache.commit(owner, lease).unwrap().admitted, 1);
    assert_eq!(cache.fetch(&keys(1..2)).unwrap()[0], bytes);
}
