//! Orders from outside: what the core asks when somebody else ranks the keys of a tenant.

use std::sync::Arc;
use std::time::Duration;

use crate::key::ObjectKey;

/// An object that may be evicted, as a [`Ranker`] sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its key.
    pub key: ObjectKey,
    /// Its share of the pool, in bytes.
    pub bytes: u64,
    /// Its place in the prompt of the request that used it last, counted from 0.
    pub chunk: Option<u32>,
    /// Time since it was last asked for, or stored.
    pub idle: Duration,
    /// Time since it was stored, or since somebody began to rank.
    pub age: Duration,
    /// How often it was asked for.
    pub uses: u32,
    /// The last request that ended after using it.
    pub request: Option<Arc<str>>,
}

/// Ranks candidates in place of the native policy, at the watermark only, of the pool or of a
/// tenant's cap: a store that needs room never waits for it.
///
/// The engine calls it from the thread of [`maintain`](crate::CacheEngine::maintain) and holds no
/// lock meanwhile, so it may wait, for as long as room can. Whatever it answers is checked
/// again before anything is evicted.
pub trait Ranker: Send + Sync {
    /// Whether it ranks the keys of this tenant now. Asked under the engine's mutex: it must
    /// answer at once.
    fn ranks(&self, tenant: &str) -> bool;

    /// The places of candidates in the list, the first to be evicted first; the native order
    /// for those that are left out, and for all when it is `None`. The list comes in native order.
    fn rank(
        &self,
        tenant: &Arc<str>,
        bytes_wanted: u64,
        candidates: Vec<Candidate>,
    ) -> Option<Vec<u32>>;
}
