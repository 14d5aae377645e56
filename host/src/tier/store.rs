//! Writing down: what was committed to memory is written to storage, some time later.
//!
//! Follows `store_controller.py` and `store_policy.py` of LMCache 0.5.6. Objects wait by key and
//! are copied out of the pool when their turn comes, so that a slow backend holds no memory; one
//! that was evicted meanwhile is counted and left out.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use stockade_cache::{CacheSalt, ObjectKey};
use tokio::sync::Notify;

use super::{Backend, Tier, name_of};

/// Objects whose presence is asked for by one call.
const BATCH: usize = 16;
/// Objects at a time of a commit that several write.
const SPLIT: usize = 4;

/// What becomes of an object in memory once it is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorePolicy {
    /// It stays: LMCache's `default`.
    Default,
    /// It goes as soon as all adapters have it and nobody reads it: LMCache's `skip_l1`.
    SkipL1,
}

/// One object on its way to all adapters.
pub(super) struct Descent {
    key: ObjectKey,
    bytes: u64,
    /// Whether it is the first one of its commit.
    is_first: bool,
    /// Adapters that have not had their turn.
    remaining: AtomicUsize,
    /// Whether one of them did not take it.
    failed: AtomicBool,
}

#[derive(Default)]
struct Queue {
    descents: VecDeque<Arc<Descent>>,
    bytes: u64,
}

impl Queue {
    /// How many of the first ones go to one of `writers`: whole commits, as many as is fair, or the
    /// beginning of one that is longer.
    ///
    /// Where stores come faster than they are written, memory takes commits back before their turn, or
    /// in the midst of it. What is written of one by then is of use as far as it has no gap.
    fn part(&self, writers: usize) -> usize {
        // A part for each writer, or one would write a prompt while the others wait.
        let fair = self.descents.len().div_ceil(writers).min(BATCH);
        let begins_commit = |&at: &usize| self.descents.get(at).is_none_or(|it| it.is_first);
        let whole = (1..=fair).rev().find(begins_commit);
        whole.unwrap_or(fair.min(SPLIT))
    }
}

/// The objects that wait for one adapter.
pub(super) struct Lane {
    /// Tasks that write.
    writers: usize,
    queue: Mutex<Queue>,
    filled: Notify,
    in_work: AtomicUsize,
}

impl Lane {
    pub(super) fn new(writers: usize) -> Self {
        Self {
            writers: writers.max(1),
            queue: Mutex::default(),
            filled: Notify::new(),
            in_work: AtomicUsize::new(0),
        }
    }

    /// Objects and bytes that wait.
    pub(super) fn waiting(&self) -> (usize, u64) {
        let queue = self.queue.lock();
        (queue.descents.len(), queue.bytes)
    }

    /// Objects that are being written.
    pub(super) fn in_work(&self) -> usize {
        self.in_work.load(Ordering::Relaxed)
    }

    /// Queues one commit, in its order; returns how many of it had room.
    fn push(&self, commit: &[Arc<Descent>], max_items: usize, max_bytes: u64) -> usize {
        let mut taken = 0;
        {
            let mut queue = self.queue.lock();
            for descent in commit {
                let bytes = queue.bytes.saturating_add(descent.bytes);
                if queue.descents.len() >= max_items || bytes > max_bytes {
                    break;
                }
                queue.bytes = bytes;
                queue.descents.push_back(Arc::clone(descent));
                taken += 1;
            }
        }
        if taken > 0 {
            self.filled.notify_one();
        }
        taken
    }

    /// Takes out what waits of the salts that are wanted.
    pub(super) fn forget(&self, wanted: &dyn Fn(&CacheSalt) -> bool) -> Vec<Arc<Descent>> {
        let mut queue = self.queue.lock();
        let all = std::mem::take(&mut queue.descents);
        let (taken, kept): (Vec<_>, VecDeque<_>) = {
            let mut kept = VecDeque::with_capacity(all.len());
            let mut taken = Vec::new();
            for descent in all {
                match wanted(&descent.key.scope.cache_salt) {
                    true => taken.push(descent),
                    false => kept.push_back(descent),
                }
            }
            (taken, kept)
        };
        queue.descents = kept;
        queue.bytes -= taken.iter().map(|descent| descent.bytes).sum::<u64>();
        taken
    }

    async fn take(&self) -> Vec<Arc<Descent>> {
        loop {
            let (taken, is_more) = {
                let mut queue = self.queue.lock();
                let count = queue.part(self.writers);
                let taken: Vec<_> = queue.descents.drain(..count).collect();
                queue.bytes -= taken.iter().map(|descent| descent.bytes).sum::<u64>();
                // Counted under the lock, so that nobody sees them neither waiting nor in work.
                self.in_work.fetch_add(taken.len(), Ordering::Relaxed);
                (taken, !queue.descents.is_empty())
            };
            if is_more {
                self.filled.notify_one();
            }
            if !taken.is_empty() {
                return taken;
            }
            self.filled.notified().await;
        }
    }
}

impl Tier {
    /// Tells that objects of `bytes` each were committed together. Queues them, or drops the last
    /// ones if too many wait; never waits.
    pub fn stored(&self, keys: impl IntoIterator<Item = ObjectKey>, bytes: u64) {
        let descent = |(at, key)| {
            Arc::new(Descent {
                key,
                bytes,
                is_first: at == 0,
                remaining: AtomicUsize::new(self.backends.len()),
                failed: AtomicBool::new(false),
            })
        };
        let commit: Vec<_> = keys.into_iter().enumerate().map(descent).collect();
        let (items, most) = (self.config.store_queue_items, self.config.store_queue_bytes);
        for (index, backend) in self.backends.iter().enumerate() {
            let taken = backend.lane.push(&commit, items, most);
            let (taken, dropped) = commit.split_at(taken);
            for descent in taken {
                self.metrics.store_submitted(&descent.key);
            }
            for descent in dropped {
                self.metrics.store_dropped(index, "queue_full");
                self.settle(descent, false);
            }
        }
    }

    /// Whether nothing waits or is being written.
    #[must_use]
    pub fn is_written_down(&self) -> bool {
        self.backends
            .iter()
            .all(|backend| backend.lane.waiting().0 == 0 && backend.lane.in_work() == 0)
    }

    /// Waits until everything is written down, at most for `grace`; returns whether it is.
    pub async fn drain(&self, grace: Duration) -> bool {
        let deadline = Instant::now() + grace;
        while !self.is_written_down() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }

    /// Writes what waits for one adapter, for ever.
    pub(super) async fn write_down(self: Arc<Self>, index: usize) {
        let Some(backend) = self.backends.get(index) else {
            return;
        };
        loop {
            let descents = backend.lane.take().await;
            self.write_batch(index, backend, descents).await;
        }
    }

    async fn write_batch(&self, index: usize, backend: &Backend, descents: Vec<Arc<Descent>>) {
        let mut named = Vec::with_capacity(descents.len());
        for descent in descents {
            match name_of(&descent.key) {
                Ok(name) => named.push((descent, name)),
                Err(error) => {
                    self.metrics.store_dropped(index, "name");
                    tracing::debug!("an object cannot be written down: {error}");
                    self.done(backend, &descent, false);
                }
            }
        }
        let names: Vec<_> = named.iter().map(|(_, name)| name.clone()).collect();
        if names.is_empty() {
            return;
        }
        let deadline = Instant::now() + self.config.lookup_deadline;
        // If it cannot tell, writing will find out; that the value may be there already is no harm.
        let present = backend.guarded.find(&names, deadline).await;
        let present = present.unwrap_or_else(|_| vec![false; names.len()]);
        for ((descent, name), is_there) in named.into_iter().zip(present) {
            if is_there {
                self.metrics.store_present(index);
                self.done(backend, &descent, true);
                continue;
            }
            let Some(value) = self.copy(&descent.key).await else {
                self.metrics.store_dropped(index, "evicted");
                self.done(backend, &descent, false);
                continue;
            };
            let began = Instant::now();
            let layout = descent.key.scope.object_group_id;
            let storing = self.metrics.storing(index);
            let stored = backend
                .guarded
                .store(&name, &value, layout, began + self.config.store_deadline)
                .await;
            drop(storing);
            match &stored {
                Ok(()) => {
                    let bytes = value.len() as u64;
                    self.metrics
                        .store_completed(index, &descent.key, bytes, began.elapsed());
                    let keys = vec![descent.key.clone()];
                    self.report(|it| it.written_down(backend.place, keys, bytes));
                }
                Err(error) => {
                    self.metrics.store_dropped(index, error.reason());
                    tracing::debug!(%name, "an object was not written down: {error}");
                }
            }
            self.done(backend, &descent, stored.is_ok());
        }
    }

    /// The bytes of a committed object, if it is still there and intact.
    async fn copy(&self, key: &ObjectKey) -> Option<Bytes> {
        let (engine, key) = (Arc::clone(&self.engine), key.clone());
        let copied = tokio::task::spawn_blocking(move || {
            let mut value = Vec::new();
            match engine.copy_committed(&key, &mut value) {
                Ok(true) => Some(Bytes::from(value)),
                Ok(false) => None,
                Err(error) => {
                    tracing::warn!("an object cannot be written down: {error}");
                    None
                }
            }
        });
        copied.await.ok().flatten()
    }

    fn done(&self, backend: &Backend, descent: &Descent, stored: bool) {
        self.settle(descent, stored);
        backend.lane.in_work.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that one adapter has had its turn.
    pub(super) fn settle(&self, descent: &Descent, stored: bool) {
        if !stored {
            descent.failed.store(true, Ordering::Release);
        }
        let is_last = descent.remaining.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last
            && self.config.store_policy == StorePolicy::SkipL1
            && !descent.failed.load(Ordering::Acquire)
        {
            self.engine.release(std::slice::from_ref(&descent.key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stockade_cache::{ChunkHash, KeyScope};

    fn lane(writers: usize, commits: &[u8]) -> Lane {
        let lane = Lane::new(writers);
        let scope = Arc::new(KeyScope {
            model_name: "m".into(),
            kv_rank: 0,
            object_group_id: 0,
            cache_salt: CacheSalt::default(),
        });
        for (number, &chunks) in (0..).zip(commits) {
            let descent = |at| {
                Arc::new(Descent {
                    key: ObjectKey::new(Arc::clone(&scope), ChunkHash([number; 32])),
                    bytes: 1,
                    is_first: at == 0,
                    remaining: AtomicUsize::new(1),
                    failed: AtomicBool::new(false),
                })
            };
            let commit: Vec<_> = (0..chunks).map(descent).collect();
            assert_eq!(lane.push(&commit, usize::MAX, u64::MAX), commit.len());
        }
        lane
    }

    /// How many each take gets until nothing is left.
    async fn parts(lane: &Lane) -> Vec<usize> {
        let mut parts = Vec::new();
        while lane.waiting().0 > 0 {
            parts.push(lane.take().await.len());
        }
        parts
    }

    #[tokio::test]
    async fn a_commit_is_one_writers_unless_it_is_long() {
        // Alone, it is for all writers.
        assert_eq!(parts(&lane(4, &[14])).await[..3], [4, 3, 2]);
        // Among others, it is begun by the one who ends it.
        assert_eq!(parts(&lane(1, &[7; 5])).await, [14, 14, 7]);
        assert_eq!(
            parts(&lane(1, &[1, 15, 2, 40, 3])).await,
            [16, 2, 4, 4, 4, 4, 4, 4, 16, 3]
        );
        // Many small ones share a batch.
        assert_eq!(parts(&lane(2, &[1; 64])).await[..3], [16, 16, 16]);
    }

    #[test]
    fn of_a_commit_that_has_no_room_the_beginning_is_taken() {
        let lane = Lane::new(1);
        let whole = super::tests::lane(1, &[5]);
        let commit: Vec<_> = whole.queue.lock().descents.iter().cloned().collect();
        assert_eq!(lane.push(&commit, 3, u64::MAX), 3);
        assert!(lane.queue.lock().descents[0].is_first);
        assert_eq!(lane.push(&commit, 3, u64::MAX), 0);
        let lane = Lane::new(1);
        assert_eq!(lane.push(&commit, usize::MAX, 4), 4);
        assert_eq!(lane.waiting(), (4, 4));
    }
}
