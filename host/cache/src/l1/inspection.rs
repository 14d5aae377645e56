//! Looking at the table: its status, and whether it agrees with itself.

use std::collections::HashMap;

use super::lease::{Holding, LeaseId};
use super::stage::Stage;
use super::tally::Tally;
use super::tenants::TenantId;
use super::{L1, ObjectId};
use crate::engine::{EngineStatus, SaltUsage};

impl L1 {
    pub(crate) fn status(&self) -> EngineStatus {
        let capacity_bytes = self.allocator.capacity();
        let used_bytes = self.allocator.used_bytes();
        EngineStatus {
            readable_objects: self.tally.readable,
            reserved_objects: self.tally.reserved,
            withdrawn_objects: self.tally.withdrawn,
            read_locked_objects: self.tally.locked,
            object_locks: self.tally.locks,
            owned_locks: self.owned_locks,
            owners: self.leases.owners(),
            leases: self.leases.len(),
            used_bytes,
            staging_bytes: self.tally.staging_bytes,
            evictable_bytes: self.tally.evictable_bytes,
            capacity_bytes,
            usage_ratio: if capacity_bytes == 0 {
                0.0
            } else {
                used_bytes as f64 / capacity_bytes as f64
            },
            largest_free_bytes: self.allocator.largest_free(),
            touched_bytes: self.allocator.cold_start(),
            evicted_objects: self.counters.evicted_objects,
            evicted_bytes: self.counters.evicted_bytes,
            demand_evicted_objects: self.counters.demand_evicted_objects,
            ranked_evicted_objects: self.counters.ranked_objects,
            corrupt_objects: self.counters.corrupt_objects,
            allocation_failures: self.counters.allocation_failures,
            expired_write_leases: self.counters.expired_write_leases,
            expired_read_leases: self.counters.expired_read_leases,
            huge_pages: "",
            segment_repairs: 0,
            dropped_notices: self.notices.dropped(),
            tenants: self.tenants.usage(capacity_bytes),
            salts: self
                .scopes
                .salts()
                .map(|entry| SaltUsage {
                    cache_salt: entry.salt.clone(),
                    bytes: entry.bytes,
                    objects: entry.objects,
                })
                .collect(),
        }
    }

    fn recount(&self) -> Tally {
        let mut tally = Tally::default();
        for (_, object) in self.objects.iter() {
            tally.add(object);
        }
        tally
    }

    /// Checks everything against everything; see `CacheEngine::check_invariants`.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.allocator.check()?;
        self.leases.check()?;
        if self.recount() != self.tally {
            return Err(format!("tally {:?} but {:?}", self.tally, self.recount()));
        }
        if self.owned_locks != self.tally.locks {
            return Err(format!(
                "leases own {} locks, objects carry {}",
                self.owned_locks, self.tally.locks
            ));
        }
        self.check_slots()?;
        self.check_holds()?;
        let indexed = self.tally.readable + self.tally.reserved;
        if self.index.len() != indexed {
            return Err(format!(
                "{} keys indexed for {indexed} objects",
                self.index.len()
            ));
        }
        self.check_tenants()?;
        let known = self.tenants.known_objects();
        if known != 0 && known != self.tally.readable {
            return Err(format!(
                "policy knows {known} of {} objects",
                self.tally.readable
            ));
        }
        Ok(())
    }

    /// Each tenant's sums must be those of its objects.
    fn check_tenants(&self) -> Result<(), String> {
        let mut sums = HashMap::<TenantId, [u64; 3]>::new();
        for (id, object) in self.objects.iter() {
            let [used, evictable, _] = sums.entry(object.tenant).or_default();
            *used += object.footprint;
            if object.is_evictable() {
                *evictable += object.footprint;
            }
            if object.tenant != self.scopes.tenant_of(object.scope) {
                return Err(format!("object {id} counts for another's tenant"));
            }
        }
        for (tenant, counted) in self.tenants.sums() {
            let found = sums.remove(&tenant).unwrap_or_default();
            if counted != found {
                return Err(format!("tenant {tenant} counts {counted:?}, has {found:?}"));
            }
        }
        match sums.is_empty() {
            true => Ok(()),
            false => Err("objects count for a tenant that is gone".to_owned()),
        }
    }

    fn check_slots(&self) -> Result<(), String> {
        let mut ranges: Vec<_> = self
            .objects
            .iter()
            .map(|(id, object)| (object.offset, object.footprint, id))
            .collect();
        ranges.sort_unstable();
        let mut end = 0;
        let mut used = 0;
        for (offset, footprint, id) in ranges {
            if offset < end {
                return Err(format!("slot of object {id} overlaps the one before"));
            }
            end = offset + footprint;
            used += footprint;
        }
        if end > self.allocator.capacity() || used != self.allocator.used_bytes() {
            return Err(format!(
                "slots take {used} bytes, the pool counts {}",
                self.allocator.used_bytes()
            ));
        }
        let salted: u64 = self.scopes.salts().map(|entry| entry.bytes).sum();
        if salted != used {
            return Err(format!("salts account for {salted} of {used} bytes"));
        }
        Ok(())
    }

    /// Each object's locks and reservation must be found again in the leases.
    fn check_holds(&self) -> Result<(), String> {
        let mut locks = HashMap::<ObjectId, u64>::new();
        let mut reserved = HashMap::<ObjectId, LeaseId>::new();
        for (id, lease) in self.leases.iter() {
            match &lease.holding {
                Holding::Write(write) => {
                    reserved.extend(write.objects.iter().map(|&(_, object)| (object, id)));
                }
                Holding::Lookup(lookup) => {
                    let sum: u64 = lookup.held.iter().map(|&held| u64::from(held)).sum();
                    if sum != lookup.remaining || sum == 0 {
                        return Err(format!("{id} holds {sum}, counts {}", lookup.remaining));
                    }
                    for (&object, &held) in lookup.objects.iter().zip(&lookup.held) {
                        if held > 0 {
                            *locks.entry(object).or_default() += u64::from(held);
                        }
                    }
                }
                Holding::Read(read) => {
                    for &object in &read.objects {
                        *locks.entry(object).or_default() += 1;
                    }
                }
            }
        }
        for (id, object) in self.objects.iter() {
            if locks.remove(&id).unwrap_or(0) != object.locks {
                return Err(format!("object {id} carries {} locks", object.locks));
            }
            let holder = reserved.remove(&id);
            let expected = match object.stage {
                Stage::Reserved(lease) => Some(lease),
                Stage::Readable | Stage::Withdrawn => None,
            };
            if holder != expected {
                return Err(format!(
                    "object {id} is {:?}, held by {holder:?}",
                    object.stage
                ));
            }
            if object.stage == Stage::Withdrawn && !object.is_held() {
                return Err(format!("object {id} is withdrawn but nobody holds it"));
            }
        }
        match (locks.is_empty(), reserved.is_empty()) {
            (true, true) => Ok(()),
            _ => Err("a lease holds an object that is gone".to_owned()),
        }
    }
}
