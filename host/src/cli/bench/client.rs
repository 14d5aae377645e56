//! An LMCache client for load: the `zeromq` crate's DEALER and hand-made msgpack, so that the
//! server is measured by code that it does not share.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use rmpv::Value;
use stockade_wire::{Dtype, Operation, read_tensors, write_tensors};
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

/// What a reply may take before the request counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the second tier may take to answer a lookup.
const STATUS_SECONDS: f64 = 30.0;
/// What a connection may take; a refused one is tried again for as long.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// The model all load goes to; the salt keeps runs apart.
const MODEL: &str = "stockade-bench";
/// Key and value, the first dimension of LMCache's chunk tensors.
const KV: u64 = 2;

/// One connection.
pub(in crate::cli) struct Client {
    socket: DealerSocket,
    next_uid: u64,
    url: String,
}

impl Client {
    pub(in crate::cli) async fn connect(url: &str) -> anyhow::Result<Self> {
        let mut socket = DealerSocket::new();
        tokio::time::timeout(CONNECT_PATIENCE, socket.connect(url))
            .await
            .with_context(|| format!("{url} does not answer within {CONNECT_PATIENCE:?}"))?
            .with_context(|| format!("{url} cannot be reached"))?;
        Ok(Self {
            socket,
            next_uid: 0,
            url: url.to_owned(),
        })
    }

    /// Sends one request without waiting; its uid.
    pub(in crate::cli) async fn send(
        &mut self,
        operation: Operation,
        payload: &[Bytes],
    ) -> anyhow::Result<u64> {
        let uid = self.next_uid;
        self.next_uid += 1;
        let mut frames = Vec::with_capacity(2 + payload.len());
        frames.push(pack(&Value::from(uid))?);
        // Numbers where there are some: LMCache's own clients of older releases send them.
        frames.push(match operation.legacy_id() {
            Some(id) => pack(&Value::from(id))?,
            None => pack(&Value::from(operation.name()))?,
        });
        frames.extend_from_slice(payload);
        let message =
            ZmqMessage::try_from(frames).map_err(|_| anyhow::anyhow!("a message has no frames"))?;
        self.socket.send(message).await?;
        Ok(uid)
    }

    /// Receives the next reply: its uid and the third frame, if there is one.
    pub(in crate::cli) async fn receive(&mut self) -> anyhow::Result<(u64, Option<Bytes>)> {
        let reply = tokio::time::timeout(PATIENCE, self.socket.recv())
            .await
            .with_context(|| format!("no reply from {} within {PATIENCE:?}", self.url))??;
        let mut frames = reply.into_vec().into_iter();
        let (uid, operation) = (
            frames.next().context("a reply has no frame")?,
            frames.next().context("a reply has one frame")?,
        );
        if let Value::String(text) = unpack(&operation)?
            && let Some(text) = text.as_str()
            && text.starts_with("error: ")
        {
            bail!("{text}");
        }
        let uid = unpack(&uid)?
            .as_u64()
            .context("a reply's uid is no number")?;
        Ok((uid, frames.next()))
    }

    /// One request and its reply.
    pub(in crate::cli) async fn call(
        &mut self,
        operation: Operation,
        payload: &[Bytes],
    ) -> anyhow::Result<Option<Bytes>> {
        let sent = self.send(operation, payload).await?;
        let (uid, value) = self.receive().await?;
        ensure!(
            uid == sent,
            "a reply to request {uid} came for request {sent}"
        );
        Ok(value)
    }

    async fn call_value(
        &mut self,
        operation: Operation,
        payload: &[Bytes],
    ) -> anyhow::Result<Value> {
        let reply = self.call(operation, payload).await?;
        reply.map_or(Ok(Value::Nil), |reply| unpack(&reply))
    }

    /// Tokens per chunk of the server.
    pub(in crate::cli) async fn chunk_size(&mut self) -> anyhow::Result<usize> {
        let value = self.call_value(Operation::GetChunkSize, &[]).await?;
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.filter(|&size| size > 0)
            .with_context(|| format!("{} says its chunk size is {value}", self.url))
    }

    /// `lookup` and `query_prefetch_status`: chunks found from the start.
    pub(in crate::cli) async fn lookup(
        &mut self,
        prompt: &Prompt,
        request: &str,
    ) -> anyhow::Result<usize> {
        self.begin_lookup(prompt, request).await?;
        self.status(request).await
    }

    /// `lookup` alone.
    pub(super) async fn begin_lookup(
        &mut self,
        prompt: &Prompt,
        request: &str,
    ) -> anyhow::Result<()> {
        let key = prompt.key(request, None);
        self.call(Operation::Lookup, &[key, pack(&Value::from(1))?])
            .await?;
        Ok(())
    }

    /// `query_prefetch_status`, and `wait_prefetch_status` while the second tier is asked: chunks
    /// that the request's lookup found.
    pub(in crate::cli) async fn status(&mut self, request: &str) -> anyhow::Result<usize> {
        let id = pack(&request.into())?;
        let mut found = self
            .call_value(Operation::QueryPrefetchStatus, std::slice::from_ref(&id))
            .await?;
        if found.is_nil() {
            let seconds = pack(&Value::from(STATUS_SECONDS))?;
            found = self
                .call_value(Operation::WaitPrefetchStatus, &[id, seconds])
                .await?;
        }
        let found = found
            .as_u64()
            .and_then(|chunks| usize::try_from(chunks).ok());
        found.with_context(|| format!("a lookup had no result within {STATUS_SECONDS} s"))
    }

    /// Gives the locks of a lookup back.
    pub(in crate::cli) async fn free_lookup_locks(
        &mut self,
        prompt: &Prompt,
        request: &str,
    ) -> anyhow::Result<()> {
        let key = prompt.key(request, None);
        self.call(Operation::FreeLookupLocks, &[key, pack(&Value::from(1))?])
            .await?;
        Ok(())
    }

    pub(in crate::cli) async fn end_session(&mut self, request: &str) -> anyhow::Result<()> {
        self.call(Operation::EndSession, &[pack(&request.into())?])
            .await?;
        Ok(())
    }
}

/// The tokens of a request, packed once: only the request's name differs between its calls.
#[derive(Clone)]
pub(in crate::cli) struct Prompt {
    tokens: BytesMut,
    first_token_at: usize,
    len: usize,
    range: (usize, usize),
    salt: String,
    ttl_seconds: Option<u32>,
}

impl Prompt {
    /// `len` tokens that no other seed gives, in a vocabulary of 150 000 as real ones are.
    pub(in crate::cli) fn new(len: usize, seed: u64, salt: &str) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut tokens = BytesMut::with_capacity(5 * len + 5);
        tokens.put_u8(0xdd);
        tokens.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
        let first_token_at = tokens.len();
        for index in 0..len {
            match random.u32(..150_000) {
                // Always five bytes, so that it can be replaced in place.
                token if index == 0 => {
                    tokens.put_u8(0xce);
                    tokens.put_u32(token | 1 << 31);
                }
                token @ 0..=0x7f => tokens.put_u8(token.to_le_bytes()[0]),
                token @ 0x80..=0xff => tokens.put_slice(&[0xcc, token.to_le_bytes()[0]]),
                token @ 0x100..=0xffff => {
                    tokens.put_u8(0xcd);
                    tokens.put_slice(&token.to_be_bytes()[2..]);
                }
                token => {
                    tokens.put_u8(0xce);
                    tokens.put_u32(token);
                }
            }
        }
        Self {
            tokens,
            first_token_at,
            len,
            range: (0, len),
            salt: salt.to_owned(),
            ttl_seconds: None,
        }
    }

    /// The same length with another first token, which changes every chunk's hash.
    pub(in crate::cli) fn renamed(mut self, number: u32) -> Self {
        let at = self.first_token_at + 1;
        if let Some(token) = self.tokens.get_mut(at..at + 4) {
            token.copy_from_slice(&(number | 1 << 31).to_be_bytes());
        }
        self
    }

    /// The same tokens, of which `range` is meant.
    pub(in crate::cli) fn over(mut self, range: (usize, usize)) -> Self {
        self.range = range;
        self
    }

    /// The same tokens, of which the server keeps the KV for so long.
    pub(in crate::cli) fn lasting(mut self, seconds: u32) -> Self {
        self.ttl_seconds = Some(seconds);
        self
    }

    pub(in crate::cli) fn len(&self) -> usize {
        self.len
    }

    /// The cache key of a call (`IPCCacheKey`); the scheduler has no rank.
    pub(in crate::cli) fn key(&self, request: &str, rank: Option<u32>) -> Bytes {
        let mut key = BytesMut::with_capacity(self.tokens.len() + 256);
        key.put_u8(0x8a);
        let put = |key: &mut BytesMut, name: &str, value: &Value| {
            let mut writer = key.writer();
            // A BytesMut grows, so writing to it cannot fail.
            let _ = rmpv::encode::write_value(&mut writer, &Value::from(name));
            let _ = rmpv::encode::write_value(&mut writer, value);
        };
        put(&mut key, "model_name", &MODEL.into());
        put(&mut key, "world_size", &1.into());
        put(&mut key, "worker_id", &rank.map_or(Value::Nil, Value::from));
        let _ = rmpv::encode::write_value(&mut (&mut key).writer(), &"token_ids".into());
        key.put_slice(&self.tokens);
        put(&mut key, "start", &self.range.0.into());
        put(&mut key, "end", &self.range.1.into());
        put(&mut key, "request_id", &request.into());
        put(&mut key, "cache_salt", &self.salt.as_str().into());
        let configs = self.ttl_seconds.map_or(Value::Nil, |seconds| {
            map(&[("lmcache.ttl", seconds.into())])
        });
        put(&mut key, "request_configs", &configs);
        put(&mut key, "num_kv_readers", &1.into());
        key.freeze()
    }
}

/// What one chunk of KV is made of.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct Layout {
    pub(in crate::cli) chunk_tokens: usize,
    layers: u64,
    hidden: u64,
}

impl Layout {
    /// Float16 KV whose chunks take about `chunk_bytes`, never less than one value per token.
    pub(in crate::cli) fn of(chunk_tokens: usize, chunk_bytes: usize) -> Self {
        let per_token = (chunk_bytes / chunk_tokens.max(1)) as u64;
        // Two bytes a value, key and value, two layers.
        let hidden = (per_token / (2 * KV * 2)).max(1);
        Self {
            chunk_tokens,
            layers: 2,
            hidden,
        }
    }

    pub(in crate::cli) fn chunk_bytes(&self) -> usize {
        let values = KV * self.layers * self.hidden;
        2 * self.chunk_tokens * usize::try_from(values).unwrap_or(usize::MAX)
    }

    fn shape(&self) -> [u64; 4] {
        [KV, self.layers, self.chunk_tokens as u64, self.hidden]
    }
}

/// Where the server's pool is: mapped by name, or nowhere, when KV travels inline.
enum Pool {
    Shared(File),
    Inline,
}

/// What one store or retrieve took.
pub(in crate::cli) struct Transfer {
    /// Time in requests to the server, without the copy.
    pub(in crate::cli) server: Duration,
    /// Time altogether.
    pub(in crate::cli) whole: Duration,
    pub(in crate::cli) bytes: usize,
}

/// A registered worker: what vLLM runs per GPU.
pub(in crate::cli) struct Worker {
    pub(in crate::cli) client: Client,
    pub(in crate::cli) layout: Layout,
    instance: u64,
    pool: Pool,
    buffer: Vec<u8>,
}

impl Worker {
    pub(in crate::cli) async fn register(
        url: &str,
        instance: u64,
        layout: Layout,
    ) -> anyhow::Result<Self> {
        let mut client = Client::connect(url).await?;
        let registration = map(&[
            ("instance_id", instance.into()),
            ("model_name", MODEL.into()),
            ("world_size", 1.into()),
            ("block_size", 16.into()),
            ("num_layers", layout.layers.into()),
            ("hidden_dim_size", layout.hidden.into()),
            ("dtype_str", "float16".into()),
            ("use_mla", false.into()),
            ("num_physical_slots", Value::Nil),
        ]);
        let reply = client
            .call_value(
                Operation::RegisterKvCacheEngineDrivenContext,
                &[pack(&registration)?],
            )
            .await?;
        let name = field(&reply, "shm_name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let pool = if name.is_empty() {
            Pool::Inline
        } else {
            let path = Path::new("/dev/shm").join(name.trim_start_matches('/'));
            let file = File::options().read(true).write(true).open(&path);
            Pool::Shared(file.with_context(|| {
                format!("{} cannot be opened; run beside the server", path.display())
            })?)
        };
        Ok(Self {
            client,
            layout,
            instance,
            pool,
            buffer: vec![0; layout.chunk_bytes()],
        })
    }

    pub(in crate::cli) async fn unregister(mut self) -> anyhow::Result<()> {
        let instance = pack(&self.instance.into())?;
        self.client
            .call(Operation::UnregisterKvCacheEngineDrivenContext, &[instance])
            .await?;
        Ok(())
    }

    /// Whether `prepare_retrieve` gives the prompt's range to a request.
    pub(in crate::cli) async fn is_retrievable(
        &mut self,
        prompt: &Prompt,
        request: &str,
    ) -> anyhow::Result<bool> {
        let arguments = [prompt.key(request, Some(0)), pack(&self.instance.into())?];
        let answer = self
            .client
            .call_value(Operation::PrepareRetrieve, &arguments)
            .await?;
        let success = field(&answer, "success").and_then(Value::as_bool);
        success.context("no success in the reply")
    }

    /// Stores the prompt's range, each chunk filled by what `seed` and its index give; `None`
    /// when the server had no room or had it all.
    pub(in crate::cli) async fn store(
        &mut self,
        prompt: &Prompt,
        request: &str,
        seed: u64,
    ) -> anyhow::Result<Option<Transfer>> {
        let start = Instant::now();
        let key = prompt.key(request, Some(0));
        let instance = pack(&self.instance.into())?;
        let prepared = self
            .client
            .call_value(Operation::PrepareStore, &[key.clone(), instance.clone()])
            .await?;
        let mut server = start.elapsed();
        let first = prompt.range.0 / self.layout.chunk_tokens;
        let last = prompt.range.1 / self.layout.chunk_tokens;
        let (data, bytes) = match &self.pool {
            Pool::Shared(segment) => {
                let context = field(&prepared, "context").context("no context in the reply")?;
                let slots = slots(context)?;
                let indices = field(context, "chunk_indices").and_then(Value::as_array);
                let indices = indices.context("no chunk_indices in the reply")?;
                if slots.is_empty() {
                    return Ok(None);
                }
                let mut bytes = 0;
                for (index, (offset, length)) in indices.iter().zip(slots) {
                    let index = index.as_u64().context("a chunk index is no number")?;
                    ensure!(
                        length == self.buffer.len(),
                        "a slot of {length} bytes was given"
                    );
                    fill(&mut self.buffer, seed, first as u64 + index);
                    segment.write_all_at(&self.buffer, offset)?;
                    bytes += length;
                }
                (Vec::new(), bytes)
            }
            Pool::Inline => {
                let chunks: Vec<_> = (first..last)
                    .map(|index| {
                        let mut chunk = vec![0; self.layout.chunk_bytes()];
                        fill(&mut chunk, seed, index as u64);
                        chunk
                    })
                    .collect();
                let shape = self.layout.shape();
                let tensors: Vec<_> = chunks
                    .iter()
                    .map(|chunk| (Dtype::Float16, &shape[..], &chunk[..]))
                    .collect();
                let bytes = chunks.iter().map(Vec::len).sum();
                (write_tensors(&tensors)?, bytes)
            }
        };
        let commit = Instant::now();
        let data = pack(&Value::Binary(data))?;
        let done = self
            .client
            .call_value(Operation::CommitStore, &[key, instance, data])
            .await?;
        server += commit.elapsed();
        ensure!(done.as_bool() == Some(true), "a store was not committed");
        Ok(Some(Transfer {
            server,
            whole: start.elapsed(),
            bytes,
        }))
    }

    /// Retrieves the prompt's range and compares every byte with what `seed` gives; `None` for a
    /// miss. A lookup under the same request name came before.
    pub(in crate::cli) async fn retrieve(
        &mut self,
        prompt: &Prompt,
        request: &str,
        seed: u64,
    ) -> anyhow::Result<Option<Transfer>> {
        let start = Instant::now();
        let key = prompt.key(request, Some(0));
        let instance = pack(&self.instance.into())?;
        let reply = self
            .client
            .call_value(Operation::PrepareRetrieve, &[key.clone(), instance.clone()])
            .await?;
        let mut server = start.elapsed();
        if field(&reply, "success").and_then(Value::as_bool) != Some(true) {
            return Ok(None);
        }
        let first = (prompt.range.0 / self.layout.chunk_tokens) as u64;
        let mut bytes = 0;
        match &self.pool {
            Pool::Shared(segment) => {
                let context = field(&reply, "context").context("no context in the reply")?;
                for (index, (offset, length)) in (first..).zip(slots(context)?) {
                    ensure!(
                        length == self.buffer.len(),
                        "a slot of {length} bytes was given"
                    );
                    segment.read_exact_at(&mut self.buffer, offset)?;
                    verify(&self.buffer, seed, index)?;
                    bytes += length;
                }
            }
            Pool::Inline => {
                let data = field(&reply, "data").and_then(Value::as_slice);
                let tensors = read_tensors(data.context("no data in the reply")?)?;
                for (index, tensor) in (first..).zip(&tensors) {
                    let chunk = tensor.contiguous().context("a chunk came in strides")?;
                    verify(chunk, seed, index)?;
                    bytes += chunk.len();
                }
            }
        }
        let expected = (prompt.range.1 - prompt.range.0) / self.layout.chunk_tokens;
        ensure!(
            bytes == expected * self.layout.chunk_bytes(),
            "{bytes} bytes came for {expected} chunks"
        );
        let commit = Instant::now();
        self.client
            .call(Operation::CommitRetrieve, &[key, instance])
            .await?;
        server += commit.elapsed();
        Ok(Some(Transfer {
            server,
            whole: start.elapsed(),
            bytes,
        }))
    }
}

/// Eight bytes that tell seed, chunk and place apart.
fn word(seed: u64, index: u64, place: u64) -> u64 {
    (seed ^ index.rotate_left(32))
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(place)
}

pub(super) fn fill(chunk: &mut [u8], seed: u64, index: u64) {
    for (place, bytes) in (0..).zip(chunk.chunks_mut(8)) {
        let word = word(seed, index, place).to_le_bytes();
        bytes.copy_from_slice(&word[..bytes.len()]);
    }
}

pub(super) fn verify(chunk: &[u8], seed: u64, index: u64) -> anyhow::Result<()> {
    for (place, bytes) in (0..).zip(chunk.chunks(8)) {
        let expected = word(seed, index, place).to_le_bytes();
        ensure!(
            bytes == &expected[..bytes.len()],
            "WRONG BYTES in chunk {index} at byte {}",
            8 * place
        );
    }
    Ok(())
}

/// Offsets and lengths of the slots of a reply.
fn slots(context: &Value) -> anyhow::Result<Vec<(u64, usize)>> {
    let slots = field(context, "slots").and_then(Value::as_array);
    slots
        .context("no slots in the reply")?
        .iter()
        .map(|slot| {
            let number = |name| field(slot, name).and_then(Value::as_u64);
            let (offset, length) = number("offset")
                .zip(number("length"))
                .context("a slot has no offset and length")?;
            Ok((offset, usize::try_from(length)?))
        })
        .collect()
}

pub(in crate::cli) fn pack(value: &Value) -> anyhow::Result<Bytes> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value)?;
    Ok(bytes.into())
}

fn unpack(bytes: &Bytes) -> anyhow::Result<Value> {
    Ok(rmpv::decode::read_value(&mut &bytes[..])?)
}

fn map(fields: &[(&str, Value)]) -> Value {
    let fields = fields.iter();
    Value::Map(
        fields
            .map(|(name, value)| (Value::from(*name), value.clone()))
            .collect(),
    )
}

fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let fields = value.as_map()?;
    fields
        .iter()
        .find(|(key, _)| key.as_str() == Some(name))
        .map(|(_, value)| value)
}
