//! One block of memory behind a descriptor: made, sized, copied, unlinked.

use std::os::fd::OwnedFd;

use rustix::fs::{self, FallocateFlags, FileType, FlockOperation, MemfdFlags, Mode, SealFlags};
use rustix::io::{self, Errno};
use rustix::shm;

use super::headroom;
use super::huge_pages::HugePages;
use crate::error::CacheError;

/// Longest segment name: a file name in `/dev/shm`.
const MAX_NAME_BYTES: usize = 255;

/// Bytes copied at a time, so that what is done to them besides (zeroing the buffer before
/// it may be read into, summing) finds them in the processor's cache.
const STEP_BYTES: usize = 256 << 10;

/// Times to begin again when another server starts or stops under the same name. Each
/// round is lost to a rival that made progress, so a few are plenty.
const CREATE_ROUNDS: usize = 8;

/// Why bytes could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadFault {
    /// The segment ends before the bytes do, or the system failed the read.
    Lost,
    /// The destination could not grow.
    OutOfMemory,
}

/// Shared or private memory of a fixed capacity. Unlinks its name when dropped.
#[derive(Debug)]
pub(crate) struct Segment {
    descriptor: OwnedFd,
    name: Option<String>,
    capacity: u64,
    inode: u64,
    huge_pages: HugePages,
}

impl Segment {
    /// Makes the segment `name`, mode 0600, exactly `capacity` bytes long.
    ///
    /// 1. A segment of that name left by a dead server is removed: its owner holds a
    ///    `flock` that ends with the process, so one whose lock can be had is stale.
    /// 2. Free space is checked before anything is made.
    /// 3. The new segment is locked, and only counts if its name still leads to it.
    pub(crate) fn shared(name: &str, capacity: u64) -> Result<Self, CacheError> {
        let name = name.strip_prefix('/').unwrap_or(name);
        check_name(name)?;
        for _ in 0..CREATE_ROUNDS {
            remove_stale(name)?;
            headroom::check_shm(capacity)?;
            headroom::check_memory(capacity)?;
            let flags = shm::OFlags::RDWR | shm::OFlags::CREATE | shm::OFlags::EXCL;
            let descriptor = match shm::open(name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(descriptor) => descriptor,
                Err(Errno::EXIST) => continue,
                Err(errno) => return Err(os("create the shared-memory segment", errno)),
            };
            match fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => continue,
                Err(errno) => return Err(os("lock the shared-memory segment", errno)),
            }
            let stat = fs::fstat(&descriptor)
                .map_err(|errno| os("inspect the shared-memory segment", errno))?;
            if stat.st_nlink == 0 {
                continue;
            }
            // From here on dropping the segment removes its name.
            let segment = Self {
                descriptor,
                name: Some(name.to_owned()),
                capacity,
                inode: stat.st_ino,
                huge_pages: HugePages::of_shm(),
            };
            // The process's umask may have taken more than the mode says, never less.
            fs::fchmod(&segment.descriptor, Mode::RUSR | Mode::WUSR)
                .map_err(|errno| os("set the mode of the shared-memory segment", errno))?;
            fs::ftruncate(&segment.descriptor, capacity)
                .map_err(|errno| os("size the shared-memory segment", errno))?;
            return Ok(segment);
        }
        Err(CacheError::ShmInUse {
            name: name.to_owned(),
        })
    }

    /// Makes `capacity` bytes that only this process can reach and nobody can resize.
    pub(crate) fn private(capacity: u64) -> Result<Self, CacheError> {
        headroom::check_memory(capacity)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let descriptor = fs::memfd_create("stockade-l1", flags)
            .map_err(|errno| os("create the private pool", errno))?;
        fs::ftruncate(&descriptor, capacity).map_err(|errno| os("size the private pool", errno))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fs::fcntl_add_seals(&descriptor, seals)
            .map_err(|errno| os("seal the private pool", errno))?;
        Ok(Self {
            descriptor,
            name: None,
            capacity,
            inode: 0,
            huge_pages: HugePages::of_private_memory(),
        })
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The length the segment has now, which a peer may have changed.
    pub(crate) fn length(&self) -> io::Result<u64> {
        let stat = fs::fstat(&self.descriptor)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    pub(crate) fn restore_length(&self) -> io::Result<()> {
        fs::ftruncate(&self.descriptor, self.capacity)
    }

    /// Whether the segment still has its name.
    pub(crate) fn is_linked(&self) -> bool {
        fs::fstat(&self.descriptor).is_ok_and(|stat| stat.st_nlink > 0)
    }

    /// Copies `bytes` to `offset`, showing each piece to `seen` on the way.
    pub(crate) fn write_at(
        &self,
        mut offset: u64,
        bytes: &[u8],
        mut seen: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        for step in bytes.chunks(STEP_BYTES) {
            seen(step);
            self.write_step(offset, step)?;
            offset += step.len() as u64;
        }
        Ok(())
    }

    fn write_step(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match io::pwrite(&self.descriptor, bytes, offset) {
                Ok(0) => return Err(Errno::NOSPC),
                Ok(written) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    offset += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Appends `length` bytes from `offset` to `out`, showing each piece to `seen`; on
    /// failure `out` is as before.
    pub(crate) fn read_at(
        &self,
        offset: u64,
        length: u64,
        out: &mut Vec<u8>,
        seen: impl FnMut(&[u8]),
    ) -> Result<(), ReadFault> {
        let start = out.len();
        let result = self.append(offset, length, out, seen);
        if result.is_err() {
            out.truncate(start);
        }
        result
    }

    fn append(
        &self,
        offset: u64,
        length: u64,
        out: &mut Vec<u8>,
        mut seen: impl FnMut(&[u8]),
    ) -> Result<(), ReadFault> {
        let length = usize::try_from(length).map_err(|_| ReadFault::OutOfMemory)?;
        let start = out.len();
        let end = start.checked_add(length).ok_or(ReadFault::OutOfMemory)?;
        out.try_reserve(length)
            .map_err(|_| ReadFault::OutOfMemory)?;
        while out.len() < end {
            let filled = out.len();
            let at = offset
                .checked_add((filled - start) as u64)
                .ok_or(ReadFault::Lost)?;
            out.resize(filled + (end - filled).min(STEP_BYTES), 0);
            let step = out.get_mut(filled..).unwrap_or_default();
            let read = match io::pread(&self.descriptor, step, at) {
                Ok(0) => return Err(ReadFault::Lost),
                Ok(read) => read,
                Err(Errno::INTR) => 0,
                Err(_) => return Err(ReadFault::Lost),
            };
            out.truncate(filled + read);
            seen(out.get(filled..).unwrap_or_default());
        }
        Ok(())
    }

    /// Gives a range real pages; in huge ones where the kernel gives them.
    pub(crate) fn populate(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.huge_pages == HugePages::OnAdvice {
            match self.populate_mapped(offset, length) {
                // Too old a kernel, or too little address space: ordinary pages do as well.
                Err(Errno::INVAL | Errno::NOMEM) => {}
                result => return result,
            }
        }
        loop {
            // Without KEEP_SIZE a range beyond the end would grow the segment.
            match fs::fallocate(&self.descriptor, FallocateFlags::KEEP_SIZE, offset, length) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

impl Segment {
    /// Touches a range through a mapping that lives no longer than this call and that this
    /// process never reads or writes. A range that a peer cut off is an error of the call
    /// here, not a SIGBUS.
    fn populate_mapped(&self, offset: u64, length: u64) -> io::Result<()> {
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(number) => Errno::from_raw_os_error(number),
            None => Errno::INVAL,
        };
        let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
        let mut options = memmap2::MmapOptions::new();
        let mapping = options.offset(offset).len(length);
        let mapping = mapping.map_raw(&self.descriptor).map_err(failed)?;
        mapping
            .advise(memmap2::Advice::HugePage)
            .and_then(|()| mapping.advise(memmap2::Advice::PopulateWrite))
            .map_err(failed)
    }

    pub(crate) fn huge_pages(&self) -> HugePages {
        self.huge_pages
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        // Another server may have put its own segment under the name after someone
        // removed ours; that one must stay.
        let ours = shm::open(name.as_str(), shm::OFlags::RDONLY, Mode::empty())
            .and_then(fs::fstat)
            .is_ok_and(|stat| stat.st_ino == self.inode);
        if ours && let Err(errno) = shm::unlink(name.as_str()) {
            tracing::warn!(segment = %name, %errno, "could not remove the shared-memory segment");
        }
    }
}

fn check_name(name: &str) -> Result<(), CacheError> {
    let reason = if name.is_empty() || name == "." || name == ".." {
        "is empty or a directory: give a plain name such as `stockade`"
    } else if name.contains(['/', '\0']) {
        "contains '/' or NUL: give a plain name such as `stockade`"
    } else if name.len() > MAX_NAME_BYTES {
        "is longer than 255 bytes: give a shorter name"
    } else {
        return Ok(());
    };
    Err(CacheError::InvalidConfig {
        field: "shm_name",
        reason: reason.to_owned(),
    })
}

/// Removes the segment `name` if its server is dead.
///
/// The name is only removed while this process holds the lock of the very segment it
/// leads to: a link count of zero after locking means that another starter was faster.
fn remove_stale(name: &str) -> Result<(), CacheError> {
    for _ in 0..CREATE_ROUNDS {
        let descriptor = match shm::open(name, shm::OFlags::RDWR, Mode::empty()) {
            Ok(descriptor) => descriptor,
            Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ACCESS | Errno::PERM | Errno::LOOP | Errno::ISDIR) => {
                return Err(CacheError::ShmForeign {
                    name: name.to_owned(),
                });
            }
            Err(errno) => return Err(os("open the shared-memory segment", errno)),
        };
        match fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(CacheError::ShmInUse {
                    name: name.to_owned(),
                });
            }
            Err(errno) => return Err(os("lock the shared-memory segment", errno)),
        }
        let stat = fs::fstat(&descriptor)
            .map_err(|errno| os("inspect the shared-memory segment", errno))?;
        if stat.st_nlink == 0 {
            continue;
        }
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let is_own = stat.st_uid == rustix::process::geteuid().as_raw();
        if !is_file || !is_own {
            return Err(CacheError::ShmForeign {
                name: name.to_owned(),
            });
        }
        match shm::unlink(name) {
            Ok(()) => {
                tracing::info!(
                    segment = name,
                    "removed the segment of a server that is gone"
                );
                return Ok(());
            }
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(os("remove a stale shared-memory segment", errno)),
        }
    }
    Err(CacheError::ShmInUse {
        name: name.to_owned(),
    })
}

/// Removes the segments called `prefix` and digits whose servers are dead; returns how many.
///
/// A server that names its segment after a port that the kernel chose never meets its old
/// name again, so a killed one's memory would stay taken. Segments of living servers are
/// locked, and of other users left alone.
pub fn remove_dead_segments(prefix: &str) -> usize {
    let Ok(entries) = std::fs::read_dir("/dev/shm") else {
        return 0;
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let ours = names.filter(|name| {
        let digits = name.strip_prefix(prefix).unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    ours.filter(|name| {
        let path = std::path::Path::new("/dev/shm").join(name);
        remove_stale(name).is_ok() && !path.exists()
    })
    .count()
}

fn os(step: &'static str, errno: Errno) -> CacheError {
    CacheError::Os {
        step,
        source: errno.into(),
    }
}
