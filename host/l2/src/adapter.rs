//! What every kind of second-tier storage can do.

use std::{fmt, sync::Arc, time::SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::name::{NameError, ObjectName};

pub(crate) mod fault_inject;
pub(crate) mod fs;
pub(crate) mod mock;
pub(crate) mod redis;
pub(crate) mod s3;

/// Why storage did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// There is no such value.
    #[error("not there")]
    NotFound,
    /// There is a value, and it is intact, but of another length or layout than asked for.
    #[error("has {found} bytes in another layout")]
    OtherForm {
        /// Bytes of the stored value.
        found: u64,
    },
    /// The bytes are not those that were stored. They were moved aside if `moved`.
    #[error("damaged: {what}")]
    Damaged {
        /// What does not fit.
        what: String,
        /// Whether the value is out of the way now.
        moved: bool,
    },
    /// No room is left.
    #[error("no room: {0}")]
    Full(String),
    /// The storage refuses this server.
    #[error("denied: {0}")]
    Denied(String),
    /// It cannot be reached, or failed in another way that may pass.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// It did not answer within the deadline.
    #[error("no answer within its deadline")]
    Deadline,
    /// It failed too often and is left alone for a while.
    #[error("left alone after failures")]
    Open,
    /// The object cannot have a name there.
    #[error(transparent)]
    Name(#[from] NameError),
    /// This kind of storage has no such operation.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
}

impl AdapterError {
    /// Whether it says something about the storage, and not about one value.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(
            self,
            Self::Full(_) | Self::Denied(_) | Self::Unavailable(_) | Self::Deadline
        )
    }

    /// Whether the same call may succeed a moment later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// Its name as a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::OtherForm { .. } => "other_form",
            Self::Damaged { .. } => "damaged",
            Self::Full(_) => "full",
            Self::Denied(_) => "denied",
            Self::Unavailable(_) => "unavailable",
            Self::Deadline => "deadline",
            Self::Open => "breaker",
            Self::Name(_) => "name",
            Self::Unsupported(_) => "unsupported",
        }
    }
}

/// What a value must be to be of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Its length in bytes.
    pub length: u64,
    /// A number for the layout of its bytes. It is kept beside the value, so that values of one
    /// name and length in two layouts are told apart; what LMCache wrote has none.
    pub layout: u32,
}

/// Whether the values of a cache salt are meant.
pub type IsWanted<'w> = dyn Fn(&str) -> bool + Sync + 'w;

/// Is told which values a bounded adapter removed.
pub trait Evictions: Send + Sync + fmt::Debug {
    /// These are gone. Called without a lock; must not block.
    fn evicted(&self, names: &[ObjectName]);
}

/// One stored value, as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: ObjectName,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was last read or written, if that is known.
    pub last_used: Option<SystemTime>,
}

/// Storage for named values. A value is exactly the bytes of one cached object, as LMCache 0.5.6
/// writes it; what belongs to it beyond that is kept where LMCache does not look.
///
/// No call may block its thread. A call whose future is dropped leaves either the old value or
/// the whole new one behind.
#[async_trait]
pub trait Adapter: Send + Sync + fmt::Debug {
    /// Which of `names` are there, in their order.
    ///
    /// # Errors
    /// [`AdapterError`] if the storage could not tell; a name that it cannot have is not there.
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError>;

    /// The value of `name`, which must have the form `wanted`. Bytes that do not match what is kept
    /// beside them are moved aside and never returned.
    ///
    /// # Errors
    /// [`AdapterError`]
    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError>;

    /// Keeps `value` of a layout under `name`, as a whole or not at all.
    ///
    /// # Errors
    /// [`AdapterError`]
    async fn store(&self, name: &ObjectName, value: Bytes, layout: u32)
    -> Result<(), AdapterError>;

    /// Removes values; returns which of `names` were there.
    ///
    /// # Errors
    /// [`AdapterError`]; some may be gone then.
    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError>;

    /// Sends all values, or those of one salt, to `found` in no particular order. Ends early when
    /// the receiver is gone.
    ///
    /// # Errors
    /// [`AdapterError`]; what was sent until then is right.
    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError>;

    /// Removes what lies beside the values whose salts are wanted: damaged ones that were moved
    /// aside, checksums that lost their value, temporary files. Returns how many there were; what
    /// cannot be told to be anybody's goes too.
    ///
    /// # Errors
    /// [`AdapterError`]; some may be gone then.
    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError>;

    /// Bytes of all values, where somebody keeps count of them.
    fn used_bytes(&self) -> Option<u64> {
        None
    }

    /// Starts to tell `evictions` what goes because there is no room for it; only a bounded
    /// adapter evicts.
    fn watch_evictions(&self, evictions: Arc<dyn Evictions>) {
        drop(evictions);
    }

    /// What `/status` shows of it beyond its type; nothing secret.
    fn status(&self) -> serde_json::Map<String, serde_json::Value>;
}
