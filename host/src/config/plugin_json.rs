//! The aggregated configuration that plugins receive as `LMCACHE_RUNTIME_PLUGIN_CONFIG`.

use serde_json::{Value, json};

use stockade_l2::AdapterSpec;

use super::{Config, LogFormat};
use crate::tier::{PrefetchPolicy, StorePolicy};

impl Config {
    /// The JSON object of LMCache 0.5.6 (`multiprocess/http_server.py`, `config.py`), with this
    /// server's values, plus `mp_config.runtime_plugin_locations` as in LMCache's own example.
    ///
    /// `port`, `http_port` and `shm_name` are those in use, after binding. Nothing in it is
    /// secret: keys that plugins should not see are added here only once they are redacted.
    #[must_use]
    pub fn plugin_json(&self, port: u16, http_port: u16, shm_name: &str) -> Value {
        let locations: Vec<String> = self
            .runtime_plugin_locations
            .iter()
            .map(|path| path.to_string_lossy().into_owned())
            .collect();
        let eviction = json!({
            "eviction_policy": self.eviction_policy.to_string(),
            "trigger_watermark": self.eviction_trigger_watermark,
            "eviction_ratio": self.eviction_ratio,
            "extra_logging_enabled": false,
            "extra_logging_interval": 10.0,
        });
        let l1_manager = json!({
            "memory_config": {
                "size_in_bytes": self.l1_size_bytes,
                "use_lazy": self.l1_use_lazy,
                "init_size_in_bytes": match self.l1_use_lazy {
                    true => self.l1_init_size_bytes,
                    false => self.l1_size_bytes,
                },
                "align_bytes": self.l1_align_bytes,
                "shm_name": shm_name,
                "use_hugepages": false,
                "devdax_path": null,
                "devdax_size_in_bytes": 0,
            },
            "gds_l1_config": null,
            "write_ttl_seconds": self.l1_write_ttl.as_secs(),
            "read_ttl_seconds": self.l1_read_ttl.as_secs(),
            "tag": "_default",
            "eviction": eviction,
        });
        let hash_log = match &self.lookup_hash_log {
            Some(log) => json!({
                "output_dir": log.directory.to_string_lossy(),
                "rotation_interval_sec": log.rotation_interval.as_secs(),
                "rotation_max_size": log.rotation_max_bytes,
                "max_files": log.max_files,
            }),
            None => json!({
                "output_dir": "",
                "rotation_interval_sec": 21600,
                "rotation_max_size": 104_857_600,
                "max_files": 100,
            }),
        };
        // LMCache shows its adapters as Python objects' addresses; here are their fields, redacted.
        let l2 = self.l2.as_ref();
        let adapters: Vec<Value> = l2
            .iter()
            .flat_map(|l2| &l2.adapters)
            .map(AdapterSpec::redacted)
            .collect();
        let store_policy = match l2.map(|l2| l2.store_policy) {
            Some(StorePolicy::SkipL1) => "skip_l1",
            Some(StorePolicy::Default) | None => "default",
        };
        let prefetch_policy = match l2.map(|l2| l2.prefetch_policy) {
            Some(PrefetchPolicy::Retain) => "retain",
            Some(PrefetchPolicy::Default) | None => "default",
        };
        let max_in_flight = l2.map_or(8, |l2| l2.prefetch_max_in_flight);
        let mut config = json!({
            "mp_config": {
                "transport": "zmq",
                "host": self.host,
                "port": port,
                "chunk_size": self.chunk_size,
                "max_workers": 1,
                "max_gpu_workers": 1,
                "max_cpu_workers": 1,
                "grpc_server_workers": 32,
                "hash_algorithm": "blake3",
                "engine_type": "default",
                "separate_object_groups": false,
                "enable_segmented_prefix": false,
                "enable_dedup_content": false,
                "enable_blend_reorder": false,
                "supported_transfer_mode": self.supported_transfer_mode,
                "isolated_ipc": false,
                "runtime_plugin_locations": locations,
                "runtime_plugin_config": {
                    "locations": locations,
                    "extra_config": self.runtime_plugin_config,
                },
                "p2p_config": {
                    "advertise_url": "",
                    "listen_url": "",
                    "lookup_timeout": 30.0,
                    "load_timeout": 30.0,
                    "transfer_engine": "nixl",
                },
                "shm_name": shm_name,
                "script_allowed_imports": [],
                "run_script_api_enabled": false,
                "instance_id": self.instance_id,
                "worker_reap_timeout_seconds": self.worker_reap_timeout.as_secs_f64(),
                "session_ttl_seconds": self.session_ttl.as_secs_f64(),
                "worker_registration_grace_seconds": self.worker_registration_grace.as_secs_f64(),
                "enable": [],
                "kv_event_log_size": self.kv_event_log_size,
                "null_block_id": self.null_block_id,
                "server_modules": [],
            },
            "storage_manager_config": {
                "l1_manager_config": l1_manager,
                "eviction_config": eviction,
                "l2_adapter_config": {"adapters": adapters},
                "store_policy": store_policy,
                "prefetch_policy": prefetch_policy,
                "prefetch_max_in_flight": max_in_flight,
                "periodic_notifier_interval_ms": 5,
                "l1_manager_configs": [l1_manager],
            },
            "obs_config": {
                "enabled": true,
                "max_queue_size": 10000,
                "metrics_enabled": true,
                "grpc_metrics_enabled": false,
                "logging_enabled": true,
                "tracing_enabled": self.traces.is_some(),
                // It holds no password; that is checked.
                "otlp_endpoint": self.traces.as_ref().map(|traces| &traces.endpoint),
                "prometheus_port": self.prometheus_port.unwrap_or(http_port),
                "metrics_sample_rate": 1.0,
                "lookup_hash_log": hash_log,
                "gc_monitor": {"enabled": false, "min_pause_ms": 1.0, "top_objects": 0},
                "extra_logging_enabled": false,
                "extra_logging_interval": 10.0,
                "trace_level": null,
                "trace_output": null,
                "service_instance_id": self.instance_id,
                "log_format": if self.log_format == LogFormat::Json { "json" } else { "human" },
            },
            "http_config": {"http_host": self.http_host, "http_port": http_port},
        });
        if !self.runtime_plugin_config.is_empty()
            && let Some(object) = config.as_object_mut()
        {
            object.insert(
                "runtime_plugin_extra_config".to_owned(),
                Value::Object(self.runtime_plugin_config.clone()),
            );
        }
        config
    }
}
