//! Budgets of tenants that are changed while the server runs, and kept over restarts.
//!
//! The last who says something about a tenant is heard. What HTTP sets holds over the file's
//! `[tenants.<name>]`, over a restart too if there is a state directory, until the file says
//! something else about that tenant than when HTTP set it; then the file holds again.

use std::{num::NonZeroU32, path::Path};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use stockade_cache::{Budget, BudgetError, CacheEngine, CacheSalt, Tenant, TenantUsage};

use crate::state_dir::{StateDir, StateError, StateFile, read_document};

/// Its name in the state directory.
const FILE: &str = "tenant-budgets.json";
/// What the document says of itself; another number is another format.
const VERSION: u32 = 1;

/// Why a budget was not changed.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// The pool or the other tenants do not allow it.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// It could not be kept, so it was not set either.
    #[error("the budget is as before, because it could not be kept: {0}")]
    State(#[from] StateError),
}

/// The document that is kept.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    budgets: Vec<Kept>,
}

/// A tenant whose budget HTTP set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    tenant: String,
    /// The salt it was set by; one of the tenant's.
    cache_salt: String,
    budget: Amounts,
    /// What the file said then; left out for a tenant that the file does not name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    over: Option<Amounts>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Amounts {
    floor_bytes: u64,
    weight: NonZeroU32,
    cap_bytes: Option<u64>,
}

impl From<Budget> for Amounts {
    fn from(budget: Budget) -> Self {
        Self {
            floor_bytes: budget.floor_bytes,
            weight: budget.weight,
            cap_bytes: budget.cap_bytes,
        }
    }
}

impl From<Amounts> for Budget {
    fn from(amounts: Amounts) -> Self {
        Self {
            floor_bytes: amounts.floor_bytes,
            weight: amounts.weight,
            cap_bytes: amounts.cap_bytes,
        }
    }
}

/// The one place through which budgets change while the server runs.
pub struct TenantBudgets {
    file: Option<StateFile>,
    /// What the file says; changes under `changing` only.
    configured: Mutex<Vec<Tenant>>,
    /// Held while the engine and the document are brought to agree, by threads that may block.
    changing: Mutex<()>,
    /// Held for a look.
    kept: Mutex<Vec<Kept>>,
}

impl TenantBudgets {
    /// Reads what is kept and sets it in the engine, which has the file's budgets.
    ///
    /// # Errors
    /// [`StateError`] if the document is broken, or holds what this pool cannot keep.
    pub fn restore(
        state: Option<&StateDir>,
        configured: Vec<Tenant>,
        engine: &CacheEngine,
    ) -> Result<Self, StateError> {
        let file = state.map(|state| state.file(FILE));
        let mut budgets = Self {
            file,
            configured: configured.into(),
            changing: Mutex::default(),
            kept: Mutex::default(),
        };
        let Some(file) = &budgets.file else {
            return Ok(budgets);
        };
        let Some(document) = read(file.path())? else {
            return Ok(budgets);
        };
        let found = document.budgets.len();
        let mut kept = Vec::with_capacity(found);
        for mut entry in document.budgets {
            let of = |what: &str| file.unusable(format!("tenant {:?}: {what}", entry.tenant));
            let salt = CacheSalt::parse(&entry.cache_salt)
                .map_err(|error| of(&format!("cache_salt: {error}")))?;
            let now = budgets.configured_with(&salt);
            if now != entry.over {
                tracing::warn!(
                    "the file says something new about tenant {:?}, so its budget of {} is forgotten",
                    entry.tenant,
                    file.path().display()
                );
                continue;
            }
            engine
                .set_budget(&salt, entry.budget.into())
                .map_err(|error| of(&format!("{error}; mend or remove this entry")))?;
            // The file may call it something else by now.
            entry.tenant = name_of(engine, &salt);
            kept.push(entry);
        }
        if kept.len() < found {
            // Once forgotten they do not come back when the file says again what it said before.
            budgets.keep(&kept)?;
        }
        tracing::info!(
            "{} budgets set over HTTP are taken from {}",
            kept.len(),
            file.path().display()
        );
        budgets.kept = kept.into();
        Ok(budgets)
    }

    /// Whether what is set outlives this server.
    #[must_use]
    pub fn survives_restart(&self) -> bool {
        self.file.is_some()
    }

    /// Whether HTTP set the budget of this tenant.
    #[must_use]
    pub fn is_set_over_http(&self, tenant: &str) -> bool {
        self.kept.lock().iter().any(|it| it.tenant == tenant)
    }

    /// What the file gives the tenant of a salt.
    fn configured_with(&self, salt: &CacheSalt) -> Option<Amounts> {
        let configured = self.configured.lock();
        let found = configured.iter().find(|it| it.salts.contains(salt));
        found.map(|it| it.budget.into())
    }

    /// Puts the tenants that the file has now in the place of those it had. What HTTP set holds
    /// on where the file says the same as then. Blocks.
    ///
    /// # Errors
    /// [`SetError`]; the engine's budgets are as before then, if it is one of budgets.
    pub fn reconfigure(&self, engine: &CacheEngine, tenants: Vec<Tenant>) -> Result<(), SetError> {
        let _changing = self.changing.lock();
        let before = self.configured.lock().clone();
        engine.replace_tenants(&before, &tenants)?;
        *self.configured.lock() = tenants;
        let kept = self.kept.lock().clone();
        let mut next = Vec::with_capacity(kept.len());
        for mut entry in kept {
            let Ok(salt) = CacheSalt::parse(&entry.cache_salt) else {
                continue;
            };
            let holds = self.configured_with(&salt) == entry.over
                && engine.set_budget(&salt, entry.budget.into()).is_ok();
            if holds {
                entry.tenant = name_of(engine, &salt);
                next.push(entry);
            } else {
                tracing::warn!(
                    "the file says something new about tenant {:?}, so its budget set over HTTP is forgotten",
                    entry.tenant
                );
            }
        }
        *self.kept.lock() = next.clone();
        self.keep(&next)?;
        Ok(())
    }

    /// Changes the budget of the tenant that has a salt; a salt without one becomes a tenant of its
    /// own. `change` gets the budget as it is, the default one for a new tenant. Blocks.
    ///
    /// # Errors
    /// [`SetError`]; the budget is as before then.
    pub fn change(
        &self,
        engine: &CacheEngine,
        salt: &CacheSalt,
        change: impl FnOnce(&mut Budget),
    ) -> Result<Budget, SetError> {
        let _changing = self.changing.lock();
        let mut budget = budget_of(engine, salt).unwrap_or_default();
        change(&mut budget);
        self.set(engine, salt, budget)?;
        Ok(budget)
    }

    /// Takes the cap of a salt's tenant away; `false` if it had none. A tenant of the file keeps its
    /// floor and weight, one that HTTP made is gone when it has nothing else. Blocks.
    ///
    /// # Errors
    /// [`SetError`]; the cap is as before then.
    pub fn remove_cap(&self, engine: &CacheEngine, salt: &CacheSalt) -> Result<bool, SetError> {
        let _changing = self.changing.lock();
        let Some(mut left) = budget_of(engine, salt) else {
            return Ok(false);
        };
        if left.cap_bytes.take().is_none() {
            return Ok(false);
        }
        if left != Budget::default() || self.configured_with(salt).is_some() {
            self.set(engine, salt, left)?;
            return Ok(true);
        }
        let name = name_of(engine, salt);
        let mut next = self.kept.lock().clone();
        next.retain(|it| it.tenant != name);
        self.keep(&next)?;
        *self.kept.lock() = next;
        Ok(engine.remove_budget(salt))
    }

    /// Engine first, because it knows what is allowed; undone if it cannot be kept.
    fn set(&self, engine: &CacheEngine, salt: &CacheSalt, budget: Budget) -> Result<(), SetError> {
        let before = budget_of(engine, salt);
        engine.set_budget(salt, budget)?;
        let tenant = name_of(engine, salt);
        let over = self.configured_with(salt);
        let budget = budget.into();
        let mut next = self.kept.lock().clone();
        next.retain(|it| it.tenant != tenant);
        if over != Some(budget) {
            let cache_salt = salt.as_str().to_owned();
            next.push(Kept {
                tenant,
                cache_salt,
                budget,
                over,
            });
        }
        if let Err(error) = self.keep(&next) {
            match before {
                // It was allowed before, and nothing else changed since.
                Some(before) => engine.set_budget(salt, before)?,
                None => {
                    engine.remove_budget(salt);
                }
            }
            return Err(error.into());
        }
        *self.kept.lock() = next;
        Ok(())
    }

    fn keep(&self, budgets: &[Kept]) -> Result<(), StateError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        file.write(&Document {
            version: VERSION,
            budgets: budgets.to_vec(),
        })
    }
}

/// Whether what a state directory holds of budgets can be read; changes and locks nothing.
///
/// # Errors
/// [`StateError`] if the document is broken.
pub fn check(state_dir: &Path) -> Result<(), StateError> {
    read(&state_dir.join(FILE)).map(|_| ())
}

fn read(path: &Path) -> Result<Option<Document>, StateError> {
    let document: Option<Document> = read_document(path)?;
    match document {
        Some(document) if document.version != VERSION => Err(StateError::Unusable {
            path: path.to_owned(),
            why: format!(
                "it is of version {}, and this server knows {VERSION}: start the server that wrote it, or remove it",
                document.version
            ),
        }),
        document => Ok(document),
    }
}

fn budget_of(engine: &CacheEngine, salt: &CacheSalt) -> Option<Budget> {
    tenant_of(engine, salt).map(|usage| usage.tenant.budget)
}

/// What the tenant of a salt is called; a salt without one, itself.
fn name_of(engine: &CacheEngine, salt: &CacheSalt) -> String {
    tenant_of(engine, salt).map_or_else(
        || salt.as_str().to_owned(),
        |usage| usage.tenant.name.to_string(),
    )
}

/// The tenant that has the salt; `None` for a salt that counts with all others.
pub(crate) fn tenant_of(engine: &CacheEngine, salt: &CacheSalt) -> Option<TenantUsage> {
    let all = engine.budgets();
    all.into_iter().find(|it| it.tenant.salts.contains(salt))
}
