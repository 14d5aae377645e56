//! One object as a listing shows it.

use std::time::Duration;

use crate::key::ObjectKey;

/// One readable object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: ObjectKey,
    /// Its length.
    pub bytes: u64,
    /// Time since it was last asked for; `None` where nobody keeps count.
    pub idle: Option<Duration>,
    /// Whether somebody asks that it be evicted last.
    pub is_kept: bool,
}
