//! Eviction at the watermark, of the pool or of a tenant's cap, in an order from outside.
//!
//! Three steps, the mutex free between them: candidates are taken from the front of the native
//! order and put back; somebody ranks them; those that are still what they were go in that
//! order. From which tenant room is taken is decided as ever, object by object.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::reclaim::{EvictionRound, Step};
use super::tenants::{Search, TenantId};
use super::{L1, ObjectId};
use crate::eviction::{Candidate, Ranker};

/// Candidates that are collected for one ranking, over all tenants.
pub(crate) const CANDIDATES: usize = 512;

/// An object as it was when it was ranked.
#[derive(Debug, Clone, Copy)]
struct Seen {
    id: ObjectId,
    hash: u64,
    offset: u64,
    mark: (u32, u32),
}

/// The candidates of one tenant.
#[derive(Debug)]
pub(crate) struct Candidates {
    tenant: TenantId,
    name: Arc<str>,
    bytes_wanted: u64,
    seen: Vec<Seen>,
    list: Vec<Candidate>,
}

/// In which order candidates go, by tenant.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    by_tenant: HashMap<TenantId, VecDeque<Seen>>,
}

impl Orders {
    /// Has the candidates ranked; no lock may be held.
    pub(crate) fn ask(ranker: &dyn Ranker, candidates: Vec<Candidates>) -> Self {
        let mut orders = Self::default();
        for group in candidates {
            let Candidates {
                tenant,
                name,
                bytes_wanted,
                seen,
                list,
            } = group;
            if let Some(order) = ranker.rank(&name, bytes_wanted, list) {
                let order = order.iter().filter_map(|&place| seen.get(place as usize));
                orders.by_tenant.insert(tenant, order.copied().collect());
            }
        }
        orders
    }
}

impl L1 {
    /// Tenants that use as much of their caps as the watermark allows of the pool, and the bytes
    /// that each should give if somebody ranks its keys: a store at the cap makes room in the native
    /// order, so an order from outside counts only where room is made before.
    pub(crate) fn near_caps(&self) -> Vec<(TenantId, u64)> {
        let ratio = self.settings.eviction_ratio;
        let near = self.tenants.near_cap(self.settings.trigger_watermark);
        near.map(|(tenant, used)| (tenant, (used as f64 * ratio).ceil() as u64))
            .collect()
    }

    /// Candidates of the tenants that `ranker` ranks, of all or of the one that is named, from the
    /// front of the native order: about twice as many bytes as are wanted, so that there is a
    /// choice. Returns also how many of the wanted bytes one round with them should free.
    pub(crate) fn candidates(
        &mut self,
        now: Instant,
        wanted: u64,
        ranker: &dyn Ranker,
        only: Option<TenantId>,
    ) -> (Vec<Candidates>, u64) {
        let names = self.tenants.names();
        let ranked: HashMap<TenantId, Arc<str>> = names
            .into_iter()
            .filter(|(tenant, _)| only.is_none_or(|only| only == *tenant))
            .filter(|(_, name)| ranker.ranks(name))
            .collect();
        if ranked.is_empty() {
            return (Vec::new(), wanted);
        }
        let numbers = self.objects.numbers();
        self.uses.want(now, numbers);
        let mut search = Search::among(only);
        let mut taken = Vec::new();
        let mut bytes = 0_u64;
        let mut tries = 0;
        while taken.len() < CANDIDATES && tries < 2 * CANDIDATES && bytes < wanted.saturating_mul(2)
        {
            tries += 1;
            match self.take_victim(&mut search) {
                Step::Victim(id) => {
                    bytes += self.objects.get(id).map_or(0, |object| object.footprint);
                    taken.push(id);
                }
                Step::PassedOver => {}
                Step::Exhausted => break,
            }
        }
        let goal = wanted.min(bytes.div_ceil(2));
        let mut groups: Vec<Candidates> = Vec::new();
        for &id in &taken {
            let Some(object) = self.objects.get(id) else {
                continue;
            };
            let (Some(name), Some(key)) = (ranked.get(&object.tenant), self.key_of(id)) else {
                continue;
            };
            let usage = self.uses.of(id, now).unwrap_or_default();
            let candidate = Candidate {
                key,
                bytes: object.footprint,
                chunk: usage.chunk,
                idle: usage.idle,
                age: usage.age,
                uses: usage.uses,
                request: usage.request,
            };
            let seen = Seen {
                id,
                hash: object.hash,
                offset: object.offset,
                mark: self.uses.mark(id),
            };
            let place = match groups
                .iter()
                .position(|group| group.tenant == object.tenant)
            {
                Some(place) => place,
                None => {
                    groups.push(Candidates {
                        tenant: object.tenant,
                        name: Arc::clone(name),
                        bytes_wanted: 0,
                        seen: Vec::new(),
                        list: Vec::new(),
                    });
                    groups.len() - 1
                }
            };
            if let Some(group) = groups.get_mut(place) {
                group.bytes_wanted += object.footprint;
                group.seen.push(seen);
                group.list.push(candidate);
            }
        }
        // What eviction frees of each in this round is about half of what it is shown.
        for group in &mut groups {
            group.bytes_wanted = group.bytes_wanted.div_ceil(2).min(goal);
        }
        for id in taken.into_iter().rev() {
            if let Some(object) = self.objects.get(id) {
                self.tenants.untake(object.tenant, object.footprint);
                self.tenants.restore(object.tenant, object.place);
            }
        }
        (groups, goal)
    }

    /// Evicts until `bytes` are free or `max_steps` objects were looked at, from all tenants or the
    /// one that is named: in policy order, where `orders` do not say what goes first of a tenant.
    pub(crate) fn evict_ordered(
        &mut self,
        bytes: u64,
        max_steps: usize,
        orders: &mut Orders,
        only: Option<TenantId>,
    ) -> EvictionRound {
        let mut round = EvictionRound::default();
        let mut search = Search::among(only);
        for _ in 0..max_steps {
            if round.freed_bytes >= bytes {
                break;
            }
            let step = match self.take_ordered(&mut search, orders) {
                Some(id) => Step::Victim(id),
                None => self.take_victim(&mut search),
            };
            match step {
                Step::Victim(id) => round.freed_bytes += self.evict_taken(id),
                Step::PassedOver => {}
                Step::Exhausted => {
                    round.is_exhausted = true;
                    break;
                }
            }
        }
        round
    }

    /// The first of the ordered objects of the tenant whose turn it is, if it is still what was
    /// ranked and may go.
    fn take_ordered(&mut self, search: &mut Search, orders: &mut Orders) -> Option<ObjectId> {
        if orders.by_tenant.is_empty() {
            return None;
        }
        let tenant = self.tenants.giver(search)?;
        let order = orders.by_tenant.get_mut(&tenant)?;
        while let Some(seen) = order.pop_front() {
            let Some(object) = self.objects.get(seen.id) else {
                continue;
            };
            let is_same = object.hash == seen.hash
                && object.offset == seen.offset
                && object.tenant == tenant
                && self.uses.mark(seen.id) == seen.mark;
            let is_free = object.is_evictable() && !self.keep_hints.has(seen.id);
            if is_same && is_free && self.tenants.may_take(search, tenant, object.footprint) {
                self.tenants.accept(search, tenant, object.footprint);
                self.counters.ranked_objects += 1;
                return Some(seen.id);
            }
        }
        None
    }
}
