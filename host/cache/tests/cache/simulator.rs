//! Replays against the engine itself, and against what is known of the policies.

use stockade_cache::simulator::{
    Simulated, SimulatedPool, Trace, TraceRequest, Workload, simulate,
};
use stockade_cache::{Backing, EngineConfig, ObjectKey, PolicyKind};

use crate::fixture::*;

fn replay(trace: &Trace, pool: &SimulatedPool) -> Simulated {
    simulate(trace, pool, &mut |_| {}).unwrap()
}

/// A pool without a watermark.
fn on_demand(pages: u64, policy: PolicyKind) -> SimulatedPool {
    SimulatedPool {
        trigger_watermark: 1.0,
        eviction_ratio: 0.0,
        ..SimulatedPool::new(pages * PAGE, policy)
    }
}

/// Requests for single chunks of one page.
fn chunks(chunks: impl IntoIterator<Item = u32>) -> Trace {
    let mut trace = Trace::default();
    for key in keys(chunks) {
        trace.push(TraceRequest {
            scopes: std::slice::from_ref(&key.scope),
            hashes: &[key.chunk_hash],
            tokens: 16,
            chunk_tokens: 16,
            object_bytes: PAGE,
            is_lookup: true,
        });
    }
    trace
}

#[test]
fn a_loop_larger_than_the_pool_defeats_lru_and_one_that_fits_does_not() {
    let trace = chunks((0..10).flat_map(|_| 0..20));
    let hits = |pages| replay(&trace, &on_demand(pages, PolicyKind::Lru)).hit_tokens / 16;
    assert_eq!((hits(19), hits(20)), (0, 180));
    let unlimited = replay(&trace, &on_demand(20, PolicyKind::Noop));
    assert_eq!(unlimited.hit_tokens, 180 * 16);
    let full = replay(&trace, &on_demand(5, PolicyKind::Noop));
    assert_eq!((full.hit_tokens, full.refused_objects), (9 * 5 * 16, 150));
}

#[test]
fn a_scan_costs_s3_fifo_nothing_and_lru_everything() {
    // Ten favourites, used in turn, and a stream of chunks that come once.
    let trace = chunks((0..2000).flat_map(|nth| [nth % 10, 1000 + 2 * nth, 1001 + 2 * nth]));
    let hits = |policy| replay(&trace, &on_demand(25, policy)).hit_tokens / 16;
    assert_eq!(hits(PolicyKind::Lru), 0, "30 come between two uses");
    assert!(hits(PolicyKind::S3Fifo) > 1900);
    // As in LMCache, the end of a session is a use to ARC, also for what was only stored:
    // so nothing is ever seen once, and it has no scan to resist.
    assert_eq!(hits(PolicyKind::Arc), 0);
}

#[test]
fn only_whole_prefixes_count_and_tails_are_misses() {
    let mut trace = Trace::default();
    let keys = keys(0..4);
    let hashes: Vec<_> = keys.iter().map(|key| key.chunk_hash).collect();
    let mut request = TraceRequest {
        scopes: std::slice::from_ref(&keys[0].scope),
        hashes: &hashes[..2],
        tokens: 40,
        chunk_tokens: 16,
        object_bytes: PAGE,
        is_lookup: false,
    };
    trace.push(request);
    request.is_lookup = true;
    trace.push(request);
    request.hashes = &hashes;
    request.tokens = 64;
    trace.push(request);
    trace.push(request);
    assert_eq!(trace.footprint_bytes(), 4 * PAGE);
    let done = replay(&trace, &on_demand(10, PolicyKind::Lru));
    assert_eq!(
        (done.lookups, done.tokens),
        (3, 168),
        "the bare store is no lookup"
    );
    assert_eq!(done.hit_tokens, 32 + 32 + 64);
    assert!((done.token_hit_rate() - 128.0 / 168.0).abs() < 1e-9);
}

#[test]
fn the_same_seed_makes_the_same_requests() {
    for workload in Workload::ALL {
        let hashes = |seed| -> Vec<_> {
            let trace = workload.generate(seed, 300);
            assert_eq!(trace.len(), 300);
            trace.requests().flat_map(|it| it.hashes.to_vec()).collect()
        };
        assert_eq!(hashes(1), hashes(1));
        assert_ne!(hashes(1), hashes(2));
        assert_eq!(workload.name().parse(), Ok(workload));
        let trace = workload.generate(1, 500);
        let all = trace.footprint_bytes();
        let bound = replay(&trace, &on_demand(all / PAGE, PolicyKind::Noop));
        assert_eq!(bound.refused_objects, 0);
        for policy in PolicyKind::ALL {
            let done = replay(&trace, &SimulatedPool::new(all / 8, policy));
            assert!(
                done.hit_tokens > 0 && done.hit_tokens <= bound.hit_tokens,
                "{policy}"
            );
        }
    }
}

/// The engine, asked the same things by a client, finds exactly as much.
#[test]
fn a_replay_finds_what_the_engine_finds() {
    let trace = chunks((0..1500_u32).map(|nth| nth.wrapping_mul(2_654_435_761) % 97 * (nth % 3)));
    for policy in PolicyKind::ALL {
        let pool = SimulatedPool {
            trigger_watermark: 0.8,
            eviction_ratio: 0.3,
            ..SimulatedPool::new(40 * PAGE, policy)
        };
        let cache = open(EngineConfig {
            policy,
            trigger_watermark: 0.8,
            eviction_ratio: 0.3,
            ..config(40, Backing::Private)
        });
        let owner = cache.new_owner();
        let mut hits = 0;
        for request in trace.requests() {
            let key = ObjectKey::new(request.scopes[0].clone(), request.hashes[0]);
            let keys = [key];
            let found = cache.lock_prefix(owner, &[keys.to_vec()], 1);
            hits += found.hit_chunks;
            match found.lease {
                Some(lease) => drop(cache.release_prefix(owner, lease, 0..1, 1)),
                None => {
                    if let Ok(reservation) = cache.reserve(owner, &keys, PAGE) {
                        let lease = reservation.lease.unwrap();
                        cache.write_bytes(owner, lease, 0, &bytes_of(0, PAGE));
                        cache.commit(owner, lease).unwrap();
                    }
                }
            }
            cache.touch(&keys);
            cache.maintain();
        }
        let done = replay(&trace, &pool);
        assert_eq!(done.hit_tokens, hits as u64 * 16, "{policy}");
        assert_eq!(done.evicted_objects, cache.status().evicted_objects);
        assert!(hits > 200, "{policy} {hits}");
    }
}
