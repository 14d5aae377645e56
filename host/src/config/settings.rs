//! Every setting of `stockade serve` once, read alike from flags, environment and file.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use serde::Deserialize;

/// Settings as given, before defaults and checks; `None` means "not said here".
///
/// One struct serves the command line (with `STOCKADE_*` environment variables) and the
/// `[serve]` table of `stockade.toml`, so a setting cannot exist in one and not the other.
/// Names, meaning and units are LMCache 0.5.6's (`lmcache/v1/multiprocess/config.py`,
/// `lmcache/v1/distributed/config.py`) unless the help says "ours".
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Address to bind the ZMQ endpoint to [default: localhost]
    #[arg(long, env = "STOCKADE_HOST", help_heading = "Server")]
    pub host: Option<String>,
    /// TCP port of the ZMQ endpoint, 0 for any free one [default: 5555]
    #[arg(long, env = "STOCKADE_PORT", help_heading = "Server")]
    pub port: Option<u16>,
    /// Further endpoints to listen on, `tcp://HOST:PORT` or `ipc:///PATH`; repeatable. With names,
    /// users and modes: `[[listener]]` in the file of --config (ours)
    #[arg(
        long,
        value_name = "ENDPOINT",
        env = "STOCKADE_LISTEN",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    pub listen: Option<Vec<String>>,
    /// Tokens per chunk [default: 256]
    #[arg(long, env = "STOCKADE_CHUNK_SIZE", help_heading = "Server")]
    pub chunk_size: Option<u32>,
    /// Stable identity of this server; a random UUID when not given
    #[arg(long, env = "STOCKADE_INSTANCE_ID", help_heading = "Server")]
    pub instance_id: Option<String>,
    /// Chunk hash; only `blake3` is served [default: blake3]
    #[arg(long, env = "STOCKADE_HASH_ALGORITHM", help_heading = "Server")]
    pub hash_algorithm: Option<String>,
    /// Who copies KV: `engine_driven` the engines, `lmcache_driven` this server for engines of this
    /// machine whose KV is in shared memory, `auto` as each engine asks [default: auto]
    #[arg(
        long,
        env = "STOCKADE_SUPPORTED_TRANSFER_MODE",
        help_heading = "Server"
    )]
    pub supported_transfer_mode: Option<String>,
    /// Block id that engines pass for blocks without KV, which the server does not store [default: 0]
    #[arg(
        long,
        env = "STOCKADE_NULL_BLOCK_ID",
        allow_negative_numbers = true,
        help_heading = "Server"
    )]
    pub null_block_id: Option<i64>,
    /// Request transport; only `zmq` is served [default: zmq]
    #[arg(long, env = "STOCKADE_TRANSPORT", help_heading = "Server")]
    pub transport: Option<String>,
    /// Cache engine; only `default` is served [default: default]
    #[arg(long, env = "STOCKADE_ENGINE_TYPE", help_heading = "Server")]
    pub engine_type: Option<String>,
    /// Shared-memory segment of the pool; "" turns SHM off and moves KV inline [default: stockade-PORT]
    #[arg(long, env = "STOCKADE_SHM_NAME", help_heading = "Server")]
    pub shm_name: Option<String>,
    /// Silence in seconds after which a worker that has pinged is reaped, 0 never [default: 120]
    #[arg(
        long,
        env = "STOCKADE_WORKER_REAP_TIMEOUT_SECONDS",
        help_heading = "Server"
    )]
    pub worker_reap_timeout_seconds: Option<f64>,
    /// Silence in seconds after which a worker that never pinged is reaped [default: 3600]
    #[arg(
        long,
        env = "STOCKADE_WORKER_REGISTRATION_GRACE_SECONDS",
        help_heading = "Server"
    )]
    pub worker_registration_grace_seconds: Option<f64>,
    /// Seconds a request session may stay idle before it is reaped [default: 600]
    #[arg(long, env = "STOCKADE_SESSION_TTL_SECONDS", help_heading = "Server")]
    pub session_ttl_seconds: Option<f64>,
    /// Stored and removed records kept for KV-event subscribers, 0 turns the channel off [default: 32768]
    #[arg(long, env = "STOCKADE_KV_EVENT_LOG_SIZE", help_heading = "Server")]
    pub kv_event_log_size: Option<u32>,
    /// Largest request in MiB, inline KV included [default: 1024 without SHM, 256 with] (ours)
    #[arg(long, env = "STOCKADE_MAX_MESSAGE_MIB", help_heading = "Server")]
    pub max_message_mib: Option<u32>,
    /// Most connections at once; further ones are closed at once [default: 4096] (ours)
    #[arg(long, env = "STOCKADE_MAX_CONNECTIONS", help_heading = "Server")]
    pub max_connections: Option<u32>,
    /// Seconds in which every request is answered, if need be with an error [default: 30] (ours)
    #[arg(
        long,
        env = "STOCKADE_REQUEST_DEADLINE_SECONDS",
        help_heading = "Server"
    )]
    pub request_deadline_seconds: Option<f64>,

    /// Directory for what outlives a restart: budgets set over HTTP, plugins' state. Made if its
    /// parent exists; without it such things live until the server ends (ours)
    #[arg(
        long,
        value_name = "DIR",
        env = "STOCKADE_STATE_DIR",
        help_heading = "Server"
    )]
    pub state_dir: Option<PathBuf>,

    /// Size of the pool in GiB; required
    #[arg(long, env = "STOCKADE_L1_SIZE_GB", help_heading = "Memory")]
    pub l1_size_gb: Option<f64>,
    /// Alignment of slots in bytes, a power of two [default: 4096]
    #[arg(long, env = "STOCKADE_L1_ALIGN_BYTES", help_heading = "Memory")]
    pub l1_align_bytes: Option<u64>,
    /// Let the pool grow with its use instead of taking all its memory after the start
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        overrides_with = "no_l1_use_lazy",
        help_heading = "Memory"
    )]
    pub l1_use_lazy: Option<bool>,
    /// Opposite of --l1-use-lazy, and the default: memory is taken in the background
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        overrides_with = "l1_use_lazy",
        help_heading = "Memory"
    )]
    #[serde(skip)]
    pub no_l1_use_lazy: Option<bool>,
    /// GiB that a growing pool takes at first [default: 20]
    #[arg(long, env = "STOCKADE_L1_INIT_SIZE_GB", help_heading = "Memory")]
    pub l1_init_size_gb: Option<f64>,
    /// Do not check that objects that came inline leave as they came (ours)
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        help_heading = "Memory"
    )]
    pub no_l1_checksum: Option<bool>,
    /// Seconds a reserved slot may wait for its commit [default: 600]
    #[arg(long, env = "STOCKADE_L1_WRITE_TTL_SECONDS", help_heading = "Memory")]
    pub l1_write_ttl_seconds: Option<u64>,
    /// Seconds a read lock lives without being used [default: 300]
    #[arg(long, env = "STOCKADE_L1_READ_TTL_SECONDS", help_heading = "Memory")]
    pub l1_read_ttl_seconds: Option<u64>,

    /// LRU, ARC, IsolatedLRU, S3FIFO (ours) or noop [default: LRU]
    #[arg(long, env = "STOCKADE_EVICTION_POLICY", help_heading = "Eviction")]
    pub eviction_policy: Option<String>,
    /// Share of the pool in use, in bytes, at which eviction starts, 0 to 1 [default: 0.8]
    #[arg(
        long,
        env = "STOCKADE_EVICTION_TRIGGER_WATERMARK",
        help_heading = "Eviction"
    )]
    pub eviction_trigger_watermark: Option<f64>,
    /// Share of the bytes in use that one eviction frees, 0 to 1 [default: 0.2]
    #[arg(long, env = "STOCKADE_EVICTION_RATIO", help_heading = "Eviction")]
    pub eviction_ratio: Option<f64>,

    /// Storage behind the pool, a JSON object with a `type` of fs, fs_native, resp, valkey, s3,
    /// mock or fault_inject and LMCache's fields of that type; repeatable
    #[arg(
        long,
        value_name = "JSON",
        env = "STOCKADE_L2_ADAPTER",
        hide_env_values = true,
        help_heading = "Second tier"
    )]
    pub l2_adapter: Option<Vec<String>>,
    /// What becomes of stored objects in memory: `default` keeps them, `skip_l1` lets them go once
    /// they are written down [default: default]
    #[arg(long, env = "STOCKADE_L2_STORE_POLICY", help_heading = "Second tier")]
    pub l2_store_policy: Option<String>,
    /// What becomes of loaded objects in memory: `default` lets them go when they were read,
    /// `retain` keeps them [default: default]
    #[arg(
        long,
        env = "STOCKADE_L2_PREFETCH_POLICY",
        help_heading = "Second tier"
    )]
    pub l2_prefetch_policy: Option<String>,
    /// Lookups that load at once [default: 8]
    #[arg(
        long,
        env = "STOCKADE_L2_PREFETCH_MAX_IN_FLIGHT",
        help_heading = "Second tier"
    )]
    pub l2_prefetch_max_in_flight: Option<u32>,
    /// Seconds that storage has to say what it holds [default: 1] (ours)
    #[arg(
        long,
        env = "STOCKADE_L2_LOOKUP_DEADLINE_SECONDS",
        help_heading = "Second tier"
    )]
    pub l2_lookup_deadline_seconds: Option<f64>,
    /// Seconds that a lookup spends in the second tier at most [default: 10] (ours)
    #[arg(
        long,
        env = "STOCKADE_L2_PREFETCH_DEADLINE_SECONDS",
        help_heading = "Second tier"
    )]
    pub l2_prefetch_deadline_seconds: Option<f64>,
    /// Seconds that writing one object may take [default: 30] (ours)
    #[arg(
        long,
        env = "STOCKADE_L2_STORE_DEADLINE_SECONDS",
        help_heading = "Second tier"
    )]
    pub l2_store_deadline_seconds: Option<f64>,
    /// Objects that may wait to be written to one adapter [default: 65536] (ours)
    #[arg(
        long,
        env = "STOCKADE_L2_STORE_QUEUE_ITEMS",
        help_heading = "Second tier"
    )]
    pub l2_store_queue_items: Option<u32>,
    /// GiB of objects that may wait to be written to one adapter [default: 8] (ours)
    #[arg(long, env = "STOCKADE_L2_STORE_QUEUE_GB", help_heading = "Second tier")]
    pub l2_store_queue_gb: Option<f64>,

    /// Plugin files, or directories searched for *.wasm, *.wat, *.py and *.sh
    #[arg(long, num_args = 0.., value_name = "PATH", help_heading = "Plugins")]
    pub runtime_plugin_locations: Option<Vec<PathBuf>>,
    /// JSON object handed to plugins as LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG [default: {}]
    #[arg(long, env = "STOCKADE_RUNTIME_PLUGIN_CONFIG", help_heading = "Plugins")]
    pub runtime_plugin_config: Option<String>,
    /// Notice plugin files that come, change and go while the server runs (ours)
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        env = "STOCKADE_PLUGIN_WATCH",
        help_heading = "Plugins"
    )]
    pub plugin_watch: Option<bool>,
    /// What *.py and *.sh plugins may touch: `allow` everything the server may, `confined` what
    /// their manifests grant, `deny` does not run them [default: confined] (ours)
    #[arg(
        long,
        value_name = "POLICY",
        env = "STOCKADE_NATIVE_PLUGINS",
        help_heading = "Plugins"
    )]
    pub native_plugins: Option<String>,
    /// A CPython that is a WASI command: *.py plugins then run sandboxed (ours)
    #[arg(
        long,
        value_name = "FILE",
        env = "STOCKADE_PYTHON_WASM",
        help_heading = "Plugins"
    )]
    pub python_wasm: Option<PathBuf>,
    /// Directory of compiled plugins [default: stockade/ in the user's cache directory] (ours)
    #[arg(long, env = "STOCKADE_PLUGIN_CACHE_DIR", help_heading = "Plugins")]
    pub plugin_cache_dir: Option<PathBuf>,

    /// Address of the HTTP API; one that is not loopback needs --http-token-file [default: 127.0.0.1]
    #[arg(long, env = "STOCKADE_HTTP_HOST", help_heading = "HTTP and logs")]
    pub http_host: Option<String>,
    /// Port of the HTTP API, 0 for any free one [default: 8080]
    #[arg(long, env = "STOCKADE_HTTP_PORT", help_heading = "HTTP and logs")]
    pub http_port: Option<u16>,
    /// Serve /metrics, /livez and /readyz on this port of --http-host as well
    #[arg(long, env = "STOCKADE_PROMETHEUS_PORT", help_heading = "HTTP and logs")]
    pub prometheus_port: Option<u16>,
    /// TOML file of bearer tokens and their roles; read again when it changes (ours)
    #[arg(
        long,
        value_name = "FILE",
        env = "STOCKADE_HTTP_TOKEN_FILE",
        help_heading = "HTTP and logs"
    )]
    pub http_token_file: Option<PathBuf>,
    /// PEM certificate chain: the HTTP API speaks TLS; read again when it changes (ours)
    #[arg(
        long,
        value_name = "FILE",
        env = "STOCKADE_HTTP_TLS_CERT",
        help_heading = "HTTP and logs"
    )]
    pub http_tls_cert: Option<PathBuf>,
    /// PEM private key of --http-tls-cert (ours)
    #[arg(
        long,
        value_name = "FILE",
        env = "STOCKADE_HTTP_TLS_KEY",
        help_heading = "HTTP and logs"
    )]
    pub http_tls_key: Option<PathBuf>,
    /// PEM roots: only clients with a certificate of one of them may connect (ours)
    #[arg(
        long,
        value_name = "FILE",
        env = "STOCKADE_HTTP_CLIENT_CA",
        help_heading = "HTTP and logs"
    )]
    pub http_client_ca: Option<PathBuf>,
    /// Unix socket on which the server's own user may do everything without a token (ours)
    #[arg(
        long,
        value_name = "PATH",
        env = "STOCKADE_HTTP_SOCKET",
        help_heading = "HTTP and logs"
    )]
    pub http_socket: Option<PathBuf>,
    /// Let anybody who reaches the HTTP API do everything, also from other machines (ours)
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        help_heading = "HTTP and logs"
    )]
    pub http_insecure: Option<bool>,
    /// Coordinator of a fleet that this server registers with, http://HOST:PORT
    #[arg(long, env = "STOCKADE_COORDINATOR_URL", help_heading = "Coordinator")]
    pub coordinator_url: Option<String>,
    /// Address the coordinator reaches this server at; the one that packets go out by when not given
    #[arg(
        long,
        env = "STOCKADE_COORDINATOR_ADVERTISE_IP",
        help_heading = "Coordinator"
    )]
    pub coordinator_advertise_ip: Option<String>,
    /// Seconds between heartbeats [default: 5]
    #[arg(
        long,
        env = "STOCKADE_COORDINATOR_HEARTBEAT_INTERVAL",
        help_heading = "Coordinator"
    )]
    pub coordinator_heartbeat_interval: Option<f64>,
    /// Tell the coordinator what is stored, used and deleted
    #[arg(
        long,
        env = "STOCKADE_COORDINATOR_EVENT_REPORTING",
        num_args = 0,
        default_missing_value = "true",
        help_heading = "Coordinator"
    )]
    pub coordinator_event_reporting: Option<bool>,
    /// Least seconds between two messages of events [default: 1]
    #[arg(
        long,
        env = "STOCKADE_COORDINATOR_EVENT_FLUSH_INTERVAL",
        help_heading = "Coordinator"
    )]
    pub coordinator_event_flush_interval: Option<f64>,
    /// How events travel; only `http` is served [default: http]
    #[arg(
        long,
        env = "STOCKADE_COORDINATOR_EVENT_TRANSPORT",
        help_heading = "Coordinator"
    )]
    pub coordinator_event_transport: Option<String>,
    /// Export OpenTelemetry traces, a span for each request; needs --otlp-endpoint
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        env = "STOCKADE_ENABLE_TRACING",
        help_heading = "HTTP and logs"
    )]
    pub enable_tracing: Option<bool>,
    /// OTLP receiver that speaks gRPC, for example http://localhost:4317
    #[arg(
        long,
        value_name = "URL",
        env = "STOCKADE_OTLP_ENDPOINT",
        help_heading = "HTTP and logs"
    )]
    pub otlp_endpoint: Option<String>,
    /// Share of the engines' requests that is traced, 0 to 1 [default: 1.0] (ours)
    #[arg(
        long,
        value_name = "SHARE",
        env = "STOCKADE_TRACING_SAMPLE_RATE",
        help_heading = "HTTP and logs"
    )]
    pub tracing_sample_rate: Option<f64>,
    /// Directory of JSON lines with every denial (ours)
    #[arg(
        long,
        value_name = "DIR",
        env = "STOCKADE_AUDIT_LOG_DIR",
        help_heading = "HTTP and logs"
    )]
    pub audit_log_dir: Option<PathBuf>,
    /// Directory of JSON lines with what each tenant used (ours)
    #[arg(
        long,
        value_name = "DIR",
        env = "STOCKADE_METERING_DIR",
        help_heading = "HTTP and logs"
    )]
    pub metering_dir: Option<PathBuf>,
    /// Seconds between two lines of a tenant [default: 60] (ours)
    #[arg(
        long,
        value_name = "SECONDS",
        env = "STOCKADE_METERING_INTERVAL_SECONDS",
        help_heading = "HTTP and logs"
    )]
    pub metering_interval_seconds: Option<f64>,
    /// error, warn, info, debug or trace [default: info] (ours)
    #[arg(long, env = "STOCKADE_LOG_LEVEL", help_heading = "HTTP and logs")]
    pub log_level: Option<String>,
    /// Directory for lookup-hash logs, JSON lines of what was looked up; empty for none [default: none]
    #[arg(
        long,
        value_name = "DIR",
        env = "STOCKADE_LOOKUP_HASH_LOG_DIR",
        help_heading = "HTTP and logs"
    )]
    pub lookup_hash_log_dir: Option<PathBuf>,
    /// Seconds after which a lookup-hash log ends and a new one begins [default: 21600]
    #[arg(
        long,
        env = "STOCKADE_LOOKUP_HASH_LOG_ROTATION_INTERVAL",
        help_heading = "HTTP and logs"
    )]
    pub lookup_hash_log_rotation_interval: Option<u64>,
    /// Bytes after which a lookup-hash log ends and a new one begins [default: 104857600]
    #[arg(
        long,
        env = "STOCKADE_LOOKUP_HASH_LOG_ROTATION_MAX_SIZE",
        help_heading = "HTTP and logs"
    )]
    pub lookup_hash_log_rotation_max_size: Option<u64>,
    /// Lookup-hash logs that are kept; the oldest is deleted for a new one [default: 100]
    #[arg(
        long,
        env = "STOCKADE_LOOKUP_HASH_LOG_MAX_FILES",
        help_heading = "HTTP and logs"
    )]
    pub lookup_hash_log_max_files: Option<u32>,
    /// human or json [default: human] (ours)
    #[arg(long, env = "STOCKADE_LOG_FORMAT", help_heading = "HTTP and logs")]
    pub log_format: Option<String>,

    /// File whose table `serve` holds these settings; flags and environment win (ours)
    #[arg(long, value_name = "FILE", env = "STOCKADE_CONFIG", action = ArgAction::Set, help_heading = "HTTP and logs")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

impl Settings {
    /// Fills what `self` leaves open from `lower`, the source of lower rank.
    #[must_use]
    pub fn or(self, lower: Self) -> Self {
        macro_rules! first {
            ($($field:ident),* $(,)?) => { Self { $($field: self.$field.or(lower.$field)),* } };
        }
        let lazy = (self.l1_use_lazy, self.no_l1_use_lazy);
        let mut merged = first!(
            host,
            port,
            listen,
            chunk_size,
            instance_id,
            hash_algorithm,
            supported_transfer_mode,
            null_block_id,
            transport,
            engine_type,
            shm_name,
            worker_reap_timeout_seconds,
            worker_registration_grace_seconds,
            session_ttl_seconds,
            kv_event_log_size,
            lookup_hash_log_dir,
            lookup_hash_log_rotation_interval,
            lookup_hash_log_rotation_max_size,
            lookup_hash_log_max_files,
            max_message_mib,
            max_connections,
            request_deadline_seconds,
            state_dir,
            l1_size_gb,
            l1_align_bytes,
            l1_use_lazy,
            no_l1_use_lazy,
            l1_init_size_gb,
            no_l1_checksum,
            l1_write_ttl_seconds,
            l1_read_ttl_seconds,
            eviction_policy,
            eviction_trigger_watermark,
            eviction_ratio,
            l2_adapter,
            l2_store_policy,
            l2_prefetch_policy,
            l2_prefetch_max_in_flight,
            l2_lookup_deadline_seconds,
            l2_prefetch_deadline_seconds,
            l2_store_deadline_seconds,
            l2_store_queue_items,
            l2_store_queue_gb,
            runtime_plugin_locations,
            runtime_plugin_config,
            plugin_watch,
            native_plugins,
            python_wasm,
            plugin_cache_dir,
            http_host,
            http_port,
            prometheus_port,
            http_token_file,
            http_tls_cert,
            http_tls_key,
            http_client_ca,
            http_socket,
            http_insecure,
            enable_tracing,
            otlp_endpoint,
            coordinator_url,
            coordinator_advertise_ip,
            coordinator_heartbeat_interval,
            coordinator_event_reporting,
            coordinator_event_flush_interval,
            coordinator_event_transport,
            tracing_sample_rate,
            audit_log_dir,
            metering_dir,
            metering_interval_seconds,
            log_level,
            log_format,
            config,
        );
        if lazy != (None, None) {
            (merged.l1_use_lazy, merged.no_l1_use_lazy) = lazy;
        }
        merged
    }
}
