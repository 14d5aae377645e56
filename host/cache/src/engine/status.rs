//! What the engine's calls answer.

use super::TenantUsage;
use crate::key::CacheSalt;
use crate::l1::lease::LeaseId;
use crate::shm_pool::Slot;

/// Slots to write to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reservation {
    /// Names the reservation in later calls; `None` if there was nothing to reserve.
    pub lease: Option<LeaseId>,
    /// (index into the keys of the call, slot), by rising index. Keys that are missing
    /// here are readable or reserved already, or occur earlier in the call.
    pub slots: Vec<(usize, Slot)>,
}

/// What a commit did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Committed {
    /// Objects that are readable now.
    pub admitted: usize,
    /// Objects that were not written in full and are gone.
    pub discarded: usize,
}

/// What an owner left behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EndedOwner {
    /// Reservations that were not committed.
    pub aborted_objects: usize,
    /// Read locks that were still held.
    pub released_locks: u64,
}

/// What a lookup found and locked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixLock {
    /// Names the locks in later calls; `None` if nothing was found.
    pub lease: Option<LeaseId>,
    /// Chunks that are readable in every row, from the first on without a gap.
    pub hit_chunks: usize,
}

/// Bytes to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadLease {
    /// Names the lease in later calls.
    pub lease: LeaseId,
    /// Where the objects are, in the order of the chunks.
    pub slots: Vec<Slot>,
}

/// What clearing did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleared {
    /// Objects withdrawn.
    pub removed: usize,
    /// Objects that stay: reserved ones and, unless forced, locked ones.
    pub kept: usize,
}

/// What one cache salt uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaltUsage {
    /// The salt.
    pub cache_salt: CacheSalt,
    /// Bytes of its slots, alignment and reservations included.
    pub bytes: u64,
    /// Its objects, reserved and withdrawn ones included.
    pub objects: u64,
}

/// The engine at one moment. Bytes include alignment; counters run since the opening.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStatus {
    /// Objects that lookups find.
    pub readable_objects: usize,
    /// Objects reserved and not committed.
    pub reserved_objects: usize,
    /// Objects that nobody finds but whose bytes a live lease still needs.
    pub withdrawn_objects: usize,
    /// Objects with at least one read lock.
    pub read_locked_objects: usize,
    /// Read locks, summed over objects.
    pub object_locks: u64,
    /// Read locks, summed over leases; always equal to `object_locks`.
    pub owned_locks: u64,
    /// Owners that have not ended.
    pub owners: usize,
    /// Leases that have not ended.
    pub leases: usize,
    /// Bytes of all slots.
    pub used_bytes: u64,
    /// Bytes of reserved slots.
    pub staging_bytes: u64,
    /// Bytes of objects that may be evicted now.
    pub evictable_bytes: u64,
    /// Bytes that can be used at most; below the configured size if memory ran out.
    pub capacity_bytes: u64,
    /// `used_bytes / capacity_bytes`.
    pub usage_ratio: f64,
    /// Bytes of the largest free range.
    pub largest_free_bytes: u64,
    /// Bytes of the pool that have real memory behind them.
    pub touched_bytes: u64,
    /// Whether the kernel gives huge pages: `given`, `given on advice` (which is taken when
    /// the pool is prepared) or `not given`.
    pub huge_pages: &'static str,
    /// Objects evicted, at the watermark and on demand.
    pub evicted_objects: u64,
    /// Bytes evicted.
    pub evicted_bytes: u64,
    /// Objects evicted because a reservation needed their place.
    pub demand_evicted_objects: u64,
    /// Objects evicted at the watermark in an order from outside.
    pub ranked_evicted_objects: u64,
    /// Objects withdrawn because their bytes were wrong or cut off.
    pub corrupt_objects: u64,
    /// Reservations that found no room.
    pub allocation_failures: u64,
    /// Write leases that ran out.
    pub expired_write_leases: u64,
    /// Lookup and read leases that ran out.
    pub expired_read_leases: u64,
    /// Times a peer changed the segment's length.
    pub segment_repairs: u64,
    /// Keys whose change was not reported because the observer was too slow.
    pub dropped_notices: u64,
    /// Usage by tenant, in the order in which they were made; first the one that all other
    /// salts belong to.
    pub tenants: Vec<TenantUsage>,
    /// Usage by salt, most bytes first.
    pub salts: Vec<SaltUsage>,
}

/// Where an object's bytes are, and what they add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectDigest {
    /// Its place in the pool.
    pub slot: Slot,
    /// BLAKE3 of its bytes.
    pub blake3: [u8; 32],
}
