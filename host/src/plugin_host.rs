//! The server as its plugins see it: what they may ask of the cache, hear of it and rank.
//!
//! The sandbox checks what a plugin may do at all; here stands what it may do it with. A plugin
//! that belongs to a tenant sees and names that tenant's objects only (`TenantScope`).

mod event_log;
mod flood;
mod ranking;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
    time::Duration,
};

use stockade_cache::{CacheSalt, KeyScope, ObjectKey};
use stockade_l2::ObjectName;
use stockade_sandbox::{
    PluginHost,
    host_api::{
        CacheChange, CacheOperation, CacheRequest, CacheStats, CacheWork, Code, EventSource,
        KeyFacts, KeysPage, KeysQuery, MAX_PIN_MS, PluginRun, Refusal, Subscription, TenantStats,
    },
};

use crate::{
    service::Service,
    tenancy::{Denial, Denied, Realm, Rules, Tenancy, TenantRules},
    tier,
};

pub(crate) use event_log::EventLog;
pub(crate) use flood::flood;
pub(crate) use ranking::shown;
pub use ranking::{PluginRanker, RankerStatus};

/// Keys of one page where the plugin does not say.
const DEFAULT_PAGE: usize = 100;

/// What a plugin's tenant lets it see.
#[derive(Debug, Clone)]
pub(crate) enum TenantScope {
    /// It belongs to no tenant: everything.
    Everything,
    /// What is its tenant's.
    Tenant(Arc<Rules>, Arc<TenantRules>),
}

impl TenantScope {
    /// The scope of a plugin under the rules in force.
    pub(crate) fn of_plugin(tenancy: &Tenancy, plugin: &str) -> Self {
        let rules = tenancy.rules();
        match rules.owner_of_plugin(plugin).cloned() {
            Some(tenant) => Self::Tenant(rules, tenant),
            None => Self::Everything,
        }
    }

    /// Whether objects under the salt are in it.
    pub(crate) fn covers(&self, salt: &CacheSalt) -> bool {
        match self {
            Self::Everything => true,
            Self::Tenant(rules, tenant) => rules.may_use(tenant, salt),
        }
    }

    /// The tenant's name.
    pub(crate) fn tenant(&self) -> Option<&Arc<str>> {
        match self {
            Self::Everything => None,
            Self::Tenant(_, tenant) => Some(&tenant.name),
        }
    }
}

/// [`PluginHost`] over the request path and its engine.
pub struct PluginServer {
    service: Weak<Service>,
    tenancy: Arc<Tenancy>,
}

impl PluginServer {
    /// For the plugins of the server with this request path.
    #[must_use]
    pub fn new(service: &Arc<Service>) -> Self {
        Self {
            service: Arc::downgrade(service),
            tenancy: Arc::clone(service.tenancy()),
        }
    }

    fn service(&self) -> Result<Arc<Service>, Refusal> {
        let gone = || Refusal::new(Code::Unavailable, "the server is stopping");
        self.service.upgrade().ok_or_else(gone)
    }

    fn scope(&self, run: &PluginRun) -> TenantScope {
        TenantScope::of_plugin(&self.tenancy, &run.plugin)
    }

    /// A plugin named what is not its tenant's.
    fn denied(&self, run: &PluginRun, scope: &TenantScope, operation: &str, salt: &CacheSalt) {
        let realm = scope.tenant().map_or_else(Realm::open, Realm::of_tenant);
        self.tenancy.audit().record(Denied {
            realm: &realm,
            origin: &format!("plugin {}", run.plugin),
            reason: Denial::Plugin,
            operation,
            salt: Some(salt.as_str()),
        });
    }
}

impl PluginHost for PluginServer {
    fn tenant_of(&self, plugin: &str) -> Option<Arc<str>> {
        TenantScope::of_plugin(&self.tenancy, plugin)
            .tenant()
            .cloned()
    }

    fn stats(&self, run: &PluginRun) -> Result<CacheStats, Refusal> {
        let service = self.service()?;
        let scope = self.scope(run);
        let engine = service.engine();
        let mut tenants = engine.budgets();
        let mut stats = CacheStats {
            capacity_bytes: engine.capacity_bytes(),
            ..CacheStats::default()
        };
        if let Some(name) = scope.tenant() {
            tenants.retain(|usage| usage.tenant.name == *name);
            let cap = tenants.first().and_then(|it| it.tenant.budget.cap_bytes);
            stats.capacity_bytes = cap.unwrap_or(stats.capacity_bytes);
        }
        stats.used_bytes = tenants.iter().map(|usage| usage.used_bytes).sum();
        stats.objects = tenants.iter().map(|usage| usage.objects).sum();
        stats.evicted_objects = tenants.iter().map(|usage| usage.evicted_objects).sum();
        let counts =
            service.counts_of(|salt| CacheSalt::parse(salt).is_ok_and(|salt| scope.covers(&salt)));
        stats.lookups = counts.lookups;
        stats.lookup_tokens = counts.lookup_tokens;
        stats.hit_tokens = counts.hit_tokens;
        stats.stored_chunks = counts.stored_chunks;
        stats.retrieved_chunks = counts.retrieved_chunks;
        stats.tenants = tenants
            .into_iter()
            .map(|usage| TenantStats {
                name: usage.tenant.name.to_string(),
                used_bytes: usage.used_bytes,
                floor_bytes: usage.tenant.budget.floor_bytes,
                cap_bytes: usage.tenant.budget.cap_bytes,
                objects: usage.objects,
            })
            .collect();
        Ok(stats)
    }

    fn keys(&self, run: &PluginRun, query: &KeysQuery) -> Result<KeysPage, Refusal> {
        let service = self.service()?;
        let scope = self.scope(run);
        let salt = match &query.salt {
            None => None,
            Some(text) => {
                let salt = CacheSalt::parse(text)
                    .map_err(|error| Refusal::new(Code::Invalid, format!("salt: {error}")))?;
                if !scope.covers(&salt) {
                    self.denied(run, &scope, "keys", &salt);
                    return Err(Refusal::new(
                        Code::Denied,
                        "salt is another tenant's: leave it out, or name one of the plugin's tenant",
                    ));
                }
                Some(salt)
            }
        };
        let start = match &query.after {
            None => 0,
            Some(after) => after
                .strip_prefix('#')
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| {
                    Refusal::new(
                        Code::Invalid,
                        "after is not what a page before this one gave as next",
                    )
                })?,
        };
        let wanted = |it: &KeyScope| {
            salt.as_ref().is_none_or(|salt| it.cache_salt == *salt)
                && query
                    .model
                    .as_ref()
                    .is_none_or(|model| *it.model_name == **model)
                && scope.covers(&it.cache_salt)
        };
        let most = query.limit.unwrap_or(DEFAULT_PAGE);
        let (found, next) = service.engine().list(start, most, &wanted);
        let keys = found
            .into_iter()
            .map(|listed| KeyFacts {
                key: key_text(&listed.key),
                bytes: listed.bytes,
                idle_ms: listed.idle.map(milliseconds),
                pinned: listed.is_kept,
            })
            .collect();
        Ok(KeysPage {
            keys,
            next: next.map(|next| format!("#{next}")),
        })
    }

    fn request(&self, run: &PluginRun, request: &CacheRequest) -> Result<CacheWork, Refusal> {
        let service = self.service()?;
        let scope = self.scope(run);
        let mut change = CacheChange::default();
        let mut keys = Vec::with_capacity(request.keys.len());
        for text in &request.keys {
            let key = parse_key(text).ok_or_else(|| {
                Refusal::new(
                    Code::Invalid,
                    format!("keys: {text:?} is no key; it is <model>@<rank>@<group>@<hash>, with @<salt> where there is one"),
                )
            })?;
            match scope.covers(&key.scope.cache_salt) {
                true => keys.push(key),
                false => {
                    self.denied(run, &scope, "cache_request", &key.scope.cache_salt);
                    change.denied += 1;
                }
            }
        }
        let engine = service.engine();
        let done = match request.op {
            CacheOperation::Pin => {
                let time = Duration::from_millis(request.ttl_ms.unwrap_or(MAX_PIN_MS));
                engine.keep(&keys, run.run, time).ok_or_else(|| {
                    Refusal::new(
                        Code::Limit,
                        "so many objects are pinned that no more can be: unpin some, or give shorter times",
                    )
                })?
            }
            CacheOperation::Unpin => engine.end_keeping(&keys, run.run),
            CacheOperation::Evict => engine.withdraw(&keys),
            CacheOperation::Prefetch => {
                let work = prefetch(&service, keys, change.denied)?;
                return Ok(CacheWork::Pending(Box::pin(work)));
            }
        };
        change.done = done as u64;
        change.missing = keys.len().saturating_sub(done) as u64;
        Ok(CacheWork::Done(change))
    }

    fn subscribe(
        &self,
        run: &PluginRun,
        subscription: &Subscription,
        most_behind: u64,
    ) -> Result<(u64, Box<dyn EventSource>), Refusal> {
        let service = self.service()?;
        let (tenancy, plugin) = (Arc::clone(&self.tenancy), Arc::clone(&run.plugin));
        let scope = move || TenantScope::of_plugin(&tenancy, &plugin);
        let log = service.plugin_events();
        let (cursor, source) = log.subscribe(subscription, most_behind, scope);
        Ok((cursor, Box::new(source)))
    }

    fn ended(&self, run: &PluginRun) {
        if let Some(service) = self.service.upgrade() {
            service.engine().end_holder(run.run);
        }
    }
}

/// Loads objects from the second tier, to stay in memory.
fn prefetch(
    service: &Service,
    keys: Vec<ObjectKey>,
    denied: u64,
) -> Result<impl Future<Output = CacheChange> + Send + 'static, Refusal> {
    let unavailable = |reason| Refusal::new(Code::Unavailable, reason);
    let tier = service.tier().cloned().ok_or_else(|| {
        unavailable("there is no second tier to load from: the server needs --l2-adapter")
    })?;
    if !tier.may_find() {
        return Err(unavailable(
            "all storage of the second tier is left alone for now, because it failed: ask again later",
        ));
    }
    let asked = keys.len() as u64;
    let mut by_bytes: BTreeMap<u64, Vec<ObjectKey>> = BTreeMap::new();
    let mut sizes: HashMap<Arc<KeyScope>, Option<u64>> = HashMap::new();
    for key in keys {
        let bytes = sizes
            .entry(Arc::clone(&key.scope))
            .or_insert_with_key(|scope| service.object_bytes(scope));
        // Nobody could read what no worker has a layout for.
        if let Some(bytes) = *bytes {
            by_bytes.entry(bytes).or_default().push(key);
        }
    }
    Ok(async move {
        let mut done = 0;
        for (bytes, keys) in by_bytes {
            done += tier.prefetch(&keys, bytes).await as u64;
        }
        CacheChange {
            done,
            missing: asked.saturating_sub(done),
            denied,
        }
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A key as plugins read it: as the second tiers have it.
pub(crate) fn key_text(key: &ObjectKey) -> String {
    let scope = &key.scope;
    let name = ObjectName::new(
        Arc::clone(&scope.model_name),
        scope.kv_rank,
        scope.object_group_id,
        key.chunk_hash.0,
        scope.cache_salt.as_str().into(),
    );
    // Requests for models and salts that cannot be names are refused.
    name.map_or_else(|_| String::new(), |name| name.key())
}

fn parse_key(text: &str) -> Option<ObjectKey> {
    tier::key_of(&ObjectName::from_key(text)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use stockade_cache::ChunkHash;

    use super::*;

    #[test]
    fn a_key_is_read_as_it_is_written() {
        for salt in ["", "blue"] {
            let key = ObjectKey::new(
                Arc::new(KeyScope {
                    model_name: "org/model-7b".into(),
                    kv_rank: 0x0100_0100,
                    object_group_id: 12,
                    cache_salt: CacheSalt::parse(salt).unwrap(),
                }),
                ChunkHash([0xab; 32]),
            );
            let text = key_text(&key);
            assert!(text.starts_with("org/model-7b@01000100@c@abab"), "{text}");
            assert_eq!(parse_key(&text), Some(key));
        }
        for text in ["", "m", "m@1@0", "m@x@0@ff", "m@01000100@0@ff", "@@@@"] {
            assert_eq!(parse_key(text), None, "{text}");
        }
    }
}
