//! Registrations of engine workers, and what each of them has in transfer.

use std::{
    collections::HashMap,
    hash::Hash,
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use stockade_cache::{ChunkHash, KeyScope, LeaseId, OwnerId, Slot};
use stockade_wire::{Dtype, InstanceId, RegisterContext};

use super::lmcache_driven::PagedCache;
use crate::tenancy::{Caller, Realm};

/// Most registrations at once; a fleet of engines on one machine has a few hundred workers.
const MAX_WORKERS: usize = 16_384;

/// The KV of layers of one shape within a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct LayoutPart {
    /// `[2, layers, slots, hidden]`, or `[layers, slots, hidden]` with MLA.
    pub(crate) shape: Arc<[u64]>,
    /// Element type.
    pub(crate) dtype: Dtype,
    /// Blocks of a chunk that are kept, of layers whose window is shorter than it.
    pub(crate) kept_blocks: Option<usize>,
}

/// How the KV of one chunk lies in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ChunkLayout {
    /// All there is, unless the server copies for an engine whose layers differ.
    pub(crate) first: LayoutPart,
    /// What follows it.
    pub(crate) rest: Arc<[LayoutPart]>,
    /// Bytes of one chunk of one rank.
    pub(crate) bytes: u64,
}

impl ChunkLayout {
    /// Objects of one model in different layouts must not be taken for each other, so the
    /// layout is a part of their keys. The number is kept beside values in the second tier, so
    /// it is the same in every server and release.
    fn object_group_id(&self) -> u32 {
        let mut hasher = blake3::Hasher::new();
        for part in std::iter::once(&self.first).chain(self.rest.iter()) {
            let (dtype, kept) = (part.dtype.torch_name(), part.kept_blocks);
            hasher.update(format!("{dtype}{:?}{kept:?};", part.shape).as_bytes());
        }
        let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
        u32::from_be_bytes([a, b, c, d])
    }
}

/// What one transfer is about: prepare and commit of the same range meet here.
///
/// The rolling hash of the last chunk stands for all tokens before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TransferKey {
    pub(crate) scope: Arc<KeyScope>,
    pub(crate) chunks: Range<usize>,
    pub(crate) last_hash: Option<ChunkHash>,
}

/// Slots a worker is filling: index into the range, and where.
#[derive(Debug, Clone)]
pub(crate) struct PendingStore {
    pub(crate) lease: LeaseId,
    pub(crate) slots: Arc<[(usize, Slot)]>,
    /// When the slots were handed out.
    pub(crate) began: Instant,
    deadline: Instant,
}

/// Slots a worker is reading.
#[derive(Debug, Clone)]
pub(crate) struct PendingRead {
    pub(crate) lease: LeaseId,
    pub(crate) slots: Arc<[Slot]>,
    /// When the slots were handed out.
    pub(crate) began: Instant,
    deadline: Instant,
}

#[derive(Debug)]
struct Activity {
    last_seen: Instant,
    has_pinged: bool,
    /// The worker sent KV inline although SHM is on: it cannot open the segment.
    sends_inline: bool,
    stores: HashMap<TransferKey, PendingStore>,
    reads: HashMap<TransferKey, PendingRead>,
    /// Connections it was heard on, newest last.
    peers: Vec<u64>,
    /// The process that registered it, where the connection told.
    process: Option<Arc<OwnedFd>>,
}

/// What names a worker: engines choose the numbers, so each tenant has numbers of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WorkerId {
    pub(crate) realm: Realm,
    pub(crate) instance: InstanceId,
}

impl WorkerId {
    pub(crate) fn new(caller: &Caller, instance: InstanceId) -> Self {
        Self {
            realm: caller.realm().clone(),
            instance,
        }
    }
}

impl std::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.realm.name() {
            "" => self.instance.fmt(f),
            tenant => write!(f, "{} of {tenant}", self.instance),
        }
    }
}

/// Where a registration came from.
#[derive(Debug)]
pub(crate) struct Sender {
    /// The connection.
    pub(crate) peer: u64,
    /// A pidfd of the process, on a local socket.
    pub(crate) process: Option<Arc<OwnedFd>>,
}

/// A worker on this machine whose connections have all closed.
#[derive(Debug)]
pub(crate) struct Orphan {
    id: WorkerId,
    owner: OwnerId,
    /// A pidfd of its process.
    pub(crate) process: Arc<OwnedFd>,
}

/// One registered worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) owner: OwnerId,
    pub(crate) model_name: Arc<str>,
    pub(crate) world_size: u32,
    pub(crate) block_size: u32,
    pub(crate) use_mla: bool,
    pub(crate) layout: ChunkLayout,
    /// Whether it was given the shared segment.
    pub(crate) has_segment: bool,
    /// Tells objects of this layout from those of another one of the same model.
    pub(crate) object_group_id: u32,
    /// Its KV cache, if the server copies for it.
    pub(crate) paged: Option<Arc<PagedCache>>,
    has_ended: AtomicBool,
    activity: Mutex<Activity>,
}

impl Worker {
    /// Whether its registration has ended, and its memory is not to be touched any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Marks the worker alive by a request of its own.
    pub(crate) fn touch(&self) {
        self.activity.lock().last_seen = Instant::now();
    }

    pub(crate) fn note_inline(&self) {
        self.activity.lock().sends_inline = true;
    }

    pub(crate) fn sends_inline(&self) -> bool {
        self.activity.lock().sends_inline
    }

    pub(crate) fn pending_store(&self, key: &TransferKey) -> Option<PendingStore> {
        self.activity.lock().stores.get(key).cloned()
    }

    pub(crate) fn take_store(&self, key: &TransferKey) -> Option<PendingStore> {
        self.activity.lock().stores.remove(key)
    }

    pub(crate) fn put_store(
        &self,
        key: TransferKey,
        lease: LeaseId,
        slots: Arc<[(usize, Slot)]>,
        ttl: Duration,
    ) {
        let began = Instant::now();
        let deadline = began + ttl;
        self.activity.lock().stores.insert(
            key,
            PendingStore {
                lease,
                slots,
                began,
                deadline,
            },
        );
    }

    pub(crate) fn pending_read(&self, key: &TransferKey) -> Option<PendingRead> {
        self.activity.lock().reads.get(key).cloned()
    }

    pub(crate) fn take_read(&self, key: &TransferKey) -> Option<PendingRead> {
        self.activity.lock().reads.remove(key)
    }

    pub(crate) fn put_read(
        &self,
        key: TransferKey,
        lease: LeaseId,
        slots: Arc<[Slot]>,
        ttl: Duration,
    ) {
        let began = Instant::now();
        let deadline = began + ttl;
        self.activity.lock().reads.insert(
            key,
            PendingRead {
                lease,
                slots,
                began,
                deadline,
            },
        );
    }

    /// Forgets transfers whose leases the engine has ended by now.
    fn forget_expired(&self, now: Instant) {
        let mut activity = self.activity.lock();
        activity.stores.retain(|_, pending| pending.deadline > now);
        activity.reads.retain(|_, pending| pending.deadline > now);
    }
}

/// An instance and the object group of its layout.
type Registered = (WorkerId, u32);

/// A model as one tenant's workers have it: another's layout of it must not matter.
type Model = (Realm, Arc<str>, u32);

#[derive(Default)]
struct Registry {
    workers: HashMap<WorkerId, Arc<Worker>>,
    /// Workers of each model and world size with their object groups, oldest registration first.
    models: HashMap<Model, Vec<Registered>>,
}

/// Why a registration is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error("world_size {0} is not served: give 1 to 255")]
    WorldSize(u32),
    #[error(
        "the chunk shape has no bytes or more than fit a 64-bit size: check num_layers, hidden_dim_size and num_physical_slots"
    )]
    Shape,
    #[error(
        "one chunk takes {chunk} bytes but the pool has {pool}: raise --l1-size-gb or lower --chunk-size"
    )]
    LargerThanPool { chunk: u64, pool: u64 },
    #[error(
        "{MAX_WORKERS} workers are registered already: unregister some, or lower --worker-reap-timeout-seconds"
    )]
    TooManyWorkers,
    #[error("model_name must not contain '@': rename the model")]
    ModelName,
}

/// What a worker says of itself.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) id: WorkerId,
    pub(crate) model_name: Arc<str>,
    pub(crate) world_size: u32,
    pub(crate) block_size: u32,
    pub(crate) use_mla: bool,
    pub(crate) layout: ChunkLayout,
    /// Whether it is given the shared segment.
    pub(crate) has_segment: bool,
    /// Its KV cache, if the server is to copy.
    pub(crate) paged: Option<Arc<PagedCache>>,
}

impl Registration {
    /// That of a worker which copies by itself.
    pub(crate) fn engine_driven(
        caller: &Caller,
        context: &RegisterContext,
        chunk_size: u32,
    ) -> Result<Self, RegisterError> {
        let bytes = context
            .chunk_bytes(chunk_size)
            .filter(|&bytes| bytes > 0)
            .ok_or(RegisterError::Shape)?;
        let first = LayoutPart {
            shape: context.shape(chunk_size).into(),
            dtype: context.dtype,
            kept_blocks: None,
        };
        Ok(Self {
            id: WorkerId::new(caller, context.instance_id),
            model_name: Arc::clone(&context.model_name),
            world_size: context.world_size,
            block_size: context.block_size,
            use_mla: context.use_mla,
            layout: ChunkLayout {
                first,
                rest: Arc::default(),
                bytes,
            },
            has_segment: caller.may_share_memory(),
            paged: None,
        })
    }
}

/// All registrations. Follows `modules/engine_driven_transfer.py` of LMCache, except that
/// a registration of a known instance with another layout replaces the old one, and that
/// what an ended registration had not committed is aborted.
#[derive(Default)]
pub(crate) struct Workers {
    registry: Mutex<Registry>,
}

impl Workers {
    /// Adds or refreshes a registration.
    ///
    /// Returns the worker that was replaced, whose owner must be ended by the caller.
    pub(crate) fn register(
        &self,
        registration: Registration,
        pool_bytes: u64,
        sender: Sender,
        new_owner: impl FnOnce() -> OwnerId,
    ) -> Result<Option<Arc<Worker>>, RegisterError> {
        let Registration {
            id,
            model_name,
            world_size,
            layout,
            has_segment,
            paged,
            ..
        } = &registration;
        if !(1..=255).contains(world_size) {
            return Err(RegisterError::WorldSize(*world_size));
        }
        if model_name.contains('@') {
            return Err(RegisterError::ModelName);
        }
        if layout.bytes > pool_bytes {
            return Err(RegisterError::LargerThanPool {
                chunk: layout.bytes,
                pool: pool_bytes,
            });
        }
        let mut registry = self.registry.lock();
        if let Some(known) = registry.workers.get(id)
            && known.has_segment == *has_segment
            && known.layout == *layout
            && known.model_name == *model_name
            && known.world_size == *world_size
            && match (&known.paged, paged) {
                (Some(known), Some(paged)) => known.is_same(paged),
                (None, None) => true,
                _ => false,
            }
        {
            let mut activity = known.activity.lock();
            activity.last_seen = Instant::now();
            note_peer(&mut activity.peers, sender.peer);
            activity.process = sender.process;
            return Ok(None);
        }
        if registry.workers.len() >= MAX_WORKERS && !registry.workers.contains_key(id) {
            return Err(RegisterError::TooManyWorkers);
        }
        let replaced = registry.remove(id);
        let object_group_id = layout.object_group_id();
        let model = (id.realm.clone(), Arc::clone(model_name), *world_size);
        let registered = registry.models.entry(model).or_default();
        registered.push((id.clone(), object_group_id));
        let id = id.clone();
        let worker = Worker {
            id: registration.id,
            owner: new_owner(),
            model_name: registration.model_name,
            world_size: registration.world_size,
            block_size: registration.block_size,
            use_mla: registration.use_mla,
            layout: registration.layout,
            has_segment: registration.has_segment,
            object_group_id,
            paged: registration.paged,
            has_ended: AtomicBool::new(false),
            activity: Mutex::new(Activity {
                last_seen: Instant::now(),
                has_pinged: false,
                sends_inline: false,
                stores: HashMap::new(),
                reads: HashMap::new(),
                peers: vec![sender.peer],
                process: sender.process,
            }),
        };
        registry.workers.insert(id, Arc::new(worker));
        Ok(replaced)
    }

    /// Removes a registration; the caller ends its owner.
    pub(crate) fn unregister(&self, id: &WorkerId) -> Option<Arc<Worker>> {
        self.registry.lock().remove(id)
    }

    pub(crate) fn get(&self, id: &WorkerId) -> Option<Arc<Worker>> {
        self.registry.lock().workers.get(id).cloned()
    }

    /// The object group that lookups for this model use, and the bytes of its objects: those of
    /// the tenant's newest registration.
    pub(crate) fn object_group(
        &self,
        realm: &Realm,
        model_name: &Arc<str>,
        world_size: u32,
    ) -> Option<(u32, u64)> {
        let registry = self.registry.lock();
        let model = (realm.clone(), Arc::clone(model_name), world_size);
        let newest = registry.models.get(&model)?.last()?;
        let bytes = registry.workers.get(&newest.0)?.layout.bytes;
        Some((newest.1, bytes))
    }

    /// The bytes of a model's objects in this object group, whichever worker has it: one number
    /// stands for one layout.
    pub(crate) fn object_bytes(&self, model_name: &str, object_group_id: u32) -> Option<u64> {
        let registry = self.registry.lock();
        let is_it = |worker: &&Arc<Worker>| {
            worker.object_group_id == object_group_id && *worker.model_name == *model_name
        };
        let worker = registry.workers.values().find(is_it)?;
        Some(worker.layout.bytes)
    }

    /// The layout of the newest registration of this model.
    pub(crate) fn layout(
        &self,
        realm: &Realm,
        model_name: &Arc<str>,
        world_size: u32,
    ) -> Option<ChunkLayout> {
        let registry = self.registry.lock();
        let model = (realm.clone(), Arc::clone(model_name), world_size);
        let (id, _) = registry.models.get(&model)?.last()?;
        let worker = registry.workers.get(id)?;
        Some(worker.layout.clone())
    }

    /// Notes a sign of life; `false` if there is no such worker.
    pub(crate) fn ping(&self, id: &WorkerId, peer: u64) -> bool {
        let Some(worker) = self.get(id) else {
            return false;
        };
        let mut activity = worker.activity.lock();
        activity.last_seen = Instant::now();
        activity.has_pinged = true;
        note_peer(&mut activity.peers, peer);
        true
    }

    /// Removes and returns the workers that were silent for too long.
    pub(crate) fn reap(&self, reap_timeout: Duration, grace: Duration) -> Vec<Arc<Worker>> {
        let now = Instant::now();
        let workers: Vec<_> = self.registry.lock().workers.values().cloned().collect();
        let mut reaped = Vec::new();
        for worker in workers {
            worker.forget_expired(now);
            if reap_timeout.is_zero() {
                continue;
            }
            let is_stale = {
                let activity = worker.activity.lock();
                let budget = if activity.has_pinged {
                    reap_timeout
                } else {
                    grace
                };
                now.saturating_duration_since(activity.last_seen) > budget
            };
            if is_stale && let Some(worker) = self.unregister(&worker.id) {
                reaped.push(worker);
            }
        }
        reaped
    }

    /// Removes all workers of a realm; the caller ends their owners.
    pub(crate) fn end_realm(&self, realm: &Realm) -> Vec<Arc<Worker>> {
        let mut registry = self.registry.lock();
        let ids: Vec<WorkerId> = registry
            .workers
            .keys()
            .filter(|id| id.realm == *realm)
            .cloned()
            .collect();
        ids.iter().filter_map(|id| registry.remove(id)).collect()
    }

    /// Forgets a connection; returns the workers with a known process that have no other one.
    pub(crate) fn left_by(&self, peer: u64) -> Vec<Orphan> {
        let registry = self.registry.lock();
        let orphan = |worker: &Arc<Worker>| {
            let mut activity = worker.activity.lock();
            let known = activity.peers.iter().position(|&known| known == peer)?;
            activity.peers.remove(known);
            Some(Orphan {
                id: worker.id.clone(),
                owner: worker.owner,
                process: activity
                    .process
                    .clone()
                    .filter(|_| activity.peers.is_empty())?,
            })
        };
        registry.workers.values().filter_map(orphan).collect()
    }

    /// Whether the worker is registered as it was, and was heard on no other connection since.
    pub(crate) fn is_orphan(&self, orphan: &Orphan) -> bool {
        self.registry.lock().holds(orphan)
    }

    /// Removes the worker if it [is still an orphan](Self::is_orphan); the caller ends its owner.
    pub(crate) fn take_orphan(&self, orphan: &Orphan) -> Option<Arc<Worker>> {
        let mut registry = self.registry.lock();
        registry
            .holds(orphan)
            .then(|| registry.remove(&orphan.id))
            .flatten()
    }

    /// All registrations, by instance id.
    pub(crate) fn list(&self) -> Vec<Arc<Worker>> {
        let mut workers: Vec<_> = self.registry.lock().workers.values().cloned().collect();
        workers.sort_by(|a, b| a.id.cmp(&b.id));
        workers
    }
}

impl Registry {
    fn holds(&self, orphan: &Orphan) -> bool {
        self.workers.get(&orphan.id).is_some_and(|worker| {
            worker.owner == orphan.owner && worker.activity.lock().peers.is_empty()
        })
    }

    fn remove(&mut self, id: &WorkerId) -> Option<Arc<Worker>> {
        let worker = self.workers.remove(id)?;
        worker.has_ended.store(true, Ordering::Relaxed);
        let key = (
            id.realm.clone(),
            Arc::clone(&worker.model_name),
            worker.world_size,
        );
        if let Some(registered) = self.models.get_mut(&key) {
            registered.retain(|(other, _)| other != id);
            if registered.is_empty() {
                self.models.remove(&key);
            }
        }
        Some(worker)
    }
}

/// Remembers the newest few connections of a worker.
fn note_peer(peers: &mut Vec<u64>, peer: u64) {
    if peers.last() == Some(&peer) {
        return;
    }
    peers.retain(|&known| known != peer);
    if peers.len() >= 4 {
        peers.remove(0);
    }
    peers.push(peer);
}
