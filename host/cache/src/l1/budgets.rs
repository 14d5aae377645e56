//! Budgets that change while the cache is in use.

use std::ops::Range;

use super::L1;
use super::stage::Stage;
use super::tenants::NOWHERE;
use crate::engine::{Budget, Tenant, TenantUsage};
use crate::error::BudgetError;
use crate::key::CacheSalt;

impl L1 {
    /// Takes a tenant in, before the first object.
    pub(crate) fn configure_tenant(&mut self, tenant: &Tenant) -> Result<(), BudgetError> {
        self.tenants.configure(tenant, self.allocator.capacity())
    }

    /// Replaces tenants; `move_objects` must follow.
    pub(crate) fn replace_tenants(
        &mut self,
        before: &[Tenant],
        after: &[Tenant],
    ) -> Result<(), BudgetError> {
        let capacity = self.allocator.capacity();
        self.tenants.replace(before, after, capacity)?;
        self.reassign_scopes();
        Ok(())
    }

    /// Sets a budget; `move_objects` must follow.
    pub(crate) fn set_budget(
        &mut self,
        salt: &CacheSalt,
        budget: Budget,
    ) -> Result<(), BudgetError> {
        let capacity = self.allocator.capacity();
        self.tenants.set_budget(salt, budget, capacity)?;
        self.reassign_scopes();
        Ok(())
    }

    /// Takes a salt from its tenant; `move_objects` must follow.
    pub(crate) fn remove_budget(&mut self, salt: &CacheSalt) -> bool {
        let removed = self.tenants.remove_budget(salt);
        if removed {
            self.reassign_scopes();
        }
        removed
    }

    pub(crate) fn tenant_usage(&self) -> Vec<TenantUsage> {
        self.tenants.usage(self.allocator.capacity())
    }

    fn reassign_scopes(&mut self) {
        let tenants = &self.tenants;
        self.scopes.reassign(|salt| tenants.of_salt(salt));
    }

    /// Lets the objects numbered `range` count for the tenants of their salts; whether
    /// there are more.
    pub(crate) fn move_objects(&mut self, range: Range<u32>) -> bool {
        if range.start as usize >= self.objects.numbers() {
            self.tenants.drop_abandoned();
            return false;
        }
        for id in range {
            let Some(object) = self.objects.get_mut(id) else {
                continue;
            };
            let (from, to) = (object.tenant, self.scopes.tenant_of(object.scope));
            if from == to {
                continue;
            }
            self.tenants.subtract(object);
            object.tenant = to;
            self.tenants.add(object);
            let place = std::mem::replace(&mut object.place, NOWHERE);
            if object.stage == Stage::Readable {
                self.tenants.unrank(from, place);
                self.rank(id);
            }
        }
        true
    }
}
