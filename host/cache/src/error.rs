//! What can go wrong at the engine's border.

use std::io;
use std::sync::Arc;

use crate::key::CacheSalt;

/// Why an engine could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A setting is outside what the engine can honour.
    #[error("{field} {reason}")]
    InvalidConfig {
        /// The setting, by its field name in the engine's configuration.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The shared-memory file system cannot hold the pool.
    #[error(
        "pool of {pool} does not fit /dev/shm ({free} free): lower --l1-size-gb, or remount \
         with `mount -o remount,size={remount_gib}G /dev/shm`"
    )]
    ShmTooSmall {
        /// Pool size in binary units.
        pool: String,
        /// Free space in binary units.
        free: String,
        /// A file system size, in GiB, that would hold the pool.
        remount_gib: u64,
    },
    /// The memory this process may use cannot hold the pool.
    #[error(
        "pool of {pool} does not fit the memory available ({free} by {source_name}): lower \
         --l1-size-gb, or give the machine or container more memory"
    )]
    MemoryTooSmall {
        /// Pool size in binary units.
        pool: String,
        /// Available memory in binary units.
        free: String,
        /// Which limit was the tightest.
        source_name: &'static str,
    },
    /// A running process holds the segment of that name.
    #[error(
        "shared-memory segment `{name}` is in use by a running server: stop that server, or \
         choose another name with --shm-name"
    )]
    ShmInUse {
        /// The segment's name, without the leading slash.
        name: String,
    },
    /// Something of that name exists that this user may not take over.
    #[error(
        "shared-memory segment `{name}` belongs to another user or is no plain file: remove \
         /dev/shm/{name}, or choose another name with --shm-name"
    )]
    ShmForeign {
        /// The segment's name, without the leading slash.
        name: String,
    },
    /// A tenant's budget cannot be honoured.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The operating system refused a step.
    #[error("could not {step}")]
    Os {
        /// What was being done.
        step: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Why a tenant cannot have a budget. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// The pool cannot keep all floors.
    #[error(
        "floor of {floor_bytes} bytes of tenant `{tenant}` does not fit: other floors leave \
         {left_bytes} bytes of the pool: lower a floor or raise --l1-size-gb"
    )]
    FloorsExceedPool {
        /// The tenant.
        tenant: Arc<str>,
        /// The floor it asks for.
        floor_bytes: u64,
        /// Bytes of the pool that are nobody's floor.
        left_bytes: u64,
    },
    /// A tenant could never reach its own floor.
    #[error(
        "cap of {cap_bytes} bytes of tenant `{tenant}` is below its floor of {floor_bytes}: \
         raise the cap or lower the floor"
    )]
    CapBelowFloor {
        /// The tenant.
        tenant: Arc<str>,
        /// The cap it asks for.
        cap_bytes: u64,
        /// Its floor.
        floor_bytes: u64,
    },
    /// An object cannot count for two tenants.
    #[error("cache_salt `{salt}` belongs to tenant `{tenant}` already: name it in one place")]
    SaltTaken {
        /// The salt.
        salt: CacheSalt,
        /// The tenant that has it.
        tenant: Arc<str>,
    },
    /// Each tenant costs time when room is needed.
    #[error("there are {limit} tenants with budgets already: remove one first")]
    TooMany {
        /// How many there can be.
        limit: usize,
    },
}

/// Why slots could not be reserved. Nothing is held afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Not even evicting all that may go would make room.
    #[error(
        "pool is full: {needed_bytes} bytes needed, {free_bytes} free and {evictable_bytes} \
         evictable: raise --l1-size-gb, or wait for readers and writers to finish"
    )]
    PoolFull {
        /// Bytes the reservation needs, alignment included; saturated if beyond `u64`.
        needed_bytes: u64,
        /// Bytes free at that moment, in whatever pieces.
        free_bytes: u64,
        /// Bytes of objects that nobody holds and the policy may give up.
        evictable_bytes: u64,
    },
    /// The tenant's cap leaves no room, and too little of its own may go.
    #[error(
        "cap of {cap_bytes} bytes is reached: {needed_bytes} bytes needed, {used_bytes} used and \
         {evictable_bytes} of them evictable: raise the tenant's cap"
    )]
    CapReached {
        /// Bytes the reservation needs, alignment included; saturated if beyond `u64`.
        needed_bytes: u64,
        /// Bytes that the tenant may use at most.
        cap_bytes: u64,
        /// Bytes that it uses.
        used_bytes: u64,
        /// Bytes of its objects that nobody holds and the policy may give up.
        evictable_bytes: u64,
    },
    /// One object is larger than the whole pool.
    #[error(
        "object of {object_bytes} bytes is larger than the pool of {capacity_bytes}: raise \
         --l1-size-gb or lower --chunk-size"
    )]
    TooLarge {
        /// Bytes of one object.
        object_bytes: u64,
        /// Bytes of the pool.
        capacity_bytes: u64,
    },
    /// Objects of no bytes cannot be stored.
    #[error("object_bytes is zero: register the worker with a non-empty chunk shape")]
    ZeroLength,
    /// The owner has ended (or never was), so nobody would give the slots back.
    #[error("owner has ended: register again before storing")]
    OwnerEnded,
}

/// Why an operation on a lease was refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The lease ran out and its slots were taken back.
    #[error("lease has expired: reserve again, or raise --l1-write-ttl-seconds")]
    Expired,
    /// No such lease: it never was, or it was committed or aborted.
    #[error("lease is unknown: it was never given out or has already ended")]
    Unknown,
    /// The lease belongs to someone else, or is of another kind.
    #[error("lease belongs to another owner")]
    NotOwner,
    /// The lease has no object at that place.
    #[error("index {index} is outside the lease")]
    NoSuchIndex {
        /// The index asked for.
        index: usize,
    },
    /// The bytes handed over are not as many as the slot holds.
    #[error("object has {got} bytes where its slot takes {expected}")]
    WrongLength {
        /// Bytes of the slot.
        expected: u64,
        /// Bytes handed over; counting stops at the first part that goes beyond.
        got: u64,
    },
    /// Another thread is copying into the same slot.
    #[error("another write to the same object is in progress")]
    WriteInProgress,
    /// The pool's memory could not be written.
    #[error("bytes could not be written to the pool (os error {errno})")]
    Io {
        /// The system's error number.
        errno: i32,
    },
}

/// Why an object's bytes were not handed out. The output buffer is as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The read lease does not allow it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The bytes are not those that were committed; the object has been withdrawn.
    #[error("object is corrupt and has been withdrawn: compute it again")]
    Corrupt,
    /// There is no memory for the copy.
    #[error("no memory for a copy of {bytes} bytes")]
    OutOfMemory {
        /// Bytes of the object.
        bytes: u64,
    },
}
