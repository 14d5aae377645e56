//! Registration, liveness, clear and the other small operations. Follows
//! `modules/management.py` and `modules/engine_driven_transfer.py` of LMCache 0.5.6.

use std::sync::Arc;

use stockade_transport::Peer;
use stockade_wire::{InstanceId, Operation, RegisterContext, Response};

use super::{Answer, Service};

impl Service {
    pub(super) fn register(&self, peer: &Peer, context: &RegisterContext) -> Answer {
        let pool = self.engine.capacity_bytes();
        let chunk_size = u32::try_from(self.hasher.chunk_size()).unwrap_or(u32::MAX);
        let replaced = self
            .workers
            .register(context, chunk_size, pool, peer.id(), || {
                self.engine.new_owner()
            })
            .map_err(|error| error.to_string())?;
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
            let ended = self.engine.end_owner(worker.owner);
            tracing::info!(%instance_id, aborted_objects = ended.aborted_objects, "worker unregistered");
        }
        Ok(Response::None)
    }

    pub(super) fn ping(&self, peer: &Peer, instance_id: Option<InstanceId>) -> Answer {
        if let Some(instance_id) = instance_id {
            self.workers.ping(instance_id, peer.id());
            self.events.ping(instance_id);
        }
        Ok(Response::Bool(true))
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
