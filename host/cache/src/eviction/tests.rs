//! Policies as transcripts that can be checked by eye, and one rule for all of them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::arc::Arc;
use super::isolated_lru::IsolatedLru;
use super::lru::Lru;
use super::noop::Noop;
use super::s3_fifo::S3Fifo;
use super::*;

/// Runs a script against a policy and compares the victims, in order.
///
/// A key is a word; `salt/key` puts it under a salt. `insert` and `touch` go one by one;
/// `batch` and `hit` go the way the core goes through the chunks of a prefix: last first.
/// `pin` keeps a key from being evicted, as a read lock does, and `unpin` ends that.
fn check(mut policy: impl EvictionPolicy, script: &str, expected: &str) {
    let mut ids: BTreeMap<String, EntryId> = BTreeMap::new();
    let mut names: Vec<String> = Vec::new();
    let mut pinned: BTreeSet<EntryId> = BTreeSet::new();
    let mut victims = Vec::new();
    for step in script.split(';') {
        let mut words = step.split_whitespace();
        let verb = words.next().unwrap();
        let mut keys: Vec<&str> = words.collect();
        if verb == "evict" {
            for _ in 0..keys[0].parse().unwrap() {
                while let Some(id) = policy.take() {
                    if pinned.contains(&id) {
                        policy.park(id);
                        continue;
                    }
                    policy.evicted(id);
                    victims.push(names[id as usize].clone());
                    break;
                }
            }
            continue;
        }
        if matches!(verb, "batch" | "hit") {
            keys.reverse();
        }
        for key in keys {
            let id = *ids.entry(key.to_owned()).or_insert_with(|| {
                names.push(key.to_owned());
                names.len() as EntryId - 1
            });
            let salt = key.split_once('/').map_or("", |(salt, _)| salt);
            let facts = EntryFacts {
                fingerprint: u64::from(id) + 1000,
                salt: salt.bytes().map(u32::from).sum(),
                weight: 10,
            };
            match verb {
                "insert" | "batch" => policy.insert(id, facts),
                "touch" | "hit" => policy.touch(id),
                "end" => policy.session_ended(id),
                "remove" => policy.remove(id),
                "pin" => assert!(pinned.insert(id)),
                "unpin" => {
                    assert!(pinned.remove(&id));
                    policy.restore(id);
                }
                verb => panic!("no such verb: {verb}"),
            }
        }
    }
    assert_eq!(victims.join(" "), expected, "{script}");
}

#[test]
fn lru_evicts_the_key_touched_longest_ago() {
    check(Lru::default(), "insert a b c; touch a; evict 1", "b");
    check(Lru::default(), "insert a b c; evict 3", "a b c");
    check(Lru::default(), "insert a b; insert a; evict 2", "b a");
    check(Lru::default(), "insert a; touch b; remove a; evict 1", "");
    check(Lru::default(), "insert a b c; end a; evict 3", "b c a");
}

#[test]
fn the_last_chunk_of_a_prefix_goes_first() {
    check(Lru::default(), "batch p1 p2 p3; evict 3", "p3 p2 p1");
    check(
        Lru::default(),
        "batch p1 p2 p3; batch q1 q2; hit p1 p2 p3; evict 5",
        "q2 q1 p3 p2 p1",
    );
    check(Arc::default(), "batch p1 p2 p3; evict 3", "p3 p2 p1");
    check(S3Fifo::default(), "batch p1 p2 p3; evict 3", "p3 p2 p1");
    check(
        IsolatedLru::default(),
        "batch p1 p2 p3; evict 3",
        "p3 p2 p1",
    );
}

#[test]
fn a_pinned_key_is_replaced_by_the_next_and_keeps_its_rank() {
    check(Lru::default(), "insert a b c; pin b; evict 2", "a c");
    check(
        Lru::default(),
        "insert a b c; pin a; evict 1; unpin a; evict 1",
        "b a",
    );
    check(
        Lru::default(),
        "insert a b c; pin a; evict 1; touch a; unpin a; evict 2",
        "b c a",
    );
    check(
        Arc::default(),
        "insert a b c; pin a; evict 1; unpin a; evict 1",
        "b a",
    );
    check(
        S3Fifo::default(),
        "insert a b c; pin a; evict 1; unpin a; evict 1",
        "b a",
    );
    check(
        IsolatedLru::default(),
        "insert x/a x/b x/c; pin x/a; evict 1; unpin x/a; evict 1",
        "x/b x/a",
    );
}

#[test]
fn arc_spares_what_was_used_again() {
    check(Arc::default(), "insert a b c; touch a; evict 3", "b c a");
    // Without ghosts the target is zero, so what was seen once always goes first.
    check(
        Arc::default(),
        "insert a b; touch a b; insert c d; evict 3",
        "c d a",
    );
}

#[test]
fn arc_learns_from_what_comes_back() {
    // The ghost of `a` is in B1: its return raises the target of T1 to 1, and `a` starts
    // in T1 again. T1 (a) is at its target, so it gives the victim; then T2 in turn.
    check(
        Arc::default(),
        "insert a b; touch b; evict 1; insert a; evict 2",
        "a a b",
    );
    // Two returns raise the target to 2: T1 holds one entry, so T2 gives the victim.
    check(
        Arc::default(),
        "insert a b c d; touch c d; evict 2; insert a b; remove b; evict 1",
        "a b c",
    );
    // A removal that was no eviction leaves no ghost, so the target stays at zero.
    check(
        Arc::default(),
        "insert a b c d; touch c d; remove a b; insert a b; remove b; evict 1",
        "a",
    );
}

#[test]
fn isolated_lru_takes_from_the_salt_that_holds_most() {
    check(
        IsolatedLru::default(),
        "insert a/1 a/2 b/1 b/2 b/3; touch b/1; evict 3",
        "b/2 b/3 a/1",
    );
    check(
        IsolatedLru::default(),
        "insert a/1; insert b/1 b/2 b/3; evict 2; insert a/2 a/3; evict 2",
        "b/1 b/2 a/1 a/2",
    );
    // What is pinned still counts against its salt.
    check(
        IsolatedLru::default(),
        "insert a/1 b/1 b/2 b/3; pin b/1 b/2; evict 2",
        "b/3 a/1",
    );
}

#[test]
fn s3_fifo_lets_one_time_keys_pass_and_keeps_the_used_ones() {
    check(S3Fifo::default(), "insert a b c; touch a; evict 3", "b c a");
    // A key that returns while it is remembered starts in the main queue.
    check(
        S3Fifo::default(),
        "insert a b c d; evict 1; insert a; insert e f; evict 5",
        "a b c d e f",
    );
    // That a session ended is no use: every key that is stored has one.
    check(S3Fifo::default(), "insert a b; end a; evict 2", "a b");
    check(
        S3Fifo::default(),
        "insert a b; pin a; evict 1; end a; unpin a; evict 1",
        "b a",
    );
    // Three uses are three more rounds, not more.
    check(
        S3Fifo::default(),
        "insert a b; touch a a a a a a; evict 2",
        "b a",
    );
}

#[test]
fn s3_fifo_does_not_go_round_a_large_cache_for_one_victim() {
    let mut policy = S3Fifo::default();
    for id in 0..10_000 {
        policy.insert(
            id,
            EntryFacts {
                fingerprint: id.into(),
                salt: 0,
                weight: 1,
            },
        );
        policy.touch(id);
    }
    let victim = policy.take().unwrap();
    assert_eq!(victim, 256, "the first that was not spared");
}

#[test]
fn noop_gives_nothing_up() {
    check(Noop, "insert a b; touch a; evict 2", "");
    assert!(Noop.is_empty());
}

#[test]
fn policies_are_chosen_by_lmcaches_names() {
    for kind in PolicyKind::ALL {
        assert_eq!(kind.name().parse(), Ok(kind));
        assert_eq!(kind.build().len(), 0);
    }
    let error = "lru".parse::<PolicyKind>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "eviction policy `lru` is unknown: use LRU, ARC, IsolatedLRU, S3FIFO or noop"
    );
}

#[derive(Debug, Clone)]
enum Op {
    Insert(EntryId),
    Touch(EntryId),
    Evict,
    Park,
    TakeAndUndo(usize),
    Restore(EntryId),
    Remove(EntryId),
}

fn op() -> impl Strategy<Value = Op> {
    let id = 0..24_u32;
    prop_oneof![
        4 => id.clone().prop_map(Op::Insert),
        3 => id.clone().prop_map(Op::Touch),
        3 => Just(Op::Evict),
        1 => Just(Op::Park),
        2 => (1..6_usize).prop_map(Op::TakeAndUndo),
        1 => id.clone().prop_map(Op::Restore),
        1 => id.prop_map(Op::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the order: every key known is offered exactly once, and no other.
    #[test]
    fn a_policy_offers_every_key_it_knows_and_no_other(
        kind in prop::sample::select(&PolicyKind::ALL[..4]),
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut policy = kind.build();
        let mut known = BTreeSet::new();
        let mut parked = BTreeSet::new();
        for op in ops {
            match op {
                // The core never inserts an object twice under one number.
                Op::Insert(id) if known.insert(id) => policy.insert(id, EntryFacts {
                    fingerprint: u64::from(id % 20),
                    salt: id % 3,
                    weight: u64::from(id % 5),
                }),
                Op::Insert(_) => {}
                Op::Touch(id) => {
                    policy.touch(id);
                    parked.remove(&id);
                }
                Op::Evict => {
                    let victim = policy.take();
                    prop_assert_eq!(victim.is_none(), known.len() == parked.len());
                    if let Some(id) = victim {
                        prop_assert!(!parked.contains(&id));
                        prop_assert!(known.remove(&id));
                        policy.evicted(id);
                    }
                }
                Op::Park => {
                    if let Some(id) = policy.take() {
                        policy.park(id);
                        prop_assert!(parked.insert(id));
                    }
                }
                Op::TakeAndUndo(count) => {
                    let taken: Vec<_> = (0..count).map_while(|_| policy.take()).collect();
                    for &id in taken.iter().rev() {
                        policy.restore(id);
                    }
                }
                Op::Restore(id) => {
                    policy.restore(id);
                    parked.remove(&id);
                }
                Op::Remove(id) => {
                    policy.remove(id);
                    known.remove(&id);
                    parked.remove(&id);
                }
            }
            prop_assert_eq!(policy.len(), known.len());
        }
        for id in &parked {
            policy.restore(*id);
        }
        let mut offered = BTreeSet::new();
        while let Some(id) = policy.take() {
            policy.evicted(id);
            prop_assert!(offered.insert(id));
        }
        prop_assert_eq!(offered, known);
        prop_assert!(policy.is_empty());
    }

    /// Taking ahead and undoing it must not change who goes first.
    #[test]
    fn undoing_takes_in_reverse_leaves_the_order(
        kind in prop::sample::select(vec![PolicyKind::Lru, PolicyKind::Arc, PolicyKind::IsolatedLru]),
        ids in prop::collection::vec((0..30_u32, any::<bool>()), 1..60),
        ahead in 1..20_usize,
    ) {
        let run = |undo: bool| {
            let mut policy = kind.build();
            for &(id, touch) in &ids {
                policy.remove(id);
                policy.insert(id, EntryFacts { fingerprint: id.into(), salt: id % 3, weight: 1 });
                if touch {
                    policy.touch(id);
                }
            }
            if undo {
                let taken: Vec<_> = (0..ahead).map_while(|_| policy.take()).collect();
                for &id in taken.iter().rev() {
                    policy.restore(id);
                }
            }
            std::iter::from_fn(|| {
                let id = policy.take()?;
                policy.evicted(id);
                Some(id)
            })
            .collect::<Vec<_>>()
        };
        prop_assert_eq!(run(false), run(true));
    }
}
