//! Frames in: `[uid, operation, payload...]`, and the limits on what they may hold.

use bytes::Bytes;

use crate::error::{DecodeError, FieldProblem, Rejected};
use crate::msgpack::{Reader, Value};
use crate::operation::Operation;
use crate::request::{self, Request};

/// What a request may hold at most; beyond it is [`DecodeError::TooLarge`].
///
/// The size of a frame is the transport's limit, not ours: memory here never exceeds a small
/// multiple of the frames.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens in one array of token ids.
    pub max_tokens: usize,
    /// Bytes in a model name, request id and the like.
    pub max_string_bytes: usize,
    /// Records of a block-allocation report, keys of a peer's lookup.
    pub max_records: usize,
    /// Containers within containers, in values that are skipped. At most 128 counts.
    pub max_depth: usize,
    /// Called after every few thousand tokens of an array, so that a thread can let others go first.
    pub between: fn(),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_tokens: 4 << 20,
            max_string_bytes: 64 << 10,
            max_records: 64 << 10,
            max_depth: 32,
            between: || {},
        }
    }
}

impl Limits {
    /// The depth that recursion is allowed whatever the setting says.
    pub(crate) fn depth(&self) -> usize {
        self.max_depth.min(MAX_DEPTH)
    }
}

/// Deeper than any client nests; shallow enough for a thread's stack.
const MAX_DEPTH: usize = 128;

/// The two frames that a reply echoes as they came.
///
/// The uid is opaque to the server. The operation frame is empty in stream control frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The client's number for the request, as msgpack.
    pub uid: Bytes,
    /// The operation as the client wrote it: a number or a name, as msgpack.
    pub operation: Bytes,
}

impl Envelope {
    /// The operation, if LMCache 0.5.6 knows it: for requests whose payload cannot be looked at.
    #[must_use]
    pub fn known_operation(&self, limits: &Limits) -> Option<Operation> {
        decode_operation(&self.operation, limits).ok()
    }
}

/// Decodes one request: the frames after the peer's identity.
///
/// Follows `transport/zmq_impl/mq.py` of LMCache 0.5.6: what its server answers is accepted,
/// what it is silent about is refused with a reason. Operations that are not served come
/// back as [`Request::Unsupported`] without a look at their payload.
///
/// # Errors
/// [`Rejected`] carries the envelope to answer to, unless nobody would read the answer.
pub fn decode(frames: Vec<Bytes>, limits: &Limits) -> Result<(Envelope, Request), Rejected> {
    let mut frames = frames.into_iter();
    let (Some(uid), Some(operation)) = (frames.next(), frames.next()) else {
        return Err(unanswerable(DecodeError::NotAddressed));
    };
    if !is_one_value(&uid, limits) {
        return Err(unanswerable(DecodeError::NotAddressed));
    }
    let envelope = Envelope { uid, operation };
    let payloads: Vec<Bytes> = frames.collect();
    if envelope.operation.is_empty() {
        let [control] = payloads.as_slice() else {
            return Err(unanswerable(DecodeError::StreamControl));
        };
        return match control.as_ref() {
            b"ack" => Ok((envelope, Request::StreamAck)),
            b"cancel" => Ok((envelope, Request::StreamCancel)),
            _ => Err(unanswerable(DecodeError::StreamControl)),
        };
    }
    let operation = match decode_operation(&envelope.operation, limits) {
        Ok(operation) => operation,
        Err(error) => {
            return Err(Rejected {
                envelope: Some(envelope),
                operation: None,
                error,
            });
        }
    };
    match request::decode(operation, &payloads, limits) {
        Ok(request) => Ok((envelope, request)),
        Err(error) => Err(Rejected {
            envelope: Some(envelope),
            operation: Some(operation),
            error,
        }),
    }
}

const fn unanswerable(error: DecodeError) -> Rejected {
    Rejected {
        envelope: None,
        operation: None,
        error,
    }
}

fn is_one_value(frame: &[u8], limits: &Limits) -> bool {
    let mut reader = Reader::new(frame);
    reader.skip(limits.depth()).is_ok() && reader.finish().is_ok()
}

fn decode_operation(frame: &[u8], limits: &Limits) -> Result<Operation, DecodeError> {
    let mut reader = Reader::new(frame);
    let value = reader
        .skim(limits.depth())
        .and_then(|value| reader.finish().map(|()| value));
    let known = match value {
        Ok(Value::Int(id)) => u64::try_from(id).ok().and_then(Operation::from_legacy_id),
        Ok(Value::Str(name)) => str::from_utf8(name).ok().and_then(Operation::from_name),
        _ => None,
    };
    known.ok_or_else(|| DecodeError::UnknownOperation {
        operation: describe(value),
    })
}

/// What came instead of an operation, short enough for a log line and a reply.
fn describe(value: Result<Value<'_>, FieldProblem>) -> String {
    const SHOWN_BYTES: usize = 48;
    match value {
        Ok(Value::Int(id)) => format!("number {id}"),
        Ok(Value::Str(name)) => {
            let cut = name.len() > SHOWN_BYTES;
            let shown = name.get(..SHOWN_BYTES).unwrap_or(name);
            let dots = if cut { "..." } else { "" };
            format!("`{}{dots}`", shown.escape_ascii())
        }
        Ok(other) => format!("of type {}", other.type_name()),
        Err(problem) => format!("in a frame that {problem}"),
    }
}
