//! What an engine says of its paged KV cache when it leaves the copying to the server.
//!
//! LMCache 0.5.6 describes each tensor by plain data (`platform/base/ipc_wire.py`), wrapped into
//! msgpack's extension type 1 (`custom_types.py`); pickled handles of older versions are refused,
//! as there. Nothing is opened or looked up here.

use std::sync::Arc;

use bytes::Bytes;

use crate::dtype::Dtype;
use crate::error::{DecodeError, FieldProblem, Unit};
use crate::frame::Limits;
use crate::msgpack::{Reader, Value};
use crate::request::{Fields, InstanceId};

/// A worker's paged KV cache: the payloads of `register_kv_cache` in LMCache's
/// `transport/base.py`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvCacheRegistration {
    /// The worker, usually by its process id.
    pub instance_id: InstanceId,
    /// Its tensors in the order of the layers; there may be none.
    pub tensors: Vec<IpcTensor>,
    /// The model it serves.
    pub model_name: Arc<str>,
    /// Ranks that share the model.
    pub world_size: u32,
    /// The engine, which decides how tensors are laid out.
    pub engine: EngineKind,
    /// What the engine adds about the layout.
    pub hints: LayoutHints,
    /// Layers that share block ids and a shape; none means that all do.
    pub groups: Vec<EngineGroup>,
}

/// Serving engines, as in `EngineType` of LMCache's `utils.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// `vllm`
    Vllm,
    /// `atom`
    Atom,
    /// `sglang`
    Sglang,
    /// `trtllm`
    TrtLlm,
    /// `mock`, which LMCache cannot register either.
    Mock,
}

/// A tensor by the handle through which another process reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IpcTensor {
    /// In shared memory of the machine.
    Shm(ShmTensor),
    /// In the memory of a device; the tag of its descriptor. The rest was not looked at.
    Device(&'static str),
}

/// A view into a segment of POSIX shared memory: `CpuShmIPCData`.
///
/// The view is known to end within `segment_bytes`; whether a segment of that name and size
/// exists is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmTensor {
    /// The segment's name as sent, with or without its leading slash; unchecked.
    pub segment: Arc<str>,
    /// Bytes of the segment.
    pub segment_bytes: u64,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Arc<[u64]>,
    /// Elements from one index to the next, per dimension.
    pub strides: Arc<[u64]>,
    /// Elements from the segment's start to the first one.
    pub offset: u64,
}

impl ShmTensor {
    /// Bytes from the segment's start to the end of the last element, 0 without elements;
    /// `None` if they do not fit 64 bits.
    #[must_use]
    pub fn byte_span(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = self.offset;
        for (&dim, &stride) in self.shape.iter().zip(self.strides.iter()) {
            last = last.checked_add(dim.saturating_sub(1).checked_mul(stride)?)?;
        }
        last.checked_add(1)?.checked_mul(self.dtype.item_size())
    }
}

/// `LayoutHints` of LMCache's `gpu_connector/kv_format/types.py`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayoutHints {
    /// The order of a layer's dimensions.
    pub kv_layout: Option<KvLayout>,
    /// KV heads per layer.
    pub num_kv_heads: Option<u64>,
    /// Tokens per paged block.
    pub tokens_per_block: Option<u64>,
    /// How SGLang's list of tensors is organised.
    pub kv_list_layout: Option<KvListLayout>,
    /// Elements per head.
    pub head_dim: Option<u64>,
}

/// Names of a layer's order of dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvLayout {
    /// Tokens of a block outside of heads.
    Nhd,
    /// Heads outside of the tokens of a block.
    Hnd,
    /// Blocks outermost, then layers, heads and tokens.
    Blhnc,
    /// Blocks outermost, then layers, tokens and heads.
    Blnhc,
}

/// Names of SGLang's list organisations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvListLayout {
    /// All keys, then all values.
    KThenV,
    /// Each entry is one tensor of its own.
    Unified,
}

/// `EngineGroupInfo` of LMCache's `multiprocess/group_view.py`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineGroup {
    /// The space of block ids its layers live in.
    pub engine_group_id: i64,
    /// Positions in the list of tensors.
    pub layer_indices: Vec<u64>,
    /// Tokens that one block id stands for; 0 says as many as the tensors show.
    pub tokens_per_block: u64,
    /// Tokens of the sliding window; `None` for full attention.
    pub window_tokens: Option<u64>,
}

/// What is read of a block-id list: one list per group.
pub(crate) type BlockIds = Vec<Vec<i64>>;

/// More dimensions than any layout has.
const MAX_DIMS: usize = 16;

const TENSORS: &str = "kv_cache";
const GROUPS: &str = "engine_group_infos";

pub(crate) fn decode(
    fields: &Fields<'_>,
    frames: &[Bytes; 7],
) -> Result<KvCacheRegistration, DecodeError> {
    let [instance, tensors, model, world_size, engine, hints, groups] = frames;
    let limits = fields.limits;
    Ok(KvCacheRegistration {
        instance_id: fields.instance(instance)?,
        tensors: fields.whole(TENSORS, tensors, |reader| read_tensors(reader, limits))?,
        model_name: fields.string("model_name", model)?,
        world_size: {
            let value = fields.coerced("world_size", world_size)?;
            fields.of("world_size", crate::msgpack::Narrow::narrow(value))?
        },
        engine: fields.whole("engine_type", engine, read_engine)?,
        hints: fields.whole("layout_hints", hints, |reader| read_hints(reader, limits))?,
        groups: fields.whole(GROUPS, groups, |reader| read_groups(reader, limits))?,
    })
}

/// Lists of block ids, one per group: `gpu_block_ids` of `store` and `retrieve`.
pub(crate) fn read_block_ids(
    reader: &mut Reader<'_>,
    limits: &Limits,
) -> Result<BlockIds, FieldProblem> {
    let lists = bounded(reader, limits.max_records, Unit::Records)?;
    let mut left = limits.max_tokens;
    let mut all = Vec::new();
    for _ in 0..lists {
        let count = bounded(reader, left, Unit::Ids)?;
        left -= count;
        let ids: Result<Vec<i64>, _> = (0..count).map(|_| reader.int()).collect();
        all.push(ids?);
    }
    Ok(all)
}

fn bounded(reader: &mut Reader<'_>, limit: usize, unit: Unit) -> Result<usize, FieldProblem> {
    match reader.array_len()? {
        got if got > limit => Err(FieldProblem::TooLarge { got, limit, unit }),
        len => Ok(len),
    }
}

const fn refused<T>(rule: &'static str) -> Result<T, FieldProblem> {
    Err(FieldProblem::Refused { rule })
}

fn required<T>(value: Option<T>, rule: &'static str) -> Result<T, FieldProblem> {
    value.ok_or(FieldProblem::Refused { rule })
}

fn read_tensors(reader: &mut Reader<'_>, limits: &Limits) -> Result<Vec<IpcTensor>, FieldProblem> {
    let count = bounded(reader, limits.max_records, Unit::Records)?;
    // Grown as descriptors arrive: one is much larger than the byte that announces it.
    let mut tensors = Vec::new();
    for _ in 0..count {
        match reader.head()? {
            Value::Ext { code: 1, data } => tensors.push(read_tensor(data, limits)?),
            Value::Ext { .. } => return refused("must hold device handles in extension type 1"),
            other => {
                return Err(FieldProblem::WrongType {
                    expected: "ext",
                    found: other.type_name(),
                });
            }
        }
    }
    Ok(tensors)
}

/// The kinds of memory that LMCache has descriptors for, by their tags.
fn device_tag(tag: &[u8]) -> Option<&'static str> {
    let tags = ["cuda", "cuda_raw", "cuda_vmm", "musa", "npu"];
    tags.into_iter().find(|known| known.as_bytes() == tag)
}

fn read_tensor(data: &[u8], limits: &Limits) -> Result<IpcTensor, FieldProblem> {
    // LMCache before 0.5.6 sent pickles here; a map never starts like one.
    if matches!(data.first(), Some(0x80)) && matches!(data.get(1), Some(2..=5)) {
        return refused(
            "holds a pickled handle, which is never opened: use LMCache 0.5.6 or later",
        );
    }
    match tag_of(Reader::new(data), limits)? {
        Some(b"cpu_shm") => read_shm_tensor(Reader::new(data), limits).map(IpcTensor::Shm),
        Some(tag) => match device_tag(tag) {
            Some(tag) => Ok(IpcTensor::Device(tag)),
            None => refused("holds a handle of a kind that LMCache 0.5.6 does not have"),
        },
        None => refused("holds a handle without its `type`"),
    }
}

fn tag_of<'a>(mut reader: Reader<'a>, limits: &Limits) -> Result<Option<&'a [u8]>, FieldProblem> {
    let mut tag = None;
    for _ in 0..reader.map_len()? {
        let key = reader.key()?;
        match (key, reader.value(limits.depth())?) {
            (b"type", Value::Str(value)) => tag = Some(value),
            (b"type", _) => return refused("holds a handle whose `type` is no text"),
            _ => {}
        }
    }
    reader.finish()?;
    Ok(tag)
}

/// What `TensorMetadata` says.
struct Metadata {
    dtype: Dtype,
    shape: Arc<[u64]>,
    strides: Arc<[u64]>,
    offset: u64,
}

fn read_shm_tensor(mut reader: Reader<'_>, limits: &Limits) -> Result<ShmTensor, FieldProblem> {
    let (mut name, mut nbytes, mut version, mut metadata) = (None, None, None, None);
    for _ in 0..reader.map_len()? {
        match reader.key()? {
            b"type" => reader.skip(limits.depth())?,
            b"shm_name" => name = Some(Arc::from(reader.str(limits.max_string_bytes)?)),
            b"nbytes" => nbytes = Some(reader.int()?),
            b"version" => version = Some(reader.int::<i128>()?),
            b"metadata" => metadata = Some(read_metadata(&mut reader, limits)?),
            _ => return refused("holds a shared-memory handle with an unknown field"),
        }
    }
    if version != Some(1) {
        return refused("holds a shared-memory handle that is not of version 1");
    }
    let incomplete = "holds a shared-memory handle without name, size or metadata";
    let metadata = required(metadata, incomplete)?;
    let tensor = ShmTensor {
        segment: required(name, incomplete)?,
        segment_bytes: required(nbytes, incomplete)?,
        dtype: metadata.dtype,
        shape: metadata.shape,
        strides: metadata.strides,
        offset: metadata.offset,
    };
    match tensor.byte_span() {
        Some(span) if span <= tensor.segment_bytes => Ok(tensor),
        _ => refused("holds a tensor that ends behind its segment"),
    }
}

fn read_metadata(reader: &mut Reader<'_>, limits: &Limits) -> Result<Metadata, FieldProblem> {
    let (mut dtype, mut shape, mut strides, mut offset) = (None, None, None, None);
    let mut has_device = false;
    for _ in 0..reader.map_len()? {
        match reader.key()? {
            b"dtype" => {
                let name = reader.str(limits.max_string_bytes)?;
                // Only canonical names here, unlike where a worker writes them.
                let known = Dtype::parse(name).filter(|dtype| dtype.torch_name() == name);
                dtype = Some(required(
                    known,
                    "holds a tensor of a dtype that torch does not have",
                )?);
            }
            b"shape" => shape = Some(read_sizes(reader)?),
            b"stride" => strides = Some(read_sizes(reader)?),
            b"storage_offset" => offset = Some(reader.int()?),
            b"device_uuid" => {
                reader.str(limits.max_string_bytes)?;
                has_device = true;
            }
            _ => return refused("holds a tensor with an unknown field"),
        }
    }
    let incomplete = "holds a tensor without dtype, shape, stride, offset or device";
    if !has_device {
        return refused(incomplete);
    }
    let metadata = Metadata {
        dtype: required(dtype, incomplete)?,
        shape: required(shape, incomplete)?,
        strides: required(strides, incomplete)?,
        offset: required(offset, incomplete)?,
    };
    if metadata.shape.len() != metadata.strides.len() {
        return refused("holds a tensor with more or fewer strides than dimensions");
    }
    Ok(metadata)
}

fn read_sizes(reader: &mut Reader<'_>) -> Result<Arc<[u64]>, FieldProblem> {
    let count = reader.array_len()?;
    if count > MAX_DIMS {
        return refused("holds a tensor of more than 16 dimensions");
    }
    (0..count).map(|_| reader.int::<u64>()).collect()
}

fn read_engine(reader: &mut Reader<'_>) -> Result<EngineKind, FieldProblem> {
    Ok(match reader.str(64)? {
        "vllm" => EngineKind::Vllm,
        "atom" => EngineKind::Atom,
        "sglang" => EngineKind::Sglang,
        "trtllm" => EngineKind::TrtLlm,
        "mock" => EngineKind::Mock,
        _ => return refused("must be one of vllm, atom, sglang, trtllm and mock"),
    })
}

fn read_hints(reader: &mut Reader<'_>, limits: &Limits) -> Result<LayoutHints, FieldProblem> {
    let mut hints = LayoutHints::default();
    for _ in 0..reader.map_len()? {
        match reader.key()? {
            b"kv_layout" => {
                hints.kv_layout = Some(match reader.str(64)? {
                    "NHD" => KvLayout::Nhd,
                    "HND" => KvLayout::Hnd,
                    "BLHNC" => KvLayout::Blhnc,
                    "BLNHC" => KvLayout::Blnhc,
                    _ => return refused("has a kv_layout that is none of NHD, HND, BLHNC, BLNHC"),
                });
            }
            b"kv_list_layout" => {
                hints.kv_list_layout = Some(match reader.str(64)? {
                    "k_v" => KvListLayout::KThenV,
                    "unified" => KvListLayout::Unified,
                    _ => return refused("has a kv_list_layout that is neither k_v nor unified"),
                });
            }
            b"num_kv_heads" => hints.num_kv_heads = Some(reader.int()?),
            b"tokens_per_block" => hints.tokens_per_block = Some(reader.int()?),
            b"head_dim" => hints.head_dim = Some(reader.int()?),
            _ => reader.skip(limits.depth())?,
        }
    }
    Ok(hints)
}

fn read_groups(reader: &mut Reader<'_>, limits: &Limits) -> Result<Vec<EngineGroup>, FieldProblem> {
    let count = bounded(reader, limits.max_records, Unit::Records)?;
    let mut groups = Vec::new();
    for _ in 0..count {
        groups.push(read_group(reader, limits)?);
    }
    Ok(groups)
}

fn read_group(reader: &mut Reader<'_>, limits: &Limits) -> Result<EngineGroup, FieldProblem> {
    let mut id = None;
    let mut group = EngineGroup {
        engine_group_id: 0,
        layer_indices: Vec::new(),
        tokens_per_block: 0,
        window_tokens: None,
    };
    for _ in 0..reader.map_len()? {
        match reader.key()? {
            b"engine_group_id" => id = Some(reader.int()?),
            b"layer_indices" => {
                let count = bounded(reader, limits.max_records, Unit::Records)?;
                let indices: Result<_, _> = (0..count).map(|_| reader.int()).collect();
                group.layer_indices = indices?;
            }
            b"tokens_per_block" => group.tokens_per_block = reader.int()?,
            b"sw_size_tokens" => {
                group.window_tokens = match reader.int::<i64>()? {
                    -1 => None,
                    tokens => match u64::try_from(tokens) {
                        Ok(tokens) if tokens > 0 => Some(tokens),
                        _ => return refused("has a sw_size_tokens that is neither -1 nor above 0"),
                    },
                };
            }
            // Which of several kinds of objects a group goes into; here there is one.
            b"extra_object_group_tag" => {
                reader.int::<i64>()?;
            }
            b"recurrent_state" => {
                reader.bool()?;
            }
            _ => reader.skip(limits.depth())?,
        }
    }
    group.engine_group_id = id.ok_or(FieldProblem::Missing)?;
    Ok(group)
}
