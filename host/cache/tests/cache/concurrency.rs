//! Many threads at once: every byte read is one that was committed for that key.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::fixture::*;

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
                    let prefix = keys(start..start + 3);
                    let owner = cache.new_owner();
                    if let Ok(reservation) = cache.reserve(owner, &prefix, OBJECT)
                        && let Some(lease) = reservation.lease
                    {
                        for &(index, slot) in &reservation.slots {
                            // The bytes follow from the key, so any reader can check them.
                            let seed = u64::from(start) + index as u64;
                            cache.write_bytes(owner, lease, index, &bytes_of(seed, slot.length));
                        }
                        if random >> 60 == 0 {
                            cache.abort(owner, lease).unwrap();
                        } else {
                            cache.commit(owner, lease).unwrap();
                        }
                    }
                    let found = cache.lock_prefix(owner, &[prefix], 1);
                    if let Some(lookup) = found.lease
                        && let Some(read) =
                            cache.begin_read(owner, lookup, owner, 0, 0..found.hit_chunks)
                    {
                        for index in 0..read.slots.len() {
                            let mut out = Vec::new();
                            cache.read(owner, read.lease, index, &mut out).unwrap();
                            assert_eq!(out, bytes_of(u64::from(start) + index as u64, OBJECT));
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    match random >> 59 {
                        0 => drop(cache.clear(true)),
                        1 => cache.clock.advance(READ_TTL / 8),
                        2 => cache.maintain(),
                        _ => {}
                    }
                    cache.end_owner(owner);
                }
            });
        }
    });
    cache.check_invariants().unwrap();
    let status = cache.status();
    assert_eq!(
        (status.object_locks, status.leases, status.owners),
        (0, 0, 0)
    );
    assert_eq!((status.reserved_objects, status.withdrawn_objects), (0, 0));
    assert_eq!(status.corrupt_objects, 0);
    assert!(reads.load(Ordering::Relaxed) > 500);
}
