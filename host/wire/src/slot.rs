//! Where in the shared segment an engine reads or writes one chunk.

use std::sync::Arc;

use crate::dtype::Dtype;

/// One chunk in the shared segment: `ShmSlotDescriptor` in LMCache's `transfer_context/shm.py`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotDescriptor {
    /// Bytes from the segment's start.
    pub offset: u64,
    /// Bytes of the chunk.
    pub length: u64,
    /// The chunk's shape; its elements times the dtype's size is `length`.
    pub shape: Arc<[u64]>,
    /// The chunk's element type, sent by its canonical name.
    pub dtype: Dtype,
}

/// A slot to be filled, and which chunk of the request goes into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSlot {
    /// Index of the chunk within the range of the request's key, from 0.
    pub chunk_index: u64,
    /// Where to write it.
    pub slot: SlotDescriptor,
}
