//! `[tenants.<name>]` of the file: who may use how much of the pool.

use std::{collections::BTreeMap, num::NonZeroU32};

use serde::Deserialize;
use stockade_cache::{Budget, CacheSalt, Tenant, check_tenants};

use super::GIB;

/// Longest name of a tenant in bytes; it becomes a metric's label.
const MAX_NAME_BYTES: usize = 128;

/// One tenant as the file has it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantSettings {
    /// Salts whose objects count for it; left out by the one tenant that has all others.
    salts: Option<Vec<String>>,
    /// GiB that no other tenant can push it below.
    floor_gb: Option<f64>,
    /// Its part of what the floors leave, relative to the other weights.
    weight: Option<u32>,
    /// GiB that it never goes beyond.
    cap_gb: Option<f64>,
}

/// Checks each table, and that a pool of `pool_bytes` can keep what they promise.
pub(super) fn check(
    settings: BTreeMap<String, TenantSettings>,
    pool_bytes: u64,
) -> Result<Vec<Tenant>, String> {
    let mut tenants: Vec<Tenant> = Vec::with_capacity(settings.len());
    for (name, settings) in settings {
        let field = |field: &str| format!("tenants.{name}.{field}");
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "tenants.{name}: give a name of 1 to {MAX_NAME_BYTES} bytes"
            ));
        }
        let is_for_the_rest = settings.salts.is_none();
        let salts = settings.salts.unwrap_or_default();
        if !is_for_the_rest && salts.is_empty() {
            return Err(format!(
                "{} is empty: name its salts, or leave it out for the tenant of all others",
                field("salts")
            ));
        }
        if is_for_the_rest && let Some(other) = tenants.iter().find(|it| it.salts.is_empty()) {
            return Err(format!(
                "{} is missing, and tenant {} has all other salts already: name its salts",
                field("salts"),
                other.name
            ));
        }
        let salts = salts
            .iter()
            .map(|salt| {
                CacheSalt::parse(salt).map_err(|error| format!("{}: {error}", field("salts")))
            })
            .collect::<Result<_, _>>()?;
        let weight = settings.weight.unwrap_or(1);
        let weight = NonZeroU32::new(weight)
            .ok_or_else(|| format!("{} 0: give a whole number above 0", field("weight")))?;
        let bytes =
            |key: &str, gb: f64| match gb.is_finite() && (0.0..=f64::from(1 << 24)).contains(&gb) {
                true => Ok((gb * GIB) as u64),
                false => Err(format!("{} {gb}: give GiB, 0 or more", field(key))),
            };
        tenants.push(Tenant {
            budget: Budget {
                floor_bytes: bytes("floor_gb", settings.floor_gb.unwrap_or(0.0))?,
                weight,
                cap_bytes: settings.cap_gb.map(|gb| bytes("cap_gb", gb)).transpose()?,
            },
            name: name.into(),
            salts,
        });
    }
    check_tenants(&tenants, pool_bytes).map_err(|error| format!("tenants: {error}"))?;
    Ok(tenants)
}
