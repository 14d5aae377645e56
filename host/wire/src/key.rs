//! The cache key that a request carries: which tokens, of which model, for whom.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{DecodeError, FieldProblem};
use crate::msgpack::{Reader, Value};
use crate::request::{Fields, RequestId};
use crate::token_ids::{self, TokenIds};

/// A key as clients send it: `IPCCacheServerKey` in LMCache's `custom_types.py`.
///
/// It is not comparable because not all of it is identity: what makes a commit find its
/// prepare is for the server to say, which knows chunks by their hashes.
#[derive(Clone, Debug)]
pub struct CacheKey {
    /// The model whose KV cache this is.
    pub model_name: Arc<str>,
    /// Ranks that share the model.
    pub world_size: u32,
    /// The rank that stores or retrieves; `None` on lookups, which are for all ranks.
    pub worker_id: Option<u32>,
    /// The whole prompt up to at least `end`, as sent: `end` may lie beyond it.
    pub tokens: TokenIds,
    /// First token of the range.
    pub start: u64,
    /// One past the last token of the range; not checked against `start` or `tokens`.
    pub end: u64,
    /// The engine's request, which names the session. Not identity.
    pub request_id: RequestId,
    /// Keeps users apart: at most 128 characters, none of `@`, `/`, `\`, NUL.
    pub cache_salt: Arc<str>,
    /// Settings that came with the request. Not identity.
    pub request_configs: RequestConfigs,
    /// How many workers will retrieve the objects; below 1 means an older client that does
    /// not send it, which lookups must refuse. Not identity.
    pub num_kv_readers: i64,
}

/// Settings that an engine passes per request: what we know of `request_configs`.
///
/// Read leniently: unknown names, and known names with values of another type, are as if
/// absent, because LMCache itself takes any values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestConfigs {
    /// `lmcache.skip_save`: do not store this request's KV cache.
    pub skip_save: bool,
    /// `lmcache.ttl`, in seconds: how long the objects should be kept; at most ten years.
    pub ttl: Option<Duration>,
    /// `lmcache.pin`: keep the objects for as long as the tenant may.
    pub pin: bool,
    /// `lmcache.priority`, a whole number: the objects are worth more, or less, than others.
    pub priority: i64,
    /// `lmcache.tag.<name>` = value, for the first 16 whose name has at most 64 bytes and
    /// whose value is text of at most 256 bytes. In the order sent.
    pub tags: Vec<(Arc<str>, Arc<str>)>,
}

const MAX_TAGS: usize = 16;
const MAX_TAG_NAME_BYTES: usize = 64;
const MAX_TAG_VALUE_BYTES: usize = 256;
const MAX_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl RequestConfigs {
    fn read(reader: &mut Reader<'_>, depth: usize) -> Result<Self, FieldProblem> {
        let mut configs = Self::default();
        let entries = match reader.head()? {
            Value::Nil => return Ok(configs),
            Value::Map { len } => len,
            other => {
                return Err(FieldProblem::WrongType {
                    expected: "map or nil",
                    found: other.type_name(),
                });
            }
        };
        for _ in 0..entries {
            let name = reader.key()?;
            let name = str::from_utf8(name).map_err(|_| FieldProblem::NotUtf8)?;
            let value = reader.value(depth)?;
            configs.set(name, value);
        }
        Ok(configs)
    }

    fn set(&mut self, name: &str, value: Value<'_>) {
        match name {
            "lmcache.skip_save" => self.skip_save = truth(value),
            "lmcache.ttl" => self.ttl = seconds(value).map(|ttl| duration(ttl, MAX_TTL)),
            "lmcache.pin" => self.pin = truth(value),
            "lmcache.priority" => {
                if let Value::Int(priority) = value {
                    self.priority = i64::try_from(priority).unwrap_or(match priority > 0 {
                        true => i64::MAX,
                        false => i64::MIN,
                    });
                }
            }
            _ => {
                if let (Some(tag), Value::Str(value)) = (name.strip_prefix("lmcache.tag."), value)
                    && let Ok(value) = str::from_utf8(value)
                {
                    self.tag(tag, value);
                }
            }
        }
    }

    fn tag(&mut self, name: &str, value: &str) {
        if name.len() > MAX_TAG_NAME_BYTES || value.len() > MAX_TAG_VALUE_BYTES {
            return;
        }
        let known = self.tags.iter().position(|(tag, _)| tag.as_ref() == name);
        if let Some((_, old)) = known.and_then(|at| self.tags.get_mut(at)) {
            *old = value.into();
        } else if self.tags.len() < MAX_TAGS {
            self.tags.push((name.into(), value.into()));
        }
    }
}

/// Python's `bool(value)`.
pub(crate) fn truth(value: Value<'_>) -> bool {
    match value {
        Value::Nil => false,
        Value::Bool(value) => value,
        Value::Int(value) => value != 0,
        Value::Float(value) => value != 0.0,
        Value::Str(bytes) | Value::Bin(bytes) => !bytes.is_empty(),
        Value::Array { len } | Value::Map { len } => len != 0,
        Value::Ext { .. } => true,
    }
}

fn seconds(value: Value<'_>) -> Option<f64> {
    match value {
        Value::Float(seconds) => Some(seconds),
        #[expect(clippy::cast_precision_loss, reason = "as Python's float() of an int")]
        Value::Int(seconds) => Some(seconds as f64),
        _ => None,
    }
}

/// Seconds as a duration of at most `max`; not a number and below zero are zero.
pub(crate) fn duration(seconds: f64, max: Duration) -> Duration {
    if seconds.is_nan() || seconds <= 0.0 {
        return Duration::ZERO;
    }
    Duration::try_from_secs_f64(seconds).map_or(max, |duration| duration.min(max))
}

fn check_salt(salt: &str) -> Result<Arc<str>, FieldProblem> {
    if salt.contains(['@', '/', '\\', '\0']) {
        return Err(FieldProblem::Refused {
            rule: "must hold none of `@`, `/`, `\\` and NUL",
        });
    }
    if salt.chars().count() > MAX_SALT_CHARS {
        return Err(FieldProblem::Refused {
            rule: "must have at most 128 characters",
        });
    }
    Ok(salt.into())
}

/// As LMCache: the salt becomes part of file names.
const MAX_SALT_CHARS: usize = 128;

pub(crate) fn decode(fields: &Fields<'_>, frame: &Bytes) -> Result<CacheKey, DecodeError> {
    let limits = fields.limits;
    let mut reader = Reader::new(frame);
    let mut model_name = None;
    let mut world_size = None;
    let mut worker_id = None;
    let mut tokens = None;
    let mut start = None;
    let mut end = None;
    let mut request_id = None;
    let mut cache_salt: Option<Arc<str>> = None;
    let mut request_configs = RequestConfigs::default();
    let mut num_kv_readers = 0;
    for _ in 0..fields.of("key", reader.map_len())? {
        match fields.of("key", reader.key())? {
            b"model_name" => {
                let name = reader.str(limits.max_string_bytes);
                model_name = Some(fields.of("key.model_name", name)?.into());
            }
            b"world_size" => world_size = Some(fields.of("key.world_size", reader.int())?),
            b"worker_id" => worker_id = Some(fields.of("key.worker_id", reader.int_or_nil())?),
            b"token_ids" => {
                let ids = token_ids::read(&mut reader, limits);
                tokens = Some(fields.of("key.token_ids", ids)?);
            }
            b"start" => start = Some(fields.of("key.start", reader.int())?),
            b"end" => end = Some(fields.of("key.end", reader.int())?),
            b"request_id" => {
                let id = reader.str(limits.max_string_bytes);
                request_id = Some(fields.of("key.request_id", id)?.into());
            }
            b"cache_salt" => {
                let salt = reader.str(limits.max_string_bytes).and_then(check_salt);
                cache_salt = Some(fields.of("key.cache_salt", salt)?);
            }
            b"request_configs" => {
                let configs = RequestConfigs::read(&mut reader, limits.depth());
                request_configs = fields.of("key.request_configs", configs)?;
            }
            b"num_kv_readers" => {
                let readers: i128 = fields.of("key.num_kv_readers", reader.int())?;
                // A count beyond i64 is as good as the largest: it is clamped where it counts.
                num_kv_readers = i64::try_from(readers).unwrap_or(i64::MAX);
            }
            _ => fields.of("key", reader.skip(limits.depth()))?,
        }
    }
    fields.of("key", reader.finish())?;
    Ok(CacheKey {
        model_name: fields.required("key.model_name", model_name)?,
        world_size: fields.required("key.world_size", world_size)?,
        worker_id: fields.required("key.worker_id", worker_id)?,
        tokens: fields.required("key.token_ids", tokens)?,
        start: fields.required("key.start", start)?,
        end: fields.required("key.end", end)?,
        request_id: fields.required("key.request_id", request_id)?,
        cache_salt: cache_salt.unwrap_or_default(),
        request_configs,
        num_kv_readers,
    })
}
