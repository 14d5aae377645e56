//! The server's settings, as LMCache's plugins know them from `LMCACHE_RUNTIME_PLUGIN_CONFIG`.
//!
//! Names are LMCache 0.5.6's. A field that the server does not send has its type's default, and one
//! that this crate does not know is in [`Config::raw`]. Secrets are blackened by the server.

use std::{ops::RangeInclusive, time::Duration};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{Error, ErrorCode, Result, abi, error::answered};

/// The settings that a plugin gets.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Config {
    /// The server of engines.
    pub mp_config: MpConfig,
    /// The pool and what lies below it.
    pub storage_manager_config: StorageManagerConfig,
    /// Metrics, logs and traces.
    pub obs_config: ObsConfig,
    /// The HTTP API.
    pub http_config: HttpConfig,
    /// Settings of plugins: the JSON of `--runtime-plugin-config`. By convention,
    /// `"<plugin>.<setting>"`.
    pub runtime_plugin_extra_config: Map<String, Value>,
    /// All of it as it came.
    #[serde(skip)]
    pub raw: Value,
}

/// The server of engines.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MpConfig {
    /// `zmq`.
    pub transport: String,
    /// Host that it is bound to.
    pub host: String,
    /// Port that it is bound to.
    pub port: u16,
    /// Tokens of a chunk.
    pub chunk_size: u64,
    /// Such as `blake3`.
    pub hash_algorithm: String,
    /// `engine_driven` or `auto`.
    pub supported_transfer_mode: String,
    /// Name of the shared memory; empty without.
    pub shm_name: String,
    /// Identity of the server.
    pub instance_id: String,
    /// Where plugins are looked for.
    pub runtime_plugin_locations: Vec<String>,
    /// Seconds of silence after which a worker is reaped.
    pub worker_reap_timeout_seconds: f64,
    /// Seconds after which an idle session is reaped.
    pub session_ttl_seconds: f64,
    /// Records kept for subscribers of KV events.
    pub kv_event_log_size: u64,
}

/// The pool and what lies below it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct StorageManagerConfig {
    /// The pool.
    pub l1_manager_config: L1ManagerConfig,
    /// How the pool makes room.
    pub eviction_config: EvictionConfig,
    /// The second tiers.
    pub l2_adapter_config: L2AdapterConfig,
    /// What is stored below.
    pub store_policy: String,
    /// What is loaded from below.
    pub prefetch_policy: String,
}

/// The pool.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct L1ManagerConfig {
    /// Its memory.
    pub memory_config: MemoryConfig,
    /// Seconds that a reservation lives.
    pub write_ttl_seconds: f64,
    /// Seconds that an unused read lock lives.
    pub read_ttl_seconds: f64,
}

/// Memory of the pool.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Its size.
    pub size_in_bytes: u64,
    /// Whether it grows with its use.
    pub use_lazy: bool,
    /// Its size at first.
    pub init_size_in_bytes: u64,
    /// Alignment of objects.
    pub align_bytes: u64,
    /// Name of the shared memory; empty without.
    pub shm_name: String,
}

/// How the pool makes room.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct EvictionConfig {
    /// Such as `LRU`.
    pub eviction_policy: String,
    /// Use of the pool at which it begins, from 0 to 1.
    pub trigger_watermark: f64,
    /// Share of the bytes in use that goes at once.
    pub eviction_ratio: f64,
}

/// The second tiers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct L2AdapterConfig {
    /// Each as it was given, without its secrets.
    pub adapters: Vec<Value>,
}

/// Metrics, logs and traces.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ObsConfig {
    /// Whether there are any.
    pub enabled: bool,
    /// Whether there are metrics.
    pub metrics_enabled: bool,
    /// Whether there are logs.
    pub logging_enabled: bool,
    /// Whether there are traces.
    pub tracing_enabled: bool,
    /// Where metrics are served.
    pub prometheus_port: u16,
    /// The log of what is looked up.
    pub lookup_hash_log: LookupHashLog,
}

/// The log of what is looked up.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct LookupHashLog {
    /// Its directory, on the host; empty without.
    pub output_dir: String,
    /// Seconds after which a file ends.
    pub rotation_interval_sec: u64,
    /// Bytes after which a file ends.
    pub rotation_max_size: u64,
    /// Files that are kept.
    pub max_files: u64,
}

/// The HTTP API.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct HttpConfig {
    /// Host that it is bound to.
    pub http_host: String,
    /// Port that it is bound to.
    pub http_port: u16,
}

impl Config {
    /// The settings that the server has.
    ///
    /// # Errors
    /// When a field is of another type than LMCache gives it; the error names it.
    pub fn load() -> Result<Self> {
        let text = answered(abi::config())?;
        Self::from_json(&String::from_utf8_lossy(&text))
    }

    /// The settings in a text, such as the environment variable of a program without imports.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_json(text: &str) -> Result<Self> {
        let invalid = |error: serde_json::Error| {
            let reason = format!("the configuration cannot be used: {error}");
            Error::new(ErrorCode::Invalid, reason)
        };
        let raw: Value = serde_json::from_str(text).map_err(invalid)?;
        if !raw.is_object() {
            let reason = "the configuration is not a JSON object";
            return Err(Error::new(ErrorCode::Invalid, reason));
        }
        // From the text once more, so that an error says where.
        let config: Self = serde_json::from_str(text).map_err(invalid)?;
        Ok(Self { raw, ..config })
    }

    /// A setting of plugins, by its whole name; `None` where it is not set, or `null`.
    ///
    /// # Errors
    /// When it is set to something that is no `T`; the error names it.
    pub fn setting<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        match self.runtime_plugin_extra_config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| {
                Error::new(ErrorCode::Invalid, format!("setting `{name}`: {error}"))
            }),
        }
    }

    /// A setting that every plugin of a kind must have.
    ///
    /// # Errors
    /// As [`Config::setting`], and when it is not set; the error says how to set it.
    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.setting(name)?.ok_or_else(|| {
            let reason = format!(
                "setting `{name}` is missing: start the server with --runtime-plugin-config '{{\"{name}\": ...}}'"
            );
            Error::new(ErrorCode::NotFound, reason)
        })
    }

    /// A setting that is a time in seconds, within `range`.
    ///
    /// # Errors
    /// As [`Config::setting`], and when it is out of range.
    pub fn seconds(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<Duration>> {
        let Some(seconds) = self.setting::<f64>(name)? else {
            return Ok(None);
        };
        Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|_| range.contains(&seconds))
            .map(Some)
            .ok_or_else(|| {
                let (least, most) = range.into_inner();
                let reason =
                    format!("setting `{name}` is {seconds}: give seconds from {least} to {most}");
                Error::new(ErrorCode::Invalid, reason)
            })
    }
}
