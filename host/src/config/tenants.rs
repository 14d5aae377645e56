//! `[tenants.<name>]` of the file: who they are, and how much of the pool they may use.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use stockade_cache::{Budget, CacheSalt, Tenant, check_tenants};

use super::{GIB, ListenerConfig};
use crate::tenancy::{Binding, DENIED_SALT, HintRules, Rate, Rules, Share, TenantRules, Unsalted};

/// Longest time of a hint: ten years.
const MAX_HINT_SECONDS: f64 = 10.0 * 365.0 * 86400.0;
/// Most metered tags of a tenant; each is a label's value.
const MAX_TAGS: usize = 16;
/// Longest name of a tenant in bytes; it becomes a metric's label.
const MAX_NAME_BYTES: usize = 128;

/// One tenant as the file has it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TenantSettings {
    /// Salts whose objects count for it; left out by the one tenant that has all others.
    salts: Option<Vec<String>>,
    /// GiB that no other tenant can push it below.
    floor_gb: Option<f64>,
    /// Its part of what the floors leave, relative to the other weights.
    weight: Option<u32>,
    /// GiB that it never goes beyond.
    cap_gb: Option<f64>,
    /// Listeners that its connections come through; all of them if it names peers only.
    listeners: BTreeSet<String>,
    /// Users of PLAIN and CURVE listeners that are its own.
    users: BTreeSet<String>,
    /// Users whose local processes are its own.
    uids: BTreeSet<u32>,
    /// Groups whose local processes are its own.
    gids: BTreeSet<u32>,
    /// The salt of requests without one.
    default_salt: Option<String>,
    /// `default` or `refuse`: what requests without a salt get.
    unsalted: Option<String>,
    /// Whether its workers are given the shared segment, in which they can read everything.
    shared_memory: Option<bool>,
    /// Requests a second that it may send in the long run.
    requests_per_second: Option<f64>,
    /// Requests that it may send at once after a pause.
    burst: Option<f64>,
    /// Large requests that it may have in flight.
    max_in_flight: Option<u32>,
    /// The longest `lmcache.ttl`, in seconds; objects without one get it too.
    max_ttl_seconds: Option<f64>,
    /// `false` stores what `lmcache.skip_save` asks not to store.
    skip_save: Option<bool>,
    /// How long `lmcache.pin` keeps objects, in seconds; 0, the default, for not at all.
    max_pin_seconds: Option<f64>,
    /// Names of `lmcache.tag.` that are metered.
    tags: BTreeSet<String>,
    /// Plugins that are its own, by name.
    plugins: BTreeSet<String>,
}

/// Tenants as the pool takes them, and the rules of who they are.
#[derive(Debug)]
pub(super) struct Tenants {
    pub(super) budgets: Vec<Tenant>,
    pub(super) rules: Rules,
}

/// Checks each table, that a pool of `pool_bytes` can keep what they promise, and that no
/// connection or salt is two tenants'.
pub(super) fn check(
    settings: BTreeMap<String, TenantSettings>,
    pool_bytes: u64,
    listeners: &[ListenerConfig],
) -> Result<Tenants, String> {
    let mut rules = Vec::with_capacity(settings.len());
    let mut tenants: Vec<Tenant> = Vec::with_capacity(settings.len());
    for (name, settings) in settings {
        let field = |field: &str| format!("tenants.{name}.{field}");
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "tenants.{name}: give a name of 1 to {MAX_NAME_BYTES} bytes"
            ));
        }
        let is_for_the_rest = settings.salts.is_none();
        let binding = settings.binding();
        let salts = settings.salts.clone().unwrap_or_default();
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
            .map(|salt| parse(salt).map_err(|problem| format!("{}: {problem}", field("salts"))))
            .collect::<Result<Vec<_>, _>>()?;
        let unsalted = settings
            .unsalted(&salts, &binding)
            .map_err(|problem| format!("tenants.{name}.{problem}"))?;
        rules.push(TenantRules {
            name: Arc::from(name.as_str()),
            salts: (!is_for_the_rest).then(|| salts.iter().cloned().collect()),
            binding,
            unsalted,
            shared_memory: settings.shared_memory.unwrap_or(true),
            share: settings
                .share(is_for_the_rest)
                .map_err(|problem| format!("tenants.{name}.{problem}"))?,
            hints: settings
                .hints()
                .map_err(|problem| format!("tenants.{name}.{problem}"))?,
            plugins: settings.plugins.clone(),
        });
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
    let listeners: Vec<&str> = listeners.iter().map(|it| &*it.name).collect();
    Ok(Tenants {
        budgets: tenants,
        rules: Rules::new(rules, &listeners)?,
    })
}

fn parse(salt: &str) -> Result<CacheSalt, String> {
    if salt == DENIED_SALT {
        return Err(format!("{DENIED_SALT} is the server's own; name another"));
    }
    CacheSalt::parse(salt).map_err(|error| error.to_string())
}

impl TenantSettings {
    fn binding(&self) -> Binding {
        Binding {
            listeners: self.listeners.clone(),
            users: self.users.clone(),
            uids: self.uids.clone(),
            gids: self.gids.clone(),
        }
    }

    /// What its requests may ask for.
    fn hints(&self) -> Result<HintRules, String> {
        let time = |key: &str, seconds: f64| match (0.0..=MAX_HINT_SECONDS).contains(&seconds) {
            true => Ok(Duration::from_secs_f64(seconds)),
            false => Err(format!(
                "{key} {seconds}: give seconds from 0 to {MAX_HINT_SECONDS}"
            )),
        };
        if self.tags.len() > MAX_TAGS {
            return Err(format!("tags: give at most {MAX_TAGS} names"));
        }
        let max_ttl = match self.max_ttl_seconds {
            Some(seconds) => Some(time("max_ttl_seconds", seconds)?),
            None => None,
        };
        Ok(HintRules {
            max_ttl,
            always_save: self.skip_save == Some(false),
            max_pin: time("max_pin_seconds", self.max_pin_seconds.unwrap_or(0.0))?,
            tags: self.tags.clone(),
        })
    }

    /// What it gets of the server's time.
    fn share(&self, is_for_the_rest: bool) -> Result<Share, String> {
        let has_connections = is_for_the_rest || !self.binding().is_empty();
        let limits = [
            ("requests_per_second", self.requests_per_second.is_some()),
            ("burst", self.burst.is_some()),
            ("max_in_flight", self.max_in_flight.is_some()),
        ];
        if let Some((key, _)) = limits
            .iter()
            .find(|(_, is_set)| *is_set && !has_connections)
        {
            return Err(format!(
                "{key} is for the tenant's own connections: give it listeners, users, uids or gids"
            ));
        }
        let rate = match (self.requests_per_second, self.burst) {
            (None, None) => None,
            (None, Some(_)) => {
                return Err("burst needs requests_per_second; set both or none".to_owned());
            }
            (Some(per_second), burst) => {
                let burst = burst.unwrap_or_else(|| per_second.max(1.0));
                if !(0.01..=1e9).contains(&per_second) {
                    return Err(format!(
                        "requests_per_second {per_second}: give a number from 0.01 to 1e9"
                    ));
                }
                if !(1.0..=1e9).contains(&burst) {
                    return Err(format!("burst {burst}: give a number from 1 to 1e9"));
                }
                Some(Rate { per_second, burst })
            }
        };
        let max_in_flight = match self.max_in_flight {
            Some(0) => return Err("max_in_flight 0: give a number above 0".to_owned()),
            Some(limit) => limit as usize,
            None => Share::MAX_IN_FLIGHT,
        };
        Ok(Share {
            weight: self.weight.unwrap_or(1).max(1),
            rate,
            max_in_flight,
        })
    }

    /// What requests without a salt get.
    fn unsalted(&self, salts: &[CacheSalt], binding: &Binding) -> Result<Unsalted, String> {
        if binding.is_empty() && (self.unsalted.is_some() || self.default_salt.is_some()) {
            return Err(
                "default_salt and unsalted are for the tenant's own connections: give it listeners, users, uids or gids"
                    .to_owned(),
            );
        }
        if binding.is_empty() && self.shared_memory.is_some() {
            return Err(
                "shared_memory is for the tenant's own connections: give it listeners, users, uids or gids"
                    .to_owned(),
            );
        }
        let default = match &self.default_salt {
            Some(salt) => Some(parse(salt).map_err(|problem| format!("default_salt: {problem}"))?),
            None => None,
        };
        match (self.unsalted.as_deref(), default) {
            (Some("refuse"), None) => Ok(Unsalted::Refuse),
            (Some("refuse"), Some(_)) => Err(
                "default_salt is never used with unsalted = \"refuse\"; leave one of them out"
                    .to_owned(),
            ),
            (None | Some("default"), Some(salt)) => Ok(Unsalted::Default(salt)),
            (None | Some("default"), None) => match salts {
                [] => Ok(Unsalted::Default(CacheSalt::default())),
                [only] => Ok(Unsalted::Default(only.clone())),
                _ if binding.is_empty() => Ok(Unsalted::Default(CacheSalt::default())),
                _ => Err(
                    "default_salt is missing, and there are several salts: name the one that requests without a salt get, or set unsalted = \"refuse\""
                        .to_owned(),
                ),
            },
            (Some(other), _) => Err(format!(
                "unsalted {other:?}: give \"default\" or \"refuse\""
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
    use super::*;
    use crate::tenancy::Standing;

    fn read(text: &str) -> Result<Tenants, String> {
        let tables: BTreeMap<String, TenantSettings> =
            toml::from_str(text).map_err(|error| error.to_string())?;
        let listeners = super::super::listeners::check(&["ipc:///run/a".to_owned()], Vec::new());
        check(tables, 1 << 30, &listeners?)
    }

    #[test]
    fn tenants_say_whose_connections_they_have() {
        let tenants = read(
            "[a]\nsalts = ['x', 'y']\ndefault_salt = 'y'\nlisteners = ['ipc:///run/a']\nuids = [7]\nshared_memory = false\n\
             [b]\nsalts = ['z']\nlisteners = ['default']\n",
        )
        .unwrap();
        let Standing::Tenant(b) = tenants.rules.standing("default", None, None) else {
            panic!("{tenants:?}");
        };
        assert_eq!(
            b.unsalted,
            Unsalted::Default(CacheSalt::parse("z").unwrap())
        );
        assert!(!tenants.rules.tenant("a").unwrap().shared_memory);
        assert_eq!(tenants.budgets.len(), 2);
    }

    #[test]
    fn what_a_tenant_cannot_mean_is_refused_by_its_key() {
        for (text, reason) in [
            (
                "[a]\nsalts = ['x']\nlisteners = ['b']",
                "tenants.a.listeners: there is no listener",
            ),
            (
                "[a]\nsalts = ['x', 'y']\nlisteners = ['default']",
                "tenants.a.default_salt is missing",
            ),
            (
                "[a]\nsalts = ['x']\ndefault_salt = 'x'",
                "give it listeners",
            ),
            (
                "[a]\nsalts = ['x']\nshared_memory = false",
                "give it listeners",
            ),
            (
                "[a]\nsalts = ['x']\nlisteners = ['default']\ndefault_salt = 'q'",
                "not one of its salts",
            ),
            (
                "[a]\nsalts = ['x']\nlisteners = ['default']\nunsalted = 'maybe'",
                "maybe",
            ),
            (
                "[a]\nsalts = ['x']\nlisteners = ['default']\nunsalted = 'refuse'\ndefault_salt = 'x'",
                "leave one of them out",
            ),
            (
                "[a]\nsalts = ['x']\nrequests_per_second = 5",
                "give it listeners",
            ),
            ("[a]\nlisteners = ['default']\nburst = 5", "set both"),
            (
                "[a]\nlisteners = ['default']\nrequests_per_second = 0",
                "0.01",
            ),
            ("[a]\nlisteners = ['default']\nmax_in_flight = 0", "above 0"),
            ("[a]\nsalts = ['stockade-denied']", "the server's own"),
            (
                "[a]\nsalts = ['x']\n[b]\nsalts = ['x']",
                "belongs to tenant `a` already",
            ),
            ("[a]\nsalts = ['x']\ncolour = 1", "colour"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
