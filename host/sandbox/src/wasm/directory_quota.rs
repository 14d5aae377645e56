//! What may lie in a run's writable directories, in bytes and in entries.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};
use tokio::task::spawn_blocking;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::filesystem::Descriptor;

use super::guest::Meter;
use crate::limit::Limit;

/// Most files and directories below the writable ones.
const MAX_ENTRIES: u64 = 10_000;

/// How deep writable directories are measured; what lies deeper is refused as too much.
const MAX_DEPTH: usize = 64;

/// How long a measurement of the writable directories is good for: a guest that overwrites
/// its own files waits for the next one, instead of making the host count without end.
const MEASURE_INTERVAL: Duration = Duration::from_millis(100);

/// What may lie in the writable directories.
pub(super) struct Quota {
    roots: Vec<Arc<File>>,
    limit: u64,
    ledger: Mutex<Ledger>,
    meter: Arc<Meter>,
}

#[derive(Default)]
struct Ledger {
    /// At least what lies there: measured, and all that was written since.
    bytes: u64,
    entries: u64,
    measured: Option<Instant>,
    /// What streams have taken and not yet written.
    on_the_way: u64,
    /// Files that the run has had open: one without a name is found nowhere else.
    open: Vec<Weak<File>>,
}

impl Quota {
    /// At most `limit` bytes below these directories.
    pub(super) fn new(roots: Vec<Arc<File>>, limit: u64, meter: Arc<Meter>) -> Self {
        Self {
            roots,
            limit,
            ledger: Mutex::default(),
            meter,
        }
    }

    /// Notes the files that a guest has open.
    pub(super) fn note(&self, table: &mut ResourceTable) {
        if self.roots.is_empty() {
            return;
        }
        let mut ledger = self.ledger.lock();
        ledger.open.retain(|file| file.strong_count() > 0);
        for descriptor in descriptors(table) {
            if let Descriptor::File(file) = descriptor {
                let file = Arc::downgrade(&file.file);
                if !ledger.open.iter().any(|known| known.ptr_eq(&file)) {
                    ledger.open.push(file);
                }
            }
        }
    }

    /// Bytes that may be written without measuring first.
    pub(super) fn room(&self) -> u64 {
        let ledger = self.ledger.lock();
        match ledger.measured {
            Some(_) => self.limit.saturating_sub(ledger.bytes),
            None => 0,
        }
    }

    /// Counts, if there is room without measuring first; so many of the bytes are on their way.
    fn take(&self, bytes: u64, entries: u64, on_the_way: u64) -> bool {
        let mut ledger = self.ledger.lock();
        let lying = (
            ledger.bytes.saturating_add(bytes),
            ledger.entries.saturating_add(entries),
        );
        let has_room = ledger.measured.is_some() && lying.0 <= self.limit && lying.1 <= MAX_ENTRIES;
        if has_room {
            (ledger.bytes, ledger.entries) = lying;
            ledger.on_the_way += on_the_way;
            self.meter.directory_bytes.store(lying.0, Ordering::Relaxed);
        }
        has_room
    }

    /// Whether there is room, which is counted if so; measures where it looks as if there were
    /// none.
    pub(super) async fn reserve(&self, bytes: u64, entries: u64) -> bool {
        // Without a writable directory the call fails anyway, and says why.
        if self.roots.is_empty() || self.take(bytes, entries, 0) {
            return true;
        }
        let has_room = self.measure().await && self.take(bytes, entries, 0);
        if !has_room {
            self.meter.hit(Limit::DirectoryBytes);
        }
        has_room
    }

    /// Finds out what lies there; `false` where that cannot be told.
    pub(super) async fn measure(&self) -> bool {
        let measured = self.ledger.lock().measured;
        if let Some(measured) = measured {
            tokio::time::sleep(MEASURE_INTERVAL.saturating_sub(measured.elapsed())).await;
        }
        let roots = self.roots.clone();
        let open: Vec<_> = {
            let ledger = self.ledger.lock();
            ledger.open.iter().filter_map(Weak::upgrade).collect()
        };
        let measured = spawn_blocking(move || {
            let unlinked: u64 = open
                .iter()
                .filter_map(|file| file.metadata().ok())
                .filter(|metadata| metadata.nlink() == 0)
                .map(|metadata| size_on_disk(metadata.len(), metadata.blocks()))
                .sum();
            let (lying, entries) = measure(&roots)?;
            Some((lying.saturating_add(unlinked), entries))
        });
        let Some((bytes, entries)) = measured.await.ok().flatten() else {
            return false;
        };
        let mut ledger = self.ledger.lock();
        ledger.bytes = bytes.saturating_add(ledger.on_the_way);
        ledger.entries = entries;
        ledger.measured = Some(Instant::now());
        self.meter
            .directory_bytes
            .store(ledger.bytes, Ordering::Relaxed);
        true
    }

    /// Takes room for what is about to be written, until [`written`](Self::written).
    pub(super) fn write(&self, bytes: u64) -> bool {
        self.take(bytes, 0, bytes)
    }

    /// What was on its way is there, or never will be.
    pub(super) fn written(&self, bytes: u64) {
        let mut ledger = self.ledger.lock();
        ledger.on_the_way = ledger.on_the_way.saturating_sub(bytes);
    }

    /// Counts that there was no room.
    pub(super) fn refused(&self) {
        self.meter.hit(Limit::DirectoryBytes);
    }
}

/// What a guest has open.
pub(super) fn descriptors(table: &mut ResourceTable) -> impl Iterator<Item = &Descriptor> {
    table
        .iter_mut()
        .filter_map(|entry| entry.downcast_ref::<Descriptor>())
}

/// A file with holes counts with its size, as the holes can be filled by writing.
fn size_on_disk(length: u64, blocks: u64) -> u64 {
    length.max(blocks.saturating_mul(512))
}

/// Bytes and entries below the directories, without following a symbolic link. `None` where
/// there are too many to count or one cannot be looked at.
fn measure(roots: &[Arc<File>]) -> Option<(u64, u64)> {
    let (mut bytes, mut entries) = (0_u64, 0_u64);
    for root in roots {
        let root = openat(
            root,
            c".",
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        measure_below(&root.ok()?, 0, &mut bytes, &mut entries)?;
    }
    Some((bytes, entries))
}

fn measure_below(
    directory: &OwnedFd,
    depth: usize,
    bytes: &mut u64,
    entries: &mut u64,
) -> Option<()> {
    if depth > MAX_DEPTH {
        return None;
    }
    for entry in Dir::read_from(directory).ok()? {
        let entry = entry.ok()?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        *entries += 1;
        if *entries > 2 * MAX_ENTRIES {
            return None;
        }
        let status = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            // Another plugin or process removed it meanwhile.
            Err(Errno::NOENT) => continue,
            Err(_) => return None,
        };
        let length = u64::try_from(status.st_size).unwrap_or(u64::MAX);
        let blocks = u64::try_from(status.st_blocks).unwrap_or_default();
        *bytes = bytes.saturating_add(size_on_disk(length, blocks));
        if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
            match openat(directory, name, flags, Mode::empty()) {
                Ok(below) => measure_below(&below, depth + 1, bytes, entries)?,
                Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => {}
                Err(_) => return None,
            }
        }
    }
    Some(())
}
