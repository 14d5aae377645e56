//! A bound on what an adapter keeps: the values used longest ago go first.
//!
//! LMCache's `max_capacity_gb` with an `eviction` block, with two differences: it bounds without
//! the block too, and what it knows is made anew from the storage itself after a restart.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{Notify, mpsc};

use crate::{
    adapter::{Adapter, AdapterError, Entry, Evictions, Form, IsWanted},
    name::ObjectName,
    spec::Cap,
};

/// Time between two looks at the storage: others may write to it and delete from it.
const RESCAN: Duration = Duration::from_secs(600);
/// Time between two lines on the progress of a scan.
const PROGRESS: Duration = Duration::from_secs(5);
/// Values deleted by one call.
const BATCH: usize = 64;
/// Entries on their way from a scan.
const CHANNEL: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Known {
    bytes: u64,
    /// Its place in the order.
    used: (SystemTime, u64),
    /// The scan that saw it last.
    scan: u64,
}

/// What is kept, and in which order it was used.
#[derive(Debug, Default)]
struct Index {
    known: HashMap<ObjectName, Known>,
    order: BTreeMap<(SystemTime, u64), ObjectName>,
    used_bytes: u64,
    ticket: u64,
    scan: u64,
}

impl Index {
    fn put(&mut self, name: &ObjectName, bytes: u64, used: SystemTime) {
        self.remove(name);
        self.ticket += 1;
        let known = Known {
            bytes,
            used: (used, self.ticket),
            scan: self.scan,
        };
        self.order.insert(known.used, name.clone());
        self.known.insert(name.clone(), known);
        self.used_bytes += bytes;
    }

    /// Notes what a scan saw. What this server has done since is newer than that.
    fn saw(&mut self, entry: &Entry) {
        let used = entry.last_used.unwrap_or(SystemTime::UNIX_EPOCH);
        match self.known.get_mut(&entry.name) {
            Some(known) if known.used.0 >= used && known.bytes == entry.bytes => {
                known.scan = self.scan;
            }
            Some(known) => {
                let used = used.max(known.used.0);
                self.put(&entry.name, entry.bytes, used);
            }
            None => self.put(&entry.name, entry.bytes, used),
        }
    }

    fn remove(&mut self, name: &ObjectName) -> bool {
        let Some(known) = self.known.remove(name) else {
            return false;
        };
        self.order.remove(&known.used);
        self.used_bytes -= known.bytes;
        true
    }

    /// Forgets what a scan that is over did not see.
    fn forget_unseen(&mut self) {
        let scan = self.scan;
        let gone: Vec<_> = self
            .known
            .iter()
            .filter(|(_, known)| known.scan < scan)
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.remove(&name);
        }
    }

    fn oldest(&self, count: usize, bytes: u64) -> Vec<ObjectName> {
        let mut left = bytes;
        self.order
            .values()
            .take(count)
            .take_while(|name| {
                let is_needed = left > 0;
                left = left.saturating_sub(self.known.get(*name).map_or(0, |known| known.bytes));
                is_needed
            })
            .cloned()
            .collect()
    }
}

#[derive(Debug)]
struct Shared {
    inner: Arc<dyn Adapter>,
    cap: Cap,
    index: Mutex<Index>,
    grown: Notify,
    evictions: OnceLock<Arc<dyn Evictions>>,
    evicted_values: AtomicU64,
    evicted_bytes: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Capped {
    shared: Arc<Shared>,
    tasks: Vec<tokio::task::AbortHandle>,
}

impl Capped {
    /// Bounds `inner`; it is scanned in the background, and nothing is evicted before that is
    /// over. Must be called within a Tokio runtime.
    #[must_use]
    pub(crate) fn start(
        inner: Arc<dyn Adapter>,
        cap: Cap,
        type_name: &'static str,
    ) -> Arc<dyn Adapter> {
        let shared = Arc::new(Shared {
            inner,
            cap,
            index: Mutex::default(),
            grown: Notify::new(),
            evictions: OnceLock::new(),
            evicted_values: AtomicU64::new(0),
            evicted_bytes: AtomicU64::new(0),
        });
        let keeper = tokio::spawn(Arc::clone(&shared).keep(type_name));
        Arc::new(Self {
            shared,
            tasks: vec![keeper.abort_handle()],
        })
    }
}

impl Drop for Capped {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    async fn keep(self: Arc<Self>, type_name: &'static str) {
        loop {
            self.scan(type_name).await;
            let next_scan = Instant::now() + RESCAN;
            loop {
                self.evict().await;
                let grown = tokio::time::timeout_at(next_scan.into(), self.grown.notified());
                if grown.await.is_err() {
                    break;
                }
            }
        }
    }

    async fn scan(&self, type_name: &'static str) {
        let started = Instant::now();
        self.index.lock().scan += 1;
        let (sender, mut entries) = mpsc::channel(CHANNEL);
        let (mut seen, mut bytes, mut next_line) = (0_u64, 0_u64, started + PROGRESS);
        let take = async {
            while let Some(entry) = entries.recv().await {
                self.index.lock().saw(&entry);
                seen += 1;
                bytes += entry.bytes;
                if Instant::now() >= next_line {
                    next_line += PROGRESS;
                    tracing::info!(seen, bytes, "scan of L2 adapter {type_name} goes on");
                }
            }
        };
        let (listed, ()) = tokio::join!(self.inner.list(None, sender), take);
        match listed {
            Ok(()) => {
                self.index.lock().forget_unseen();
                tracing::info!(
                    seen,
                    bytes,
                    seconds = started.elapsed().as_secs_f64(),
                    "L2 adapter {type_name} scanned"
                );
            }
            Err(error) => tracing::warn!(
                "L2 adapter {type_name} could not be scanned, so that max_capacity_gb counts only what this server stores: {error}"
            ),
        }
    }

    /// Evicts at the watermark.
    async fn evict(&self) {
        let used = self.index.lock().used_bytes as f64;
        let limit = self.cap.max_bytes as f64;
        if used >= limit * self.cap.trigger_watermark {
            let keep = (used * (1.0 - self.cap.eviction_ratio)).min(limit);
            self.evict_down_to(keep as u64).await;
        }
    }

    async fn evict_down_to(&self, keep: u64) {
        loop {
            let victims = {
                let index = self.index.lock();
                index.oldest(BATCH, index.used_bytes.saturating_sub(keep))
            };
            if victims.is_empty() {
                return;
            }
            let deleted = match self.inner.delete(&victims).await {
                Ok(deleted) => deleted,
                Err(error) => {
                    tracing::warn!("what is too much cannot be deleted: {error}");
                    return;
                }
            };
            let mut index = self.index.lock();
            for (name, was_there) in victims.iter().zip(deleted) {
                let bytes = index.known.get(name).map_or(0, |known| known.bytes);
                if index.remove(name) && was_there {
                    self.evicted_values.fetch_add(1, Ordering::Relaxed);
                    self.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
                }
            }
            drop(index);
            if let Some(evictions) = self.evictions.get() {
                evictions.evicted(&victims);
            }
        }
    }
}

#[async_trait]
impl Adapter for Capped {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        self.shared.inner.find(names).await
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let result = self.shared.inner.load(name, wanted).await;
        let mut index = self.shared.index.lock();
        match &result {
            Ok(value) => index.put(name, value.len() as u64, SystemTime::now()),
            Err(AdapterError::NotFound | AdapterError::Damaged { moved: true, .. }) => {
                index.remove(name);
            }
            Err(_) => {}
        }
        result
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        let bytes = value.len() as u64;
        let limit = self.shared.cap.max_bytes;
        if let Some(keep) = limit.checked_sub(bytes)
            && self.shared.index.lock().used_bytes > keep
        {
            self.shared.evict_down_to(keep).await;
        }
        let used = self.shared.index.lock().used_bytes;
        if used.saturating_add(bytes) > limit {
            return Err(AdapterError::Full(format!(
                "max_capacity_gb is {limit} bytes, of which {used} are used"
            )));
        }
        self.shared.inner.store(name, value, layout).await?;
        self.shared.index.lock().put(name, bytes, SystemTime::now());
        self.shared.grown.notify_one();
        Ok(())
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let deleted = self.shared.inner.delete(names).await?;
        let mut index = self.shared.index.lock();
        for name in names {
            index.remove(name);
        }
        Ok(deleted)
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        self.shared.inner.list(cache_salt, found).await
    }

    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        self.shared.inner.discard_aside(is_wanted).await
    }

    fn used_bytes(&self) -> Option<u64> {
        Some(self.shared.index.lock().used_bytes)
    }

    fn watch_evictions(&self, evictions: Arc<dyn Evictions>) {
        // The first one stays; there is one server.
        let _ = self.shared.evictions.set(evictions);
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut status = self.shared.inner.status();
        let index = self.shared.index.lock();
        status.insert("used_bytes".into(), json!(index.used_bytes));
        status.insert("values".into(), json!(index.known.len()));
        status.insert("max_bytes".into(), json!(self.shared.cap.max_bytes));
        let count = |counter: &AtomicU64| json!(counter.load(Ordering::Relaxed));
        status.insert("evicted_values".into(), count(&self.shared.evicted_values));
        status.insert("evicted_bytes".into(), count(&self.shared.evicted_bytes));
        status
    }
}
