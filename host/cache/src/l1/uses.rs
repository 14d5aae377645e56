//! What is known of how objects are used, for those who rank or list them. Kept only once
//! somebody wants it, so that others do not pay for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ObjectId;

/// No place in a prompt.
const NO_CHUNK: u32 = u32::MAX;

#[derive(Debug, Clone, Default)]
struct Use {
    /// Milliseconds of the table's clock.
    stored_ms: u32,
    used_ms: u32,
    uses: u32,
    chunk: u32,
    request: Option<Arc<str>>,
}

/// How an object was used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) idle: Duration,
    pub(super) age: Duration,
    pub(super) uses: u32,
    pub(super) chunk: Option<u32>,
    pub(super) request: Option<Arc<str>>,
}

/// The uses of all objects, by number.
#[derive(Debug, Default)]
pub(super) struct Uses {
    /// When counting began; `None` while nobody wants it.
    began: Option<Instant>,
    entries: Vec<Use>,
}

impl Uses {
    /// Begins to count, if nobody has. What is there already counts as stored now.
    pub(super) fn want(&mut self, now: Instant, numbers: usize) {
        if self.began.is_none() {
            self.began = Some(now);
            self.entries.resize(
                numbers,
                Use {
                    chunk: NO_CHUNK,
                    ..Use::default()
                },
            );
        }
    }

    fn clock(&self, now: Instant) -> Option<u32> {
        let since = now.saturating_duration_since(self.began?);
        // After 49 days the clock stands still, and all is as old as can be.
        Some(u32::try_from(since.as_millis()).unwrap_or(u32::MAX))
    }

    /// A new object has that number.
    pub(super) fn stored(&mut self, id: ObjectId, now: Instant) {
        let Some(at) = self.clock(now) else { return };
        let place = id as usize;
        if place >= self.entries.len() {
            self.entries.resize(place + 1, Use::default());
        }
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = Use {
                stored_ms: at,
                used_ms: at,
                uses: 0,
                chunk: NO_CHUNK,
                request: None,
            };
        }
    }

    /// A request asked for the object as its chunk number `chunk`.
    pub(super) fn asked(&mut self, id: ObjectId, now: Instant, chunk: usize) {
        let Some(at) = self.clock(now) else { return };
        if let Some(entry) = self.entries.get_mut(id as usize) {
            entry.used_ms = at;
            entry.uses = entry.uses.saturating_add(1);
            entry.chunk = u32::try_from(chunk).unwrap_or(NO_CHUNK);
        }
    }

    /// The request that used the object has ended.
    pub(super) fn ended(
        &mut self,
        id: ObjectId,
        now: Instant,
        chunk: usize,
        request: Option<&Arc<str>>,
    ) {
        let Some(at) = self.clock(now) else { return };
        if let Some(entry) = self.entries.get_mut(id as usize) {
            entry.used_ms = at;
            entry.chunk = u32::try_from(chunk).unwrap_or(NO_CHUNK);
            if let Some(request) = request {
                entry.request = Some(Arc::clone(request));
            }
        }
    }

    /// What is known of the object; `None` while nobody wants it.
    pub(super) fn of(&self, id: ObjectId, now: Instant) -> Option<Usage> {
        let clock = self.clock(now)?;
        let entry = self.entries.get(id as usize)?;
        let since = |at: u32| Duration::from_millis(clock.saturating_sub(at).into());
        Some(Usage {
            idle: since(entry.used_ms),
            age: since(entry.stored_ms),
            uses: entry.uses,
            chunk: (entry.chunk != NO_CHUNK).then_some(entry.chunk),
            request: entry.request.clone(),
        })
    }

    /// Tells one use of the object from another.
    pub(super) fn mark(&self, id: ObjectId) -> (u32, u32) {
        let entry = self.entries.get(id as usize);
        entry.map_or((0, 0), |entry| (entry.used_ms, entry.uses))
    }
}
