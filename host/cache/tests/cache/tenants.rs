//! Who may use how much, and who gives when room is needed.

use std::num::NonZeroU32;

use proptest::prelude::*;
use stockade_cache::{
    Backing, Budget, BudgetError, CacheEngine, CacheError, CacheSalt, EngineConfig, MAX_TENANTS,
    PolicyKind, ReserveError, Tenant,
};

use crate::fixture::*;

fn salt(text: &str) -> CacheSalt {
    CacheSalt::parse(text).unwrap()
}

/// A budget in pages.
fn budget(floor: u64, weight: u32, cap: Option<u64>) -> Budget {
    Budget {
        floor_bytes: floor * PAGE,
        weight: NonZeroU32::new(weight).unwrap(),
        cap_bytes: cap.map(|pages| pages * PAGE),
    }
}

fn tenant(name: &str, salts: &[&str], budget: Budget) -> Tenant {
    Tenant {
        name: name.into(),
        salts: salts.iter().map(|text| salt(text)).collect(),
        budget,
    }
}

fn with_tenants(pages: u64, tenants: Vec<Tenant>) -> Cache {
    open(EngineConfig {
        tenants,
        ..config(pages, Backing::Private)
    })
}

/// Pages that each tenant uses, by name.
fn used(cache: &Cache, name: &str) -> u64 {
    let budgets = cache.budgets();
    let found = budgets.iter().find(|it| &*it.tenant.name == name);
    found.unwrap().used_bytes / PAGE
}

/// Stores single chunks one after the other.
fn pour(cache: &Cache, salt: &str, chunks: std::ops::Range<u32>) {
    for chunk in chunks {
        cache.store_unchecked(&keys_of(salt, 0, chunk..chunk + 1), u64::from(chunk));
    }
}

#[test]
fn a_tenant_that_writes_ten_times_the_pool_leaves_an_idle_one_its_whole_floor() {
    for policy in [
        PolicyKind::Lru,
        PolicyKind::Arc,
        PolicyKind::S3Fifo,
        PolicyKind::IsolatedLru,
    ] {
        let cache = open(EngineConfig {
            tenants: vec![tenant("quiet", &["q"], budget(30, 1, None))],
            policy,
            // The watermark evicts for nobody in particular, and must keep the floor too.
            trigger_watermark: 0.8,
            eviction_ratio: 0.2,
            ..config(100, Backing::Private)
        });
        pour(&cache, "q", 0..30);
        for round in 0..10 {
            pour(&cache, "noisy", round * 100..(round + 1) * 100);
            cache.maintain();
            cache.check_invariants().unwrap();
        }
        assert_eq!(used(&cache, "quiet"), 30, "{policy}");
        for chunk in 0..30 {
            let key = keys_of("q", 0, chunk..chunk + 1);
            assert_eq!(
                cache.fetch(&key).unwrap()[0],
                bytes_of(chunk.into(), OBJECT)
            );
        }
        assert!(cache.status().evicted_objects > 900, "{policy}");
    }
}

#[test]
fn what_lies_above_a_floor_goes_before_anybody_elses_floor() {
    let cache = with_tenants(
        10,
        vec![
            tenant("a", &["a"], budget(4, 1, None)),
            tenant("b", &["b"], budget(2, 1, None)),
        ],
    );
    pour(&cache, "a", 0..4);
    pour(&cache, "b", 0..6);
    pour(&cache, "c", 0..3);
    // b was 4 above its floor, and gave 2; then c would be above b.
    assert_eq!((used(&cache, "a"), used(&cache, "b")), (4, 4));
    assert_eq!(cache.present(&keys_of("b", 0, 0..3)), [false, false, true]);
    pour(&cache, "c", 3..40);
    assert_eq!((used(&cache, "a"), used(&cache, "b")), (4, 4));
    assert_eq!(used(&cache, "everybody else"), 2);
}

#[test]
fn room_is_shared_by_weight_and_idle_parts_are_lent() {
    let cache = with_tenants(
        120,
        vec![
            tenant("heavy", &["h1", "h2"], budget(0, 3, None)),
            tenant("light", &["l"], budget(0, 1, None)),
        ],
    );
    pour(&cache, "l", 0..200);
    assert_eq!(used(&cache, "light"), 120, "nobody else wants it");
    for chunk in 0..300 {
        pour(&cache, ["h1", "h2"][chunk as usize % 2], chunk..chunk + 1);
        pour(&cache, "l", 1000 + chunk..1001 + chunk);
    }
    assert_eq!((used(&cache, "heavy"), used(&cache, "light")), (90, 30));
    let shares: Vec<u64> = cache
        .budgets()
        .iter()
        .map(|it| it.share_bytes / PAGE)
        .collect();
    // Everybody else has weight 1 and uses nothing.
    assert_eq!(shares, [24, 72, 24]);
}

#[test]
fn the_oldest_of_the_fullest_tenant_goes_first() {
    let cache = with_tenants(8, vec![tenant("a", &["a"], budget(0, 1, None))]);
    pour(&cache, "a", 0..2);
    pour(&cache, "b", 0..6);
    cache.touch(&keys_of("b", 0, 0..1));
    pour(&cache, "a", 2..4);
    // The oldest objects of all are a's, but b has more.
    assert_eq!(cache.present(&keys_of("a", 0, 0..4)), [true; 4]);
    let b = cache.present(&keys_of("b", 0, 0..6));
    assert_eq!(b, [true, false, false, true, true, true]);
}

#[test]
fn at_its_cap_a_tenant_gives_keys_of_its_own_though_the_pool_has_room() {
    let cache = with_tenants(20, vec![tenant("a", &["a"], budget(0, 1, Some(4)))]);
    pour(&cache, "b", 0..3);
    pour(&cache, "a", 0..6);
    assert_eq!(used(&cache, "a"), 4);
    let present = cache.present(&keys_of("a", 0, 0..6));
    assert_eq!(present, [false, false, true, true, true, true]);
    assert_eq!(cache.present(&keys_of("b", 0, 0..3)), [true; 3]);
    assert_eq!(cache.status().used_bytes, 7 * PAGE);

    // What is in use cannot go, so the store fails, evicts nothing, and says why.
    let owner = cache.new_owner();
    for chunk in 2..5 {
        cache.lock_prefix(owner, &[keys_of("a", 0, chunk..chunk + 1)], 1);
    }
    let before = cache.status().evicted_objects;
    let result = cache.reserve(owner, &keys_of("a", 0, 10..12), OBJECT);
    assert_eq!(
        result,
        Err(ReserveError::CapReached {
            needed_bytes: 2 * PAGE,
            cap_bytes: 4 * PAGE,
            used_bytes: 4 * PAGE,
            evictable_bytes: PAGE,
        })
    );
    assert_eq!(cache.status().evicted_objects, before);
    assert!(
        cache
            .reserve(owner, &keys_of("a", 0, 10..11), OBJECT)
            .is_ok()
    );
    assert!(
        matches!(
            cache.reserve(owner, &keys_of("a", 0, 20..25), OBJECT),
            Err(ReserveError::CapReached { .. })
        ),
        "more than the cap in one go"
    );
    cache.check_invariants().unwrap();
}

#[test]
fn a_floor_is_for_others_only() {
    let cache = with_tenants(10, vec![tenant("a", &["a"], budget(6, 1, None))]);
    pour(&cache, "a", 0..6);
    let other = cache.new_owner();
    let (lease, _) = cache.reserve_all(other, &keys_of("b", 0, 0..4));
    // b can have no fifth page, whatever is evictable of a.
    assert_eq!(
        cache.reserve(other, &keys_of("b", 0, 4..5), OBJECT),
        Err(ReserveError::PoolFull {
            needed_bytes: PAGE,
            free_bytes: 0,
            evictable_bytes: 0,
        })
    );
    // a itself goes on, at the cost of its own.
    pour(&cache, "a", 6..9);
    assert_eq!(used(&cache, "a"), 6);
    cache.abort(other, lease).unwrap();
    cache.check_invariants().unwrap();
}

#[test]
fn an_object_that_would_take_its_tenant_below_the_floor_stays() {
    let cache = with_tenants(10, vec![tenant("a", &["a"], budget(5, 1, None))]);
    let owner = cache.new_owner();
    let large = cache
        .reserve(owner, &keys_of("a", 0, 0..2), 3 * PAGE)
        .unwrap();
    for (index, slot) in large.slots {
        cache.write_bytes(
            owner,
            large.lease.unwrap(),
            index,
            &bytes_of(0, slot.length),
        );
    }
    cache.commit(owner, large.lease.unwrap()).unwrap();
    // 6 pages, 1 above the floor, in objects of 3: none may go for another.
    pour(&cache, "b", 0..20);
    assert_eq!((used(&cache, "a"), used(&cache, "everybody else")), (6, 4));
    // Nor may a place be made by address.
    let reserved = cache.reserve(owner, &keys_of("b", 0, 50..51), 5 * PAGE);
    assert!(
        matches!(reserved, Err(ReserveError::PoolFull { .. })),
        "{reserved:?}"
    );
    assert_eq!(used(&cache, "a"), 6);
    cache.check_invariants().unwrap();
}

#[test]
fn a_budget_that_is_set_later_counts_what_is_there() {
    let cache = private(20);
    pour(&cache, "a", 0..10);
    pour(&cache, "b", 0..10);
    let owner = cache.new_owner();
    let locked = cache.lock_prefix(owner, &[keys_of("a", 0, 3..4)], 1);
    let (_, slots) = {
        cache.set_budget(&salt("x"), budget(2, 1, None)).unwrap();
        cache.reserve_all(owner, &keys_of("a", 0, 30..31))
    };
    assert_eq!(slots.len(), 1);
    cache
        .set_budget(&salt("a"), budget(8, 1, Some(10)))
        .unwrap();
    assert_eq!(used(&cache, "a"), 10);
    assert_eq!(used(&cache, "everybody else"), 10 - 1 + 1);
    cache.check_invariants().unwrap();
    pour(&cache, "b", 10..40);
    assert_eq!(used(&cache, "a"), 10, "b was further above its share");
    cache.set_budget(&salt("b"), budget(10, 1, None)).unwrap();
    pour(&cache, "c", 0..20);
    assert_eq!((used(&cache, "a"), used(&cache, "b")), (9, 10));
    // A lower cap takes effect at the next round of maintenance, but not on what is held.
    cache.set_budget(&salt("a"), budget(0, 1, Some(0))).unwrap();
    cache.maintain();
    assert_eq!(used(&cache, "a"), 2, "one locked, one reserved");
    cache.release_prefix(owner, locked.lease.unwrap(), 0..1, 1);
    cache.maintain();
    assert_eq!(used(&cache, "a"), 1);
    assert!(cache.remove_budget(&salt("a")));
    assert!(!cache.remove_budget(&salt("a")));
    let names: Vec<_> = cache
        .budgets()
        .iter()
        .map(|it| it.tenant.name.to_string())
        .collect();
    assert_eq!(names, ["everybody else", "x", "b"]);
    cache.check_invariants().unwrap();
}

#[test]
fn salts_of_one_tenant_share_its_budget_and_the_rest_can_have_one_too() {
    let cache = with_tenants(
        20,
        vec![
            tenant("team", &["s1", "s2"], budget(0, 1, Some(6))),
            tenant("visitors", &[], budget(0, 1, Some(4))),
        ],
    );
    pour(&cache, "s1", 0..5);
    pour(&cache, "s2", 0..5);
    pour(&cache, "", 0..3);
    pour(&cache, "unknown", 0..3);
    assert_eq!((used(&cache, "team"), used(&cache, "visitors")), (6, 4));
    cache
        .set_budget(&salt("s2"), budget(0, 1, Some(8)))
        .unwrap();
    pour(&cache, "s1", 5..20);
    assert_eq!(used(&cache, "team"), 8, "a salt's budget is its tenant's");
    cache.set_budget(&salt(""), budget(0, 1, None)).unwrap();
    assert_eq!(used(&cache, "_default"), 1);
}

#[test]
fn budgets_that_cannot_be_honoured_are_refused_by_name() {
    let refused = |tenants: Vec<Tenant>| {
        let config = EngineConfig {
            tenants,
            ..config(10, Backing::Private)
        };
        match CacheEngine::open(config) {
            Err(CacheError::Budget(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let floors = refused(vec![
        tenant("a", &["a"], budget(6, 1, None)),
        tenant("b", &["b"], budget(5, 1, None)),
    ]);
    assert_eq!(
        floors,
        "floor of 20480 bytes of tenant `b` does not fit: other floors leave 16384 bytes of \
         the pool: lower a floor or raise --l1-size-gb"
    );
    let cap = refused(vec![tenant("a", &["a"], budget(6, 1, Some(5)))]);
    assert!(cap.contains("cap of 20480 bytes of tenant `a`"), "{cap}");
    let twice = refused(vec![
        tenant("a", &["a", "x"], budget(0, 1, None)),
        tenant("b", &["x"], budget(0, 1, None)),
    ]);
    assert!(
        twice.starts_with("cache_salt `x` belongs to tenant `a`"),
        "{twice}"
    );

    let cache = private(10);
    cache.set_budget(&salt("a"), budget(6, 1, None)).unwrap();
    let too_much = cache.set_budget(&salt("b"), budget(5, 1, None));
    assert!(matches!(
        too_much,
        Err(BudgetError::FloorsExceedPool { .. })
    ));
    cache.set_budget(&salt("a"), budget(5, 1, None)).unwrap();
    cache.set_budget(&salt("b"), budget(5, 1, None)).unwrap();
    for nth in 2..MAX_TENANTS {
        cache
            .set_budget(&salt(&format!("t{nth}")), Budget::default())
            .unwrap();
    }
    let one_more = cache.set_budget(&salt("more"), Budget::default());
    assert_eq!(one_more, Err(BudgetError::TooMany { limit: MAX_TENANTS }));
    assert_eq!(cache.budgets().len(), MAX_TENANTS + 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is stored by whom, and whatever is in use: no store pushes another tenant
    /// below its floor, and none takes its own beyond its cap.
    #[test]
    fn floors_and_caps_hold_whatever_is_stored(
        budgets in prop::collection::vec((0..5_u64, 1..5_u32, prop::option::of(5..12_u64)), 3),
        policy in prop::sample::select(&PolicyKind::ALL[..4]),
        ops in prop::collection::vec((0..5_usize, 0..30_u32, 1..4_u64, 1..3_u32, 0..6_u8), 1..150),
    ) {
        const SALTS: [&str; 5] = ["a", "b", "c", "d", ""];
        let tenants = budgets.iter().zip(SALTS).map(|(&(floor, weight, cap), name)| {
            tenant(name, &[name], budget(floor, weight, cap))
        });
        let cache = open(EngineConfig {
            tenants: tenants.collect(),
            policy,
            trigger_watermark: 0.9,
            eviction_ratio: 0.3,
            ..config(24, Backing::Private)
        });
        let holder = cache.new_owner();
        for (who, chunk, pages, count, what) in ops {
            let before = cache.budgets();
            let salt = SALTS[who];
            match what {
                0 => drop(cache.lock_prefix(holder, &[keys_of(salt, 0, chunk..chunk + 1)], 1)),
                1 => cache.touch(&keys_of(salt, 0, chunk..chunk + count)),
                2 => cache.maintain(),
                3 => cache.clock.advance(READ_TTL / 4),
                _ => {
                    let owner = cache.new_owner();
                    let keys = keys_of(salt, 0, chunk..chunk + count);
                    if let Ok(reservation) = cache.reserve(owner, &keys, pages * PAGE)
                        && let Some(lease) = reservation.lease
                    {
                        for (index, slot) in reservation.slots {
                            cache.write_bytes(owner, lease, index, &bytes_of(1, slot.length));
                        }
                        cache.commit(owner, lease).unwrap();
                    }
                    cache.end_owner(owner);
                }
            }
            cache.check_invariants().unwrap();
            for (before, after) in before.iter().zip(cache.budgets()) {
                let budget = after.tenant.budget;
                let is_asking = after.tenant.salts.iter().any(|it| it.as_str() == salt)
                    || after.tenant.salts.is_empty() && who >= 3;
                let kept = before.used_bytes.min(budget.floor_bytes);
                prop_assert!(is_asking || after.used_bytes >= kept, "{before:?} {after:?}");
                prop_assert!(budget.cap_bytes.is_none_or(|cap| after.used_bytes <= cap));
            }
        }
    }
}

#[test]
fn tenants_of_another_configuration_take_the_place_of_the_last_ones() {
    let before = vec![
        tenant("kept", &["k"], budget(10, 1, None)),
        tenant("changed", &["c", "moved"], budget(10, 1, None)),
        tenant("gone", &["g"], budget(40, 1, Some(40))),
        tenant("rest", &[], budget(5, 1, None)),
    ];
    let cache = with_tenants(100, before.clone());
    cache
        .set_budget(&salt("k"), budget(10, 1, Some(50)))
        .unwrap();
    cache
        .set_budget(&salt("set-apart"), budget(0, 1, Some(7)))
        .unwrap();
    for text in ["k", "c", "moved", "g", "x"] {
        pour(&cache, text, 0..3);
    }
    // Floors that would not fit change nothing.
    let too_much = vec![tenant("kept", &["k"], budget(200, 1, None))];
    assert!(cache.replace_tenants(&before, &too_much).is_err());
    assert_eq!(used(&cache, "gone"), 3);

    let after = vec![
        tenant("kept", &["k"], budget(10, 1, None)),
        tenant("changed", &["c"], budget(60, 2, None)),
        tenant("new", &["moved", "set-apart"], budget(20, 1, None)),
    ];
    cache.replace_tenants(&before, &after).unwrap();
    cache.check_invariants().unwrap();
    let budgets = cache.budgets();
    let mut names: Vec<&str> = budgets.iter().map(|it| &*it.tenant.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["changed", "everybody else", "kept", "new"]);
    let of = |name: &str| budgets.iter().find(|it| &*it.tenant.name == name).unwrap();
    assert_eq!(of("changed").tenant.budget, budget(60, 2, None));
    // What was set while it ran holds as long as the configuration says nothing new.
    assert_eq!(of("kept").tenant.budget, budget(10, 1, Some(50)));
    assert_eq!(of("everybody else").tenant.budget, budget(0, 1, None));
    for (name, pages) in [
        ("kept", 3),
        ("changed", 3),
        ("new", 3),
        ("everybody else", 6),
    ] {
        assert_eq!(used(&cache, name), pages, "{name}");
    }
    cache.replace_tenants(&after, &before).unwrap();
    cache.check_invariants().unwrap();
    assert_eq!(
        (
            used(&cache, "changed"),
            used(&cache, "gone"),
            used(&cache, "rest")
        ),
        (6, 3, 3)
    );
}

#[test]
fn a_clearing_of_some_salts_leaves_the_others() {
    let cache = with_tenants(100, Vec::new());
    for text in ["a", "b", "c"] {
        pour(&cache, text, 0..5);
    }
    let cleared = cache.clear_where(false, &|salt| salt.as_str() == "b");
    assert_eq!(cleared.removed, 5);
    cache.check_invariants().unwrap();
    let salts = cache.status().salts;
    let left: Vec<&str> = salts.iter().map(|it| it.cache_salt.as_str()).collect();
    assert_eq!(left, ["a", "c"]);
}

#[test]
fn what_is_purged_is_nowhere_in_the_pool() {
    // Pages of 4 KiB with objects that leave a tail, as evictions and aborts leave traces.
    let cache = with_tenants(64, vec![tenant("leaves", &["l"], budget(0, 1, None))]);
    pour(&cache, "l", 0..40);
    pour(&cache, "stays", 0..10);
    pour(&cache, "l", 100..140);
    let of_l = |salt: &CacheSalt| salt.as_str() == "l";
    let (digests, count) = cache.digests(&of_l, 10);
    assert_eq!(digests.len(), 10);
    assert!(count > 10);
    cache.clear_where(true, &of_l);
    let scrubbed = cache.scrub().unwrap();
    assert!(scrubbed >= 40 * PAGE, "{scrubbed}");
    assert_eq!(cache.forget_histories(&[salt("l")]), 1);
    cache.check_invariants().unwrap();
    assert_eq!(cache.digests(&of_l, 10), (Vec::new(), 0));
    assert_eq!(used(&cache, "everybody else"), 10);
    // Its memory can be used again.
    pour(&cache, "l", 0..40);
    cache.check_invariants().unwrap();
}
