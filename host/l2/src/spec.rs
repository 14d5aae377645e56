//! `--l2-adapter`: one JSON object with LMCache's names becomes one adapter.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    adapter::{
        Adapter,
        fault_inject::{FaultInjectAdapter, Faults, Injected},
        fs::{FsAdapter, FsOptions},
        mock::MockAdapter,
        redis::{RedisAdapter, RedisOptions},
        s3::{S3Adapter, S3Options},
    },
    capped::Capped,
};

/// One GiB, the unit that LMCache calls GB.
const GIB: f64 = (1_u64 << 30) as f64;
const SECRET: &str = "[redacted]";
/// Defaults of `valkey_l2_adapter.py`.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Most values that are written at once, whatever the number of threads LMCache would use: each
/// is in memory meanwhile.
const MAX_WRITERS: usize = 16;

fn hidden(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { SECRET }
}

/// An adapter as configured, checked.
///
/// Follows the `*AdapterConfig` classes of LMCache 0.5.6's `v1/distributed/l2_adapters/`: names,
/// types and defaults are theirs, except where a field's documentation says "ours". Unknown
/// fields are refused, because a misspelt one would silently mean its default.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpec {
    kind: Kind,
    cap: Option<Cap>,
    shared: bool,
}

/// A bound on what an adapter keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cap {
    /// `max_capacity_gb` in bytes.
    pub max_bytes: u64,
    /// Share of it at which eviction starts.
    pub trigger_watermark: f64,
    /// Share of what is kept that one eviction removes.
    pub eviction_ratio: f64,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Fs {
        options: FsOptions,
        native: bool,
    },
    Redis {
        options: RedisOptions,
        is_valkey: bool,
    },
    S3(S3Options),
    Mock(MockFields),
    FaultInject {
        inner: Box<AdapterSpec>,
        faults: Faults,
    },
}

/// Fields that every type has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CommonFields {
    eviction: Option<EvictionFields>,
    serde: Option<Value>,
    persist_enabled: Option<bool>,
    affinity_tag: Option<String>,
    shared: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EvictionFields {
    eviction_policy: String,
    #[serde(default = "default_watermark")]
    trigger_watermark: f64,
    #[serde(default = "default_ratio")]
    eviction_ratio: f64,
}

fn default_watermark() -> f64 {
    0.8
}

fn default_ratio() -> f64 {
    0.2
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FsFields {
    base_path: PathBuf,
    relative_tmp_dir: Option<String>,
    read_ahead_size: Option<u64>,
    #[serde(default)]
    use_odirect: bool,
    num_workers: Option<u32>,
    #[serde(default)]
    max_capacity_gb: f64,
    /// Ours.
    #[serde(default)]
    folder_by_salt: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RespFields {
    host: String,
    port: u16,
    num_workers: Option<u32>,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    max_capacity_gb: f64,
    /// Ours.
    #[serde(default)]
    folder_by_salt: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ValkeyFields {
    startup_nodes: String,
    #[serde(default)]
    cluster_mode: bool,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    key_prefix: String,
    num_workers: Option<u32>,
    #[serde(default)]
    tls_enable: bool,
    database_id: Option<i64>,
    request_timeout: Option<f64>,
    connection_timeout: Option<f64>,
    #[serde(default)]
    max_capacity_gb: f64,
    ttl_seconds: Option<u64>,
    /// Ours.
    #[serde(default)]
    folder_by_salt: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct S3Fields {
    s3_endpoint: String,
    s3_region: String,
    s3_num_io_threads: Option<u32>,
    /// Both kinds of HTTP are offered, and the server chooses.
    #[serde(rename = "s3_prefer_http2")]
    _s3_prefer_http2: Option<bool>,
    #[serde(default)]
    s3_enable_s3express: bool,
    #[serde(default)]
    disable_tls: bool,
    aws_access_key_id: Option<String>,
    aws_secret_access_key: Option<String>,
    #[serde(default)]
    max_capacity_gb: f64,
    /// Ours: the bucket is named in the path, and `s3_endpoint` is the host alone.
    s3_bucket: Option<String>,
    /// Ours.
    #[serde(default)]
    folder_by_salt: bool,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct MockFields {
    max_size_gb: f64,
    mock_bandwidth_gb: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultFields {
    inner: Value,
    #[serde(default)]
    rate: f64,
    #[serde(default)]
    seed: i64,
    #[serde(default)]
    gap_indices: Vec<u64>,
    #[serde(default)]
    gap_tail_ratios: Vec<f64>,
    /// Ours, as all below.
    #[serde(default)]
    delay_ms: u64,
    find: Option<Injected>,
    load: Option<Injected>,
    store: Option<Injected>,
}

/// Types of LMCache that are not served, and why.
const REFUSED: &[(&str, &str)] = &[
    (
        "aerospike",
        "no Rust client of Aerospike is kept well enough; use valkey or s3",
    ),
    ("bigtable", "Bigtable is not served; use s3 or valkey"),
    (
        "dax",
        "device memory is not served; use fs on a file system on it",
    ),
    (
        "hf3fs",
        "3FS's user-space client is not served; mount it and use fs",
    ),
    ("hfbucket", "Hugging Face buckets are not served; use s3"),
    (
        "mooncake_store",
        "Mooncake's engine is C++ that would run inside the server; use valkey or s3",
    ),
    (
        "native_plugin",
        "it loads foreign code into the server; write a sandboxed plugin",
    ),
    (
        "nixl_native",
        "NIXL is not served; use fs or s3 for the same storage",
    ),
    (
        "nixl_store",
        "NIXL is not served; use fs or s3 for the same storage",
    ),
    (
        "nixl_store_dynamic",
        "NIXL is not served; use fs or s3 for the same storage",
    ),
    (
        "p2p",
        "peer-to-peer reads are not served; share a valkey or s3",
    ),
    (
        "plugin",
        "it loads foreign code into the server; write a sandboxed plugin",
    ),
    (
        "raw_block",
        "raw block devices are not served; make a file system on it and use fs",
    ),
    (
        "sagemaker-hyperpod",
        "HyperPod's daemon is not served; use s3",
    ),
];

impl AdapterSpec {
    /// Reads one `--l2-adapter`. `environment` gives variables that LMCache reads too
    /// (`LMCACHE_RESP_PASSWORD`, ...).
    ///
    /// # Errors
    /// A sentence that names the field and the way out, and no secret.
    pub fn parse(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text)
            // The position only: the text may hold a password.
            .map_err(|error| {
                format!(
                    "is not JSON (line {} column {})",
                    error.line(),
                    error.column()
                )
            })?;
        Self::from_value(value, environment)
    }

    fn from_value(
        value: Value,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let Value::Object(mut fields) = value else {
            return Err(
                "give a JSON object, for example '{\"type\": \"fs\", \"base_path\": \"/data\"}'"
                    .to_owned(),
            );
        };
        let Some(Value::String(kind)) = fields.remove("type") else {
            return Err(format!(
                "type is missing: give one of {}",
                SERVED.join(", ")
            ));
        };
        if let Some((_, why)) = REFUSED.iter().find(|(name, _)| *name == kind) {
            return Err(format!("type {kind}: {why}"));
        }
        let common = common_fields(&mut fields).map_err(|error| format!("type {kind}: {error}"))?;
        Self::of_kind(&kind, fields, common, environment)
            .map_err(|error| format!("type {kind}: {error}"))
    }

    fn of_kind(
        kind: &str,
        fields: Map<String, Value>,
        common: CommonFields,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let (kind, max_capacity_gb) = match kind {
            "fs" | "fs_native" => {
                let native = kind == "fs_native";
                let fields: FsFields = typed(fields)?;
                if fields.base_path.as_os_str().is_empty() {
                    return Err("base_path is empty".to_owned());
                }
                let options = FsOptions {
                    base_path: fields.base_path,
                    relative_tmp_dir: fields.relative_tmp_dir.filter(|dir| !dir.is_empty()),
                    use_odirect: fields.use_odirect,
                    read_ahead_bytes: fields.read_ahead_size,
                    workers: positive("num_workers", fields.num_workers.unwrap_or(4))?,
                    folder_by_salt: fields.folder_by_salt,
                };
                (Kind::Fs { options, native }, fields.max_capacity_gb)
            }
            "resp" => {
                let fields: RespFields = typed(fields)?;
                let or_variable = |given: String, variable: &str| match given.is_empty() {
                    true => environment(variable).unwrap_or_default(),
                    false => given,
                };
                if fields.host.is_empty() {
                    return Err("host is empty".to_owned());
                }
                if fields.port == 0 {
                    return Err("port 0: give the server's port".to_owned());
                }
                let options = RedisOptions {
                    nodes: vec![(fields.host, fields.port)],
                    is_cluster: false,
                    username: or_variable(fields.username, "LMCACHE_RESP_USERNAME"),
                    password: or_variable(fields.password, "LMCACHE_RESP_PASSWORD"),
                    tls: false,
                    database: 0,
                    key_prefix: String::new(),
                    workers: positive("num_workers", fields.num_workers.unwrap_or(8))?,
                    request_timeout: REQUEST_TIMEOUT,
                    connection_timeout: CONNECTION_TIMEOUT,
                    ttl_seconds: None,
                    folder_by_salt: fields.folder_by_salt,
                };
                let is_valkey = false;
                (Kind::Redis { options, is_valkey }, fields.max_capacity_gb)
            }
            "valkey" => {
                let fields: ValkeyFields = typed(fields)?;
                if fields.key_prefix.contains('@') {
                    return Err("key_prefix contains '@', which separates it".to_owned());
                }
                if fields.ttl_seconds == Some(0) {
                    return Err("ttl_seconds 0: give a number above 0, or leave it out".to_owned());
                }
                let options = RedisOptions {
                    nodes: startup_nodes(&fields.startup_nodes)?,
                    is_cluster: fields.cluster_mode,
                    username: fields.username,
                    password: fields.password,
                    tls: fields.tls_enable,
                    database: fields.database_id.unwrap_or(0),
                    key_prefix: fields.key_prefix,
                    workers: positive("num_workers", fields.num_workers.unwrap_or(8))?,
                    request_timeout: timeout(
                        "request_timeout",
                        fields.request_timeout,
                        REQUEST_TIMEOUT,
                    )?,
                    connection_timeout: timeout(
                        "connection_timeout",
                        fields.connection_timeout,
                        CONNECTION_TIMEOUT,
                    )?,
                    ttl_seconds: fields.ttl_seconds,
                    folder_by_salt: fields.folder_by_salt,
                };
                let is_valkey = true;
                (Kind::Redis { options, is_valkey }, fields.max_capacity_gb)
            }
            "s3" => {
                let fields: S3Fields = typed(fields)?;
                let endpoint = fields.s3_endpoint;
                let endpoint = endpoint.strip_prefix("s3://").unwrap_or(&endpoint);
                let endpoint = endpoint.trim_end_matches('/').to_owned();
                if endpoint.is_empty() || endpoint.contains(['/', '@']) {
                    return Err("s3_endpoint: give <bucket>.<host> without a path".to_owned());
                }
                if fields.s3_bucket.is_none() && !endpoint.contains('.') {
                    return Err("s3_endpoint names no bucket: give <bucket>.<host>, or the host here and s3_bucket".to_owned());
                }
                let credentials = match (fields.aws_access_key_id, fields.aws_secret_access_key) {
                    (Some(id), Some(secret)) => Some((id, secret)),
                    (None, None) => None,
                    _ => {
                        return Err("aws_access_key_id and aws_secret_access_key belong together: give both or none".to_owned());
                    }
                };
                let options = S3Options {
                    endpoint,
                    bucket: fields.s3_bucket,
                    region: fields.s3_region,
                    tls: !fields.disable_tls,
                    express: fields.s3_enable_s3express,
                    credentials,
                    workers: positive("s3_num_io_threads", fields.s3_num_io_threads.unwrap_or(64))?,
                    folder_by_salt: fields.folder_by_salt,
                };
                (Kind::S3(options), fields.max_capacity_gb)
            }
            "mock" => {
                let fields: MockFields = typed(fields)?;
                for (name, value) in [
                    ("max_size_gb", fields.max_size_gb),
                    ("mock_bandwidth_gb", fields.mock_bandwidth_gb),
                ] {
                    if !value.is_finite() || value <= 0.0 {
                        return Err(format!("{name} {value}: give a number above 0"));
                    }
                }
                (Kind::Mock(fields), 0.0)
            }
            "fault_inject" => {
                let fields: FaultFields = typed(fields)?;
                if !(0.0..=1.0).contains(&fields.rate) {
                    return Err(format!("rate {}: give a number from 0 to 1", fields.rate));
                }
                if !fields.gap_indices.is_empty() || !fields.gap_tail_ratios.is_empty() {
                    return Err("gap_indices and gap_tail_ratios: there is no segmented prefix that could have gaps; use rate".to_owned());
                }
                let inner = Self::from_value(fields.inner, environment)
                    .map_err(|error| format!("inner: {error}"))?;
                let faults = Faults {
                    rate: fields.rate,
                    seed: fields.seed,
                    delay: Duration::from_millis(fields.delay_ms),
                    find: fields.find,
                    load: fields.load,
                    store: fields.store,
                };
                let inner = Box::new(inner);
                (Kind::FaultInject { inner, faults }, 0.0)
            }
            _ => return Err(format!("is not known: give one of {}", SERVED.join(", "))),
        };
        Ok(Self {
            kind,
            cap: cap(max_capacity_gb, common.eviction)?,
            shared: common.shared,
        })
    }

    /// Its type, as configured.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match &self.kind {
            Kind::Fs { native: false, .. } => "fs",
            Kind::Fs { native: true, .. } => "fs_native",
            Kind::Redis {
                is_valkey: false, ..
            } => "resp",
            Kind::Redis {
                is_valkey: true, ..
            } => "valkey",
            Kind::S3(_) => "s3",
            Kind::Mock(_) => "mock",
            Kind::FaultInject { .. } => "fault_inject",
        }
    }

    /// Whether several servers use the same storage (`shared`).
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Its bound, if it has one.
    #[must_use]
    pub fn cap(&self) -> Option<Cap> {
        match &self.kind {
            Kind::FaultInject { inner, .. } => inner.cap(),
            _ => self.cap,
        }
    }

    /// Values that are worked on at once.
    #[must_use]
    pub fn concurrency(&self) -> usize {
        match &self.kind {
            Kind::Fs { options, .. } => options.workers,
            Kind::Redis { options, .. } => options.workers,
            Kind::S3(options) => options.workers.min(MAX_WRITERS),
            Kind::Mock(_) => 4,
            Kind::FaultInject { inner, .. } => inner.concurrency(),
        }
    }

    /// The configuration without secrets, for logs, `/config` and plugins.
    #[must_use]
    pub fn redacted(&self) -> Value {
        let mut object = match &self.kind {
            Kind::Fs { options, .. } => json!({
                "base_path": options.base_path,
                "relative_tmp_dir": options.relative_tmp_dir,
                "read_ahead_size": options.read_ahead_bytes,
                "use_odirect": options.use_odirect,
                "num_workers": options.workers,
                "folder_by_salt": options.folder_by_salt,
            }),
            Kind::Redis { options, is_valkey } => json!({
                if *is_valkey { "startup_nodes" } else { "host" }: options
                    .nodes
                    .iter()
                    .map(|(host, port)| format!("{host}:{port}"))
                    .collect::<Vec<_>>()
                    .join(","),
                "cluster_mode": options.is_cluster,
                "username": options.username,
                "password": hidden(&options.password),
                "key_prefix": options.key_prefix,
                "num_workers": options.workers,
                "tls_enable": options.tls,
                "database_id": options.database,
                "ttl_seconds": options.ttl_seconds,
                "folder_by_salt": options.folder_by_salt,
            }),
            Kind::S3(options) => json!({
                "s3_endpoint": options.endpoint,
                "s3_bucket": options.bucket,
                "s3_region": options.region,
                "s3_enable_s3express": options.express,
                "disable_tls": !options.tls,
                "aws_access_key_id": options.credentials.as_ref().map(|_| SECRET),
                "aws_secret_access_key": options.credentials.as_ref().map(|_| SECRET),
                "s3_num_io_threads": options.workers,
                "folder_by_salt": options.folder_by_salt,
            }),
            Kind::Mock(fields) => json!({
                "max_size_gb": fields.max_size_gb,
                "mock_bandwidth_gb": fields.mock_bandwidth_gb,
            }),
            Kind::FaultInject { inner, faults } => json!({
                "inner": inner.redacted(),
                "rate": faults.rate,
                "seed": faults.seed,
            }),
        };
        if let Some(object) = object.as_object_mut() {
            object.insert("type".to_owned(), json!(self.type_name()));
            object.insert("shared".to_owned(), json!(self.shared));
            if let Some(cap) = self.cap {
                let gib = cap.max_bytes as f64 / GIB;
                object.insert("max_capacity_gb".to_owned(), json!(gib));
                let eviction = json!({
                    "eviction_policy": "LRU",
                    "trigger_watermark": cap.trigger_watermark,
                    "eviction_ratio": cap.eviction_ratio,
                });
                object.insert("eviction".to_owned(), eviction);
            }
        }
        object
    }

    /// Opens the storage. What is local must be usable; what is behind a network may be down.
    /// Blocks, and must be called within a Tokio runtime.
    ///
    /// # Errors
    /// A sentence that names the field and the way out.
    pub fn open(&self) -> Result<Arc<dyn Adapter>, String> {
        let adapter: Arc<dyn Adapter> = match &self.kind {
            Kind::Fs { options, .. } => Arc::new(FsAdapter::open(options.clone())?),
            Kind::Redis { options, .. } => Arc::new(RedisAdapter::open(options.clone())?),
            Kind::S3(options) => Arc::new(S3Adapter::open(options.clone())?),
            Kind::Mock(fields) => Arc::new(MockAdapter::new(
                (fields.max_size_gb * GIB) as u64,
                fields.mock_bandwidth_gb * GIB,
            )),
            Kind::FaultInject { inner, faults } => {
                Arc::new(FaultInjectAdapter::new(inner.open()?, *faults))
            }
        };
        Ok(match self.cap {
            Some(cap) => Capped::start(adapter, cap, self.type_name()),
            None => adapter,
        })
    }
}

/// Types that are served.
const SERVED: &[&str] = &[
    "fs",
    "fs_native",
    "resp",
    "valkey",
    "s3",
    "mock",
    "fault_inject",
];

/// Takes out what every type has.
fn common_fields(fields: &mut Map<String, Value>) -> Result<CommonFields, String> {
    let names = [
        "eviction",
        "serde",
        "persist_enabled",
        "affinity_tag",
        "shared",
    ];
    let common: Map<String, Value> = names
        .iter()
        .filter_map(|name| fields.remove_entry(*name))
        .collect();
    let common: CommonFields = typed(common)?;
    if common.serde.is_some() {
        return Err(
            "serde: values are stored as they are; leave it out and let the storage encrypt"
                .to_owned(),
        );
    }
    if common.persist_enabled == Some(false) {
        return Err("persist_enabled: what is stored stays stored; leave it out".to_owned());
    }
    if common
        .affinity_tag
        .as_deref()
        .is_some_and(|tag| tag != "_default")
    {
        return Err("affinity_tag: there is one L1, leave it out".to_owned());
    }
    Ok(common)
}

fn typed<T: serde::de::DeserializeOwned>(fields: Map<String, Value>) -> Result<T, String> {
    // Messages of serde_json name the field, and quote values of wrong type: none of a secret
    // field, whose type is free text.
    serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())
}

fn timeout(name: &str, given: Option<f64>, default: Duration) -> Result<Duration, String> {
    match given {
        None => Ok(default),
        Some(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(Duration::from_secs_f64(seconds)),
        Some(seconds) => Err(format!(
            "{name} {seconds}: give seconds above 0 and up to 3600"
        )),
    }
}

fn startup_nodes(text: &str) -> Result<Vec<(String, u16)>, String> {
    let wrong = || "startup_nodes: give host:port, or several separated by commas".to_owned();
    let nodes = text
        .split(',')
        .map(str::trim)
        .filter(|node| !node.is_empty());
    let nodes: Vec<_> = nodes
        .map(|node| {
            let (host, port) = node.rsplit_once(':').ok_or_else(wrong)?;
            let port = port.parse().ok().filter(|&port: &u16| port > 0);
            match host.is_empty() {
                true => Err(wrong()),
                false => Ok((host.to_owned(), port.ok_or_else(wrong)?)),
            }
        })
        .collect::<Result<_, String>>()?;
    match nodes.is_empty() {
        true => Err(wrong()),
        false => Ok(nodes),
    }
}

fn positive(name: &str, value: u32) -> Result<usize, String> {
    match value {
        1..=1024 => Ok(value as usize),
        _ => Err(format!("{name} {value}: give a number from 1 to 1024")),
    }
}

fn cap(max_capacity_gb: f64, eviction: Option<EvictionFields>) -> Result<Option<Cap>, String> {
    if !max_capacity_gb.is_finite() || !(0.0..=1e9).contains(&max_capacity_gb) {
        return Err(format!(
            "max_capacity_gb {max_capacity_gb}: give a number of GiB, 0 for no bound"
        ));
    }
    let eviction = eviction.unwrap_or(EvictionFields {
        eviction_policy: "LRU".to_owned(),
        trigger_watermark: default_watermark(),
        eviction_ratio: default_ratio(),
    });
    match &*eviction.eviction_policy {
        "LRU" => {}
        "noop" => return Ok(None),
        other => {
            return Err(format!(
                "eviction.eviction_policy {other}: what is in storage is evicted by LRU, or not at all with noop"
            ));
        }
    }
    for (name, value) in [
        ("trigger_watermark", eviction.trigger_watermark),
        ("eviction_ratio", eviction.eviction_ratio),
    ] {
        if !(0.0..=1.0).contains(&value) {
            return Err(format!(
                "eviction.{name} {value}: give a number from 0 to 1"
            ));
        }
    }
    Ok((max_capacity_gb > 0.0).then_some(Cap {
        max_bytes: (max_capacity_gb * GIB) as u64,
        trigger_watermark: eviction.trigger_watermark,
        eviction_ratio: eviction.eviction_ratio,
    }))
}
