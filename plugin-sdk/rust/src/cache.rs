//! What a plugin may see and ask of the cache, each within its grant: `cache = ["stats", "keys",
//! "events", "pin", "evict", "prefetch"]` in the manifest. A plugin of a tenant sees that tenant's
//! objects only.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    Result, abi,
    abi::milliseconds,
    error::{answered, parsed, written},
};

/// Counts of the whole cache, or of the plugin's tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Stats {
    /// Size of the pool, in bytes.
    pub capacity_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Objects that can be read.
    pub objects: u64,
    /// Lookups since the server started.
    pub lookups: u64,
    /// Tokens that were looked up.
    pub lookup_tokens: u64,
    /// Tokens of them that were there.
    pub hit_tokens: u64,
    /// Chunks stored.
    pub stored_chunks: u64,
    /// Chunks retrieved.
    pub retrieved_chunks: u64,
    /// Objects that made room.
    pub evicted_objects: u64,
    /// Use of the pool by tenant, those that the plugin may see.
    pub tenants: Vec<TenantStats>,
}

/// A tenant's share of the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct TenantStats {
    /// As in the server's file.
    pub name: String,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes that nobody else can push it below.
    pub floor_bytes: u64,
    /// Bytes that it cannot exceed, where it is capped.
    pub cap_bytes: Option<u64>,
    /// Objects that can be read.
    pub objects: u64,
}

/// The counts now. Needs `cache = ["stats"]`.
///
/// # Errors
/// [`ErrorCode::Denied`](crate::ErrorCode::Denied) without the grant.
pub fn stats() -> Result<Stats> {
    parsed(&answered(abi::cache_stats())?, "the statistics")
}

/// Which keys to list; the default is all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyQuery {
    /// Only keys of this salt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    /// Only keys of this model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Go on after this key, [`KeyPage::next`] of the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Most keys of the page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// A page of keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct KeyPage {
    /// In the order of keys.
    pub keys: Vec<Key>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

/// An object that can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Key {
    /// LMCache's object key as a string, `<model>@<kv_rank>@<group>@<hash>` and `@<salt>`.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// Milliseconds since it was last asked for, where that is known.
    pub idle_ms: Option<u64>,
    /// Whether it is pinned.
    pub pinned: bool,
}

/// A page of keys. Needs `cache = ["keys"]`.
///
/// # Errors
/// [`ErrorCode::Denied`](crate::ErrorCode::Denied) without the grant,
/// [`Invalid`](crate::ErrorCode::Invalid) for a query that makes no sense.
pub fn keys(query: &KeyQuery) -> Result<KeyPage> {
    parsed(
        &answered(abi::cache_keys(&written(query)?))?,
        "a page of keys",
    )
}

/// What came of a request for several keys. Another tenant's keys count as denied whether they
/// exist or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Outcome {
    /// Keys for which it was done.
    pub done: u64,
    /// Keys that are not in the cache.
    pub missing: u64,
    /// Keys that are none of the plugin's business.
    pub denied: u64,
}

#[derive(Serialize)]
struct Request<'a, K> {
    op: &'a str,
    keys: &'a [K],
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl_ms: Option<i32>,
}

fn request<K: AsRef<str>>(op: &str, keys: &[K], ttl: Option<Duration>) -> Result<Outcome> {
    let names: Vec<&str> = keys.iter().map(AsRef::as_ref).collect();
    let request = Request {
        op,
        keys: &names,
        ttl_ms: ttl.map(milliseconds),
    };
    parsed(
        &answered(abi::cache_request(&written(&request)?))?,
        "the outcome of a request",
    )
}

/// Asks that objects be evicted last, for `ttl`, at most an hour. Needs `cache = ["pin"]`.
///
/// A pin is a hint: it ends with the plugin, and when nothing else is left pinned objects go too.
///
/// # Errors
/// [`ErrorCode::Denied`](crate::ErrorCode::Denied) without the grant,
/// [`Invalid`](crate::ErrorCode::Invalid) for a string that is no key.
pub fn pin<K: AsRef<str>>(keys: &[K], ttl: Duration) -> Result<Outcome> {
    request("pin", keys, Some(ttl))
}

/// Takes pins of this plugin back. Needs `cache = ["pin"]`.
///
/// # Errors
/// As [`pin`].
pub fn unpin<K: AsRef<str>>(keys: &[K]) -> Result<Outcome> {
    request("unpin", keys, None)
}

/// Removes objects that nobody is using. Needs `cache = ["evict"]`.
///
/// # Errors
/// As [`pin`].
pub fn evict<K: AsRef<str>>(keys: &[K]) -> Result<Outcome> {
    request("evict", keys, None)
}

/// Has objects of the second tier loaded, and waits for that: `done` counts those that are in
/// memory then. Needs `cache = ["prefetch"]`.
///
/// # Errors
/// As [`pin`]; [`ErrorCode::Unavailable`](crate::ErrorCode::Unavailable) without a second tier or
/// while its storage fails, [`ErrorCode::Timeout`](crate::ErrorCode::Timeout) when it takes
/// longer than `host_call_seconds`, and what has come by then stays.
pub fn prefetch<K: AsRef<str>>(keys: &[K]) -> Result<Outcome> {
    request("prefetch", keys, None)
}

/// Kinds of events to subscribe to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventType {
    /// An object can be read.
    Stored,
    /// An object was read.
    Retrieved,
    /// An object is gone.
    Evicted,
    /// A request asked how much of its tokens is there.
    Lookup,
    /// A request has ended.
    SessionEnd,
}

/// What to subscribe to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Subscription {
    /// These kinds; all of them where it is empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<EventType>,
    /// Go on after this event, as far as the server still has it; from now on without.
    pub cursor: Option<u64>,
    /// Most events of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch: Option<u32>,
}

/// Subscribes to events, which then come as [`EventBatch`](crate::EventBatch); returns the number
/// of the last event before them. A second call replaces the first. Needs `cache = ["events"]`.
///
/// # Errors
/// [`ErrorCode::Denied`](crate::ErrorCode::Denied) without the grant.
pub fn subscribe(subscription: &Subscription) -> Result<u64> {
    #[derive(Deserialize)]
    struct Subscribed {
        cursor: u64,
    }
    let answer = answered(abi::events_subscribe(&written(subscription)?))?;
    parsed(&answer, "the cursor").map(|it: Subscribed| it.cursor)
}
