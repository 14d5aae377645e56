//! prepare_store and commit_store. Follows `modules/engine_driven_transfer.py` and
//! `modules/server_transfer.py` of LMCache 0.5.6.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use stockade_cache::{ChunkHash, KeyScope, LeaseId, ObjectKey, ReserveError, Slot};
use stockade_transport::Peer;
use stockade_wire::{CacheKey, InstanceId, Response, SlotDescriptor, StoreSlot, pickle};

use super::{
    Answer, DENIED_SALT, PROBE_TENANT, Service,
    hints::{HOLDER, Hints},
    workers::{TransferKey, Worker, WorkerId},
};
use crate::tenancy::Caller;

impl Service {
    /// Reserves a slot for each chunk of the range that is not cached and not being stored.
    ///
    /// Empty slots mean "nothing to store", which is also the answer when the pool is full:
    /// the engine goes on without storing, and the failure is counted.
    ///
    /// A worker that outlived its registration gets a context without slots: its commit is
    /// then declined and its next ping makes it register again. An error would end its engine.
    pub(super) fn prepare_store(
        &self,
        caller: &Caller,
        peer: &Peer,
        key: &CacheKey,
        instance_id: InstanceId,
    ) -> Answer {
        let id = WorkerId::new(caller, instance_id);
        if self.workers.get(&id).is_none() && (self.lapsed.note(&id) || self.is_survivor(peer)) {
            self.refused(
                "prepare_store",
                "instance_id",
                &format!("{instance_id} has outlived its registration, nothing is stored until it registers again"),
            );
            return Ok(Response::PrepareStore(None));
        }
        let worker = self.worker(caller, instance_id)?;
        let range = self.transfer_range(caller, "prepare_store", key, &worker)?;
        if !self.shares_memory(&worker) {
            return Ok(Response::PrepareStore(None));
        }
        let hints = self.hints(key, &range);
        if range.is_denied() || hints.skip_save {
            return Ok(self.slots_reply(&worker, &[]));
        }
        if let Some(pending) = worker.pending_store(&range.transfer) {
            // A repeated request gets what its first one reserved, not a lock-out by itself.
            return Ok(self.slots_reply(&worker, &pending.slots));
        }
        match self
            .engine
            .reserve(worker.owner, &range.keys(), worker.layout.bytes)
        {
            Ok(reservation) => {
                let slots: Arc<[(usize, Slot)]> = reservation.slots.into();
                if let Some(lease) = reservation.lease {
                    self.metrics.store_began();
                    let ttl = self.settings.write_ttl;
                    worker.put_store(range.transfer, lease, Arc::clone(&slots), ttl);
                }
                Ok(self.slots_reply(&worker, &slots))
            }
            Err(ReserveError::PoolFull { .. } | ReserveError::CapReached { .. }) => {
                self.metrics
                    .allocation_failed(&worker.model_name, range.hashes.len());
                Ok(self.slots_reply(&worker, &[]))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// What the request asks for, within what its tenant may.
    pub(super) fn hints(&self, key: &CacheKey, range: &TransferRange) -> Hints {
        let rules = self.tenancy.rules();
        let rules = rules.hints(&range.transfer.scope.cache_salt);
        Hints::of(&key.request_configs, rules)
    }

    fn slots_reply(&self, worker: &Worker, slots: &[(usize, Slot)]) -> Response {
        let described = slots.iter().map(|&(index, slot)| StoreSlot {
            chunk_index: index as u64,
            slot: describe(worker, slot),
        });
        Response::PrepareStore(Some(described.collect()))
    }

    /// Publishes what the worker wrote to its slots, or what came inline as a pickle.
    pub(super) fn commit_store(
        &self,
        caller: &Caller,
        key: &CacheKey,
        instance_id: InstanceId,
        data: &Bytes,
    ) -> Answer {
        let worker = self.worker(caller, instance_id)?;
        let range = self.transfer_range(caller, "commit_store", key, &worker)?;
        if range.is_denied() {
            return Ok(Response::Bool(false));
        }
        let hints = self.hints(key, &range);
        if hints.skip_save {
            // Done as asked. What was prepared without the hint is taken back.
            if let Some(pending) = worker.take_store(&range.transfer) {
                let _ = self.engine.abort(worker.owner, pending.lease);
            }
            return Ok(Response::Bool(true));
        }
        let pending = worker.take_store(&range.transfer);
        let began = pending.as_ref().map_or(Instant::now(), |it| it.began);
        let (lease, slots) = if data.is_empty() {
            match pending {
                Some(pending) => (pending.lease, pending.slots),
                None => return Ok(Response::Bool(false)),
            }
        } else {
            worker.note_inline();
            if pending.is_none() {
                self.metrics.store_began();
            }
            match self.write_inline(
                &worker,
                &range,
                pending.map(|it| (it.lease, it.slots)),
                data,
            ) {
                Ok(Some(written)) => written,
                Ok(None) => return Ok(Response::Bool(true)),
                Err(problem) => {
                    self.refused("commit_store", "data", &problem);
                    return Ok(Response::Bool(false));
                }
            }
        };
        let is_stored = self.publish(
            caller,
            "commit_store",
            key,
            &worker,
            &range,
            lease,
            &slots,
            began,
        );
        Ok(Response::Bool(is_stored))
    }

    /// Makes what a lease's slots hold readable and announces it; `false`, after counting and
    /// logging why, if not all of it can be.
    #[expect(clippy::too_many_arguments, reason = "all that is known of one store")]
    pub(super) fn publish(
        &self,
        caller: &Caller,
        operation: &'static str,
        key: &CacheKey,
        worker: &Worker,
        range: &TransferRange,
        lease: LeaseId,
        slots: &[(usize, Slot)],
        began: Instant,
    ) -> bool {
        let hints = self.hints(key, range);
        let ends = match hints.ttl {
            Some(ttl) if self.expiry.has_room(slots.len()) => Some(Instant::now() + ttl),
            Some(_) => {
                let _ = self.engine.abort(worker.owner, lease);
                let problem = "too many objects wait for the end of their time already";
                self.refused(operation, "lmcache.ttl", problem);
                return false;
            }
            None => None,
        };
        let stored = || {
            let hashes: Vec<_> = slots.iter().map(|&(index, _)| range.hash(index)).collect();
            object_keys(&range.transfer.scope, &hashes)
        };
        if !self.expiry.is_empty() {
            // The objects are new, whatever was said of former ones.
            self.expiry.cancel(&stored());
        }
        let realm = caller.realm();
        self.events
            .stored(realm, key, self.hasher.chunk_size(), range, slots);
        let committed = self
            .engine
            .commit_for(worker.owner, lease, Some(&key.request_id));
        let (field, problem) = match committed {
            Ok(committed) if committed.discarded > 0 => {
                let problem = format!("{} chunks were not written in full", committed.discarded);
                ("data", problem)
            }
            Ok(_) => {
                if ends.is_some() || hints.keep.is_some() {
                    let keys = stored();
                    if let Some(time) = hints.keep {
                        // Too many kept objects: these are like any others.
                        let _ = self.engine.keep(&keys, HOLDER, time);
                    }
                    if let Some(ends) = ends {
                        self.expiry.note(keys, ends);
                    }
                }
                // Waking the maintenance takes time that the reply waits for, and a core.
                if self.engine.wants_maintenance() {
                    self.stored.notify_one();
                }
                let bytes = slots.iter().map(|(_, slot)| slot.length).sum();
                let salt = &range.transfer.scope.cache_salt;
                self.tenancy.sums(salt).stored(bytes);
                self.metrics
                    .stored(range.salt(), slots.len(), bytes, began.elapsed());
                self.write_down(range, slots);
                return true;
            }
            Err(error) => ("lease", error.to_string()),
        };
        let hashes = slots.iter().map(|&(index, _)| range.hash(index));
        let salt = &range.transfer.scope.cache_salt;
        self.events
            .withdrawn(realm, salt, &worker.model_name, hashes);
        self.refused(operation, field, &problem);
        false
    }

    /// Hands what was committed to the second tier; it has no use for the probe's.
    fn write_down(&self, range: &TransferRange, slots: &[(usize, Slot)]) {
        let scope = &range.transfer.scope;
        if let Some(tier) = &self.tier
            && let Some((_, slot)) = slots.first()
            && ![PROBE_TENANT, DENIED_SALT].contains(&scope.cache_salt.as_str())
        {
            let key = |&(index, _): &_| ObjectKey::new(Arc::clone(scope), range.hash(index));
            tier.stored(slots.iter().map(key), slot.length);
        }
    }

    /// Copies pickled tensors into slots, reserving them if no prepare did.
    ///
    /// `None` if every chunk is cached already. On an error nothing stays reserved.
    #[expect(clippy::type_complexity, reason = "a lease and its slots, used once")]
    fn write_inline(
        &self,
        worker: &Worker,
        range: &TransferRange,
        pending: Option<(LeaseId, Arc<[(usize, Slot)]>)>,
        data: &Bytes,
    ) -> Result<Option<(LeaseId, Arc<[(usize, Slot)]>)>, String> {
        let tensors = pickle::read_tensors(data).map_err(|error| error.to_string());
        let (lease, slots) = match pending {
            Some(pending) => pending,
            None => {
                // Before anything is reserved, so that a bad pickle cannot evict anybody.
                if let Err(problem) = &tensors {
                    return Err(problem.clone());
                }
                let reservation = self
                    .engine
                    .reserve(worker.owner, &range.keys(), worker.layout.bytes)
                    .map_err(|error| {
                        self.metrics
                            .allocation_failed(&worker.model_name, range.hashes.len());
                        error.to_string()
                    })?;
                match reservation.lease {
                    Some(lease) => (lease, reservation.slots.into()),
                    None => return Ok(None),
                }
            }
        };
        let copy = || -> Result<(), String> {
            let tensors = tensors?;
            for &(index, _) in slots.iter() {
                let tensor = tensors.get(index).ok_or_else(|| {
                    format!(
                        "tensor {index} of the range is missing, {} were sent",
                        tensors.len()
                    )
                })?;
                if tensor.dtype != worker.layout.first.dtype
                    || *tensor.shape != *worker.layout.first.shape
                {
                    return Err(format!(
                        "tensor {index} is {}{:?} but the worker registered {}{:?}",
                        tensor.dtype.torch_name(),
                        tensor.shape,
                        worker.layout.first.dtype.torch_name(),
                        worker.layout.first.shape,
                    ));
                }
                self.engine
                    .write(worker.owner, lease, index, &mut tensor.parts())
                    .map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        match copy() {
            Ok(()) => Ok(Some((lease, slots))),
            Err(problem) => {
                // An ended lease has given its slots back already.
                let _ = self.engine.abort(worker.owner, lease);
                Err(problem)
            }
        }
    }
}

/// A slot as the wire shows it.
pub(super) fn describe(worker: &Worker, slot: Slot) -> SlotDescriptor {
    SlotDescriptor {
        offset: slot.offset,
        length: slot.length,
        shape: Arc::clone(&worker.layout.first.shape),
        dtype: worker.layout.first.dtype,
    }
}

/// The part of a key that a worker transfers: aligned chunks of one rank.
pub(super) struct TransferRange {
    pub(super) transfer: TransferKey,
    /// One hash per chunk of the range.
    pub(super) hashes: Vec<ChunkHash>,
    /// Hash of the chunk before the range.
    pub(super) parent: Option<ChunkHash>,
}

impl TransferRange {
    /// The salt that the objects are under.
    pub(super) fn salt(&self) -> &str {
        self.transfer.scope.cache_salt.as_str()
    }

    /// Whether the salt was not the caller's. Nothing is ever stored then.
    pub(super) fn is_denied(&self) -> bool {
        self.salt() == DENIED_SALT
    }

    pub(super) fn hash(&self, index: usize) -> ChunkHash {
        self.hashes[index]
    }

    pub(super) fn keys(&self) -> Vec<ObjectKey> {
        object_keys(&self.transfer.scope, &self.hashes)
    }
}

/// The keys of one rank's chunks.
pub(super) fn object_keys(scope: &Arc<KeyScope>, hashes: &[ChunkHash]) -> Vec<ObjectKey> {
    let key = |&hash| ObjectKey::new(Arc::clone(scope), hash);
    hashes.iter().map(key).collect()
}
