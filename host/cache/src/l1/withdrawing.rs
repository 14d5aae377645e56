//! Objects that go before their turn: cleared, corrupt or cut off.

use std::ops::Range;

use super::stage::{Event, Stage};
use super::tenants::NOWHERE;
use super::{Contents, L1, Object, ObjectId, Pinned, ScopeCursor};
use crate::engine::RemoveReason;
use crate::key::{CacheSalt, ObjectKey};

impl L1 {
    /// Clears the objects numbered `range`; see `CacheEngine::clear`. Returns how many
    /// were withdrawn and how many stay, or `None` when there are no such numbers.
    pub(crate) fn clear_range(
        &mut self,
        range: Range<u32>,
        force: bool,
        wanted: &dyn Fn(&CacheSalt) -> bool,
    ) -> Option<(usize, usize)> {
        if range.start as usize >= self.objects.numbers() {
            return None;
        }
        let (mut removed, mut kept) = (0, 0);
        let mut last = None;
        for id in range {
            let Some(object) = self.objects.get(id) else {
                continue;
            };
            let is_wanted = match last {
                Some((scope, is_wanted)) if scope == object.scope => is_wanted,
                _ => self
                    .scopes
                    .scope(object.scope)
                    .is_some_and(|scope| wanted(&scope.cache_salt)),
            };
            last = Some((object.scope, is_wanted));
            if !is_wanted {
                continue;
            }
            match object.stage {
                Stage::Readable if force || !object.is_held() => {
                    self.withdraw(id, RemoveReason::Cleared);
                    removed += 1;
                }
                Stage::Readable | Stage::Reserved(_) => kept += 1,
                Stage::Withdrawn => {}
            }
        }
        Some((removed, kept))
    }

    /// Withdraws the readable and unheld ones among `keys`; returns how many there were.
    pub(crate) fn withdraw_unheld(&mut self, keys: &[ObjectKey]) -> usize {
        let mut cursor = ScopeCursor::default();
        let mut withdrawn = 0;
        for key in keys {
            if let Some(id) = self.find(&mut cursor, key)
                && self.objects.get(id).is_some_and(Object::is_evictable)
            {
                self.withdraw(id, RemoveReason::Cleared);
                withdrawn += 1;
            }
        }
        withdrawn
    }

    /// Pins at most `most` of the readable objects numbered `range` whose salts are wanted, and
    /// counts all of them; `None` when there are no such numbers.
    pub(crate) fn pin_range(
        &mut self,
        range: Range<u32>,
        wanted: &dyn Fn(&CacheSalt) -> bool,
        most: usize,
    ) -> Option<(Vec<Pinned>, usize)> {
        if range.start as usize >= self.objects.numbers() {
            return None;
        }
        let mut pinned = Vec::new();
        let mut count = 0;
        for id in range {
            let Some(object) = self.objects.get(id).filter(|it| it.is_readable()) else {
                continue;
            };
            let scope = self.scopes.scope(object.scope);
            if !scope.is_some_and(|scope| wanted(&scope.cache_salt)) {
                continue;
            }
            count += 1;
            if pinned.len() < most {
                let slot = object.slot();
                self.pin(id);
                pinned.push(Pinned {
                    object: id,
                    slot,
                    checksum: None,
                });
            }
        }
        Some((pinned, count))
    }

    /// Ends what [`pin_range`](Self::pin_range) did to one object.
    pub(crate) fn unpin_one(&mut self, id: ObjectId) {
        self.unpin(id);
    }

    /// What alignment leaves behind the ends of the objects numbered `range`: offset and length.
    pub(crate) fn tails(&self, range: Range<u32>) -> Option<Vec<(u64, u64)>> {
        if range.start as usize >= self.objects.numbers() {
            return None;
        }
        let tails = range
            .filter_map(|id| self.objects.get(id))
            .filter(|object| object.footprint > object.length)
            .map(|object| {
                let tail = object.footprint - object.length;
                (object.offset + object.length, tail)
            });
        Some(tails.collect())
    }

    /// Makes policies of tenants without objects forget.
    pub(crate) fn forget_histories(&mut self, salts: &[CacheSalt]) -> usize {
        self.tenants.forget_histories(salts)
    }

    /// Those of `keys` that are readable and in use.
    pub(crate) fn held(&self, keys: &[ObjectKey]) -> Vec<ObjectKey> {
        let mut cursor = ScopeCursor::default();
        let mut held = Vec::new();
        for key in keys {
            if let Some(id) = self.find(&mut cursor, key)
                && let Some(object) = self.objects.get(id)
                && object.is_readable()
                && object.is_held()
            {
                held.push(key.clone());
            }
        }
        held
    }

    /// Withdraws the readable ones among `keys` as soon as nobody holds them; returns how many
    /// there were.
    pub(crate) fn release(&mut self, keys: &[ObjectKey]) -> usize {
        let mut cursor = ScopeCursor::default();
        let mut released = 0;
        for key in keys {
            let Some(id) = self.find(&mut cursor, key) else {
                continue;
            };
            let Some(object) = self.objects.get_mut(id).filter(|it| it.is_readable()) else {
                continue;
            };
            object.is_due = true;
            released += 1;
            if !object.is_held() {
                self.withdraw(id, RemoveReason::Released);
            }
        }
        released
    }

    /// Withdraws all objects with bytes at or behind `length`; what is being written there
    /// will not be published. Returns the number of readable objects lost.
    pub(crate) fn lose_behind(&mut self, length: u64) -> usize {
        let lost: Vec<ObjectId> = self
            .objects
            .iter()
            .filter(|(_, object)| object.offset.saturating_add(object.length) > length)
            .map(|(id, _)| id)
            .collect();
        lost.into_iter().filter(|&id| self.quarantine(id)).count()
    }

    /// Marks an object's bytes as wrong and withdraws it; returns whether it was readable.
    pub(super) fn quarantine(&mut self, id: ObjectId) -> bool {
        let Some(object) = self.objects.get_mut(id) else {
            return false;
        };
        object.contents = Contents::Lost;
        let was_readable = object.is_readable();
        if was_readable {
            self.counters.corrupt_objects += 1;
            self.withdraw(id, RemoveReason::Corrupt);
        }
        was_readable
    }

    /// Takes a readable object out of sight for another reason than its rank.
    pub(super) fn withdraw(&mut self, id: ObjectId, reason: RemoveReason) {
        if let Some(object) = self.objects.get_mut(id) {
            let place = std::mem::replace(&mut object.place, NOWHERE);
            self.tenants.unrank(object.tenant, place);
        }
        self.notice_removal(id, reason);
        self.apply(id, Event::Withdraw);
    }

    pub(super) fn notice_removal(&mut self, id: ObjectId, reason: RemoveReason) {
        if self.notices.is_wanted()
            && let Some(key) = self.key_of(id)
        {
            let bytes = self.objects.get(id).map_or(0, |object| object.length);
            self.notices.push_removed(key, bytes, reason);
        }
    }
}
