//! Interned key scopes and what each cache salt uses.
//!
//! Keys of one request share their scope, and comparing it by content for every chunk
//! would cost more than finding the chunk. A scope lives as long as one object uses it.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::DefaultHashBuilder;

use super::slab::Slab;
use super::tenants::TenantId;
use crate::key::{CacheSalt, KeyScope};

/// Number of an interned scope.
pub(super) type ScopeId = u32;

#[derive(Debug)]
struct ScopeEntry {
    scope: Arc<KeyScope>,
    salt: u32,
    tenant: TenantId,
    fingerprint: u64,
    objects: u64,
}

/// Objects and bytes of one salt.
#[derive(Debug)]
pub(super) struct SaltEntry {
    pub(super) salt: CacheSalt,
    pub(super) bytes: u64,
    pub(super) objects: u64,
}

#[derive(Debug, Default)]
pub(super) struct ScopeTable {
    scopes: Slab<ScopeEntry>,
    by_scope: HashMap<Arc<KeyScope>, ScopeId>,
    salts: Slab<SaltEntry>,
    by_salt: HashMap<CacheSalt, u32>,
    hasher: DefaultHashBuilder,
}

impl ScopeTable {
    /// The scope's number if any object uses it.
    pub(super) fn find(&self, scope: &Arc<KeyScope>) -> Option<ScopeId> {
        self.by_scope.get(scope).copied()
    }

    /// Counts an object of `bytes` under a scope, which is interned if need be.
    /// `None` if there is no number left. `tenant` is asked once for a scope.
    pub(super) fn add(
        &mut self,
        scope: &Arc<KeyScope>,
        bytes: u64,
        tenant: impl FnOnce(&CacheSalt) -> TenantId,
    ) -> Option<ScopeId> {
        let id = match self.find(scope) {
            Some(id) => id,
            None => self.intern(scope, tenant(&scope.cache_salt))?,
        };
        let entry = self.scopes.get_mut(id)?;
        entry.objects += 1;
        let salt = self.salts.get_mut(entry.salt)?;
        salt.objects += 1;
        salt.bytes += bytes;
        Some(id)
    }

    fn intern(&mut self, scope: &Arc<KeyScope>, tenant: TenantId) -> Option<ScopeId> {
        let salt = match self.by_salt.get(&scope.cache_salt) {
            Some(&salt) => salt,
            None => {
                let salt = self.salts.insert(SaltEntry {
                    salt: scope.cache_salt.clone(),
                    bytes: 0,
                    objects: 0,
                })?;
                self.by_salt.insert(scope.cache_salt.clone(), salt);
                salt
            }
        };
        let id = self.scopes.insert(ScopeEntry {
            scope: Arc::clone(scope),
            salt,
            tenant,
            fingerprint: self.hasher.hash_one(scope),
            objects: 0,
        })?;
        self.by_scope.insert(Arc::clone(scope), id);
        Some(id)
    }

    /// Takes an object back out of the count; the last one takes its scope along.
    pub(super) fn subtract(&mut self, id: ScopeId, bytes: u64) {
        let Some(entry) = self.scopes.get_mut(id) else {
            return;
        };
        entry.objects -= 1;
        let salt_id = entry.salt;
        if entry.objects == 0
            && let Some(entry) = self.scopes.remove(id)
        {
            self.by_scope.remove(&entry.scope);
        }
        let Some(salt) = self.salts.get_mut(salt_id) else {
            return;
        };
        salt.bytes -= bytes;
        salt.objects -= 1;
        if salt.objects == 0
            && let Some(entry) = self.salts.remove(salt_id)
        {
            self.by_salt.remove(&entry.salt);
        }
    }

    pub(super) fn scope(&self, id: ScopeId) -> Option<&Arc<KeyScope>> {
        self.scopes.get(id).map(|entry| &entry.scope)
    }

    /// A hash of the scope's content, which stays the same when it is interned anew.
    pub(super) fn fingerprint(&self, id: ScopeId) -> u64 {
        self.scopes.get(id).map_or(0, |entry| entry.fingerprint)
    }

    /// The number of the scope's salt.
    pub(super) fn salt_of(&self, id: ScopeId) -> u32 {
        self.scopes.get(id).map_or(0, |entry| entry.salt)
    }

    /// The tenant that objects of the scope count for.
    pub(super) fn tenant_of(&self, id: ScopeId) -> TenantId {
        self.scopes.get(id).map_or(0, |entry| entry.tenant)
    }

    /// Asks anew for the tenant of each scope.
    pub(super) fn reassign(&mut self, tenant: impl Fn(&CacheSalt) -> TenantId) {
        for entry in self.scopes.iter_mut() {
            entry.tenant = tenant(&entry.scope.cache_salt);
        }
    }

    pub(super) fn salts(&self) -> impl Iterator<Item = &SaltEntry> {
        self.salts.iter().map(|(_, entry)| entry)
    }
}
