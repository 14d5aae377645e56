//! Tenants and what each of them may use.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::error::BudgetError;
use crate::eviction::PolicyKind;
use crate::key::CacheSalt;
use crate::l1::tenants::Tenants;

/// Most tenants with a budget at once. Choosing a victim looks at each of them, so this
/// also bounds what a victim costs.
pub const MAX_TENANTS: usize = 1024;

/// Name of the tenant that all salts without one of their own belong to, unless the
/// configuration names it.
pub const EVERYBODY_ELSE: &str = "everybody else";

/// What a tenant may use of the pool. Bytes are those of its slots, alignment and
/// reservations included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes that no other tenant can push it below.
    pub floor_bytes: u64,
    /// Its part, relative to the others' weights, of what all floors leave.
    pub weight: NonZeroU32,
    /// Bytes that it never goes beyond; its own keys go first. `None` for no cap, 0 for a
    /// tenant that may store nothing. LMCache's `/quota` sets this.
    pub cap_bytes: Option<u64>,
}

impl Default for Budget {
    /// No floor, weight 1, no cap: what a salt without a budget has.
    fn default() -> Self {
        Self {
            floor_bytes: 0,
            weight: NonZeroU32::MIN,
            cap_bytes: None,
        }
    }
}

/// A tenant as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Shown in status and metrics.
    pub name: Arc<str>,
    /// The salts whose objects count for it. Empty for the one tenant that all salts
    /// belong to which no other names.
    pub salts: Vec<CacheSalt>,
    /// What it may use.
    pub budget: Budget,
}

/// Says whether an engine of that many bytes could be opened with these tenants.
///
/// # Errors
/// [`BudgetError`] for the first one that cannot be had beside those before it.
pub fn check_tenants(tenants: &[Tenant], capacity_bytes: u64) -> Result<(), BudgetError> {
    let mut accepted = Tenants::new(PolicyKind::Noop);
    tenants
        .iter()
        .try_for_each(|tenant| accepted.configure(tenant, capacity_bytes))
}

/// A tenant and what it uses now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantUsage {
    /// The tenant; its salts in order.
    pub tenant: Tenant,
    /// Bytes of its slots, alignment and reservations included.
    pub used_bytes: u64,
    /// Its objects, reserved and withdrawn ones included.
    pub objects: u64,
    /// What it would have if all tenants wanted everything: its floor and its part, by
    /// weight, of what the floors leave, at most its cap.
    pub share_bytes: u64,
    /// Bytes of its objects that were evicted, for whomever.
    pub evicted_bytes: u64,
    /// Objects evicted so far.
    pub evicted_objects: u64,
}
