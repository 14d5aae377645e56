//! What happens in the cache, kept for plugins that want to hear of it.
//!
//! A ring of the newest events with numbers. While no plugin has ever asked, a request pays one
//! look at a flag for it; afterwards a short lock, under which it pushes. Readers copy a few
//! handles out under that lock, on the server's runtime, and make the text elsewhere.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use stockade_cache::{CacheObserver, CacheSalt, ObjectKey, RemoveReason};
use stockade_sandbox::host_api::{
    Backlog, CacheEvent, EventBatch, EventKind, EventSource, MAX_EVENT_BATCH, Pending, Subscription,
};
use tokio::sync::watch;

use super::{TenantScope, key_text};

/// Events that are kept.
const KEPT: usize = 1 << 16;
/// Events of one message where the plugin does not say.
const DEFAULT_BATCH: usize = 256;
/// Events that a reader looks at under one lock.
const LOOK: usize = 1024;

/// One event, as it is kept.
#[derive(Debug, Clone)]
enum Event {
    Stored {
        key: ObjectKey,
        bytes: u64,
        request: Option<Arc<str>>,
    },
    Retrieved {
        key: ObjectKey,
        bytes: u64,
        request: Arc<str>,
    },
    Evicted {
        key: ObjectKey,
        bytes: u64,
        why: &'static str,
    },
    Lookup {
        salt: CacheSalt,
        model: Arc<str>,
        request: Arc<str>,
        tokens: u64,
        hit_tokens: u64,
    },
    SessionEnd {
        salt: CacheSalt,
        model: Arc<str>,
        request: Arc<str>,
    },
}

impl Event {
    fn kind(&self) -> EventKind {
        match self {
            Self::Stored { .. } => EventKind::Stored,
            Self::Retrieved { .. } => EventKind::Retrieved,
            Self::Evicted { .. } => EventKind::Evicted,
            Self::Lookup { .. } => EventKind::Lookup,
            Self::SessionEnd { .. } => EventKind::SessionEnd,
        }
    }

    fn salt(&self) -> &CacheSalt {
        match self {
            Self::Stored { key, .. } | Self::Retrieved { key, .. } | Self::Evicted { key, .. } => {
                &key.scope.cache_salt
            }
            Self::Lookup { salt, .. } | Self::SessionEnd { salt, .. } => salt,
        }
    }

    fn shown(self, chunk_tokens: u64) -> CacheEvent {
        match self {
            Self::Stored {
                key,
                bytes,
                request,
            } => CacheEvent::Stored {
                key: key_text(&key),
                salt: key.scope.cache_salt.to_string(),
                model: key.scope.model_name.to_string(),
                bytes,
                request: request.map(|request| request.to_string()),
                tokens: chunk_tokens,
            },
            Self::Retrieved {
                key,
                bytes,
                request,
            } => CacheEvent::Retrieved {
                key: key_text(&key),
                salt: key.scope.cache_salt.to_string(),
                model: key.scope.model_name.to_string(),
                bytes,
                request: request.to_string(),
            },
            Self::Evicted { key, bytes, why } => CacheEvent::Evicted {
                key: key_text(&key),
                salt: key.scope.cache_salt.to_string(),
                model: key.scope.model_name.to_string(),
                bytes,
                why: why.to_owned(),
            },
            Self::Lookup {
                salt,
                model,
                request,
                tokens,
                hit_tokens,
            } => CacheEvent::Lookup {
                salt: salt.to_string(),
                model: model.to_string(),
                request: request.to_string(),
                tokens,
                hit_tokens,
            },
            Self::SessionEnd {
                salt,
                model,
                request,
            } => CacheEvent::SessionEnd {
                salt: salt.to_string(),
                model: model.to_string(),
                request: request.to_string(),
            },
        }
    }
}

#[derive(Debug)]
struct Ring {
    events: VecDeque<Event>,
    /// Number of the next event.
    next: u64,
}

impl Ring {
    fn first(&self) -> u64 {
        self.next - self.events.len() as u64
    }
}

/// The ring, and who waits for more.
#[derive(Debug)]
pub(crate) struct EventLog {
    chunk_tokens: u64,
    is_wanted: AtomicBool,
    /// Number of the first event there ever was.
    began: u64,
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

impl EventLog {
    /// An empty log; chunks have `chunk_tokens` tokens.
    pub(crate) fn new(chunk_tokens: usize) -> Arc<Self> {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        // So that a number of another server's life is known as that. It stays below 2^53.
        let began = u64::try_from(since_epoch.as_millis()).unwrap_or_default() << 11;
        Arc::new(Self {
            chunk_tokens: chunk_tokens as u64,
            is_wanted: AtomicBool::new(false),
            began,
            ring: Mutex::new(Ring {
                events: VecDeque::new(),
                next: began,
            }),
            newest: watch::channel(began).0,
        })
    }

    /// Whether anybody has ever asked; without, there is no use in making events.
    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    fn push(&self, events: impl Iterator<Item = Event>) {
        let mut ring = self.ring.lock();
        for event in events {
            if ring.events.len() == KEPT {
                ring.events.pop_front();
            }
            ring.events.push_back(event);
            ring.next += 1;
        }
        let next = ring.next;
        drop(ring);
        self.newest.send_if_modified(|newest| {
            let is_newer = next > *newest;
            *newest = next.max(*newest);
            is_newer
        });
    }

    /// A worker was given objects.
    pub(crate) fn retrieved(
        &self,
        keys: impl Iterator<Item = ObjectKey>,
        bytes: u64,
        request: &Arc<str>,
    ) {
        self.push(keys.map(|key| Event::Retrieved {
            key,
            bytes,
            request: Arc::clone(request),
        }));
    }

    /// A request asked how much of its prefix is there.
    pub(crate) fn looked_up(
        &self,
        salt: &CacheSalt,
        model: &Arc<str>,
        request: &Arc<str>,
        tokens: usize,
        hit_tokens: usize,
    ) {
        self.push(std::iter::once(Event::Lookup {
            salt: salt.clone(),
            model: Arc::clone(model),
            request: Arc::clone(request),
            tokens: tokens as u64,
            hit_tokens: hit_tokens as u64,
        }));
    }

    /// A request has ended.
    pub(crate) fn session_ended(&self, salt: &CacheSalt, model: &Arc<str>, request: &Arc<str>) {
        self.push(std::iter::once(Event::SessionEnd {
            salt: salt.clone(),
            model: Arc::clone(model),
            request: Arc::clone(request),
        }));
    }

    /// A reader, and the number of the event before its first. A cursor of another server's life
    /// counts as none.
    pub(super) fn subscribe(
        self: Arc<Self>,
        subscription: &Subscription,
        most_behind: u64,
        scope: impl Fn() -> TenantScope + Send + 'static,
    ) -> (u64, Reader) {
        self.is_wanted.store(true, Ordering::Relaxed);
        let last = self.ring.lock().next - 1;
        let cursor = subscription
            .cursor
            .filter(|cursor| (self.began - 1..=last).contains(cursor))
            .unwrap_or(last);
        let reader = Reader {
            newest: self.newest.subscribe(),
            log: self,
            kinds: subscription.types.clone(),
            most: subscription
                .max_batch
                .unwrap_or(DEFAULT_BATCH)
                .min(MAX_EVENT_BATCH),
            most_behind,
            cursor,
            seen: Arc::new(AtomicU64::new(cursor)),
            lost: 0,
            scope: Box::new(scope),
        };
        (cursor, reader)
    }
}

impl CacheObserver for EventLog {
    fn stored_for(&self, keys: &[ObjectKey], object_bytes: u64, request: Option<&Arc<str>>) {
        if self.is_wanted() {
            self.push(keys.iter().map(|key| Event::Stored {
                key: key.clone(),
                bytes: object_bytes,
                request: request.cloned(),
            }));
        }
    }

    fn removed_with(&self, keys: &[ObjectKey], bytes: &[u64], reason: RemoveReason) {
        if self.is_wanted() {
            let why = match reason {
                RemoveReason::Evicted => "pressure",
                RemoveReason::Cleared => "cleared",
                RemoveReason::Corrupt => "corrupt",
                RemoveReason::Released => "released",
            };
            self.push(keys.iter().zip(bytes).map(|(key, &bytes)| Event::Evicted {
                key: key.clone(),
                bytes,
                why,
            }));
        }
    }
}

/// One subscription.
pub(super) struct Reader {
    log: Arc<EventLog>,
    newest: watch::Receiver<u64>,
    kinds: Option<BTreeSet<EventKind>>,
    most: usize,
    most_behind: u64,
    cursor: u64,
    /// The cursor, for who counts what waits.
    seen: Arc<AtomicU64>,
    lost: u64,
    scope: Box<dyn Fn() -> TenantScope + Send>,
}

impl Reader {
    /// Looks at the next events; what of them is wanted, and whether there are more.
    fn look(&mut self) -> (Vec<Event>, bool) {
        let scope = (self.scope)();
        let ring = self.log.ring.lock();
        let last = ring.next - 1;
        let oldest = ring.first().max(ring.next.saturating_sub(self.most_behind));
        if self.cursor + 1 < oldest {
            self.lost += oldest - (self.cursor + 1);
            self.cursor = oldest - 1;
        }
        let skip = usize::try_from(self.cursor + 1 - ring.first()).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        for event in ring.events.iter().skip(skip).take(LOOK) {
            self.cursor += 1;
            let is_wanted = self
                .kinds
                .as_ref()
                .is_none_or(|kinds| kinds.contains(&event.kind()));
            if is_wanted && scope.covers(event.salt()) {
                found.push(event.clone());
                if found.len() == self.most {
                    break;
                }
            }
        }
        self.seen.store(self.cursor, Ordering::Relaxed);
        (found, self.cursor < last)
    }
}

impl EventSource for Reader {
    fn backlog(&self) -> Backlog {
        let (log, seen, most) = (
            Arc::clone(&self.log),
            Arc::clone(&self.seen),
            self.most_behind,
        );
        Backlog::new(move || {
            let last = *log.newest.borrow();
            let behind = last.saturating_sub(seen.load(Ordering::Relaxed) + 1);
            behind.min(most)
        })
    }

    fn next(&mut self) -> Pending<'_, Option<EventBatch>> {
        Box::pin(async move {
            loop {
                self.newest.mark_unchanged();
                let (found, is_more) = self.look();
                if !found.is_empty() {
                    let chunk_tokens = self.log.chunk_tokens;
                    let shown = move || {
                        let shown = found.into_iter().map(|event| event.shown(chunk_tokens));
                        shown.collect()
                    };
                    return Some(EventBatch {
                        cursor: self.cursor,
                        lost: std::mem::take(&mut self.lost),
                        events: Box::new(shown),
                    });
                }
                if !is_more {
                    self.newest.changed().await.ok()?;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn end(log: &EventLog, request: &str) {
        log.session_ended(&CacheSalt::default(), &"m".into(), &request.into());
    }

    fn subscribe(log: &Arc<EventLog>, cursor: Option<u64>, behind: u64) -> (u64, Reader) {
        let subscription = Subscription {
            cursor,
            max_batch: Some(2),
            ..Subscription::default()
        };
        Arc::clone(log).subscribe(&subscription, behind, || TenantScope::Everything)
    }

    async fn requests(reader: &mut Reader) -> (u64, Vec<String>) {
        let batch = reader.next().await.unwrap();
        let names = (batch.events)().into_iter().map(|event| match event {
            CacheEvent::SessionEnd { request, .. } => request,
            other => format!("{other:?}"),
        });
        (batch.lost, names.collect())
    }

    #[tokio::test]
    async fn a_reader_hears_all_in_order_and_goes_on_from_its_cursor() {
        let log = EventLog::new(256);
        assert!(!log.is_wanted());
        let (first, mut reader) = subscribe(&log, None, 100);
        assert!(log.is_wanted());
        for name in ["a", "b", "c"] {
            end(&log, name);
        }
        assert_eq!(
            requests(&mut reader).await,
            (0, vec!["a".into(), "b".into()])
        );
        assert_eq!(requests(&mut reader).await, (0, vec!["c".into()]));
        let (again, mut reader) = subscribe(&log, Some(first + 1), 100);
        assert_eq!(again, first + 1);
        assert_eq!(
            requests(&mut reader).await,
            (0, vec!["b".into(), "c".into()])
        );
        // One that no server of this life gave is none.
        let (now, _) = subscribe(&log, Some(7), 100);
        assert_eq!(now, first + 3);
        let (now, _) = subscribe(&log, Some(u64::MAX), 100);
        assert_eq!(now, first + 3);
    }

    #[tokio::test]
    async fn who_is_too_slow_is_told_how_much_was_lost() {
        let log = EventLog::new(256);
        let (_, mut slow) = subscribe(&log, None, 3);
        let (_, mut patient) = subscribe(&log, None, u64::MAX);
        for number in 0..10 {
            end(&log, &number.to_string());
        }
        assert_eq!(requests(&mut slow).await, (7, vec!["7".into(), "8".into()]));
        assert_eq!(requests(&mut slow).await, (0, vec!["9".into()]));
        for number in 0..KEPT {
            end(&log, &number.to_string());
        }
        let (lost, names) = requests(&mut patient).await;
        assert_eq!((lost, names), (10, vec!["0".into(), "1".into()]));
    }

    #[tokio::test]
    async fn a_reader_sleeps_until_something_happens() {
        let log = EventLog::new(256);
        let (_, mut reader) = subscribe(&log, None, 100);
        let reading = tokio::spawn(async move { requests(&mut reader).await });
        tokio::task::yield_now().await;
        assert!(!reading.is_finished());
        end(&log, "a");
        assert_eq!(reading.await.unwrap(), (0, vec!["a".into()]));
    }
}
