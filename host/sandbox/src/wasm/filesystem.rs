//! Preview 1's file calls, held to what was granted: files open at once, bytes that lie in
//! writable directories, and the time one call may take.
//!
//! The calls themselves are wasmtime-wasi's, which keeps every path within its directory. What
//! is added here stands in front of them, under the same names.

use std::{
    fmt,
    fs::File,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};
use tokio::task::spawn_blocking;
use wasmtime::{AsContextMut as _, Caller, Extern, Linker, component::ResourceTable};
use wasmtime_wasi::{
    WasiView as _,
    filesystem::Descriptor,
    p1::{
        WasiP1Ctx,
        wasi_snapshot_preview1::{self as preview1, WasiSnapshotPreview1 as _},
    },
};
use wiggle::GuestMemory;

use super::{
    guest::{GuestState, Meter},
    launch::{Access, Directory},
};
use crate::limit::Limit;

/// Errors of preview 1, by its numbers.
const MFILE: i32 = 33;
const NOSPC: i32 = 51;
const NOTSUP: i32 = 58;
const PERM: i32 = 63;

/// `path_open`'s flag that creates.
const CREATE: i32 = 1;

/// The streams, which stay what they are: below this, no descriptor is ever a file.
const FIRST_FILE: i32 = 3;

/// What a new file or directory is taken to need beyond its content, in bytes.
const ENTRY_BYTES: u64 = 4096;

/// Most files and directories below the writable ones.
const MAX_ENTRIES: u64 = 10_000;

/// How deep writable directories are measured; what lies deeper is refused as too much.
const MAX_DEPTH: usize = 64;

/// How long a measurement of the writable directories is good for: a guest that overwrites
/// its own files waits for the next one, instead of making the host count without end.
const MEASURE_INTERVAL: Duration = Duration::from_millis(100);

/// A host call took longer than it may.
#[derive(Debug)]
pub(super) struct HostCallTimeout(pub(super) Duration);

impl fmt::Display for HostCallTimeout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "a host call took longer than {} ms",
            self.0.as_millis()
        )
    }
}

impl std::error::Error for HostCallTimeout {}

/// A directory that was granted, open.
pub(super) struct OpenDirectory {
    pub(super) guest: String,
    pub(super) file: Arc<File>,
    pub(super) access: Access,
}

/// Opens the directories, on a thread that may wait for a slow file system.
///
/// # Errors
/// One sentence that names the directory.
pub(super) async fn open(
    directories: Vec<Directory>,
    time: Duration,
) -> Result<Vec<OpenDirectory>, String> {
    if directories.is_empty() {
        return Ok(Vec::new());
    }
    let opening = spawn_blocking(move || {
        directories
            .into_iter()
            .map(|directory| {
                let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
                let opened = openat(CWD, &directory.host, flags, Mode::empty());
                let file = opened.map_err(|error| {
                    format!(
                        "its directory {:?} cannot be opened at {}: {error}",
                        directory.guest,
                        directory.host.display()
                    )
                })?;
                Ok(OpenDirectory {
                    guest: directory.guest,
                    file: Arc::new(file.into()),
                    access: directory.access,
                })
            })
            .collect()
    });
    match tokio::time::timeout(time, opening).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!(
            "its directories could not be opened within {} ms",
            time.as_millis()
        )),
    }
}

/// What a run's file calls are held to.
pub(super) struct Files {
    call_time: Duration,
    open_limit: usize,
    /// The directories themselves, which the guest did not open.
    granted: usize,
    /// Streams of files that a component holds.
    streams: Arc<AtomicUsize>,
    quota: Quota,
    may_link: bool,
    meter: Arc<Meter>,
}

/// What may lie in the writable directories.
struct Quota {
    roots: Vec<Arc<File>>,
    limit: u64,
    /// At least what lies there: measured, and all that was written since.
    bytes: u64,
    entries: u64,
    measured: Option<Instant>,
}

impl Files {
    pub(super) fn new(
        directories: &[OpenDirectory],
        call_time: Duration,
        open_limit: u32,
        byte_limit: u64,
        may_link: bool,
        meter: Arc<Meter>,
    ) -> Self {
        let writable = directories
            .iter()
            .filter(|directory| directory.access == Access::ReadWrite);
        Self {
            call_time,
            open_limit: open_limit as usize,
            granted: directories.len(),
            streams: Arc::default(),
            quota: Quota {
                roots: writable
                    .map(|directory| Arc::clone(&directory.file))
                    .collect(),
                limit: byte_limit,
                bytes: 0,
                entries: 0,
                measured: None,
            },
            may_link,
            meter,
        }
    }

    /// What one call may take, and who is told.
    pub(super) fn of_calls(&self) -> (Arc<Meter>, Duration) {
        (Arc::clone(&self.meter), self.call_time)
    }

    /// The count of streams that keep a file open.
    pub(super) fn streams(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.streams)
    }

    /// Whether one more file may be opened.
    pub(super) fn may_open(&self, table: &mut ResourceTable) -> bool {
        let open = descriptors(table).count().saturating_sub(self.granted)
            + self.streams.load(Ordering::Relaxed);
        if open < self.open_limit {
            self.meter
                .open_files_peak
                .fetch_max(open as u64 + 1, Ordering::Relaxed);
            return true;
        }
        self.meter.hit(Limit::OpenFiles);
        false
    }

    /// Whether `bytes` and `entries` more may lie in the writable directories; counts them if so.
    async fn reserve(&mut self, table: &mut ResourceTable, bytes: u64, entries: u64) -> bool {
        let quota = &mut self.quota;
        // Without a writable directory the call fails anyway, and says why.
        if quota.roots.is_empty() {
            return true;
        }
        if quota.measured.is_none() || !quota.has_room(bytes, entries) {
            if let Some(measured) = quota.measured {
                tokio::time::sleep(MEASURE_INTERVAL.saturating_sub(measured.elapsed())).await;
            }
            // Files that have no name any more are found nowhere else.
            let unlinked: u64 = descriptors(table)
                .filter_map(|descriptor| match descriptor {
                    Descriptor::File(file) => file.file.metadata().ok(),
                    Descriptor::Dir(_) => None,
                })
                .filter(|metadata| metadata.nlink() == 0)
                .map(|metadata| size_on_disk(metadata.len(), metadata.blocks()))
                .sum();
            let roots = quota.roots.clone();
            let measured = spawn_blocking(move || measure(&roots)).await;
            let Some((lying, entries)) = measured.ok().flatten() else {
                self.meter.hit(Limit::DirectoryBytes);
                return false;
            };
            quota.bytes = lying.saturating_add(unlinked);
            quota.entries = entries;
            quota.measured = Some(Instant::now());
        }
        let has_room = quota.has_room(bytes, entries);
        if has_room {
            quota.bytes = quota.bytes.saturating_add(bytes);
            quota.entries = quota.entries.saturating_add(entries);
        } else {
            self.meter.hit(Limit::DirectoryBytes);
        }
        self.meter
            .directory_bytes
            .store(quota.bytes, Ordering::Relaxed);
        has_room
    }
}

impl Quota {
    fn has_room(&self, bytes: u64, entries: u64) -> bool {
        self.bytes.saturating_add(bytes) <= self.limit
            && self.entries.saturating_add(entries) <= MAX_ENTRIES
    }
}

fn descriptors(table: &mut ResourceTable) -> impl Iterator<Item = &Descriptor> {
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

/// The guest's memory and WASI state, as wasmtime-wasi's calls want them.
fn parts<'a>(
    caller: &'a mut Caller<'_, GuestState>,
) -> wasmtime::Result<(GuestMemory<'a>, &'a mut WasiP1Ctx)> {
    let fuel = caller.as_context_mut().hostcall_fuel();
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        wasmtime::bail!("it exports no memory");
    };
    let (memory, state) = memory.data_and_store_mut(caller);
    state.wasi.set_hostcall_fuel(fuel);
    Ok((GuestMemory::Unshared(memory), &mut state.wasi))
}

/// Awaits a call that may wait for the system, for as long as it may.
pub(super) async fn in_time<T, E>(
    meter: Arc<Meter>,
    limit: Duration,
    call: impl Future<Output = Result<T, E>>,
    late: impl FnOnce(HostCallTimeout) -> E,
) -> Result<T, E> {
    let begun = Instant::now();
    let outcome = tokio::time::timeout(limit, call).await;
    let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    meter.host_call_longest.fetch_max(took, Ordering::Relaxed);
    outcome.unwrap_or_else(|_| {
        meter.hit(Limit::HostCallTime);
        Err(late(HostCallTimeout(limit)))
    })
}

/// The first of a list of buffers that is not empty, which is what one call writes.
fn first_length(caller: &mut Caller<'_, GuestState>, vectors: i32, count: i32) -> u64 {
    /// More than any C library passes; a longer list of empty buffers is not looked through.
    const MAX_VECTORS: usize = 1024;
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        return 0;
    };
    let bytes = memory.data(&*caller);
    let vectors = usize::try_from(vectors.cast_unsigned()).unwrap_or(usize::MAX);
    let count = usize::try_from(count.cast_unsigned()).unwrap_or(usize::MAX);
    let lengths = bytes
        .get(vectors..)
        .unwrap_or_default()
        .chunks_exact(8)
        .take(count.min(MAX_VECTORS))
        .filter_map(|vector| Some(u32::from_le_bytes(vector.get(4..)?.try_into().ok()?)));
    match lengths.clone().find(|length| *length > 0) {
        Some(length) => length.into(),
        None if count > MAX_VECTORS => u32::MAX.into(),
        None => 0,
    }
}

/// Reserves room; the error for the guest when there is none.
async fn reserved(
    caller: &mut Caller<'_, GuestState>,
    bytes: u64,
    entries: u64,
) -> wasmtime::Result<Option<i32>> {
    let GuestState { wasi, files, .. } = caller.data_mut();
    let (meter, limit) = files.of_calls();
    let reserve = async { Ok(files.reserve(wasi.ctx().table, bytes, entries).await) };
    let has_room = in_time(meter, limit, reserve, wasmtime::Error::from).await?;
    Ok((!has_room).then_some(NOSPC))
}

const PREVIEW1: &str = "wasi_snapshot_preview1";

/// Defines calls that are preview 1's own, each after its `check`, within the time of a call.
/// A check says what the guest gets instead, if anything.
macro_rules! define {
    ($linker:ident: $(fn $name:ident($caller:ident, $($arg:ident: $type:ty),*) $check:block)*) => {$(
        $linker.func_wrap_async(
            PREVIEW1,
            stringify!($name),
            |mut $caller: Caller<'_, GuestState>, ($($arg,)*): ($($type,)*)| {
                Box::new(async move {
                    let instead: Option<i32> = $check;
                    if let Some(answer) = instead {
                        return Ok(answer);
                    }
                    let (meter, limit) = $caller.data().files.of_calls();
                    let (mut memory, wasi) = parts(&mut $caller)?;
                    let call = preview1::$name(wasi, &mut memory, $($arg),*);
                    in_time(meter, limit, call, wasmtime::Error::from).await
                })
            },
        )?;
    )*};
}

/// Puts the bounded calls in the place of the unbounded ones.
pub(super) fn add_to_linker(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    define! { linker:
        fn path_open(caller, dir: i32, lookup: i32, path: i32, length: i32, open: i32, rights: i64, inherited: i64, flags: i32, out: i32) {
            let GuestState { wasi, files, .. } = caller.data_mut();
            if !files.may_open(wasi.ctx().table) {
                Some(MFILE)
            } else if open & CREATE != 0 {
                reserved(&mut caller, ENTRY_BYTES, 1).await?
            } else {
                None
            }
        }
        fn path_create_directory(caller, dir: i32, path: i32, length: i32) {
            reserved(&mut caller, ENTRY_BYTES, 1).await?
        }
        fn path_link(caller, dir: i32, lookup: i32, path: i32, length: i32, to: i32, to_path: i32, to_length: i32) {
            reserved(&mut caller, ENTRY_BYTES, 1).await?
        }
        // A link can lead out of its directory. The guest could not follow it, but whoever
        // works in that directory on the host could.
        fn path_symlink(caller, target: i32, target_length: i32, dir: i32, path: i32, length: i32) {
            (!caller.data().files.may_link).then_some(PERM)
        }
        fn fd_filestat_set_size(caller, file: i32, size: i64) {
            reserved(&mut caller, size.cast_unsigned(), 0).await?
        }
        fn fd_pwrite(caller, file: i32, vectors: i32, count: i32, offset: i64, out: i32) {
            let length = first_length(&mut caller, vectors, count);
            // Beyond the end of a file, the hole before it counts too once it is measured.
            reserved(&mut caller, length, 0).await?
        }
        fn path_filestat_get(caller, dir: i32, lookup: i32, path: i32, length: i32, out: i32) { None }
        fn path_filestat_set_times(caller, dir: i32, lookup: i32, path: i32, length: i32, accessed: i64, modified: i64, flags: i32) { None }
        fn path_readlink(caller, dir: i32, path: i32, length: i32, buffer: i32, size: i32, out: i32) { None }
        fn path_remove_directory(caller, dir: i32, path: i32, length: i32) { None }
        fn path_rename(caller, dir: i32, path: i32, length: i32, to: i32, to_path: i32, to_length: i32) { None }
        fn path_unlink_file(caller, dir: i32, path: i32, length: i32) { None }
        fn fd_advise(caller, file: i32, offset: i64, length: i64, advice: i32) { None }
        fn fd_datasync(caller, file: i32) { None }
        fn fd_sync(caller, file: i32) { None }
        fn fd_filestat_get(caller, file: i32, out: i32) { None }
        fn fd_filestat_set_times(caller, file: i32, accessed: i64, modified: i64, flags: i32) { None }
        fn fd_pread(caller, file: i32, vectors: i32, count: i32, offset: i64, out: i32) { None }
        fn fd_readdir(caller, dir: i32, buffer: i32, size: i32, cookie: i64, out: i32) { None }
        // Closing a stream or putting a file in its place would make it a file below
        // `FIRST_FILE`, or a file one of the streams, whose calls may wait for ever.
        fn fd_close(caller, file: i32) {
            let _ = &mut caller;
            (file.cast_unsigned() < FIRST_FILE.cast_unsigned()).then_some(0)
        }
        fn fd_renumber(caller, from: i32, to: i32) {
            let _ = &mut caller;
            (from.cast_unsigned() < FIRST_FILE.cast_unsigned() || to.cast_unsigned() < FIRST_FILE.cast_unsigned()).then_some(NOTSUP)
        }
    }
    linker.func_wrap_async(
        PREVIEW1,
        "fd_read",
        |mut caller: Caller<'_, GuestState>, (file, vectors, count, out): (i32, i32, i32, i32)| {
            Box::new(async move {
                let (meter, limit) = caller.data().files.of_calls();
                let (mut memory, wasi) = parts(&mut caller)?;
                let read = preview1::fd_read(wasi, &mut memory, file, vectors, count, out);
                // Waiting for the end of the input is how a guest waits to be stopped.
                if file.cast_unsigned() < FIRST_FILE.cast_unsigned() {
                    read.await
                } else {
                    in_time(meter, limit, read, wasmtime::Error::from).await
                }
            })
        },
    )?;
    linker.func_wrap_async(
        PREVIEW1,
        "fd_write",
        |mut caller: Caller<'_, GuestState>, (file, vectors, count, out): (i32, i32, i32, i32)| {
            Box::new(async move {
                let is_stream = file.cast_unsigned() < FIRST_FILE.cast_unsigned();
                if !is_stream {
                    let length = first_length(&mut caller, vectors, count);
                    if let Some(answer) = reserved(&mut caller, length, 0).await? {
                        return Ok(answer);
                    }
                }
                let (meter, limit) = caller.data().files.of_calls();
                let (mut memory, wasi) = parts(&mut caller)?;
                let write = preview1::fd_write(wasi, &mut memory, file, vectors, count, out);
                // The log has a rate of its own, and a guest that is ahead of it waits.
                if is_stream {
                    write.await
                } else {
                    in_time(meter, limit, write, wasmtime::Error::from).await
                }
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}
