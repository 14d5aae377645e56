//! A worker of our own, on a reserved tenant, that goes the whole way of a chunk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use stockade_cache::ObjectKey;
use stockade_wire::{
    CacheKey, Dtype, InstanceId, RegisterContext, RequestConfigs, Response, TokenIds, pickle,
};

use super::{
    Service,
    workers::{Registration, Sender, WorkerId},
};
use crate::tenancy::Caller;

/// Cache salt and model of the probe; no engine can use the name by accident.
pub const PROBE_TENANT: &str = "stockade-probe";
/// Below what LMCache's clients use, which are process ids and hashes.
const PROBE_INSTANCE: InstanceId = InstanceId(-0x570c_4ade);

/// What a probe that went well found.
#[derive(Debug, Clone)]
pub struct ProbeReport {
    /// Registering and storing.
    pub store: Duration,
    /// Looking up.
    pub lookup: Duration,
    /// Retrieving and comparing.
    pub retrieve: Duration,
    /// Bytes that went there and back.
    pub bytes: u64,
}

impl Service {
    /// Registers, stores one chunk inline, looks it up, retrieves it, compares the bytes, and
    /// leaves nothing behind.
    ///
    /// # Errors
    /// A sentence on the first step that did not do what it should.
    pub fn probe(&self) -> Result<ProbeReport, String> {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let caller = Caller::internal();
        let chunk_size = self.hasher.chunk_size();
        let context = RegisterContext {
            instance_id: PROBE_INSTANCE,
            model_name: Arc::from(PROBE_TENANT),
            world_size: 1,
            block_size: 1,
            num_layers: 1,
            hidden_dim_size: 16,
            dtype: Dtype::UInt8,
            use_mla: true,
            num_physical_slots: Some(1),
        };
        // No connection, so none whose end would be taken for the probe's.
        let nobody = Sender {
            peer: 0,
            process: None,
        };
        let started = Instant::now();
        let pool = self.engine.capacity_bytes();
        let replaced = Registration::engine_driven(&caller, &context, 1)
            .and_then(|registration| {
                self.workers
                    .register(registration, pool, nobody, || self.engine.new_owner())
            })
            .map_err(|error| format!("register: {error}"))?;
        if let Some(replaced) = replaced {
            self.engine.end_owner(replaced.owner);
        }
        let tokens: Bytes = (0..chunk_size as u64)
            .flat_map(|index| (run.wrapping_mul(31).wrapping_add(index) as u32).to_be_bytes())
            .collect();
        let tokens = TokenIds::from_be_bytes(tokens).ok_or("tokens could not be made")?;
        let key = CacheKey {
            model_name: Arc::from(PROBE_TENANT),
            world_size: 1,
            worker_id: Some(0),
            tokens,
            start: 0,
            end: chunk_size as u64,
            request_id: Arc::from(format!("{PROBE_TENANT}-{run}")),
            cache_salt: Arc::from(PROBE_TENANT),
            request_configs: RequestConfigs::default(),
            num_kv_readers: 1,
        };
        let result = self.probe_with(&caller, &key, run, started);
        let _ = self.end_session(&caller, &key.request_id);
        self.forget_probe(&caller, &key);
        let _ = self.unregister_quietly(&WorkerId::new(&caller, PROBE_INSTANCE));
        result
    }

    fn probe_with(
        &self,
        caller: &Caller,
        key: &CacheKey,
        run: u64,
        started: Instant,
    ) -> Result<ProbeReport, String> {
        // Different in every run, so that bytes of an earlier one do not pass.
        let bytes = [run, !run].map(u64::to_be_bytes).concat();
        let data = pickle::write_tensors(&[(Dtype::UInt8, &[1, 1, 16], &bytes)])
            .map_err(|error| error.to_string())?;
        match self.commit_store(caller, key, PROBE_INSTANCE, &Bytes::from(data))? {
            Response::Bool(true) => {}
            other => return Err(format!("store: answered {other:?}")),
        }
        let stored = started.elapsed();
        let scheduler = CacheKey {
            worker_id: None,
            ..key.clone()
        };
        self.lookup(caller, &scheduler)?;
        match self.prefetch_status(caller, &key.request_id)? {
            Response::OptionalInt(Some(1)) => {}
            other => {
                return Err(format!(
                    "lookup: what was just stored is not found: {other:?}"
                ));
            }
        }
        let looked_up = started.elapsed();
        let Response::PrepareRetrieve {
            success: true,
            data,
            ..
        } = self.prepare_retrieve(caller, key, PROBE_INSTANCE)?
        else {
            return Err("retrieve: what was just found cannot be read".to_owned());
        };
        let tensors = pickle::read_tensors(&data).map_err(|error| format!("retrieve: {error}"))?;
        let returned: Vec<u8> = tensors
            .first()
            .map(|tensor| tensor.parts().flatten().copied().collect())
            .unwrap_or_default();
        if returned != bytes {
            return Err("retrieve: other bytes came back than were stored".to_owned());
        }
        self.commit_retrieve(caller, key, PROBE_INSTANCE)?;
        Ok(ProbeReport {
            store: stored,
            lookup: looked_up.saturating_sub(stored),
            retrieve: started.elapsed().saturating_sub(looked_up),
            bytes: bytes.len() as u64,
        })
    }

    /// Removes the probe's chunk, so that probing often does not fill the pool.
    fn forget_probe(&self, caller: &Caller, key: &CacheKey) {
        let Ok(worker) = self.worker(caller, PROBE_INSTANCE) else {
            return;
        };
        let Ok(range) = self.transfer_range(caller, "probe", key, &worker) else {
            return;
        };
        let keys: Vec<ObjectKey> = super::store::object_keys(&range.transfer.scope, &range.hashes);
        self.engine.withdraw(&keys);
        // Naming the chunks has opened the session again.
        let _ = self.end_session(caller, &key.request_id);
    }

    fn unregister_quietly(&self, id: &WorkerId) -> Option<()> {
        let worker = self.workers.unregister(id)?;
        self.engine.end_owner(worker.owner);
        Some(())
    }
}
