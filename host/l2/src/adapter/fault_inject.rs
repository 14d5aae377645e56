//! An adapter around another that fails on purpose: LMCache's `fault_inject`, for tests.
//!
//! LMCache's `rate` and `seed` drop loads of some keys, always the same ones. The rest is ours:
//! the faults of real storage, each where it would strike.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::{Adapter, AdapterError, Entry, Evictions, Form, IsWanted};
use crate::name::ObjectName;

/// A fault that an operation can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Injected {
    /// No room is left.
    Full,
    /// Permission is lost.
    Denied,
    /// The storage is down.
    Unavailable,
    /// The storage never answers.
    Hang,
}

impl Injected {
    async fn strike(self) -> AdapterError {
        let injected = || "injected".to_owned();
        match self {
            Self::Full => AdapterError::Full(injected()),
            Self::Denied => AdapterError::Denied(injected()),
            Self::Unavailable => AdapterError::Unavailable(injected()),
            Self::Hang => std::future::pending().await,
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Faults {
    /// Share of the values whose load fails, 0 to 1.
    pub(crate) rate: f64,
    /// Which ones these are.
    pub(crate) seed: i64,
    /// What each operation takes longer.
    pub(crate) delay: Duration,
    /// What every lookup meets.
    pub(crate) find: Option<Injected>,
    /// What every load meets.
    pub(crate) load: Option<Injected>,
    /// What every store meets.
    pub(crate) store: Option<Injected>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FaultInjectAdapter {
    inner: Arc<dyn Adapter>,
    faults: Faults,
}

impl FaultInjectAdapter {
    /// Lets `faults` strike what goes to `inner`.
    #[must_use]
    pub(crate) fn new(inner: Arc<dyn Adapter>, faults: Faults) -> Self {
        tracing::warn!(
            ?faults,
            "faults are injected into an L2 adapter: for tests only"
        );
        Self { inner, faults }
    }

    fn is_dropped(&self, name: &ObjectName) -> bool {
        const BUCKETS: u32 = 1_000_000;
        let identity = format!("{}:{name}", self.faults.seed);
        let bucket = crc32c::crc32c(identity.as_bytes()) % BUCKETS;
        f64::from(bucket) < self.faults.rate * f64::from(BUCKETS)
    }

    async fn meet(&self, fault: Option<Injected>) -> Result<(), AdapterError> {
        if !self.faults.delay.is_zero() {
            tokio::time::sleep(self.faults.delay).await;
        }
        match fault {
            Some(fault) => Err(fault.strike().await),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Adapter for FaultInjectAdapter {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        self.meet(self.faults.find).await?;
        self.inner.find(names).await
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        self.meet(self.faults.load).await?;
        if self.is_dropped(name) {
            return Err(AdapterError::NotFound);
        }
        self.inner.load(name, wanted).await
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        self.meet(self.faults.store).await?;
        self.inner.store(name, value, layout).await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        self.inner.delete(names).await
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        self.inner.list(cache_salt, found).await
    }

    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        self.inner.discard_aside(is_wanted).await
    }

    fn used_bytes(&self) -> Option<u64> {
        self.inner.used_bytes()
    }

    fn watch_evictions(&self, evictions: Arc<dyn Evictions>) {
        self.inner.watch_evictions(evictions);
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut status = self.inner.status();
        status.insert("faults".into(), json!(format!("{:?}", self.faults)));
        status
    }
}
