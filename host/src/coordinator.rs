//! Membership and cache events of LMCache's coordinator, so that a mixed fleet sees what is here.
//!
//! Follows `mp_coordinator/registrar.py`, `mp_coordinator/cache_events.py` and
//! `mp_coordinator/api.py` of LMCache 0.5.6: registration, heartbeats and a DELETE at the end;
//! store, delete and access events in numbered batches under the incarnation of this process.
//! LMCache drops batches that the coordinator did not take. Here they are sent again, in order,
//! which its numbers make safe; only what finds the bounded queue full is lost, counted, and shown
//! to the coordinator by a number that is left out.
//!
//! All of it happens on a thread of its own; the data path puts keys into the queue.

use std::{
    collections::VecDeque,
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use axum::http::Uri;
use serde_json::{Value, json};
use stockade_cache::{CacheObserver, ObjectKey, RemoveReason};
use tokio::sync::oneshot;

use crate::{service::PROBE_TENANT, telemetry::CauseLimiter};

/// Changes that wait for the thread: seconds at full load.
const QUEUED_CHANGES: usize = 8_192;
/// Keys that wait for the coordinator, above which the queue is left to fill.
const WAITING_KEYS: usize = 65_536;
/// Keys in one message.
const MESSAGE_KEYS: usize = 2_048;
/// What the coordinator gets to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Shortest and longest pause after a message that was not taken.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// What saying goodbye may take.
const GOODBYE: Duration = Duration::from_secs(3);

/// Which coordinator, and what it is told.
#[derive(Debug, Clone, PartialEq)]
pub struct CoordinatorSettings {
    /// `http://HOST:PORT`, without a slash at its end.
    pub url: String,
    /// Where the coordinator reaches this server; `None` for the address that packets go out by.
    pub advertise_ip: Option<String>,
    /// Time between two heartbeats.
    pub heartbeat: Duration,
    /// Whether it is told of stores, accesses and deletions.
    pub reports_events: bool,
    /// Least time between two messages of events.
    pub flush: Duration,
}

impl CoordinatorSettings {
    /// Checks a base URL.
    ///
    /// # Errors
    /// What is wrong with it; never its text, which may hold a password.
    pub fn url(given: &str) -> Result<String, String> {
        const FORM: &str =
            "give http://HOST:PORT of `lmcache coordinator`, which usually listens on port 9300";
        let uri: Uri = given.parse().map_err(|_| format!("it is no URL: {FORM}"))?;
        let authority = uri.authority().ok_or(format!("it names no host: {FORM}"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!("the coordinator speaks plain HTTP: {FORM}"));
        }
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(format!("it takes no user, password or query: {FORM}"));
        }
        Ok(given.trim_end_matches('/').to_owned())
    }
}

/// Who this server is to the coordinator.
#[derive(Debug, Clone)]
pub struct Member {
    /// `--instance-id`.
    pub instance_id: String,
    /// Where its HTTP API listens.
    pub http_port: u16,
    /// Bytes of the pool.
    pub capacity_bytes: u64,
}

/// What became of the keys in events, and whether the coordinator knows this server.
#[derive(Debug, Default)]
pub struct CoordinatorCounts {
    /// Taken by the coordinator.
    pub sent: AtomicU64,
    /// Lost because the queue was full, or refused for good.
    pub lost: AtomicU64,
    /// Whether the last registration or heartbeat was taken.
    pub is_registered: AtomicBool,
}

/// Where something is: a tier, and what keeps it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    tier: &'static str,
    backend: &'static str,
    /// Whether the coordinator's other members may have it too.
    shared: bool,
}

impl Place {
    const MEMORY: Self = Self {
        tier: "l1",
        backend: "dram",
        shared: false,
    };

    /// The second tier's storage of a type.
    pub(crate) fn storage(type_name: &'static str, shared: bool) -> Self {
        Self {
            tier: "l2",
            backend: type_name,
            shared,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Objects of so many bytes each.
    Stored(u64),
    Deleted,
    Used,
}

struct Change {
    what: What,
    place: Place,
    keys: Vec<ObjectKey>,
}

/// Where changes are handed in; the default one is off.
#[derive(Clone, Default)]
pub struct CoordinatorEvents(Option<Arc<Queue>>);

impl std::fmt::Debug for CoordinatorEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoordinatorEvents")
            .field("is_on", &self.is_on())
            .finish_non_exhaustive()
    }
}

struct Queue {
    settings: CoordinatorSettings,
    changes: SyncSender<Change>,
    counts: Arc<CoordinatorCounts>,
    /// Keys were lost since the thread looked last.
    has_gap: Arc<AtomicBool>,
}

impl CoordinatorEvents {
    /// Whether anybody wants to know.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|queue| queue.settings.reports_events)
    }

    /// Which coordinator there is, and what became of what it was told.
    #[must_use]
    pub fn coordinator(&self) -> Option<(&CoordinatorSettings, &CoordinatorCounts)> {
        let queue = self.0.as_ref()?;
        Some((&queue.settings, &queue.counts))
    }

    /// A lookup found these.
    pub fn used(&self, keys: Vec<ObjectKey>) {
        // An access says nothing about the place, as in LMCache.
        let place = Place {
            backend: "",
            ..Place::MEMORY
        };
        self.hand_in(What::Used, place, keys);
    }

    /// These were written to storage, objects of so many bytes each.
    pub(crate) fn written_down(&self, place: Place, keys: Vec<ObjectKey>, object_bytes: u64) {
        self.hand_in(What::Stored(object_bytes), place, keys);
    }

    /// These were loaded from storage.
    pub(crate) fn loaded(&self, place: Place, keys: Vec<ObjectKey>) {
        self.hand_in(What::Used, place, keys);
    }

    /// These are in storage no more.
    pub(crate) fn gone_from(&self, place: Place, keys: Vec<ObjectKey>) {
        self.hand_in(What::Deleted, place, keys);
    }

    fn hand_in(&self, what: What, place: Place, keys: Vec<ObjectKey>) {
        let Some(queue) = self.0.as_ref().filter(|_| self.is_on()) else {
            return;
        };
        if keys.is_empty() {
            return;
        }
        let change = Change { what, place, keys };
        if let Err(TrySendError::Full(change) | TrySendError::Disconnected(change)) =
            queue.changes.try_send(change)
        {
            let lost = change.keys.len() as u64;
            queue.counts.lost.fetch_add(lost, Ordering::Relaxed);
            queue.has_gap.store(true, Ordering::Relaxed);
        }
    }
}

/// Objects of the server's own probe are nobody's business.
fn public(keys: &[ObjectKey]) -> Vec<ObjectKey> {
    let of_probe = |key: &&ObjectKey| *key.scope.model_name != *PROBE_TENANT;
    keys.iter().filter(of_probe).cloned().collect()
}

impl CacheObserver for CoordinatorEvents {
    fn stored_for(&self, keys: &[ObjectKey], object_bytes: u64, _request: Option<&Arc<str>>) {
        if self.is_on() {
            self.hand_in(What::Stored(object_bytes), Place::MEMORY, public(keys));
        }
    }

    fn removed(&self, keys: &[ObjectKey], _reason: RemoveReason) {
        if self.is_on() {
            self.hand_in(What::Deleted, Place::MEMORY, public(keys));
        }
    }
}

/// The thread that talks to the coordinator.
#[derive(Debug)]
pub struct Coordinator {
    stop: Arc<AtomicBool>,
    ended: oneshot::Receiver<()>,
    _thread: JoinHandle<()>,
}

impl Coordinator {
    /// Starts the thread. The coordinator need not be there yet.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(
        settings: CoordinatorSettings,
        member: Member,
    ) -> anyhow::Result<(CoordinatorEvents, Self)> {
        let (sender, changes) = sync_channel(QUEUED_CHANGES);
        let counts = Arc::<CoordinatorCounts>::default();
        let (stop, has_gap) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let events = CoordinatorEvents(Some(Arc::new(Queue {
            settings: settings.clone(),
            changes: sender,
            counts: Arc::clone(&counts),
            has_gap: Arc::clone(&has_gap),
        })));
        let (end, ended) = oneshot::channel();
        let talk = Talk {
            agent: ureq::Agent::config_builder()
                .timeout_global(Some(REQUEST_TIMEOUT))
                .http_status_as_error(false)
                .build()
                .into(),
            settings,
            member,
            counts,
            stop: Arc::clone(&stop),
            has_gap,
            is_known: false,
            outbox: Outbox::default(),
            log: CauseLimiter::default(),
        };
        let thread = std::thread::Builder::new()
            .name("stockade-fleet".to_owned())
            .spawn(move || {
                talk.run(&changes);
                let _ = end.send(());
            })
            .context("the coordinator's client has no thread")?;
        let coordinator = Self {
            stop,
            ended,
            _thread: thread,
        };
        Ok((events, coordinator))
    }

    /// Sends what waits and takes leave, within a few seconds.
    pub async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        if tokio::time::timeout(GOODBYE, self.ended).await.is_err() {
            tracing::warn!("the coordinator was not told in time that this server ends");
        }
    }
}

/// Batches that the coordinator has not taken, oldest first.
#[derive(Default)]
struct Outbox {
    next_seq: u64,
    batches: VecDeque<Batch>,
    keys: usize,
}

struct Batch {
    seq: u64,
    kind: &'static str,
    place: Place,
    entries: Vec<Value>,
    capacity: Option<(u64, u64)>,
    ts: f64,
    /// It was sent, so that its number stands for exactly these entries.
    is_tried: bool,
}

impl Outbox {
    fn put(
        &mut self,
        kind: &'static str,
        place: Place,
        entries: Vec<Value>,
        capacity: Option<(u64, u64)>,
    ) {
        self.keys += entries.len();
        // Changes of one kind make one batch, unless the coordinator may have it already.
        if let Some(last) = self.batches.back_mut()
            && self.next_seq == last.seq
            && !last.is_tried
            && last.kind == kind
            && last.place == place
            && last.capacity.is_none()
            && last.entries.len() + entries.len() <= MESSAGE_KEYS
        {
            last.entries.extend(entries);
            return;
        }
        self.next_seq += 1;
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        self.batches.push_back(Batch {
            seq: self.next_seq,
            kind,
            place,
            entries,
            capacity,
            ts: since.unwrap_or_default().as_secs_f64(),
            is_tried: false,
        });
    }

    /// Leaves a number out, by which the coordinator sees that something is missing.
    fn skip(&mut self) {
        self.next_seq += 1;
    }

    /// Forgets the oldest batches; returns their keys.
    fn drop_front(&mut self, batches: usize) -> u64 {
        let gone: usize = self
            .batches
            .drain(..batches.min(self.batches.len()))
            .map(|batch| batch.entries.len())
            .sum();
        self.keys -= gone;
        gone as u64
    }

    /// As many of the oldest batches as one message takes, at least one.
    fn message_len(&self) -> usize {
        let mut keys = 0;
        let fits = |batch: &&Batch| {
            keys += batch.entries.len();
            keys <= MESSAGE_KEYS
        };
        let count = self.batches.iter().take_while(fits).count();
        count.max(1).min(self.batches.len())
    }
}

struct Talk {
    agent: ureq::Agent,
    settings: CoordinatorSettings,
    member: Member,
    counts: Arc<CoordinatorCounts>,
    stop: Arc<AtomicBool>,
    has_gap: Arc<AtomicBool>,
    /// Whether the coordinator has taken our registration.
    is_known: bool,
    outbox: Outbox,
    log: CauseLimiter,
}

/// The incarnation of this process: LMCache's is the second of the start, and a server of either
/// kind may follow one of the other under the same id.
///
/// It is waited for, so that no two processes that were started within one second share it.
fn next_second() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let left =
        Duration::from_secs(1).saturating_sub(Duration::from_nanos(now.subsec_nanos().into()));
    std::thread::sleep(left);
    now.as_secs() + 1
}

/// What a request to the coordinator came to.
enum Outcome {
    Taken,
    /// 404: it does not know us, or has no such endpoint.
    Unknown,
    /// It will never take this.
    Refused(String),
    /// Worth another attempt.
    Failed(String),
}

impl Talk {
    fn run(mut self, changes: &Receiver<Change>) {
        let incarnation = next_second();
        let mut revision = 0;
        let (mut next_beat, mut next_flush) = (Instant::now(), Instant::now());
        let mut pause = RETRY.0;
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if now >= next_beat {
                next_beat = now + self.settings.heartbeat;
                if self.beat() && self.settings.reports_events {
                    revision += 1;
                    let capacity = Some((self.member.capacity_bytes, revision));
                    self.outbox
                        .put("config", Place::MEMORY, Vec::new(), capacity);
                }
            }
            self.gather(changes, Instant::now() + Duration::from_millis(100));
            let now = Instant::now();
            if now >= next_flush && !self.outbox.batches.is_empty() && self.is_known {
                if self.flush(incarnation) {
                    (pause, next_flush) = (RETRY.0, now + self.settings.flush);
                } else {
                    // Jitter, so that a fleet does not come back all at once.
                    next_flush = Instant::now() + pause.mul_f64(fastrand::f64() + 0.5);
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
        self.gather(changes, Instant::now());
        if self.is_known {
            while !self.outbox.batches.is_empty() && self.flush(incarnation) {}
            let lost = self.outbox.drop_front(usize::MAX);
            self.counts.lost.fetch_add(lost, Ordering::Relaxed);
            let url = self.instance_url("");
            let answer = self.agent.delete(&url).call();
            if let Outcome::Failed(problem) | Outcome::Refused(problem) = outcome(answer) {
                tracing::warn!("the coordinator was not told that this server ends: {problem}");
            }
        }
        self.counts.is_registered.store(false, Ordering::Relaxed);
    }

    /// Takes changes into the outbox until `until`, as far as there is room.
    fn gather(&mut self, changes: &Receiver<Change>, until: Instant) {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.outbox.keys >= WAITING_KEYS {
                // What comes meanwhile fills the queue, and is counted where it does not fit.
                std::thread::sleep(left);
                return;
            }
            let change = match changes.recv_timeout(left) {
                Ok(change) => change,
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => {
                    std::thread::sleep(left);
                    return;
                }
            };
            if self.has_gap.swap(false, Ordering::Relaxed) {
                self.outbox.skip();
            }
            let entries = |keys: &[ObjectKey], bytes: u64| -> Vec<Value> {
                keys.iter().map(|key| entry(key, bytes)).collect()
            };
            let (kind, bytes) = match change.what {
                What::Stored(bytes) => ("store", bytes),
                What::Deleted => ("delete", 0),
                What::Used => ("access", 0),
            };
            for keys in change.keys.chunks(MESSAGE_KEYS) {
                self.outbox
                    .put(kind, change.place, entries(keys, bytes), None);
            }
        }
    }

    /// Gives a sign of life, or registers; `true` after a registration.
    fn beat(&mut self) -> bool {
        let url = &self.settings.url;
        if self.is_known {
            let answer = self.agent.put(self.instance_url("/heartbeat")).send_empty();
            match outcome(answer) {
                Outcome::Taken => {
                    self.counts.is_registered.store(true, Ordering::Relaxed);
                    return false;
                }
                Outcome::Unknown => self.log.warn("unknown", || {
                    format!("the coordinator at {url} does not know this server any more, which registers again")
                }),
                // It may know us still; a 404 will tell.
                Outcome::Refused(problem) | Outcome::Failed(problem) => {
                    self.counts.is_registered.store(false, Ordering::Relaxed);
                    self.log.warn("heartbeat", || {
                        format!("the coordinator at {url} takes no heartbeat: {problem}")
                    });
                    return false;
                }
            }
        }
        let body = json!({
            "instance_id": self.member.instance_id,
            "ip": self.advertised_ip(),
            "http_port": self.member.http_port,
        });
        let problem = match self.post("/instances", &body) {
            Outcome::Taken => None,
            Outcome::Unknown => Some("it has no /instances".to_owned()),
            Outcome::Refused(problem) | Outcome::Failed(problem) => Some(problem),
        };
        self.is_known = problem.is_none();
        self.counts
            .is_registered
            .store(self.is_known, Ordering::Relaxed);
        match problem {
            None => tracing::info!(
                "registered with the coordinator at {url} as {}",
                self.member.instance_id
            ),
            Some(problem) => self.log.warn("registration", || {
                format!("the coordinator at {url} does not register this server: {problem}")
            }),
        }
        self.is_known
    }

    /// Sends the oldest batches; `false` if they are to be sent again.
    fn flush(&mut self, incarnation: u64) -> bool {
        let count = self.outbox.message_len();
        let batches: Vec<Value> = self
            .outbox
            .batches
            .iter_mut()
            .take(count)
            .map(|batch| {
                batch.is_tried = true;
                let (capacity, revision) = batch.capacity.unwrap_or_default();
                json!({
                    "instance_id": self.member.instance_id,
                    "incarnation": incarnation,
                    "seq": batch.seq,
                    "event_type": batch.kind,
                    "tier": batch.place.tier,
                    "backend": batch.place.backend,
                    "entries": batch.entries,
                    "shared": batch.place.shared,
                    "ts": batch.ts,
                    "capacity_bytes": capacity,
                    "capacity_revision": revision,
                })
            })
            .collect();
        match self.post("/events", &json!({"batches": batches})) {
            Outcome::Taken => {
                let sent = self.outbox.drop_front(count);
                self.counts.sent.fetch_add(sent, Ordering::Relaxed);
                true
            }
            Outcome::Failed(problem) => {
                self.log.warn("events", || {
                    format!("the coordinator at {} does not take events, which are sent again: {problem}", self.settings.url)
                });
                false
            }
            Outcome::Unknown => self.give_up(count, "it takes no events over HTTP"),
            Outcome::Refused(problem) => self.give_up(count, &problem),
        }
    }

    fn give_up(&mut self, batches: usize, problem: &str) -> bool {
        let lost = self.outbox.drop_front(batches);
        self.counts.lost.fetch_add(lost, Ordering::Relaxed);
        self.log.warn("refused", || {
            format!(
                "the coordinator at {} refused events of {lost} keys: {problem}",
                self.settings.url
            )
        });
        true
    }

    fn post(&self, path: &str, body: &Value) -> Outcome {
        let request = self.agent.post(format!("{}{path}", self.settings.url));
        let request = request.header("Content-Type", "application/json");
        outcome(request.send(body.to_string()))
    }

    fn instance_url(&self, path: &str) -> String {
        let id: String = self
            .member
            .instance_id
            .bytes()
            .map(|byte| match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    char::from(byte).to_string()
                }
                _ => format!("%{byte:02X}"),
            })
            .collect();
        format!("{}/instances/{id}{path}", self.settings.url)
    }

    /// The address that packets to elsewhere leave by, as LMCache finds it; none is sent.
    fn advertised_ip(&self) -> String {
        if let Some(ip) = &self.settings.advertise_ip {
            return ip.clone();
        }
        let found = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
            socket.connect("8.8.8.8:80")?;
            socket.local_addr()
        });
        found.map_or_else(
            |_| "127.0.0.1".to_owned(),
            |address| address.ip().to_string(),
        )
    }
}

fn outcome(answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Outcome {
    let mut response = match answer {
        Ok(response) => response,
        Err(error) => return Outcome::Failed(error.to_string()),
    };
    let status = response.status();
    if status.is_success() {
        return Outcome::Taken;
    }
    if status.as_u16() == 404 {
        return Outcome::Unknown;
    }
    let text = response
        .body_mut()
        .with_config()
        .limit(1024)
        .read_to_string();
    let problem = format!("{status} {}", text.unwrap_or_default().escape_default());
    if status.is_client_error() && !matches!(status.as_u16(), 408 | 429) {
        Outcome::Refused(problem)
    } else {
        Outcome::Failed(problem)
    }
}

/// `CacheEventEntry`: what a key is called in the fleet.
///
/// Our layouts of one model are apart by their object groups, where LMCache has the group 0.
fn entry(key: &ObjectKey, bytes: u64) -> Value {
    json!({
        "key": {
            "chunk_hash_hex": key.chunk_hash.to_string(),
            "model_name": &*key.scope.model_name,
            "kv_rank": key.scope.kv_rank,
            "object_group_id": 0,
            "cache_salt": key.scope.cache_salt.as_str(),
        },
        "size_bytes": bytes,
        "token_ids": [],
        "token_offset": -1,
    })
}
