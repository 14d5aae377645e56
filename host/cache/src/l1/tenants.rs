//! Which tenant an object counts for, what each uses, and from whom room is taken.
//!
//! Each tenant has an eviction policy of its own, so that ranking its keys needs no look at
//! the others'. Between tenants the rule is weighted max-min fairness over the floors: room
//! is taken from the tenant with the most bytes above its floor per unit of weight, which
//! is the one most above its share whatever the pool's size. A tenant at its floor gives
//! only for its own stores.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

use super::slab::Slab;
use super::{Object, ObjectId};
use crate::engine::{Budget, EVERYBODY_ELSE, MAX_TENANTS, Tenant, TenantUsage};
use crate::error::BudgetError;
use crate::eviction::{EntryFacts, EntryId, EvictionPolicy, PolicyKind};
use crate::key::CacheSalt;

/// Number of a tenant.
pub(crate) type TenantId = u32;

/// Number of an object in the policy of its tenant. Policies keep tables over these, so each
/// tenant has numbers of its own: tables over all objects for every tenant would be too much.
pub(super) type Place = EntryId;

/// The place of an object that no policy ranks.
pub(super) const NOWHERE: Place = Place::MAX;

/// Name of the tenant of the empty salt, when that has a budget of its own; as in the paths
/// of LMCache's `/quota`.
const UNSALTED: &str = "_default";

/// The tenant of all salts that no other tenant has.
const REST: TenantId = 0;

struct Entry {
    name: Arc<str>,
    budget: Budget,
    policy: Box<dyn EvictionPolicy>,
    /// The object at each place.
    ranked: Vec<ObjectId>,
    free_places: Vec<Place>,
    /// Bytes of all its slots.
    used_bytes: u64,
    objects: u64,
    /// Bytes of its readable objects that nothing holds.
    evictable_bytes: u64,
    /// Bytes of objects that were taken and not yet answered for.
    taken_bytes: u64,
    evicted_bytes: u64,
    evicted_objects: u64,
}

impl Entry {
    fn new(name: Arc<str>, budget: Budget, kind: PolicyKind) -> Self {
        Self {
            name,
            budget,
            policy: kind.build(),
            ranked: Vec::new(),
            free_places: Vec::new(),
            used_bytes: 0,
            objects: 0,
            evictable_bytes: 0,
            taken_bytes: 0,
            evicted_bytes: 0,
            evicted_objects: 0,
        }
    }

    fn place(&mut self, id: ObjectId) -> Place {
        match self.free_places.pop() {
            Some(place) => {
                if let Some(slot) = self.ranked.get_mut(place as usize) {
                    *slot = id;
                }
                place
            }
            None => {
                self.ranked.push(id);
                // There are less than u32::MAX objects.
                (self.ranked.len() - 1) as Place
            }
        }
    }

    fn take(&mut self) -> Option<ObjectId> {
        let place = self.policy.take()?;
        self.ranked.get(place as usize).copied()
    }

    /// Bytes left if all that was taken goes.
    fn remaining_bytes(&self) -> u64 {
        self.used_bytes - self.taken_bytes
    }

    /// Bytes that others may take from it.
    fn spare_bytes(&self) -> u64 {
        self.remaining_bytes()
            .saturating_sub(self.budget.floor_bytes)
    }

    /// How far above its share it is; comparable between tenants.
    fn level(&self) -> u128 {
        (u128::from(self.spare_bytes()) << 32) / u128::from(self.budget.weight.get())
    }
}

/// A search for victims on behalf of some tenants, or of nobody at the watermark. It is over
/// before anything else changes what tenants use.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// They may lose keys below their floors, because they want the room themselves.
    asking: Vec<TenantId>,
    /// Nobody but this one gives.
    only: Option<TenantId>,
    /// Those that may give, the one most above its share on top; made at the first victim.
    givers: Option<BinaryHeap<Giver>>,
    /// Nothing else is left, so what should go last goes.
    pub(super) ignores_hints: bool,
}

/// Ordered by how far above its share it is; among equals those that ask give first.
type Giver = (u128, bool, TenantId);

impl Search {
    pub(super) fn on_behalf_of(asking: impl IntoIterator<Item = TenantId>) -> Self {
        Self {
            asking: asking.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Of one tenant alone, or of all.
    pub(super) fn among(only: Option<TenantId>) -> Self {
        Self {
            only,
            ..Self::default()
        }
    }

    /// Looks at all that is in order again, also at what should go last.
    pub(super) fn begin_again(&mut self) {
        self.givers = None;
        self.ignores_hints = true;
    }

    fn giver(&self, id: TenantId, entry: &Entry) -> Option<Giver> {
        let is_asking = self.asking.contains(&id);
        let is_among = self.only.is_none_or(|only| only == id);
        let may_give =
            is_among && (entry.spare_bytes() > 0 || is_asking) && !entry.policy.is_empty();
        may_give.then(|| (entry.level(), is_asking, id))
    }
}

fn claimed_anew(changed: &[&Tenant], salt: &CacheSalt) -> bool {
    changed.iter().any(|tenant| tenant.salts.contains(salt))
}

/// All tenants; there is always the one for the rest.
pub(crate) struct Tenants {
    kind: PolicyKind,
    entries: Slab<Entry>,
    by_salt: HashMap<CacheSalt, TenantId>,
}

impl Tenants {
    pub(crate) fn new(kind: PolicyKind) -> Self {
        let mut entries = Slab::default();
        let rest = Entry::new(Arc::from(EVERYBODY_ELSE), Budget::default(), kind);
        let id = entries.insert(rest);
        debug_assert_eq!(id, Some(REST));
        Self {
            kind,
            entries,
            by_salt: HashMap::new(),
        }
    }

    /// The tenant that objects under a salt count for.
    pub(super) fn of_salt(&self, salt: &CacheSalt) -> TenantId {
        self.by_salt.get(salt).copied().unwrap_or(REST)
    }

    /// Takes a tenant in, or gives an existing one of that name new salts and budget.
    pub(crate) fn configure(
        &mut self,
        tenant: &Tenant,
        capacity_bytes: u64,
    ) -> Result<(), BudgetError> {
        let named = |entry: &Entry| entry.name == tenant.name;
        let known = match tenant.salts.is_empty() {
            true => Some(REST),
            false => self
                .entries
                .iter()
                .find_map(|(id, entry)| (id != REST && named(entry)).then_some(id)),
        };
        if let Some(salt) = tenant.salts.iter().find(|salt| {
            let owner = self.by_salt.get(salt);
            owner.is_some_and(|owner| Some(*owner) != known)
        }) {
            let owner = self.entries.get(self.of_salt(salt));
            return Err(BudgetError::SaltTaken {
                salt: salt.clone(),
                tenant: owner.map_or_else(|| Arc::from(""), |entry| Arc::clone(&entry.name)),
            });
        }
        self.check(known, &tenant.name, &tenant.budget, capacity_bytes)?;
        let id = match known {
            Some(id) => id,
            None => self.insert(Arc::clone(&tenant.name), tenant.budget)?,
        };
        if let Some(entry) = self.entries.get_mut(id) {
            entry.name = Arc::clone(&tenant.name);
            entry.budget = tenant.budget;
        }
        self.by_salt.retain(|_, owner| *owner != id);
        let salts = tenant.salts.iter().cloned();
        self.by_salt.extend(salts.map(|salt| (salt, id)));
        Ok(())
    }

    /// Puts the tenants `after` in the place of the tenants `before`; nothing changes on an
    /// error. Those that are in both as they were keep the budgets that were set since.
    pub(super) fn replace(
        &mut self,
        before: &[Tenant],
        after: &[Tenant],
        capacity_bytes: u64,
    ) -> Result<(), BudgetError> {
        let claimed: HashSet<&CacheSalt> = after.iter().flat_map(|it| &it.salts).collect();
        let named = |name: &Arc<str>, tenants: &[Tenant]| tenants.iter().any(|it| it.name == *name);
        let mut trial = Self::new(PolicyKind::Noop);
        for tenant in after {
            trial.configure(tenant, capacity_bytes)?;
        }
        for usage in self.usage(capacity_bytes) {
            let mut tenant = usage.tenant;
            tenant.salts.retain(|salt| !claimed.contains(salt));
            let is_set_apart = !named(&tenant.name, before) && !named(&tenant.name, after);
            if is_set_apart && !tenant.salts.is_empty() {
                trial.configure(&tenant, capacity_bytes)?;
            }
        }
        let changed: Vec<&Tenant> = after.iter().filter(|it| !before.contains(it)).collect();
        let gone = before.iter().filter(|it| !named(&it.name, after));
        let loosened: HashSet<Arc<str>> = changed
            .iter()
            .copied()
            .chain(gone)
            .map(|it| Arc::clone(&it.name))
            .collect();
        let is_loosened = |(_, entry): &(TenantId, &Entry)| loosened.contains(&entry.name);
        let ids: HashSet<TenantId> = self
            .entries
            .iter()
            .filter(is_loosened)
            .map(|(id, _)| id)
            .collect();
        for &id in &ids {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.budget = Budget::default();
                if id == REST {
                    entry.name = Arc::from(EVERYBODY_ELSE);
                }
            }
        }
        self.by_salt
            .retain(|salt, owner| !ids.contains(owner) && !claimed_anew(&changed, salt));
        for tenant in changed {
            self.configure(tenant, capacity_bytes)?;
        }
        Ok(())
    }

    /// Sets the budget of the tenant that has the salt; a salt without one becomes a tenant
    /// of its own.
    pub(super) fn set_budget(
        &mut self,
        salt: &CacheSalt,
        budget: Budget,
        capacity_bytes: u64,
    ) -> Result<(), BudgetError> {
        let known = self.by_salt.get(salt).copied();
        let name: Arc<str> = match known.and_then(|id| self.entries.get(id)) {
            Some(entry) => Arc::clone(&entry.name),
            None if salt.as_str().is_empty() => Arc::from(UNSALTED),
            None => Arc::from(salt.as_str()),
        };
        self.check(known, &name, &budget, capacity_bytes)?;
        match known {
            Some(id) => {
                if let Some(entry) = self.entries.get_mut(id) {
                    entry.budget = budget;
                }
            }
            None => {
                let id = self.insert(name, budget)?;
                self.by_salt.insert(salt.clone(), id);
            }
        }
        Ok(())
    }

    /// Takes the salt from its tenant; whether it had one. A tenant without salts goes once
    /// its objects have moved.
    pub(super) fn remove_budget(&mut self, salt: &CacheSalt) -> bool {
        self.by_salt.remove(salt).is_some()
    }

    /// Gives the tenants of the salts that have no objects new policies, without ghosts.
    pub(super) fn forget_histories(&mut self, salts: &[CacheSalt]) -> usize {
        let ids: HashSet<TenantId> = salts.iter().map(|salt| self.of_salt(salt)).collect();
        let mut forgotten = 0;
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id)
                && entry.objects == 0
            {
                entry.policy = self.kind.build();
                entry.ranked = Vec::new();
                entry.free_places = Vec::new();
                forgotten += 1;
            }
        }
        forgotten
    }

    /// Drops tenants that have neither salts nor objects.
    pub(super) fn drop_abandoned(&mut self) {
        let abandoned: Vec<TenantId> = self
            .entries
            .iter()
            .filter(|&(id, entry)| id != REST && entry.objects == 0)
            .map(|(id, _)| id)
            .filter(|id| !self.by_salt.values().any(|owner| owner == id))
            .collect();
        for id in abandoned {
            self.entries.remove(id);
        }
    }

    fn insert(&mut self, name: Arc<str>, budget: Budget) -> Result<TenantId, BudgetError> {
        if self.entries.iter().count() > MAX_TENANTS {
            return Err(BudgetError::TooMany { limit: MAX_TENANTS });
        }
        let entry = Entry::new(name, budget, self.kind);
        let full = BudgetError::TooMany { limit: MAX_TENANTS };
        self.entries.insert(entry).ok_or(full)
    }

    fn check(
        &self,
        of: Option<TenantId>,
        name: &Arc<str>,
        budget: &Budget,
        capacity_bytes: u64,
    ) -> Result<(), BudgetError> {
        if let Some(cap_bytes) = budget.cap_bytes.filter(|&cap| cap < budget.floor_bytes) {
            return Err(BudgetError::CapBelowFloor {
                tenant: Arc::clone(name),
                cap_bytes,
                floor_bytes: budget.floor_bytes,
            });
        }
        let others = self.entries.iter().filter(|&(id, _)| Some(id) != of);
        let others: u64 = others.map(|(_, entry)| entry.budget.floor_bytes).sum();
        match others.checked_add(budget.floor_bytes) {
            Some(sum) if sum <= capacity_bytes => Ok(()),
            _ => Err(BudgetError::FloorsExceedPool {
                tenant: Arc::clone(name),
                floor_bytes: budget.floor_bytes,
                left_bytes: capacity_bytes.saturating_sub(others),
            }),
        }
    }

    /// Counts an object for its tenant.
    pub(super) fn add(&mut self, object: &Object) {
        if let Some(entry) = self.entries.get_mut(object.tenant) {
            entry.used_bytes += object.footprint;
            entry.objects += 1;
            if object.is_evictable() {
                entry.evictable_bytes += object.footprint;
            }
        }
    }

    /// Takes an object out of the count, just as it was counted.
    pub(super) fn subtract(&mut self, object: &Object) {
        if let Some(entry) = self.entries.get_mut(object.tenant) {
            entry.used_bytes -= object.footprint;
            entry.objects -= 1;
            if object.is_evictable() {
                entry.evictable_bytes -= object.footprint;
            }
        }
    }

    /// Counts anew whether an object can go, which it could or could not before.
    pub(super) fn recount_evictable(&mut self, object: &Object, could_go: bool) {
        let can_go = object.is_evictable();
        if can_go == could_go {
            return;
        }
        if let Some(entry) = self.entries.get_mut(object.tenant) {
            match can_go {
                true => entry.evictable_bytes += object.footprint,
                false => entry.evictable_bytes -= object.footprint,
            }
        }
    }

    /// Gives a readable object a place in its tenant's order.
    pub(super) fn rank(&mut self, tenant: TenantId, id: ObjectId, facts: EntryFacts) -> Place {
        let Some(entry) = self.entries.get_mut(tenant) else {
            return NOWHERE;
        };
        let place = entry.place(id);
        entry.policy.insert(place, facts);
        place
    }

    pub(super) fn touch(&mut self, tenant: TenantId, place: Place) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.policy.touch(place);
        }
    }

    pub(super) fn session_ended(&mut self, tenant: TenantId, place: Place) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.policy.session_ended(place);
        }
    }

    /// Puts a taken or parked object back into the order.
    pub(super) fn restore(&mut self, tenant: TenantId, place: Place) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.policy.restore(place);
        }
    }

    /// The object leaves the order for another reason than to make room.
    pub(super) fn unrank(&mut self, tenant: TenantId, place: Place) {
        if let Some(entry) = self.entries.get_mut(tenant)
            && place != NOWHERE
        {
            entry.policy.remove(place);
            entry.free_places.push(place);
        }
    }

    /// Takes the next object of the tenant most above its share; it may be in use. The
    /// caller answers with `accept`, `park` or `pass_over`.
    pub(super) fn take(&mut self, search: &mut Search) -> Option<(TenantId, ObjectId)> {
        let mut givers = self.givers(search);
        let mut taken = None;
        while let Some(&(_, _, tenant)) = givers.peek() {
            taken = self.take_of(tenant).map(|id| (tenant, id));
            if taken.is_some() {
                break;
            }
            givers.pop();
        }
        search.givers = Some(givers);
        taken
    }

    /// The tenant whose turn it is to give.
    pub(super) fn giver(&self, search: &mut Search) -> Option<TenantId> {
        let givers = self.givers(search);
        let tenant = givers.peek().map(|&(_, _, tenant)| tenant);
        search.givers = Some(givers);
        tenant
    }

    fn givers(&self, search: &mut Search) -> BinaryHeap<Giver> {
        search.givers.take().unwrap_or_else(|| {
            let entries = self.entries.iter();
            entries
                .filter_map(|(id, entry)| search.giver(id, entry))
                .collect()
        })
    }

    /// Numbers and names of all tenants.
    pub(super) fn names(&self) -> Vec<(TenantId, Arc<str>)> {
        let entries = self.entries.iter();
        entries
            .map(|(id, entry)| (id, Arc::clone(&entry.name)))
            .collect()
    }

    /// The object just taken by the search will go, unless it is untaken.
    pub(super) fn accept(&mut self, search: &mut Search, tenant: TenantId, bytes: u64) {
        self.take_bytes(tenant, bytes);
        if let Some(entry) = self.entries.get(tenant) {
            let lower = search.giver(tenant, entry);
            if let Some(givers) = &mut search.givers {
                givers.pop();
                givers.extend(lower);
            }
        }
    }

    /// Takes the next object of one tenant.
    pub(super) fn take_of(&mut self, tenant: TenantId) -> Option<ObjectId> {
        self.entries.get_mut(tenant)?.take()
    }

    /// Whether the search may take that many bytes from the tenant.
    pub(super) fn may_take(&self, search: &Search, tenant: TenantId, bytes: u64) -> bool {
        search.asking.contains(&tenant)
            || self
                .entries
                .get(tenant)
                .is_some_and(|entry| entry.spare_bytes() >= bytes)
    }

    /// The object just taken is in use.
    pub(super) fn park(&mut self, tenant: TenantId, place: Place) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.policy.park(place);
        }
    }

    /// The object just taken by the search must stay: without it its tenant would be below
    /// its floor.
    pub(super) fn pass_over(&mut self, search: &mut Search, tenant: TenantId, place: Place) {
        self.restore(tenant, place);
        if let Some(givers) = &mut search.givers {
            givers.pop();
        }
    }

    /// An object just taken will go, unless [`untake`](Self::untake) says otherwise.
    pub(super) fn take_bytes(&mut self, tenant: TenantId, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.taken_bytes += bytes;
        }
    }

    /// Ends the taken state of an object.
    pub(super) fn untake(&mut self, tenant: TenantId, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(tenant) {
            entry.taken_bytes -= bytes;
        }
    }

    /// An object goes to make room; taken or in the order.
    pub(super) fn evicted(&mut self, tenant: TenantId, place: Place, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(tenant)
            && place != NOWHERE
        {
            entry.policy.evicted(place);
            entry.free_places.push(place);
            entry.evicted_bytes += bytes;
            entry.evicted_objects += 1;
        }
    }

    /// Bytes that a search may free at most.
    pub(super) fn reclaimable_bytes(&self, search: &Search) -> u64 {
        self.entries
            .iter()
            // A policy that tracks nothing gives nothing up.
            .filter(|(_, entry)| !entry.policy.is_empty())
            .map(|(id, entry)| match search.asking.contains(&id) {
                true => entry.evictable_bytes,
                false => entry.evictable_bytes.min(entry.spare_bytes()),
            })
            .sum()
    }

    /// Whether no tenant's policy tracks anything.
    pub(super) fn is_empty(&self) -> bool {
        self.entries
            .iter()
            .all(|(_, entry)| entry.policy.is_empty())
    }

    /// Objects that policies know.
    pub(super) fn known_objects(&self) -> usize {
        self.entries
            .iter()
            .map(|(_, entry)| entry.policy.len())
            .sum()
    }

    /// Bytes beyond the tenant's cap once it has `more_bytes` more, and its cap.
    pub(super) fn beyond_cap(&self, tenant: TenantId, more_bytes: u64) -> Option<(u64, u64)> {
        let entry = self.entries.get(tenant)?;
        let cap = entry.budget.cap_bytes?;
        let wanted = entry.remaining_bytes().saturating_add(more_bytes);
        (wanted > cap).then(|| (wanted - cap, cap))
    }

    /// What can be evicted of one tenant, in bytes.
    pub(super) fn evictable_bytes(&self, tenant: TenantId) -> u64 {
        let entry = self.entries.get(tenant);
        entry
            .filter(|entry| !entry.policy.is_empty())
            .map_or(0, |entry| entry.evictable_bytes)
    }

    pub(super) fn used_bytes(&self, tenant: TenantId) -> u64 {
        self.entries.get(tenant).map_or(0, |entry| entry.used_bytes)
    }

    /// A tenant that is above its cap, which was lowered.
    pub(super) fn over_cap(&self) -> impl Iterator<Item = TenantId> {
        let over = |(id, _): (TenantId, &Entry)| self.beyond_cap(id, 0).map(|_| id);
        self.entries.iter().filter_map(over)
    }

    /// Tenants that use this share of their caps or more, and how many bytes.
    pub(super) fn near_cap(&self, share: f64) -> impl Iterator<Item = (TenantId, u64)> {
        self.entries.iter().filter_map(move |(id, entry)| {
            let cap = entry.budget.cap_bytes? as f64;
            let used = entry.remaining_bytes();
            (used > 0 && used as f64 >= share * cap).then_some((id, used))
        })
    }

    /// Each tenant's (used, evictable, taken) bytes, for checking.
    pub(super) fn sums(&self) -> impl Iterator<Item = (TenantId, [u64; 3])> {
        self.entries.iter().map(|(id, entry)| {
            let sums = [entry.used_bytes, entry.evictable_bytes, entry.taken_bytes];
            (id, sums)
        })
    }

    pub(super) fn usage(&self, capacity_bytes: u64) -> Vec<TenantUsage> {
        let mut salts: HashMap<TenantId, Vec<CacheSalt>> = HashMap::new();
        for (salt, &id) in &self.by_salt {
            salts.entry(id).or_default().push(salt.clone());
        }
        let floors: u64 = self
            .entries
            .iter()
            .map(|(_, entry)| entry.budget.floor_bytes)
            .sum();
        let weights: u64 = self
            .entries
            .iter()
            .map(|(_, entry)| u64::from(entry.budget.weight.get()))
            .sum();
        let left = u128::from(capacity_bytes.saturating_sub(floors));
        let usage = self.entries.iter().map(|(id, entry)| {
            let budget = entry.budget;
            let part = left * u128::from(budget.weight.get()) / u128::from(weights.max(1));
            // A part of the capacity, so it fits.
            let share = budget.floor_bytes + part as u64;
            let mut salts = salts.remove(&id).unwrap_or_default();
            salts.sort_unstable();
            TenantUsage {
                tenant: Tenant {
                    name: Arc::clone(&entry.name),
                    salts,
                    budget,
                },
                used_bytes: entry.used_bytes,
                objects: entry.objects,
                share_bytes: budget.cap_bytes.map_or(share, |cap| share.min(cap)),
                evicted_bytes: entry.evicted_bytes,
                evicted_objects: entry.evicted_objects,
            }
        });
        usage.collect()
    }
}
