//! Small caches and short names for what tests do with them.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use stockade_cache::{
    Backing, CacheEngine, CacheSalt, ChunkHash, EngineConfig, KeyScope, LeaseId, ManualClock,
    ObjectKey, OwnerId, PolicyKind, Prefault, Slot,
};

/// Bytes of one object in most tests; a slot takes a page.
pub(crate) const OBJECT: u64 = 4000;
pub(crate) const PAGE: u64 = 4096;
pub(crate) const WRITE_TTL: Duration = Duration::from_secs(600);
pub(crate) const READ_TTL: Duration = Duration::from_secs(300);

pub(crate) struct Cache {
    pub(crate) engine: CacheEngine,
    pub(crate) clock: ManualClock,
}

impl std::ops::Deref for Cache {
    type Target = CacheEngine;

    fn deref(&self) -> &CacheEngine {
        &self.engine
    }
}

/// A segment name that no other test and no other run uses.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("stockade-test-{}-{nth}", std::process::id())
}

pub(crate) fn config(pages: u64, backing: Backing) -> EngineConfig {
    EngineConfig {
        // Above any usage, so that tests of demand eviction see nothing else.
        trigger_watermark: 1.0,
        eviction_ratio: 0.0,
        prefault: Prefault::Nothing,
        ..EngineConfig::new(pages * PAGE, backing)
    }
}

pub(crate) fn open(config: EngineConfig) -> Cache {
    let clock = ManualClock::new();
    let engine = CacheEngine::open_with_clock(config, Box::new(clock.clone())).unwrap();
    Cache { engine, clock }
}

/// A pool of private memory for `pages` one-page objects.
pub(crate) fn private(pages: u64) -> Cache {
    open(config(pages, Backing::Private))
}

/// A pool that tests write to as workers do.
pub(crate) fn shared(pages: u64) -> Cache {
    open(config(
        pages,
        Backing::Shm {
            name: unique_name(),
        },
    ))
}

pub(crate) fn with_policy(pages: u64, policy: PolicyKind) -> Cache {
    open(EngineConfig {
        policy,
        ..config(pages, Backing::Private)
    })
}

pub(crate) fn scope_of(salt: &str, kv_rank: u32) -> Arc<KeyScope> {
    Arc::new(KeyScope {
        model_name: Arc::from("m/x-7b"),
        kv_rank,
        object_group_id: 0,
        cache_salt: CacheSalt::parse(salt).unwrap(),
    })
}

/// Keys by the numbers of their chunks, of one tenant and rank.
pub(crate) fn keys_of(
    salt: &str,
    kv_rank: u32,
    chunks: impl IntoIterator<Item = u32>,
) -> Vec<ObjectKey> {
    let scope = scope_of(salt, kv_rank);
    chunks
        .into_iter()
        .map(|chunk| {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&chunk.to_be_bytes());
            ObjectKey::new(Arc::clone(&scope), ChunkHash(hash))
        })
        .collect()
}

pub(crate) fn keys(chunks: impl IntoIterator<Item = u32>) -> Vec<ObjectKey> {
    keys_of("", 0, chunks)
}

/// Bytes that differ from object to object and from place to place.
pub(crate) fn bytes_of(seed: u64, length: u64) -> Vec<u8> {
    (0..length)
        .map(|at| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 8 * 8)) as u8 ^ at as u8)
        .collect()
}

impl Cache {
    /// Reserves, and expects a slot for every key.
    pub(crate) fn reserve_all(&self, owner: OwnerId, keys: &[ObjectKey]) -> (LeaseId, Vec<Slot>) {
        let reservation = self.reserve(owner, keys, OBJECT).unwrap();
        assert_eq!(reservation.slots.len(), keys.len());
        let slots = reservation.slots.iter().map(|&(_, slot)| slot).collect();
        (reservation.lease.unwrap(), slots)
    }

    pub(crate) fn write_bytes(&self, owner: OwnerId, lease: LeaseId, index: usize, bytes: &[u8]) {
        let mut parts = bytes.chunks(1000);
        self.write(owner, lease, index, &mut parts).unwrap();
    }

    /// Stores keys one by one or together as given; each object's bytes follow from its
    /// index in the call and `seed`.
    pub(crate) fn store(&self, keys: &[ObjectKey], seed: u64) {
        self.store_unchecked(keys, seed);
        self.check_invariants().unwrap();
    }

    /// As `store`, without looking at every object each time.
    pub(crate) fn store_unchecked(&self, keys: &[ObjectKey], seed: u64) {
        let owner = self.new_owner();
        let (lease, slots) = self.reserve_all(owner, keys);
        for (index, slot) in slots.iter().enumerate() {
            self.write_bytes(
                owner,
                lease,
                index,
                &bytes_of(seed + index as u64, slot.length),
            );
        }
        let committed = self.commit(owner, lease).unwrap();
        assert_eq!((committed.admitted, committed.discarded), (keys.len(), 0));
        self.end_owner(owner);
    }

    /// How many of the keys a lookup finds, without leaving a lock.
    pub(crate) fn hits(&self, keys: &[ObjectKey]) -> usize {
        let owner = self.new_owner();
        let found = self.lock_prefix(owner, &[keys.to_vec()], 1);
        self.end_owner(owner);
        found.hit_chunks
    }

    /// Which of the keys are readable, each on its own. Touches those it finds.
    pub(crate) fn present(&self, keys: &[ObjectKey]) -> Vec<bool> {
        let each = keys
            .iter()
            .map(|key| self.hits(std::slice::from_ref(key)) == 1);
        each.collect()
    }

    /// Reads a prefix of one row through lookup, read lease and copy.
    pub(crate) fn fetch(&self, keys: &[ObjectKey]) -> Option<Vec<Vec<u8>>> {
        let owner = self.new_owner();
        let result = self.fetch_as(owner, keys);
        self.end_owner(owner);
        result
    }

    fn fetch_as(&self, owner: OwnerId, keys: &[ObjectKey]) -> Option<Vec<Vec<u8>>> {
        let found = self.lock_prefix(owner, &[keys.to_vec()], 1);
        let lookup = found.lease?;
        let read = self.begin_read(owner, lookup, owner, 0, 0..keys.len())?;
        let objects = (0..keys.len())
            .map(|index| {
                let mut out = Vec::new();
                self.read(owner, read.lease, index, &mut out).ok()?;
                Some(out)
            })
            .collect();
        self.finish_read(owner, read.lease);
        objects
    }

    /// Writes to a slot the way a worker does that has opened the segment.
    pub(crate) fn worker_write(&self, slot: Slot, bytes: &[u8]) {
        self.segment_file()
            .write_all_at(bytes, slot.offset)
            .unwrap();
    }

    pub(crate) fn segment_file(&self) -> std::fs::File {
        let path = format!("/dev/shm/{}", self.shm_name().unwrap());
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }
}
