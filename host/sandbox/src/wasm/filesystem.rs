//! Preview 1's file calls, held to what was granted: files open at once, bytes that lie in
//! writable directories, and the time one call may take.
//!
//! The calls themselves are wasmtime-wasi's, which keeps every path within its directory. What
//! is added here stands in front of them, under the same names.

use std::{
    fmt,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::task::spawn_blocking;
use wasmtime::{AsContextMut as _, Caller, Extern, Linker, component::ResourceTable};
use wasmtime_wasi::{
    WasiView as _,
    p1::{
        WasiP1Ctx,
        wasi_snapshot_preview1::{self as preview1, WasiSnapshotPreview1 as _},
    },
};
use wiggle::GuestMemory;

use super::{
    directory_quota::{Quota, descriptors},
    guest::{GuestState, Meter},
    launch::{Access, Directory},
};
use crate::limit::Limit;

/// Errors of preview 1, by its numbers.
const INVAL: i32 = 28;
const MFILE: i32 = 33;
const NOSPC: i32 = 51;
const NOTSUP: i32 = 58;
const PERM: i32 = 63;

/// `path_open`'s flag that creates.
const CREATE: i32 = 1;

/// The streams, which stay what they are: below this, no descriptor is ever a file.
const FIRST_FILE: i32 = 3;

/// The most that one call reads or writes, in bytes; a longer buffer is filled or written in part.
/// It stays below what a host call may copy of a guest's memory.
const TRANSFER_LIMIT: u32 = 512 << 10;

/// Buffers of one call that are looked at: more than any C library passes.
const MAX_VECTORS: usize = 1024;

/// What a new file or directory is taken to need beyond its content, in bytes.
pub(super) const ENTRY_BYTES: u64 = 4096;

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
    quota: Arc<Quota>,
    may_link: bool,
    meter: Arc<Meter>,
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
            quota: Arc::new(Quota::new(
                writable
                    .map(|directory| Arc::clone(&directory.file))
                    .collect(),
                byte_limit,
                Arc::clone(&meter),
            )),
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

    /// The room in the writable directories, which knows from now on what `table` has open.
    pub(super) fn quota(&self, table: &mut ResourceTable) -> Arc<Quota> {
        self.quota.note(table);
        Arc::clone(&self.quota)
    }

    /// Whether `bytes` and `entries` more may lie in the writable directories; counts them if so.
    pub(super) async fn reserve(
        &self,
        table: &mut ResourceTable,
        bytes: u64,
        entries: u64,
    ) -> bool {
        self.quota.note(table);
        self.quota.reserve(bytes, entries).await
    }
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
    state.note_stack();
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

/// Where in the guest's memory the length stands of the first of a list of buffers that is not
/// empty, which is the one that a call works on, and that length.
fn first_buffer(memory: &[u8], vectors: i32, count: i32) -> Option<(usize, u32)> {
    let vectors = usize::try_from(vectors.cast_unsigned()).ok()?;
    let count = usize::try_from(count.cast_unsigned()).ok()?;
    memory
        .get(vectors..)?
        .chunks_exact(8)
        .take(count)
        .enumerate()
        .find_map(|(place, vector)| {
            let length = u32::from_le_bytes(vector.get(4..)?.try_into().ok()?);
            (length > 0).then_some((vectors + place * 8 + 4, length))
        })
}

/// The length of a buffer that a call sees shortened.
struct Shortened {
    at: usize,
    length: u32,
}

/// The guest's memory; none of a module that exports none, whose call then fails.
fn memory_of<'a>(caller: &'a mut Caller<'_, GuestState>) -> &'a mut [u8] {
    match caller.get_export("memory") {
        Some(Extern::Memory(memory)) => memory.data_mut(caller),
        _ => &mut [],
    }
}

/// Shortens the buffer that a call is to work on to [`TRANSFER_LIMIT`], so that what it copies is
/// bounded: it may always do less than it was asked for. Returns the length that the call
/// transfers at most, and what to put back after it.
fn shorten(memory: &mut [u8], vectors: i32, count: i32) -> (u64, Option<Shortened>) {
    let Some((at, length)) = first_buffer(memory, vectors, count) else {
        return (0, None);
    };
    if length <= TRANSFER_LIMIT {
        return (length.into(), None);
    }
    if let Some(place) = memory.get_mut(at..at + 4) {
        place.copy_from_slice(&TRANSFER_LIMIT.to_le_bytes());
    }
    (TRANSFER_LIMIT.into(), Some(Shortened { at, length }))
}

impl Shortened {
    fn put_back(self, memory: &mut [u8]) {
        let end = self.at.saturating_add(4);
        // Where the call read something to this place, that stays.
        if let Some(place) = memory.get_mut(self.at..end)
            && *place == TRANSFER_LIMIT.to_le_bytes()
        {
            place.copy_from_slice(&self.length.to_le_bytes());
        }
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

/// Defines preview 1's calls that read and write. Those of the streams take the time that they
/// take: waiting for the end of the input is how a guest waits to be stopped, and the log has a
/// rate of its own, which a guest that is ahead of it waits for.
macro_rules! define_transfers {
    ($linker:ident: $(fn $name:ident($file:ident, $vectors:ident, $count:ident $(, $arg:ident: $type:ty)*) writes $writes:literal;)*) => {$(
        $linker.func_wrap_async(
            PREVIEW1,
            stringify!($name),
            |mut caller: Caller<'_, GuestState>, ($file, $vectors, $count, $($arg,)*): (i32, i32, i32, $($type,)*)| {
                Box::new(async move {
                    let is_stream = $file.cast_unsigned() < FIRST_FILE.cast_unsigned();
                    // A list that is not looked through is one that is refused.
                    if $count.cast_unsigned() as usize > MAX_VECTORS {
                        return Ok(INVAL);
                    }
                    let (length, shortened) = shorten(memory_of(&mut caller), $vectors, $count);
                    let refused = match $writes && !is_stream {
                        // Beyond the end of a file, the hole before it counts once it is measured.
                        true => reserved(&mut caller, length, 0).await?,
                        false => None,
                    };
                    let answer = match refused {
                        Some(answer) => answer,
                        None => {
                            let (meter, limit) = caller.data().files.of_calls();
                            let (mut memory, wasi) = parts(&mut caller)?;
                            let call = preview1::$name(wasi, &mut memory, $file, $vectors, $count $(, $arg)*);
                            match is_stream {
                                true => call.await?,
                                false => in_time(meter, limit, call, wasmtime::Error::from).await?,
                            }
                        }
                    };
                    if let Some(shortened) = shortened {
                        shortened.put_back(memory_of(&mut caller));
                    }
                    Ok(answer)
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
    define_transfers! { linker:
        fn fd_read(file, vectors, count, out: i32) writes false;
        fn fd_pread(file, vectors, count, offset: i64, out: i32) writes false;
        fn fd_write(file, vectors, count, out: i32) writes true;
        fn fd_pwrite(file, vectors, count, offset: i64, out: i32) writes true;
    }
    linker.allow_shadowing(false);
    Ok(())
}
