//! Which byte ranges of the pool are free: arithmetic only.

use std::collections::{BTreeMap, BTreeSet};

/// Hands out byte ranges of the pool; it never touches the bytes.
///
/// Offsets and lengths are bytes from the start of the segment. Ranges in use never
/// overlap and are multiples of the alignment. Each call costs the logarithm of the number
/// of free ranges, whatever the size of the segment; all bookkeeping lies outside of it.
///
/// The pool is split at a watermark: below it every page has been touched before (*warm*),
/// above it none has. Warm ranges go out first, best fit, because the first touch of a
/// shared-memory page costs ten times a later one.
#[derive(Debug, Clone)]
pub struct SlotAllocator {
    align: u64,
    capacity: u64,
    /// Free warm ranges: offset to length. Neighbours are always joined.
    by_offset: BTreeMap<u64, u64>,
    /// The same ranges as (length, offset), for best fit at the lowest offset.
    by_length: BTreeSet<(u64, u64)>,
    /// All of `cold_start..capacity` is free and untouched.
    cold_start: u64,
    free_bytes: u64,
}

impl SlotAllocator {
    /// An allocator over `capacity` bytes, all free and cold.
    ///
    /// `align` is taken as 1 if it is zero; a tail of `capacity` that is no multiple of it
    /// is never handed out.
    pub fn new(capacity: u64, align: u64) -> Self {
        let align = align.max(1);
        let capacity = capacity - capacity % align;
        Self {
            align,
            capacity,
            by_offset: BTreeMap::new(),
            by_length: BTreeSet::new(),
            cold_start: 0,
            free_bytes: capacity,
        }
    }

    /// Bytes that can be in use at most.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes free, in whatever pieces.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes in use, alignment included.
    pub fn used_bytes(&self) -> u64 {
        self.capacity - self.free_bytes
    }

    /// Where the untouched part of the pool begins.
    pub fn cold_start(&self) -> u64 {
        self.cold_start
    }

    /// Bytes of the largest free range.
    pub fn largest_free(&self) -> u64 {
        let warm = self.by_length.last().map_or(0, |&(length, _)| length);
        warm.max(self.capacity - self.tail_start())
    }

    /// Number of free ranges; adjoining warm and cold parts count as one.
    pub fn free_ranges(&self) -> usize {
        let cold_alone = self.tail_start() == self.cold_start && self.cold_start < self.capacity;
        self.by_offset.len() + usize::from(cold_alone)
    }

    /// The bytes that an object of `length` bytes takes up; `None` beyond `u64`.
    pub fn footprint(&self, length: u64) -> Option<u64> {
        length.checked_next_multiple_of(self.align)
    }

    /// Takes a range of [`footprint`](Self::footprint)`(length)` bytes and returns its
    /// offset; `None` if no free range is long enough or `length` is zero.
    pub fn allocate(&mut self, length: u64) -> Option<u64> {
        let length = self.footprint(length).filter(|&length| length > 0)?;
        if let Some(&(_, offset)) = self.by_length.range((length, 0)..).next() {
            self.carve(offset, length);
            return Some(offset);
        }
        let offset = self.tail_start();
        let end = offset
            .checked_add(length)
            .filter(|&end| end <= self.capacity)?;
        self.mark_touched(end);
        self.carve(offset, length);
        Some(offset)
    }

    /// Takes exactly the free range `offset..offset + footprint(length)`. Returns whether
    /// all of it was free; if not, nothing changes.
    pub fn claim(&mut self, offset: u64, length: u64) -> bool {
        let Some(end) = self.end_of(offset, length) else {
            return false;
        };
        // The warm part must be free; the cold part is free by definition.
        if offset < self.cold_start && !self.covers(offset, end.min(self.cold_start)) {
            return false;
        }
        self.mark_touched(end);
        self.carve(offset, end - offset);
        true
    }

    /// Takes the next free range that has been touched, from `from` on and of at most `most`
    /// bytes; its offset and length.
    pub fn claim_next(&mut self, from: u64, most: u64) -> Option<(u64, u64)> {
        let from = self.footprint(from)?;
        let most = (most - most % self.align).max(self.align);
        let around = self.by_offset.range(..=from).next_back();
        let (start, end) = around
            .map(|(&start, &length)| (start.max(from), start + length))
            .filter(|(start, end)| start < end)
            .or_else(|| {
                let (&start, &length) = self.by_offset.range(from..).next()?;
                Some((start, start + length))
            })?;
        let length = (end - start).min(most);
        self.carve(start, length);
        Some((start, length))
    }

    /// Gives a range back and joins it with its free neighbours. Returns whether all of it
    /// was in use; if not (which would be a double free), nothing changes.
    pub fn free(&mut self, offset: u64, length: u64) -> bool {
        let Some(end) = self
            .end_of(offset, length)
            .filter(|&end| end <= self.cold_start)
        else {
            return false;
        };
        let before = self.by_offset.range(..end).next_back();
        if before.is_some_and(|(&start, &length)| start + length > offset) {
            return false;
        }
        self.free_bytes += end - offset;
        self.insert_joined(offset, end);
        true
    }

    /// Notes that pages up to `up_to` have been touched, so that they go out as warm.
    pub fn mark_touched(&mut self, up_to: u64) {
        let up_to = up_to.min(self.capacity);
        let up_to = up_to - up_to % self.align;
        if up_to > self.cold_start {
            let from = self.cold_start;
            self.cold_start = up_to;
            self.insert_joined(from, up_to);
        }
    }

    /// Gives up the untouched part of the pool, for want of real memory behind it.
    /// Returns the capacity that is left.
    pub fn give_up_cold(&mut self) -> u64 {
        self.free_bytes -= self.capacity - self.cold_start;
        self.capacity = self.cold_start;
        self.capacity
    }

    /// Checks the bookkeeping against itself; the message says what does not hold.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check(&self) -> Result<(), String> {
        let mut last_end = None;
        let mut warm = 0;
        for (&offset, &length) in &self.by_offset {
            if length == 0 || offset % self.align != 0 || length % self.align != 0 {
                return Err(format!(
                    "free range {offset}+{length} is empty or not aligned"
                ));
            }
            if last_end.is_some_and(|end| end >= offset) {
                return Err(format!(
                    "free range at {offset} overlaps or touches the one before"
                ));
            }
            if offset + length > self.cold_start {
                return Err(format!(
                    "warm range {offset}+{length} reaches into the cold part"
                ));
            }
            if !self.by_length.contains(&(length, offset)) {
                return Err(format!("free range {offset}+{length} is missing by length"));
            }
            warm += length;
            last_end = Some(offset + length);
        }
        if self.by_length.len() != self.by_offset.len() {
            return Err("free ranges by length and by offset differ in number".to_owned());
        }
        if warm + (self.capacity - self.cold_start) != self.free_bytes {
            return Err(format!(
                "free bytes are {} but counted as {}",
                warm, self.free_bytes
            ));
        }
        Ok(())
    }

    /// Whether `start..end` lies in one free warm range.
    fn covers(&self, start: u64, end: u64) -> bool {
        let range = self.by_offset.range(..=start).next_back();
        range.is_some_and(|(&offset, &length)| offset + length >= end)
    }

    /// Start of the free range that ends at the capacity, or the capacity.
    fn tail_start(&self) -> u64 {
        match self.by_offset.last_key_value() {
            Some((&offset, &length)) if offset + length == self.cold_start => offset,
            _ => self.cold_start,
        }
    }

    /// End of an aligned, non-empty range inside the pool.
    fn end_of(&self, offset: u64, length: u64) -> Option<u64> {
        let length = self.footprint(length).filter(|&length| length > 0)?;
        let end = offset.checked_add(length)?;
        (offset.is_multiple_of(self.align) && end <= self.capacity).then_some(end)
    }

    /// Takes `offset..offset + length` out of the free warm range that covers it.
    fn carve(&mut self, offset: u64, length: u64) {
        let Some((&start, &whole)) = self.by_offset.range(..=offset).next_back() else {
            return;
        };
        self.remove(start, whole);
        self.insert(start, offset - start);
        self.insert(offset + length, (start + whole) - (offset + length));
        self.free_bytes -= length;
    }

    fn insert_joined(&mut self, mut start: u64, mut end: u64) {
        if let Some((&offset, &length)) = self.by_offset.range(..start).next_back()
            && offset + length == start
        {
            self.remove(offset, length);
            start = offset;
        }
        if let Some(&length) = self.by_offset.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.insert(start, end - start);
    }

    fn insert(&mut self, offset: u64, length: u64) {
        if length > 0 {
            self.by_offset.insert(offset, length);
            self.by_length.insert((length, offset));
        }
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.by_offset.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
mod exhaustive;

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn warm_ranges_go_out_before_cold_ones() {
        let mut pool = SlotAllocator::new(100, 10);
        let offsets: Vec<_> = (0..4).map(|_| pool.allocate(10).unwrap()).collect();
        assert_eq!(offsets, [0, 10, 20, 30]);
        assert!(pool.free(10, 10));
        assert_eq!(pool.allocate(7), Some(10));
        assert_eq!(pool.cold_start(), 40);
        // Prefaulting moves the border without handing anything out.
        pool.mark_touched(69);
        assert_eq!(pool.cold_start(), 60);
        assert_eq!(pool.free_bytes(), 60);
    }

    #[test]
    fn the_best_fit_is_taken_so_that_large_ranges_stay_whole() {
        let mut pool = SlotAllocator::new(100, 1);
        for length in [10, 1, 30, 1, 20, 38] {
            pool.allocate(length).unwrap();
        }
        assert!(pool.free(0, 10) && pool.free(11, 30) && pool.free(42, 20));
        assert_eq!(pool.allocate(15), Some(42));
        assert_eq!(pool.allocate(30), Some(11));
        assert_eq!(pool.allocate(11), None);
        assert_eq!(pool.largest_free(), 10);
    }

    #[test]
    fn a_range_may_straddle_the_border_of_warm_and_cold() {
        let mut pool = SlotAllocator::new(100, 10);
        assert_eq!(pool.allocate(30), Some(0));
        assert!(pool.free(0, 30));
        assert_eq!(pool.allocate(90), Some(0));
        assert_eq!(pool.free_ranges(), 1);
        assert_eq!(pool.allocate(20), None);
        assert!(pool.claim(90, 10));
        assert_eq!(pool.free_bytes(), 0);
    }

    #[test]
    fn what_is_not_in_use_cannot_be_freed_and_what_is_cannot_be_claimed() {
        let mut pool = SlotAllocator::new(100, 10);
        assert!(!pool.free(0, 10), "cold");
        assert_eq!(pool.allocate(50), Some(0));
        assert!(pool.free(10, 10));
        assert!(!pool.free(10, 10), "double free");
        assert!(!pool.free(0, 20), "half of it is free");
        assert!(!pool.free(5, 10), "not aligned");
        assert!(!pool.free(90, u64::MAX), "beyond the end");
        assert!(!pool.claim(0, 20), "half of it is in use");
        assert!(pool.claim(10, 10));
        assert!(!pool.claim(10, 10), "taken");
        assert!(pool.claim(60, 10), "cold ranges can be claimed");
        pool.check().unwrap();
        assert_eq!(pool.free_bytes(), 40);
    }

    #[test]
    fn giving_up_the_cold_part_shrinks_the_pool() {
        let mut pool = SlotAllocator::new(100, 10);
        pool.allocate(30).unwrap();
        assert_eq!(pool.give_up_cold(), 30);
        assert_eq!(pool.allocate(10), None);
        assert!(pool.free(0, 30));
        assert_eq!((pool.free_bytes(), pool.largest_free()), (30, 30));
        pool.check().unwrap();
    }

    #[test]
    fn nothing_outside_the_pool_is_handed_out() {
        let mut pool = SlotAllocator::new(105, 10);
        assert_eq!(pool.capacity(), 100);
        assert_eq!(pool.allocate(0), None);
        assert_eq!(pool.allocate(101), None);
        assert_eq!(pool.allocate(u64::MAX), None);
        assert_eq!(SlotAllocator::new(0, 0).allocate(1), None);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Allocate(u64),
        Free(usize),
        FreeAndClaim(usize),
        Touch(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1..400_u64).prop_map(Op::Allocate),
            3 => any::<usize>().prop_map(Op::Free),
            1 => any::<usize>().prop_map(Op::FreeAndClaim),
            1 => (0..4000_u64).prop_map(Op::Touch),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn ranges_in_use_never_overlap_and_free_ones_join_again(
            align in prop_oneof![Just(1_u64), Just(8), Just(64)],
            ops in proptest::collection::vec(op(), 1..if cfg!(miri) { 30 } else { 300 }),
        ) {
            let capacity = 64 * 60;
            let mut pool = SlotAllocator::new(capacity, align);
            let mut live: BTreeMap<u64, u64> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Allocate(length) => {
                        let fits = pool.largest_free() >= pool.footprint(length).unwrap();
                        match pool.allocate(length) {
                            Some(offset) => {
                                prop_assert!(fits);
                                live.insert(offset, pool.footprint(length).unwrap());
                            }
                            None => prop_assert!(!fits, "a range that fits was refused"),
                        }
                    }
                    Op::Free(nth) if !live.is_empty() => {
                        let (&offset, &length) = live.iter().nth(nth % live.len()).unwrap();
                        prop_assert!(pool.free(offset, length));
                        prop_assert!(!pool.free(offset, length));
                        live.remove(&offset);
                    }
                    Op::FreeAndClaim(nth) if !live.is_empty() => {
                        let (&offset, &length) = live.iter().nth(nth % live.len()).unwrap();
                        prop_assert!(!pool.claim(offset, length));
                        prop_assert!(pool.free(offset, length));
                        prop_assert!(pool.claim(offset, length));
                    }
                    Op::Touch(up_to) => pool.mark_touched(up_to),
                    _ => {}
                }
                pool.check().unwrap();
                let mut end = 0;
                for (&offset, &length) in &live {
                    prop_assert!(offset >= end && offset % align == 0);
                    end = offset + length;
                }
                prop_assert!(end <= capacity);
                prop_assert_eq!(pool.used_bytes(), live.values().sum::<u64>());
            }
            for (offset, length) in live {
                prop_assert!(pool.free(offset, length));
            }
            prop_assert_eq!(pool.free_ranges(), 1);
            prop_assert_eq!(pool.largest_free(), capacity);
        }
    }
}
