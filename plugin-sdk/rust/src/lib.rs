//! Write plugins for the Stockade KV-cache server.
//!
//! A plugin is a sandboxed WebAssembly module. This crate is the safe face of the contract
//! `stockade:plugin/v1` (`plugin-sdk/abi/README.md`), which says what each call costs and needs.
//!
//! # A reactor
//!
//! The usual style: the server calls the handlers of a [`Plugin`], and it is asleep in between.
//! Build it as a `cdylib` for `wasm32-wasip1`.
//!
//! ```
//! use std::time::Duration;
//! use stockade_plugin::{HandlerResult, Plugin, Start, Timer, config::Config, timer};
//!
//! struct Heartbeat {
//!     beats: u64,
//! }
//!
//! impl Plugin for Heartbeat {
//!     fn start(start: &Start) -> HandlerResult<Self> {
//!         let config = Config::load()?;
//!         let seconds = config.seconds("heartbeat.seconds", 0.1..=86_400.0)?;
//!         stockade_plugin::info!("{} beside port {}", start.plugin, config.mp_config.port);
//!         let every = seconds.unwrap_or(Duration::from_secs(30));
//!         timer::every("beat", every)?;
//!         Ok(Self { beats: 0 })
//!     }
//!
//!     fn timer(&mut self, _timer: &Timer) -> HandlerResult {
//!         self.beats += 1;
//!         stockade_plugin::info!("heartbeat #{}", self.beats);
//!         Ok(())
//!     }
//! }
//!
//! stockade_plugin::export_plugin!(Heartbeat);
//! # fn main() {}
//! ```
//!
//! # A command
//!
//! A program with `main` that waits for what happens with [`next_message`]. A program that only
//! prints needs no crate at all.
//!
//! ```no_run
//! use std::time::Duration;
//! use stockade_plugin::{Message, next_message};
//!
//! fn main() -> stockade_plugin::HandlerResult {
//!     loop {
//!         match next_message(Some(Duration::from_secs(30)))? {
//!             None => stockade_plugin::info!("still here"),
//!             Some(Message::Shutdown(_)) => return Ok(()),
//!             Some(_) => {}
//!         }
//!     }
//! }
//! ```
//!
//! # Tests
//!
//! On every other target than `wasm32` the calls go to a double, so the tests of a plugin run with
//! a plain `cargo test`: see [`testing`].

mod abi;
pub mod cache;
pub mod config;
mod error;
mod export;
pub mod http;
mod log;
mod message;
pub mod metrics;
pub mod state;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;
pub mod timer;

pub use error::{Error, ErrorCode, Result};
pub use export::{Callable, Plugin, Ranker};
#[doc(hidden)]
pub use export::{Exported, run};
pub use log::{Level, log};
pub use message::{
    Call, Candidate, Event, EventBatch, Message, Rank, Shutdown, Start, Timer, next_message, reply,
    reply_order,
};

/// What handlers and the `main` of a command return: any error will do, it is logged.
pub type HandlerResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The version of the contract that this crate speaks.
pub const ABI_VERSION: u32 = 1;

/// Milliseconds of the Unix epoch, by the server's clock.
#[must_use]
pub fn clock_ms() -> i64 {
    abi::clock_ms()
}
