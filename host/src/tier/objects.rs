//! What storage holds, listed and deleted by name: LMCache's `GET` and `DELETE /cache/objects`, and
//! loading before anybody asks, its `POST /cache/prefetches`.
//!
//! Follows `cache_control/object_service.py` and `warm_prefetch.py` of LMCache 0.5.6.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_cache::ObjectKey;
use stockade_l2::{AdapterError, Entry, ObjectName};
use tokio::sync::mpsc;

use super::{Backend, DELETE_BATCH, DELETE_DEADLINE, Tier, name_of};

/// Time for listing one page.
const LIST_DEADLINE: Duration = Duration::from_secs(60);
/// Prefetches that are remembered until somebody asks what became of them.
const MAX_JOBS: usize = 1024;

/// Some of the objects of one adapter, in the order of their names.
#[derive(Debug)]
pub struct ObjectPage {
    /// The adapter's type.
    pub adapter: &'static str,
    /// Whether several servers use the same storage.
    pub shared: bool,
    /// The objects.
    pub entries: Vec<Entry>,
    /// Where the next page begins; `None` on the last one.
    pub next: Option<String>,
}

/// Why objects could not be listed, deleted or loaded.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// No adapter has the type.
    #[error("no --l2-adapter has the type {0:?}: GET /config/adapters lists them")]
    NoSuchAdapter(String),
    /// The token of a page is none.
    #[error("page_token is not the next_page_token of an earlier page")]
    PageToken,
    /// Storage did not do it.
    #[error("the {adapter} adapter: {error}")]
    Storage {
        /// The adapter's type.
        adapter: &'static str,
        /// What it said.
        error: AdapterError,
    },
    /// So many prefetches are on their way that no more can be remembered.
    #[error("{MAX_JOBS} prefetches are on their way: try again when some have ended")]
    TooMany,
}

/// What became of a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmStatus {
    /// It loads.
    Pending,
    /// It is over.
    Completed {
        /// Objects that were in memory at its end.
        found: usize,
        /// Objects that were asked for.
        total: usize,
    },
}

/// Prefetches and what became of them, the oldest first.
#[derive(Default)]
pub(super) struct WarmJobs(Mutex<VecDeque<(u128, WarmStatus)>>);

impl WarmJobs {
    /// A number for a new one, unless all that are remembered are on their way.
    fn begin(&self) -> Option<u128> {
        let mut jobs = self.0.lock();
        if jobs.len() >= MAX_JOBS {
            // Nobody has asked for it so far.
            let is_over = |(_, status): &(u128, WarmStatus)| *status != WarmStatus::Pending;
            let oldest = jobs.iter().position(is_over)?;
            jobs.remove(oldest);
        }
        let id = fastrand::u128(..);
        jobs.push_back((id, WarmStatus::Pending));
        Some(id)
    }

    fn end(&self, id: u128, status: WarmStatus) {
        let mut jobs = self.0.lock();
        if let Some(job) = jobs.iter_mut().find(|(found, _)| *found == id) {
            job.1 = status;
        }
    }

    /// Told once when it is over.
    fn ask(&self, id: u128) -> Option<WarmStatus> {
        let mut jobs = self.0.lock();
        let at = jobs.iter().position(|(found, _)| *found == id)?;
        match jobs.get(at)?.1 {
            WarmStatus::Pending => Some(WarmStatus::Pending),
            WarmStatus::Completed { .. } => jobs.remove(at).map(|(_, status)| status),
        }
    }
}

impl Tier {
    fn backend(&self, type_name: Option<&str>) -> Result<&Backend, ObjectsError> {
        let is_it = |backend: &&Backend| {
            type_name.is_none_or(|type_name| backend.spec.type_name() == type_name)
        };
        let no_such = || ObjectsError::NoSuchAdapter(type_name.unwrap_or_default().to_owned());
        self.backends.iter().find(is_it).ok_or_else(no_such)
    }

    /// At most `size` objects of the first adapter, or of the first one of a type, from where an
    /// earlier page ended; of one model if it is named.
    ///
    /// Goes over everything that the adapter holds for each page, and keeps one page in memory.
    ///
    /// # Errors
    /// [`ObjectsError`]
    pub async fn list_page(
        &self,
        adapter: Option<&str>,
        model_name: Option<&str>,
        size: usize,
        after: Option<&str>,
    ) -> Result<ObjectPage, ObjectsError> {
        let backend = self.backend(adapter)?;
        let after = match after {
            Some(token) => Some(ObjectName::from_key(token).ok_or(ObjectsError::PageToken)?),
            None => None,
        };
        let (sender, mut receiver) = mpsc::channel::<Entry>(DELETE_BATCH);
        let take = async {
            let (mut page, mut is_more) = (BTreeMap::new(), false);
            while let Some(entry) = receiver.recv().await {
                let is_wanted = model_name.is_none_or(|it| **entry.name.model_name() == *it)
                    && after.as_ref().is_none_or(|after| entry.name > *after);
                if is_wanted {
                    page.insert(entry.name.clone(), entry);
                }
                if page.len() > size {
                    page.pop_last();
                    is_more = true;
                }
            }
            (page, is_more)
        };
        let list = backend.guarded.list(None, sender);
        let both = async { tokio::join!(list, take) };
        let failed = |error| ObjectsError::Storage {
            adapter: backend.spec.type_name(),
            error,
        };
        let (listed, (page, is_more)) = tokio::time::timeout(LIST_DEADLINE, both)
            .await
            .map_err(|_| failed(AdapterError::Deadline))?;
        listed.map_err(failed)?;
        let last = page.last_key_value().map(|(name, _)| name.key());
        Ok(ObjectPage {
            adapter: backend.spec.type_name(),
            shared: backend.spec.is_shared(),
            next: last.filter(|_| is_more),
            entries: page.into_values().collect(),
        })
    }

    /// Deletes objects from the first adapter, or from the first one of a type; returns how many
    /// were there.
    ///
    /// # Errors
    /// [`ObjectsError`]; some may be gone then.
    pub async fn delete_objects(
        &self,
        adapter: Option<&str>,
        keys: &[ObjectKey],
    ) -> Result<usize, ObjectsError> {
        let backend = self.backend(adapter)?;
        let mut deleted = 0;
        for keys in keys.chunks(DELETE_BATCH) {
            // What can have no name there is not there.
            let names: Vec<_> = keys.iter().filter_map(|key| name_of(key).ok()).collect();
            let deadline = Instant::now() + DELETE_DEADLINE;
            let done = backend.guarded.delete(&names, deadline).await;
            let done = done.map_err(|error| ObjectsError::Storage {
                adapter: backend.spec.type_name(),
                error,
            })?;
            deleted += done.into_iter().filter(|&was_there| was_there).count();
            self.report(|it| it.gone_from(backend.place, keys.to_vec()));
        }
        Ok(deleted)
    }

    /// Starts to load objects that nobody has asked for yet, as [`prefetch`](Self::prefetch) does;
    /// returns a number to ask [`warm_status`](Self::warm_status) with. Must be called within a
    /// Tokio runtime.
    ///
    /// # Errors
    /// [`ObjectsError::TooMany`]
    pub fn warm(self: &Arc<Self>, keys: Vec<ObjectKey>, bytes: u64) -> Result<u128, ObjectsError> {
        let id = self.warm_jobs.begin().ok_or(ObjectsError::TooMany)?;
        let (tier, total) = (Arc::clone(self), keys.len());
        tokio::spawn(async move {
            let found = tier.prefetch(&keys, bytes).await;
            tier.warm_jobs
                .end(id, WarmStatus::Completed { found, total });
        });
        Ok(id)
    }

    /// What became of a prefetch; told once when it is over, `None` for an unknown one.
    #[must_use]
    pub fn warm_status(&self, id: u128) -> Option<WarmStatus> {
        self.warm_jobs.ask(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetches_that_are_over_make_room_and_others_do_not() {
        let jobs = WarmJobs::default();
        let ids: Vec<_> = (0..MAX_JOBS).filter_map(|_| jobs.begin()).collect();
        assert_eq!(ids.len(), MAX_JOBS);
        assert_eq!(jobs.begin(), None, "all are on their way");
        let over = WarmStatus::Completed { found: 1, total: 2 };
        jobs.end(ids[7], over);
        jobs.end(ids[9], over);
        assert!(jobs.begin().is_some());
        assert_eq!(jobs.ask(ids[7]), None, "it made room");
        assert_eq!(jobs.ask(ids[9]), Some(over));
        assert_eq!(jobs.ask(ids[9]), None, "told once");
        assert_eq!(jobs.ask(ids[8]), Some(WarmStatus::Pending));
        assert_eq!(jobs.ask(ids[8]), Some(WarmStatus::Pending));
    }
}
