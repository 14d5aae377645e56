//! Every state that a small pool can be in, and every call in each of them.
//!
//! The allocator's bookkeeping is a function of which units are in use, where the untouched part
//! begins, and where the pool ends: free neighbours are always joined. So there are finitely many
//! states for a pool of a few units, all of them are visited from the first one on, and each call
//! with each argument is compared in each of them with a bitmap that is looked through unit by
//! unit. Nothing is left to chance, and arithmetic is checked for overflow as in any debug build.

use std::collections::HashSet;

use super::SlotAllocator;

/// Units of the pool; 2^units * units states, each with some hundred calls.
const UNITS: u64 = 6;
const ALIGN: u64 = 4;

/// The same pool as a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Model {
    /// Bit n is set while unit n is in use.
    used: u32,
    cold: u64,
    capacity: u64,
}

impl Model {
    fn is_used(&self, unit: u64) -> bool {
        self.used & (1 << unit) != 0
    }

    fn is_free(&self, start: u64, end: u64) -> bool {
        (start..end).all(|unit| !self.is_used(unit))
    }

    fn mark(&mut self, start: u64, end: u64, used: bool) {
        for unit in start..end {
            match used {
                true => self.used |= 1 << unit,
                false => self.used &= !(1 << unit),
            }
        }
    }

    /// Longest stretches of free units in `0..end`, as (start, length).
    fn free_runs(&self, end: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let mut start = 0;
        while start < end {
            let length = (start..end).take_while(|&unit| !self.is_used(unit)).count() as u64;
            if length > 0 {
                runs.push((start, length));
            }
            start += length + 1;
        }
        runs
    }

    /// Where `units` units must go: the shortest warm run that is long enough and of those the
    /// lowest, or else the end of the pool.
    fn place(&self, units: u64) -> Option<u64> {
        let warm = self.free_runs(self.cold);
        let fitting = warm.iter().filter(|run| run.1 >= units);
        if let Some(best) = fitting.min_by_key(|run| (run.1, run.0)) {
            return Some(best.0);
        }
        let whole = self.free_runs(self.capacity);
        let last = whole.last().filter(|run| run.0 + run.1 == self.capacity)?;
        (last.1 >= units).then_some(last.0)
    }
}

/// Compares everything that can be asked.
fn agree(pool: &SlotAllocator, model: &Model) {
    pool.check()
        .unwrap_or_else(|broken| panic!("{broken} in {model:?}: {pool:?}"));
    let runs = model.free_runs(model.capacity);
    let free: u64 = runs.iter().map(|run| run.1).sum();
    let longest = runs.iter().map(|run| run.1).max().unwrap_or(0);
    assert_eq!(pool.capacity(), model.capacity * ALIGN, "{model:?}");
    assert_eq!(pool.cold_start(), model.cold * ALIGN, "{model:?}");
    assert_eq!(pool.free_bytes(), free * ALIGN, "{model:?}");
    assert_eq!(
        pool.used_bytes(),
        (model.capacity - free) * ALIGN,
        "{model:?}"
    );
    assert_eq!(pool.largest_free(), longest * ALIGN, "{model:?}");
    assert_eq!(pool.free_ranges(), runs.len(), "{model:?}");
}

/// All calls in one state; hands on each state that one of them leads to.
fn step(pool: &SlotAllocator, model: Model, mut reached: impl FnMut(SlotAllocator, Model)) {
    let mut compare = |pool: SlotAllocator, model: Model| {
        agree(&pool, &model);
        reached(pool, model);
    };
    // Lengths in bytes: whole units, one byte less and one more, nothing and too much.
    let lengths = (0..=UNITS * ALIGN + 1).filter(|length| (length + 1) % ALIGN <= 2);
    for length in lengths.clone().chain([u64::MAX]) {
        let units = length.div_ceil(ALIGN);
        let (mut pool, mut model) = (pool.clone(), model);
        let expected = model.place(units).filter(|_| units > 0);
        assert_eq!(
            pool.allocate(length),
            expected.map(|unit| unit * ALIGN),
            "{length} bytes in {model:?}"
        );
        if let Some(start) = expected {
            model.mark(start, start + units, true);
            model.cold = model.cold.max(start + units);
        }
        compare(pool, model);
    }
    for offset in (0..=UNITS * ALIGN).chain([u64::MAX - ALIGN + 1, u64::MAX]) {
        for length in lengths.clone().chain([u64::MAX]) {
            let units = length.div_ceil(ALIGN);
            let (start, end) = (offset / ALIGN, (offset / ALIGN).saturating_add(units));
            let inside = units > 0 && offset % ALIGN == 0 && end <= model.capacity;
            let what = || format!("{offset}+{length} in {model:?}");

            let (mut freed, mut after) = (pool.clone(), model);
            let in_use = inside && (start..end).all(|unit| model.is_used(unit));
            assert_eq!(freed.free(offset, length), in_use, "free {}", what());
            if in_use {
                after.mark(start, end, false);
            }
            compare(freed, after);

            let (mut claimed, mut after) = (pool.clone(), model);
            let is_free = inside && model.is_free(start, end);
            assert_eq!(claimed.claim(offset, length), is_free, "claim {}", what());
            if is_free {
                after.mark(start, end, true);
                after.cold = after.cold.max(end);
            }
            compare(claimed, after);
        }
    }
    for up_to in (0..=UNITS * ALIGN + 1).chain([u64::MAX]) {
        let (mut touched, mut after) = (pool.clone(), model);
        touched.mark_touched(up_to);
        after.cold = after.cold.max((up_to / ALIGN).min(after.capacity));
        compare(touched, after);
    }
    let (mut shrunk, mut after) = (pool.clone(), model);
    after.capacity = after.cold;
    assert_eq!(shrunk.give_up_cold(), after.capacity * ALIGN);
    compare(shrunk, after);
}

#[test]
fn each_call_in_each_state_of_a_small_pool_is_right() {
    let first = Model {
        used: 0,
        cold: 0,
        capacity: UNITS,
    };
    let pool = SlotAllocator::new(UNITS * ALIGN + ALIGN - 1, ALIGN);
    agree(&pool, &first);
    let mut seen = HashSet::from([first]);
    let mut to_visit = vec![(pool, first)];
    while let Some((pool, model)) = to_visit.pop() {
        step(&pool, model, |pool, model| {
            if seen.insert(model) {
                to_visit.push((pool, model));
            }
        });
    }
    // What is in use has been touched: for a border at n, any of the 2^n sets below it; and as
    // many again for each pool that was cut to where its border was, which then stays there.
    let below = |border: u64| 1_usize << border;
    let whole: usize = (0..=UNITS).map(below).sum();
    let cut: usize = (0..UNITS).map(below).sum();
    assert_eq!(seen.len(), whole + cut, "some states were not reached");
}

#[test]
fn a_pool_as_large_as_an_address_space_does_not_overflow() {
    for align in [1, 2, 4096, 1 << 62, u64::MAX] {
        let mut pool = SlotAllocator::new(u64::MAX, align);
        let whole = pool.capacity();
        for length in [1, align, whole, u64::MAX] {
            let Some(offset) = pool.allocate(length) else {
                continue;
            };
            pool.check().unwrap();
            assert!(!pool.claim(offset, length) && pool.free(offset, length));
        }
        assert!(!pool.free(u64::MAX, u64::MAX) && !pool.claim(u64::MAX, 1));
        pool.mark_touched(u64::MAX);
        pool.check().unwrap();
        assert_eq!((pool.cold_start(), pool.largest_free()), (whole, whole));
    }
}
