//! The server from outside: independent peers, raw sockets and hostile input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

mod round_trip;

mod backpressure;
mod curve;
mod handshake;
mod heartbeat;
mod hostile;
mod lanes;
mod libzmq;
mod listeners;
mod shutdown;
mod turns;
