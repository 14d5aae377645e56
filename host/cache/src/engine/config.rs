//! What an engine is opened with, and what of it can be honoured.

use std::time::Duration;

use super::Tenant;
use crate::error::CacheError;
use crate::eviction::PolicyKind;
use crate::shm_pool::Backing;

/// Longest lease: a year. Longer ones would only make deadlines overflow.
const MAX_TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Largest alignment: the size of a large huge page.
const MAX_ALIGN_BYTES: u64 = 1 << 30;

/// Slots that objects can be numbered for.
const MAX_SLOTS: u64 = u32::MAX as u64;

/// Settings of an engine; names follow LMCache's flags.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Bytes of the pool (`--l1-size-gb`).
    pub capacity_bytes: u64,
    /// Each slot starts at, and takes, a multiple of this many bytes; a power of two
    /// (`--l1-align-bytes`).
    pub align_bytes: u64,
    /// Where the memory comes from (`--shm-name`).
    pub backing: Backing,
    /// What goes first when room is needed (`--eviction-policy`).
    pub policy: PolicyKind,
    /// Who may use how much. Salts of no tenant here share what the floors leave, as one
    /// tenant of weight 1.
    pub tenants: Vec<Tenant>,
    /// Share of the pool in use at which eviction starts, 0.0 to 1.0
    /// (`--eviction-trigger-watermark`).
    pub trigger_watermark: f64,
    /// Share of the used bytes that it then frees, 0.0 to 1.0 (`--eviction-ratio`).
    pub eviction_ratio: f64,
    /// Life of a reservation (`--l1-write-ttl-seconds`).
    pub write_ttl: Duration,
    /// Life of a lookup's locks and of a read lease (`--l1-read-ttl-seconds`).
    pub read_ttl: Duration,
    /// Whether objects that come in through `CacheEngine::write` get a CRC-32C that
    /// `CacheEngine::read` verifies. Objects that workers write themselves have none.
    pub checksum: bool,
    /// Which of the pool gets real memory before it is used.
    pub prefault: Prefault,
}

/// Which of the pool gets real memory before it is used. The segment has its full length
/// from the start whatever this says, so that workers' mappings never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefault {
    /// None: whoever writes to a slot first waits for the kernel.
    Nothing,
    /// All, in the background from the opening on.
    Everything,
    /// The pool grows with its use (`--l1-use-lazy`): some at first, and then always a
    /// stretch ahead of what is used. Slots that have memory already are handed out first.
    AheadOfUse {
        /// Bytes prepared at first (`--l1-init-size-gb`).
        initial_bytes: u64,
        /// Bytes prepared beyond those in use.
        ahead_bytes: u64,
    },
}

impl Prefault {
    /// Up to where a pool should be prepared of which so much is used.
    pub(super) fn wanted_bytes(self, used_bytes: u64) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Everything => u64::MAX,
            Self::AheadOfUse {
                initial_bytes,
                ahead_bytes,
            } => initial_bytes.max(used_bytes.saturating_add(ahead_bytes)),
        }
    }
}

impl EngineConfig {
    /// LMCache's defaults, with least-recently-used eviction, checksums and prefaulting.
    pub fn new(capacity_bytes: u64, backing: Backing) -> Self {
        Self {
            capacity_bytes,
            align_bytes: 4096,
            backing,
            policy: PolicyKind::Lru,
            tenants: Vec::new(),
            trigger_watermark: 0.8,
            eviction_ratio: 0.2,
            write_ttl: Duration::from_secs(600),
            read_ttl: Duration::from_secs(300),
            checksum: true,
            prefault: Prefault::Everything,
        }
    }

    pub(super) fn check(&self) -> Result<(), CacheError> {
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let (field, reason) =
            if !self.align_bytes.is_power_of_two() || self.align_bytes > MAX_ALIGN_BYTES {
                ("align_bytes", "must be a power of two up to 1 GiB")
            } else if self.capacity_bytes < self.align_bytes {
                ("capacity_bytes", "must hold at least one aligned slot")
            } else if i64::try_from(self.capacity_bytes).is_err() {
                ("capacity_bytes", "is beyond what a file can be")
            } else if self.capacity_bytes / self.align_bytes >= MAX_SLOTS {
                (
                    "capacity_bytes",
                    "holds 2^32 slots or more: raise align_bytes",
                )
            } else if !share(self.trigger_watermark) {
                ("trigger_watermark", "must be between 0.0 and 1.0")
            } else if !share(self.eviction_ratio) {
                ("eviction_ratio", "must be between 0.0 and 1.0")
            } else if self.write_ttl.is_zero() || self.write_ttl > MAX_TTL {
                ("write_ttl", "must be above zero and at most a year")
            } else if self.read_ttl.is_zero() || self.read_ttl > MAX_TTL {
                ("read_ttl", "must be above zero and at most a year")
            } else {
                return Ok(());
            };
        Err(CacheError::InvalidConfig {
            field,
            reason: reason.to_owned(),
        })
    }
}
