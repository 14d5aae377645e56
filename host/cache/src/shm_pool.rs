//! The pool of memory that objects live in, and the view that workers map.
//!
//! The pool is reached through its descriptor only, never through a mapping: a peer that
//! cuts the segment short then costs a failed read instead of a SIGBUS. That also leaves
//! this crate without unsafe code.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::CacheError;
use segment::Segment;

pub(crate) mod headroom;
pub(crate) mod huge_pages;
pub(crate) mod prefault;
pub(crate) mod segment;
pub(crate) mod slot_allocator;

pub(crate) use segment::ReadFault;

/// Where the pool's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A POSIX shared-memory segment that workers on this machine open by name, as
    /// Python's `multiprocessing.shared_memory.SharedMemory(name=...)` does.
    Shm {
        /// The name, without (or with one) leading slash; it appears as `/dev/shm/<name>`.
        name: String,
    },
    /// Anonymous memory that no other process can reach. Bytes come in through
    /// `CacheEngine::write` only, so an object that was not written cannot be committed.
    Private,
}

/// A byte range of the pool that holds one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// Bytes from the start of the segment.
    pub offset: u64,
    /// Bytes of the object; the range behind it is rounded up to the pool's alignment.
    pub length: u64,
}

/// What a look at the segment found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SegmentHealth {
    /// As long as it was made.
    Intact,
    /// A peer changed its length; what lies behind `bytes` is lost.
    Resized {
        /// The length found.
        bytes: u64,
    },
}

/// The pool's memory: copies in, copies out, length check. It knows nothing of what is
/// free or which object lies where.
#[derive(Debug)]
pub(crate) struct ShmPool {
    segment: Segment,
    unlink_reported: AtomicBool,
}

impl ShmPool {
    /// Makes the memory, after checking that it fits.
    pub(crate) fn create(backing: &Backing, capacity_bytes: u64) -> Result<Self, CacheError> {
        let segment = match backing {
            Backing::Shm { name } => Segment::shared(name, capacity_bytes)?,
            Backing::Private => Segment::private(capacity_bytes)?,
        };
        Ok(Self {
            segment,
            unlink_reported: AtomicBool::new(false),
        })
    }

    /// The segment's name without a leading slash; `None` for private memory.
    pub(crate) fn name(&self) -> Option<&str> {
        self.segment.name()
    }

    /// Whether workers can write into the pool themselves.
    pub(crate) fn is_shared(&self) -> bool {
        self.segment.name().is_some()
    }

    /// Copies `bytes` to `offset`, showing each piece to `seen` on the way.
    pub(crate) fn write_at(
        &self,
        offset: u64,
        bytes: &[u8],
        seen: impl FnMut(&[u8]),
    ) -> rustix::io::Result<()> {
        self.segment.write_at(offset, bytes, seen)
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
        self.segment.read_at(offset, length, out, seen)
    }

    /// Gives `offset..offset + length` real pages, leaving their content alone.
    pub(crate) fn populate(&self, offset: u64, length: u64) -> rustix::io::Result<()> {
        self.segment.populate(offset, length)
    }

    /// Whether the kernel gives huge pages, in words.
    pub(crate) fn huge_pages(&self) -> &'static str {
        self.segment.huge_pages().name()
    }

    /// Looks whether a peer changed the segment's length. Private memory is sealed.
    pub(crate) fn health(&self) -> SegmentHealth {
        if !self.is_shared() {
            return SegmentHealth::Intact;
        }
        match self.segment.length() {
            Ok(bytes) if bytes == self.segment.capacity() => SegmentHealth::Intact,
            Ok(bytes) => SegmentHealth::Resized { bytes },
            Err(_) => SegmentHealth::Resized { bytes: 0 },
        }
    }

    /// Gives the segment its length back; new pages read as zeros.
    pub(crate) fn restore_length(&self) -> rustix::io::Result<()> {
        self.segment.restore_length()
    }

    /// Says once that another process removed the segment's name, which Python's resource
    /// tracker is known to do when a worker that attached exits.
    pub(crate) fn report_unlinked_name(&self) {
        if let Some(name) = self.segment.name()
            && !self.segment.is_linked()
            && !self.unlink_reported.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                segment = name,
                "another process removed the shared-memory segment's name: workers that \
                 are attached go on, new ones cannot attach until the server restarts"
            );
        }
    }
}
