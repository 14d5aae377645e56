//! The KV cache engine: object keys, leases, the shared-memory pool and eviction.
//!
//! [`CacheEngine`] is the only front door. It knows nothing of ZMQ, HTTP or plugins:
//! the server translates requests into calls on it.
//!
//! What holds at every moment:
//!
//! 1. Only committed bytes are served. A slot is readable after its own commit, never
//!    because its writer left, expired or failed.
//! 2. Locks have owners. A read lock belongs to one lease of one owner; the end of one
//!    lease never gives back the lock of another.
//! 3. Bytes stay where they are until the last live lease on them has ended.
//! 4. An eviction policy only orders objects; the core decides what may go.
//! 5. No tenant is pushed below its floor by another, and none goes beyond its cap.
#![forbid(unsafe_code)]

pub mod clock;
pub mod engine;
pub mod error;
pub mod eviction;
pub mod key;
mod l1;
mod shm_pool;
pub mod simulator;
mod sync;
pub mod token_hasher;

pub use clock::{Clock, ManualClock, SystemClock};
pub use engine::{
    Budget, CacheEngine, CacheObserver, Cleared, Committed, EVERYBODY_ELSE, EndedOwner,
    EngineConfig, EngineStatus, MAX_TENANTS, ObjectDigest, Prefault, PrefixLock, ReadLease,
    RemoveReason, Reservation, SaltUsage, Tenant, TenantUsage, check_tenants,
};
pub use error::{BudgetError, CacheError, LeaseError, ReadError, ReserveError};
pub use eviction::{Candidate, PolicyKind, Ranker};
pub use key::{CacheSalt, ChunkHash, KeyScope, ObjectKey, SaltError, kv_rank};
pub use l1::lease::{LeaseId, OwnerId};
pub use shm_pool::segment::remove_dead_segments;
pub use shm_pool::slot_allocator::SlotAllocator;
pub use shm_pool::{Backing, Slot};
pub use token_hasher::TokenHasher;
