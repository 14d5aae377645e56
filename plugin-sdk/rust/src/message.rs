//! What the server tells a plugin.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    Result, abi,
    abi::milliseconds,
    error::{done, length, parsed, written},
};

/// A message of any kind. Kinds that this version of the crate does not know are
/// [`Message::Unknown`], and can be left alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Message {
    /// The first one.
    Start(Start),
    /// A timer is due.
    Timer(Timer),
    /// Something happened in the cache.
    Events(EventBatch),
    /// Somebody calls; wants a [`reply`].
    Call(Call),
    /// Somebody must go; wants a [`reply_order`].
    Rank(Rank),
    /// The plugin is to end.
    Shutdown(Shutdown),
    /// What a newer server may send.
    #[serde(other)]
    Unknown,
}

/// The plugin's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Start {
    /// Number of the message in this run.
    pub seq: u64,
    /// The plugin's name.
    pub plugin: String,
    /// Version of the contract that the server speaks with it.
    pub abi: u32,
    /// Version of the server.
    pub server: String,
    /// The tenant that the plugin belongs to, if it does.
    pub tenant: Option<String>,
}

/// A timer that is due.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Timer {
    /// Number of the message in this run.
    pub seq: u64,
    /// Its name.
    pub name: String,
    /// How late it is, in milliseconds.
    pub lag_ms: u64,
}

/// The request to end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Shutdown {
    /// Number of the message in this run.
    pub seq: u64,
    /// Milliseconds until the plugin is ended by force.
    pub grace_ms: u64,
}

/// A call of an LMCache client (`server_module_call`) or of an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Call {
    /// Number of the message in this run.
    pub seq: u64,
    /// `<plugin>.<method>`.
    pub method: String,
    /// The salt of the caller.
    pub cache_salt: String,
    /// `zmq` for a client, `http` for an operator.
    pub caller: String,
    /// Length of the payload.
    pub body_bytes: u64,
    /// The payload.
    #[serde(skip)]
    pub body: Vec<u8>,
}

impl Call {
    /// The method without the plugin's name before it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.method
            .split_once('.')
            .map_or(&*self.method, |(_, name)| name)
    }

    /// A call of `method` with `body`, for tests.
    #[must_use]
    pub fn new(method: &str, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            method: method.to_owned(),
            caller: "zmq".to_owned(),
            body_bytes: body.len() as u64,
            body,
            ..Self::default()
        }
    }
}

/// Events since the last batch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct EventBatch {
    /// Number of the message in this run.
    pub seq: u64,
    /// Number of the last event, to subscribe from later.
    pub cursor: u64,
    /// Events before this batch that were dropped because the plugin was behind.
    pub lost: u64,
    /// In the order in which they happened.
    pub events: Vec<Event>,
}

/// Something that happened in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// An object can be read.
    Stored {
        /// Its key.
        key: String,
        /// Its salt.
        #[serde(default)]
        salt: String,
        /// Its model.
        #[serde(default)]
        model: String,
        /// Its size.
        #[serde(default)]
        bytes: u64,
        /// The request that stored it, where it is known.
        #[serde(default)]
        request: Option<String>,
        /// Tokens that it holds.
        #[serde(default)]
        tokens: u64,
    },
    /// An object was read.
    Retrieved {
        /// Its key.
        key: String,
        /// Its salt.
        #[serde(default)]
        salt: String,
        /// Its model.
        #[serde(default)]
        model: String,
        /// Its size.
        #[serde(default)]
        bytes: u64,
        /// The request that read it.
        #[serde(default)]
        request: String,
    },
    /// An object is gone.
    Evicted {
        /// Its key.
        key: String,
        /// Its salt.
        #[serde(default)]
        salt: String,
        /// Its model.
        #[serde(default)]
        model: String,
        /// Its size.
        #[serde(default)]
        bytes: u64,
        /// Why it went, such as `pressure`.
        #[serde(default)]
        why: String,
    },
    /// A request asked how much of its tokens is there.
    Lookup {
        /// Its salt.
        #[serde(default)]
        salt: String,
        /// Its model.
        #[serde(default)]
        model: String,
        /// The request.
        #[serde(default)]
        request: String,
        /// Tokens that it has.
        #[serde(default)]
        tokens: u64,
        /// Tokens of them that are there.
        #[serde(default)]
        hit_tokens: u64,
    },
    /// A request has ended.
    SessionEnd {
        /// Its salt.
        #[serde(default)]
        salt: String,
        /// Its model.
        #[serde(default)]
        model: String,
        /// The request.
        #[serde(default)]
        request: String,
    },
    /// What a newer server may send.
    #[serde(other)]
    Unknown,
}

/// Candidates for eviction. All of them may go; the plugin says in what order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Rank {
    /// Number of the message in this run.
    pub seq: u64,
    /// The tenant whose objects they are.
    pub tenant: String,
    /// Bytes that must go now.
    pub bytes_wanted: u64,
    /// Milliseconds after which the server goes on without an answer.
    pub deadline_ms: u64,
    /// In the native policy's order, first to go first.
    pub candidates: Vec<Candidate>,
}

impl Rank {
    /// A request to rank `candidates`, for tests.
    #[must_use]
    pub fn new(candidates: Vec<Candidate>) -> Self {
        Self {
            candidates,
            ..Self::default()
        }
    }
}

/// An object that may be evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Candidate {
    /// What the order names it by.
    pub id: u32,
    /// Its key.
    pub key: String,
    /// Its salt.
    pub salt: String,
    /// Its model.
    pub model: String,
    /// Its size.
    pub bytes: u64,
    /// Its place in the prompt of the request that used it last, from 0, where it is known.
    pub chunk: Option<u64>,
    /// Milliseconds since it was last asked for.
    pub idle_ms: u64,
    /// Milliseconds since it was stored.
    pub age_ms: u64,
    /// How often it was asked for.
    pub uses: u64,
    /// The last request that ended after using it, if there is one.
    pub request: Option<String>,
}

impl Message {
    /// The message of `length` bytes that is at hand.
    pub(crate) fn read(length: usize) -> Result<Self> {
        let mut message: Self = parsed(&abi::message(length), "a message")?;
        if let Self::Call(call) = &mut message {
            call.body = abi::message_body(usize::try_from(call.body_bytes).unwrap_or(usize::MAX));
        }
        Ok(message)
    }
}

/// Waits for the next message, at most `timeout`, without end where there is none. For commands
/// only: a reactor's handlers are called instead. `None` when the time is over.
///
/// # Errors
/// [`ErrorCode::State`](crate::ErrorCode::State) in a reactor.
pub fn next_message(timeout: Option<Duration>) -> Result<Option<Message>> {
    let timeout_ms = timeout.map_or(-1, milliseconds);
    match length(abi::next_message(timeout_ms))? {
        0 => Ok(None),
        length => Message::read(length).map(Some),
    }
}

/// Replies to the [`Call`] at hand. For commands; what a reactor's handler returns is its reply.
///
/// # Errors
/// [`ErrorCode::State`](crate::ErrorCode::State) when nothing waits for a reply.
pub fn reply(bytes: &[u8]) -> Result<()> {
    done(abi::reply(bytes))
}

/// Replies to the [`Rank`] at hand with the ids of candidates, first to go first. For commands.
///
/// # Errors
/// As [`reply`].
pub fn reply_order(ids: &[u32]) -> Result<()> {
    reply(&written(&ids)?)
}
