//! The segment as other processes see it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use stockade_cache::{Backing, CacheEngine, CacheError, EngineConfig, Prefault};

use crate::fixture::*;

/// Removes a segment that the test itself made.
struct Segment(String);

impl Segment {
    fn new() -> Self {
        Self(unique_name())
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/dev/shm").join(&self.0)
    }

    fn config(&self, pages: u64) -> EngineConfig {
        let name = self.0.clone();
        config(pages, Backing::Shm { name })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
    }
}

#[test]
fn the_segment_has_its_name_size_and_mode_and_goes_with_the_engine() {
    let segment = Segment::new();
    // A size that is no multiple of the alignment must be exact all the same.
    let odd = EngineConfig {
        capacity_bytes: 3 * PAGE + 123,
        ..segment.config(3)
    };
    let engine = CacheEngine::open(odd).unwrap();
    assert_eq!(engine.shm_name(), Some(segment.0.as_str()));
    assert_eq!(engine.capacity_bytes(), 3 * PAGE + 123);
    let metadata = fs::metadata(segment.path()).unwrap();
    assert_eq!(metadata.len(), 3 * PAGE + 123);
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert_eq!(engine.status().capacity_bytes, 3 * PAGE);
    drop(engine);
    assert!(!segment.path().exists());
}

#[test]
fn one_leading_slash_is_taken_off_and_other_names_are_refused() {
    let segment = Segment::new();
    let name = format!("/{}", segment.0);
    let engine = CacheEngine::open(config(1, Backing::Shm { name })).unwrap();
    assert_eq!(engine.shm_name(), Some(segment.0.as_str()));
    let long = "x".repeat(256);
    for name in ["", "/", ".", "..", "a/b", "//a", "a\0b", &long] {
        let name = name.to_owned();
        let result = CacheEngine::open(config(1, Backing::Shm { name: name.clone() }));
        let Err(CacheError::InvalidConfig {
            field: "shm_name", ..
        }) = result
        else {
            panic!("{name:?}: {result:?}");
        };
    }
}

#[test]
fn python_opens_it_and_both_sides_see_the_same_bytes() {
    let segment = Segment::new();
    let cache = open(segment.config(4));
    let owner = cache.new_owner();
    let (lease, slots) = cache.reserve_all(owner, &keys(0..1));
    let script = "
import sys
from multiprocessing import resource_tracker, shared_memory
name, size, offset, length = sys.argv[1], *map(int, sys.argv[2:5])
pool = shared_memory.SharedMemory(name=name)
resource_tracker.unregister(pool._name, 'shared_memory')
assert pool.size == size, pool.size
pool.buf[offset:offset + length] = bytes(i % 251 for i in range(length))
pool.close()
";
    let slot = slots[0];
    let numbers = [4 * PAGE, slot.offset, slot.length].map(|number| number.to_string());
    let python = Command::new("python3")
        .args(["-c", script, &segment.0])
        .args(numbers)
        .output();
    let output = match python {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        output => output.unwrap(),
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    cache.commit(owner, lease).unwrap();
    let expected: Vec<u8> = (0..OBJECT).map(|at| (at % 251) as u8).collect();
    assert_eq!(cache.fetch(&keys(0..1)).unwrap()[0], expected);
}

#[test]
fn the_segment_of_a_dead_server_is_taken_over() {
    let segment = Segment::new();
    fs::write(segment.path(), b"left behind by a killed server").unwrap();
    let engine = CacheEngine::open(segment.config(2)).unwrap();
    assert_eq!(fs::metadata(segment.path()).unwrap().len(), 2 * PAGE);
    let mut bytes = [1; 30];
    let file = fs::File::open(segment.path()).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 30], "made anew, not taken over with its bytes");
    drop(engine);
}

#[test]
fn the_segment_of_a_running_server_is_left_alone() {
    let segment = Segment::new();
    let first = open(segment.config(2));
    first.store(&keys(0..1), 8);
    let error = CacheEngine::open(segment.config(2)).unwrap_err();
    assert!(matches!(&error, CacheError::ShmInUse { name } if *name == segment.0));
    assert!(error.to_string().contains("--shm-name"), "{error}");
    assert_eq!(first.fetch(&keys(0..1)).unwrap()[0], bytes_of(8, OBJECT));
    assert_eq!(fs::metadata(segment.path()).unwrap().len(), 2 * PAGE);
    drop(first);
    CacheEngine::open(segment.config(2)).unwrap();
}

#[test]
fn something_that_is_no_segment_is_left_alone() {
    let segment = Segment::new();
    fs::create_dir(segment.path()).unwrap();
    let error = CacheEngine::open(segment.config(2)).unwrap_err();
    assert!(matches!(error, CacheError::ShmForeign { .. }), "{error}");
    fs::remove_dir(segment.path()).unwrap();
}

#[test]
fn an_engine_removes_its_own_segment_only() {
    let segment = Segment::new();
    let engine = CacheEngine::open(segment.config(2)).unwrap();
    fs::remove_file(segment.path()).unwrap();
    engine.maintain();
    fs::write(segment.path(), b"somebody else's").unwrap();
    drop(engine);
    assert_eq!(fs::read(segment.path()).unwrap(), b"somebody else's");
}

#[test]
fn a_pool_that_does_not_fit_is_refused_before_anything_is_made() {
    let segment = Segment::new();
    let huge = EngineConfig {
        capacity_bytes: 1 << 60,
        align_bytes: 1 << 30,
        ..segment.config(1)
    };
    let error = CacheEngine::open(huge).unwrap_err();
    assert!(matches!(error, CacheError::ShmTooSmall { .. }), "{error}");
    assert!(error.to_string().contains("--l1-size-gb"), "{error}");
    assert!(!segment.path().exists());
    let huge = EngineConfig {
        capacity_bytes: 1 << 60,
        align_bytes: 1 << 30,
        ..config(1, Backing::Private)
    };
    let error = CacheEngine::open(huge).unwrap_err();
    assert!(
        matches!(error, CacheError::MemoryTooSmall { .. }),
        "{error}"
    );
}

#[test]
fn a_peer_that_cuts_the_segment_costs_misses_and_nothing_else() {
    let cache = shared(8);
    cache.store(&keys(0..6), 0);
    let owner = cache.new_owner();
    let lookup = cache.lock_prefix(owner, &[keys(0..6)], 1).lease.unwrap();
    let read = cache
        .begin_read(owner, lookup, owner, 0, 4..5)
        .unwrap()
        .lease;
    let (lease, _) = cache.reserve_all(owner, &keys(10..11));
    // Objects 0 and 1 and half of 2 survive.
    cache.segment_file().set_len(2 * PAGE + 100).unwrap();

    let mut out = Vec::new();
    assert!(
        cache.read(owner, read, 0, &mut out).is_err(),
        "a short read, no SIGBUS"
    );
    assert!(out.is_empty());
    assert_eq!(cache.begin_read(owner, lookup, owner, 0, 0..4), None);
    assert!(cache.begin_read(owner, lookup, owner, 0, 0..2).is_some());
    assert_eq!(
        cache.segment_file().metadata().unwrap().len(),
        8 * PAGE,
        "mended"
    );
    let committed = cache.commit(owner, lease).unwrap();
    assert_eq!(committed.discarded, 1, "what was written there is lost");
    cache.end_owner(owner);
    assert_eq!(cache.hits(&keys(0..6)), 2);
    let status = cache.status();
    assert_eq!((status.segment_repairs, status.corrupt_objects), (1, 4));
    cache.store(&keys(2..6), 30);
    assert_eq!(cache.fetch(&keys(0..6)).unwrap()[5], bytes_of(33, OBJECT));
    cache.check_invariants().unwrap();
}

#[test]
fn a_peer_that_lengthens_the_segment_changes_nothing() {
    let cache = shared(2);
    cache.store(&keys(0..2), 0);
    cache.segment_file().set_len(1 << 20).unwrap();
    cache.maintain();
    assert_eq!(cache.segment_file().metadata().unwrap().len(), 2 * PAGE);
    assert_eq!(cache.fetch(&keys(0..2)).unwrap()[1], bytes_of(1, OBJECT));
}

/// Waits for something another thread will do.
fn eventually(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "it never came");
        std::thread::yield_now();
    }
}

#[test]
fn prefaulting_gives_every_page_real_memory_and_leaves_bytes_alone() {
    let segment = Segment::new();
    let cache = open(EngineConfig {
        prefault: Prefault::Everything,
        ..segment.config(4096)
    });
    cache.store(&keys(0..3), 0);
    eventually(|| cache.status().touched_bytes == 4096 * PAGE);
    let metadata = fs::metadata(segment.path()).unwrap();
    assert_eq!(
        (metadata.blocks() * 512, metadata.len()),
        (4096 * PAGE, 4096 * PAGE)
    );
    assert_eq!(cache.fetch(&keys(0..3)).unwrap()[2], bytes_of(2, OBJECT));
    cache.check_invariants().unwrap();
}

#[test]
fn a_pool_that_grows_takes_memory_ahead_of_its_use_and_changes_no_mapping() {
    let segment = Segment::new();
    const MIB: u64 = 1 << 20;
    let cache = open(EngineConfig {
        prefault: Prefault::AheadOfUse {
            initial_bytes: 8 * MIB,
            ahead_bytes: 4 * MIB,
        },
        ..segment.config(64 * MIB / PAGE)
    });
    let taken = || fs::metadata(segment.path()).unwrap().blocks() * 512;
    let length = || fs::metadata(segment.path()).unwrap().len();
    assert_eq!(length(), 64 * MIB, "workers map the whole from the start");
    eventually(|| cache.status().touched_bytes >= 8 * MIB);
    assert_eq!((taken(), length()), (8 * MIB, 64 * MIB));
    let owner = cache.new_owner();
    let reserve = |chunks, bytes| {
        let reservation = cache.reserve(owner, &keys(chunks), bytes).unwrap();
        cache.maintain();
        reservation.slots[0].1.offset
    };
    assert!(
        reserve(0..1, 3 * MIB) < 8 * MIB,
        "what has memory goes first"
    );
    assert_eq!(taken(), 8 * MIB, "there is enough ahead");
    reserve(1..2, 20 * MIB);
    eventually(|| cache.status().touched_bytes >= 27 * MIB);
    assert!((27 * MIB..=30 * MIB).contains(&taken()), "{}", taken());
    assert_eq!(length(), 64 * MIB);
    reserve(2..3, 38 * MIB);
    eventually(|| cache.status().touched_bytes == 64 * MIB);
    cache.check_invariants().unwrap();
}

#[test]
fn dropping_the_engine_stops_prefaulting_at_once() {
    let segment = Segment::new();
    let engine = CacheEngine::open(EngineConfig {
        prefault: Prefault::Everything,
        ..segment.config(1 << 20)
    });
    // 4 GiB take seconds to touch; skip where the machine cannot hold them.
    let Ok(engine) = engine else { return };
    eventually(|| engine.status().touched_bytes > 0);
    let start = Instant::now();
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(!segment.path().exists());
}

#[test]
fn private_memory_cannot_be_reached_or_resized() {
    let cache = private(2);
    assert_eq!(cache.shm_name(), None);
    cache.store(&keys(0..2), 0);
    cache.maintain();
    assert_eq!(cache.fetch(&keys(0..2)).unwrap()[1], bytes_of(1, OBJECT));
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let good = config(4, Backing::Private);
    let bad = |field: &str, config: EngineConfig| {
        let error = CacheEngine::open(config).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    };
    let with = |change: fn(&mut EngineConfig)| {
        let mut config = good.clone();
        change(&mut config);
        config
    };
    bad("align_bytes", with(|c| c.align_bytes = 0));
    bad("align_bytes", with(|c| c.align_bytes = 3000));
    bad("align_bytes", with(|c| c.align_bytes = 1 << 40));
    bad("capacity_bytes", with(|c| c.capacity_bytes = 0));
    bad("capacity_bytes", with(|c| c.capacity_bytes = u64::MAX));
    bad(
        "capacity_bytes",
        with(|c| (c.capacity_bytes, c.align_bytes) = (1 << 36, 16)),
    );
    bad(
        "trigger_watermark",
        with(|c| c.trigger_watermark = f64::NAN),
    );
    bad("trigger_watermark", with(|c| c.trigger_watermark = -0.1));
    bad("eviction_ratio", with(|c| c.eviction_ratio = 1.1));
    bad("write_ttl", with(|c| c.write_ttl = Duration::ZERO));
    bad("read_ttl", with(|c| c.read_ttl = Duration::MAX));
}
