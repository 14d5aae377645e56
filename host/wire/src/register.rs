//! What an engine says about its KV layout when it registers.

use std::sync::Arc;

use bytes::Bytes;

use crate::dtype::Dtype;
use crate::error::{DecodeError, FieldProblem};
use crate::msgpack::Reader;
use crate::request::{Fields, InstanceId};

/// `RegisterEngineDrivenContextPayload` of LMCache's `custom_types.py`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterContext {
    /// The worker, usually by its process id.
    pub instance_id: InstanceId,
    /// The model it serves.
    pub model_name: Arc<str>,
    /// Ranks that share the model.
    pub world_size: u32,
    /// Tokens per paged block.
    pub block_size: u32,
    /// Layers of the model.
    pub num_layers: u32,
    /// Elements per token and layer, of K or V alone; of both together with MLA.
    pub hidden_dim_size: u32,
    /// Element type of the KV cache.
    pub dtype: Dtype,
    /// Whether K and V are one latent tensor.
    pub use_mla: bool,
    /// KV slots gathered into one chunk, at least 1; `None` from older clients means one
    /// per token.
    pub num_physical_slots: Option<u32>,
}

impl RegisterContext {
    /// The shape of one chunk: `[2, layers, slots, hidden]`, with MLA `[layers, slots, hidden]`.
    ///
    /// `chunk_size` is tokens per chunk and counts where the client names no slots.
    #[must_use]
    pub fn shape(&self, chunk_size: u32) -> Vec<u64> {
        let layers = u64::from(self.num_layers);
        let slots = u64::from(self.num_physical_slots.unwrap_or(chunk_size));
        let hidden = u64::from(self.hidden_dim_size);
        if self.use_mla {
            vec![layers, slots, hidden]
        } else {
            vec![2, layers, slots, hidden]
        }
    }

    /// Bytes of one chunk; `None` if the product does not fit 64 bits.
    #[must_use]
    pub fn chunk_bytes(&self, chunk_size: u32) -> Option<u64> {
        self.dtype.byte_len(&self.shape(chunk_size))
    }
}

pub(crate) fn decode(fields: &Fields<'_>, frame: &Bytes) -> Result<RegisterContext, DecodeError> {
    let limits = fields.limits;
    let mut reader = Reader::new(frame);
    let mut instance_id = None;
    let mut model_name = None;
    let mut world_size = None;
    let mut block_size = None;
    let mut num_layers = None;
    let mut hidden_dim_size = None;
    let mut dtype = None;
    let mut use_mla = None;
    let mut num_physical_slots = None;
    for _ in 0..fields.of("payload", reader.map_len())? {
        match fields.of("payload", reader.key())? {
            b"instance_id" => {
                instance_id = Some(InstanceId(fields.of("payload.instance_id", reader.int())?));
            }
            b"model_name" => {
                let name = reader.str(limits.max_string_bytes);
                model_name = Some(fields.of("payload.model_name", name)?.into());
            }
            b"world_size" => world_size = Some(fields.of("payload.world_size", reader.int())?),
            b"block_size" => block_size = Some(fields.of("payload.block_size", reader.int())?),
            b"num_layers" => num_layers = Some(fields.of("payload.num_layers", reader.int())?),
            b"hidden_dim_size" => {
                hidden_dim_size = Some(fields.of("payload.hidden_dim_size", reader.int())?);
            }
            b"dtype_str" => {
                let name = reader.str(limits.max_string_bytes);
                let name = fields.of("payload.dtype_str", name)?;
                let parsed = Dtype::parse(name).ok_or(FieldProblem::Refused {
                    rule: "must be a dtype attribute of torch, for example float16 or bfloat16",
                });
                dtype = Some(fields.of("payload.dtype_str", parsed)?);
            }
            b"use_mla" => use_mla = Some(fields.of("payload.use_mla", reader.bool())?),
            b"num_physical_slots" => {
                num_physical_slots = fields.of("payload.num_physical_slots", slots(&mut reader))?;
            }
            _ => fields.of("payload", reader.skip(limits.depth()))?,
        }
    }
    fields.of("payload", reader.finish())?;
    Ok(RegisterContext {
        instance_id: fields.required("payload.instance_id", instance_id)?,
        model_name: fields.required("payload.model_name", model_name)?,
        world_size: fields.required("payload.world_size", world_size)?,
        block_size: fields.required("payload.block_size", block_size)?,
        num_layers: fields.required("payload.num_layers", num_layers)?,
        hidden_dim_size: fields.required("payload.hidden_dim_size", hidden_dim_size)?,
        dtype: fields.required("payload.dtype_str", dtype)?,
        use_mla: fields.required("payload.use_mla", use_mla)?,
        num_physical_slots,
    })
}

fn slots(reader: &mut Reader<'_>) -> Result<Option<u32>, FieldProblem> {
    let slots = reader.int_or_nil::<u32>()?;
    if slots == Some(0) {
        return Err(FieldProblem::OutOfRange {
            value: 0,
            lowest: 1,
            highest: u32::MAX.into(),
        });
    }
    Ok(slots)
}
