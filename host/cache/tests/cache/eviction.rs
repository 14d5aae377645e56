//! Who goes when room is needed.

use stockade_cache::{Backing, EngineConfig, PolicyKind, ReserveError};

use crate::fixture::*;

#[test]
fn a_store_evicts_as_many_as_it_needs_and_the_oldest_tail_first() {
    let cache = private(4);
    cache.store(&keys(0..2), 0);
    cache.store(&keys(10..12), 10);
    cache.store(&keys(20..21), 20);
    assert_eq!(cache.present(&keys(0..2)), [true, false]);
    let status = cache.status();
    assert_eq!(
        (status.demand_evicted_objects, status.evicted_bytes),
        (1, PAGE)
    );
    assert_eq!(cache.fetch(&keys(10..12)).unwrap()[1], bytes_of(11, OBJECT));
}

#[test]
fn maintenance_is_wanted_above_the_watermark_only() {
    let cache = open(EngineConfig {
        trigger_watermark: 0.5,
        eviction_ratio: 0.5,
        ..config(8, Backing::Private)
    });
    for chunk in 0..3 {
        cache.store(&keys(chunk..chunk + 1), 0);
        assert!(!cache.wants_maintenance(), "{chunk}");
    }
    cache.store(&keys(3..4), 0);
    assert!(cache.wants_maintenance());
    cache.maintain();
    assert_eq!(cache.status().readable_objects, 2);
    assert!(!cache.wants_maintenance());
}

#[test]
fn lookups_and_ends_of_sessions_touch_but_reads_do_not() {
    let cache = private(3);
    for chunk in 0..3 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    let owner = cache.new_owner();
    // Found in the order 0, 1; then 1 is given back before 0: that changes nothing.
    let zero = cache.lock_prefix(owner, &[keys(0..1)], 1).lease.unwrap();
    let one = cache.lock_prefix(owner, &[keys(1..2)], 1).lease.unwrap();
    cache.release_prefix(owner, one, 0..1, 1);
    let read = cache.begin_read(owner, zero, owner, 0, 0..1).unwrap().lease;
    cache.finish_read(owner, read);
    cache.store(&keys(10..11), 0);
    assert_eq!(cache.status().readable_objects, 3);
    cache.touch(&keys([0, 10]));
    cache.store(&keys(11..12), 0);
    cache.store(&keys(12..13), 0);
    // 2 went first (never touched), then 1 (0 was touched later), then 10, the later
    // chunk of the session that ended, before 0.
    assert_eq!(
        cache.present(&keys([2, 1, 10, 0, 11, 12])),
        [false, false, false, true, true, true]
    );
}

#[test]
fn a_lookup_leaves_the_end_of_its_prefix_to_go_first() {
    let cache = private(3);
    for chunk in 0..3 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    assert_eq!(cache.hits(&keys(0..3)), 3);
    cache.store(&keys(10..11), 0);
    cache.store(&keys(11..12), 0);
    assert_eq!(cache.present(&keys(0..3)), [true, false, false]);
}

#[test]
fn locked_objects_are_passed_over_and_the_next_ones_go() {
    let cache = private(4);
    for chunk in 0..4 {
        cache.store(&keys(chunk..chunk + 1), u64::from(chunk));
    }
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..2)], 1).lease.unwrap();
    cache.store(&keys(10..12), 10);
    assert_eq!(cache.present(&keys([2, 3])), [false, false]);
    let read = cache.begin_read(owner, lookup, owner, 0, 0..2).unwrap();
    let mut out = Vec::new();
    cache.read(owner, read.lease, 1, &mut out).unwrap();
    assert_eq!(out, bytes_of(1, OBJECT));
}

#[test]
fn what_cannot_fit_fails_at_once_and_evicts_nothing() {
    let cache = private(4);
    cache.store(&keys(0..4), 0);
    let owner = cache.new_owner();
    cache.lock_prefix(owner, &[keys(0..2)], 1);
    let result = cache.reserve(owner, &keys(10..13), OBJECT);
    assert_eq!(
        result,
        Err(ReserveError::PoolFull {
            needed_bytes: 3 * PAGE,
            free_bytes: 0,
            evictable_bytes: 2 * PAGE
        })
    );
    let status = cache.status();
    assert_eq!((status.readable_objects, status.evicted_objects), (4, 0));
    assert_eq!(status.allocation_failures, 1);
    assert!(cache.reserve(owner, &keys(10..12), OBJECT).is_ok());
    assert!(
        cache.reserve(owner, &keys(20..21), OBJECT).is_err(),
        "staged bytes are not evictable"
    );
    cache.check_invariants().unwrap();
}

#[test]
fn storing_the_end_of_a_prefix_does_not_evict_its_front() {
    let cache = private(3);
    cache.store(&keys(0..2), 0);
    cache.store(&keys(10..11), 10);
    let owner = cache.new_owner();
    // 0 and 1 are the oldest, but they are the front of what is stored now.
    let reservation = cache.reserve(owner, &keys(0..3), OBJECT).unwrap();
    assert_eq!(reservation.slots.len(), 1);
    assert_eq!(cache.present(&keys([0, 1, 10])), [true, true, false]);
}

#[test]
fn a_fragmented_pool_gives_up_neighbours_and_no_more() {
    let cache = private(8);
    for chunk in 0..8 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    // The oldest are 0 and 7, with 1..=3 and 5 in use: only 6 and 7 are neighbours.
    let owner = cache.new_owner();
    for locked in [1, 2, 3, 5] {
        cache.lock_prefix(owner, &[keys(locked..locked + 1)], 1);
    }
    cache.touch(&keys([6, 4]));
    let reservation = cache.reserve(owner, &keys(20..21), 2 * PAGE).unwrap();
    assert_eq!(reservation.slots.len(), 1);
    let present = cache.present(&keys(0..8));
    assert_eq!(present, [true, true, true, true, true, true, false, false]);
    cache.check_invariants().unwrap();
    // Two single pages are left, but no pair.
    let before = cache.status();
    assert!(cache.reserve(owner, &keys(30..31), 2 * PAGE).is_err());
    assert_eq!(cache.status().readable_objects, before.readable_objects);
    assert_eq!(
        cache
            .reserve(owner, &keys(30..32), PAGE)
            .unwrap()
            .slots
            .len(),
        2
    );
    cache.check_invariants().unwrap();
}

#[test]
fn many_small_objects_make_room_for_a_large_one_by_address() {
    let cache = private(64);
    for chunk in 0..64 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    // Use them in an order that scatters the oldest over the pool, and hold every tenth.
    let owner = cache.new_owner();
    cache.touch(&keys((0..64).map(|nth| nth * 37 % 64)));
    for locked in (0..64).step_by(10) {
        cache.lock_prefix(owner, &[keys(locked..locked + 1)], 1);
    }
    let reservation = cache.reserve(owner, &keys(100..101), 9 * PAGE).unwrap();
    assert_eq!(reservation.slots[0].1.length, 9 * PAGE);
    assert_eq!(
        cache.status().evicted_objects,
        9,
        "only what lay there went"
    );
    assert!(cache.reserve(owner, &keys(101..102), 10 * PAGE).is_err());
    assert_eq!(cache.status().evicted_objects, 9);
    cache.check_invariants().unwrap();
}

#[test]
fn a_place_by_address_is_chosen_where_it_costs_least() {
    let cache = private(200);
    for chunk in 0..197 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    // The oldest are one in four, so freeing them in order joins nothing; the last four
    // pages, behind a locked one, are free but for one.
    let owner = cache.new_owner();
    cache.touch(&keys((0..197).filter(|chunk| chunk % 4 != 1)));
    cache.lock_prefix(owner, &[keys(195..196)], 1);
    let reservation = cache.reserve(owner, &keys(300..301), 4 * PAGE).unwrap();
    assert_eq!(reservation.slots[0].1.offset, 196 * PAGE);
    assert_eq!(cache.status().evicted_objects, 1);
    assert_eq!(cache.present(&keys([196, 1, 0])), [false, true, true]);
    cache.check_invariants().unwrap();
}

#[test]
fn the_watermark_counts_bytes_and_not_keys() {
    let cache = open(EngineConfig {
        trigger_watermark: 0.8,
        eviction_ratio: 0.5,
        ..config(100, Backing::Private)
    });
    // Ten small old objects, one large new one: half of the keys would be 5 pages.
    for chunk in 0..10 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    let owner = cache.new_owner();
    let large = cache
        .reserve(owner, &keys(50..51), 69 * PAGE)
        .unwrap()
        .lease
        .unwrap();
    cache.write_bytes(owner, large, 0, &bytes_of(0, 69 * PAGE));
    cache.commit(owner, large).unwrap();
    cache.maintain();
    assert_eq!(
        cache.status().evicted_objects,
        0,
        "79 of 100 pages are below the watermark"
    );
    cache.store(&keys(10..11), 0);
    cache.maintain();
    let status = cache.status();
    assert!(status.evicted_bytes >= 40 * PAGE, "{status:?}");
    assert_eq!(
        cache.present(&keys([50, 10])),
        [false, true],
        "in order, and no further"
    );
    assert_eq!(status.demand_evicted_objects, 0);
    cache.check_invariants().unwrap();
}

#[test]
fn the_watermark_passes_over_what_is_held() {
    let cache = open(EngineConfig {
        trigger_watermark: 0.5,
        eviction_ratio: 0.5,
        ..config(10, Backing::Private)
    });
    for chunk in 0..8 {
        cache.store(&keys(chunk..chunk + 1), 0);
    }
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..6)], 1).lease.unwrap();
    cache.touch(&keys(6..8));
    cache.maintain();
    assert_eq!(
        cache.status().readable_objects,
        6,
        "two could go, the rest is locked"
    );
    cache.release_prefix(owner, lookup, 0..6, 1);
    cache.maintain();
    assert_eq!(
        cache.present(&keys(0..6)),
        [true, true, true, false, false, false]
    );
    cache.check_invariants().unwrap();
}

#[test]
fn staged_bytes_count_towards_the_watermark() {
    let cache = open(EngineConfig {
        trigger_watermark: 0.8,
        eviction_ratio: 0.2,
        ..config(10, Backing::Private)
    });
    cache.store(&keys(0..4), 0);
    let owner = cache.new_owner();
    cache.reserve_all(owner, &keys(10..14));
    cache.maintain();
    assert_eq!(cache.status().evicted_objects, 2);
}

#[test]
fn noop_never_evicts_so_a_full_pool_stays_full() {
    let cache = with_policy(2, PolicyKind::Noop);
    cache.store(&keys(0..2), 0);
    let owner = cache.new_owner();
    let result = cache.reserve(owner, &keys(5..6), OBJECT);
    assert_eq!(
        result,
        Err(ReserveError::PoolFull {
            needed_bytes: PAGE,
            free_bytes: 0,
            evictable_bytes: 0
        })
    );
    cache.maintain();
    assert_eq!(cache.hits(&keys(0..2)), 2);
}

#[test]
fn every_policy_keeps_a_pool_going() {
    for policy in PolicyKind::ALL {
        let cache = with_policy(8, policy);
        if policy == PolicyKind::Noop {
            continue;
        }
        for round in 0..200_u32 {
            let salt = ["", "a", "b"][round as usize % 3];
            let chunk = round * 7 % 19;
            let prefix = keys_of(salt, 0, chunk..chunk + 3);
            let owner = cache.new_owner();
            let reservation = cache.reserve(owner, &prefix, OBJECT).unwrap();
            if let Some(lease) = reservation.lease {
                for &(index, slot) in &reservation.slots {
                    let seed = u64::from(chunk) + index as u64;
                    cache.write_bytes(owner, lease, index, &bytes_of(seed, slot.length));
                }
                cache.commit(owner, lease).unwrap();
            }
            let read = cache.fetch(&prefix).unwrap();
            for (index, bytes) in read.iter().enumerate() {
                assert_eq!(*bytes, bytes_of(u64::from(chunk) + index as u64, OBJECT));
            }
            cache.end_owner(owner);
            cache.check_invariants().unwrap();
        }
        assert!(cache.status().demand_evicted_objects > 100, "{policy}");
    }
}
