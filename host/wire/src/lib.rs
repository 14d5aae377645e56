//! The LMCache wire protocol: bytes to typed messages and back. Pure, no I/O.
//!
//! Speaks what LMCache 0.5.6's multiprocess server speaks over ZMQ. A request is the frames
//! `[uid, operation, payload...]`, each a msgpack value; [`decode`] turns them into a
//! [`Request`], and [`reply`] turns a [`Response`] into the frames that msgspec would write.
//!
//! What holds for every input:
//!
//! 1. Nothing panics, and recursion has a bound.
//! 2. Memory follows the bytes that arrived, never a length that they announce.
//! 3. What LMCache's server answers is accepted; what it drops in silence is refused with the
//!    operation, the field and the reason.
//!
//! [`pickle`] reads and writes the one kind of pickle that clients without shared memory
//! send: a list of tensors. It resolves no names and runs nothing.
#![forbid(unsafe_code)]

pub mod dtype;
pub mod error;
pub mod frame;
pub mod key;
pub mod kv_cache;
pub mod kv_event;
mod msgpack;
pub mod operation;
pub mod pickle;
pub mod register;
pub mod request;
pub mod response;
pub mod slot;
pub mod token_ids;

pub use dtype::Dtype;
pub use error::{DecodeError, FieldProblem, Rejected, Unit};
pub use frame::{Envelope, Limits, decode};
pub use key::{CacheKey, RequestConfigs};
pub use kv_cache::{
    EngineGroup, EngineKind, IpcTensor, KvCacheRegistration, KvLayout, KvListLayout, LayoutHints,
    ShmTensor,
};
pub use kv_event::{KvEvent, KvEventBatch, KvEventKind};
pub use operation::Operation;
pub use pickle::{PickleError, PickledTensor, read_tensors, write_tensors};
pub use register::RegisterContext;
pub use request::{BlockAllocation, InstanceId, Request, RequestId};
pub use response::{Response, error_reply, reply, stream_end};
pub use slot::{SlotDescriptor, StoreSlot};
pub use token_ids::TokenIds;
