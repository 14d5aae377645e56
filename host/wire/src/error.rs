//! Why a request could not be decoded: which operation, which field, what was wrong.

use std::fmt;

use crate::frame::Envelope;
use crate::operation::Operation;

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of text.
    Bytes,
    /// Token ids.
    Tokens,
    /// Block or token ids of a report.
    Ids,
    /// Records of a report.
    Records,
    /// Object keys.
    Keys,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Tokens => "tokens",
            Self::Ids => "ids",
            Self::Records => "records",
            Self::Keys => "keys",
        })
    }
}

/// What is wrong with one field of a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldProblem {
    /// The bytes end inside a value, or a header announces more than there is.
    #[error("ends before the value it announces is complete")]
    Truncated,
    /// Bytes follow the one value that the frame should hold.
    #[error("{count} bytes follow the value; send exactly one msgpack value per frame")]
    TrailingBytes {
        /// How many bytes were left over.
        count: usize,
    },
    /// A value of another msgpack type.
    #[error("expected {expected}, found {found}")]
    WrongType {
        /// What LMCache's contract asks for.
        expected: &'static str,
        /// The msgpack type that arrived.
        found: &'static str,
    },
    /// A whole number outside the range the field can hold.
    #[error("{value} is outside {lowest}..={highest}")]
    OutOfRange {
        /// What arrived.
        value: i128,
        /// The smallest value accepted.
        lowest: i128,
        /// The largest value accepted.
        highest: i128,
    },
    /// Text that is no whole number, in a field that also takes numbers written as text.
    #[error("is text that does not hold a whole number; send a msgpack integer")]
    NotANumber,
    /// A msgpack string that is not UTF-8.
    #[error("is not valid UTF-8")]
    NotUtf8,
    /// A field without a default that the map does not hold.
    #[error("is missing; it has no default")]
    Missing,
    /// Values nested deeper than the limit.
    #[error("is nested deeper than {limit} levels")]
    TooDeep {
        /// The deepest level accepted.
        limit: usize,
    },
    /// Longer than the limit; becomes [`DecodeError::TooLarge`].
    #[error("has {got} {unit}, the limit is {limit}")]
    TooLarge {
        /// How many arrived or were announced.
        got: usize,
        /// How many are accepted.
        limit: usize,
        /// What is counted.
        unit: Unit,
    },
    /// The marker byte 0xc1, which msgpack never uses.
    #[error("holds the byte 0xc1, which is not msgpack")]
    Reserved,
    /// Well-formed, but not allowed by a rule that the text names.
    #[error("{rule}")]
    Refused {
        /// The rule, as a sentence for the client's author.
        rule: &'static str,
    },
}

/// Why a request is not served. Messages name the operation and the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Fewer than two frames, or a uid frame that is not one msgpack value: nobody to answer.
    #[error(
        "not addressed: a request is [uid, operation, payload...], uid being one msgpack value"
    )]
    NotAddressed,
    /// Control frames (an empty operation) that are neither `ack` nor `cancel`; LMCache
    /// reads no answer to control frames, so none should be sent.
    #[error("stream control frames must be [uid, empty, `ack` or `cancel`]")]
    StreamControl,
    /// The operation frame names nothing that LMCache 0.5.6 knows.
    #[error("unknown operation {operation}; use a name or number of LMCache 0.5.6")]
    UnknownOperation {
        /// What arrived, shortened and made printable.
        operation: String,
    },
    /// Another number of payload frames than the operation takes.
    #[error("{operation} takes {expected} payload frames, got {got}")]
    Arity {
        /// The operation.
        operation: Operation,
        /// How many payload frames it takes.
        expected: usize,
        /// How many came.
        got: usize,
    },
    /// One field is not what the contract says.
    #[error("{operation}: {field} {problem}")]
    Field {
        /// The operation.
        operation: Operation,
        /// The payload's or field's name, dotted for nested fields.
        field: &'static str,
        /// What is wrong with it.
        problem: Box<FieldProblem>,
    },
    /// One field is longer than [`Limits`](crate::Limits) allow.
    #[error("{operation}: {field} has {got} {unit}, the limit is {limit}")]
    TooLarge {
        /// The operation.
        operation: Operation,
        /// The payload's or field's name, dotted for nested fields.
        field: &'static str,
        /// How many arrived or were announced.
        got: usize,
        /// How many are accepted.
        limit: usize,
        /// What is counted.
        unit: Unit,
    },
}

impl DecodeError {
    /// Every value that [`reason`](Self::reason) can return, for metrics that start at zero.
    pub const REASONS: [&'static str; 6] = [
        "not_addressed",
        "stream_control",
        "unknown_operation",
        "arity",
        "field",
        "too_large",
    ];

    /// A label for metrics, out of the fixed set [`REASONS`](Self::REASONS).
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAddressed => "not_addressed",
            Self::StreamControl => "stream_control",
            Self::UnknownOperation { .. } => "unknown_operation",
            Self::Arity { .. } => "arity",
            Self::Field { .. } => "field",
            Self::TooLarge { .. } => "too_large",
        }
    }

    pub(crate) fn field(operation: Operation, field: &'static str, problem: FieldProblem) -> Self {
        match problem {
            FieldProblem::TooLarge { got, limit, unit } => Self::TooLarge {
                operation,
                field,
                got,
                limit,
                unit,
            },
            problem => Self::Field {
                operation,
                field,
                problem: Box::new(problem),
            },
        }
    }
}

/// A request that was refused, with what is needed to say so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Rejected {
    /// Where an answer goes; `None` when nobody would read one.
    pub envelope: Option<Envelope>,
    /// The operation, where it was understood.
    pub operation: Option<Operation>,
    /// Why.
    #[source]
    pub error: DecodeError,
}
