//! Requests by operation, decoded as LMCache's server decodes them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{DecodeError, FieldProblem, Unit};
use crate::frame::Limits;
use crate::key::{self, CacheKey};
use crate::kv_cache::{self, KvCacheRegistration};
use crate::msgpack::{Reader, Value};
use crate::operation::Operation;
use crate::register::{self, RegisterContext};

/// The name of an engine's request; it may be empty.
pub type RequestId = Arc<str>;

/// A worker or scheduler process, by the number it gave itself.
///
/// Any msgpack integer; operations that LMCache passes through Python's `int()` also bring
/// numbers written as text, so it is wider than 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub i128);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A decoded request. Semantics are those of LMCache's `multiprocess/modules/`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Request {
    /// Health check; answered `OK`.
    Noop,
    /// Asks for the tokens per chunk.
    GetChunkSize,
    /// Asks for the server's capabilities.
    GetExperimental,
    /// A sign of life; `None` from schedulers, which are not tracked.
    Ping {
        /// The worker that lives.
        instance_id: Option<InstanceId>,
    },
    /// Registers a worker of the engine-driven path.
    Register(RegisterContext),
    /// Ends a registration; acknowledged even if there was none.
    Unregister {
        /// The worker that goes.
        instance_id: InstanceId,
    },
    /// Registers a worker of the lmcache-driven path with its paged KV cache.
    RegisterKvCache(KvCacheRegistration),
    /// Ends such a registration; acknowledged even if there was none.
    UnregisterKvCache {
        /// The worker that goes.
        instance_id: InstanceId,
    },
    /// Copies chunks out of a registered KV cache. The event handle that comes along orders the
    /// work of devices and is not kept.
    Store {
        /// What is stored.
        key: CacheKey,
        /// Whose KV cache it is in.
        instance_id: InstanceId,
        /// Blocks of the range in order, one list per group of layers; unchecked.
        block_ids: Vec<Vec<i64>>,
    },
    /// Copies chunks that a lookup has locked into a registered KV cache.
    Retrieve {
        /// What is retrieved.
        key: CacheKey,
        /// Whose KV cache it goes into.
        instance_id: InstanceId,
        /// As for a store.
        block_ids: Vec<Vec<i64>>,
        /// Tokens at the range's start that are not to be overwritten; below 0 as sent is 0.
        skip_tokens: u64,
    },
    /// Reserves slots for the chunks that are not cached.
    PrepareStore {
        /// What will be stored.
        key: CacheKey,
        /// Who stores it.
        instance_id: InstanceId,
    },
    /// Ends a store.
    CommitStore {
        /// As in the prepare.
        key: CacheKey,
        /// As in the prepare.
        instance_id: InstanceId,
        /// A pickled list of tensors, empty when the bytes went through shared memory.
        /// Shares the frame's memory.
        data: Bytes,
    },
    /// Asks for chunks that a lookup has locked.
    PrepareRetrieve {
        /// What is retrieved.
        key: CacheKey,
        /// Who retrieves it.
        instance_id: InstanceId,
    },
    /// Ends a retrieve.
    CommitRetrieve {
        /// As in the prepare.
        key: CacheKey,
        /// As in the prepare.
        instance_id: InstanceId,
    },
    /// Starts a prefix lookup; its `tp_size` frame is a legacy field that nobody reads.
    Lookup {
        /// The prompt.
        key: CacheKey,
    },
    /// Gives back what a lookup has locked and no retrieve will use.
    FreeLookupLocks {
        /// The range to give back.
        key: CacheKey,
    },
    /// Asks whether a lookup is done.
    QueryPrefetchStatus {
        /// The request that looked up.
        request_id: RequestId,
    },
    /// Waits for a lookup to be done.
    WaitPrefetchStatus {
        /// The request that looked up.
        request_id: RequestId,
        /// How long; at most a day, and zero for what is negative or no number.
        timeout: Duration,
    },
    /// Ends an engine's request.
    EndSession {
        /// The request that ends.
        request_id: RequestId,
    },
    /// Removes all objects.
    Clear {
        /// Whether locked ones go too.
        force: bool,
    },
    /// Tells which blocks the engine's scheduler has handed out.
    ReportBlockAllocation {
        /// The scheduler.
        instance_id: InstanceId,
        /// Its model.
        model_name: Arc<str>,
        /// What it handed out, per request.
        records: Vec<BlockAllocation>,
    },
    /// Opens a stream of KV events.
    SubscribeKvEvents {
        /// The worker; it has at most one subscription.
        instance_id: InstanceId,
        /// Events of this model only.
        model_name: Arc<str>,
        /// The last event already known.
        cursor: u64,
        /// Events per batch, 1..=1024.
        max_events: u16,
    },
    /// Asks for the next batch of the stream with this uid.
    StreamAck,
    /// Ends the stream with this uid.
    StreamCancel,
    /// A call into a server module, `<module>.<method>`.
    ServerModuleCall {
        /// What is before the last dot of the name; empty without a dot.
        module: String,
        /// What is after it.
        method: String,
        /// The module's own bytes. Shares the frame's memory.
        payload: Bytes,
    },
    /// A peer's lookup.
    P2pLookupAndLock {
        /// How many keys it asks for.
        keys: u32,
    },
    /// A peer asks for the outcome of its lookup.
    P2pQueryLookupResults {
        /// The number that the lookup was answered with.
        task_id: i128,
    },
    /// A peer has read what it locked.
    P2pUnlockObjects,
    /// An operation that LMCache knows and this server does not serve. The payload was not
    /// looked at.
    Unsupported(Operation),
}

impl Request {
    /// The operation; `None` for stream control frames.
    #[must_use]
    pub const fn operation(&self) -> Option<Operation> {
        Some(match self {
            Self::Noop => Operation::Noop,
            Self::GetChunkSize => Operation::GetChunkSize,
            Self::GetExperimental => Operation::GetExperimental,
            Self::Ping { .. } => Operation::Ping,
            Self::Register(_) => Operation::RegisterKvCacheEngineDrivenContext,
            Self::Unregister { .. } => Operation::UnregisterKvCacheEngineDrivenContext,
            Self::RegisterKvCache(_) => Operation::RegisterKvCache,
            Self::UnregisterKvCache { .. } => Operation::UnregisterKvCache,
            Self::Store { .. } => Operation::Store,
            Self::Retrieve { .. } => Operation::Retrieve,
            Self::PrepareStore { .. } => Operation::PrepareStore,
            Self::CommitStore { .. } => Operation::CommitStore,
            Self::PrepareRetrieve { .. } => Operation::PrepareRetrieve,
            Self::CommitRetrieve { .. } => Operation::CommitRetrieve,
            Self::Lookup { .. } => Operation::Lookup,
            Self::FreeLookupLocks { .. } => Operation::FreeLookupLocks,
            Self::QueryPrefetchStatus { .. } => Operation::QueryPrefetchStatus,
            Self::WaitPrefetchStatus { .. } => Operation::WaitPrefetchStatus,
            Self::EndSession { .. } => Operation::EndSession,
            Self::Clear { .. } => Operation::Clear,
            Self::ReportBlockAllocation { .. } => Operation::ReportBlockAllocation,
            Self::SubscribeKvEvents { .. } => Operation::SubscribeKvEvents,
            Self::StreamAck | Self::StreamCancel => return None,
            Self::ServerModuleCall { .. } => Operation::ServerModuleCall,
            Self::P2pLookupAndLock { .. } => Operation::P2pLookupAndLock,
            Self::P2pQueryLookupResults { .. } => Operation::P2pQueryLookupResults,
            Self::P2pUnlockObjects => Operation::P2pUnlockObjects,
            Self::Unsupported(operation) => *operation,
        })
    }
}

/// `BlockAllocationRecord` of LMCache's `custom_types.py`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockAllocation {
    /// The engine's request.
    pub req_id: RequestId,
    /// Blocks it got since the last report.
    pub new_block_ids: Vec<i64>,
    /// Tokens it got since the last report.
    pub new_token_ids: Vec<i64>,
}

/// Gives problems the operation's and field's name.
pub(crate) struct Fields<'l> {
    operation: Operation,
    pub(crate) limits: &'l Limits,
}

impl Fields<'_> {
    pub(crate) fn of<T>(
        &self,
        field: &'static str,
        read: Result<T, FieldProblem>,
    ) -> Result<T, DecodeError> {
        read.map_err(|problem| DecodeError::field(self.operation, field, problem))
    }

    pub(crate) fn required<T>(
        &self,
        field: &'static str,
        value: Option<T>,
    ) -> Result<T, DecodeError> {
        self.of(field, value.ok_or(FieldProblem::Missing))
    }

    /// One payload frame that holds one value.
    pub(crate) fn whole<'a, T>(
        &self,
        field: &'static str,
        frame: &'a Bytes,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, FieldProblem>,
    ) -> Result<T, DecodeError> {
        let mut reader = Reader::new(frame);
        let value = read(&mut reader).and_then(|value| reader.finish().map(|()| value));
        self.of(field, value)
    }

    pub(crate) fn string(
        &self,
        field: &'static str,
        frame: &Bytes,
    ) -> Result<Arc<str>, DecodeError> {
        let max_bytes = self.limits.max_string_bytes;
        self.whole(field, frame, |reader| reader.str(max_bytes).map(Arc::from))
    }

    pub(crate) fn coerced(&self, field: &'static str, frame: &Bytes) -> Result<i128, DecodeError> {
        let depth = self.limits.depth();
        self.whole(field, frame, |reader| coerce_int(reader.value(depth)?))
    }

    pub(crate) fn instance(&self, frame: &Bytes) -> Result<InstanceId, DecodeError> {
        self.coerced("instance_id", frame).map(InstanceId)
    }

    fn block_ids(&self, frame: &Bytes) -> Result<Vec<Vec<i64>>, DecodeError> {
        let limits = self.limits;
        self.whole("block_ids", frame, |reader| {
            kv_cache::read_block_ids(reader, limits)
        })
    }

    fn skipped(&self, field: &'static str, frame: &Bytes) -> Result<(), DecodeError> {
        let depth = self.limits.depth();
        self.whole(field, frame, |reader| reader.skip(depth))
    }

    fn payloads<'f, const N: usize>(
        &self,
        frames: &'f [Bytes],
    ) -> Result<&'f [Bytes; N], DecodeError> {
        frames.try_into().map_err(|_| DecodeError::Arity {
            operation: self.operation,
            expected: N,
            got: frames.len(),
        })
    }
}

/// LMCache turns a payload declared `int` into one with Python's `int(value)`
/// (`msgspec_decode` in `transport/zmq_impl/mq.py`), so text, floats and booleans pass.
fn coerce_int(value: Value<'_>) -> Result<i128, FieldProblem> {
    match value {
        Value::Int(value) => Ok(value),
        Value::Bool(value) => Ok(value.into()),
        #[expect(clippy::cast_possible_truncation, reason = "within i128 by the guard")]
        Value::Float(value) if value.abs() < 1e38 => Ok(value as i128),
        Value::Str(text) | Value::Bin(text) => parse_int(text).ok_or(FieldProblem::NotANumber),
        other => Err(FieldProblem::WrongType {
            expected: "int",
            found: other.type_name(),
        }),
    }
}

/// Python's `int(text)`: blanks around it, a sign, single underscores between digits.
fn parse_int(text: &[u8]) -> Option<i128> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let start = text.iter().position(|byte| !is_blank(byte))?;
    let end = text.iter().rposition(|byte| !is_blank(byte))?;
    let text = text.get(start..=end)?;
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    let mut value: i128 = 0;
    let mut after_digit = false;
    for &byte in digits {
        match byte {
            b'0'..=b'9' => {
                value = value
                    .checked_mul(10)?
                    .checked_add(i128::from(byte - b'0'))?;
                after_digit = true;
            }
            b'_' if after_digit => after_digit = false,
            _ => return None,
        }
    }
    after_digit.then_some(if negative { -value } else { value })
}

/// No client waits longer for a prefetch; keeps deadlines within what a timer can hold.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);

/// LMCache's bound on the events of one batch.
const MAX_EVENTS: i128 = 1024;

pub(crate) fn decode(
    operation: Operation,
    frames: &[Bytes],
    limits: &Limits,
) -> Result<Request, DecodeError> {
    let fields = Fields { operation, limits };
    Ok(match operation {
        Operation::Noop => {
            let [] = fields.payloads(frames)?;
            Request::Noop
        }
        Operation::GetChunkSize => {
            let [] = fields.payloads(frames)?;
            Request::GetChunkSize
        }
        Operation::GetExperimental => {
            let [] = fields.payloads(frames)?;
            Request::GetExperimental
        }
        Operation::Ping => {
            let [instance] = fields.payloads(frames)?;
            let instance_id = fields.whole("instance_id", instance, Reader::int_or_nil)?;
            Request::Ping {
                instance_id: instance_id.map(InstanceId),
            }
        }
        Operation::RegisterKvCacheEngineDrivenContext => {
            let [payload] = fields.payloads(frames)?;
            Request::Register(register::decode(&fields, payload)?)
        }
        Operation::UnregisterKvCacheEngineDrivenContext => {
            let [instance] = fields.payloads(frames)?;
            Request::Unregister {
                instance_id: fields.instance(instance)?,
            }
        }
        Operation::RegisterKvCache => {
            let frames = fields.payloads(frames)?;
            Request::RegisterKvCache(kv_cache::decode(&fields, frames)?)
        }
        Operation::UnregisterKvCache => {
            let [instance] = fields.payloads(frames)?;
            Request::UnregisterKvCache {
                instance_id: fields.instance(instance)?,
            }
        }
        Operation::Store => {
            let [key, instance, blocks, event] = fields.payloads(frames)?;
            fields.whole("event_ipc_handle", event, Reader::bin)?;
            Request::Store {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
                block_ids: fields.block_ids(blocks)?,
            }
        }
        Operation::Retrieve => {
            let [key, instance, blocks, event, skip] = fields.payloads(frames)?;
            fields.whole("event_ipc_handle", event, Reader::bin)?;
            let skip = fields.coerced("skip_first_n_tokens", skip)?;
            Request::Retrieve {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
                block_ids: fields.block_ids(blocks)?,
                // More tokens than a range can have skip all of them.
                skip_tokens: u64::try_from(skip.max(0)).unwrap_or(u64::MAX),
            }
        }
        Operation::PrepareStore => {
            let [key, instance] = fields.payloads(frames)?;
            Request::PrepareStore {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
            }
        }
        Operation::CommitStore => {
            let [key, instance, data] = fields.payloads(frames)?;
            let bytes = fields.whole("data", data, Reader::bin)?;
            Request::CommitStore {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
                data: data.slice_ref(bytes),
            }
        }
        Operation::PrepareRetrieve => {
            let [key, instance] = fields.payloads(frames)?;
            Request::PrepareRetrieve {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
            }
        }
        Operation::CommitRetrieve => {
            let [key, instance] = fields.payloads(frames)?;
            Request::CommitRetrieve {
                key: key::decode(&fields, key)?,
                instance_id: fields.instance(instance)?,
            }
        }
        Operation::Lookup => {
            let [key, tp_size] = fields.payloads(frames)?;
            fields.skipped("tp_size", tp_size)?;
            Request::Lookup {
                key: key::decode(&fields, key)?,
            }
        }
        Operation::FreeLookupLocks => {
            let [key, tp_size] = fields.payloads(frames)?;
            fields.skipped("tp_size", tp_size)?;
            Request::FreeLookupLocks {
                key: key::decode(&fields, key)?,
            }
        }
        Operation::QueryPrefetchStatus => {
            let [request] = fields.payloads(frames)?;
            Request::QueryPrefetchStatus {
                request_id: fields.string("request_id", request)?,
            }
        }
        Operation::WaitPrefetchStatus => {
            let [request, timeout] = fields.payloads(frames)?;
            let seconds = fields.whole("timeout", timeout, Reader::float)?;
            Request::WaitPrefetchStatus {
                request_id: fields.string("request_id", request)?,
                timeout: key::duration(seconds, MAX_WAIT),
            }
        }
        Operation::EndSession => {
            let [request] = fields.payloads(frames)?;
            Request::EndSession {
                request_id: fields.string("request_id", request)?,
            }
        }
        Operation::Clear => {
            let [force] = fields.payloads(frames)?;
            let depth = limits.depth();
            let value = fields.whole("force", force, |reader| reader.value(depth))?;
            Request::Clear {
                force: key::truth(value),
            }
        }
        Operation::ReportBlockAllocation => {
            let [instance, model, records] = fields.payloads(frames)?;
            Request::ReportBlockAllocation {
                instance_id: fields.instance(instance)?,
                model_name: fields.string("model_name", model)?,
                records: decode_records(&fields, records)?,
            }
        }
        Operation::SubscribeKvEvents => {
            let [instance, model, cursor, max_events] = fields.payloads(frames)?;
            Request::SubscribeKvEvents {
                instance_id: fields.instance(instance)?,
                model_name: fields.string("model_name", model)?,
                cursor: decode_cursor(&fields, cursor)?,
                max_events: decode_max_events(&fields, max_events)?,
            }
        }
        Operation::ServerModuleCall => {
            let [call] = fields.payloads(frames)?;
            decode_module_call(&fields, call)?
        }
        Operation::P2pLookupAndLock => {
            let [keys, layouts] = fields.payloads(frames)?;
            fields.skipped("group_layout_descs", layouts)?;
            Request::P2pLookupAndLock {
                keys: count_keys(&fields, keys)?,
            }
        }
        Operation::P2pQueryLookupResults => {
            let [task] = fields.payloads(frames)?;
            Request::P2pQueryLookupResults {
                task_id: fields.coerced("task_id", task)?,
            }
        }
        Operation::P2pUnlockObjects => {
            let [keys] = fields.payloads(frames)?;
            count_keys(&fields, keys)?;
            Request::P2pUnlockObjects
        }
        Operation::RegisterQCache
        | Operation::UnregisterQCache
        | Operation::StoreQ
        | Operation::CbRegisterRope
        | Operation::CbUnregisterRope
        | Operation::CbRetrievePreComputed
        | Operation::CbUnifiedLookup
        | Operation::CbProtocolHandshake
        | Operation::CbReorderPlan => Request::Unsupported(operation),
    })
}

fn decode_cursor(fields: &Fields<'_>, frame: &Bytes) -> Result<u64, DecodeError> {
    let cursor = fields.coerced("cursor", frame)?;
    fields.of("cursor", crate::msgpack::Narrow::narrow(cursor))
}

fn decode_max_events(fields: &Fields<'_>, frame: &Bytes) -> Result<u16, DecodeError> {
    let value = fields.coerced("max_events", frame)?;
    let in_range = (1..=MAX_EVENTS).contains(&value);
    let max_events = u16::try_from(value).ok().filter(|_| in_range);
    let problem = FieldProblem::OutOfRange {
        value,
        lowest: 1,
        highest: MAX_EVENTS,
    };
    fields.of("max_events", max_events.ok_or(problem))
}

fn bounded_len(reader: &mut Reader<'_>, max: usize, unit: Unit) -> Result<usize, FieldProblem> {
    match reader.array_len()? {
        got if got > max => Err(FieldProblem::TooLarge {
            got,
            limit: max,
            unit,
        }),
        len => Ok(len),
    }
}

fn count_keys(fields: &Fields<'_>, frame: &Bytes) -> Result<u32, DecodeError> {
    let limits = fields.limits;
    fields.whole("keys", frame, |reader| {
        let keys = bounded_len(reader, limits.max_records, Unit::Keys)?;
        for _ in 0..keys {
            match reader.skim(limits.depth())? {
                Value::Map { .. } => {}
                other => {
                    return Err(FieldProblem::WrongType {
                        expected: "map",
                        found: other.type_name(),
                    });
                }
            }
        }
        // An array's header has 32 bits for it.
        Ok(u32::try_from(keys).unwrap_or(u32::MAX))
    })
}

fn decode_records(fields: &Fields<'_>, frame: &Bytes) -> Result<Vec<BlockAllocation>, DecodeError> {
    let mut reader = Reader::new(frame);
    let count = bounded_len(&mut reader, fields.limits.max_records, Unit::Records);
    let count = fields.of("records", count)?;
    // Grown as records arrive: a record is much larger than the byte that announces it.
    let mut records = Vec::new();
    for _ in 0..count {
        records.push(decode_record(fields, &mut reader)?);
    }
    fields.of("records", reader.finish())?;
    Ok(records)
}

fn decode_record(
    fields: &Fields<'_>,
    reader: &mut Reader<'_>,
) -> Result<BlockAllocation, DecodeError> {
    let limits = fields.limits;
    let mut req_id = None;
    let mut new_block_ids = None;
    let mut new_token_ids = None;
    for _ in 0..fields.of("records", reader.map_len())? {
        match fields.of("records", reader.key())? {
            b"req_id" => {
                let id = reader.str(limits.max_string_bytes);
                req_id = Some(fields.of("records.req_id", id)?.into());
            }
            b"new_block_ids" => {
                let ids = int_list(reader, limits.max_tokens);
                new_block_ids = Some(fields.of("records.new_block_ids", ids)?);
            }
            b"new_token_ids" => {
                let ids = int_list(reader, limits.max_tokens);
                new_token_ids = Some(fields.of("records.new_token_ids", ids)?);
            }
            _ => fields.of("records", reader.skip(limits.depth()))?,
        }
    }
    Ok(BlockAllocation {
        req_id: fields.required("records.req_id", req_id)?,
        new_block_ids: fields.required("records.new_block_ids", new_block_ids)?,
        new_token_ids: fields.required("records.new_token_ids", new_token_ids)?,
    })
}

fn int_list(reader: &mut Reader<'_>, max: usize) -> Result<Vec<i64>, FieldProblem> {
    let count = bounded_len(reader, max, Unit::Ids)?;
    (0..count).map(|_| reader.int()).collect()
}

fn decode_module_call(fields: &Fields<'_>, frame: &Bytes) -> Result<Request, DecodeError> {
    let limits = fields.limits;
    let mut reader = Reader::new(frame);
    let mut name = None;
    let mut payload = None;
    for _ in 0..fields.of("request", reader.map_len())? {
        match fields.of("request", reader.key())? {
            b"method" => {
                name = Some(fields.of("request.method", reader.str(limits.max_string_bytes))?);
            }
            b"payload" => payload = Some(fields.of("request.payload", reader.bin())?),
            _ => fields.of("request", reader.skip(limits.depth()))?,
        }
    }
    fields.of("request", reader.finish())?;
    let name = fields.required("request.method", name)?;
    let payload = fields.required("request.payload", payload)?;
    let (module, method) = name.rsplit_once('.').unwrap_or(("", name));
    Ok(Request::ServerModuleCall {
        module: module.to_owned(),
        method: method.to_owned(),
        payload: frame.slice_ref(payload),
    })
}
