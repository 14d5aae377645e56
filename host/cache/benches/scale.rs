//! What ten million keys cost: memory for each, and time for each of 10^5 victims.
//!
//! `cargo bench -p stockade-cache --bench scale`; the number of keys may follow `--`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench ends by panicking, and prints what it measured"
)]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use stockade_cache::{
    Backing, Budget, CacheEngine, CacheSalt, ChunkHash, EngineConfig, KeyScope, ObjectKey,
    PolicyKind, Prefault, Tenant,
};

/// Small slots, so that the pool's addresses and not its memory are what is large.
const SLOT: u64 = 64;
const VICTIMS: u64 = 100_000;
const BATCH: u64 = 512;

fn keys(scope: &Arc<KeyScope>, first: u64, count: u64) -> Vec<ObjectKey> {
    let hash = |number: u64| ChunkHash(*blake3::hash(&number.to_be_bytes()).as_bytes());
    (first..first + count)
        .map(|number| ObjectKey::new(Arc::clone(scope), hash(number)))
        .collect()
}

fn scope(salt: &str) -> Arc<KeyScope> {
    Arc::new(KeyScope {
        model_name: Arc::from("m"),
        kv_rank: 0,
        object_group_id: 0,
        cache_salt: CacheSalt::parse(salt).unwrap(),
    })
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// An engine with that many readable objects, spread over `salts`.
fn filled(objects: u64, policy: PolicyKind, salts: usize) -> CacheEngine {
    let names: Vec<String> = (0..salts).map(|nth| format!("t{nth}")).collect();
    let tenants = names.iter().skip(1).map(|name| Tenant {
        name: name.as_str().into(),
        salts: vec![CacheSalt::parse(name).unwrap()],
        budget: Budget {
            floor_bytes: 0,
            weight: NonZeroU32::MIN,
            cap_bytes: None,
        },
    });
    let name = format!("stockade-scale-{}", std::process::id());
    let engine = CacheEngine::open(EngineConfig {
        policy,
        align_bytes: SLOT,
        prefault: Prefault::Nothing,
        trigger_watermark: 1.0,
        eviction_ratio: VICTIMS as f64 / objects as f64,
        tenants: tenants.collect(),
        ..EngineConfig::new(objects * SLOT, Backing::Shm { name })
    })
    .unwrap();
    let scopes: Vec<_> = names.iter().map(|name| scope(name)).collect();
    let owner = engine.new_owner();
    for (nth, first) in (0..objects).step_by(BATCH as usize).enumerate() {
        let batch = keys(&scopes[nth % salts], first, BATCH.min(objects - first));
        let reservation = engine.reserve(owner, &batch, SLOT).unwrap();
        engine.commit(owner, reservation.lease.unwrap()).unwrap();
    }
    engine
}

/// Of this thread, so that other work on the machine counts for little.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Evicts 10^5 objects at the watermark; also the longest that a request waited meanwhile.
fn evict(engine: &CacheEngine) -> (Duration, Duration) {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        let waiter = threads.spawn(|| {
            let mut longest = Duration::ZERO;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let start = Instant::now();
                let owner = engine.new_owner();
                longest = longest.max(start.elapsed());
                engine.end_owner(owner);
                std::thread::sleep(Duration::from_micros(200));
            }
            longest
        });
        let start = processor_time();
        engine.maintain();
        let spent = processor_time() - start;
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (spent, waiter.join().unwrap())
    })
}

fn main() {
    let asked = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let most: u64 = asked.unwrap_or(10_000_000);
    println!("policy        tenants       keys  bytes/key  ns/victim  longest wait of a request");
    for (policy, tenants) in [
        (PolicyKind::Lru, 1),
        (PolicyKind::Arc, 1),
        (PolicyKind::IsolatedLru, 1),
        (PolicyKind::S3Fifo, 1),
        (PolicyKind::Lru, 32),
        (PolicyKind::Lru, 1000),
    ] {
        for objects in [2 * VICTIMS, most] {
            let before = resident_bytes();
            let engine = filled(objects, policy, tenants);
            let memory = resident_bytes().saturating_sub(before);
            let (spent, longest) = evict(&engine);
            let evicted = engine.status().evicted_objects;
            assert!(evicted.abs_diff(VICTIMS) <= 1, "{evicted}");
            let (bytes, nanos) = (memory / objects, spent.as_nanos() / u128::from(evicted));
            println!(
                "{policy:<12} {tenants:>8} {objects:>10} {bytes:>10} {nanos:>10}  {longest:?}"
            );
        }
    }
}
