//! Messages as guests read them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{CallAsk, EventBatch, Handler, RankAsk, RankFailure, VERSION, link::RankTurn};

/// One event, as the plugin gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CacheEvent {
    /// An object became readable.
    Stored {
        /// Its key.
        key: String,
        /// Its salt.
        salt: String,
        /// Its model.
        model: String,
        /// Its length.
        bytes: u64,
        /// The request that stored it.
        request: Option<String>,
        /// Tokens of its chunk.
        tokens: u64,
    },
    /// An object was handed to a worker.
    Retrieved {
        /// Its key.
        key: String,
        /// Its salt.
        salt: String,
        /// Its model.
        model: String,
        /// Its length.
        bytes: u64,
        /// The request that reads it.
        request: String,
    },
    /// An object is gone.
    Evicted {
        /// Its key.
        key: String,
        /// Its salt.
        salt: String,
        /// Its model.
        model: String,
        /// Its length.
        bytes: u64,
        /// `pressure`, `cleared` or `corrupt`.
        why: String,
    },
    /// A request asked how much of its prefix is there.
    Lookup {
        /// The salt.
        salt: String,
        /// The model.
        model: String,
        /// The request.
        request: String,
        /// Tokens it asked for, in whole chunks.
        tokens: u64,
        /// Tokens of them that were found.
        hit_tokens: u64,
    },
    /// A request has ended.
    SessionEnd {
        /// The salt, where the request had a lookup.
        salt: String,
        /// The model, where the request had a lookup.
        model: String,
        /// The request.
        request: String,
    },
}

/// One object that may be evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RankCandidate {
    /// By which the reply names it: its place in the list.
    pub id: u32,
    /// Its key.
    pub key: String,
    /// Its salt.
    pub salt: String,
    /// Its model.
    pub model: String,
    /// Its share of the pool.
    pub bytes: u64,
    /// Its place in the prompt of the request that used it last, counted from 0.
    pub chunk: Option<u32>,
    /// Milliseconds since it was last asked for.
    pub idle_ms: u64,
    /// Milliseconds since it was stored.
    pub age_ms: u64,
    /// How often it was asked for.
    pub uses: u32,
    /// The last request that ended after using it.
    pub request: Option<String>,
}

/// Makes the candidates, on the plugin's own time.
pub type MakeCandidates = Box<dyn FnOnce() -> Vec<RankCandidate> + Send>;

/// Candidates for eviction, in the native order.
pub struct RankRequest {
    /// Whose they are.
    pub tenant: Arc<str>,
    /// What eviction wants to free of them.
    pub bytes_wanted: u64,
    /// How many there are.
    pub count: usize,
    /// What they are.
    pub candidates: MakeCandidates,
}

impl std::fmt::Debug for RankRequest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("RankRequest")
            .field("tenant", &self.tenant)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// What a message wants of the guest.
#[derive(Debug)]
pub(crate) enum Wants {
    Nothing,
    Call(oneshot::Sender<Result<Bytes, String>>),
    Rank {
        /// First, so that it is free when whoever waits sees the reply lost.
        turn: RankTurn,
        reply: std::sync::mpsc::SyncSender<Result<Vec<u32>, RankFailure>>,
        count: usize,
    },
}

/// One message, in the form in which the guest reads it.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) handler: Handler,
    pub(crate) text: Vec<u8>,
    pub(crate) body: Bytes,
    pub(crate) wants: Wants,
    /// What the guest gave with `reply`.
    pub(crate) given: Option<Vec<u8>>,
}

impl Message {
    fn new(handler: Handler, seq: u64, fields: Value) -> Self {
        let mut text = json!({"kind": handler.kind(), "seq": seq});
        if let (Value::Object(text), Value::Object(fields)) = (&mut text, fields) {
            text.extend(fields);
        }
        Self {
            handler,
            text: text.to_string().into_bytes(),
            body: Bytes::new(),
            wants: Wants::Nothing,
            given: None,
        }
    }

    pub(crate) fn start(seq: u64, plugin: &str, tenant: Option<&str>) -> Self {
        let server = env!("CARGO_PKG_VERSION");
        let fields = json!({"plugin": plugin, "abi": VERSION, "server": server, "tenant": tenant});
        Self::new(Handler::Start, seq, fields)
    }

    pub(crate) fn timer(seq: u64, name: &str, lag: Duration) -> Self {
        let fields = json!({"name": name, "lag_ms": milliseconds(lag)});
        Self::new(Handler::Timer, seq, fields)
    }

    pub(crate) fn shutdown(seq: u64, grace: Duration) -> Self {
        Self::new(
            Handler::Shutdown,
            seq,
            json!({"grace_ms": milliseconds(grace)}),
        )
    }

    pub(crate) fn events(seq: u64, batch: EventBatch) -> Self {
        let events = (batch.events)();
        let events = serde_json::to_value(events).unwrap_or_default();
        let fields = json!({"cursor": batch.cursor, "lost": batch.lost, "events": events});
        Self::new(Handler::Events, seq, fields)
    }

    pub(crate) fn call(seq: u64, ask: CallAsk) -> Self {
        let fields = json!({
            "method": ask.method,
            "cache_salt": ask.cache_salt,
            "caller": ask.caller,
            "body_bytes": ask.payload.len(),
        });
        Self {
            body: ask.payload,
            wants: Wants::Call(ask.reply),
            ..Self::new(Handler::Call, seq, fields)
        }
    }

    pub(crate) fn rank(seq: u64, ask: RankAsk) -> Self {
        let RankAsk {
            request,
            deadline,
            reply,
            turn,
        } = ask;
        let candidates = (request.candidates)();
        let candidates = serde_json::to_value(candidates).unwrap_or_default();
        let fields = json!({
            "tenant": &*request.tenant,
            "bytes_wanted": request.bytes_wanted,
            "deadline_ms": milliseconds(deadline),
            "candidates": candidates,
        });
        Self {
            wants: Wants::Rank {
                reply,
                count: request.count,
                turn,
            },
            ..Self::new(Handler::Rank, seq, fields)
        }
    }

    /// Ends the message: whoever waits for a reply gets it, or `failure` as the reason why not.
    /// Before that, `count_as` hears whether it was a success.
    pub(crate) fn settle(self, failure: Option<String>, count_as: impl FnOnce(bool)) {
        match (self.wants, self.given, failure) {
            (Wants::Nothing, _, failure) => count_as(failure.is_none()),
            (Wants::Call(reply), given, failure) => {
                let outcome = match (given, failure) {
                    (_, Some(failure)) => Err(failure),
                    (Some(given), None) => Ok(Bytes::from(given)),
                    (None, None) => Err("the plugin returned without a reply".to_owned()),
                };
                count_as(outcome.is_ok());
                // Whoever asked may have stopped waiting.
                let _ = reply.send(outcome);
            }
            (Wants::Rank { reply, count, turn }, given, failure) => {
                let order = match (given, failure) {
                    (_, Some(_)) => Err(RankFailure::Garbage),
                    (None, None) => Err(RankFailure::Missing),
                    (Some(given), None) => parse_order(&given, count),
                };
                count_as(order.is_ok());
                // Whoever gets the order may ask for the next one at once.
                drop(turn);
                let _ = reply.try_send(order);
            }
        }
    }
}

/// Reads an order: a JSON list of candidates' ids, each at most once.
pub(crate) fn parse_order(given: &[u8], count: usize) -> Result<Vec<u32>, RankFailure> {
    let order: Vec<u64> = serde_json::from_slice(given).map_err(|_| RankFailure::Garbage)?;
    let mut is_named = vec![false; count];
    let mut ids = Vec::with_capacity(order.len().min(count));
    for id in order {
        let place = usize::try_from(id).ok().and_then(|id| is_named.get_mut(id));
        match place {
            None => return Err(RankFailure::Foreign),
            Some(true) => return Err(RankFailure::Duplicate),
            Some(place) => *place = true,
        }
        ids.push(u32::try_from(id).map_err(|_| RankFailure::Foreign)?);
    }
    Ok(ids)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_what_was_given_each_once() {
        assert_eq!(parse_order(b"[2, 0]", 3), Ok(vec![2, 0]));
        assert_eq!(parse_order(b"[]", 3), Ok(Vec::new()));
        for (given, failure) in [
            (&b"[3]"[..], RankFailure::Foreign),
            (b"[18446744073709551615]", RankFailure::Foreign),
            (b"[1, 1]", RankFailure::Duplicate),
            (b"[-1]", RankFailure::Garbage),
            (b"[1.5]", RankFailure::Garbage),
            (b"{}", RankFailure::Garbage),
            (b"[\"0\"]", RankFailure::Garbage),
            (b"\xff", RankFailure::Garbage),
            (b"", RankFailure::Garbage),
        ] {
            assert_eq!(parse_order(given, 3), Err(failure), "{given:?}");
        }
    }

    #[test]
    fn a_message_is_the_documented_json() {
        let text = |message: Message| String::from_utf8_lossy(&message.text).into_owned();
        assert_eq!(
            text(Message::timer(2, "tick", Duration::ZERO)),
            r#"{"kind":"timer","seq":2,"name":"tick","lag_ms":0}"#
        );
        let start = text(Message::start(1, "it", None));
        assert!(
            start.starts_with(r#"{"kind":"start","seq":1,"plugin":"it","abi":1,"server":""#)
                && start.ends_with(r#","tenant":null}"#),
            "{start}"
        );
        let batch = EventBatch {
            cursor: 118,
            lost: 0,
            events: Box::new(|| {
                vec![CacheEvent::Lookup {
                    salt: String::new(),
                    model: "m".to_owned(),
                    request: "r1".to_owned(),
                    tokens: 2048,
                    hit_tokens: 1024,
                }]
            }),
        };
        assert_eq!(
            text(Message::events(4, batch)),
            r#"{"kind":"events","seq":4,"cursor":118,"lost":0,"events":[{"type":"lookup","salt":"","model":"m","request":"r1","tokens":2048,"hit_tokens":1024}]}"#
        );
    }
}
