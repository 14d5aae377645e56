//! A tenant leaves: everything of it goes, and a receipt says what went.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Weak,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use stockade_cache::CacheSalt;
use stockade_sandbox::{PluginState, SupervisorError};
use tokio::runtime::Handle;

use super::Service;
use crate::tenancy::Realm;

/// How long a tenant's plugins get to end.
const PLUGIN_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at whether they have.
const PLUGIN_LOOK: Duration = Duration::from_millis(10);
/// Most objects that a receipt names one by one.
const MAX_LISTED: usize = 10_000;

/// Why nothing was purged.
#[derive(Debug, thiserror::Error)]
pub enum PurgeError {
    /// No tenant has the name.
    #[error("there is no tenant {0:?}: GET /v1/tenants lists those that are")]
    Unknown(String),
    /// The pool could not be overwritten.
    #[error(
        "the pool could not be overwritten (error {0}): free memory may hold bytes of the tenant"
    )]
    Scrub(i32),
}

/// Whose things go.
pub struct Leaving {
    name: String,
    realm: Option<Realm>,
    /// Its salts; empty for the tenant of all that no other names.
    salts: Vec<CacheSalt>,
    /// Those of all other tenants.
    others: HashSet<CacheSalt>,
    /// Its plugins.
    plugins: BTreeSet<String>,
}

impl Leaving {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether objects under the salt are the tenant's.
    #[must_use]
    pub fn owns(&self, salt: &CacheSalt) -> bool {
        match self.salts.is_empty() {
            true => !self.others.contains(salt),
            false => self.salts.contains(salt),
        }
    }

    /// The salts that it has by name.
    #[must_use]
    pub fn salts(&self) -> &[CacheSalt] {
        &self.salts
    }
}

impl Service {
    /// What is to be known of a tenant to purge it.
    ///
    /// # Errors
    /// [`PurgeError::Unknown`]
    pub fn leaving(&self, name: &str) -> Result<Leaving, PurgeError> {
        let rules = self.tenancy.rules();
        let usage = self.engine.budgets();
        let found = usage.iter().find(|it| *it.tenant.name == *name);
        let Some(found) = found else {
            return Err(PurgeError::Unknown(name.to_owned()));
        };
        let others = usage
            .iter()
            .filter(|it| it.tenant.name != found.tenant.name);
        Ok(Leaving {
            name: name.to_owned(),
            realm: rules.realm(name),
            plugins: rules
                .tenant(name)
                .map(|tenant| tenant.plugins.clone())
                .unwrap_or_default(),
            salts: found.tenant.salts.clone(),
            others: others
                .flat_map(|it| it.tenant.salts.iter().cloned())
                .collect(),
        })
    }

    /// Ends a tenant's workers and sessions, stops its plugins and removes what they keep, removes
    /// its objects, overwrites every byte of the pool that holds no object, and forgets it in
    /// ghost lists, events, expiry and labels.
    ///
    /// Returns the receipt without its seal. Takes as long as writing the pool once, so it must
    /// not run where requests are answered. What the tenant stores meanwhile stays.
    ///
    /// # Errors
    /// [`PurgeError::Scrub`]; objects are gone then, but their bytes may not be.
    pub fn purge(&self, leaving: &Leaving) -> Result<Value, PurgeError> {
        let began = seconds_now();
        let owns = |salt: &CacheSalt| leaving.owns(salt);
        // First, because they can read objects and keep what they read.
        let plugins = self.end_plugins(leaving);
        let (listed, objects) = self.engine.digests(&owns, MAX_LISTED);
        let bytes_before = self.bytes_of(&owns);
        let (mut workers, mut sessions) = (0, 0);
        if let Some(realm) = &leaving.realm {
            for worker in self.workers.end_realm(realm) {
                self.end_worker(&worker, "its tenant is purged");
                workers += 1;
            }
            sessions = self.sessions.end_realm(realm, &self.engine);
        }
        self.engine.clear_where(true, &owns);
        let events = self.events.forget(&owns);
        let expiring = self.expiry.forget(&owns);
        let labels: usize = leaving
            .salts
            .iter()
            .map(|salt| self.metrics.forget(salt.as_str()))
            .sum();
        let storage = self.tier.as_ref().map(|tier| {
            for salt in &leaving.salts {
                tier.forget_labels(salt.as_str());
            }
            // This is a thread of its own, that may wait.
            match Handle::try_current() {
                Ok(runtime) => runtime.block_on(tier.purge(&leaving.salts, &owns)),
                Err(_) => Err("the server is stopping".to_owned()),
            }
        });
        let histories = self.engine.forget_histories(&leaving.salts);
        let scrubbed = self.engine.scrub().map_err(PurgeError::Scrub)?;
        let (_, left) = self.engine.digests(&owns, 0);
        let bytes_left = self.bytes_of(&owns);
        Ok(json!({
            "receipt": "stockade tenant purge",
            "version": 1,
            "tenant": leaving.name,
            "cache_salts_blake3": leaving.salts.iter()
                .map(|salt| blake3::hash(salt.as_str().as_bytes()).to_hex().to_string())
                .collect::<Vec<_>>(),
            "began_unix": began,
            "ended_unix": seconds_now(),
            "complete": bytes_left == 0
                && !matches!(storage, Some(Err(_)))
                && plugins.iter().all(|it| it["problem"].is_null()),
            "l2": storage.map(|purged| match purged {
                Ok(values) => json!({"values": values}),
                Err(problem) => json!({"problem": problem}),
            }),
            "l1": {
                "segment": self.engine.shm_name(),
                "objects": objects,
                "bytes": bytes_before,
                "objects_left": left,
                "bytes_left": bytes_left,
                "scrubbed_bytes": scrubbed,
                "digests": listed.iter().map(|it| json!({
                    "offset": it.slot.offset,
                    "length": it.slot.length,
                    "blake3": blake3::Hash::from(it.blake3).to_hex().to_string(),
                })).collect::<Vec<_>>(),
                "digests_omitted": objects.saturating_sub(listed.len()),
            },
            "plugins": plugins,
            "workers_ended": workers,
            "sessions_ended": sessions,
            "kv_events_forgotten": events,
            "expiries_forgotten": expiring,
            "label_sets_forgotten": labels,
            "eviction_histories_forgotten": histories,
        }))
    }

    /// Stops a tenant's plugins and removes the keys and values that they keep; one entry of the
    /// receipt for each. May wait for plugins that take their time to end.
    fn end_plugins(&self, leaving: &Leaving) -> Vec<Value> {
        let Some(supervisor) = self.plugins.get().and_then(Weak::upgrade) else {
            return Vec::new();
        };
        // All are told before the first is waited for. One that is not there is as good as ended,
        // but may have kept something when it was.
        for name in &leaving.plugins {
            if let Err(SupervisorError::Busy(name)) = supervisor.stop_plugin(name) {
                tracing::warn!("plugin `{name}` could not be told that its tenant is purged");
            }
        }
        let deadline = Instant::now() + PLUGIN_PATIENCE;
        let purged = leaving.plugins.iter().map(|name| {
            while supervisor.status(name).is_ok_and(|it| is_alive(it.state)) {
                if Instant::now() > deadline {
                    return json!({"plugin": name, "problem": "it has not ended"});
                }
                std::thread::sleep(PLUGIN_LOOK);
            }
            match supervisor.purge_state(name) {
                Ok(keys) => json!({"plugin": name, "state_keys": keys}),
                Err(error) => {
                    let problem = format!("what it keeps could not be removed: {error}");
                    json!({"plugin": name, "problem": problem})
                }
            }
        });
        purged.collect()
    }

    fn bytes_of(&self, owns: &dyn Fn(&CacheSalt) -> bool) -> u64 {
        let salts = self.engine.status().salts;
        salts
            .iter()
            .filter(|it| owns(&it.cache_salt))
            .map(|it| it.bytes)
            .sum()
    }
}

/// Whether a plugin runs, or is about to.
fn is_alive(state: PluginState) -> bool {
    match state {
        PluginState::Discovered
        | PluginState::Prepared
        | PluginState::Running
        | PluginState::Backoff => true,
        PluginState::Exited
        | PluginState::Failed
        | PluginState::Quarantined
        | PluginState::Refused
        | PluginState::Stopped => false,
    }
}

/// Gives a receipt its seal: the BLAKE3 of its compact JSON, keys in order.
pub fn seal(mut receipt: Value) -> Value {
    let digest = digest_of(&receipt);
    if let Some(fields) = receipt.as_object_mut() {
        fields.insert("seal_blake3".to_owned(), digest.into());
    }
    receipt
}

/// What a receipt's seal must be.
pub fn digest_of(receipt: &Value) -> String {
    let mut fields = receipt.as_object().cloned().unwrap_or_default();
    fields.remove("seal_blake3");
    let text = Value::Object(fields).to_string();
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
