//! Shared memory of engines, reached through descriptors and never mapped: a mapping whose file
//! another process cuts ends this one with SIGBUS, a descriptor only reads less.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use rustix::{
    fd::OwnedFd,
    fs::{FileType, Mode, OFlags, Stat, fstat, open, stat},
    io::{Errno, pread, pwrite},
    process::{Resource, getrlimit},
};

/// How many segments are open, of all registrations.
#[derive(Debug)]
pub(super) struct OpenSegments {
    count: Arc<AtomicUsize>,
    limit: usize,
}

impl Default for OpenSegments {
    /// Takes at most a quarter of the files that this process may open.
    fn default() -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 16);
        Self {
            count: Arc::default(),
            limit: usize::try_from(files / 4).unwrap_or(usize::MAX),
        }
    }
}

/// One of the [`OpenSegments`], until it is dropped.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open segment of an engine.
#[derive(Debug)]
pub(super) struct Segment {
    file: OwnedFd,
    /// Bytes that its engine registered.
    bytes: u64,
    /// What it is, whatever name it has.
    identity: (u64, u64),
    _counted: Counted,
}

/// Why bytes could not be copied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum SegmentError {
    #[error("is shorter than it was registered")]
    Cut,
    #[error("has holes, which would be filled at this server's cost")]
    Sparse,
    #[error("cannot be used: {0}")]
    Os(Errno),
}

/// The bare name of a segment: one component of a path, so that it can lead nowhere else.
fn bare_name(name: &str) -> Option<&str> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    let is_name = !bare.is_empty() && bare.len() <= 255 && !bare.contains(['/', '\0']);
    (is_name && bare != "." && bare != "..").then_some(bare)
}

impl OpenSegments {
    /// Opens a segment of `bytes` bytes that `user` owns. `pool` is the name of the server's own
    /// one, which no engine may register.
    ///
    /// # Errors
    /// A sentence with the way out.
    pub(super) fn open(
        &self,
        name: &str,
        bytes: u64,
        user: u32,
        pool: Option<&str>,
    ) -> Result<Segment, String> {
        let shown = name.escape_default();
        let bare = bare_name(name).ok_or_else(|| {
            format!("kv_cache: `{shown}` is no name of shared memory: send one without slashes")
        })?;
        let open_now = self.count.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&self.count));
        if open_now >= self.limit {
            return Err(format!(
                "engines have {open_now} segments open already, as many as the limit on open files allows: unregister some workers, or raise it (ulimit -n)"
            ));
        }
        let flags =
            OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open(format!("/dev/shm/{bare}"), flags, Mode::empty()).map_err(|errno| {
            format!(
                "kv_cache: segment `{shown}` cannot be opened ({errno}): engine and server must see one /dev/shm, and the server must be allowed to write to the engine's segments"
            )
        })?;
        let failed = |errno| format!("kv_cache: segment `{shown}`: {errno}");
        let found = fstat(&file).map_err(failed)?;
        let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
        if !is_file || found.st_uid != user {
            return Err(format!(
                "kv_cache: segment `{shown}` does not belong to the engine's user ({user}): register memory of your own"
            ));
        }
        let identity = (found.st_dev, found.st_ino);
        let is_pool = pool
            .and_then(|pool| stat(format!("/dev/shm/{pool}")).ok())
            .is_some_and(|pool| (pool.st_dev, pool.st_ino) == identity);
        if is_pool {
            return Err(format!(
                "kv_cache: segment `{shown}` is this server's pool: register memory of the engine"
            ));
        }
        check(&found, bytes).map_err(|problem| {
            format!("kv_cache: segment `{shown}` of {bytes} bytes {problem}: write it in full before registering it")
        })?;
        Ok(Segment {
            file,
            bytes,
            identity,
            _counted: counted,
        })
    }
}

/// Whether a segment still is what was registered.
///
/// Writing into a hole would make its pages this server's in the kernel's accounts, so that an
/// engine could exhaust the server's memory with segments of its own.
fn check(found: &Stat, bytes: u64) -> Result<(), SegmentError> {
    let size = u64::try_from(found.st_size).unwrap_or(0);
    let allocated = u64::try_from(found.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512);
    if size < bytes {
        Err(SegmentError::Cut)
    } else if allocated < size {
        Err(SegmentError::Sparse)
    } else {
        Ok(())
    }
}

impl Segment {
    /// Device and inode.
    pub(super) const fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Whether the segment still is what was registered: to be asked before writing.
    ///
    /// # Errors
    /// [`SegmentError`]
    pub(super) fn check(&self) -> Result<(), SegmentError> {
        check(&fstat(&self.file).map_err(SegmentError::Os)?, self.bytes)
    }

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// [`SegmentError`]; `out` holds anything then.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), SegmentError> {
        self.within(offset, out.len())?;
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match pread(&self.file, rest, offset + filled as u64) {
                Ok(0) => return Err(SegmentError::Cut),
                Ok(count) => filled += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(SegmentError::Os(errno)),
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// [`SegmentError`]; some of the bytes may be written then.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), SegmentError> {
        self.within(offset, bytes.len())?;
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match pwrite(&self.file, rest, offset + written as u64) {
                Ok(0) => return Err(SegmentError::Cut),
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(SegmentError::Os(errno)),
            }
        }
        Ok(())
    }

    /// Writing behind the end would make the segment longer.
    fn within(&self, offset: u64, length: usize) -> Result<(), SegmentError> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(SegmentError::Cut),
        }
    }
}
