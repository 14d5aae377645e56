//! Validated settings: flags win over environment, environment over file, file over defaults.

mod l2;
mod listeners;
pub(crate) mod lmcache_flags;
mod plugin_json;
mod settings;
mod tenants;

use std::{
    collections::BTreeMap, num::NonZeroUsize, path::PathBuf, str::FromStr, sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use serde::Deserialize;
use stockade_cache::{PolicyKind, Tenant};
use stockade_sandbox::{NativePolicy, Policy};

pub use listeners::{DEFAULT as DEFAULT_LISTENER, ListenerConfig};
pub use settings::Settings;

use crate::{
    admin::TlsFiles, coordinator::CoordinatorSettings, service::HashLogSettings, tenancy::Rules,
    tier::TierConfig, traces::TraceSettings,
};

/// One GiB, the unit that LMCache calls GB.
const GIB: f64 = (1u64 << 30) as f64;

/// Why the command line or the file cannot be used; shown as one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Format of the log on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// LMCache's line shape.
    Human,
    /// One JSON object a line.
    Json,
}

/// Everything `stockade serve` needs, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Host of the main ZMQ endpoint, as given.
    pub host: String,
    /// Port of the main ZMQ endpoint; 0 lets the kernel choose.
    pub port: u16,
    /// Where clients come in: the main endpoint first, at least this one.
    pub listeners: Vec<ListenerConfig>,
    /// Tokens per chunk.
    pub chunk_size: NonZeroUsize,
    /// Identity of this server.
    pub instance_id: String,
    /// `engine_driven` or `auto`, as given.
    pub supported_transfer_mode: String,
    /// The block id that engines pass for blocks that hold nothing.
    pub null_block_id: i64,
    /// Name of the segment without leading slash; empty when SHM is off, `None` to derive it from the port.
    pub shm_name: Option<String>,
    /// Silence after which a worker that pinged is reaped; zero never.
    pub worker_reap_timeout: Duration,
    /// Silence after which a worker that never pinged is reaped.
    pub worker_registration_grace: Duration,
    /// Idle time after which a session is reaped.
    pub session_ttl: Duration,
    /// Records kept for KV-event subscribers; zero turns the channel off.
    pub kv_event_log_size: usize,
    /// Where lookups are logged, as LMCache's lookup-hash logs; `None` for nowhere.
    pub lookup_hash_log: Option<HashLogSettings>,
    /// Largest request in bytes, all frames together.
    pub max_message_bytes: usize,
    /// Most connections at once.
    pub max_connections: usize,
    /// Time in which every request is answered.
    pub request_deadline: Duration,
    /// Where what outlives a restart is kept; `None` to keep nothing.
    pub state_dir: Option<PathBuf>,
    /// Size of the pool in bytes.
    pub l1_size_bytes: u64,
    /// Alignment of slots in bytes.
    pub l1_align_bytes: u64,
    /// Let the pool grow with its use.
    pub l1_use_lazy: bool,
    /// Bytes that a growing pool takes at first.
    pub l1_init_size_bytes: u64,
    /// Whether objects that come inline get a checksum.
    pub l1_checksum: bool,
    /// Life of a write reservation.
    pub l1_write_ttl: Duration,
    /// Life of an unused read lock.
    pub l1_read_ttl: Duration,
    /// Which key goes first.
    pub eviction_policy: PolicyKind,
    /// Use of the pool at which eviction starts, share of bytes.
    pub eviction_trigger_watermark: f64,
    /// Share of the bytes in use that one eviction frees.
    pub eviction_ratio: f64,
    /// Who may use how much of the pool.
    pub tenants: Vec<Tenant>,
    /// Whose connection is whose.
    pub tenant_rules: Arc<Rules>,
    /// The file that was read, for what of it is read again while the server runs.
    pub file: Option<PathBuf>,
    /// The second tier; `None` without one.
    pub l2: Option<TierConfig>,
    /// Plugin files and directories.
    pub runtime_plugin_locations: Vec<PathBuf>,
    /// Extra configuration of plugins, a JSON object.
    pub runtime_plugin_config: serde_json::Map<String, serde_json::Value>,
    /// What plugins are granted of what they ask for: `[plugins]` of the file.
    pub plugin_policy: Policy,
    /// Notice plugin files that come, change and go.
    pub plugin_watch: bool,
    /// How far scripts are trusted.
    pub native_plugins: NativePolicy,
    /// The CPython that runs Python plugins in the sandbox.
    pub python_wasm: Option<PathBuf>,
    /// Where compiled plugins are kept; `None` for the user's cache directory.
    pub plugin_cache_dir: Option<PathBuf>,
    /// Host of the HTTP API.
    pub http_host: String,
    /// Port of the HTTP API; 0 lets the kernel choose.
    pub http_port: u16,
    /// A second port for /metrics.
    pub prometheus_port: Option<u16>,
    /// Bearer tokens of the HTTP API.
    pub http_token_file: Option<PathBuf>,
    /// Certificates of the HTTP API; `None` for plain HTTP.
    pub http_tls: Option<TlsFiles>,
    /// Unix socket of the HTTP API.
    pub http_socket: Option<PathBuf>,
    /// Whether anybody may call the HTTP API from anywhere.
    pub http_insecure: bool,
    /// The fleet's coordinator, if there is one.
    pub coordinator: Option<CoordinatorSettings>,
    /// Where traces go; `None` to make none.
    pub traces: Option<TraceSettings>,
    /// Where denials are written.
    pub audit_log_dir: Option<PathBuf>,
    /// Where what tenants use is written.
    pub metering_dir: Option<PathBuf>,
    /// Time between two lines of a tenant.
    pub metering_interval: Duration,
    /// Most verbose level that is logged.
    pub log_level: tracing::Level,
    /// Shape of log lines.
    pub log_format: LogFormat,
}

/// `stockade.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    serve: Settings,
    listener: Vec<listeners::ListenerTable>,
    tenants: BTreeMap<String, tenants::TenantSettings>,
    plugins: Policy,
}

fn read_file(path: &std::path::Path) -> anyhow::Result<File> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_file(&text).map_err(|error| anyhow::anyhow!("{} {error}", path.display()))
}

/// The error says in which line.
fn parse_file(text: &str) -> Result<File, String> {
    toml::from_str(text).map_err(|error| {
        // The whole error is a drawing of several lines; its message and line are one sentence.
        let line = error
            .span()
            .map_or(1, |span| 1 + text[..span.start].matches('\n').count());
        let message = error.message().replace('\n', " ");
        format!("line {line}: {message}")
    })
}

/// What a file grants plugins, and where it has them, for commands that look at plugins without
/// serving. Without a file: nothing is narrowed.
pub(crate) struct PluginSettings {
    pub(crate) policy: Policy,
    pub(crate) locations: Vec<PathBuf>,
    pub(crate) cache_dir: Option<PathBuf>,
}

impl PluginSettings {
    /// # Errors
    /// One sentence that names the file's key and the way out.
    pub(crate) fn load(path: Option<&std::path::Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self {
                policy: Policy::default(),
                locations: Vec::new(),
                cache_dir: None,
            });
        };
        let file = read_file(path).context("--config")?;
        file.plugins.check().map_err(anyhow::Error::msg)?;
        Ok(Self {
            policy: file.plugins,
            locations: file.serve.runtime_plugin_locations.unwrap_or_default(),
            cache_dir: file.serve.plugin_cache_dir,
        })
    }
}

/// Seconds as a duration; refuses what a clock cannot hold.
fn seconds(flag: &str, value: f64) -> Result<Duration, String> {
    if value.is_finite() && (0.0..=1e9).contains(&value) {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(format!("--{flag} {value}: give seconds between 0 and 1e9"))
    }
}

fn fraction(flag: &str, value: f64) -> Result<f64, String> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!(
            "--{flag} {value}: give a number between 0.0 and 1.0"
        ))
    }
}

fn only(flag: &str, given: Option<&str>, served: &[&str], why: &str) -> Result<String, String> {
    let given = given.unwrap_or(served[0]);
    if served.contains(&given) {
        Ok(given.to_owned())
    } else {
        Err(format!(
            "--{flag} {given} is not served: {why}; use {}",
            served.join(" or ")
        ))
    }
}

impl Config {
    /// Fills what the command line and the environment left open from the file they name, and
    /// checks the whole.
    ///
    /// # Errors
    /// One sentence that names the flag or key and the way out.
    pub fn load(flags: Settings) -> Result<Self, UsageError> {
        let file = match &flags.config {
            Some(path) => {
                read_file(path).map_err(|error| UsageError(format!("--config: {error:#}")))?
            }
            None => File::default(),
        };
        Self::over(flags, file)
    }

    /// [`load`](Self::load) with `text` as what the file of `--config` holds.
    ///
    /// # Errors
    /// One sentence that names the line, flag or key and the way out.
    pub fn from_text(flags: Settings, text: &str) -> Result<Self, UsageError> {
        let file = parse_file(text).map_err(|error| UsageError(format!("--config: {error}")))?;
        Self::over(flags, file)
    }

    fn over(flags: Settings, mut file: File) -> Result<Self, UsageError> {
        let in_file = |error| UsageError(format!("--config: {error}"));
        file.plugins.check().map_err(in_file)?;
        let path = flags.config.clone();
        let settings = flags.or(std::mem::take(&mut file.serve));
        let mut config = Self::check(settings, file.listener).map_err(UsageError)?;
        let tenants = tenants::check(file.tenants, config.l1_size_bytes, &config.listeners)
            .map_err(in_file)?;
        config.tenants = tenants.budgets;
        config.tenant_rules = Arc::new(tenants.rules);
        config.file = path;
        config.plugin_policy = file.plugins;
        Ok(config)
    }

    /// Reads the tenants of the file again, for the listeners and the pool that are in use.
    ///
    /// # Errors
    /// One sentence that names the key and the way out; also when there is no file.
    pub fn reread_tenants(&self) -> Result<(Vec<Tenant>, Rules), UsageError> {
        let Some(path) = &self.file else {
            return Err(UsageError(
                "there is no --config file to read tenants from".to_owned(),
            ));
        };
        let file = read_file(path).map_err(|error| UsageError(format!("--config: {error:#}")))?;
        let tenants = tenants::check(file.tenants, self.l1_size_bytes, &self.listeners)
            .map_err(|error| UsageError(format!("--config: {error}")))?;
        Ok((tenants.budgets, tenants.rules))
    }

    /// Puts defaults in and checks every value.
    fn check(settings: Settings, listeners: Vec<listeners::ListenerTable>) -> Result<Self, String> {
        only(
            "transport",
            settings.transport.as_deref(),
            &["zmq"],
            "engines reach this server over ZMQ",
        )?;
        only(
            "engine-type",
            settings.engine_type.as_deref(),
            &["default"],
            "CacheBlend is not part of this server",
        )?;
        only(
            "hash-algorithm",
            settings.hash_algorithm.as_deref(),
            &["blake3"],
            "chunks are named by their blake3 hash",
        )?;
        let coordinator = coordinator(&settings)?;
        let supported_transfer_mode = only(
            "supported-transfer-mode",
            settings.supported_transfer_mode.as_deref(),
            &["auto", "engine_driven", "lmcache_driven"],
            "LMCache has no such mode",
        )?;

        let l2 = l2::check(&settings)?;
        let size_gb = settings.l1_size_gb.ok_or("--l1-size-gb is missing: say how many GiB of memory the pool may take, for example --l1-size-gb 10")?;
        if !size_gb.is_finite() || size_gb <= 0.0 || size_gb > (1u64 << 24) as f64 {
            return Err(format!(
                "--l1-size-gb {size_gb}: give a number of GiB above 0"
            ));
        }
        let l1_align_bytes = settings.l1_align_bytes.unwrap_or(4096);
        if !l1_align_bytes.is_power_of_two() || !(64..=1 << 30).contains(&l1_align_bytes) {
            return Err(format!(
                "--l1-align-bytes {l1_align_bytes}: give a power of two between 64 and 1073741824"
            ));
        }
        // Whole pages, so that the segment's size is what was asked for on every kernel.
        let page = l1_align_bytes.max(4096);
        let l1_size_bytes = ((size_gb * GIB) as u64 / page) * page;
        if l1_size_bytes == 0 {
            return Err(format!(
                "--l1-size-gb {size_gb}: the pool would be smaller than one aligned slot of {page} bytes; give more"
            ));
        }

        if l1_size_bytes / l1_align_bytes >= 1 << 32 {
            return Err(format!(
                "--l1-size-gb {size_gb}: a pool takes less than 2^32 aligned slots; raise --l1-align-bytes, now {l1_align_bytes}"
            ));
        }

        let init_size_gb = settings.l1_init_size_gb.unwrap_or(20.0);
        if !init_size_gb.is_finite() || init_size_gb < 0.0 {
            return Err(format!(
                "--l1-init-size-gb {init_size_gb}: give a number of GiB, 0 or more"
            ));
        }

        let chunk_size = settings.chunk_size.unwrap_or(256);
        let chunk_size = NonZeroUsize::new(chunk_size as usize)
            .filter(|&size| size.get() <= 1 << 20)
            .ok_or(format!(
                "--chunk-size {chunk_size}: give a number of tokens between 1 and 1048576"
            ))?;

        let shm_name = match settings.shm_name {
            Some(name) => Some(shm_name(name)?),
            None => None,
        };
        let reap = settings.worker_reap_timeout_seconds.unwrap_or(120.0);
        let grace = settings.worker_registration_grace_seconds.unwrap_or(3600.0);
        if reap > grace {
            return Err(format!(
                "--worker-registration-grace-seconds {grace}: must not be below --worker-reap-timeout-seconds ({reap})"
            ));
        }
        let policy = settings.eviction_policy.as_deref().unwrap_or("LRU");
        let eviction_policy = PolicyKind::from_str(policy)
            .map_err(|error| format!("--eviction-policy {policy}: {error}"))?;

        let extra = settings.runtime_plugin_config.as_deref().unwrap_or("{}");
        let runtime_plugin_config = match serde_json::from_str(extra) {
            Ok(serde_json::Value::Object(map)) => map,
            Ok(_) => {
                return Err(
                    "--runtime-plugin-config: give a JSON object, for example '{\"key\": 1}'"
                        .to_owned(),
                );
            }
            Err(error) => return Err(format!("--runtime-plugin-config is not JSON: {error}")),
        };
        let native_plugins = match settings.native_plugins.as_deref() {
            Some(policy) => policy
                .parse()
                .map_err(|error| format!("--native-plugins {policy}: {error}"))?,
            None => NativePolicy::default(),
        };
        let max_message_mib = settings
            .max_message_mib
            .unwrap_or(match shm_name.as_deref() {
                Some("") => 1024,
                _ => 256,
            });
        if !(1..=65_536).contains(&max_message_mib) {
            return Err(format!(
                "--max-message-mib {max_message_mib}: give a number between 1 and 65536"
            ));
        }
        let max_connections = settings.max_connections.unwrap_or(4096);
        if max_connections == 0 {
            return Err("--max-connections 0 would serve nobody: give a number above 0".to_owned());
        }
        let deadline = settings.request_deadline_seconds.unwrap_or(30.0);
        if deadline <= 0.0 {
            return Err(format!(
                "--request-deadline-seconds {deadline}: give a number above 0"
            ));
        }
        let lookup_hash_log = match settings.lookup_hash_log_dir {
            Some(directory) if !directory.as_os_str().is_empty() => {
                let interval = settings.lookup_hash_log_rotation_interval.unwrap_or(21_600);
                let max_bytes = settings
                    .lookup_hash_log_rotation_max_size
                    .unwrap_or(100 << 20);
                let max_files = settings.lookup_hash_log_max_files.unwrap_or(100);
                for (flag, value) in [
                    ("rotation-interval", interval),
                    ("rotation-max-size", max_bytes),
                    ("max-files", u64::from(max_files)),
                ] {
                    if value == 0 {
                        return Err(format!("--lookup-hash-log-{flag} 0: give a number above 0"));
                    }
                }
                Some(HashLogSettings {
                    directory,
                    rotation_interval: Duration::from_secs(interval),
                    rotation_max_bytes: max_bytes,
                    max_files: max_files as usize,
                })
            }
            _ => None,
        };
        let http_host = settings.http_host.unwrap_or_else(|| "127.0.0.1".to_owned());
        let http_insecure = settings.http_insecure.unwrap_or(false);
        if !is_loopback(&http_host) && settings.http_token_file.is_none() && !http_insecure {
            return Err(format!(
                "--http-host {http_host} is reachable from other machines and there are no tokens: give --http-token-file, keep 127.0.0.1, or say --http-insecure if anybody may do everything"
            ));
        }
        let http_tls = match (settings.http_tls_cert, settings.http_tls_key) {
            (Some(cert), Some(key)) => Some(TlsFiles {
                cert,
                key,
                client_ca: settings.http_client_ca,
            }),
            (None, None) if settings.http_client_ca.is_some() => {
                return Err(
                    "--http-client-ca needs TLS: give --http-tls-cert and --http-tls-key"
                        .to_owned(),
                );
            }
            (None, None) => None,
            _ => {
                return Err(
                    "--http-tls-cert and --http-tls-key belong together: give both".to_owned(),
                );
            }
        };
        let traces = traces(
            settings.enable_tracing.unwrap_or(false),
            settings.otlp_endpoint.as_deref(),
            settings.tracing_sample_rate,
        )?;
        let level = settings.log_level.as_deref().unwrap_or("info");
        let log_format = match settings.log_format.as_deref().unwrap_or("human") {
            "human" => LogFormat::Human,
            "json" => LogFormat::Json,
            other => return Err(format!("--log-format {other}: give human or json")),
        };
        Ok(Self {
            host: settings.host.unwrap_or_else(|| "localhost".to_owned()),
            port: settings.port.unwrap_or(5555),
            listeners: listeners::check(&settings.listen.unwrap_or_default(), listeners)?,
            chunk_size,
            instance_id: settings
                .instance_id
                .unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
            supported_transfer_mode,
            null_block_id: settings.null_block_id.unwrap_or(0),
            shm_name,
            worker_reap_timeout: seconds("worker-reap-timeout-seconds", reap)?,
            worker_registration_grace: seconds("worker-registration-grace-seconds", grace)?,
            session_ttl: seconds(
                "session-ttl-seconds",
                settings.session_ttl_seconds.unwrap_or(600.0),
            )?,
            kv_event_log_size: settings.kv_event_log_size.unwrap_or(32_768) as usize,
            lookup_hash_log,
            max_message_bytes: (max_message_mib as usize) << 20,
            max_connections: max_connections as usize,
            request_deadline: seconds("request-deadline-seconds", deadline)?,
            state_dir: settings.state_dir,
            l1_size_bytes,
            l1_align_bytes,
            l1_use_lazy: settings.l1_use_lazy.unwrap_or(false)
                && !settings.no_l1_use_lazy.unwrap_or(false),
            l1_init_size_bytes: ((init_size_gb * GIB) as u64).min(l1_size_bytes),
            l1_checksum: !settings.no_l1_checksum.unwrap_or(false),
            l1_write_ttl: Duration::from_secs(
                settings.l1_write_ttl_seconds.unwrap_or(600).min(1 << 30),
            ),
            l1_read_ttl: Duration::from_secs(
                settings.l1_read_ttl_seconds.unwrap_or(300).min(1 << 30),
            ),
            eviction_policy,
            eviction_trigger_watermark: fraction(
                "eviction-trigger-watermark",
                settings.eviction_trigger_watermark.unwrap_or(0.8),
            )?,
            eviction_ratio: fraction("eviction-ratio", settings.eviction_ratio.unwrap_or(0.2))?,
            tenants: Vec::new(),
            tenant_rules: Arc::default(),
            file: None,
            l2,
            runtime_plugin_locations: settings.runtime_plugin_locations.unwrap_or_default(),
            runtime_plugin_config,
            plugin_policy: Policy::default(),
            plugin_watch: settings.plugin_watch.unwrap_or(false),
            native_plugins,
            python_wasm: settings.python_wasm,
            plugin_cache_dir: settings.plugin_cache_dir,
            http_host,
            http_port: settings.http_port.unwrap_or(8080),
            prometheus_port: settings.prometheus_port,
            http_token_file: settings.http_token_file,
            http_tls,
            http_socket: settings.http_socket,
            http_insecure,
            coordinator,
            traces,
            audit_log_dir: settings.audit_log_dir,
            metering_dir: settings.metering_dir,
            metering_interval: seconds(
                "metering-interval-seconds",
                settings.metering_interval_seconds.unwrap_or(60.0).max(1.0),
            )?,
            log_level: tracing::Level::from_str(level).map_err(|_| {
                format!("--log-level {level}: give error, warn, info, debug or trace")
            })?,
            log_format,
        })
    }
}

/// The coordinator that the settings, or else LMCache's own variable, name.
fn coordinator(settings: &Settings) -> Result<Option<CoordinatorSettings>, String> {
    only(
        "coordinator-event-transport",
        settings.coordinator_event_transport.as_deref(),
        &["http"],
        "events do not go through Kafka",
    )?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let url = settings.coordinator_url.clone();
    let Some(url) = url.or_else(|| variable("LMCACHE_COORDINATOR_URL")) else {
        return Ok(None);
    };
    let above_zero = |flag: &str, given: Option<f64>, default: f64| {
        seconds(flag, given.unwrap_or(default)).and_then(|value| match value.is_zero() {
            true => Err(format!("--{flag} 0: give seconds above 0")),
            false => Ok(value),
        })
    };
    Ok(Some(CoordinatorSettings {
        url: CoordinatorSettings::url(&url)
            .map_err(|error| format!("--coordinator-url: {error}"))?,
        advertise_ip: settings
            .coordinator_advertise_ip
            .clone()
            .or_else(|| variable("LMCACHE_COORDINATOR_ADVERTISE_IP")),
        heartbeat: above_zero(
            "coordinator-heartbeat-interval",
            settings.coordinator_heartbeat_interval,
            5.0,
        )?,
        reports_events: settings.coordinator_event_reporting.unwrap_or(false)
            || variable("LMCACHE_COORDINATOR_EVENT_REPORTING")
                .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes")),
        flush: above_zero(
            "coordinator-event-flush-interval",
            settings.coordinator_event_flush_interval,
            1.0,
        )?,
    }))
}

/// LMCache wants an endpoint for traces too; one without traces it would push metrics to.
fn traces(
    is_on: bool,
    endpoint: Option<&str>,
    sample_rate: Option<f64>,
) -> Result<Option<TraceSettings>, String> {
    let sample_rate = fraction("tracing-sample-rate", sample_rate.unwrap_or(1.0))?;
    match (is_on, endpoint) {
        (false, None) => Ok(None),
        (true, None) => Err(
            "--enable-tracing needs --otlp-endpoint: say where an OTLP receiver listens, for example http://localhost:4317"
                .to_owned(),
        ),
        (false, Some(_)) => Err(
            "--otlp-endpoint alone would have nothing to say, because metrics are scraped at /metrics here: give --enable-tracing with it, or leave it out"
                .to_owned(),
        ),
        (true, Some(endpoint)) => Ok(Some(TraceSettings {
            endpoint: TraceSettings::endpoint(endpoint)
                .map_err(|error| format!("--otlp-endpoint: {error}"))?,
            sample_rate,
        })),
    }
}

/// Whether only this machine reaches the host, as far as its text tells.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// A segment's name as the wire carries it: no slash, short enough for a file in /dev/shm.
fn shm_name(name: String) -> Result<String, String> {
    let bare = name.strip_prefix('/').unwrap_or(&name).to_owned();
    if bare.len() > 200 || bare.contains(['/', '\0']) || bare == "." || bare == ".." {
        return Err(format!(
            "--shm-name {name:?}: give a name of at most 200 bytes without '/', or \"\" to turn shared memory off"
        ));
    }
    Ok(bare)
}
