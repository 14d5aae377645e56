//! Registration, liveness, clear and the other small operations. Follows
//! `modules/management.py` and `modules/engine_driven_transfer.py` of LMCache 0.5.6.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use stockade_cache::CacheSalt;
use stockade_transport::Peer;
use stockade_wire::{InstanceId, Operation, RegisterContext, Response};

use super::{
    Answer, Service,
    lmcache_driven::ENGINE_DRIVEN,
    workers::{Registration, Sender, WorkerId},
};
use crate::tenancy::{Caller, Denial, Realm, Standing};

/// A handle on the process at the other end of a local socket.
///
/// Taken while the connection is open, so that the number cannot have gone to another one.
fn process_of(peer: &Peer) -> Option<Arc<OwnedFd>> {
    let pid = Pid::from_raw(peer.credentials()?.pid?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok().map(Arc::new)
}

impl Sender {
    /// Who is at the other end of a connection.
    pub(super) fn of(peer: &Peer) -> Self {
        Self {
            peer: peer.id(),
            process: process_of(peer),
        }
    }
}

impl Service {
    pub(super) fn register(
        &self,
        caller: &Caller,
        peer: &Peer,
        context: &RegisterContext,
    ) -> Answer {
        self.check_standing(caller, peer)?;
        let pool = self.engine.capacity_bytes();
        let chunk_size = u32::try_from(self.hasher.chunk_size()).unwrap_or(u32::MAX);
        let registration = Registration::engine_driven(caller, context, chunk_size)
            .map_err(|error| error.to_string())?;
        if let Some(known) = self.workers.get(&registration.id) {
            self.check_user(peer, &known)?;
        }
        self.add_worker(registration, Sender::of(peer))?;
        let shm_name = match caller.may_share_memory() {
            true => self.engine.shm_name().unwrap_or_default(),
            false => "",
        };
        let pool_size = if shm_name.is_empty() { 0 } else { pool };
        Ok(Response::Registered {
            shm_name: Arc::from(shm_name),
            pool_size,
        })
    }

    /// Whether a connection may register anything.
    pub(super) fn check_standing(&self, caller: &Caller, peer: &Peer) -> Result<(), String> {
        let Standing::Stranger = caller.standing() else {
            return Ok(());
        };
        let audit = self.tenancy.audit();
        audit.denied(caller, Denial::Stranger, "register", None);
        Err(format!(
            "this connection belongs to no tenant of listener {}: come in as a user or process that a [tenants] table names",
            peer.listener()
        ))
    }

    /// Adds or refreshes a registration.
    pub(super) fn add_worker(
        &self,
        registration: Registration,
        sender: Sender,
    ) -> Result<(), String> {
        let (id, world_size) = (registration.id.clone(), registration.world_size);
        let model = Arc::clone(&registration.model_name);
        let pool = self.engine.capacity_bytes();
        let replaced = self
            .workers
            .register(registration, pool, sender, || self.engine.new_owner())
            .map_err(|error| error.to_string())?;
        self.lapsed.forget(&id);
        if let Some(replaced) = replaced {
            self.engine.end_owner(replaced.owner);
            tracing::info!(instance_id = %id, "worker registered again with another layout");
        } else {
            tracing::info!(instance_id = %id, %model, world_size, "worker registered");
        }
        Ok(())
    }

    /// Ends a registration; what it had not committed is aborted. Unknown ones are acknowledged.
    ///
    /// Registrations of the lmcache-driven path have an operation of their own, as in LMCache.
    pub(super) fn unregister(&self, caller: &Caller, instance_id: InstanceId) -> Answer {
        let id = WorkerId::new(caller, instance_id);
        match self.workers.get(&id) {
            Some(worker) if worker.paged.is_some() => Ok(Response::None),
            _ => self.end_registration(&id),
        }
    }

    pub(super) fn end_registration(&self, id: &WorkerId) -> Answer {
        if let Some(worker) = self.workers.unregister(id) {
            self.lapsed.forget(id);
            let ended = self.engine.end_owner(worker.owner);
            tracing::info!(instance_id = %id, aborted_objects = ended.aborted_objects, "worker unregistered");
        }
        Ok(Response::None)
    }

    pub(super) fn ping(
        &self,
        caller: &Caller,
        peer: &Peer,
        instance_id: Option<InstanceId>,
    ) -> Answer {
        let Some(instance_id) = instance_id else {
            return Ok(Response::Bool(true));
        };
        let id = WorkerId::new(caller, instance_id);
        self.events.ping(&id);
        if self.workers.ping(&id, peer.id()) {
            return Ok(Response::Bool(true));
        }
        if self.is_survivor(peer) {
            self.lapsed.note(&id);
        }
        let is_well = self.lapsed.answer_ping(&id);
        if !is_well {
            tracing::info!(instance_id = %id, "a worker without registration is told by its ping to register again");
        }
        Ok(Response::Bool(is_well))
    }

    /// Clears what is the caller's; everything, where no tenants are bound.
    pub(super) fn clear(&self, caller: &Caller, force: bool) -> Answer {
        if let Standing::Stranger = caller.standing() {
            let audit = self.tenancy.audit();
            audit.denied(caller, Denial::Scope, "clear", None);
            return Ok(Response::None);
        }
        self.clear_owned(force, |salt| caller.owns(salt));
        Ok(Response::None)
    }

    pub(super) fn clear_owned(&self, force: bool, owns: impl Fn(&CacheSalt) -> bool) {
        let cleared = self.engine.clear_where(force, &owns);
        tracing::info!(
            force,
            removed = cleared.removed,
            kept = cleared.kept,
            "cache cleared"
        );
    }

    pub(super) fn experimental(&self) -> Answer {
        let names = self
            .events
            .is_enabled()
            .then(|| Arc::from("kv_event_stream"));
        Ok(Response::Strings(names.into_iter().collect()))
    }
}

/// Lookups of peers that wait to be asked for their result, which is that nothing was found.
#[derive(Default)]
pub(super) struct P2pTasks(Mutex<P2pWaiting>);

#[derive(Default)]
struct P2pWaiting {
    next_id: i64,
    /// Whose, which, and of how many keys; oldest first.
    tasks: VecDeque<(Realm, i64, u32)>,
}

impl P2pTasks {
    /// Most lookups waiting; older ones are forgotten.
    const MAX: usize = 1024;

    /// Takes a lookup of that many keys and returns its task.
    pub(super) fn begin(&self, realm: &Realm, keys: u32) -> i64 {
        let mut waiting = self.0.lock();
        let id = waiting.next_id;
        waiting.next_id = id.wrapping_add(1);
        if waiting.tasks.len() == Self::MAX {
            waiting.tasks.pop_front();
        }
        waiting.tasks.push_back((realm.clone(), id, keys));
        id
    }

    /// The number of keys of a task of that tenant, exactly once.
    pub(super) fn collect(&self, realm: &Realm, task_id: i128) -> Option<u32> {
        let mut waiting = self.0.lock();
        let at = waiting
            .tasks
            .iter()
            .position(|(whose, id, _)| whose == realm && i128::from(*id) == task_id)?;
        waiting.tasks.remove(at).map(|(_, _, keys)| keys)
    }
}

/// What to do instead of an operation that this server does not serve.
pub(super) fn way_out(operation: Operation) -> String {
    let name = operation.name();
    let advice = if name.starts_with("cb_") {
        "CacheBlend is not served: start the engine without the blend connector"
    } else if name.starts_with("p2p_") {
        "peer-to-peer reads are not served: start the peers without --p2p-advertise-url"
    } else if name.ends_with("_q_cache") || name == "store_q" {
        "query transfer is not served: start the engine without it"
    } else {
        return format!(
            "{name} is not served with this --supported-transfer-mode: start the server with auto, or {ENGINE_DRIVEN}"
        );
    };
    format!("{name} is not served; {advice}")
}
