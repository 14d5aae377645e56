//! What a request asks for beside the usual, within what its tenant may: `request_configs`.
//!
//! LMCache's multiprocess clients send them with every key and its server looks at none of them;
//! the names are those of LMCache's own connectors (`integration/vllm/`), except `lmcache.pin`
//! and `lmcache.priority`, which are ours.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_cache::{CacheSalt, ObjectKey};
use stockade_wire::RequestConfigs;

use crate::tenancy::HintRules;

/// Objects that may wait for the end of their time at once.
const MAX_EXPIRING: usize = 1 << 20;
/// How long an object that is in use at the end of its time waits for another try.
const RETRY: Duration = Duration::from_secs(1);

/// The priority that keeps objects as long as a pin does; lower ones for their part of it.
const TOP_PRIORITY: u32 = 10;
/// In whose name objects are kept that a request asked for; plugins count from 0.
pub(super) const HOLDER: u64 = u64::MAX;

/// A request's hints within its tenant's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hints {
    /// Store nothing.
    pub(super) skip_save: bool,
    /// How long what is stored may be found.
    pub(super) ttl: Option<Duration>,
    /// How long what is stored is evicted last.
    pub(super) keep: Option<Duration>,
}

impl Hints {
    pub(super) fn of(asked: &RequestConfigs, rules: &HintRules) -> Self {
        let ttl = match (asked.ttl, rules.max_ttl) {
            (Some(asked), Some(most)) => Some(asked.min(most)),
            (asked, most) => asked.or(most),
        };
        let level = match asked.pin {
            true => TOP_PRIORITY,
            // At most the top one, so it fits.
            false => asked.priority.clamp(0, i64::from(TOP_PRIORITY)) as u32,
        };
        let keep = rules.max_pin * level / TOP_PRIORITY;
        Self {
            skip_save: asked.skip_save && !rules.always_save,
            ttl,
            keep: (!keep.is_zero()).then_some(keep),
        }
    }
}

/// Objects stored together that end together.
struct Expiring {
    at: Reverse<Instant>,
    keys: Arc<[ObjectKey]>,
}

impl PartialEq for Expiring {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Expiring {}

impl PartialOrd for Expiring {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Expiring {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// Objects that are to go at a certain time. Bounded: a store with a time that does not fit any
/// more is declined, rather than kept for ever.
///
/// An object that goes before its time and is stored again has the time of the last store only.
#[derive(Default)]
pub(super) struct Expiry {
    waiting: Mutex<Waiting>,
    /// As in `waiting`, to be looked at without its lock.
    objects: AtomicUsize,
}

#[derive(Default)]
struct Waiting {
    /// The next to end on top.
    heap: BinaryHeap<Expiring>,
    /// Objects in the heap, those counted that were stored again since.
    objects: usize,
    /// When each is to go; what the heap says besides is out of date.
    due: HashMap<ObjectKey, Instant>,
}

impl Expiry {
    /// Whether so many more objects may be given a time.
    pub(super) fn has_room(&self, objects: usize) -> bool {
        self.objects.load(Ordering::Relaxed) + objects <= MAX_EXPIRING
    }

    /// Whether any object has a time.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.load(Ordering::Relaxed) == 0
    }

    /// Notes when objects that were just stored are to go.
    pub(super) fn note(&self, keys: Vec<ObjectKey>, at: Instant) {
        if keys.is_empty() {
            return;
        }
        let mut waiting = self.waiting.lock();
        waiting.objects += keys.len();
        for key in &keys {
            waiting.due.insert(key.clone(), at);
        }
        waiting.heap.push(Expiring {
            at: Reverse(at),
            keys: keys.into(),
        });
        self.objects.store(waiting.objects, Ordering::Relaxed);
    }

    /// Takes back the times of objects that are stored anew.
    pub(super) fn cancel(&self, keys: &[ObjectKey]) {
        let mut waiting = self.waiting.lock();
        for key in keys {
            waiting.due.remove(key);
        }
    }

    /// Forgets the objects under salts that are `wanted`; returns how many.
    pub(super) fn forget(&self, wanted: &dyn Fn(&CacheSalt) -> bool) -> usize {
        let mut waiting = self.waiting.lock();
        let before = waiting.due.len();
        waiting.due.retain(|key, _| !wanted(&key.scope.cache_salt));
        let all = std::mem::take(&mut waiting.heap);
        for mut expiring in all {
            let is_wanted = |key: &ObjectKey| wanted(&key.scope.cache_salt);
            if expiring.keys.iter().any(is_wanted) {
                let kept = expiring.keys.iter().filter(|&key| !is_wanted(key));
                let kept: Arc<[ObjectKey]> = kept.cloned().collect();
                waiting.objects -= expiring.keys.len() - kept.len();
                expiring.keys = kept;
            }
            if !expiring.keys.is_empty() {
                waiting.heap.push(expiring);
            }
        }
        self.objects.store(waiting.objects, Ordering::Relaxed);
        before - waiting.due.len()
    }

    /// Hands the objects whose time has come to `withdraw`, which returns those that are in use.
    pub(super) fn end_due(
        &self,
        now: Instant,
        mut withdraw: impl FnMut(&[ObjectKey]) -> Vec<ObjectKey>,
    ) {
        loop {
            let due = {
                let mut waiting = self.waiting.lock();
                let is_due = waiting.heap.peek().is_some_and(|next| next.at.0 <= now);
                if !is_due {
                    return;
                }
                let Some(due) = waiting.heap.pop() else {
                    return;
                };
                waiting.objects -= due.keys.len();
                self.objects.store(waiting.objects, Ordering::Relaxed);
                let mut keys = due.keys.to_vec();
                keys.retain(|key| {
                    let is_last = waiting.due.get(key) == Some(&due.at.0);
                    if is_last {
                        waiting.due.remove(key);
                    }
                    is_last
                });
                keys
            };
            self.note(withdraw(&due), now + RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use stockade_cache::{CacheSalt, ChunkHash, KeyScope};

    use super::*;

    fn key(number: u8) -> ObjectKey {
        let scope = KeyScope {
            model_name: Arc::from("m"),
            kv_rank: 0,
            object_group_id: 0,
            cache_salt: CacheSalt::default(),
        };
        ObjectKey::new(Arc::new(scope), ChunkHash([number; 32]))
    }

    #[test]
    fn a_hint_is_heard_as_far_as_the_tenant_may() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let limited = HintRules {
            max_ttl: seconds(60),
            always_save: true,
            max_pin: Duration::from_secs(100),
            ..HintRules::default()
        };
        for (pin, priority, kept) in [
            (false, 0, None),
            (false, -5, None),
            (false, 3, seconds(30)),
            (false, i64::MAX, seconds(100)),
            (true, 0, seconds(100)),
        ] {
            let asked = RequestConfigs {
                pin,
                priority,
                ..RequestConfigs::default()
            };
            assert_eq!(Hints::of(&asked, &limited).keep, kept, "{pin} {priority}");
            assert_eq!(Hints::of(&asked, &HintRules::default()).keep, None);
        }
        for (ttl, free, clamped) in [
            (None, None, seconds(60)),
            (seconds(5), seconds(5), seconds(5)),
            (seconds(600), seconds(600), seconds(60)),
        ] {
            let asked = RequestConfigs {
                ttl,
                skip_save: true,
                ..RequestConfigs::default()
            };
            let hints = Hints::of(&asked, &HintRules::default());
            assert_eq!((hints.ttl, hints.skip_save), (free, true));
            let hints = Hints::of(&asked, &limited);
            assert_eq!((hints.ttl, hints.skip_save), (clamped, false));
        }
    }

    #[test]
    fn objects_end_in_the_order_of_their_times_and_those_in_use_later() {
        let expiry = Expiry::default();
        let now = Instant::now();
        for (number, after) in [(3, 3), (1, 1), (2, 2)] {
            expiry.note(vec![key(number)], now + Duration::from_secs(after));
        }
        let mut ended = Vec::new();
        expiry.end_due(now, |keys| {
            ended.extend(keys.to_vec());
            Vec::new()
        });
        assert!(ended.is_empty());
        expiry.end_due(now + Duration::from_secs(2), |keys| {
            ended.extend(keys.to_vec());
            if keys[0] == key(1) {
                keys.to_vec()
            } else {
                Vec::new()
            }
        });
        assert_eq!(ended, [key(1), key(2)]);
        ended.clear();
        expiry.end_due(now + Duration::from_secs(3), |keys| {
            ended.extend(keys.to_vec());
            Vec::new()
        });
        // Both are due by then.
        ended.sort_by_key(|key| key.chunk_hash);
        assert_eq!(ended, [key(1), key(3)], "what was in use is tried again");
        let waiting = expiry.waiting.lock();
        assert_eq!((waiting.objects, waiting.due.len()), (0, 0));
    }

    #[test]
    fn what_is_stored_again_has_the_time_of_its_last_store() {
        let expiry = Expiry::default();
        let now = Instant::now();
        let seconds = |seconds| now + Duration::from_secs(seconds);
        // 1 is stored for longer, 2 for ever, 3 for a shorter time.
        expiry.note(vec![key(1), key(2), key(3)], seconds(10));
        for (number, at) in [(1, Some(20)), (2, None), (3, Some(5))] {
            expiry.cancel(&[key(number)]);
            if let Some(at) = at {
                expiry.note(vec![key(number)], seconds(at));
            }
        }
        let mut ended = Vec::new();
        for at in [4, 5, 10, 19, 20, 60] {
            expiry.end_due(seconds(at), |keys| {
                ended.extend(keys.iter().map(|key| (at, key.chunk_hash.0[0])));
                Vec::new()
            });
        }
        assert_eq!(ended, [(5, 3), (20, 1)]);
        assert!(expiry.is_empty());
    }
}
