//! Orders from outside, hints, and listings: what others than the native policy may say and see.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use stockade_cache::{
    Backing, Budget, CacheSalt, Candidate, EngineConfig, ObjectKey, PolicyKind, Ranker, Tenant,
};

use crate::fixture::*;

/// A pool that at a watermark of half of it evicts half of what is used.
fn watermarked(pages: u64, policy: PolicyKind) -> Cache {
    open(EngineConfig {
        policy,
        trigger_watermark: 0.5,
        eviction_ratio: 0.5,
        ..config(pages, Backing::Private)
    })
}

type Order = Box<dyn Fn(&[Candidate]) -> Option<Vec<u32>> + Send + Sync>;

/// Answers as it is told, and notes what it was shown.
struct Told {
    order: Order,
    shown: Mutex<Vec<Vec<Candidate>>>,
}

impl Told {
    fn new(order: impl Fn(&[Candidate]) -> Option<Vec<u32>> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            order: Box::new(order),
            shown: Mutex::default(),
        })
    }
}

impl Ranker for Told {
    fn ranks(&self, tenant: &str) -> bool {
        tenant != "native"
    }

    fn rank(
        &self,
        _tenant: &Arc<str>,
        _bytes_wanted: u64,
        candidates: Vec<Candidate>,
    ) -> Option<Vec<u32>> {
        let order = (self.order)(&candidates);
        self.shown.lock().unwrap().push(candidates);
        order
    }
}

fn last_first(candidates: &[Candidate]) -> Option<Vec<u32>> {
    Some((0..candidates.len() as u32).rev().collect())
}

/// Stores chunks one by one, oldest first.
fn pour(cache: &Cache, chunks: std::ops::Range<u32>) -> Vec<ObjectKey> {
    for chunk in chunks.clone() {
        cache.store_unchecked(&keys(chunk..chunk + 1), u64::from(chunk));
    }
    keys(chunks)
}

fn left(cache: &Cache, keys: &[ObjectKey]) -> Vec<usize> {
    let present = cache.present(keys);
    let left = present.iter().enumerate().filter(|(_, is)| **is);
    left.map(|(nth, _)| nth).collect()
}

#[test]
fn the_order_from_outside_is_taken() {
    for policy in [
        PolicyKind::Lru,
        PolicyKind::Arc,
        PolicyKind::S3Fifo,
        PolicyKind::IsolatedLru,
    ] {
        let cache = watermarked(16, policy);
        let ranker = Told::new(last_first);
        cache.set_ranker(Arc::clone(&ranker) as _);
        let all = pour(&cache, 0..8);
        cache.maintain();
        cache.check_invariants().unwrap();
        // All eight were shown, half of them went: the newest.
        assert_eq!(ranker.shown.lock().unwrap()[0].len(), 8, "{policy}");
        assert_eq!(left(&cache, &all), [0, 1, 2, 3], "{policy}");
        assert_eq!(cache.status().ranked_evicted_objects, 4, "{policy}");
    }
}

#[test]
fn those_that_are_left_out_follow_in_native_order_and_strangers_are_nothing() {
    let cache = watermarked(16, PolicyKind::Lru);
    cache.set_ranker(Told::new(|_| Some(vec![7, 4_000_000, 7])));
    let all = pour(&cache, 0..8);
    cache.maintain();
    cache.check_invariants().unwrap();
    assert_eq!(left(&cache, &all), [3, 4, 5, 6]);
    assert_eq!(cache.status().ranked_evicted_objects, 1);
}

#[test]
fn without_an_order_it_is_the_native_one() {
    let cache = watermarked(16, PolicyKind::Lru);
    let ranker = Told::new(|_| None);
    cache.set_ranker(Arc::clone(&ranker) as _);
    let all = pour(&cache, 0..8);
    cache.maintain();
    assert_eq!(left(&cache, &all), [4, 5, 6, 7]);
    assert_eq!(cache.status().ranked_evicted_objects, 0);
    assert!(!ranker.shown.lock().unwrap().is_empty());
}

/// A tenant with a cap, whose keys are ranked, is kept below it by its ranker; one without is left
/// alone until it needs the room, and nobody else gives for either.
#[test]
fn a_tenant_that_is_ranked_gives_at_the_watermark_of_its_cap() {
    let budget = |floor_pages: u64| Budget {
        floor_bytes: floor_pages * PAGE,
        weight: std::num::NonZeroU32::MIN,
        cap_bytes: Some(8 * PAGE),
    };
    let tenant = |name: &str, salt: &str, floor_pages| Tenant {
        name: name.into(),
        salts: vec![CacheSalt::parse(salt).unwrap()],
        budget: budget(floor_pages),
    };
    let cache = open(EngineConfig {
        trigger_watermark: 0.75,
        eviction_ratio: 0.5,
        tenants: vec![
            tenant("ranked", "r", 0),
            tenant("native", "n", 0),
            tenant("safe", "s", 6),
        ],
        ..config(64, Backing::Private)
    });
    let ranker = Told::new(last_first);
    cache.set_ranker(Arc::clone(&ranker) as _);
    let pour = |salt: &str, chunks: std::ops::Range<u32>| {
        for chunk in chunks.clone() {
            cache.store_unchecked(&keys_of(salt, 0, chunk..chunk + 1), u64::from(chunk));
        }
        keys_of(salt, 0, chunks)
    };
    // Below three quarters of its cap, nothing is asked.
    let mut all = pour("r", 0..5);
    cache.maintain();
    assert_eq!(ranker.shown.lock().unwrap().len(), 0);
    all.extend(pour("r", 5..6));
    let native = pour("n", 0..7);
    let safe = pour("s", 0..6);
    cache.maintain();
    cache.check_invariants().unwrap();
    assert_eq!(left(&cache, &all), [0, 1, 2], "the newest half went");
    assert_eq!(left(&cache, &native).len(), 7);
    // What is below its floor is not asked for, and an empty list is nobody's to rank.
    assert_eq!(left(&cache, &safe).len(), 6);
    let shown = ranker.shown.lock().unwrap();
    assert_eq!(shown.iter().map(Vec::len).collect::<Vec<_>>(), [6]);
    assert_eq!(cache.status().ranked_evicted_objects, 3);
}

#[test]
fn a_ranker_that_fails_at_a_cap_costs_the_native_order() {
    let cache = open(EngineConfig {
        trigger_watermark: 0.75,
        eviction_ratio: 0.5,
        tenants: vec![Tenant {
            name: "ranked".into(),
            salts: vec![CacheSalt::parse("r").unwrap()],
            budget: Budget {
                cap_bytes: Some(8 * PAGE),
                ..Budget::default()
            },
        }],
        ..config(64, Backing::Private)
    });
    cache.set_ranker(Told::new(|_| None));
    for chunk in 0..6 {
        cache.store_unchecked(&keys_of("r", 0, chunk..chunk + 1), u64::from(chunk));
    }
    cache.maintain();
    cache.check_invariants().unwrap();
    assert_eq!(left(&cache, &keys_of("r", 0, 0..6)), [3, 4, 5]);
}

#[test]
fn what_changed_while_it_was_ranked_stays() {
    let cache = Arc::new(watermarked(16, PolicyKind::Lru));
    let owner = cache.new_owner();
    let inner = Arc::downgrade(&cache);
    cache.set_ranker(Told::new(move |candidates| {
        let cache = inner.upgrade().unwrap();
        // Meanwhile one is locked, one used, and one evicted and stored anew.
        cache.lock_prefix(owner, &[keys(7..8)], 1);
        cache.clock.advance(Duration::from_millis(5));
        cache.hits(&keys(6..7));
        cache.withdraw(&keys(5..6));
        cache.store_unchecked(&keys(5..6), 0);
        last_first(candidates)
    }));
    let all = pour(&cache, 0..8);
    cache.maintain();
    cache.check_invariants().unwrap();
    assert_eq!(left(&cache, &all), [0, 5, 6, 7]);
    cache.end_owner(owner);
    cache.check_invariants().unwrap();
}

#[test]
fn candidates_say_how_they_were_used() {
    let cache = watermarked(16, PolicyKind::Lru);
    let ranker = Told::new(|_| None);
    cache.set_ranker(Arc::clone(&ranker) as _);
    // The first time, counting begins.
    pour(&cache, 0..8);
    cache.maintain();
    let prompt = keys(20..22);
    cache.store_unchecked(&prompt, 1);
    cache.clock.advance(Duration::from_secs(2));
    cache.hits(&prompt);
    cache.clock.advance(Duration::from_secs(3));
    cache.touch_for(&prompt, Some(&"request".into()));
    cache.clock.advance(Duration::from_secs(4));
    pour(&cache, 30..32);
    cache.maintain();
    let shown = ranker.shown.lock().unwrap();
    let second = shown
        .iter()
        .flatten()
        .find(|candidate| candidate.key == prompt[1])
        .unwrap();
    assert_eq!((second.chunk, second.uses), (Some(1), 1));
    assert_eq!(second.idle, Duration::from_secs(4));
    assert_eq!(second.age, Duration::from_secs(9));
    assert_eq!(second.request.as_deref(), Some("request"));
    assert_eq!(second.bytes, PAGE);
}

#[test]
fn what_is_to_be_kept_goes_last_and_for_a_time_only() {
    let minute = Duration::from_secs(60);
    for policy in [PolicyKind::Lru, PolicyKind::Arc, PolicyKind::S3Fifo] {
        let cache = watermarked(16, policy);
        let all = pour(&cache, 0..8);
        assert_eq!(cache.keep(&keys([0, 1, 99]), 1, minute), Some(2));
        cache.maintain();
        cache.check_invariants().unwrap();
        assert_eq!(left(&cache, &all), [0, 1, 6, 7], "{policy}");
        // Also against stores, until nothing else is left.
        cache.store_unchecked(&keys(100..114), 0);
        assert_eq!(left(&cache, &all), [0, 1], "{policy}");
        cache.withdraw(&keys(100..114));
        cache.store_unchecked(&keys(200..215), 0);
        assert_eq!(left(&cache, &all).len(), 1, "{policy}");
        cache.check_invariants().unwrap();
    }
}

#[test]
fn a_hint_ends_with_its_time_its_holder_or_by_asking() {
    let minute = Duration::from_secs(60);
    let ends: [fn(&Cache); 3] = [
        |cache| cache.clock.advance(Duration::from_secs(61)),
        |cache| cache.end_holder(1),
        |cache| assert_eq!(cache.end_keeping(&keys([0, 1]), 1), 2),
    ];
    for end in ends {
        let cache = watermarked(16, PolicyKind::Lru);
        let all = pour(&cache, 0..8);
        cache.keep(&keys([0, 1]), 1, minute).unwrap();
        // Another's hint at one of them has an end of its own, and is none any more.
        cache.keep(&keys([1]), 2, minute).unwrap();
        assert_eq!(cache.end_keeping(&keys([1]), 2), 1);
        cache.maintain();
        assert_eq!(left(&cache, &all), [0, 1, 6, 7]);
        end(&cache);
        cache.maintain();
        pour(&cache, 20..24);
        cache.maintain();
        cache.check_invariants().unwrap();
        assert!(!left(&cache, &all).contains(&0));
    }
}

#[test]
fn a_listing_shows_every_key_of_a_scope_once() {
    let cache = private(2000);
    for (salt, chunks) in [("a", 0..700), ("b", 0..400)] {
        cache.store_unchecked(&keys_of(salt, 0, chunks), 1);
    }
    let mut found = Vec::new();
    let mut start = Some(0);
    while let Some(at) = start {
        let (page, next) = cache.list(at, 100, &|scope| scope.cache_salt.as_str() == "b");
        assert!(page.len() <= 100);
        found.extend(page.into_iter().map(|listed| listed.key.chunk_hash));
        start = next;
    }
    found.sort_unstable();
    let mut expected: Vec<_> = keys_of("b", 0, 0..400)
        .into_iter()
        .map(|key| key.chunk_hash)
        .collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

proptest! {
    /// Whatever the order is, as many bytes go as without it, and every sum still holds.
    #[test]
    fn no_order_breaks_the_engine(
        order in proptest::collection::vec(0_u32..40, 0..40),
        kept in proptest::collection::vec(0_u32..32, 0..8),
        policy in proptest::sample::select(vec![PolicyKind::Lru, PolicyKind::Arc, PolicyKind::S3Fifo]),
    ) {
        let run = |order: Option<Vec<u32>>| {
            let cache = watermarked(40, policy);
            cache.set_ranker(Told::new(move |_| order.clone()));
            for chunk in 0..32 {
                let salt = if chunk % 3 == 0 { "a" } else { "" };
                cache.store_unchecked(&keys_of(salt, 0, chunk..chunk + 1), 1);
                if chunk % 8 == 7 {
                    cache.keep(&keys(kept.clone()), 1, Duration::from_secs(1)).unwrap();
                    cache.maintain();
                    cache.check_invariants().unwrap();
                }
            }
            cache.status().used_bytes
        };
        prop_assert_eq!(run(Some(order)), run(None));
    }
}
