//! The product from outside: one binary, a server of its own for each test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod access;
mod admin;
mod basics;
mod coordinator;
mod health;
mod hostile;
mod listeners;
mod lmcache_driven;
mod load;
mod native_plugins;
mod plugin_author;
mod plugin_cache;
mod plugin_calls;
mod plugin_files;
mod plugins;
mod replay;
mod simulate;
mod start_up;
mod state;
mod store_retrieve;
mod tenants;
mod tier;
mod traces;
