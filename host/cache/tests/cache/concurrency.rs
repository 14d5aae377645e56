//! Many threads at once: every byte read is one that was committed for that key.

use std::sync::atomic::{AtomicU64, Ordering};

use stockade_cache::{LeaseError, ReadError};

use crate::fixture::*;

/// The other threads move the clock, so any lease may run out at any step.
fn or_expired<T>(result: Result<T, LeaseError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(LeaseError::Expired) => None,
        Err(other) => panic!("{other:?}"),
    }
}

/// Stores the three chunks from `start` on, as far as they are missing. The bytes follow
/// from the key, so that any reader can check them.
fn store(cache: &Cache, start: u32, gives_up: bool) -> Option<()> {
    let owner = cache.new_owner();
    let stored = || {
        let reservation = cache.reserve(owner, &keys(start..start + 3), OBJECT).ok()?;
        let lease = reservation.lease?;
        for &(index, slot) in &reservation.slots {
            let bytes = bytes_of(u64::from(start) + index as u64, slot.length);
            or_expired(cache.write(owner, lease, index, &mut bytes.chunks(1000)))?;
        }
        if gives_up {
            or_expired(cache.abort(owner, lease))?;
        } else {
            or_expired(cache.commit(owner, lease))?;
        }
        Some(())
    };
    let result = stored();
    cache.end_owner(owner);
    result
}

/// Reads what is there of the three chunks; returns how many objects that were.
fn load(cache: &Cache, start: u32) -> u64 {
    let owner = cache.new_owner();
    let loaded = || {
        let found = cache.lock_prefix(owner, &[keys(start..start + 3)], 1);
        let chunks = 0..found.hit_chunks;
        let read = cache.begin_read(owner, found.lease?, owner, 0, chunks.clone())?;
        for index in chunks.clone() {
            let mut out = Vec::new();
            match cache.read(owner, read.lease, index, &mut out) {
                Ok(()) => assert_eq!(out, bytes_of(u64::from(start) + index as u64, OBJECT)),
                Err(ReadError::Lease(LeaseError::Expired)) => return None,
                Err(other) => panic!("{other:?}"),
            }
        }
        Some(chunks.len() as u64)
    };
    let result = loaded();
    cache.end_owner(owner);
    result.unwrap_or(0)
}

#[test]
fn threads_that_store_read_clear_and_evict_never_see_a_wrong_byte() {
    let cache = private(12);
    let reads = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (cache, reads) = (&cache, &reads);
            scope.spawn(move || {
                let mut random = thread + 1;
                for _ in 0..400 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let start = (random >> 33) as u32 % 16;
                    store(cache, start, random >> 60 == 0);
                    reads.fetch_add(load(cache, start), Ordering::Relaxed);
                    match random >> 59 {
                        0 => drop(cache.clear(true)),
                        1 => cache.clock.advance(READ_TTL / 8),
                        2 => cache.maintain(),
                        _ => {}
                    }
                }
            });
        }
    });
    cache.check_invariants().unwrap();
    let status = cache.status();
    assert_eq!((status.leases, status.owners), (0, 0));
    assert_eq!((status.object_locks, status.owned_locks), (0, 0));
    assert_eq!((status.reserved_objects, status.withdrawn_objects), (0, 0));
    assert_eq!(status.corrupt_objects, 0);
    assert!(reads.load(Ordering::Relaxed) > 100);
}
