//! Making room: eviction at the watermark and on demand.

use super::stage::Event;
use super::{L1, Object, ObjectId};
use crate::engine::RemoveReason;

/// How much more than is needed may be tried in policy order before places are chosen by
/// address. Objects stored together lie together, so a few times the need will usually
/// free a range that is long enough; beyond that, more victims help little.
const ORDER_EFFORT: u64 = 8;

/// What one round of watermark eviction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EvictionRound {
    /// Bytes freed.
    pub(crate) freed_bytes: u64,
    /// No further object may go.
    pub(crate) is_exhausted: bool,
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

    /// Evicts in policy order until `bytes` are free or `max_steps` objects were looked at.
    pub(crate) fn evict_some(&mut self, bytes: u64, max_steps: usize) -> EvictionRound {
        let mut round = EvictionRound {
            freed_bytes: 0,
            is_exhausted: false,
        };
        for _ in 0..max_steps {
            if round.freed_bytes >= bytes {
                break;
            }
            let Some(id) = self.policy.take() else {
                round.is_exhausted = true;
                break;
            };
            if !self.is_evictable(id) {
                self.policy.park(id);
                continue;
            }
            round.freed_bytes += self.evict(id);
        }
        round
    }

    /// Bytes that evicting everything that may go would free.
    pub(super) fn reclaimable_bytes(&self) -> u64 {
        // A policy that tracks nothing gives nothing up.
        if self.policy.is_empty() {
            0
        } else {
            self.tally.evictable_bytes
        }
    }

    /// Takes `count` ranges of `footprint` bytes, evicting as little as it finds needed.
    /// All or nothing: on failure nothing was evicted.
    ///
    /// 1. What is free is used first.
    /// 2. If not even evicting everything would do, it ends here.
    /// 3. Victims are set free in policy order until the ranges fit; those whose place was
    ///    not needed after all are put back.
    /// 4. If the pool is too fragmented for that, places are chosen by address between the
    ///    objects that are held, and what lies there is evicted.
    pub(super) fn allocate_slots(&mut self, count: usize, footprint: u64) -> Option<Vec<u64>> {
        let mut offsets = Vec::with_capacity(count);
        self.take_free(&mut offsets, count, footprint);
        let missing = (count - offsets.len()) as u64;
        let could_fit = missing.checked_mul(footprint).is_some_and(|needed| {
            needed
                <= self
                    .allocator
                    .free_bytes()
                    .saturating_add(self.reclaimable_bytes())
        });
        if offsets.len() == count
            || could_fit
                && (self.take_in_order(&mut offsets, count, footprint)
                    || self.take_by_address(&mut offsets, count, footprint))
        {
            return Some(offsets);
        }
        for offset in offsets {
            self.allocator.free(offset, footprint);
        }
        None
    }

    fn take_free(&mut self, offsets: &mut Vec<u64>, count: usize, footprint: u64) {
        while offsets.len() < count {
            match self.allocator.allocate(footprint) {
                Some(offset) => offsets.push(offset),
                None => break,
            }
        }
    }

    fn take_in_order(&mut self, offsets: &mut Vec<u64>, count: usize, footprint: u64) -> bool {
        let before = offsets.len();
        let needed = ((count - before) as u64).saturating_mul(footprint);
        let effort = needed.saturating_mul(ORDER_EFFORT);
        let mut victims: Vec<ObjectId> = Vec::new();
        let mut tried_bytes = 0;
        while offsets.len() < count && tried_bytes < effort {
            let Some(id) = self.policy.take() else { break };
            let Some(object) = self.objects.get(id).filter(|object| object.is_evictable()) else {
                self.policy.park(id);
                continue;
            };
            tried_bytes += object.footprint;
            self.allocator.free(object.offset, object.footprint);
            victims.push(id);
            self.take_free(offsets, count, footprint);
        }
        let done = offsets.len() == count;
        if !done {
            for offset in offsets.drain(before..) {
                self.allocator.free(offset, footprint);
            }
        }
        let mut taken: Vec<u64> = offsets.get(before..).unwrap_or_default().to_vec();
        taken.sort_unstable();
        let mut evicted = Vec::new();
        // In reverse, so that those put back come in their old order.
        for id in victims.into_iter().rev() {
            let Some(object) = self.objects.get(id) else {
                continue;
            };
            let (start, end) = (object.offset, object.offset + object.footprint);
            let next = taken.partition_point(|&offset| offset + footprint <= start);
            let is_needed = taken.get(next).is_some_and(|&offset| offset < end);
            if !is_needed && self.allocator.claim(start, end - start) {
                self.policy.restore(id);
            } else {
                evicted.push(id);
            }
        }
        for id in evicted.into_iter().rev() {
            self.drop_evicted(id);
            self.counters.demand_evicted_objects += 1;
        }
        done
    }

    /// Places all ranges anew: each run of the pool between two held objects holds as many
    /// as fit from its start on, and runs that cost the least eviction come first. So this
    /// fails only if there is no way at all.
    fn take_by_address(&mut self, offsets: &mut Vec<u64>, count: usize, footprint: u64) -> bool {
        if self.policy.is_empty() {
            return false;
        }
        for offset in offsets.drain(..) {
            self.allocator.free(offset, footprint);
        }
        let mut missing = count;
        let mut places = Vec::with_capacity(count);
        let mut victims = Vec::new();
        for run in self.runs() {
            let room = (run.end - run.start) / footprint;
            let fits = usize::try_from(room).unwrap_or(usize::MAX).min(missing) as u64;
            let used_end = run.start + fits * footprint;
            places.extend((0..fits).map(|nth| run.start + nth * footprint));
            let needed = run.victims.iter().filter(|&&(start, _)| start < used_end);
            victims.extend(needed.map(|&(_, id)| id));
            missing -= fits as usize;
            if missing == 0 {
                break;
            }
        }
        if missing > 0 {
            return false;
        }
        for id in victims {
            self.evict(id);
            self.counters.demand_evicted_objects += 1;
        }
        for place in places {
            if self.allocator.claim(place, footprint) {
                offsets.push(place);
            }
        }
        offsets.len() == count
    }

    /// The stretches of the pool that hold nothing but free ranges and evictable objects,
    /// those with the fewest bytes to evict first.
    fn runs(&self) -> Vec<Run> {
        let mut objects: Vec<(ObjectId, &Object)> = self.objects.iter().collect();
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

    fn is_evictable(&self, id: ObjectId) -> bool {
        self.objects.get(id).is_some_and(Object::is_evictable)
    }

    /// Evicts an object that may go; returns the bytes that are free now.
    fn evict(&mut self, id: ObjectId) -> u64 {
        match self.drop_evicted(id) {
            Some((offset, footprint)) => {
                self.allocator.free(offset, footprint);
                footprint
            }
            None => 0,
        }
    }

    /// Evicts an object but for its range, which may have a new user already.
    fn drop_evicted(&mut self, id: ObjectId) -> Option<(u64, u64)> {
        self.policy.evicted(id);
        self.notice_removal(id, RemoveReason::Evicted);
        let (_, freed) = self.transition(id, Event::Withdraw);
        let (offset, footprint) = freed?;
        self.counters.evicted_objects += 1;
        self.counters.evicted_bytes += footprint;
        Some((offset, footprint))
    }
}
