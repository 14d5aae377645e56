//! Hints that objects should be evicted last. A hint has a holder and an end, and is no more
//! than that: when nothing else may go, what is hinted at goes.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::tenants::{Search, TenantId};
use super::{L1, ObjectId, ScopeCursor};
use crate::key::ObjectKey;

/// Objects that may be hinted at.
const MAX_HINTED: usize = 1 << 16;

/// Who holds a hint.
type Holder = u64;

/// All hints.
#[derive(Debug, Default)]
pub(super) struct KeepHints {
    by_object: HashMap<ObjectId, Vec<(Holder, Instant)>>,
    /// Those that eviction has met and set aside.
    aside: HashSet<ObjectId>,
}

impl KeepHints {
    pub(super) fn has(&self, id: ObjectId) -> bool {
        !self.by_object.is_empty() && self.by_object.contains_key(&id)
    }

    /// Forgets an object that is gone.
    pub(super) fn forget(&mut self, id: ObjectId) {
        if !self.by_object.is_empty() {
            self.by_object.remove(&id);
            self.aside.remove(&id);
        }
    }

    /// Keeps the hints that `stays` says, and returns the objects that have none any more.
    fn retain(
        &mut self,
        mut stays: impl FnMut(ObjectId, Holder, Instant) -> bool,
    ) -> Vec<ObjectId> {
        let mut freed = Vec::new();
        self.by_object.retain(|&id, hints| {
            hints.retain(|&(holder, until)| stays(id, holder, until));
            if hints.is_empty() {
                freed.push(id);
            }
            !hints.is_empty()
        });
        freed
    }
}

impl L1 {
    /// Hints at the readable ones among `keys`; returns how many those are, or `None` when
    /// there would be more than may be hinted at, and nothing is then.
    pub(crate) fn keep(
        &mut self,
        now: Instant,
        keys: &[ObjectKey],
        holder: Holder,
        time: Duration,
    ) -> Option<usize> {
        let mut cursor = ScopeCursor::default();
        let found: Vec<ObjectId> = keys
            .iter()
            .filter_map(|key| self.find(&mut cursor, key))
            .filter(|&id| self.objects.get(id).is_some_and(|it| it.is_readable()))
            .collect();
        let hints = &mut self.keep_hints.by_object;
        let fresh = found.iter().filter(|id| !hints.contains_key(id)).count();
        if hints.len() + fresh > MAX_HINTED {
            return None;
        }
        for &id in &found {
            let holders = hints.entry(id).or_default();
            let until = now + time;
            match holders.iter_mut().find(|(known, _)| *known == holder) {
                Some((_, end)) => *end = until,
                None => holders.push((holder, until)),
            }
        }
        Some(found.len())
    }

    /// Ends the holder's hints at `keys`; returns how many there were.
    pub(crate) fn end_keeping(&mut self, keys: &[ObjectKey], holder: Holder) -> usize {
        let mut cursor = ScopeCursor::default();
        let ids: HashSet<ObjectId> = keys
            .iter()
            .filter_map(|key| self.find(&mut cursor, key))
            .collect();
        let mut ended = 0;
        let freed = self.keep_hints.retain(|id, other, _| {
            let ends = other == holder && ids.contains(&id);
            ended += usize::from(ends);
            !ends
        });
        self.give_back(&freed);
        ended
    }

    /// Ends all hints of a holder.
    pub(crate) fn end_holder(&mut self, holder: Holder) {
        let freed = self.keep_hints.retain(|_, other, _| other != holder);
        self.give_back(&freed);
    }

    /// Ends the hints whose time is over.
    pub(crate) fn expire_hints(&mut self, now: Instant) {
        let freed = self.keep_hints.retain(|_, _, until| until > now);
        self.give_back(&freed);
    }

    /// Sets aside an object that eviction has met, if it is hinted at.
    pub(super) fn is_spared(&mut self, search: &Search, tenant: TenantId, id: ObjectId) -> bool {
        if search.ignores_hints || !self.keep_hints.has(id) {
            return false;
        }
        if let Some(object) = self.objects.get(id) {
            self.tenants.park(tenant, object.place);
            self.keep_hints.aside.insert(id);
        }
        true
    }

    /// Puts what was set aside back into the order, for a search that finds nothing else;
    /// whether there was anything.
    pub(super) fn spare_no_longer(&mut self, search: &mut Search) -> bool {
        if search.ignores_hints || self.keep_hints.aside.is_empty() {
            return false;
        }
        search.begin_again();
        let aside: Vec<ObjectId> = self.keep_hints.aside.drain().collect();
        self.put_in_order(&aside);
        true
    }

    fn give_back(&mut self, freed: &[ObjectId]) {
        for id in freed {
            self.keep_hints.aside.remove(id);
        }
        self.put_in_order(freed);
    }

    fn put_in_order(&mut self, ids: &[ObjectId]) {
        for &id in ids {
            if let Some(object) = self.objects.get(id)
                && object.is_evictable()
            {
                self.tenants.restore(object.tenant, object.place);
            }
        }
    }
}
