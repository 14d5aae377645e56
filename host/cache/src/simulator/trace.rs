//! Requests to replay, kept compactly: a trace of a day has millions.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use crate::key::{ChunkHash, KeyScope, ObjectKey};

#[derive(Debug)]
struct Record {
    scopes: Range<usize>,
    hashes: Range<usize>,
    tokens: u64,
    chunk_tokens: u64,
    object_bytes: u64,
    is_lookup: bool,
}

/// Requests in the order in which they came.
#[derive(Debug, Default)]
pub struct Trace {
    records: Vec<Record>,
    scopes: Vec<Arc<KeyScope>>,
    hashes: Vec<ChunkHash>,
}

/// One request of a trace.
#[derive(Debug, Clone, Copy)]
pub struct TraceRequest<'t> {
    /// One scope per rank; all ranks have the same chunks.
    pub scopes: &'t [Arc<KeyScope>],
    /// Hashes of the complete chunks, from the first on.
    pub hashes: &'t [ChunkHash],
    /// Tokens asked for, the tail of an unfinished chunk included.
    pub tokens: u64,
    /// Tokens per chunk.
    pub chunk_tokens: u64,
    /// Bytes of one chunk's object, of one rank.
    pub object_bytes: u64,
    /// Whether it looks up before it stores; a bare store counts for no hit rate.
    pub is_lookup: bool,
}

impl<'t> TraceRequest<'t> {
    /// The keys of each rank in chunk order.
    pub(super) fn rows(&self) -> impl Iterator<Item = Vec<ObjectKey>> + use<'t> {
        let hashes = self.hashes;
        self.scopes.iter().map(move |scope| {
            let key = |&hash| ObjectKey::new(Arc::clone(scope), hash);
            hashes.iter().map(key).collect()
        })
    }
}

impl Trace {
    /// Appends a request.
    pub fn push(&mut self, request: TraceRequest<'_>) {
        // Requests of one model and tenant follow each other, and share their scopes.
        let last = self.records.last().map(|record| record.scopes.clone());
        let scopes =
            match last.filter(|range| self.scopes.get(range.clone()) == Some(request.scopes)) {
                Some(range) => range,
                None => {
                    let start = self.scopes.len();
                    self.scopes.extend_from_slice(request.scopes);
                    start..self.scopes.len()
                }
            };
        let start = self.hashes.len();
        self.hashes.extend_from_slice(request.hashes);
        self.records.push(Record {
            scopes,
            hashes: start..self.hashes.len(),
            tokens: request.tokens,
            chunk_tokens: request.chunk_tokens,
            object_bytes: request.object_bytes,
            is_lookup: request.is_lookup,
        });
    }

    /// The number of requests.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is no request.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The requests in order.
    pub fn requests(&self) -> impl Iterator<Item = TraceRequest<'_>> {
        self.records.iter().map(|record| TraceRequest {
            scopes: self.scopes.get(record.scopes.clone()).unwrap_or_default(),
            hashes: self.hashes.get(record.hashes.clone()).unwrap_or_default(),
            tokens: record.tokens,
            chunk_tokens: record.chunk_tokens,
            object_bytes: record.object_bytes,
            is_lookup: record.is_lookup,
        })
    }

    /// Bytes of all different objects: a pool of that size evicts nothing.
    pub fn footprint_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let mut sum = 0_u64;
        for request in self.requests() {
            for scope in request.scopes {
                let scope = Arc::as_ptr(scope);
                let new = request
                    .hashes
                    .iter()
                    .filter(|&&hash| seen.insert((scope, hash)));
                sum = sum.saturating_add(request.object_bytes.saturating_mul(new.count() as u64));
            }
        }
        sum
    }
}
