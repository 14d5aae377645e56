//! The second tier's storage: adapters that keep named values on disk, in Redis or in S3.
//!
//! An [`Adapter`] moves whole values by [`ObjectName`] and knows nothing of the cache in memory:
//! what is stored when, and what is loaded for whom, is decided in the server. Names and bytes
//! are those of LMCache 0.5.6, so that both may share one directory, Redis or bucket.
//!
//! What holds:
//!
//! 1. A value is there as a whole or not at all, whenever its writer dies.
//! 2. Bytes that are not those that were stored are never returned; they are moved aside.
//! 3. A call through [`Guarded`] ends at its deadline, whatever the storage does.
//! 4. Nothing in a directory leads out of it, and no secret is in a log line or a status.
#![forbid(unsafe_code)]

mod adapter;
mod capped;
mod guarded;
mod integrity;
mod name;
mod spec;

pub use adapter::{Adapter, AdapterError, Entry, Evictions, Form, IsWanted};
pub use guarded::{Breaker, BreakerState, Guarded};
pub use name::{NameError, ObjectName};
pub use spec::{AdapterSpec, Cap};
