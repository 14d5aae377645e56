//! Made-up requests with the shape of real ones, the same for the same seed.

use std::str::FromStr;
use std::sync::Arc;

use super::{Trace, TraceRequest};
use crate::key::{CacheSalt, ChunkHash, KeyScope, kv_rank};

/// Tokens per chunk, LMCache's default.
const CHUNK_TOKENS: u64 = 256;

/// Bytes of a chunk of an 8-billion-parameter model with 32 layers, 8 KV heads of 128 and
/// 16-bit values.
const OBJECT_BYTES: u64 = CHUNK_TOKENS * 2 * 32 * 8 * 128 * 2;

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Questions about documents whose popularity follows Zipf's law.
    Zipf,
    /// The same, with long runs of documents in between that come only once.
    Scan,
    /// Conversations that grow turn by turn, on system prompts that they share.
    Chat,
}

/// The text names no workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("workload `{0}` is unknown: use zipf, scan or chat")]
pub struct UnknownWorkload(String);

impl FromStr for Workload {
    type Err = UnknownWorkload;

    fn from_str(text: &str) -> Result<Self, UnknownWorkload> {
        let found = Self::ALL
            .into_iter()
            .find(|workload| workload.name() == text);
        found.ok_or_else(|| UnknownWorkload(text.to_owned()))
    }
}

impl Workload {
    /// All workloads.
    pub const ALL: [Self; 3] = [Self::Zipf, Self::Scan, Self::Chat];

    /// The name used in flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zipf => "zipf",
            Self::Scan => "scan",
            Self::Chat => "chat",
        }
    }

    /// Makes so many requests.
    pub fn generate(self, seed: u64, requests: usize) -> Trace {
        let mut maker = Maker::new(seed);
        match self {
            Self::Zipf => (0..requests).for_each(|_| maker.question()),
            Self::Scan => maker.questions_and_scans(requests),
            Self::Chat => maker.conversations(requests),
        }
        maker.trace
    }
}

/// SplitMix64, so that no new release of a crate changes the numbers of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which must not be zero.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True once in `n` times.
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Between `low` and `low << doublings`, each doubling equally likely.
    fn spread(&mut self, low: u64, doublings: u32) -> u64 {
        let scale = low << self.below(u64::from(doublings));
        scale + self.below(scale)
    }
}

/// Draws ranks, the n-th with a weight of `1 / n^0.9`.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(ranks: u32) -> Self {
        let mut sum = 0.0;
        let cumulated = (1..=ranks).map(|rank| {
            sum += f64::from(rank).powf(-0.9);
            sum
        });
        Self(cumulated.collect())
    }

    fn draw(&self, random: &mut Random) -> u64 {
        let total = self.0.last().copied().unwrap_or_default();
        // 53 bits, which is what a double holds.
        let point = (random.next() >> 11) as f64 / (1_u64 << 53) as f64 * total;
        self.0.partition_point(|&sum| sum <= point) as u64
    }
}

struct Conversation {
    hashes: Vec<ChunkHash>,
    turns_left: u64,
}

struct Maker {
    random: Random,
    documents: Zipf,
    prompts: Zipf,
    scope: Arc<KeyScope>,
    /// Numbers what comes only once.
    unique: u64,
    trace: Trace,
}

impl Maker {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            documents: Zipf::new(4000),
            prompts: Zipf::new(50),
            scope: Arc::new(KeyScope {
                model_name: Arc::from("made-up/8b"),
                kv_rank: kv_rank(1, 0).unwrap_or_default(),
                object_group_id: 0,
                cache_salt: CacheSalt::default(),
            }),
            unique: 0,
            trace: Trace::default(),
        }
    }

    fn push(&mut self, hashes: &[ChunkHash], tail_tokens: u64) {
        self.trace.push(TraceRequest {
            scopes: std::slice::from_ref(&self.scope),
            hashes,
            tokens: hashes.len() as u64 * CHUNK_TOKENS + tail_tokens,
            chunk_tokens: CHUNK_TOKENS,
            object_bytes: OBJECT_BYTES,
            is_lookup: true,
        });
    }

    /// Appends the chunks of a text; the same text behind the same prefix is the same.
    fn extend(hashes: &mut Vec<ChunkHash>, kind: u8, text: u64, chunks: u64) {
        for nth in 0..chunks {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&hashes.last().copied().unwrap_or(ChunkHash([0; 32])).0);
            hasher.update(&[kind]);
            hasher.update(&text.to_be_bytes());
            hasher.update(&nth.to_be_bytes());
            hashes.push(ChunkHash(hasher.finalize().into()));
        }
    }

    /// A text that no other request has.
    fn extend_uniquely(&mut self, hashes: &mut Vec<ChunkHash>, chunks: u64) {
        self.unique += 1;
        Self::extend(hashes, b'u', self.unique, chunks);
    }

    /// A document of 4 to 64 chunks, and a question of its own.
    fn question(&mut self) {
        let document = self.documents.draw(&mut self.random);
        let length = Random(document).spread(4, 4);
        let mut hashes = Vec::new();
        Self::extend(&mut hashes, b'd', document, length);
        let chunks = self.random.below(3);
        self.extend_uniquely(&mut hashes, chunks);
        let tail = self.random.below(CHUNK_TOKENS);
        self.push(&hashes, tail);
    }

    /// Between runs of 200 questions, 100 documents of 32 to 64 chunks, one after the other.
    fn questions_and_scans(&mut self, requests: usize) {
        for nth in 0..requests {
            if nth % 300 < 200 {
                self.question();
                continue;
            }
            let mut hashes = Vec::new();
            let chunks = self.random.spread(32, 1);
            self.extend_uniquely(&mut hashes, chunks);
            self.push(&hashes, 0);
        }
    }

    /// 400 conversations at a time, one in eight turns the last one.
    fn conversations(&mut self, requests: usize) {
        let mut running: Vec<Conversation> = Vec::new();
        for _ in 0..requests {
            // Recent ones answer sooner: half of the turns go to the newest eighth.
            let place = match self.random.one_in(2) {
                true => 350 + self.random.below(50),
                false => self.random.below(400),
            };
            let place = match usize::try_from(place) {
                Ok(place) if place < running.len() => place,
                _ => {
                    let fresh = self.conversation();
                    running.push(fresh);
                    running.len() - 1
                }
            };
            let mut conversation = running.remove(place);
            let chunks = 1 + self.random.below(3);
            self.extend_uniquely(&mut conversation.hashes, chunks);
            let tail = self.random.below(CHUNK_TOKENS);
            self.push(&conversation.hashes, tail);
            conversation.turns_left -= 1;
            if conversation.turns_left > 0 {
                running.push(conversation);
            }
        }
    }

    /// A new one on a system prompt of 2 to 16 chunks.
    fn conversation(&mut self) -> Conversation {
        let prompt = self.prompts.draw(&mut self.random);
        let length = Random(prompt).spread(2, 3);
        let mut hashes = Vec::new();
        Self::extend(&mut hashes, b's', prompt, length);
        let mut turns_left = 1;
        while turns_left < 40 && !self.random.one_in(8) {
            turns_left += 1;
        }
        Conversation { hashes, turns_left }
    }
}
