//! What the observer is to hear, in the order in which it happened.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::engine::RemoveReason;
use crate::key::ObjectKey;

/// Keys that may wait for the observer. An observer that stops taking them must not make
/// the server grow; what goes beyond is counted.
const MAX_WAITING_KEYS: usize = 1 << 18;

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Notice {
    /// Objects of one length became readable, stored for a request.
    Stored {
        keys: Vec<ObjectKey>,
        object_bytes: u64,
        request: Option<Arc<str>>,
    },
    /// Objects, of so many bytes each, are no longer found.
    Removed {
        keys: Vec<ObjectKey>,
        bytes: Vec<u64>,
        reason: RemoveReason,
    },
    /// A reservation failed for want of room.
    AllocationFailed {
        needed_bytes: u64,
        free_bytes: u64,
        evictable_bytes: u64,
    },
}

impl Notice {
    fn weight(&self) -> usize {
        match self {
            Self::Stored { keys, .. } | Self::Removed { keys, .. } => keys.len().max(1),
            Self::AllocationFailed { .. } => 1,
        }
    }
}

/// A bounded queue that stays empty while nobody listens.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    is_wanted: bool,
    waiting: VecDeque<Notice>,
    weight: usize,
    dropped: u64,
}

impl Notices {
    pub(crate) fn want(&mut self) {
        self.is_wanted = true;
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// Keys (and failures) that were not reported because the observer was too slow.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(&mut self, notice: Notice) {
        if !self.is_wanted {
            return;
        }
        let weight = notice.weight();
        if self.weight.saturating_add(weight) > MAX_WAITING_KEYS {
            self.dropped += weight as u64;
            return;
        }
        self.weight += weight;
        self.waiting.push_back(notice);
    }

    /// Adds to the removals reported last, if they have the same reason.
    pub(super) fn push_removed(&mut self, key: ObjectKey, length: u64, reason: RemoveReason) {
        match self.waiting.back_mut() {
            Some(Notice::Removed {
                keys,
                bytes,
                reason: last,
            }) if *last == reason => {
                if self.weight >= MAX_WAITING_KEYS {
                    self.dropped += 1;
                    return;
                }
                self.weight += 1;
                keys.push(key);
                bytes.push(length);
            }
            _ => self.push(Notice::Removed {
                keys: vec![key],
                bytes: vec![length],
                reason,
            }),
        }
    }

    /// Takes all that wait.
    pub(crate) fn take(&mut self) -> VecDeque<Notice> {
        self.weight = 0;
        std::mem::take(&mut self.waiting)
    }
}
