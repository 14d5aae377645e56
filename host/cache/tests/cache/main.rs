//! The engine from outside, through its public interface only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod concurrency;
mod eviction;
mod fixture;
mod hash_vectors;
mod integrity;
mod leases;
mod lmcache_defects;
mod model;
mod observer;
mod policies;
mod ranking;
mod second_tier;
mod shared_memory;
mod simulator;
mod tenants;
