//! register_kv_cache, store and retrieve of engines whose KV cache is in shared memory of this
//! machine: the server copies, not the engine. Follows `modules/lmcache_driven_transfer.py` of
//! LMCache 0.5.6, with what it leaves out: whose memory a client may name. The user at the other
//! end of the connection must be known, own the segments, and be the one who registered them.

mod copy;
mod layout;
mod segment;

use std::{sync::Arc, time::Instant};

use stockade_cache::{ObjectKey, ReserveError};
use stockade_transport::Peer;
use stockade_wire::{CacheKey, InstanceId, KvCacheRegistration, Operation, Response};

use self::{
    copy::{Blocks, CopyError},
    layout::PagedLayout,
    segment::{OpenSegments, Segment},
};
use super::{
    Answer, Service,
    sessions::SessionId,
    store::TransferRange,
    workers::{ChunkLayout, LayoutPart, Registration, Sender, Worker, WorkerId},
};
use crate::tenancy::Caller;

/// The way out that every engine has.
pub(super) const ENGINE_DRIVEN: &str = "set lmcache.mp.mp_transfer_mode to engine_driven, or LMCACHE_MP_TRANSFER_MODE=engine_driven in the engine's environment";

/// A worker and its memory.
type Registered = (Arc<Worker>, Arc<PagedCache>);

/// What stands for the event of a device with no queue of work: `StubEvent` of LMCache's
/// `devices/cpu/stub_cpu_device.py`, done when the reply is there.
const EVENT_HANDLE: &[u8] = b"stub_ipc_handle";

/// The user that unmapped ones of other user namespaces are shown as: never the same one for sure.
const OVERFLOW_USER_FILE: &str = "/proc/sys/kernel/overflowuid";
const OVERFLOW_USER: u32 = 65_534;

/// Which operations wait for files or copy much, and so have a thread of their own.
pub(super) fn is_slow(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::RegisterKvCache
            | Operation::RegisterKvCacheEngineDrivenContext
            | Operation::UnregisterKvCache
            | Operation::Store
            | Operation::Retrieve
    )
}

/// Which of them hold a chunk in memory.
pub(super) fn copies(operation: Operation) -> bool {
    matches!(operation, Operation::Store | Operation::Retrieve)
}

/// What the path keeps beside the registrations.
pub(super) struct Copies {
    segments: OpenSegments,
    overflow_user: u32,
}

impl Default for Copies {
    fn default() -> Self {
        let overflow_user = std::fs::read_to_string(OVERFLOW_USER_FILE)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        Self {
            segments: OpenSegments::default(),
            overflow_user: overflow_user.unwrap_or(OVERFLOW_USER),
        }
    }
}

/// A registered KV cache of an engine.
#[derive(Debug)]
pub(super) struct PagedCache {
    layout: PagedLayout,
    /// In the order of the layout's.
    segments: Vec<Segment>,
    /// Who registered it.
    user: u32,
}

impl PagedCache {
    /// Whether this is the same memory of the same user in the same layout.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let identities =
            |it: &Self| -> Vec<_> { it.segments.iter().map(Segment::identity).collect() };
        self.user == other.user
            && self.layout == other.layout
            && identities(self) == identities(other)
    }

    /// The `kv_cache_layout` of LMCache's `/status`.
    pub(super) fn report(&self) -> serde_json::Value {
        self.layout.report()
    }
}

fn transferred(success: bool) -> Response {
    Response::Transferred {
        event_handle: EVENT_HANDLE.into(),
        success,
    }
}

impl Service {
    /// The user of a peer, if it is one that can be told from others.
    fn user_of(&self, peer: &Peer) -> Result<u32, String> {
        peer.local_user()
            .filter(|&user| user != self.copies.overflow_user)
            .ok_or_else(|| {
                format!(
                    "{} is not known to be a process of this machine, and the server copies only for such: {ENGINE_DRIVEN}",
                    peer.address()
                )
            })
    }

    /// Whether the peer may use, replace or end this registration.
    ///
    /// Instance ids are process ids, so anybody can guess one.
    pub(super) fn check_user(&self, peer: &Peer, worker: &Worker) -> Result<(), String> {
        match &worker.paged {
            Some(paged) if self.user_of(peer)? != paged.user => Err(format!(
                "instance_id {} was registered by another user",
                worker.id
            )),
            _ => Ok(()),
        }
    }

    /// Opens a worker's KV cache for copying.
    pub(super) fn register_kv_cache(
        &self,
        caller: &Caller,
        peer: &Peer,
        registration: &KvCacheRegistration,
    ) -> Answer {
        self.check_standing(caller, peer)?;
        let layout = PagedLayout::of(registration, self.hasher.chunk_size())?;
        let user = self.user_of(peer)?;
        let id = WorkerId::new(caller, registration.instance_id);
        let known = self.workers.get(&id);
        if let Some(known) = &known {
            self.check_user(peer, known)?;
        }
        let pool = self.engine.shm_name();
        let open =
            |(name, bytes): &(Arc<str>, u64)| self.copies.segments.open(name, *bytes, user, pool);
        let segments = layout.segments.iter().map(open).collect::<Result<_, _>>()?;
        let mut parts = layout
            .parts()
            .map(|(shape, dtype, kept_blocks)| LayoutPart {
                shape: shape.into(),
                dtype,
                kept_blocks,
            });
        let first = parts
            .next()
            .ok_or("engine_group_infos names no layer of kv_cache")?;
        let chunk_layout = ChunkLayout {
            first,
            rest: parts.collect(),
            bytes: layout.chunk_bytes as u64,
        };
        let (block_size, use_mla) = layout.first_block();
        let registered = Registration {
            id,
            model_name: Arc::clone(&registration.model_name),
            world_size: registration.world_size,
            block_size: u32::try_from(block_size).unwrap_or(u32::MAX),
            use_mla,
            layout: chunk_layout,
            has_segment: false,
            paged: Some(Arc::new(PagedCache {
                layout,
                segments,
                user,
            })),
        };
        self.add_worker(registered, Sender::of(peer))?;
        Ok(Response::None)
    }

    /// Ends such a registration; unknown ones are acknowledged.
    pub(super) fn unregister_kv_cache(
        &self,
        caller: &Caller,
        peer: &Peer,
        instance_id: InstanceId,
    ) -> Answer {
        let id = WorkerId::new(caller, instance_id);
        let Some(worker) = self.workers.get(&id) else {
            return Ok(Response::None);
        };
        if worker.paged.is_none() {
            return Ok(Response::None);
        }
        self.check_user(peer, &worker)?;
        self.end_registration(&id)
    }

    /// The worker of a transfer and its memory; `None` if it is not registered.
    fn paged_worker(
        &self,
        caller: &Caller,
        peer: &Peer,
        instance_id: InstanceId,
    ) -> Result<Option<Registered>, String> {
        let id = WorkerId::new(caller, instance_id);
        let Some(worker) = self.workers.get(&id) else {
            self.lapsed.note(&id);
            return Ok(None);
        };
        let Some(paged) = worker.paged.clone() else {
            return Err(format!(
                "instance_id {instance_id} is registered for the engine-driven path: register_kv_cache first"
            ));
        };
        self.check_user(peer, &worker)?;
        worker.touch();
        Ok(Some((worker, paged)))
    }

    /// Copies the range's chunks that are not cached out of the engine's blocks.
    ///
    /// True when all of them are stored, by this call or another one. LMCache also says so when
    /// the pool is full.
    pub(super) fn store(
        &self,
        caller: &Caller,
        peer: &Peer,
        key: &CacheKey,
        instance_id: InstanceId,
        block_ids: &[Vec<i64>],
        deadline: Instant,
    ) -> Answer {
        let Some((worker, paged)) = self.paged_worker(caller, peer, instance_id)? else {
            self.refused("store", "instance_id", &not_registered(instance_id));
            return Ok(not_done());
        };
        let range = self.transfer_range(caller, "store", key, &worker)?;
        if range.is_denied() {
            return Ok(transferred(false));
        }
        if self.hints(key, &range).skip_save {
            // Done as asked.
            return Ok(transferred(true));
        }
        let chunks = range.hashes.len();
        let blocks = Blocks::of(
            &paged.layout,
            &paged.segments,
            block_ids,
            chunks,
            self.settings.null_block_id,
        );
        let is_over = || Instant::now() >= deadline || worker.has_ended();
        let stored = blocks
            .map_err(|error| error.to_string())
            .and_then(|blocks| self.store_blocks(caller, key, &worker, &range, &blocks, &is_over));
        if let Err(problem) = &stored {
            self.refused("store", "block_ids", problem);
        }
        Ok(transferred(stored.unwrap_or(false)))
    }

    fn store_blocks(
        &self,
        caller: &Caller,
        key: &CacheKey,
        worker: &Worker,
        range: &TransferRange,
        blocks: &Blocks<'_>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<bool, String> {
        let began = Instant::now();
        let all = range.keys();
        let (wanted, keys): (Vec<usize>, Vec<ObjectKey>) = all
            .into_iter()
            .enumerate()
            .filter(|&(chunk, _)| !blocks.is_null(chunk))
            .unzip();
        let reserved = self
            .engine
            .reserve(worker.owner, &keys, worker.layout.bytes);
        let reservation = reserved.map_err(|error| {
            if let ReserveError::PoolFull { .. } | ReserveError::CapReached { .. } = error {
                self.metrics
                    .allocation_failed(&worker.model_name, keys.len());
            }
            error.to_string()
        })?;
        let Some(lease) = reservation.lease else {
            return Ok(true);
        };
        self.metrics.store_began();
        let mut bytes = Vec::new();
        let mut slots = Vec::with_capacity(reservation.slots.len());
        for (index, slot) in reservation.slots {
            let chunk = wanted.get(index).copied().unwrap_or_default();
            let copied = blocks
                .gather(chunk, &mut bytes, is_over)
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    let mut parts = std::iter::once(bytes.as_slice());
                    let written = self.engine.write(worker.owner, lease, index, &mut parts);
                    written.map_err(|error| error.to_string())
                });
            if let Err(problem) = copied {
                // An ended lease has given its slots back already.
                let _ = self.engine.abort(worker.owner, lease);
                return Err(problem);
            }
            slots.push((chunk, slot));
        }
        Ok(self.publish(caller, "store", key, worker, range, lease, &slots, began))
    }

    /// Copies chunks that the request's lookup has locked into the engine's blocks, and gives
    /// those locks back whatever becomes of it.
    #[expect(clippy::too_many_arguments, reason = "the payloads and who sent them")]
    pub(super) fn retrieve(
        &self,
        caller: &Caller,
        peer: &Peer,
        key: &CacheKey,
        instance_id: InstanceId,
        block_ids: &[Vec<i64>],
        skip_tokens: u64,
        deadline: Instant,
    ) -> Answer {
        let Some((worker, paged)) = self.paged_worker(caller, peer, instance_id)? else {
            self.refused("retrieve", "instance_id", &not_registered(instance_id));
            self.release_unread(caller, key);
            return Ok(not_done());
        };
        let range = self.transfer_range(caller, "retrieve", key, &worker)?;
        let Some((lease, slots)) = self.begin_read(caller, key, &worker, &range.transfer) else {
            self.metrics
                .read_failed(&worker.model_name, range.hashes.len());
            return Ok(transferred(range.hashes.is_empty()));
        };
        let began = Instant::now();
        let length = slots.iter().map(|slot| slot.length).sum();
        self.metrics
            .retrieve_began(&worker.model_name, range.salt(), slots.len(), length);
        self.tell_retrieved(key, &range, worker.layout.bytes);
        let is_over = || Instant::now() >= deadline || worker.has_ended();
        let copy = || -> Result<(), String> {
            let shown = |error: CopyError| error.to_string();
            let blocks = Blocks::of(
                &paged.layout,
                &paged.segments,
                block_ids,
                slots.len(),
                self.settings.null_block_id,
            );
            let blocks = blocks.map_err(shown)?;
            let mut bytes = Vec::new();
            for chunk in 0..slots.len() {
                bytes.clear();
                let read = self.engine.read(worker.owner, lease, chunk, &mut bytes);
                read.map_err(|error| error.to_string())?;
                let copied = blocks.scatter(chunk, &bytes, skip_tokens, &is_over);
                copied.map_err(shown)?;
            }
            Ok(())
        };
        let copied = copy();
        self.engine.finish_read(worker.owner, lease);
        match &copied {
            Ok(()) => self.metrics.retrieved(length, began.elapsed()),
            Err(problem) => self.refused("retrieve", "block_ids", problem),
        }
        Ok(transferred(copied.is_ok()))
    }

    /// Gives the locks back that a retrieve would have used up, one per chunk of its rank.
    fn release_unread(&self, caller: &Caller, key: &CacheKey) {
        let chunk = |tokens: u64| usize::try_from(tokens / self.hasher.chunk_size() as u64).ok();
        let Some(session) = self.sessions.get(&SessionId::new(caller, &key.request_id)) else {
            return;
        };
        let session = session.lock();
        if let (Some(lookup), Some(rank), Some(start), Some(end)) = (
            &session.lookup,
            key.worker_id,
            chunk(key.start),
            chunk(key.end),
        ) && let Some(lease) = lookup.lease
        {
            let nobody = self.engine.new_owner();
            self.engine
                .begin_read(session.owner, lease, nobody, rank as usize, start..end);
            self.engine.end_owner(nobody);
        }
    }
}

fn not_registered(instance_id: InstanceId) -> String {
    format!("{instance_id} is not registered, or was reaped: register it again")
}

/// Nothing was copied, and there is nothing to wait for.
pub(super) const fn not_done() -> Response {
    Response::Transferred {
        event_handle: bytes::Bytes::new(),
        success: false,
    }
}
