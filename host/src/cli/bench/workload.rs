//! What a load client repeats: one kind of request, its preparation and what is measured of it.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use stockade_wire::Operation;

use super::{
    client::{Client, Layout, Prompt, Worker, pack},
    floor::Floor,
};

/// Longest latency that is told apart, in nanoseconds.
const MAX_LATENCY_NS: u64 = 120_000_000_000;
/// New tokens of each turn of a conversation, in chunks.
const TURN_CHUNKS: usize = 4;
/// Turns after which a conversation starts anew.
const TURNS: usize = 8;

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Workload {
    /// `noop`, which only crosses the wire
    Noop,
    /// `get_chunk_size`
    ChunkSize,
    /// `ping` of a registered worker
    Ping,
    /// lookup, status and end of session of a prompt that nobody stored
    LookupMiss,
    /// lookup, status, release and end of session of a prompt that is stored
    LookupHit,
    /// prepare, copy and commit of new chunks
    Store,
    /// lookup, prepare, copy, compare and commit of stored chunks
    Retrieve,
    /// conversations: look the prompt up, retrieve what is there, store what is new
    Chat,
}

impl Workload {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Noop => "noop",
            Self::ChunkSize => "chunk-size",
            Self::Ping => "ping",
            Self::LookupMiss => "lookup-miss",
            Self::LookupHit => "lookup-hit",
            Self::Store => "store",
            Self::Retrieve => "retrieve",
            Self::Chat => "chat",
        }
    }

    /// Whether its cost depends on the length of the prompt.
    pub(super) fn has_tokens(self) -> bool {
        !self.is_control()
    }

    /// Whether it is one small request, of which several may be in flight.
    pub(super) fn is_control(self) -> bool {
        matches!(self, Self::Noop | Self::ChunkSize | Self::Ping)
    }

    /// Whether an echo can answer it.
    pub(super) fn suits_echo(self) -> bool {
        matches!(self, Self::Noop | Self::ChunkSize) || self.has_floor()
    }

    /// Whether its requests are sent to an echo as they are to a server.
    pub(super) fn has_floor(self) -> bool {
        self.moves_bytes() || matches!(self, Self::LookupMiss | Self::LookupHit)
    }

    /// Whether it is a copy between two requests.
    pub(super) fn moves_bytes(self) -> bool {
        matches!(self, Self::Store | Self::Retrieve)
    }
}

/// What was measured.
#[derive(Clone)]
pub(super) struct Samples {
    /// Nanoseconds per request round, requests only.
    pub(super) latency: Histogram<u64>,
    /// Rounds that were answered.
    pub(super) rounds: u64,
    /// KV copied in or out.
    pub(super) bytes: u64,
    /// Time of the copies with their requests, over all clients.
    pub(super) transfer: Duration,
    /// Stores that were given no room, and lookups that found less than was stored.
    pub(super) refused: u64,
    /// Rounds that ended with an error or a wrong byte.
    pub(super) errors: u64,
    /// The first error.
    pub(super) first_error: Option<String>,
    /// Time that was measured, per client.
    pub(super) elapsed: Duration,
}

impl Samples {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            latency: Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3)?,
            rounds: 0,
            bytes: 0,
            transfer: Duration::ZERO,
            refused: 0,
            errors: 0,
            first_error: None,
            elapsed: Duration::ZERO,
        })
    }

    fn record(&mut self, latency: Duration) {
        self.rounds += 1;
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(MAX_LATENCY_NS);
        self.latency.saturating_record(nanoseconds.max(1));
    }

    pub(super) fn fail(&mut self, error: &anyhow::Error) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| format!("{error:#}"));
    }

    /// Adds what another client measured at the same time.
    pub(super) fn add(&mut self, other: &Self) {
        // Histograms of the same bounds always add.
        let _ = self.latency.add(&other.latency);
        self.rounds += other.rounds;
        self.bytes += other.bytes;
        self.transfer += other.transfer;
        self.refused += other.refused;
        self.errors += other.errors;
        if self.first_error.is_none() {
            self.first_error.clone_from(&other.first_error);
        }
    }
}

/// What a load client is told.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) workload: Workload,
    pub(super) tokens: usize,
    pub(super) chunk_bytes: usize,
    pub(super) in_flight: usize,
    pub(super) salt: String,
    /// The measured server's tokens per chunk, when this client's peer is an echo.
    pub(super) echo_chunk_tokens: Option<usize>,
    /// Tells this client's keys from every other client's.
    pub(super) seed: u64,
}

/// A client with everything prepared: connected, registered, its prompt stored if need be.
pub(super) struct LoadClient {
    load: Load,
    worker: Kind,
    prompt: Prompt,
    round: u32,
}

enum Kind {
    Plain(Client),
    Worker(Box<Worker>),
    Floor(Box<Floor>),
}

impl LoadClient {
    pub(super) async fn prepare(url: &str, load: Load) -> anyhow::Result<Self> {
        let is_worker = load.workload.has_tokens() || load.workload == Workload::Ping;
        let prompt = Prompt::new(
            if load.workload.has_tokens() {
                load.tokens
            } else {
                0
            },
            load.seed,
            &load.salt,
        );
        if let Some(chunk_tokens) = load.echo_chunk_tokens {
            let layout = Layout::of(chunk_tokens, load.chunk_bytes);
            let moved = match load.workload.moves_bytes() {
                true => load.tokens,
                false => 0,
            };
            let floor = Floor::connect(url, layout, moved, load.seed).await?;
            let prompt = match load.workload {
                Workload::LookupMiss => prompt,
                _ => whole_chunks(prompt, chunk_tokens),
            };
            return Ok(Self {
                load,
                worker: Kind::Floor(Box::new(floor)),
                prompt,
                round: 0,
            });
        }
        let worker = if is_worker {
            let mut client = Client::connect(url).await?;
            let chunk_tokens = client.chunk_size().await?;
            ensure!(
                !load.workload.has_tokens() || load.tokens >= chunk_tokens,
                "{} tokens are no whole chunk of {chunk_tokens}",
                load.tokens
            );
            let layout = Layout::of(chunk_tokens, load.chunk_bytes);
            Kind::Worker(Box::new(
                Worker::register(url, load.seed | 1, layout).await?,
            ))
        } else {
            Kind::Plain(Client::connect(url).await?)
        };
        let mut client = Self {
            load,
            worker,
            prompt,
            round: 0,
        };
        if matches!(
            client.load.workload,
            Workload::LookupHit | Workload::Retrieve
        ) {
            client.store_prompt().await?;
        }
        Ok(client)
    }

    async fn store_prompt(&mut self) -> anyhow::Result<()> {
        let request = self.request();
        let seed = self.load.seed;
        let Kind::Worker(worker) = &mut self.worker else {
            bail!("only a worker can store");
        };
        let prompt = whole_chunks(self.prompt.clone(), worker.layout.chunk_tokens);
        if worker.store(&prompt, &request, seed).await?.is_none() {
            bail!("the prompt to look up could not be stored: give the server a larger pool");
        }
        self.prompt = prompt;
        worker.client.end_session(&request).await
    }

    /// A name that no other request of this run has.
    fn request(&mut self) -> String {
        self.round = self.round.wrapping_add(1);
        format!("bench-{:x}-{}", self.load.seed, self.round)
    }

    /// Repeats the load for `time`.
    pub(super) async fn run(&mut self, time: Duration) -> anyhow::Result<Samples> {
        let mut samples = Samples::new()?;
        let start = Instant::now();
        if self.load.workload.is_control() {
            if let Err(error) = self.control(time, &mut samples).await {
                samples.fail(&error);
            }
        } else {
            while start.elapsed() < time {
                if let Err(error) = self.once(&mut samples).await {
                    samples.fail(&error);
                    if samples.errors > 100 {
                        break;
                    }
                }
            }
        }
        samples.elapsed = start.elapsed();
        Ok(samples)
    }

    pub(super) async fn finish(self) -> anyhow::Result<()> {
        match self.worker {
            Kind::Worker(worker) => worker.unregister().await,
            Kind::Plain(_) | Kind::Floor(_) => Ok(()),
        }
    }

    /// Keeps as many requests in flight as asked for.
    async fn control(&mut self, time: Duration, samples: &mut Samples) -> anyhow::Result<()> {
        let (operation, payload) = match self.load.workload {
            Workload::Ping => (Operation::Ping, vec![pack(&(self.load.seed | 1).into())?]),
            Workload::ChunkSize => (Operation::GetChunkSize, Vec::new()),
            _ => (Operation::Noop, Vec::new()),
        };
        let client = match &mut self.worker {
            Kind::Plain(client) => client,
            Kind::Worker(worker) => &mut worker.client,
            Kind::Floor(_) => bail!("a floor has no control requests"),
        };
        let start = Instant::now();
        // Uids count up, so the oldest in flight is first.
        let mut sent = std::collections::VecDeque::with_capacity(self.load.in_flight);
        loop {
            let is_over = start.elapsed() >= time;
            while !is_over && sent.len() < self.load.in_flight {
                let at = Instant::now();
                sent.push_back((client.send(operation, &payload).await?, at));
            }
            if sent.is_empty() {
                return Ok(());
            }
            let (uid, _) = client.receive().await?;
            let place = sent.iter().position(|(sent, _)| *sent == uid);
            if let Some((_, at)) = place.and_then(|place| sent.remove(place)) {
                samples.record(at.elapsed());
            }
        }
    }

    async fn once(&mut self, samples: &mut Samples) -> anyhow::Result<()> {
        let request = self.request();
        let (seed, round) = (self.load.seed, self.round);
        if let Kind::Floor(floor) = &mut self.worker {
            let transfer = match self.load.workload {
                Workload::LookupMiss => {
                    let prompt = self.prompt.clone().renamed(round);
                    floor.lookup(&prompt, &request, false).await?
                }
                Workload::LookupHit => floor.lookup(&self.prompt, &request, true).await?,
                Workload::Store => {
                    let prompt = self.prompt.clone().renamed(round);
                    floor.store(&prompt, &request, seed).await?
                }
                _ => floor.retrieve(&self.prompt, &request, seed).await?,
            };
            samples.record(transfer.server);
            samples.bytes += transfer.bytes as u64;
            samples.transfer += transfer.whole;
            return Ok(());
        }
        let Kind::Worker(worker) = &mut self.worker else {
            bail!("only a worker has prompts");
        };
        let chunk = worker.layout.chunk_tokens;
        match self.load.workload {
            Workload::LookupMiss => {
                let prompt = self.prompt.clone().renamed(round);
                let start = Instant::now();
                let found = worker.client.lookup(&prompt, &request).await?;
                worker.client.end_session(&request).await?;
                samples.record(start.elapsed());
                ensure!(found == 0, "{found} chunks of a new prompt were found");
            }
            Workload::LookupHit => {
                let start = Instant::now();
                let found = worker.client.lookup(&self.prompt, &request).await?;
                worker
                    .client
                    .free_lookup_locks(&self.prompt, &request)
                    .await?;
                worker.client.end_session(&request).await?;
                samples.record(start.elapsed());
                if found < self.prompt.len() / chunk {
                    samples.refused += 1;
                }
            }
            Workload::Store => {
                let prompt = whole_chunks(self.prompt.clone().renamed(round), chunk);
                match worker.store(&prompt, &request, seed).await? {
                    Some(transfer) => {
                        samples.record(transfer.server);
                        samples.bytes += transfer.bytes as u64;
                        samples.transfer += transfer.whole;
                    }
                    None => samples.refused += 1,
                }
                worker.client.end_session(&request).await?;
            }
            Workload::Retrieve => {
                let start = Instant::now();
                let found = worker.client.lookup(&self.prompt, &request).await?;
                let lookup = start.elapsed();
                if found < self.prompt.len() / chunk {
                    samples.refused += 1;
                    return worker.client.end_session(&request).await;
                }
                match worker.retrieve(&self.prompt, &request, seed).await? {
                    Some(transfer) => {
                        samples.record(transfer.server);
                        samples.bytes += transfer.bytes as u64;
                        samples.transfer += transfer.whole + lookup;
                    }
                    None => samples.refused += 1,
                }
                worker.client.end_session(&request).await?;
            }
            Workload::Chat => {
                let turn = (round as usize - 1) % TURNS + 1;
                let conversation = u32::try_from((round as usize - 1) / TURNS)?;
                let all = (turn * TURN_CHUNKS).min(self.prompt.len() / chunk);
                let prompt = self
                    .prompt
                    .clone()
                    .renamed(conversation)
                    .over((0, all * chunk));
                let seed = seed ^ u64::from(conversation);
                let start = Instant::now();
                let found = worker.client.lookup(&prompt, &request).await?.min(all);
                let mut server = start.elapsed();
                if found > 0 {
                    let hit = prompt.clone().over((0, found * chunk));
                    if let Some(transfer) = worker.retrieve(&hit, &request, seed).await? {
                        server += transfer.server;
                        samples.bytes += transfer.bytes as u64;
                        samples.transfer += transfer.whole;
                    }
                }
                if found < all {
                    let tail = prompt.over((found * chunk, all * chunk));
                    match worker.store(&tail, &request, seed).await? {
                        Some(transfer) => {
                            server += transfer.server;
                            samples.bytes += transfer.bytes as u64;
                            samples.transfer += transfer.whole;
                        }
                        None => samples.refused += 1,
                    }
                }
                let start = Instant::now();
                worker.client.end_session(&request).await?;
                samples.record(server + start.elapsed());
            }
            Workload::Noop | Workload::ChunkSize | Workload::Ping => {
                bail!("{} has no rounds", self.load.workload.name());
            }
        }
        Ok(())
    }
}

/// The prompt up to its last whole chunk, which is what engines store.
fn whole_chunks(prompt: Prompt, chunk_tokens: usize) -> Prompt {
    let end = prompt.len() / chunk_tokens * chunk_tokens;
    prompt.over((0, end))
}
