//! What the data path costs: hashing, lookups, reservations, eviction, copies.
//!
//! `cargo bench -p stockade-cache` runs all; a name after `--` picks some. Times are processor
//! time of the measuring thread, so that other work on the machine counts for little.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench ends by panicking, and its functions are named by their ids"
)]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Throughput, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};
use stockade_cache::{
    Backing, CacheEngine, CacheSalt, ChunkHash, EngineConfig, KeyScope, ObjectKey, PolicyKind,
    Prefault, SlotAllocator, TokenHasher,
};

const PAGE: u64 = 4096;

type Criterion = criterion::Criterion<CpuTime>;

/// Processor time of this thread.
struct CpuTime;

fn now() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        now()
    }

    fn end(&self, start: Duration) -> Duration {
        now() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// Keys as the hasher makes them: spread evenly, in no order.
fn keys(first: u64, count: u64) -> Vec<ObjectKey> {
    let scope = Arc::new(KeyScope {
        model_name: Arc::from("meta-llama/Llama-3.1-70B-Instruct"),
        kv_rank: 0x0100_0100,
        object_group_id: 0,
        cache_salt: CacheSalt::default(),
    });
    let hash = |number: u64| ChunkHash(*blake3::hash(&number.to_be_bytes()).as_bytes());
    (first..first + count)
        .map(|number| ObjectKey::new(Arc::clone(&scope), hash(number)))
        .collect()
}

/// A shared pool whose pages are never touched: objects are committed as a worker's would.
fn engine(pages: u64, policy: PolicyKind) -> CacheEngine {
    let name = format!("stockade-bench-{}", std::process::id());
    CacheEngine::open(EngineConfig {
        policy,
        prefault: Prefault::Nothing,
        trigger_watermark: 1.0,
        eviction_ratio: 0.5,
        ..EngineConfig::new(pages * PAGE, Backing::Shm { name })
    })
    .unwrap()
}

fn fill(engine: &CacheEngine, count: u64) {
    let owner = engine.new_owner();
    for first in (0..count).step_by(512) {
        let batch = keys(first, 512.min(count - first));
        let reservation = engine.reserve(owner, &batch, PAGE).unwrap();
        engine.commit(owner, reservation.lease.unwrap()).unwrap();
    }
    engine.end_owner(owner);
}

fn hashing(c: &mut Criterion) {
    let tokens: Vec<u8> = (0..131_072_u32).flat_map(u32::to_be_bytes).collect();
    let mut group = c.benchmark_group("hash_128k_tokens");
    group.throughput(Throughput::Elements(131_072));
    for chunk_size in [16, 256] {
        let hasher = TokenHasher::new(NonZeroUsize::new(chunk_size).unwrap());
        let mut hashes = Vec::new();
        group.bench_function(format!("chunk_{chunk_size}"), |b| {
            b.iter(|| {
                hashes.clear();
                hasher.chunk_hashes(black_box(&tokens), &mut hashes, usize::MAX);
            });
        });
    }
    // The floor: BLAKE3 over the same chained inputs and nothing else.
    group.bench_function("bare_blake3_chained_256", |b| {
        let mut input = [0; 32 + 1024];
        b.iter(|| {
            for chunk in black_box(&tokens).chunks_exact(1024) {
                input[32..].copy_from_slice(chunk);
                let hash = blake3::hash(&input);
                input[..32].copy_from_slice(hash.as_bytes());
            }
            black_box(input[0])
        });
    });
    group.bench_function("bare_blake3_one_input", |b| {
        b.iter(|| blake3::hash(black_box(&tokens)));
    });
    group.finish();
}

fn lookups(c: &mut Criterion) {
    let mut group = c.benchmark_group("lock_prefix_512");
    for objects in [4096_u64, 100_000, 1_000_000] {
        let engine = engine(objects, PolicyKind::Lru);
        fill(&engine, objects);
        let owner = engine.new_owner();
        for rows in [1, 8] {
            if rows * 512 > objects {
                continue;
            }
            // A different prefix each time, so that caches do not flatter the numbers.
            let prefixes: Vec<Vec<Vec<ObjectKey>>> = (0..(objects / 512 / rows).min(64))
                .map(|nth| {
                    (0..rows)
                        .map(|row| keys((nth * rows + row) * 512, 512))
                        .collect()
                })
                .collect();
            let mut turn = 0;
            group.bench_function(format!("{rows}_rows_of_{objects}_objects"), |b| {
                b.iter_custom(|rounds| {
                    let mut spent = Duration::ZERO;
                    for _ in 0..rounds {
                        turn = (turn + 1) % prefixes.len();
                        let start = now();
                        let found = engine.lock_prefix(owner, &prefixes[turn], 1);
                        spent += now() - start;
                        assert_eq!(found.hit_chunks, 512);
                        engine.release_prefix(owner, found.lease.unwrap(), 0..512, 1);
                    }
                    spent
                });
            });
            group.bench_function(format!("{rows}_rows_of_{objects}_objects_release"), |b| {
                b.iter_custom(|rounds| {
                    let mut spent = Duration::ZERO;
                    for _ in 0..rounds {
                        turn = (turn + 1) % prefixes.len();
                        let found = engine.lock_prefix(owner, &prefixes[turn], 1);
                        let start = now();
                        engine.release_prefix(owner, found.lease.unwrap(), 0..512, 1);
                        spent += now() - start;
                    }
                    spent
                });
            });
        }
        let absent = [keys(objects + 7, 512)];
        group.bench_function(format!("miss_of_{objects}_objects"), |b| {
            b.iter(|| engine.lock_prefix(owner, &absent, 1));
        });
    }
    group.finish();
}

fn stores(c: &mut Criterion) {
    let mut group = c.benchmark_group("reserve_and_commit");
    for count in [1_u64, 16, 512] {
        let engine = engine(100_000, PolicyKind::Lru);
        let owner = engine.new_owner();
        let mut first = 0;
        // After the first 100 000 objects each store evicts as many as it brings.
        fill(&engine, 100_000);
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{count}_with_demand_eviction"), |b| {
            b.iter_batched(
                || {
                    first += count;
                    keys(1 << 40 | first, count)
                },
                |batch| {
                    let reservation = engine.reserve(owner, &batch, PAGE).unwrap();
                    engine.commit(owner, reservation.lease.unwrap()).unwrap()
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn eviction(c: &mut Criterion) {
    let mut group = c.benchmark_group("evict_half_per_victim");
    group.sample_size(10);
    for policy in &PolicyKind::ALL[..4] {
        for objects in [100_000_u64, 1_000_000] {
            group.throughput(Throughput::Elements(1));
            group.bench_function(format!("{policy}_of_{objects}"), |b| {
                b.iter_custom(|rounds| {
                    // One pass evicts many victims; the time is scaled to `rounds` of them.
                    let engine = engine(objects, *policy);
                    fill(&engine, objects);
                    let start = now();
                    engine.maintain();
                    let spent = now() - start;
                    let victims = engine.status().evicted_objects;
                    assert_eq!(victims, objects / 2);
                    spent.mul_f64(rounds as f64 / victims as f64)
                });
            });
        }
    }
    group.finish();
}

fn allocation(c: &mut Criterion) {
    let mut group = c.benchmark_group("allocate_and_free");
    for live in [1000_usize, 100_000] {
        // Every other slot free: as many free ranges as there are live slots.
        let mut pool = SlotAllocator::new(4 * live as u64 * PAGE, PAGE);
        let slots: Vec<u64> = (0..2 * live)
            .map(|_| pool.allocate(PAGE).unwrap())
            .collect();
        for &slot in slots.iter().step_by(2) {
            pool.free(slot, PAGE);
        }
        let mut random = 1_u64;
        group.bench_function(format!("{live}_free_ranges"), |b| {
            b.iter(|| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let length = (random >> 60) * PAGE + 1;
                let slot = pool.allocate(length).unwrap();
                pool.free(slot, length)
            });
        });
    }
    group.finish();
}

fn copies(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    group.sample_size(20);
    for object_bytes in [256 << 10, 32 << 20] {
        let engine = engine(4 * object_bytes / PAGE, PolicyKind::Lru);
        let owner = engine.new_owner();
        let bytes = vec![7; object_bytes as usize];
        group.throughput(Throughput::Bytes(object_bytes));
        let batch = keys(0, 1);
        let lease = engine
            .reserve(owner, &batch, object_bytes)
            .unwrap()
            .lease
            .unwrap();
        let write = |engine: &CacheEngine| {
            engine
                .write(owner, lease, 0, &mut std::iter::once(&bytes[..]))
                .unwrap();
        };
        write(&engine);
        group.bench_function(format!("write_{object_bytes}"), |b| {
            b.iter(|| write(&engine))
        });
        engine.commit(owner, lease).unwrap();
        let lookup = engine.lock_prefix(owner, &[batch], 1).lease.unwrap();
        let read = engine
            .begin_read(owner, lookup, owner, 0, 0..1)
            .unwrap()
            .lease;
        let mut out = Vec::new();
        group.bench_function(format!("read_{object_bytes}"), |b| {
            b.iter(|| {
                out.clear();
                engine.read(owner, read, 0, &mut out).unwrap();
            });
        });
        group.bench_function(format!("memcpy_{object_bytes}"), |b| {
            b.iter(|| {
                out.clear();
                out.extend_from_slice(black_box(&bytes));
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion::Criterion::default()
        .with_measurement(CpuTime)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700))
        .without_plots();
    targets = hashing, lookups, stores, allocation, copies, eviction
}
criterion_main!(benches);
