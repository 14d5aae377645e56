//! Prompts whose tokens and KV follow from their number, so that whoever reads a chunk knows what
//! must be in it, whoever wrote it.

use stockade_tests::{Key, tokens};

/// Model of all prompts.
pub(crate) const MODEL: &str = "chaos";
/// Tokens of a chunk, as the harness starts servers.
pub(crate) const CHUNK_TOKENS: usize = 16;
/// Most chunks of a prompt.
pub(crate) const MAX_CHUNKS: usize = 8;
/// Prompts that clients share.
const SHARED: u64 = 200;
/// Tenants.
const SALTS: [&str; 3] = ["", "red", "blue"];

/// A prompt of whole chunks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prompt {
    /// Which one.
    pub(crate) number: u64,
    /// How long it is.
    pub(crate) chunks: usize,
}

impl Prompt {
    /// One of those that clients share.
    pub(crate) fn shared(rng: &mut fastrand::Rng) -> Self {
        Self {
            number: rng.u64(..SHARED),
            chunks: rng.usize(1..=MAX_CHUNKS),
        }
    }

    /// One that no other `number` gives and no client shares.
    pub(crate) fn fresh(number: u64) -> Self {
        Self {
            number: SHARED + number,
            chunks: 1 + (number % MAX_CHUNKS as u64) as usize,
        }
    }

    /// Its key; `rank` is `None` for the scheduler.
    pub(crate) fn key(self, rank: Option<u32>, request: &str) -> Key {
        let tokens = tokens(self.chunks * CHUNK_TOKENS, self.number);
        let mut key = Key::new(MODEL, &tokens, rank, request);
        key.salt = SALTS[(self.number % SALTS.len() as u64) as usize].to_owned();
        key
    }

    /// What is in chunk `index`: every word differs, so that a torn or foreign one shows.
    pub(crate) fn kv(self, index: u64, length: usize) -> Vec<u8> {
        let mut state = (self.number << 8 | index).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let words = std::iter::from_fn(|| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            Some((mixed ^ (mixed >> 31)).to_le_bytes())
        });
        words.flatten().take(length).collect()
    }

    /// Panics unless `chunks` are this prompt's first ones.
    pub(crate) fn compare(self, chunks: &[Vec<u8>]) {
        for (index, bytes) in chunks.iter().enumerate() {
            let expected = self.kv(index as u64, bytes.len());
            let wrong = bytes
                .iter()
                .zip(&expected)
                .position(|(is, must)| is != must);
            assert!(
                wrong.is_none(),
                "WRONG BYTE: chunk {index} of prompt {} differs from byte {wrong:?} of {}",
                self.number,
                bytes.len()
            );
        }
    }
}
