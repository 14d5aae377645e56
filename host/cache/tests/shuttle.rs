//! The engine under a scheduler that decides at every lock which thread goes on.
//!
//! `cargo test -p stockade-cache --features shuttle --test shuttle`; the number of orders
//! tried is in `STOCKADE_SHUTTLE_ORDERS`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use shuttle::thread;
use stockade_cache::{
    Backing, Budget, CacheEngine, CacheObserver, CacheSalt, ChunkHash, EngineConfig, KeyScope,
    LeaseError, ManualClock, ObjectKey, Prefault, ReadError, RemoveReason,
};

const PAGE: u64 = 4096;

fn orders() -> usize {
    let asked = std::env::var("STOCKADE_SHUTTLE_ORDERS").ok();
    asked.map_or(300, |text| text.parse().unwrap())
}

fn salt() -> CacheSalt {
    CacheSalt::parse("tenant").unwrap()
}

fn keys(chunks: std::ops::Range<u8>) -> Vec<ObjectKey> {
    let scope = Arc::new(KeyScope {
        model_name: Arc::from("m"),
        kv_rank: 0,
        object_group_id: 0,
        cache_salt: salt(),
    });
    chunks
        .map(|chunk| ObjectKey::new(Arc::clone(&scope), ChunkHash([chunk; 32])))
        .collect()
}

fn bytes_of(chunk: u8) -> Vec<u8> {
    vec![chunk ^ 0x5a; PAGE as usize]
}

/// Checks that each key is stored and removed in turns, as a follower of events needs it.
#[derive(Default)]
struct Follower(parking_lot::Mutex<HashMap<u8, bool>>);

impl Follower {
    fn turn(&self, keys: &[ObjectKey], is_stored: bool) {
        for key in keys {
            let before = self.0.lock().insert(key.chunk_hash.0[0], is_stored);
            assert_eq!(before.unwrap_or(false), !is_stored, "{key:?}");
        }
    }
}

impl CacheObserver for Follower {
    fn stored(&self, keys: &[ObjectKey]) {
        self.turn(keys, true);
    }

    fn removed(&self, keys: &[ObjectKey], _reason: RemoveReason) {
        self.turn(keys, false);
    }
}

struct World {
    engine: CacheEngine,
    clock: ManualClock,
    follower: Arc<Follower>,
}

impl World {
    fn new(pages: u64) -> Arc<Self> {
        let clock = ManualClock::new();
        let config = EngineConfig {
            prefault: Prefault::Nothing,
            trigger_watermark: 0.7,
            eviction_ratio: 0.5,
            write_ttl: Duration::from_secs(2),
            read_ttl: Duration::from_secs(2),
            ..EngineConfig::new(pages * PAGE, Backing::Private)
        };
        let engine = CacheEngine::open_with_clock(config, Box::new(clock.clone())).unwrap();
        let follower = Arc::new(Follower::default());
        engine.set_observer(Arc::clone(&follower) as _);
        Arc::new(Self {
            engine,
            clock,
            follower,
        })
    }

    /// Stores what is missing of the chunks; any step may come too late.
    fn store(&self, chunks: std::ops::Range<u8>) {
        let owner = self.engine.new_owner();
        let first = chunks.start;
        if let Ok(reservation) = self.engine.reserve(owner, &keys(chunks), PAGE)
            && let Some(lease) = reservation.lease
        {
            for (index, _) in reservation.slots {
                let bytes = bytes_of(first + index as u8);
                let mut parts = bytes.chunks(3000);
                match self.engine.write(owner, lease, index, &mut parts) {
                    Ok(()) | Err(LeaseError::Expired) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            match self.engine.commit(owner, lease) {
                Ok(committed) => assert_eq!(committed.discarded, 0),
                Err(LeaseError::Expired) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        self.engine.end_owner(owner);
    }

    /// Reads what is there of the chunks: the right bytes, or none.
    fn load(&self, chunks: std::ops::Range<u8>) {
        let (session, worker) = (self.engine.new_owner(), self.engine.new_owner());
        let first = chunks.start;
        let found = self.engine.lock_prefix(session, &[keys(chunks)], 1);
        if let Some(lookup) = found.lease
            && let Some(read) =
                self.engine
                    .begin_read(session, lookup, worker, 0, 0..found.hit_chunks)
        {
            for index in 0..found.hit_chunks {
                let mut out = Vec::new();
                match self.engine.read(worker, read.lease, index, &mut out) {
                    Ok(()) => assert!(out == bytes_of(first + index as u8), "wrong bytes"),
                    Err(ReadError::Lease(LeaseError::Expired)) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            self.engine.finish_read(worker, read.lease);
        }
        self.engine.end_owner(session);
        self.engine.end_owner(worker);
    }

    /// Nothing is held by anybody any more, and events add up to what is there.
    fn check_at_rest(&self) {
        // Before the engine is asked anything, which would tell what was left untold.
        let told = self.follower.0.lock().values().filter(|&&it| it).count();
        self.engine.check_invariants().unwrap();
        let status = self.engine.status();
        assert_eq!((status.owners, status.leases), (0, 0), "{status:?}");
        assert_eq!((status.object_locks, status.owned_locks), (0, 0));
        assert_eq!((status.reserved_objects, status.withdrawn_objects), (0, 0));
        assert_eq!(status.corrupt_objects, 0);
        assert_eq!(
            told, status.readable_objects,
            "what was told is what is there"
        );
    }
}

/// Runs the parts as threads of one world, in many orders.
fn in_every_order(pages: u64, parts: &'static [fn(&World)]) {
    let run = move || {
        let world = World::new(pages);
        let threads: Vec<_> = parts
            .iter()
            .map(|part| {
                let world = Arc::clone(&world);
                thread::spawn(move || part(&world))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        world.check_at_rest();
    };
    // Random orders find the usual races, few changes of thread in odd places the others.
    shuttle::check_random(run, orders());
    shuttle::check_pct(run, orders(), 3);
}

#[test]
fn stores_loads_eviction_and_clearing_in_every_order() {
    in_every_order(
        4,
        &[
            |world| {
                world.store(0..3);
                world.load(0..3);
            },
            |world| {
                world.store(2..5);
                world.load(0..2);
            },
            |world| {
                world.engine.clear(true);
                world.engine.maintain();
            },
        ],
    );
}

#[test]
fn leases_that_expire_while_they_are_used_publish_nothing_and_free_everything() {
    in_every_order(
        3,
        &[
            |world| world.store(0..2),
            |world| world.load(0..2),
            |world| {
                world.clock.advance(Duration::from_secs(1));
                world.engine.maintain();
                world.clock.advance(Duration::from_secs(1));
                world.engine.maintain();
            },
        ],
    );
}

#[test]
fn the_end_of_an_owner_meets_every_step_of_its_own_work() {
    in_every_order(
        4,
        &[|world| {
            let owner = world.engine.new_owner();
            world.store(0..1);
            let engine = &world.engine;
            shuttle::thread::scope(|scope| {
                scope.spawn(|| {
                    if let Ok(reservation) = engine.reserve(owner, &keys(5..7), PAGE)
                        && let Some(lease) = reservation.lease
                    {
                        let bytes = bytes_of(5);
                        let _ = engine.write(owner, lease, 0, &mut bytes.chunks(5000));
                        let _ = engine.commit(owner, lease);
                    }
                });
                scope.spawn(|| {
                    let found = engine.lock_prefix(owner, &[keys(0..1)], 2);
                    if let Some(lookup) = found.lease {
                        let read = engine.begin_read(owner, lookup, owner, 0, 0..1);
                        let mut out = Vec::new();
                        if let Some(read) = read
                            && engine.read(owner, read.lease, 0, &mut out).is_ok()
                        {
                            assert!(out == bytes_of(0));
                        }
                    }
                });
                scope.spawn(|| engine.end_owner(owner));
            });
            engine.end_owner(owner);
        }],
    );
}

#[test]
fn budgets_change_while_objects_come_and_go() {
    in_every_order(
        4,
        &[
            |world| {
                world.store(0..3);
                world.load(0..3);
            },
            |world| {
                let budget = Budget {
                    floor_bytes: PAGE,
                    cap_bytes: Some(2 * PAGE),
                    ..Budget::default()
                };
                world.engine.set_budget(&salt(), budget).unwrap();
                world.engine.maintain();
                world.engine.remove_budget(&salt());
            },
            |world| world.store(1..4),
        ],
    );
}

#[test]
fn a_notice_left_to_another_thread_is_told() {
    in_every_order(
        4,
        &[|world| {
            world.store(0..1);
            let engine = &world.engine;
            let owner = engine.new_owner();
            let lease = engine
                .reserve(owner, &keys(5..6), PAGE)
                .unwrap()
                .lease
                .unwrap();
            let bytes = bytes_of(5);
            engine
                .write(owner, lease, 0, &mut bytes.chunks(5000))
                .unwrap();
            // One call each, so that no later one can make up for what was not told.
            shuttle::thread::scope(|scope| {
                scope.spawn(|| engine.commit(owner, lease).unwrap());
                scope.spawn(|| engine.clear(true));
            });
            let told = world.follower.0.lock().values().filter(|&&it| it).count();
            assert_eq!(told, engine.status().readable_objects);
            engine.end_owner(owner);
        }],
    );
}
