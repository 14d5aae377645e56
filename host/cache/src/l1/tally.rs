//! Sums over all objects, kept up to date instead of counted.

use super::Object;
use super::stage::Stage;

/// One object adds to each sum what it is worth; see `L1::change_hold`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) readable: usize,
    pub(super) reserved: usize,
    pub(super) withdrawn: usize,
    /// Objects with at least one read lock.
    pub(super) locked: usize,
    /// Read locks on objects.
    pub(super) locks: u64,
    /// Footprint of reserved objects.
    pub(super) staging_bytes: u64,
    /// Footprint of readable objects that nothing holds.
    pub(super) evictable_bytes: u64,
}

impl Tally {
    pub(super) fn add(&mut self, object: &Object) {
        match object.stage {
            Stage::Readable => self.readable += 1,
            Stage::Withdrawn => self.withdrawn += 1,
            Stage::Reserved(_) => {
                self.reserved += 1;
                self.staging_bytes += object.footprint;
            }
        }
        self.locked += usize::from(object.locks > 0);
        self.locks += object.locks;
        if object.is_evictable() {
            self.evictable_bytes += object.footprint;
        }
    }

    pub(super) fn subtract(&mut self, object: &Object) {
        match object.stage {
            Stage::Readable => self.readable -= 1,
            Stage::Withdrawn => self.withdrawn -= 1,
            Stage::Reserved(_) => {
                self.reserved -= 1;
                self.staging_bytes -= object.footprint;
            }
        }
        self.locked -= usize::from(object.locks > 0);
        self.locks -= object.locks;
        if object.is_evictable() {
            self.evictable_bytes -= object.footprint;
        }
    }
}
