//! Token ids to one rolling hash per chunk.
//!
//! Follows `TokenHasher` in LMCache's `v1/multiprocess/token_hasher.py` for its default
//! algorithm: `h[i] = blake3(h[i-1] || tokens of chunk i as big-endian u32)`, 32 bytes,
//! plain BLAKE3, complete chunks only. `h[-1]` is the hash of the integer 0 as eight
//! big-endian bytes followed by the one token 0.

use std::num::NonZeroUsize;

use crate::key::ChunkHash;

/// Bytes of one token id as it comes from the wire.
const TOKEN_BYTES: usize = 4;

/// Longest input joined with its prefix hash on the stack: chunks of up to 512 tokens.
const JOINED_BYTES: usize = 32 + 512 * TOKEN_BYTES;

/// Computes chunk hashes; holds no tokens and may be shared.
#[derive(Debug, Clone)]
pub struct TokenHasher {
    chunk_size: NonZeroUsize,
    none_hash: ChunkHash,
}

impl TokenHasher {
    /// A hasher for chunks of `chunk_size` tokens.
    pub fn new(chunk_size: NonZeroUsize) -> Self {
        Self {
            chunk_size,
            none_hash: ChunkHash(blake3::hash(&[0; 8 + TOKEN_BYTES]).into()),
        }
    }

    /// Tokens per chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size.get()
    }

    /// The hash that stands before the first chunk.
    pub fn none_hash(&self) -> ChunkHash {
        self.none_hash
    }

    /// Appends the hashes of the chunks that `out` does not have yet, until `out` holds
    /// `max_chunks` hashes or the complete chunks end.
    ///
    /// `tokens_be` is the whole sequence from its first token, each id four bytes
    /// big-endian; a tail shorter than a chunk (or than a token) is left out. `out` must
    /// hold hashes of a prefix of that same sequence, so a session that grows pays only
    /// for its new chunks.
    pub fn chunk_hashes(&self, tokens_be: &[u8], out: &mut Vec<ChunkHash>, max_chunks: usize) {
        let Some(chunk_bytes) = self.chunk_size.get().checked_mul(TOKEN_BYTES) else {
            return; // No sequence in memory has one chunk of that size.
        };
        let wanted = (tokens_be.len() / chunk_bytes).min(max_chunks);
        if out.len() >= wanted {
            return;
        }
        let mut previous = out.last().copied().unwrap_or(self.none_hash);
        let fresh = &tokens_be[out.len() * chunk_bytes..wanted * chunk_bytes];
        out.reserve(wanted - out.len());
        for chunk in fresh.chunks_exact(chunk_bytes) {
            previous = chain(previous, chunk);
            out.push(previous);
        }
    }
}

/// One contiguous input lets BLAKE3 take its one-shot path, which is faster than two
/// updates of a streaming hasher for the usual 256 tokens.
fn chain(previous: ChunkHash, chunk: &[u8]) -> ChunkHash {
    let mut joined = [0; JOINED_BYTES];
    let length = previous.0.len() + chunk.len();
    if let Some(input) = joined.get_mut(..length) {
        let (head, tail) = input.split_at_mut(previous.0.len());
        head.copy_from_slice(&previous.0);
        tail.copy_from_slice(chunk);
        return ChunkHash(blake3::hash(input).into());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&previous.0);
    hasher.update(chunk);
    ChunkHash(hasher.finalize().into())
}
