//! Limits and times of a server.

use std::time::Duration;

use crate::zmtp::Limits;

/// Limits and times of a server; [`Default`] is meant for production.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What one message may be. Default: 16 MiB per frame, 32 MiB and 16 frames per
    /// message; up to 16 times the message limit is skipped rather than refused.
    pub limits: Limits,
    /// Connections over all listeners; more are closed as soon as accepted. Keep it
    /// below the limit of open files, at which accepting can only wait. Default 4096.
    pub max_connections: usize,
    /// Time from accept to the end of the handshake. Default 5 s.
    pub handshake_timeout: Duration,
    /// Time from the first to the last byte of one message, while the server
    /// reads. Bounds what a peer can hold by sending slowly. Default 60 s.
    pub message_timeout: Duration,
    /// A ZMTP 3.1 peer that has been silent for this long gets a `PING`. Default 15 s.
    pub heartbeat_interval: Duration,
    /// A ZMTP 3.1 peer that has been silent for this long is dropped. Must be longer
    /// than `heartbeat_interval`. Default 45 s.
    pub heartbeat_timeout: Duration,
    /// `TCP_USER_TIMEOUT` and the start of TCP keep-alive probes: finds peers that
    /// vanished, 3.0 peers included. Default 60 s.
    pub tcp_user_timeout: Duration,
    /// [`Outcome::Later`](crate::Outcome::Later) futures of one connection; when
    /// reached, its next messages stay unread. Default 256.
    pub max_in_flight: usize,
    /// Bytes of replies that wait for one peer to read; over it, its next messages
    /// stay unread. A reply already made is always queued, whatever its size. Default 1 MiB.
    pub max_outbound_bytes: usize,
    /// As `max_outbound_bytes`, in messages. Default 4096.
    pub max_outbound_messages: usize,
    /// Bytes that [`Peer::try_send`](crate::Peer::try_send) may have waiting for one
    /// peer, apart from its replies; one message over it may wait alone. Default 1 MiB.
    pub max_push_bytes: usize,
    /// As `max_push_bytes`, in messages. Default 1024.
    pub max_push_messages: usize,
    /// A peer that has accepted no byte for this long while some wait is dropped. Default 30 s.
    pub slow_reader_grace: Duration,
    /// Bytes of requests received and not yet answered, over all connections,
    /// beyond the first 256 KiB of each. Connections over it wait for others,
    /// one of them at a time is let through to the end of its message. Default 256 MiB.
    pub max_inbound_bytes: usize,
    /// Messages and commands handled before other connections get their turn. Default 64.
    pub messages_per_turn: usize,
    /// Time for requests in flight to finish and replies to be read when a
    /// connection ends or the server stops. Default 5 s.
    pub drain_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            max_connections: 4096,
            handshake_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(60),
            heartbeat_interval: Duration::from_secs(15),
            heartbeat_timeout: Duration::from_secs(45),
            tcp_user_timeout: Duration::from_secs(60),
            max_in_flight: 256,
            max_outbound_bytes: 1 << 20,
            max_outbound_messages: 4096,
            max_push_bytes: 1 << 20,
            max_push_messages: 1024,
            slow_reader_grace: Duration::from_secs(30),
            max_inbound_bytes: 256 << 20,
            messages_per_turn: 64,
            drain_grace: Duration::from_secs(5),
        }
    }
}

/// A setting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A count or size that must be at least 1 is 0.
    #[error("`{0}` is 0; set it to at least 1")]
    Zero(&'static str),
    /// Peers would be dropped before their answer to a `PING` could come.
    #[error("`heartbeat_timeout` must be longer than `heartbeat_interval`")]
    HeartbeatOrder,
    /// No frame could be as large as a frame may be.
    #[error("`max_frame_bytes` is over `max_message_bytes`; raise the latter or lower the former")]
    FrameOverMessage,
}

impl Config {
    /// Checks that the settings can work together.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("max_frame_bytes", self.limits.max_frame_bytes),
            ("max_frames", self.limits.max_frames),
            ("skip_factor", self.limits.skip_factor as usize),
            ("max_connections", self.max_connections),
            ("max_in_flight", self.max_in_flight),
            ("max_outbound_bytes", self.max_outbound_bytes),
            ("max_outbound_messages", self.max_outbound_messages),
            ("max_push_bytes", self.max_push_bytes),
            ("max_push_messages", self.max_push_messages),
            ("max_inbound_bytes", self.max_inbound_bytes),
            ("messages_per_turn", self.messages_per_turn),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        let times = [
            ("handshake_timeout", self.handshake_timeout),
            ("message_timeout", self.message_timeout),
            ("heartbeat_interval", self.heartbeat_interval),
            ("tcp_user_timeout", self.tcp_user_timeout),
            ("slow_reader_grace", self.slow_reader_grace),
        ];
        if let Some((name, _)) = times.iter().find(|(_, value)| value.is_zero()) {
            return Err(ConfigError::Zero(name));
        }
        if self.heartbeat_timeout <= self.heartbeat_interval {
            return Err(ConfigError::HeartbeatOrder);
        }
        if self.limits.max_frame_bytes > self.limits.max_message_bytes {
            return Err(ConfigError::FrameOverMessage);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_each_contradiction_is_named() {
        assert_eq!(Config::default().validate(), Ok(()));
        let zero = Config {
            max_in_flight: 0,
            ..Config::default()
        };
        assert_eq!(zero.validate(), Err(ConfigError::Zero("max_in_flight")));
        let order = Config {
            heartbeat_timeout: Duration::from_secs(1),
            ..Config::default()
        };
        assert_eq!(order.validate(), Err(ConfigError::HeartbeatOrder));
        let mut frame = Config::default();
        frame.limits.max_frame_bytes = frame.limits.max_message_bytes + 1;
        assert_eq!(frame.validate(), Err(ConfigError::FrameOverMessage));
    }
}
