//! Redis and Valkey, one server or a cluster: LMCache's `resp` and `valkey`.
//!
//! Keys and values are those of `resp_l2_adapter.py` and `valkey_l2_adapter.py` of LMCache 0.5.6.
//! The seal of a value is a sibling key in the same hash slot, written in one transaction with
//! it. LMCache does not know of it: where it writes other bytes over ours, the value counts as
//! damaged once and is stored anew.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use redis::{
    Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo as _, Pipeline, RedisConnectionInfo, RedisError, ServerErrorKind,
    aio::{ConnectionManager, ConnectionManagerConfig},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    cluster_routing::{RoutingInfo, SingleNodeRoutingInfo},
};
use serde_json::json;
use tokio::sync::{Mutex, mpsc};

use super::{Adapter, AdapterError, Entry, Form, IsWanted};
use crate::{
    integrity::{Fault, Seal},
    name::ObjectName,
};

/// How long a damaged value is kept for looking at.
const QUARANTINE_SECONDS: u64 = 3600;
/// How the names of our own keys begin.
const BESIDE: &str = "stockade:";
const QUARANTINE: &str = "stockade:quarantine:";
/// Times that a command goes on to where a cluster sends it: the slot has moved (`MOVED`), is moving
/// (`ASK`), or its node has another address now. The pause between them is far below the deadline of
/// a lookup; the library's own begins above it.
const CLUSTER_RETRIES: u32 = 3;
const CLUSTER_RETRY_MS: Range<u64> = 10..80;
/// Commands on their way at once within one call.
const IN_FLIGHT: usize = 64;
/// Keys per step of a scan.
const SCAN_COUNT: usize = 1000;

/// How to reach a server or a cluster.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RedisOptions {
    /// Host and port of the server, or of some nodes of the cluster.
    pub(crate) nodes: Vec<(String, u16)>,
    pub(crate) is_cluster: bool,
    pub(crate) username: String,
    pub(crate) password: String,
    pub(crate) tls: bool,
    pub(crate) database: i64,
    /// Comes before each key, joined by `@`; empty for none.
    pub(crate) key_prefix: String,
    /// Connections.
    pub(crate) workers: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) connection_timeout: Duration,
    /// Life of a value on the server.
    pub(crate) ttl_seconds: Option<u64>,
    /// Values with a salt have `salt-<salt>/` before their names. LMCache does not find those.
    pub(crate) folder_by_salt: bool,
}

impl std::fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisOptions")
            .field("nodes", &self.nodes)
            .field("is_cluster", &self.is_cluster)
            .finish_non_exhaustive()
    }
}

/// A connection that is made when it is first needed, and again when it is lost.
enum Link {
    Server(ConnectionManager),
    Cluster {
        client: Box<ClusterClient>,
        connection: Mutex<Option<ClusterConnection>>,
    },
}

/// See the module.
pub(crate) struct RedisAdapter {
    options: RedisOptions,
    links: Vec<Link>,
    next: AtomicUsize,
}

impl std::fmt::Debug for RedisAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RedisAdapter({:?})", self.options)
    }
}

/// Whether the failure may be that of a connection that was lost, or refused, some time ago: a manager
/// tells it to the next caller, and connects anew for the one after.
fn is_stale(error: &RedisError) -> bool {
    error.is_io_error() && !error.is_timeout()
}

fn error_of(error: &RedisError) -> AdapterError {
    let text = error.to_string();
    match error.kind() {
        ErrorKind::AuthenticationFailed => AdapterError::Denied(text),
        ErrorKind::Server(ServerErrorKind::ReadOnly) => AdapterError::Denied(text),
        // A transaction that was refused has the reasons in its text only.
        _ if text.contains("\"OOM\"") => AdapterError::Full(text),
        _ => match error.code() {
            Some("OOM") => AdapterError::Full(text),
            Some("NOAUTH" | "NOPERM" | "WRONGPASS") => AdapterError::Denied(text),
            _ => AdapterError::Unavailable(text),
        },
    }
}

impl RedisAdapter {
    /// Prepares connections; none is made yet, so that the server may be down.
    ///
    /// # Errors
    /// A sentence when the options fit no client.
    pub(crate) fn open(options: RedisOptions) -> Result<Self, String> {
        let unusable = |error: RedisError| format!("cannot be used: {error}");
        if options.tls {
            // Fails only if a provider is there already, which is as good.
            let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
        }
        let mut settings = RedisConnectionInfo::default();
        if !options.username.is_empty() {
            settings = settings.set_username(&options.username);
        }
        if !options.password.is_empty() {
            settings = settings.set_password(&options.password);
        }
        if !options.is_cluster {
            settings = settings.set_db(options.database);
        }
        let node = |(host, port): &(String, u16)| -> Result<ConnectionInfo, String> {
            let address = match options.tls {
                true => ConnectionAddr::TcpTls {
                    host: host.clone(),
                    port: *port,
                    insecure: false,
                    tls_params: None,
                },
                false => ConnectionAddr::Tcp(host.clone(), *port),
            };
            let info = address.into_connection_info().map_err(unusable)?;
            Ok(info.set_redis_settings(settings.clone()))
        };
        let nodes = options
            .nodes
            .iter()
            .map(node)
            .collect::<Result<Vec<_>, _>>()?;
        let links =
            (0..options.workers.max(1)).map(|_| match (options.is_cluster, nodes.first()) {
                (true, _) => {
                    let client = ClusterClient::builder(nodes.clone())
                        .connection_timeout(options.connection_timeout)
                        .response_timeout(options.request_timeout)
                        .retries(CLUSTER_RETRIES)
                        .min_retry_wait(CLUSTER_RETRY_MS.start)
                        .max_retry_wait(CLUSTER_RETRY_MS.end)
                        .build()
                        .map_err(unusable)?;
                    Ok(Link::Cluster {
                        client: Box::new(client),
                        connection: Mutex::new(None),
                    })
                }
                (false, Some(node)) => {
                    let config = ConnectionManagerConfig::new()
                        .set_connection_timeout(Some(options.connection_timeout))
                        .set_response_timeout(Some(options.request_timeout))
                        // Retries and pauses are the breaker's.
                        .set_number_of_retries(0);
                    let client = Client::open(node.clone()).map_err(unusable)?;
                    ConnectionManager::new_lazy_with_config(client, config)
                        .map(Link::Server)
                        .map_err(unusable)
                }
                (false, None) => Err("names no server".to_owned()),
            });
        let links = links.collect::<Result<Vec<_>, String>>()?;
        Ok(Self {
            options,
            links,
            next: AtomicUsize::new(0),
        })
    }

    fn link(&self) -> Result<&Link, AdapterError> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.links
            .get(next % self.links.len().max(1))
            .ok_or(AdapterError::Unsupported("no connection"))
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, AdapterError> {
        let answer = match self.link()? {
            Link::Server(manager) => {
                let mut manager = manager.clone();
                match command.query_async(&mut manager).await {
                    Err(error) if is_stale(&error) => command.query_async(&mut manager).await,
                    answer => answer,
                }
            }
            Link::Cluster { client, connection } => {
                let mut connection = cluster_connection(client, connection).await?;
                command.query_async(&mut connection).await
            }
        };
        answer.map_err(|error: RedisError| error_of(&error))
    }

    async fn ask_all<T: FromRedisValue>(&self, pipeline: &Pipeline) -> Result<T, AdapterError> {
        let answer = match self.link()? {
            Link::Server(manager) => {
                let mut manager = manager.clone();
                match pipeline.query_async(&mut manager).await {
                    Err(error) if is_stale(&error) => pipeline.query_async(&mut manager).await,
                    answer => answer,
                }
            }
            Link::Cluster { client, connection } => {
                let mut connection = cluster_connection(client, connection).await?;
                pipeline.query_async(&mut connection).await
            }
        };
        answer.map_err(|error: RedisError| error_of(&error))
    }

    fn key(&self, name: &ObjectName) -> String {
        self.prefixed(name.key_at(self.options.folder_by_salt))
    }

    fn prefixed(&self, key: String) -> String {
        match &*self.options.key_prefix {
            "" => key,
            prefix => format!("{prefix}@{key}"),
        }
    }

    /// Every key under which the value may lie: also outside of its folder, where LMCache puts it.
    fn places(&self, name: &ObjectName) -> Vec<String> {
        let outside = name.key_outside(self.options.folder_by_salt);
        let outside = outside.map(|key| self.prefixed(key));
        std::iter::once(self.key(name)).chain(outside).collect()
    }

    /// The name behind a key of ours or LMCache's.
    fn name_of(&self, key: &[u8]) -> Option<ObjectName> {
        let key = std::str::from_utf8(key)
            .ok()
            // What lies beside values has names that may look like values'.
            .filter(|key| !key.starts_with(BESIDE))?;
        let key = match &*self.options.key_prefix {
            "" => key,
            prefix => key.strip_prefix(prefix)?.strip_prefix('@')?,
        };
        ObjectName::from_key_at(key, self.options.folder_by_salt)
    }

    async fn entry(&self, name: ObjectName, key: &Bytes) -> Result<Entry, AdapterError> {
        let mut facts = redis::pipe();
        facts.cmd("STRLEN").arg(&key[..]);
        facts.cmd("OBJECT").arg("IDLETIME").arg(&key[..]);
        let (bytes, idle): (u64, Option<u64>) = match self.ask_all(&facts).await {
            Ok(facts) => facts,
            // Under an LFU policy there is no idle time, and a key may be gone by now.
            Err(_) => (self.ask(redis::cmd("STRLEN").arg(&key[..])).await?, None),
        };
        let last_used =
            idle.and_then(|idle| SystemTime::now().checked_sub(Duration::from_secs(idle)));
        Ok(Entry {
            name,
            bytes,
            last_used,
        })
    }

    /// Whom to ask for a scan of everything: the server, or each node that holds slots.
    async fn nodes(&self) -> Result<Vec<Option<(String, u16)>>, AdapterError> {
        if !self.options.is_cluster {
            return Ok(vec![None]);
        }
        type Range = (u64, u64, (Option<String>, u16));
        let slots: Vec<redis::Value> = self.ask(redis::cmd("CLUSTER").arg("SLOTS")).await?;
        let mut nodes = Vec::new();
        for slots in slots {
            let redis::Value::Array(mut range) = slots else {
                return Err(AdapterError::Unavailable(
                    "CLUSTER SLOTS is no list".to_owned(),
                ));
            };
            // What follows are replicas; and of the node, what follows are its id and more.
            range.truncate(3);
            if let Some(redis::Value::Array(node)) = range.get_mut(2) {
                node.truncate(2);
            }
            let (_, _, (host, port)): Range =
                redis::from_redis_value(redis::Value::Array(range))
                    .map_err(|error| AdapterError::Unavailable(error.to_string()))?;
            let host = host.filter(|host| !host.is_empty() && host != "?");
            let host = host.ok_or(AdapterError::Unsupported(
                "the cluster's nodes do not tell their addresses",
            ))?;
            if !nodes.contains(&Some((host.clone(), port))) {
                nodes.push(Some((host, port)));
            }
        }
        Ok(nodes)
    }

    /// The next keys of a scan; `None` once it is over.
    async fn step(&self, scan: &mut Scan) -> Result<Option<Vec<Bytes>>, AdapterError> {
        let Some(cursor) = scan.cursor else {
            return Ok(None);
        };
        let mut command = redis::cmd("SCAN");
        command.arg(cursor).arg("MATCH").arg(&scan.pattern);
        command.arg("COUNT").arg(SCAN_COUNT);
        let (next, keys): (u64, Vec<Bytes>) = match (&scan.node, self.link()?) {
            (Some((host, port)), Link::Cluster { client, connection }) => {
                let mut connection = cluster_connection(client, connection).await?;
                let node = SingleNodeRoutingInfo::ByAddress {
                    host: host.clone(),
                    port: *port,
                };
                let answer = connection
                    .route_command(command, RoutingInfo::SingleNode(node))
                    .await
                    .map_err(|error| error_of(&error))?;
                redis::from_redis_value(answer)
                    .map_err(|error| AdapterError::Unavailable(error.to_string()))?
            }
            _ => self.ask(&command).await?,
        };
        scan.cursor = (next != 0).then_some(next);
        Ok(Some(keys))
    }

    /// Where the seal of a key lies; `None` if that could not be in the key's hash slot.
    fn sibling(&self, what: &str, key: &str) -> Option<String> {
        let is_tagged = key.contains(['{', '}']);
        (!is_tagged || !self.options.is_cluster).then(|| format!("{BESIDE}{what}:{{{key}}}"))
    }

    async fn quarantine(&self, key: &str) -> Result<(), AdapterError> {
        let mut pipeline = redis::pipe();
        pipeline.atomic();
        match (self.sibling("quarantine", key), self.sibling("seal", key)) {
            (Some(aside), Some(seal)) => pipeline
                .cmd("RENAME")
                .arg(key)
                .arg(&aside)
                .ignore()
                .cmd("EXPIRE")
                .arg(&aside)
                .arg(QUARANTINE_SECONDS)
                .ignore()
                .cmd("DEL")
                .arg(seal)
                .ignore(),
            _ => pipeline.cmd("DEL").arg(key).ignore(),
        };
        self.ask_all(&pipeline).await
    }
}

/// A walk over all keys of one node that match.
struct Scan {
    node: Option<(String, u16)>,
    pattern: String,
    cursor: Option<u64>,
}

impl Scan {
    fn new(node: Option<(String, u16)>, pattern: String) -> Self {
        Self {
            node,
            pattern,
            cursor: Some(0),
        }
    }
}

/// Text that a pattern matches as it is.
fn glob_quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '^' | '\\') {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted
}

async fn cluster_connection(
    client: &ClusterClient,
    connection: &Mutex<Option<ClusterConnection>>,
) -> Result<ClusterConnection, AdapterError> {
    // Held while connecting, so that a cluster that is down is asked once at a time.
    let mut connection = connection.lock().await;
    if let Some(connection) = &*connection {
        return Ok(connection.clone());
    }
    let made = client.get_async_connection().await;
    let made = made.map_err(|error| error_of(&error))?;
    *connection = Some(made.clone());
    Ok(made)
}

#[async_trait]
impl Adapter for RedisAdapter {
    async fn find(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let ask = |name: &ObjectName| {
            let mut command = redis::cmd("EXISTS");
            command.arg(self.key(name));
            async move { self.ask::<bool>(&command).await }
        };
        let answers: Vec<Result<bool, AdapterError>> =
            stream::iter(names.iter().map(ask).collect::<Vec<_>>())
                .buffered(IN_FLIGHT)
                .collect()
                .await;
        // A node that is down takes its own slots with it, and not those of the others.
        if self.options.is_cluster && answers.iter().any(Result::is_ok) {
            return Ok(answers
                .into_iter()
                .map(|answer| answer.unwrap_or(false))
                .collect());
        }
        answers.into_iter().collect()
    }

    async fn load(&self, name: &ObjectName, wanted: Form) -> Result<Bytes, AdapterError> {
        let key = self.key(name);
        let (value, seal): (Option<Bytes>, Option<Bytes>) = match self.sibling("seal", &key) {
            Some(seal) => self.ask(redis::cmd("MGET").arg(&key).arg(seal)).await?,
            None => (self.ask(redis::cmd("GET").arg(&key)).await?, None),
        };
        let value = value.ok_or(AdapterError::NotFound)?;
        let seal = seal.and_then(|seal| Seal::parse(&seal));
        match Seal::check(seal, &value, wanted) {
            Ok(()) => Ok(value),
            Err(fault @ Fault::Damaged(_)) => {
                let moved = self.quarantine(&key).await.is_ok();
                Err(fault.into_error(moved))
            }
            Err(fault) => Err(fault.into_error(false)),
        }
    }

    async fn store(
        &self,
        name: &ObjectName,
        value: Bytes,
        layout: u32,
    ) -> Result<(), AdapterError> {
        let key = self.key(name);
        let set = |key: &str, value: &[u8]| {
            let mut command = redis::cmd("SET");
            command.arg(key).arg(value);
            if let Some(seconds) = self.options.ttl_seconds {
                command.arg("EX").arg(seconds);
            }
            command
        };
        let mut pipeline = redis::pipe();
        pipeline.atomic().add_command(set(&key, &value)).ignore();
        if let Some(sibling) = self.sibling("seal", &key) {
            let seal = Seal::of(&value, layout).to_string();
            pipeline
                .add_command(set(&sibling, seal.as_bytes()))
                .ignore();
        }
        self.ask_all(&pipeline).await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<Vec<bool>, AdapterError> {
        let delete = async |name: &ObjectName| {
            let mut was_there = false;
            for key in self.places(name) {
                let mut pipeline = redis::pipe();
                pipeline.atomic().cmd("DEL").arg(&key);
                if let Some(seal) = self.sibling("seal", &key) {
                    pipeline.cmd("DEL").arg(seal).ignore();
                }
                was_there |= self.ask_all::<(bool,)>(&pipeline).await?.0;
            }
            Ok(was_there)
        };
        stream::iter(names.iter().map(delete).collect::<Vec<_>>())
            .buffered(IN_FLIGHT)
            .try_collect()
            .await
    }

    async fn list(
        &self,
        cache_salt: Option<&str>,
        found: mpsc::Sender<Entry>,
    ) -> Result<(), AdapterError> {
        let pattern = match cache_salt {
            Some(salt) if !salt.is_empty() => format!("*@{}", glob_quoted(salt)),
            _ => "*".to_owned(),
        };
        for node in self.nodes().await? {
            let mut scan = Scan::new(node, pattern.clone());
            while let Some(keys) = self.step(&mut scan).await? {
                let named = keys
                    .iter()
                    .filter_map(|key| Some((self.name_of(key)?, key)));
                let named = named
                    .filter(|(name, _)| cache_salt.is_none_or(|salt| **name.cache_salt() == *salt));
                let entries = named.map(|(name, key)| self.entry(name, key));
                let mut entries = stream::iter(entries.collect::<Vec<_>>()).buffered(IN_FLIGHT);
                while let Some(entry) = entries.next().await {
                    if found.send(entry?).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    async fn discard_aside(&self, is_wanted: &IsWanted<'_>) -> Result<u64, AdapterError> {
        let mut discarded = 0;
        for node in self.nodes().await? {
            let mut scan = Scan::new(node, format!("{BESIDE}*"));
            while let Some(keys) = self.step(&mut scan).await? {
                for key in keys {
                    let text = String::from_utf8_lossy(&key);
                    let (_, inner) = text.split_once('{').unwrap_or_default();
                    let name = inner
                        .strip_suffix('}')
                        .and_then(|inner| self.name_of(inner.as_bytes()));
                    // One that reads as nobody's may be of another prefix.
                    if !name.is_some_and(|name| is_wanted(name.cache_salt())) {
                        continue;
                    }
                    let is_value = text.starts_with(QUARANTINE);
                    let was_there: bool = self.ask(redis::cmd("DEL").arg(&key[..])).await?;
                    discarded += u64::from(is_value && was_there);
                }
            }
        }
        Ok(discarded)
    }

    fn status(&self) -> serde_json::Map<String, serde_json::Value> {
        let nodes: Vec<String> = self
            .options
            .nodes
            .iter()
            .map(|(host, port)| format!("{host}:{port}"))
            .collect();
        let mut status = serde_json::Map::new();
        status.insert("nodes".into(), json!(nodes));
        status.insert("cluster_mode".into(), json!(self.options.is_cluster));
        status.insert("num_workers".into(), json!(self.options.workers));
        status
    }
}
