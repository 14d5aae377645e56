//! Registration, liveness, clear and the other small operations. Follows
//! `modules/management.py` and `modules/engine_driven_transfer.py` of LMCache 0.5.6.

use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use stockade_transport::Peer;
use stockade_wire::{InstanceId, Operation, RegisterContext, Response};

use super::{Answer, Service, workers::Sender};

/// A handle on the process at the other end of a local socket.
///
/// Taken while the connection is open, so that the number cannot have gone to another one.
fn process_of(peer: &Peer) -> Option<Arc<OwnedFd>> {
    let pid = Pid::from_raw(peer.credentials()?.pid?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok().map(Arc::new)
}

impl Service {
    pub(super) fn register(&self, peer: &Peer, context: &RegisterContext) -> Answer {
        let pool = self.engine.capacity_bytes();
        let chunk_size = u32::try_from(self.hasher.chunk_size()).unwrap_or(u32::MAX);
        let replaced = self
            .workers
            .register(
                context,
                chunk_size,
                pool,
                Sender {
                    peer: peer.id(),
                    process: process_of(peer),
                },
                || self.engine.new_owner(),
            )
            .map_err(|error| error.to_string())?;
        self.lapsed.forget(context.instance_id);
        if let Some(replaced) = replaced {
            self.engine.end_owner(replaced.owner);
            tracing::info!(instance_id = %context.instance_id, "worker registered again with another layout");
        } else {
            tracing::info!(
                instance_id = %context.instance_id,
                model = %context.model_name,
                world_size = context.world_size,
                "worker registered"
            );
        }
        let shm_name = self.engine.shm_name().unwrap_or_default();
        let pool_size = if shm_name.is_empty() { 0 } else { pool };
        Ok(Response::Registered {
            shm_name: Arc::from(shm_name),
            pool_size,
        })
    }

    /// Ends a registration; what it had not committed is aborted. Unknown ones are acknowledged.
    pub(super) fn unregister(&self, instance_id: InstanceId) -> Answer {
        if let Some(worker) = self.workers.unregister(instance_id) {
            self.lapsed.forget(instance_id);
            let ended = self.engine.end_owner(worker.owner);
            tracing::info!(%instance_id, aborted_objects = ended.aborted_objects, "worker unregistered");
        }
        Ok(Response::None)
    }

    pub(super) fn ping(&self, peer: &Peer, instance_id: Option<InstanceId>) -> Answer {
        let Some(instance_id) = instance_id else {
            return Ok(Response::Bool(true));
        };
        self.events.ping(instance_id);
        if self.workers.ping(instance_id, peer.id()) {
            return Ok(Response::Bool(true));
        }
        if self.is_survivor(peer) {
            self.lapsed.note(instance_id);
        }
        let is_well = self.lapsed.answer_ping(instance_id);
        if !is_well {
            tracing::info!(%instance_id, "a worker without registration is told by its ping to register again");
        }
        Ok(Response::Bool(is_well))
    }

    pub(super) fn clear(&self, force: bool) -> Answer {
        let cleared = self.engine.clear(force);
        tracing::info!(
            force,
            removed = cleared.removed,
            kept = cleared.kept,
            "cache cleared"
        );
        Ok(Response::None)
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
    /// Task and number of keys, oldest first.
    tasks: VecDeque<(i64, u32)>,
}

impl P2pTasks {
    /// Most lookups waiting; older ones are forgotten.
    const MAX: usize = 1024;

    /// Takes a lookup of that many keys and returns its task.
    pub(super) fn begin(&self, keys: u32) -> i64 {
        let mut waiting = self.0.lock();
        let id = waiting.next_id;
        waiting.next_id = id.wrapping_add(1);
        if waiting.tasks.len() == Self::MAX {
            waiting.tasks.pop_front();
        }
        waiting.tasks.push_back((id, keys));
        id
    }

    /// The number of keys of a task, exactly once.
    pub(super) fn collect(&self, task_id: i128) -> Option<u32> {
        let mut waiting = self.0.lock();
        let at = waiting
            .tasks
            .iter()
            .position(|&(id, _)| i128::from(id) == task_id)?;
        waiting.tasks.remove(at).map(|(_, keys)| keys)
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
        "the server holds no device handles: set lmcache.mp.mp_transfer_mode to engine_driven, or LMCACHE_MP_TRANSFER_MODE=engine_driven in the engine's environment"
    };
    format!("{name} is not served; {advice}")
}
