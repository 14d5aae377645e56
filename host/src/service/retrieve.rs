//! lookup, prefetch status, prepare_retrieve, commit_retrieve, free_lookup_locks and
//! end_session. Follows `modules/lookup.py` and `modules/server_transfer.py` of LMCache 0.5.6.

use std::{
    ops::Range,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use stockade_cache::{CacheSalt, KeyScope, ObjectKey, Slot};
use stockade_transport::{Frames, Peer};
use stockade_wire::{CacheKey, InstanceId, Request, RequestId, Response, pickle};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    Answer, DENIED_SALT, PROBE_TENANT, Service,
    hash_log::Record,
    sessions::{Lookup, Prefetch, Session, SessionId},
    store::{TransferRange, describe, object_keys},
    workers::{TransferKey, Worker},
};
use crate::tenancy::Caller;

impl Service {
    /// Finds the longest cached prefix and locks it for this request.
    ///
    /// The result waits under the request id for a status query; a second lookup of the
    /// same request gives the locks of the first one back.
    pub(super) fn lookup(&self, caller: &Caller, key: &CacheKey) -> Answer {
        let salt = self.salt(caller, "lookup", key)?;
        let id = SessionId::new(caller, &key.request_id);
        if key.model_name.contains('@') {
            return Err("model_name of key must not contain '@': rename the model".to_owned());
        }
        let Some((group, object_bytes)) =
            self.workers
                .object_group(caller.realm(), &key.model_name, key.world_size)
        else {
            self.forget_result(&id);
            self.metrics.early_exit("no_gpu_context");
            return Ok(Response::None);
        };
        let Ok(readers) =
            u32::try_from(key.num_kv_readers).and_then(std::num::NonZeroU32::try_from)
        else {
            self.forget_result(&id);
            return Err(format!(
                "num_kv_readers {} of key: say how many workers will read, at least 1",
                key.num_kv_readers
            ));
        };
        let chunk_size = self.hasher.chunk_size();
        let tokens = key
            .tokens
            .len()
            .min(usize::try_from(key.end).unwrap_or(usize::MAX));
        let chunks = tokens / chunk_size;
        if chunks == 0 {
            self.forget_result(&id);
            self.metrics.early_exit("empty_chunk_hashes");
            return Ok(Response::None);
        }
        let scopes: Arc<[Arc<KeyScope>]> = (0..key.world_size)
            .map(|rank| self.scope(key, rank, group, salt.clone()))
            .collect::<Result<_, _>>()?;

        let shared = self.sessions.get_or_create(id, &self.engine);
        let mut session = shared.lock();
        session.prefetch = None;
        if let Some(Lookup {
            lease: Some(lease), ..
        }) = session.lookup.take()
        {
            self.engine
                .release_prefix(session.owner, lease, 0..usize::MAX, u32::MAX);
        }
        let hashes = session.chunk_hashes(&self.hasher, &key.tokens, chunks);
        if let Some(log) = &self.hash_log
            && let Some(layout) =
                self.workers
                    .layout(caller.realm(), &key.model_name, key.world_size)
        {
            log.log(Record {
                request_id: Arc::from(&*key.request_id),
                model_name: Arc::clone(&key.model_name),
                chunk_tokens: chunk_size,
                tokens: key.tokens.len(),
                layout,
                hashes: hashes.to_vec(),
            });
        }
        let rows: Vec<Vec<ObjectKey>> = scopes
            .iter()
            .map(|scope| object_keys(scope, hashes))
            .collect();
        let found = self.engine.lock_prefix(session.owner, &rows, readers.get());
        if self.settings.coordinator.is_on() {
            let found = rows.iter().map(|row| row.iter().take(found.hit_chunks));
            self.settings
                .coordinator
                .used(found.flatten().cloned().collect());
        }
        if salt.as_str() != DENIED_SALT {
            let sums = self.tenancy.sums(&salt);
            sums.requested(chunks * chunk_size);
            if !key.request_configs.tags.is_empty() {
                let rules = self.tenancy.rules();
                let metered = &rules.hints(&salt).tags;
                for (name, value) in &key.request_configs.tags {
                    if metered.contains(&**name) {
                        sums.tagged(name, value, chunks * chunk_size);
                    }
                }
            }
        }
        session.lookup = Some(Lookup {
            lease: found.lease,
            hit_chunks: found.hit_chunks,
            readers: readers.get(),
            scopes,
            tokens: key.tokens.clone(),
        });
        if found.hit_chunks < chunks
            && ![PROBE_TENANT, DENIED_SALT].contains(&salt.as_str())
            && self.prefetch(&mut session, Arc::downgrade(&shared), rows, object_bytes)
        {
            session.result = None;
            return Ok(Response::None);
        }
        self.looked_up(
            &session,
            &key.request_id,
            chunks,
            found.hit_chunks,
            found.hit_chunks,
        );
        session.result = Some(found.hit_chunks);
        Ok(Response::None)
    }

    /// Tells all who want to know what a lookup of `requested` chunks came to.
    fn looked_up(
        &self,
        session: &Session,
        request_id: &RequestId,
        requested: usize,
        hit: usize,
        in_memory: usize,
    ) {
        let scope = session.lookup.as_ref().and_then(|it| it.scopes.first());
        let Some(scope) = scope else { return };
        let chunk_size = self.hasher.chunk_size();
        let (requested, hit) = (requested * chunk_size, hit * chunk_size);
        let (model, salt) = (&scope.model_name, &scope.cache_salt);
        self.metrics
            .looked_up(model, salt.as_str(), requested, hit, in_memory * chunk_size);
        if let Some(trace) = &session.trace {
            trace.looked_up(requested, hit);
        }
        if self.plugin_events.is_wanted() {
            self.plugin_events
                .looked_up(salt, model, request_id, requested, hit);
        }
    }

    /// Starts to load what memory lacks of a lookup; `false` if there is nothing to load from.
    ///
    /// The loading ends with the session's `prefetch`, and gives back what it held.
    fn prefetch(
        &self,
        session: &mut Session,
        shared: Weak<Mutex<Session>>,
        rows: Vec<Vec<ObjectKey>>,
        object_bytes: u64,
    ) -> bool {
        let (Some(tier), Some(lookup)) = (&self.tier, &session.lookup) else {
            return false;
        };
        let Ok(runtime) = Handle::try_current() else {
            return false;
        };
        if !tier.may_find() {
            return false;
        }
        let (tier, engine) = (Arc::clone(tier), Arc::clone(&self.engine));
        let (done, is_done) = watch::channel(false);
        let cancelled = CancellationToken::new();
        let hit = lookup.hit_chunks;
        session.prefetch = Some(Prefetch {
            done: is_done,
            cancel: cancelled.clone().drop_guard(),
            requested_chunks: rows.iter().map(Vec::len).min().unwrap_or(0),
            chunks_in_memory: hit,
        });
        runtime.spawn(async move {
            let loaded = tokio::select! {
                // A session that has ended is not worth loading for.
                biased;
                () = cancelled.cancelled() => return,
                loaded = tier.load_prefix(&rows, hit, object_bytes) => loaded,
            };
            let Some(shared) = shared.upgrade() else {
                return;
            };
            let mut session = shared.lock();
            // Dropped under the same lock, so that a lookup that came meanwhile is not mistaken.
            if cancelled.is_cancelled() {
                return;
            }
            let owner = session.owner;
            if let Some(lookup) = &mut session.lookup {
                let found = engine.renew_prefix(owner, lookup.lease, &rows, lookup.readers);
                lookup.lease = found.lease;
                lookup.hit_chunks = found.hit_chunks;
                session.result = Some(found.hit_chunks);
            }
            drop(session);
            drop(loaded);
            done.send_replace(true);
        });
        true
    }

    /// For a request that waits for a lookup that is not done: what tells that it is, and how long
    /// it may wait.
    pub(super) fn awaited_by(
        &self,
        peer: &Peer,
        frames: &Frames,
    ) -> Option<(watch::Receiver<bool>, Duration)> {
        let (_, request) = stockade_wire::decode(frames.clone(), &self.limits).ok()?;
        let Request::WaitPrefetchStatus {
            request_id,
            timeout,
        } = request
        else {
            return None;
        };
        let id = SessionId::new(&self.tenancy.caller(peer), &request_id);
        let session = self.sessions.get(&id)?;
        let session = session.lock();
        let prefetch = session.prefetch.as_ref()?;
        let done = prefetch.is_running().then(|| prefetch.done.clone())?;
        Some((done, timeout))
    }

    fn forget_result(&self, id: &SessionId) {
        if let Some(session) = self.sessions.get(id) {
            let mut session = session.lock();
            session.result = None;
            session.prefetch = None;
        }
    }

    /// The hit length of the request's lookup in chunks, exactly once; 0 for an unknown one, and
    /// nothing while the second tier is being asked.
    pub(super) fn prefetch_status(&self, caller: &Caller, request_id: &RequestId) -> Answer {
        let Some(session) = self.sessions.get(&SessionId::new(caller, request_id)) else {
            return Ok(Response::OptionalInt(Some(0)));
        };
        let mut session = session.lock();
        let result = session.result.take();
        if let Some(prefetch) = &session.prefetch
            && result.is_none()
            && prefetch.is_running()
        {
            return Ok(Response::OptionalInt(None));
        }
        if let Some(prefetch) = session.prefetch.take() {
            prefetch.cancel.disarm();
            self.looked_up(
                &session,
                request_id,
                prefetch.requested_chunks,
                result.unwrap_or(0),
                prefetch.chunks_in_memory,
            );
        }
        Ok(Response::OptionalInt(Some(result.unwrap_or(0) as i64)))
    }

    /// Turns the request's locks on the range into a read lease of the worker.
    pub(super) fn prepare_retrieve(
        &self,
        caller: &Caller,
        key: &CacheKey,
        instance_id: InstanceId,
    ) -> Answer {
        let worker = self.worker(caller, instance_id)?;
        let range = self.transfer_range(caller, "prepare_retrieve", key, &worker)?;
        let inline = !self.shares_memory(&worker) || worker.sends_inline();
        if !inline && let Some(pending) = worker.pending_read(&range.transfer) {
            return Ok(slots_reply(&worker, &pending.slots));
        }
        let Some((lease, slots)) = self.begin_read(caller, key, &worker, &range.transfer) else {
            self.metrics
                .read_failed(&worker.model_name, range.hashes.len());
            return Ok(miss());
        };
        let bytes = slots.iter().map(|slot| slot.length).sum();
        self.metrics
            .retrieve_began(&worker.model_name, range.salt(), slots.len(), bytes);
        self.tell_retrieved(key, &range, worker.layout.bytes);
        self.tenancy
            .sums(&range.transfer.scope.cache_salt)
            .served(slots.len() * self.hasher.chunk_size(), bytes);
        let began = Instant::now();
        if !inline {
            worker.put_read(
                range.transfer,
                lease,
                Arc::clone(&slots),
                self.settings.read_ttl,
            );
            return Ok(slots_reply(&worker, &slots));
        }
        let data = self.read_inline(&worker, lease, slots.len());
        self.engine.finish_read(worker.owner, lease);
        match data {
            Ok(data) => {
                self.metrics.retrieved(bytes, began.elapsed());
                Ok(Response::PrepareRetrieve {
                    success: true,
                    data,
                    slots: None,
                })
            }
            Err(problem) => {
                self.refused("prepare_retrieve", "data", &problem);
                Ok(miss())
            }
        }
    }

    pub(super) fn begin_read(
        &self,
        caller: &Caller,
        key: &CacheKey,
        worker: &Worker,
        transfer: &TransferKey,
    ) -> Option<(stockade_cache::LeaseId, Arc<[Slot]>)> {
        let session = self
            .sessions
            .get(&SessionId::new(caller, &key.request_id))?;
        let session = session.lock();
        let lookup = session.lookup.as_ref()?;
        let row = lookup
            .scopes
            .iter()
            .position(|scope| *scope == transfer.scope)?;
        let bytes = transfer
            .chunks
            .end
            .checked_mul(self.hasher.chunk_size())?
            .checked_mul(4)?;
        // Equal tokens up to the end of the range mean equal hashes, all the way.
        let (held, asked) = (lookup.tokens.as_be_bytes(), key.tokens.as_be_bytes());
        if transfer.chunks.end > lookup.hit_chunks || held.get(..bytes)? != asked.get(..bytes)? {
            return None;
        }
        let read = self.engine.begin_read(
            session.owner,
            lookup.lease?,
            worker.owner,
            row,
            transfer.chunks.clone(),
        )?;
        if read
            .slots
            .iter()
            .any(|slot| slot.length != worker.layout.bytes)
        {
            self.engine.finish_read(worker.owner, read.lease);
            return None;
        }
        Some((read.lease, read.slots.into()))
    }

    /// Copies the objects of a read lease out and pickles them.
    fn read_inline(
        &self,
        worker: &Worker,
        lease: stockade_cache::LeaseId,
        count: usize,
    ) -> Result<Bytes, String> {
        let mut bytes = Vec::new();
        for index in 0..count {
            self.engine
                .read(worker.owner, lease, index, &mut bytes)
                .map_err(|error| error.to_string())?;
        }
        let length = usize::try_from(worker.layout.bytes).map_err(|error| error.to_string())?;
        let tensors: Vec<_> = bytes
            .chunks_exact(length)
            .map(|bytes| {
                (
                    worker.layout.first.dtype,
                    &*worker.layout.first.shape,
                    bytes,
                )
            })
            .collect();
        pickle::write_tensors(&tensors)
            .map(Bytes::from)
            .map_err(|error| error.to_string())
    }

    /// Ends the read lease of the range; true also when there is none, as in LMCache.
    pub(super) fn commit_retrieve(
        &self,
        caller: &Caller,
        key: &CacheKey,
        instance_id: InstanceId,
    ) -> Answer {
        let worker = self.worker(caller, instance_id)?;
        let range = self.transfer_range(caller, "commit_retrieve", key, &worker)?;
        let Some(pending) = worker.take_read(&range.transfer) else {
            return Ok(Response::Bool(true));
        };
        let bytes = pending.slots.iter().map(|slot| slot.length).sum();
        self.metrics.retrieved(bytes, pending.began.elapsed());
        // A lease that ended before its time means that the bytes may have changed under the
        // reader, which must not use them.
        Ok(Response::Bool(
            self.engine.finish_read(worker.owner, pending.lease),
        ))
    }

    /// Gives back the request's locks on `[start, end)`.
    pub(super) fn free_lookup_locks(&self, caller: &Caller, key: &CacheKey) -> Answer {
        let chunk_size = self.hasher.chunk_size() as u64;
        if key.start >= key.end {
            return Ok(Response::None);
        }
        let id = SessionId::new(caller, &key.request_id);
        let Some(session) = self.sessions.get(&id) else {
            return Ok(Response::None);
        };
        let mut session = session.lock();
        if session.prefetch.as_ref().is_some_and(Prefetch::is_running) {
            // As in LMCache: its locks are not taken yet, and go with the session.
            return Ok(Response::None);
        }
        session.result = None;
        session.prefetch = None;
        let Some(lookup) = &session.lookup else {
            return Ok(Response::None);
        };
        if let Some(lease) = lookup.lease {
            let chunk = |tokens: u64| usize::try_from(tokens / chunk_size).unwrap_or(usize::MAX);
            let chunks: Range<usize> = chunk(key.start)..chunk(key.end);
            let readers = u32::try_from(key.num_kv_readers)
                .ok()
                .filter(|&it| it > 0)
                .unwrap_or(lookup.readers);
            self.engine
                .release_prefix(session.owner, lease, chunks, readers);
        }
        Ok(Response::None)
    }

    /// Tells plugins that a worker was given the chunks of a range.
    pub(super) fn tell_retrieved(&self, key: &CacheKey, range: &TransferRange, bytes: u64) {
        if self.plugin_events.is_wanted() {
            let keys = object_keys(&range.transfer.scope, &range.hashes);
            self.plugin_events
                .retrieved(keys.into_iter(), bytes, &key.request_id);
        }
    }

    /// Ends a request: its chunks count as used, and its locks are given back.
    ///
    /// LMCache leaves unreleased locks to their TTL here; a read that a worker has begun
    /// has a lease of its own and is not disturbed.
    pub(super) fn end_session(&self, caller: &Caller, request_id: &RequestId) -> Answer {
        let id = SessionId::new(caller, request_id);
        let Some(session) = self.sessions.remove(&id) else {
            return Ok(Response::None);
        };
        let mut session = session.lock();
        session.prefetch = None;
        if let Some(lookup) = &session.lookup {
            for scope in lookup.scopes.iter() {
                self.engine.touch_for(
                    &object_keys(scope, session.known_hashes()),
                    Some(request_id),
                );
            }
        }
        if self.plugin_events.is_wanted() {
            let scope = session.lookup.as_ref().and_then(|it| it.scopes.first());
            let (salt, model) = match scope {
                Some(scope) => (scope.cache_salt.clone(), Arc::clone(&scope.model_name)),
                None => (
                    caller.salt(&CacheSalt::default()).unwrap_or_default(),
                    "".into(),
                ),
            };
            self.plugin_events.session_ended(&salt, &model, request_id);
        }
        self.engine.end_owner(session.owner);
        Ok(Response::None)
    }
}

/// Nothing there, as `prepare_retrieve` says it.
pub(super) fn miss() -> Response {
    Response::PrepareRetrieve {
        success: false,
        data: Bytes::new(),
        slots: None,
    }
}

fn slots_reply(worker: &Worker, slots: &[Slot]) -> Response {
    let slots = slots.iter().map(|&slot| describe(worker, slot)).collect();
    Response::PrepareRetrieve {
        success: true,
        data: Bytes::new(),
        slots: Some(slots),
    }
}
