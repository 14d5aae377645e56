//! Batches of the KV-event stream: which chunks came to be held on the CPU, which left.

use std::sync::Arc;

use bytes::Bytes;

use crate::token_ids::TokenIds;

/// `KVEventBatch` of LMCache's `custom_types.py`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvEventBatch {
    /// False ends the stream: the server records no events.
    pub enabled: bool,
    /// Changes when the server restarts; what was announced before is then void.
    pub incarnation: u64,
    /// Where to resume.
    pub next_cursor: u64,
    /// Whether events were lost, so that what was announced before is void.
    pub lost: bool,
    /// In order of `seq`.
    pub events: Vec<KvEvent>,
}

/// `KVEventRecord` of LMCache's `custom_types.py`; its medium is always `CPU`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEvent {
    /// Counts up by one per event of the server.
    pub seq: u64,
    /// What happened.
    pub kind: KvEventKind,
    /// The model whose chunks these are.
    pub model_name: Arc<str>,
    /// Chunk hashes, 32 bytes each. One for a store.
    pub block_hashes: Vec<Bytes>,
    /// The hash of the chunk before, for a store that has one.
    pub parent_block_hash: Option<Bytes>,
    /// The stored chunk's tokens; none for a removal.
    pub token_ids: TokenIds,
}

/// What a [`KvEvent`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvEventKind {
    /// A chunk can be read.
    Stored,
    /// Chunks are gone.
    Removed,
}

impl KvEventKind {
    /// `stored` or `removed`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Removed => "removed",
        }
    }
}
