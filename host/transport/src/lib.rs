//! The server side of ZeroMQ: what a ROUTER socket is to its clients, without a router.
//!
//! Every connection is one task that reads, decodes, calls the [`Handler`] and
//! writes its replies on the same connection. Nothing is shared between
//! connections but counters and the memory budget, so a slow or hostile peer
//! hurts only itself.
//!
//! Bind [`Listener`]s first, then hand all of them to [`Server::serve`].
//! Protocol facts live in [`zmtp`], which does no I/O.
//!
//! Limits, all in [`Config`]: connections, handshake time, frame and message
//! size, frames per message, time for one message to arrive, requests in flight
//! and bytes queued per connection, bytes held over all connections. Each has a
//! counter in [`Stats`].
#![forbid(unsafe_code)]

pub mod zmtp;

mod listener;
mod peer;
mod server;

mod budget;
mod config;
mod connection;
mod log_limiter;
mod stats;

pub use config::{Config, ConfigError};
pub use listener::{BindError, Endpoint, EndpointError, ListenOptions, Listener};
pub use log_limiter::LogLimiter;
pub use peer::{Credentials, Peer, PeerAddress, SendError};
pub use server::{Handler, Lane, Outcome, Server, Turn, wake_after_sockets};
pub use stats::{DisconnectReason, Stats};
pub use zmtp::{
    Authenticator, Curve, Frames, Limit, Limits, Mechanism, Message, Principal, ProtocolError,
    SocketType, curve_public_key,
};
