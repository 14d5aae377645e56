//! Request sessions: what a lookup found, and the hashes of a request's tokens.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_cache::{CacheEngine, ChunkHash, KeyScope, LeaseId, OwnerId, TokenHasher};
use stockade_wire::{Request, RequestId, TokenIds};
use tokio::sync::watch;
use tokio_util::sync::DropGuard;

use crate::{
    tenancy::{self, Caller, Realm},
    traces::{Place, SessionTrace, Traces, request_id},
};

/// Bytes of one token in hash input.
const TOKEN_BYTES: usize = 4;
/// Chunks hashed before others may go first: some microseconds.
const CHUNKS_AT_A_TIME: usize = 8;
/// Bytes of tokens compared before others may go first: a microsecond or two, from memory.
const BYTES_AT_A_TIME: usize = 8 << 10;
/// Most sessions at once; beyond it idle ones go before their time.
const MAX_SESSIONS: usize = 65_536;
/// Token bytes that all sessions together may keep for comparing; beyond it keys are hashed anew.
const MAX_KEPT_TOKEN_BYTES: usize = 256 << 20;

/// Whether two runs of tokens are the same; lets others go first between pieces.
fn are_equal(one: &[u8], other: &[u8]) -> bool {
    let pieces = one.chunks(BYTES_AT_A_TIME);
    one.len() == other.len()
        && pieces
            .zip(other.chunks(BYTES_AT_A_TIME))
            .enumerate()
            .all(|(number, (one, other))| {
                if number > 0 {
                    tenancy::breathe();
                }
                one == other
            })
}

/// The locks that a lookup took and the result that a query will collect.
#[derive(Debug, Clone)]
pub(crate) struct Lookup {
    /// `None` when nothing was found.
    pub(crate) lease: Option<LeaseId>,
    pub(crate) hit_chunks: usize,
    /// Locks per object.
    pub(crate) readers: u32,
    /// One scope per rank.
    pub(crate) scopes: Arc<[Arc<KeyScope>]>,
    /// The tokens that were looked up; a retrieve must be about the same ones.
    pub(crate) tokens: TokenIds,
}

/// What a lookup loads from the second tier, in the background.
#[derive(Debug)]
pub(crate) struct Prefetch {
    /// True once the result is there.
    pub(crate) done: watch::Receiver<bool>,
    /// Stops the loading when the request ends or looks up something else.
    pub(crate) cancel: DropGuard,
    /// Chunks that were looked up.
    pub(crate) requested_chunks: usize,
    /// Chunks of the hit that were in memory.
    pub(crate) chunks_in_memory: usize,
}

impl Prefetch {
    /// Whether its result is still to come.
    pub(crate) fn is_running(&self) -> bool {
        // Without a sender whoever would tell has ended, though not as it should.
        !*self.done.borrow() && self.done.has_changed().is_ok()
    }
}

/// State of one request.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) owner: OwnerId,
    /// Hit length that no query has collected yet.
    pub(crate) result: Option<usize>,
    pub(crate) lookup: Option<Lookup>,
    /// Until its result is collected.
    pub(crate) prefetch: Option<Prefetch>,
    hashes: Vec<ChunkHash>,
    /// The tokens that `hashes` cover.
    hashed: Option<TokenIds>,
    /// `None` when the request is not traced.
    pub(crate) trace: Option<Arc<SessionTrace>>,
    kept: Arc<AtomicUsize>,
}

impl Session {
    /// The hashes of the first `chunks` chunks of `tokens`, which must hold that many.
    ///
    /// A request sends its key several times; only tokens that were not hashed before are.
    pub(crate) fn chunk_hashes(
        &mut self,
        hasher: &TokenHasher,
        tokens: &TokenIds,
        chunks: usize,
    ) -> &[ChunkHash] {
        let chunk_bytes = hasher.chunk_size() * TOKEN_BYTES;
        let needed = chunks
            .saturating_mul(chunk_bytes)
            .min(tokens.as_be_bytes().len());
        let given = &tokens.as_be_bytes()[..needed];
        let hashed = self.hashed.as_ref().map_or(&[][..], TokenIds::as_be_bytes);
        let shared = needed.min(hashed.len());
        if !are_equal(&given[..shared], &hashed[..shared])
            || self.hashes.len() * chunk_bytes != hashed.len()
        {
            self.hashes.clear();
            self.keep(None);
        }
        if self.hashes.len() < chunks {
            loop {
                let before = self.hashes.len();
                let most = chunks.min(before.saturating_add(CHUNKS_AT_A_TIME));
                hasher.chunk_hashes(given, &mut self.hashes, most);
                if self.hashes.len() == before || self.hashes.len() >= chunks {
                    break;
                }
                tenancy::breathe();
            }
            self.keep(tokens.slice(0..self.hashes.len() * hasher.chunk_size()));
        }
        &self.hashes[..chunks.min(self.hashes.len())]
    }

    /// Hashes computed so far, of the request's whole key.
    pub(crate) fn known_hashes(&self) -> &[ChunkHash] {
        &self.hashes
    }

    fn keep(&mut self, tokens: Option<TokenIds>) {
        let before = self.kept_bytes();
        let total = self.kept.load(Ordering::Relaxed).saturating_sub(before);
        // Without the tokens the next call cannot tell that they are the same, and hashes anew.
        self.hashed =
            tokens.filter(|tokens| total + tokens.as_be_bytes().len() <= MAX_KEPT_TOKEN_BYTES);
        self.kept.fetch_add(self.kept_bytes(), Ordering::Relaxed);
        self.kept.fetch_sub(before, Ordering::Relaxed);
    }

    fn kept_bytes(&self) -> usize {
        self.hashed
            .as_ref()
            .map_or(0, |tokens| tokens.as_be_bytes().len())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.kept.fetch_sub(self.kept_bytes(), Ordering::Relaxed);
    }
}

/// What names a session: engines choose the ids, so each tenant has ids of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId {
    realm: Realm,
    request: RequestId,
}

impl SessionId {
    pub(crate) fn new(caller: &Caller, request: &RequestId) -> Self {
        Self {
            realm: caller.realm().clone(),
            request: Arc::clone(request),
        }
    }
}

struct Entry {
    session: Arc<Mutex<Session>>,
    last_used: Instant,
}

/// All sessions by request id. Follows LMCache's `session.py`, with one difference: the
/// time to live counts idleness, not age.
#[derive(Default)]
pub(crate) struct Sessions {
    entries: Mutex<HashMap<SessionId, Entry>>,
    kept: Arc<AtomicUsize>,
    traces: Traces,
}

impl Sessions {
    /// No sessions yet; those to come are traced as `traces` says.
    pub(crate) fn new(traces: Traces) -> Self {
        Self {
            traces,
            ..Self::default()
        }
    }

    /// Where the span of a request belongs.
    pub(crate) fn place(&self, caller: &Caller, request: &Request) -> Place {
        let session = request_id(request).and_then(|id| self.get(&SessionId::new(caller, id)));
        let Some(session) = session else {
            return Place::Alone;
        };
        let trace = session.lock().trace.clone();
        trace.map_or(Place::Unsampled, Place::Under)
    }

    /// The session of a request, made at its first use.
    pub(crate) fn get_or_create(&self, id: SessionId, engine: &CacheEngine) -> Arc<Mutex<Session>> {
        let now = Instant::now();
        let mut ended = Vec::new();
        let session = {
            let mut entries = self.entries.lock();
            if let Some(entry) = entries.get_mut(&id) {
                entry.last_used = now;
                return Arc::clone(&entry.session);
            }
            if entries.len() >= MAX_SESSIONS {
                ended = make_room(&mut entries);
            }
            let session = Arc::new(Mutex::new(Session {
                owner: engine.new_owner(),
                result: None,
                lookup: None,
                prefetch: None,
                hashes: Vec::new(),
                hashed: None,
                trace: self.traces.session(&id.request),
                kept: Arc::clone(&self.kept),
            }));
            entries.insert(
                id,
                Entry {
                    session: Arc::clone(&session),
                    last_used: now,
                },
            );
            session
        };
        end_all(ended, engine);
        session
    }

    pub(crate) fn get(&self, id: &SessionId) -> Option<Arc<Mutex<Session>>> {
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(id)?;
        entry.last_used = Instant::now();
        Some(Arc::clone(&entry.session))
    }

    pub(crate) fn remove(&self, id: &SessionId) -> Option<Arc<Mutex<Session>>> {
        self.entries.lock().remove(id).map(|entry| entry.session)
    }

    /// Ends all sessions of a realm; returns how many.
    pub(crate) fn end_realm(&self, realm: &Realm, engine: &CacheEngine) -> usize {
        let mut ended = Vec::new();
        self.entries.lock().retain(|id, entry| {
            let stays = id.realm != *realm;
            if !stays {
                ended.push(Arc::clone(&entry.session));
            }
            stays
        });
        let count = ended.len();
        end_all(ended, engine);
        count
    }

    /// Ends sessions that were idle for `ttl`; returns how many.
    pub(crate) fn reap(&self, ttl: Duration, engine: &CacheEngine) -> usize {
        let now = Instant::now();
        let mut ended = Vec::new();
        {
            let mut entries = self.entries.lock();
            entries.retain(|_, entry| {
                let is_live = now.saturating_duration_since(entry.last_used) < ttl;
                if !is_live {
                    ended.push(Arc::clone(&entry.session));
                }
                is_live
            });
            // A burst of requests should not be remembered by the size of the table.
            if entries.capacity() > 1024 && entries.len() < entries.capacity() / 8 {
                entries.shrink_to_fit();
            }
        }
        let count = ended.len();
        end_all(ended, engine);
        count
    }

    /// Sessions, and how many of them hold a result that was not collected.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let sessions: Vec<_> = self
            .entries
            .lock()
            .values()
            .map(|entry| Arc::clone(&entry.session))
            .collect();
        let waiting = sessions.iter().filter(|session| {
            session
                .try_lock()
                .is_some_and(|session| session.result.is_some() || session.prefetch.is_some())
        });
        (sessions.len(), waiting.count())
    }
}

/// Takes out the idlest sixteenth of the sessions.
fn make_room(entries: &mut HashMap<SessionId, Entry>) -> Vec<Arc<Mutex<Session>>> {
    let mut by_age: Vec<(Instant, SessionId)> = entries
        .iter()
        .map(|(id, entry)| (entry.last_used, id.clone()))
        .collect();
    let count = (by_age.len() / 16).max(1).min(by_age.len());
    by_age.select_nth_unstable(count - 1);
    by_age.truncate(count);
    by_age
        .iter()
        .filter_map(|(_, id)| entries.remove(id))
        .map(|entry| entry.session)
        .collect()
}

fn end_all(sessions: Vec<Arc<Mutex<Session>>>, engine: &CacheEngine) {
    for session in sessions {
        engine.end_owner(session.lock().owner);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::num::NonZeroUsize;

    use stockade_cache::{Backing, EngineConfig, Prefault};

    use super::*;

    #[test]
    fn a_session_lives_as_long_as_it_is_used_however_old_it_is() {
        let config = EngineConfig {
            prefault: Prefault::Nothing,
            ..EngineConfig::new(4096, Backing::Private)
        };
        let engine = CacheEngine::open(config).unwrap();
        let sessions = Sessions::default();
        let id = |name: &str| SessionId::new(&Caller::internal(), &RequestId::from(name));
        for name in ["used", "found", "idle"] {
            sessions.get_or_create(id(name), &engine);
        }
        let ttl = Duration::from_secs(600);
        for entry in sessions.entries.lock().values_mut() {
            entry.last_used -= ttl; // An hour-old request looks the same.
        }
        sessions.get_or_create(id("used"), &engine);
        assert!(sessions.get(&id("found")).is_some());
        assert_eq!(sessions.reap(ttl, &engine), 1);
        assert!(sessions.get(&id("idle")).is_none());
        assert_eq!(sessions.counts().0, 2);
    }

    #[test]
    fn a_requests_tokens_are_hashed_once_and_more_of_them_only_as_they_come() {
        let config = EngineConfig {
            prefault: Prefault::Nothing,
            ..EngineConfig::new(4096, Backing::Private)
        };
        let engine = CacheEngine::open(config).unwrap();
        let hasher = TokenHasher::new(NonZeroUsize::new(4).unwrap());
        let sessions = Sessions::default();
        let id = SessionId::new(&Caller::internal(), &RequestId::from("r"));
        let session = sessions.get_or_create(id, &engine);
        let mut session = session.lock();
        let tokens = |count: u32| (0..count).collect::<TokenIds>();
        let fresh = |tokens: &TokenIds| {
            let mut hashes = Vec::new();
            hasher.chunk_hashes(tokens.as_be_bytes(), &mut hashes, usize::MAX);
            hashes
        };
        assert_eq!(
            session.chunk_hashes(&hasher, &tokens(17), 4),
            fresh(&tokens(17))
        );
        // A mark that hashing would wipe out.
        let marked = ChunkHash([9; 32]);
        session.hashes[0] = marked;
        assert_eq!(session.chunk_hashes(&hasher, &tokens(17), 4)[0], marked);
        assert_eq!(session.chunk_hashes(&hasher, &tokens(9), 2)[0], marked);
        let more = session.chunk_hashes(&hasher, &tokens(25), 6).to_vec();
        assert_eq!((more[0], more[5]), (marked, fresh(&tokens(25))[5]));
        // Other tokens are hashed anew.
        let others: TokenIds = (1..18).collect();
        assert_eq!(session.chunk_hashes(&hasher, &others, 4), fresh(&others));
        // Wherever the one token is that differs, in pieces compared one after the other.
        let long = 3 * BYTES_AT_A_TIME as u32 / TOKEN_BYTES as u32;
        let piece = long / 3;
        for place in [0, piece - 1, piece, 2 * piece - 1, long - 1] {
            let same = tokens(long);
            session.chunk_hashes(&hasher, &same, usize::MAX);
            session.hashes[0] = marked;
            let chunks = session.chunk_hashes(&hasher, &same, usize::MAX);
            assert_eq!(chunks[0], marked);
            let other: TokenIds = same
                .iter()
                .map(|token| token + 9 * u32::from(token == place))
                .collect();
            let chunks = session.chunk_hashes(&hasher, &other, usize::MAX);
            assert!(chunks == fresh(&other), "{place}");
        }
    }
}
