//! The KV-event channel: what is held on the CPU, streamed to routers with credits.
//!
//! Follows `modules/kv_events.py` of LMCache 0.5.6, except that engine-driven stores are
//! announced too. A chunk is announced as stored just before its commit, and withdrawn if
//! the commit fails, so that a removal can never overtake the announcement.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::Mutex;
use stockade_cache::{CacheObserver, CacheSalt, ChunkHash, ObjectKey, RemoveReason, Slot};
use stockade_transport::Peer;
use stockade_wire::{
    CacheKey, Envelope, InstanceId, KvEvent, KvEventBatch, KvEventKind, Response, TokenIds, reply,
    stream_end,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{store::TransferRange, workers::WorkerId};
use crate::tenancy::{Caller, Realm, Tenancy};

/// Most subscriptions at once.
const MAX_STREAMS: usize = 4096;

/// A stream's address: the connection and the request that opened it.
type StreamId = (u64, Bytes);

struct Stream {
    worker: WorkerId,
    last_seen: Instant,
    /// Holds at most one permit, as LMCache's credit does.
    credit: Arc<Notify>,
    closed: CancellationToken,
}

/// One change.
struct Record {
    /// Who is told of it.
    realm: Realm,
    salt: CacheSalt,
    event: KvEvent,
}

struct Log {
    records: VecDeque<Record>,
    next_seq: u64,
}

/// The bounded log of changes and its subscribers.
pub(crate) struct KvEvents {
    capacity: usize,
    tenancy: Arc<Tenancy>,
    incarnation: u64,
    log: Mutex<Log>,
    streams: Mutex<HashMap<StreamId, Stream>>,
    newest: watch::Sender<u64>,
}

/// What `/status` shows of the channel.
pub(crate) struct KvEventsStatus {
    pub(crate) enabled: bool,
    pub(crate) incarnation: u64,
    pub(crate) log_depth: usize,
    pub(crate) log_capacity: usize,
    pub(crate) next_seq: u64,
    pub(crate) subscribers: usize,
}

impl KvEvents {
    /// A log of `capacity` records; zero turns the channel off.
    pub(crate) fn new(capacity: usize, tenancy: Arc<Tenancy>) -> Self {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            capacity,
            tenancy,
            incarnation: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            log: Mutex::new(Log {
                records: VecDeque::new(),
                next_seq: 1,
            }),
            streams: Mutex::default(),
            newest: watch::channel(0).0,
        }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.capacity > 0
    }

    pub(crate) fn status(&self) -> KvEventsStatus {
        let log = self.log.lock();
        KvEventsStatus {
            enabled: self.is_enabled(),
            incarnation: self.incarnation,
            log_depth: log.records.len(),
            log_capacity: self.capacity,
            next_seq: log.next_seq,
            subscribers: self.streams.lock().len(),
        }
    }

    /// Announces the chunks of `range` that `slots` are about to publish.
    pub(super) fn stored(
        &self,
        realm: &Realm,
        key: &CacheKey,
        chunk_size: usize,
        range: &TransferRange,
        slots: &[(usize, Slot)],
    ) {
        if !self.is_enabled() {
            return;
        }
        let first = range.transfer.chunks.start;
        let events = slots.iter().map(|&(index, _)| {
            let tokens = (first + index) * chunk_size..(first + index + 1) * chunk_size;
            let parent = if index == 0 {
                range.parent
            } else {
                Some(range.hash(index - 1))
            };
            // Copied, because a slice would keep the whole request in memory for as long as the record.
            let tokens = key.tokens.slice(tokens).and_then(|tokens| {
                TokenIds::from_be_bytes(Bytes::copy_from_slice(tokens.as_be_bytes()))
            });
            KvEvent {
                seq: 0,
                kind: KvEventKind::Stored,
                model_name: Arc::clone(&key.model_name),
                block_hashes: vec![wire_hash(range.hash(index))],
                parent_block_hash: parent.map(wire_hash),
                token_ids: tokens.unwrap_or_default(),
            }
        });
        self.append(realm, &range.transfer.scope.cache_salt, events);
    }

    /// Announces that chunks are not held.
    pub(super) fn withdrawn(
        &self,
        realm: &Realm,
        salt: &CacheSalt,
        model_name: &Arc<str>,
        hashes: impl Iterator<Item = ChunkHash>,
    ) {
        let block_hashes: Vec<_> = hashes.map(wire_hash).collect();
        if !self.is_enabled() || block_hashes.is_empty() {
            return;
        }
        let event = KvEvent {
            seq: 0,
            kind: KvEventKind::Removed,
            model_name: Arc::clone(model_name),
            block_hashes,
            parent_block_hash: None,
            token_ids: TokenIds::default(),
        };
        self.append(realm, salt, std::iter::once(event));
    }

    fn append(&self, realm: &Realm, salt: &CacheSalt, events: impl Iterator<Item = KvEvent>) {
        let mut log = self.log.lock();
        for mut event in events {
            event.seq = log.next_seq;
            log.next_seq += 1;
            if log.records.len() == self.capacity {
                log.records.pop_front();
            }
            log.records.push_back(Record {
                realm: realm.clone(),
                salt: salt.clone(),
                event,
            });
        }
        self.newest.send_replace(log.next_seq);
    }

    /// Records of a tenant's model after `cursor`, at most `max_events`.
    fn read(&self, realm: &Realm, model_name: &str, cursor: u64, max_events: u16) -> KvEventBatch {
        let mut batch = KvEventBatch {
            enabled: self.is_enabled(),
            incarnation: self.incarnation,
            ..Default::default()
        };
        if !batch.enabled {
            return batch;
        }
        let log = self.log.lock();
        let last = log.next_seq - 1;
        let first = log
            .records
            .front()
            .map_or(last + 1, |record| record.event.seq);
        batch.lost = cursor.saturating_add(1) < first || cursor > last;
        batch.next_cursor = cursor.min(last);
        let skipped =
            usize::try_from(cursor.saturating_add(1).saturating_sub(first)).unwrap_or(usize::MAX);
        for record in log.records.iter().skip(skipped) {
            batch.next_cursor = record.event.seq;
            if record.realm == *realm && *record.event.model_name == *model_name {
                batch.events.push(record.event.clone());
                if batch.events.len() == usize::from(max_events) {
                    break;
                }
            }
        }
        batch
    }

    /// Forgets what was said of objects under salts that are `wanted`, tokens included; returns
    /// how many records that were. Numbers of records are not given out again, so that no
    /// subscriber takes the gap for a loss.
    pub(crate) fn forget(&self, wanted: &dyn Fn(&CacheSalt) -> bool) -> usize {
        let mut log = self.log.lock();
        let mut forgotten = 0;
        for record in &mut log.records {
            if wanted(&record.salt) && !record.event.block_hashes.is_empty() {
                record.event.block_hashes = Vec::new();
                record.event.parent_block_hash = None;
                record.event.token_ids = TokenIds::default();
                record.event.model_name = Arc::from("");
                record.salt = CacheSalt::default();
                forgotten += 1;
            }
        }
        forgotten
    }

    /// Opens a stream on `peer`: a first batch at once, further ones as credits and records come.
    ///
    /// A worker has at most one stream, its older one ends.
    ///
    /// # Errors
    /// A sentence, when there are too many streams.
    #[expect(clippy::too_many_arguments, reason = "the fields of one request")]
    pub(crate) fn subscribe(
        self: &Arc<Self>,
        caller: &Caller,
        peer: &Arc<Peer>,
        envelope: &Envelope,
        instance_id: InstanceId,
        model_name: Arc<str>,
        cursor: u64,
        max_events: u16,
    ) -> Result<(), String> {
        let id = (peer.id(), envelope.uid.clone());
        let worker = WorkerId::new(caller, instance_id);
        let (credit, closed) = (Arc::new(Notify::new()), CancellationToken::new());
        {
            let mut streams = self.streams.lock();
            streams.retain(|_, stream| {
                let is_older = stream.worker == worker;
                if is_older {
                    stream.closed.cancel();
                }
                !is_older
            });
            if streams.len() >= MAX_STREAMS {
                return Err(format!(
                    "{MAX_STREAMS} KV-event streams are open: close some"
                ));
            }
            let stream = Stream {
                worker,
                last_seen: Instant::now(),
                credit: Arc::clone(&credit),
                closed: closed.clone(),
            };
            if let Some(replaced) = streams.insert(id.clone(), stream) {
                replaced.closed.cancel();
            }
        }
        let (events, peer, envelope) = (Arc::clone(self), Arc::clone(peer), envelope.clone());
        let mut newest = self.newest.subscribe();
        let realm = caller.realm().clone();
        tokio::spawn(async move {
            let mut cursor = cursor;
            let mut is_first = true;
            loop {
                newest.mark_unchanged();
                let batch = events.read(&realm, &model_name, cursor, max_events);
                cursor = batch.next_cursor;
                if !is_first && !batch.enabled {
                    break;
                }
                if is_first || batch.lost || !batch.events.is_empty() {
                    is_first = false;
                    if peer
                        .try_send(reply(&envelope, &Response::KvEvents(batch)))
                        .is_err()
                    {
                        break;
                    }
                    tokio::select! {
                        () = credit.notified() => {}
                        () = closed.cancelled() => break,
                    }
                } else {
                    tokio::select! {
                        changed = newest.changed() => if changed.is_err() { break },
                        () = closed.cancelled() => break,
                    }
                }
            }
            let mut streams = events.streams.lock();
            if streams
                .get(&id)
                .is_some_and(|stream| Arc::ptr_eq(&stream.credit, &credit))
            {
                streams.remove(&id);
            }
            drop(streams);
            // The client may be gone, which is as good an end.
            let _ = peer.try_send(stream_end(&envelope));
        });
        Ok(())
    }

    /// Lets a stream send its next batch.
    pub(crate) fn acknowledge(&self, peer: u64, uid: &Bytes) {
        if let Some(stream) = self.streams.lock().get(&(peer, uid.clone())) {
            stream.credit.notify_one();
        }
    }

    /// Ends one stream.
    pub(crate) fn cancel(&self, peer: u64, uid: &Bytes) {
        if let Some(stream) = self.streams.lock().remove(&(peer, uid.clone())) {
            stream.closed.cancel();
        }
    }

    /// Ends the streams of a connection that closed.
    pub(crate) fn disconnected(&self, peer: u64) {
        self.close_where(|id, _| id.0 == peer);
    }

    /// Ends the stream of a worker that was reaped.
    pub(crate) fn drop_instance(&self, worker: &WorkerId) {
        self.close_where(|_, stream| stream.worker == *worker);
    }

    /// Notes a sign of life of a subscriber.
    pub(crate) fn ping(&self, worker: &WorkerId) {
        for stream in self
            .streams
            .lock()
            .values_mut()
            .filter(|stream| stream.worker == *worker)
        {
            stream.last_seen = Instant::now();
        }
    }

    /// Ends streams of workers that were silent for `timeout`; zero never does.
    pub(crate) fn reap(&self, timeout: Duration) {
        if !timeout.is_zero() {
            self.close_where(|_, stream| stream.last_seen.elapsed() > timeout);
        }
    }

    fn close_where(&self, mut is_over: impl FnMut(&StreamId, &Stream) -> bool) {
        self.streams.lock().retain(|id, stream| {
            let over = is_over(id, stream);
            if over {
                stream.closed.cancel();
            }
            !over
        });
    }
}

impl CacheObserver for KvEvents {
    fn removed(&self, keys: &[ObjectKey], _reason: RemoveReason) {
        if !self.is_enabled() {
            return;
        }
        // What is removed together is mostly of one tenant and model.
        let mut by_model: Vec<(&CacheSalt, &Arc<str>, Vec<ChunkHash>)> = Vec::new();
        for key in keys {
            match by_model.iter_mut().find(|(salt, model, _)| {
                **model == key.scope.model_name && **salt == key.scope.cache_salt
            }) {
                Some((_, _, hashes)) if hashes.last() == Some(&key.chunk_hash) => {}
                Some((_, _, hashes)) => hashes.push(key.chunk_hash),
                None => by_model.push((
                    &key.scope.cache_salt,
                    &key.scope.model_name,
                    vec![key.chunk_hash],
                )),
            }
        }
        for (salt, model, hashes) in by_model {
            let realm = self.tenancy.realm_of(salt);
            self.withdrawn(&realm, salt, model, hashes.into_iter());
        }
    }
}

fn wire_hash(hash: ChunkHash) -> Bytes {
    Bytes::copy_from_slice(&hash.0)
}
