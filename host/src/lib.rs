//! The Stockade server: a KV cache that LMCache's clients use over ZMQ, with plugins that
//! cannot hurt it.
//!
//! This crate composes; the work is done in `stockade-transport` (ZeroMQ), `stockade-wire`
//! (messages), `stockade-cache` (the pool and what is in it) and `stockade-sandbox`
//! (plugins), which do not know each other.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod coordinator;
pub mod telemetry;
pub mod tenancy;
pub mod traces;
pub mod watchdog;
mod writer_queue;

pub mod budgets;
pub mod server;
pub mod state_dir;

pub mod plugin_host;
pub mod service;
pub mod tier;

pub mod admin;
