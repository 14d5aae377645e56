//! Making room: eviction at the watermark and on demand.

use std::collections::{HashMap, HashSet};

use super::stage::Event;
use super::tenants::{Search, TenantId};
use super::{L1, Object, ObjectId};
use crate::engine::RemoveReason;

/// How much more than is needed may be tried in policy order before places are chosen by
/// address. Objects stored together lie together, so a few times the need will usually
/// free a range that is long enough; beyond that, more victims help little.
const ORDER_EFFORT: u64 = 8;

/// What one round of watermark eviction did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EvictionRound {
    /// Bytes freed.
    pub(crate) freed_bytes: u64,
    /// No further object may go.
    pub(crate) is_exhausted: bool,
}

/// Why slots could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// Of all that may go, not enough goes together.
    Pool,
    /// A tenant would be beyond its cap, and has too little of its own that may go.
    Cap { tenant: TenantId, cap_bytes: u64 },
}

/// What one step of a search found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// This object goes, unless it is restored.
    Victim(ObjectId),
    /// The next in order cannot go now.
    PassedOver,
    /// Nothing is left that may go.
    Exhausted,
}

/// A stretch of the pool without held objects, in bytes from its start.
#[derive(Debug, Default)]
struct Run {
    start: u64,
    end: u64,
    /// Offset and number of its evictable objects, by rising offset.
    victims: Vec<(u64, ObjectId)>,
    victim_bytes: u64,
}

impl L1 {
    /// Bytes that eviction should free now: once `used >= watermark * capacity`, the share
    /// `eviction_ratio` of the used bytes. LMCache takes that share of the *keys*
    /// (`storage_controllers/eviction_controller.py`), which frees next to nothing when
    /// the oldest objects are small.
    pub(crate) fn bytes_over_watermark(&self) -> u64 {
        let used = self.allocator.used_bytes() as f64;
        let trigger = self.settings.trigger_watermark * self.allocator.capacity() as f64;
        if used == 0.0 || used < trigger {
            return 0;
        }
        (used * self.settings.eviction_ratio).ceil() as u64
    }

    /// Evicts from tenants whose cap was lowered below what they use, until none is left
    /// that can give more or `max_steps` objects were looked at.
    pub(crate) fn evict_over_caps(&mut self, max_steps: usize) -> EvictionRound {
        let mut round = EvictionRound::default();
        let over: Vec<TenantId> = self.tenants.over_cap().collect();
        let mut steps = 0;
        for tenant in over {
            let mut search = Search::default();
            while self.tenants.beyond_cap(tenant, 0).is_some() {
                if steps == max_steps {
                    return round;
                }
                steps += 1;
                let Some(id) = self.take_of(&mut search, tenant) else {
                    break;
                };
                if self.claim_victim(tenant, id).is_some() {
                    round.freed_bytes += self.evict_taken(id);
                }
            }
        }
        round.is_exhausted = true;
        round
    }

    /// Takes the object that goes next out of its order.
    pub(super) fn take_victim(&mut self, search: &mut Search) -> Step {
        let Some((tenant, id)) = self.tenants.take(search) else {
            return match self.spare_no_longer(search) {
                true => Step::PassedOver,
                false => Step::Exhausted,
            };
        };
        let Some(object) = self.objects.get(id) else {
            return Step::PassedOver;
        };
        let (place, footprint) = (object.place, object.footprint);
        if !object.is_evictable() {
            self.tenants.park(tenant, place);
            return Step::PassedOver;
        }
        if self.is_spared(search, tenant, id) {
            return Step::PassedOver;
        }
        if !self.tenants.may_take(search, tenant, footprint) {
            self.tenants.pass_over(search, tenant, place);
            return Step::PassedOver;
        }
        self.tenants.accept(search, tenant, footprint);
        Step::Victim(id)
    }

    /// Takes the next object of one tenant, those that are hinted at last.
    fn take_of(&mut self, search: &mut Search, tenant: TenantId) -> Option<ObjectId> {
        loop {
            match self.tenants.take_of(tenant) {
                Some(id) if self.is_spared(search, tenant, id) => {}
                Some(id) => return Some(id),
                None if self.spare_no_longer(search) => {}
                None => return None,
            }
        }
    }

    /// Marks an object just taken as going and returns its place in the pool; if it cannot
    /// go now, parks it.
    fn claim_victim(&mut self, tenant: TenantId, id: ObjectId) -> Option<(u64, u64)> {
        let object = self.objects.get(id)?;
        if !object.is_evictable() {
            self.tenants.park(tenant, object.place);
            return None;
        }
        self.tenants.take_bytes(tenant, object.footprint);
        Some((object.offset, object.footprint))
    }

    /// Takes `count` ranges of `footprint` bytes for tenants that want so many bytes each,
    /// evicting as little as it finds needed. All or nothing: on failure nothing was evicted.
    ///
    /// 1. If not even evicting everything would do, it ends here.
    /// 2. A tenant that would go beyond its cap first gives keys of its own.
    /// 3. What is free is used.
    /// 4. Victims are set free in policy order until the ranges fit; those whose place was
    ///    not needed after all are put back.
    /// 5. If the pool is too fragmented for that, places are chosen by address between the
    ///    objects that are held, and what lies there is evicted.
    pub(super) fn allocate_slots(
        &mut self,
        wants: &[(TenantId, u64)],
        count: usize,
        footprint: u64,
    ) -> Result<Vec<u64>, Shortage> {
        let mut search = Search::on_behalf_of(wants.iter().map(|&(tenant, _)| tenant));
        let needed = (count as u64).saturating_mul(footprint);
        let free = self.allocator.free_bytes();
        if needed > free && needed - free > self.tenants.reclaimable_bytes(&search) {
            return Err(Shortage::Pool);
        }
        let mut victims = Vec::new();
        for &(tenant, bytes) in wants {
            if let Err(shortage) = self.take_beyond_cap(tenant, bytes, &mut victims) {
                self.put_back(victims);
                return Err(shortage);
            }
        }
        let owed = victims.len();
        let mut offsets = Vec::with_capacity(count);
        self.take_free(&mut offsets, count, footprint);
        if offsets.len() == count
            || self.take_in_order(&mut search, &mut offsets, &mut victims, count, footprint)
        {
            self.settle(victims, owed, &offsets, footprint);
            return Ok(offsets);
        }
        for offset in offsets {
            self.allocator.free(offset, footprint);
        }
        let not_owed = victims.split_off(owed);
        self.put_back(not_owed);
        match self.take_by_address(&search, &victims, count, footprint) {
            Some(offsets) => {
                self.settle(victims, owed, &offsets, footprint);
                Ok(offsets)
            }
            None => {
                self.put_back(victims);
                Err(Shortage::Pool)
            }
        }
    }

    /// Sets keys of a tenant free, oldest first, until it can have `bytes` more.
    fn take_beyond_cap(
        &mut self,
        tenant: TenantId,
        bytes: u64,
        victims: &mut Vec<ObjectId>,
    ) -> Result<(), Shortage> {
        let mut search = Search::default();
        while let Some((beyond, cap_bytes)) = self.tenants.beyond_cap(tenant, bytes) {
            let is_hopeless = victims.is_empty() && beyond > self.tenants.evictable_bytes(tenant);
            let next = match is_hopeless {
                true => None,
                false => self.take_of(&mut search, tenant),
            };
            let Some(id) = next else {
                return Err(Shortage::Cap { tenant, cap_bytes });
            };
            if let Some((offset, footprint)) = self.claim_victim(tenant, id) {
                self.allocator.free(offset, footprint);
                victims.push(id);
            }
        }
        Ok(())
    }

    fn take_free(&mut self, offsets: &mut Vec<u64>, count: usize, footprint: u64) {
        while offsets.len() < count {
            match self.allocator.allocate(footprint) {
                Some(offset) => offsets.push(offset),
                None => break,
            }
        }
    }

    fn take_in_order(
        &mut self,
        search: &mut Search,
        offsets: &mut Vec<u64>,
        victims: &mut Vec<ObjectId>,
        count: usize,
        footprint: u64,
    ) -> bool {
        let needed = ((count - offsets.len()) as u64).saturating_mul(footprint);
        let effort = needed.saturating_mul(ORDER_EFFORT);
        let mut tried_bytes = 0;
        while offsets.len() < count && tried_bytes < effort {
            match self.take_victim(search) {
                Step::Victim(id) => {
                    if let Some(object) = self.objects.get(id) {
                        tried_bytes += object.footprint;
                        self.allocator.free(object.offset, object.footprint);
                        victims.push(id);
                        self.take_free(offsets, count, footprint);
                    }
                }
                Step::PassedOver => {}
                Step::Exhausted => break,
            }
        }
        offsets.len() == count
    }

    /// Evicts the victims that are owed (the first ones) or whose place was taken, and puts
    /// the others back.
    fn settle(&mut self, victims: Vec<ObjectId>, owed: usize, offsets: &[u64], footprint: u64) {
        let mut taken = offsets.to_vec();
        taken.sort_unstable();
        let mut evicted = Vec::with_capacity(victims.len());
        // In reverse, so that those put back come in their old order.
        for (nth, id) in victims.into_iter().enumerate().rev() {
            let Some(object) = self.objects.get(id) else {
                continue;
            };
            let (start, end) = (object.offset, object.offset + object.footprint);
            let next = taken.partition_point(|&offset| offset + footprint <= start);
            let is_needed = nth < owed || taken.get(next).is_some_and(|&offset| offset < end);
            if is_needed || !self.restore(id) {
                evicted.push(id);
            }
        }
        for id in evicted.into_iter().rev() {
            self.drop_taken(id);
            self.counters.demand_evicted_objects += 1;
        }
    }

    /// Undoes the taking of all victims.
    fn put_back(&mut self, victims: Vec<ObjectId>) {
        for id in victims.into_iter().rev() {
            self.restore(id);
        }
    }

    /// Gives a taken object its place in the pool and in its order back.
    fn restore(&mut self, id: ObjectId) -> bool {
        let Some(object) = self.objects.get(id) else {
            return false;
        };
        let is_back = self.allocator.claim(object.offset, object.footprint);
        if is_back {
            self.tenants.untake(object.tenant, object.footprint);
            self.tenants.restore(object.tenant, object.place);
        }
        is_back
    }

    /// Places all ranges anew: each run of the pool between two held objects holds as many
    /// as fit from its start on, and runs that cost the least eviction come first. Without
    /// floors this fails only if there is no way at all; with them, a tenant that has little
    /// to give may end a run early.
    fn take_by_address(
        &mut self,
        search: &Search,
        owed: &[ObjectId],
        count: usize,
        footprint: u64,
    ) -> Option<Vec<u64>> {
        if self.tenants.is_empty() {
            return None;
        }
        let mut places = Vec::with_capacity(count);
        let mut victims = Vec::new();
        let mut given = HashMap::new();
        for run in self.runs(owed) {
            let mut rest = run.victims.as_slice();
            let mut start = run.start;
            while places.len() < count && run.end - start >= footprint {
                let end = start + footprint;
                let (here, behind) = rest.split_at(rest.partition_point(|&(at, _)| at < end));
                if !self.may_give(search, &mut given, here) {
                    break;
                }
                victims.extend(here.iter().map(|&(_, id)| id));
                places.push(start);
                (start, rest) = (end, behind);
            }
        }
        if places.len() < count {
            return None;
        }
        for id in victims {
            if let Some((offset, footprint)) = self.drop_evicted(id) {
                self.allocator.free(offset, footprint);
                self.counters.demand_evicted_objects += 1;
            }
        }
        places.retain(|&place| self.allocator.claim(place, footprint));
        Some(places)
    }

    /// Whether these objects may go on top of what their tenants have `given`, which is
    /// brought up to date if so.
    fn may_give(
        &self,
        search: &Search,
        given: &mut HashMap<TenantId, u64>,
        objects: &[(u64, ObjectId)],
    ) -> bool {
        let before = given.clone();
        for object in objects.iter().filter_map(|&(_, id)| self.objects.get(id)) {
            let sum = given.entry(object.tenant).or_default();
            *sum += object.footprint;
            if !self.tenants.may_take(search, object.tenant, *sum) {
                *given = before;
                return false;
            }
        }
        true
    }

    /// The stretches of the pool that hold nothing but free ranges and evictable objects,
    /// those with the fewest bytes to evict first. Objects that are `owed` are as good as
    /// gone.
    fn runs(&self, owed: &[ObjectId]) -> Vec<Run> {
        let owed: HashSet<ObjectId> = owed.iter().copied().collect();
        let objects = self.objects.iter().filter(|(id, _)| !owed.contains(id));
        let mut objects: Vec<(ObjectId, &Object)> = objects.collect();
        objects.sort_unstable_by_key(|(_, object)| object.offset);
        let mut runs = Vec::new();
        let mut run = Run::default();
        for (id, object) in objects {
            if object.is_evictable() {
                run.victim_bytes += object.footprint;
                run.victims.push((object.offset, id));
            } else {
                run.end = object.offset;
                let start = object.offset + object.footprint;
                let next = Run {
                    start,
                    ..Run::default()
                };
                runs.push(std::mem::replace(&mut run, next));
            }
        }
        run.end = self.allocator.capacity();
        runs.push(run);
        runs.sort_by_key(|run| run.victim_bytes);
        runs
    }

    /// Evicts an object that was taken; returns the bytes that are free now.
    pub(super) fn evict_taken(&mut self, id: ObjectId) -> u64 {
        match self.drop_taken(id) {
            Some((offset, footprint)) => {
                self.allocator.free(offset, footprint);
                footprint
            }
            None => 0,
        }
    }

    /// As [`drop_evicted`](Self::drop_evicted), for an object that was taken.
    fn drop_taken(&mut self, id: ObjectId) -> Option<(u64, u64)> {
        let object = self.objects.get(id)?;
        self.tenants.untake(object.tenant, object.footprint);
        self.drop_evicted(id)
    }

    /// Evicts an object but for its range, which may have a new user already.
    fn drop_evicted(&mut self, id: ObjectId) -> Option<(u64, u64)> {
        let object = self.objects.get(id)?;
        self.tenants
            .evicted(object.tenant, object.place, object.footprint);
        self.notice_removal(id, RemoveReason::Evicted);
        let (_, freed) = self.transition(id, Event::Withdraw);
        let (offset, footprint) = freed?;
        self.counters.evicted_objects += 1;
        self.counters.evicted_bytes += footprint;
        Some((offset, footprint))
    }
}
