//! Where the blocks of a registered KV cache lie, and how they become chunks.
//!
//! Engines lay their caches out in a dozen ways, which LMCache tells apart by shape, engine and
//! hints. Follows `gpu_connector/kv_format/` and `kv_layer_groups.py` of LMCache 0.5.6: layers of
//! one shape are a kernel group, and a chunk is the regions of all groups one after the other,
//! each `[K and V, layers, slots, heads * head size]` with the tokens outside of the heads.

use std::{collections::HashMap, sync::Arc};

use super::ENGINE_DRIVEN;
use stockade_wire::{
    Dtype, EngineGroup, EngineKind, IpcTensor, KvCacheRegistration, KvLayout, KvListLayout,
    LayoutHints, ShmTensor,
};

/// How the tensors of a layer are laid out: those of LMCache's `EngineKVFormat` that can be in
/// shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum KvFormat {
    TwoNbBsNhHs,
    TwoNbNhBsHs,
    TwoNbNhOneBsHs,
    NbTwoBsNhHs,
    NbTwoNhBsHs,
    NbBsHs,
    NbBsvBss,
    NbNhBsCs,
    NbBsNhCs,
    NbBsNhHs,
    KvListNbBsNhHs,
    CrossLayerHnd,
}

/// Name, shape and typical user of a format, as `/status` shows them.
struct FormatFacts {
    name: &'static str,
    shape: &'static str,
    backend: &'static str,
    is_mla: bool,
    is_head_major: bool,
    kv_size: u64,
}

impl KvFormat {
    const fn facts(self) -> FormatFacts {
        let (name, shape, backend, is_mla, is_head_major, kv_size) = match self {
            Self::TwoNbBsNhHs => (
                "NL_X_TWO_NB_BS_NH_HS",
                "NL x [2, NB, BS, NH, HS]",
                "vLLM non-MLA flash attention",
                false,
                false,
                2,
            ),
            Self::TwoNbNhBsHs => (
                "NL_X_TWO_NB_NH_BS_HS",
                "NL x [2, NB, NH, BS, HS]",
                "vLLM non-MLA flash attention (HND layout)",
                false,
                true,
                2,
            ),
            Self::TwoNbNhOneBsHs => (
                "NL_X_TWO_NB_NH_ONE_BS_HS",
                "NL x [2, NB, NH, 1, BS, HS]",
                "vLLM-RBLN attention (HND layout)",
                false,
                true,
                2,
            ),
            Self::NbTwoBsNhHs => (
                "NL_X_NB_TWO_BS_NH_HS",
                "NL x [NB, 2, BS, NH, HS]",
                "vLLM non-MLA flash infer",
                false,
                false,
                2,
            ),
            Self::NbTwoNhBsHs => (
                "NL_X_NB_TWO_NH_BS_HS",
                "NL x [NB, 2, NH, BS, HS]",
                "vLLM non-MLA flash infer (HND layout)",
                false,
                true,
                2,
            ),
            Self::NbBsHs => (
                "NL_X_NB_BS_HS",
                "NL x [NB, BS, HS]",
                "vLLM MLA / SGLang MLA (MP)",
                true,
                false,
                1,
            ),
            Self::NbBsvBss => (
                "NL_X_NB_BSV_BSS",
                "NL x [NB, BSxVALS, BSxSCALES]",
                "vLLM MLA",
                true,
                false,
                1,
            ),
            Self::NbNhBsCs => (
                "NL_X_NB_NH_BS_CS",
                "NL x [NB, NH, BS, CS]",
                "vLLM non-MLA blocks-first, fused K/V (HND)",
                false,
                true,
                1,
            ),
            Self::NbBsNhCs => (
                "NL_X_NB_BS_NH_CS",
                "NL x [NB, BS, NH, CS]",
                "vLLM non-MLA blocks-first, fused K/V (NHD)",
                false,
                false,
                1,
            ),
            Self::NbBsNhHs => (
                "NL_X_NB_BS_NH_HS",
                "NL x [NB, BS, NH, HS]",
                "SGLang unified MP independent components",
                false,
                false,
                1,
            ),
            Self::KvListNbBsNhHs => (
                "TWO_X_NL_X_NB_BS_NH_HS",
                "2 x NL x [NB, BS, NH, HS]",
                "SGLang MHA via MP daemon (4-D inner)",
                false,
                false,
                2,
            ),
            Self::CrossLayerHnd => (
                "NB_NL_TWO_NH_BS_HS",
                "[NB, NL, 2, NH, BS, HS]",
                "TRT-LLM cross-layer (HND layout)",
                false,
                true,
                2,
            ),
        };
        FormatFacts {
            name,
            shape,
            backend,
            is_mla,
            is_head_major,
            kv_size,
        }
    }
}

/// All blocks of K or V (or both) of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plane {
    /// Index into [`PagedLayout::segments`].
    pub(super) segment: usize,
    /// First byte of block 0.
    pub(super) start: u64,
    /// Bytes from one block to the next.
    pub(super) stride: u64,
    /// Blocks there are.
    pub(super) blocks: u64,
}

/// Layers that share block ids and a shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KernelGroup {
    format: KvFormat,
    engine_group: i64,
    layers: Vec<usize>,
    pub(super) dtype: Dtype,
    heads: u64,
    head_elements: u64,
    /// Slots of one block.
    slots_per_block: u64,
    tokens_per_block: u64,
    /// K of all layers, then V of all layers; or one per layer.
    pub(super) planes: Vec<Plane>,
    /// First byte of its region in a chunk.
    pub(super) region: usize,
    /// Bytes of its region.
    region_bytes: usize,
    /// Blocks that a chunk's tokens take.
    pub(super) blocks_per_chunk: usize,
    /// The last so many of them are kept, at the front of the region; fewer with a window that
    /// is shorter than a chunk.
    pub(super) kept_blocks: usize,
}

impl KernelGroup {
    /// Bytes of one head of one token.
    pub(super) fn head_bytes(&self) -> usize {
        (self.head_elements * self.dtype.item_size()) as usize
    }

    /// Heads outside of the tokens of a block, if they are: how many, and tokens in a block.
    pub(super) fn head_major(&self) -> Option<(usize, usize)> {
        let is_head_major =
            self.format.facts().is_head_major && self.heads > 1 && self.slots_per_block > 1;
        is_head_major.then_some((self.heads as usize, self.slots_per_block as usize))
    }

    /// Tokens that one block stands for.
    pub(super) fn tokens_per_block(&self) -> u64 {
        self.tokens_per_block
    }

    /// Bytes of one block of one plane.
    pub(super) fn block_bytes(&self) -> usize {
        (self.slots_per_block * self.heads) as usize * self.head_bytes()
    }

    /// Bytes of the region that are copied.
    pub(super) fn copied_bytes(&self) -> usize {
        self.planes.len() * self.kept_blocks * self.block_bytes()
    }

    fn shape(&self) -> Vec<u64> {
        let slots = self.blocks_per_chunk as u64 * self.slots_per_block;
        let (kv, layers) = (self.format.facts().kv_size, self.layers.len() as u64);
        let hidden = self.heads * self.head_elements;
        if kv == 1 {
            vec![layers, slots, hidden]
        } else {
            vec![kv, layers, slots, hidden]
        }
    }
}

/// A registered KV cache: its segments, and how blocks of them become chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PagedLayout {
    /// Names and sizes.
    pub(super) segments: Vec<(Arc<str>, u64)>,
    pub(super) groups: Vec<KernelGroup>,
    /// Bytes of a chunk.
    pub(super) chunk_bytes: usize,
}

/// One tensor with its dimensions in the order of memory, all but the first one tight.
#[derive(Debug, Clone, PartialEq, Eq)]
struct View {
    segment: usize,
    dtype: Dtype,
    dims: Vec<u64>,
    /// Elements from one index of the first dimension to the next.
    outer_stride: u64,
    /// First byte.
    start: u64,
}

impl PagedLayout {
    /// Finds out the layout of a registration for chunks of `chunk_tokens`.
    ///
    /// # Errors
    /// A sentence that says what is not served, and the way out.
    pub(super) fn of(
        registration: &KvCacheRegistration,
        chunk_tokens: usize,
    ) -> Result<Self, String> {
        let mut segments: Vec<(Arc<str>, u64)> = Vec::new();
        let mut indices: HashMap<Arc<str>, usize> = HashMap::new();
        let mut views = Vec::new();
        for (position, tensor) in registration.tensors.iter().enumerate() {
            let tensor = match tensor {
                IpcTensor::Shm(tensor) => tensor,
                IpcTensor::Device(kind) => {
                    return Err(format!(
                        "kv_cache holds a `{kind}` handle, and this server has no device runtime: {ENGINE_DRIVEN}"
                    ));
                }
            };
            let segment = *indices
                .entry(Arc::clone(&tensor.segment))
                .or_insert_with(|| {
                    segments.push((Arc::clone(&tensor.segment), tensor.segment_bytes));
                    segments.len() - 1
                });
            let known = segments.get_mut(segment).map(|(_, bytes)| bytes);
            if let Some(known) = known {
                *known = (*known).max(tensor.segment_bytes);
            }
            views.push(View::of(tensor, segment).map_err(|problem| {
                format!(
                    "kv_cache: tensor {position} of shape {:?} and strides {:?} {problem}: {ENGINE_DRIVEN}",
                    tensor.shape, tensor.strides
                )
            })?);
        }
        if views.is_empty() {
            return Err("kv_cache is empty: register at least one tensor".to_owned());
        }
        let mut groups = kernel_groups(registration, views)?;
        let chunk_bytes = place(&mut groups, &registration.groups, chunk_tokens)?;
        Ok(Self {
            segments,
            groups,
            chunk_bytes,
        })
    }

    /// Shape and dtype of each group's region, and how many blocks of a chunk it keeps if those
    /// are not all.
    pub(super) fn parts(&self) -> impl Iterator<Item = (Vec<u64>, Dtype, Option<usize>)> {
        self.groups.iter().map(|group| {
            let kept = (group.kept_blocks < group.blocks_per_chunk).then_some(group.kept_blocks);
            (group.shape(), group.dtype, kept)
        })
    }

    /// Slots of a block of the first group, and whether it is MLA.
    pub(super) fn first_block(&self) -> (u64, bool) {
        self.groups.first().map_or((0, false), |group| {
            (group.slots_per_block, group.format.facts().is_mla)
        })
    }

    /// The layout as LMCache's `/status` has it (`report_status` in `base/cache_context.py`).
    pub(super) fn report(&self) -> serde_json::Value {
        let bytes_per_token = self.groups.iter().map(|group| {
            let slot = group.planes.len() as u64
                * group.heads
                * group.head_elements
                * group.dtype.item_size();
            slot * group.slots_per_block / group.tokens_per_block
        });
        let blocks = |group: &KernelGroup| group.planes.first().map_or(0, |plane| plane.blocks);
        let layers: usize = self.groups.iter().map(|group| group.layers.len()).sum();
        let groups = self.groups.iter().enumerate().map(|(index, group)| {
            let facts = group.format.facts();
            let mut concrete = facts.shape.to_owned();
            for (name, size) in [
                ("NB", blocks(group)),
                ("NL", group.layers.len() as u64),
                ("BSxVALS", group.slots_per_block),
                ("BSxSCALES", group.slots_per_block),
                ("BS", group.slots_per_block),
                ("NH", group.heads),
                ("HS", group.head_elements),
                ("CS", group.head_elements),
            ] {
                concrete = concrete.replace(name, &size.to_string());
            }
            serde_json::json!({
                "kernel_group_idx": index,
                "engine_group_idx": group.engine_group,
                "object_group_idx": 0,
                "num_layers": group.layers.len(),
                "layer_indices": group.layers,
                "tokens_per_block": group.tokens_per_block,
                "slots_per_block": group.slots_per_block,
                "dtype": format!("torch.{}", group.dtype),
                "engine_kv_concrete_shape": concrete,
                "is_mla": facts.is_mla,
                "engine_kv_format": facts.name,
                "engine_kv_shape": facts.shape,
                "attention_backend": facts.backend,
            })
        });
        serde_json::json!({
            "num_layers": layers,
            "num_blocks": self.groups.first().map_or(0, blocks),
            "cache_size_per_token": bytes_per_token.sum::<u64>(),
            "kernel_groups": groups.collect::<Vec<_>>(),
        })
    }
}

impl View {
    /// Puts the dimensions in the order of memory, as `kv_format/contiguity.py` does.
    fn of(tensor: &ShmTensor, segment: usize) -> Result<Self, &'static str> {
        if tensor.shape.is_empty() || tensor.shape.contains(&0) {
            return Err("has no elements");
        }
        let mut axes: Vec<(u64, u64)> = tensor
            .shape
            .iter()
            .copied()
            .zip(tensor.strides.iter().copied())
            .collect();
        // Of dimensions with one stride, that of size 1 goes inside.
        axes.sort_by_key(|&(size, stride)| std::cmp::Reverse((stride, size != 1)));
        let mut tight = 1_u64;
        for &(size, stride) in axes.iter().skip(1).rev() {
            if size != 1 && stride != tight {
                return Err("is padded inside of a block");
            }
            tight = tight.checked_mul(size).ok_or("is too large")?;
        }
        let &(outer, stride) = axes.first().ok_or("has no elements")?;
        let outer_stride = if outer == 1 { tight } else { stride };
        if outer_stride < tight {
            return Err("has blocks that overlap");
        }
        let start = tensor.offset.checked_mul(tensor.dtype.item_size());
        Ok(Self {
            segment,
            dtype: tensor.dtype,
            dims: axes.iter().map(|&(size, _)| size).collect(),
            outer_stride,
            start: start.ok_or("is too large")?,
        })
    }

    fn is_tight(&self) -> bool {
        self.dims.iter().skip(1).product::<u64>() == self.outer_stride
    }

    /// A plane of blocks along dimension `axis`, at index `at` of the dimensions before it.
    fn plane(&self, axis: usize, before: u64) -> Option<Plane> {
        let inner = |from: usize| self.dims.iter().skip(from).product::<u64>();
        let item = self.dtype.item_size();
        let stride = if axis == 0 {
            self.outer_stride
        } else {
            inner(axis + 1)
        };
        Some(Plane {
            segment: self.segment,
            start: self.start + before * item,
            stride: stride * item,
            blocks: *self.dims.get(axis)?,
        })
    }
}

/// The geometry of one layer: heads, elements per head, slots per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Geometry {
    heads: u64,
    head_elements: u64,
    slots_per_block: u64,
}

/// A layer with its planes: one, or K and V.
#[derive(Debug)]
struct Layer {
    format: KvFormat,
    geometry: Geometry,
    dtype: Dtype,
    planes: Vec<Plane>,
}

fn unsupported(engine: EngineKind, dims: &[u64]) -> String {
    format!(
        "kv_cache: tensors of shape {dims:?} are no layout of {engine:?} that is known: {ENGINE_DRIVEN}"
    )
}

/// The layers of a registration, in order.
fn layers(registration: &KvCacheRegistration, views: Vec<View>) -> Result<Vec<Layer>, String> {
    let (engine, hints) = (registration.engine, &registration.hints);
    match engine {
        EngineKind::TrtLlm => cross_layers(hints, &views),
        EngineKind::Sglang if hints.kv_list_layout == Some(KvListLayout::KThenV) => {
            key_and_value_lists(hints, views)
        }
        _ => views
            .into_iter()
            .map(|view| {
                let (format, view) = match engine {
                    EngineKind::Vllm => vllm(hints, view),
                    EngineKind::Sglang => sglang(hints, view)?,
                    EngineKind::Atom if view.dims.len() == 3 => (Some(KvFormat::NbBsHs), view),
                    _ => (None, view),
                };
                let format = format.ok_or_else(|| unsupported(engine, &view.dims))?;
                layer(format, &view).ok_or_else(|| unsupported(engine, &view.dims))
            })
            .collect(),
    }
}

/// `detectors/vllm.py`. Without a hint the heads are outside, as the CPU backend allocates.
fn vllm(hints: &LayoutHints, mut view: View) -> (Option<KvFormat>, View) {
    let is_hnd = !matches!(hints.kv_layout, Some(KvLayout::Nhd | KvLayout::Blnhc));
    let is_indexer = view.dtype == Dtype::UInt8 && view.dims.last() == Some(&132);
    let format = match (view.dims.as_slice(), is_hnd) {
        ([_, 1, _, _], true) if is_indexer => {
            view.dims.remove(1);
            Some(KvFormat::NbBsvBss)
        }
        ([_, _, 1, _], false) if is_indexer => {
            view.dims.remove(2);
            Some(KvFormat::NbBsvBss)
        }
        ([_, _, _, _], true) => Some(KvFormat::NbNhBsCs),
        ([_, _, _, _], false) => Some(KvFormat::NbBsNhCs),
        ([2, _, _, 1, _, _], _) => Some(KvFormat::TwoNbNhOneBsHs),
        ([2, _, _, _, _], true) => Some(KvFormat::TwoNbNhBsHs),
        ([2, _, _, _, _], false) => Some(KvFormat::TwoNbBsNhHs),
        ([_, 2, _, _, _], true) => Some(KvFormat::NbTwoNhBsHs),
        ([_, 2, _, _, _], false) => Some(KvFormat::NbTwoBsNhHs),
        ([_, _, _], _) if is_indexer => Some(KvFormat::NbBsvBss),
        ([_, _, _], _) => Some(KvFormat::NbBsHs),
        _ => None,
    };
    (format, view)
}

/// `detectors/sglang.py`, but for its lists of keys and values.
fn sglang(hints: &LayoutHints, view: View) -> Result<(Option<KvFormat>, View), String> {
    if hints.kv_list_layout == Some(KvListLayout::Unified) {
        let format = match view.dims.len() {
            3 => Some(KvFormat::NbBsHs),
            4 => Some(KvFormat::NbBsNhHs),
            _ => None,
        };
        return Ok((format, view));
    }
    let tokens = tokens_per_block(hints)?;
    match *view.dims.as_slice() {
        [_, 1, width] => {
            let mut view = split_blocks(view, tokens)?;
            let blocks = view.dims.first().copied().unwrap_or_default();
            view.dims = vec![blocks, tokens, width];
            Ok((Some(KvFormat::NbBsHs), view))
        }
        [_, _, _] => Ok((Some(KvFormat::NbBsHs), view)),
        _ => Ok((None, view)),
    }
}

fn tokens_per_block(hints: &LayoutHints) -> Result<u64, String> {
    hints
        .tokens_per_block
        .filter(|&tokens| tokens > 0)
        .ok_or_else(|| "layout_hints: tokens_per_block is missing, and SGLang's tensors do not show it: send it".to_owned())
}

/// `[slots, ...]` as `[blocks, slots per block, ...]`.
fn split_blocks(mut view: View, tokens: u64) -> Result<View, String> {
    let slots = view.dims.first().copied().unwrap_or_default();
    if slots % tokens != 0 || !view.is_tight() {
        return Err(format!(
            "kv_cache: {slots} slots are no whole number of blocks of tokens_per_block {tokens}"
        ));
    }
    if let Some(first) = view.dims.first_mut() {
        *first = slots / tokens;
    }
    view.dims.insert(1, tokens);
    view.outer_stride *= tokens;
    Ok(view)
}

/// SGLang's keys of all layers, then its values of all layers.
fn key_and_value_lists(hints: &LayoutHints, views: Vec<View>) -> Result<Vec<Layer>, String> {
    let tokens = tokens_per_block(hints)?;
    let first = views.first().map(|view| view.dims.clone());
    let first = first.unwrap_or_default();
    let is_uniform = views.iter().all(|view| view.dims == first);
    if first.len() != 3 || !views.len().is_multiple_of(2) || !is_uniform {
        return Err(
            "kv_cache: kv_list_layout k_v needs as many keys as values, all of one shape of three dimensions".to_owned(),
        );
    }
    let views: Vec<View> = views
        .into_iter()
        .map(|view| split_blocks(view, tokens))
        .collect::<Result<_, _>>()?;
    let (keys, values) = views.split_at(views.len() / 2);
    keys.iter()
        .zip(values)
        .map(|(key, value)| {
            let format = KvFormat::KvListNbBsNhHs;
            let mut layer =
                layer(format, key).ok_or_else(|| unsupported(EngineKind::Sglang, &key.dims))?;
            if value.dtype != key.dtype {
                return Err("kv_cache: keys and values have different dtypes".to_owned());
            }
            layer.planes.extend(value.plane(0, 0));
            Ok(layer)
        })
        .collect()
}

/// More layers than any model has.
const MAX_POOL_LAYERS: u64 = 4096;

/// TensorRT-LLM's one pool for all layers (`detectors/trtllm.py`).
fn cross_layers(hints: &LayoutHints, views: &[View]) -> Result<Vec<Layer>, String> {
    let dims = |view: &View| view.dims.clone();
    let shown = || {
        unsupported(
            EngineKind::TrtLlm,
            &views.first().map(dims).unwrap_or_default(),
        )
    };
    let [view] = views else {
        return Err(shown());
    };
    let mut view = view.clone();
    if let &[blocks, layers, kv, flat] = view.dims.as_slice() {
        let (Some(heads), Some(tokens), Some(width)) =
            (hints.num_kv_heads, hints.tokens_per_block, hints.head_dim)
        else {
            return Err("layout_hints: num_kv_heads, tokens_per_block and head_dim are needed for TensorRT-LLM's pool".to_owned());
        };
        let product = heads
            .checked_mul(tokens)
            .and_then(|it| it.checked_mul(width));
        if product != Some(flat) {
            return Err(format!(
                "layout_hints: {heads} heads of {tokens} tokens of {width} elements are not the {flat} that kv_cache has"
            ));
        }
        view.dims = vec![blocks, layers, kv, heads, tokens, width];
    }
    let &[_, layers, 2, heads, tokens, width] = view.dims.as_slice() else {
        return Err(shown());
    };
    // The number is the engine's word, and each layer takes memory here.
    if layers > MAX_POOL_LAYERS {
        return Err(format!(
            "kv_cache: a pool of {layers} layers is not served, {MAX_POOL_LAYERS} are"
        ));
    }
    let plane = heads * tokens * width;
    (0..layers)
        .map(|layer| {
            let planes = [layer * 2, layer * 2 + 1].map(|at| view.plane(0, at * plane));
            Some(Layer {
                format: KvFormat::CrossLayerHnd,
                geometry: Geometry {
                    heads,
                    head_elements: width,
                    slots_per_block: tokens,
                },
                dtype: view.dtype,
                planes: planes.into_iter().collect::<Option<_>>()?,
            })
        })
        .collect::<Option<_>>()
        .ok_or_else(shown)
}

/// A layer that is one tensor.
fn layer(format: KvFormat, view: &View) -> Option<Layer> {
    let dims = view.dims.as_slice();
    let (heads, head_elements, slots_per_block) = match (format, dims) {
        (KvFormat::TwoNbBsNhHs | KvFormat::NbTwoBsNhHs, &[_, _, slots, heads, width])
        | (KvFormat::TwoNbNhBsHs | KvFormat::NbTwoNhBsHs, &[_, _, heads, slots, width])
        | (KvFormat::TwoNbNhOneBsHs, &[_, _, heads, _, slots, width])
        | (KvFormat::NbNhBsCs, &[_, heads, slots, width])
        | (
            KvFormat::NbBsNhCs | KvFormat::NbBsNhHs | KvFormat::KvListNbBsNhHs,
            &[_, slots, heads, width],
        ) => (heads, width, slots),
        (KvFormat::NbBsHs | KvFormat::NbBsvBss, &[_, slots, width]) => (1, width, slots),
        _ => return None,
    };
    let inner = |from: usize| dims.iter().skip(from).product::<u64>();
    let planes = match format {
        // K and V are whole planes; padding would be between the two, which nobody does.
        KvFormat::TwoNbBsNhHs | KvFormat::TwoNbNhBsHs | KvFormat::TwoNbNhOneBsHs => {
            if !view.is_tight() {
                return None;
            }
            vec![view.plane(1, 0)?, view.plane(1, inner(1))?]
        }
        KvFormat::NbTwoBsNhHs | KvFormat::NbTwoNhBsHs => {
            vec![view.plane(0, 0)?, view.plane(0, inner(2))?]
        }
        _ => vec![view.plane(0, 0)?],
    };
    Some(Layer {
        format,
        geometry: Geometry {
            heads,
            head_elements,
            slots_per_block,
        },
        dtype: view.dtype,
        planes,
    })
}

/// Gathers layers of one shape (`group_layers_by_identity` in `kv_layer_groups.py`).
fn kernel_groups(
    registration: &KvCacheRegistration,
    views: Vec<View>,
) -> Result<Vec<KernelGroup>, String> {
    let layers = layers(registration, views)?;
    let mut engine_group: Vec<Option<i64>> = Vec::new();
    // A layer that no group names shares the blocks of another one, and is left out.
    engine_group.resize(layers.len(), registration.groups.is_empty().then_some(0));
    for group in &registration.groups {
        for &index in &group.layer_indices {
            let place = usize::try_from(index)
                .ok()
                .and_then(|index| engine_group.get_mut(index));
            *place.ok_or_else(|| {
                format!("engine_group_infos names layer {index} of {}", layers.len())
            })? = Some(group.engine_group_id);
        }
    }
    let mut groups: Vec<KernelGroup> = Vec::new();
    let mut by_identity = HashMap::new();
    for (index, (layer, engine_group)) in layers.into_iter().zip(engine_group).enumerate() {
        let Some(engine_group) = engine_group else {
            continue;
        };
        let identity = (layer.format, layer.geometry, layer.dtype, engine_group);
        let group = *by_identity.entry(identity).or_insert_with(|| {
            groups.push(KernelGroup {
                format: layer.format,
                engine_group,
                layers: Vec::new(),
                dtype: layer.dtype,
                heads: layer.geometry.heads,
                head_elements: layer.geometry.head_elements,
                slots_per_block: layer.geometry.slots_per_block,
                tokens_per_block: layer.geometry.slots_per_block,
                planes: Vec::new(),
                region: 0,
                region_bytes: 0,
                blocks_per_chunk: 0,
                kept_blocks: 0,
            });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(group) {
            group.layers.push(index);
            group.planes.extend(layer.planes);
        }
    }
    for group in &mut groups {
        // Gathered layer by layer; a chunk has K of all layers before V.
        if group.format.facts().kv_size == 2 {
            let (keys, values): (Vec<_>, Vec<_>) = group
                .planes
                .drain(..)
                .enumerate()
                .partition(|(index, _)| index % 2 == 0);
            let planes = keys.into_iter().chain(values);
            group.planes = planes.map(|(_, plane)| plane).collect();
        }
    }
    Ok(groups)
}

/// Gives each group its blocks per chunk and its region; returns the bytes of a chunk.
fn place(
    groups: &mut [KernelGroup],
    infos: &[EngineGroup],
    chunk_tokens: usize,
) -> Result<usize, String> {
    if !infos.is_empty() && infos.len() != groups.len() {
        return Err(format!(
            "engine_group_infos has {} groups, but the tensors of kv_cache make {}",
            infos.len(),
            groups.len()
        ));
    }
    let chunk = chunk_tokens as u64;
    let mut end = 0_usize;
    for (index, group) in groups.iter_mut().enumerate() {
        let info = infos.get(index);
        if let Some(info) = info {
            let named = info.layer_indices.iter().map(|&layer| layer as usize);
            if !named.eq(group.layers.iter().copied()) {
                return Err(format!(
                    "engine_group_infos: group {index} names layers {:?}, but the tensors of kv_cache make it {:?}",
                    info.layer_indices, group.layers
                ));
            }
        }
        let slots = group.slots_per_block;
        let tokens = info
            .map(|info| info.tokens_per_block)
            .filter(|&tokens| tokens > 0)
            .unwrap_or(slots);
        if !tokens.is_multiple_of(slots) || !chunk.is_multiple_of(tokens) {
            return Err(format!(
                "group {index} of kv_cache has blocks of {tokens} tokens in {slots} slots: chunks of {chunk} tokens must be whole blocks, and blocks whole slots; set --chunk-size to a multiple"
            ));
        }
        let window = info
            .and_then(|info| info.window_tokens)
            .filter(|&window| window < chunk)
            .unwrap_or(chunk);
        if window % tokens != 0 {
            return Err(format!(
                "engine_group_infos: group {index} has a window of {window} tokens, which is no whole number of blocks of {tokens}"
            ));
        }
        group.tokens_per_block = tokens;
        let too_large = || format!("group {index} of kv_cache makes chunks that are too large");
        let blocks = |tokens_covered: u64| usize::try_from(tokens_covered / tokens).ok();
        group.blocks_per_chunk = blocks(chunk).ok_or_else(too_large)?;
        group.kept_blocks = blocks(window).ok_or_else(too_large)?;
        let bytes = group.dtype.byte_len(&group.shape());
        group.region = end;
        group.region_bytes = bytes
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(too_large)?;
        end = end.checked_add(group.region_bytes).ok_or_else(too_large)?;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use proptest::prelude::*;
    use stockade_wire::InstanceId;

    use super::*;

    fn registration(
        engine: EngineKind,
        hints: LayoutHints,
        tensors: Vec<ShmTensor>,
    ) -> KvCacheRegistration {
        KvCacheRegistration {
            instance_id: InstanceId(1),
            tensors: tensors.into_iter().map(IpcTensor::Shm).collect(),
            model_name: "m".into(),
            world_size: 1,
            engine,
            hints,
            groups: Vec::new(),
        }
    }

    fn dense(shape: &[u64]) -> ShmTensor {
        let strides = (0..shape.len()).map(|at| shape.iter().skip(at + 1).product());
        ShmTensor {
            segment: "s".into(),
            segment_bytes: 1 << 40,
            dtype: Dtype::BFloat16,
            shape: shape.into(),
            strides: strides.collect(),
            offset: 0,
        }
    }

    #[test]
    fn a_pool_that_claims_a_trillion_layers_takes_no_memory() {
        let hints = LayoutHints {
            num_kv_heads: Some(1),
            tokens_per_block: Some(1),
            head_dim: Some(1),
            ..LayoutHints::default()
        };
        let mut tensor = dense(&[1, 1 << 40, 2, 1]);
        tensor.segment_bytes = u64::MAX;
        let error = PagedLayout::of(&registration(EngineKind::TrtLlm, hints, vec![tensor]), 256);
        assert!(error.unwrap_err().contains("4096"));
    }

    #[test]
    fn a_permuted_view_is_the_layout_of_its_memory() {
        // Heads outside in memory, shown as if tokens were.
        let mut shown = dense(&[2, 4, 2, 16, 8]);
        shown.shape = [2, 4, 16, 2, 8].into();
        shown.strides = [1024, 256, 8, 128, 1].into();
        let of = |tensor: &ShmTensor| {
            let hints = LayoutHints::default();
            PagedLayout::of(
                &registration(EngineKind::Vllm, hints, vec![tensor.clone()]),
                64,
            )
        };
        assert_eq!(of(&shown).unwrap(), of(&dense(&[2, 4, 2, 16, 8])).unwrap());
        // Padding is fine between blocks, not inside of them or between K and V.
        let mut padded = dense(&[4, 16, 24]);
        padded.strides = [1000, 24, 1].into();
        let group = of(&padded).unwrap().groups.remove(0);
        assert_eq!(group.planes.first().unwrap().stride, 2000);
        padded.strides = [1000, 25, 1].into();
        assert!(of(&padded).unwrap_err().contains("padded inside"));
        padded.strides = [100, 24, 1].into();
        assert!(of(&padded).unwrap_err().contains("overlap"));
        let mut padded = dense(&[2, 4, 2, 16, 8]);
        padded.strides = [2000, 256, 128, 8, 1].into();
        assert!(of(&padded).unwrap_err().contains("no layout"));
    }

    /// Sizes as engines have them, and as nobody has them.
    fn size() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 1..9_u64, 1 => Just(16), 1 => Just(132), 1 => any::<u64>()]
    }

    fn any_tensor() -> impl Strategy<Value = ShmTensor> {
        let dims = prop::collection::vec(size(), 1..8);
        (
            dims,
            any::<u64>(),
            any::<prop::sample::Index>(),
            any::<bool>(),
            0..64_u64,
        )
            .prop_map(|(shape, noise, at, is_dense, offset)| {
                let mut strides = Vec::new();
                let mut tight = 1_u64;
                for &size in shape.iter().rev() {
                    strides.insert(0, tight);
                    tight = tight.saturating_mul(size);
                }
                let at = at.index(strides.len());
                if !is_dense && let Some(stride) = strides.get_mut(at) {
                    *stride = noise;
                }
                let dtype = if noise % 2 == 0 {
                    Dtype::UInt8
                } else {
                    Dtype::Float32
                };
                ShmTensor {
                    segment: if noise % 3 == 0 { "a" } else { "b" }.into(),
                    segment_bytes: 0,
                    dtype,
                    shape: shape.into(),
                    strides: strides.into(),
                    offset,
                }
            })
    }

    fn any_hints() -> impl Strategy<Value = LayoutHints> {
        let layouts = [
            KvLayout::Nhd,
            KvLayout::Hnd,
            KvLayout::Blhnc,
            KvLayout::Blnhc,
        ];
        let lists = [KvListLayout::KThenV, KvListLayout::Unified];
        (
            prop::option::of(prop::sample::select(layouts.to_vec())),
            prop::option::of(prop::sample::select(lists.to_vec())),
            prop::option::of(size()),
            prop::option::of(size()),
            prop::option::of(size()),
        )
            .prop_map(
                |(kv_layout, kv_list_layout, heads, tokens, width)| LayoutHints {
                    kv_layout,
                    num_kv_heads: heads,
                    tokens_per_block: tokens,
                    kv_list_layout,
                    head_dim: width,
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Whatever an engine says, no block lies outside of the segment that it named.
        #[test]
        fn blocks_lie_within_their_segments(
            engine in prop::sample::select(vec![
                EngineKind::Vllm, EngineKind::Atom, EngineKind::Sglang, EngineKind::TrtLlm, EngineKind::Mock,
            ]),
            hints in any_hints(),
            tensor in any_tensor(),
            copies in 1..5_usize,
            groups in prop::collection::vec(
                (0..3_i64, prop::collection::vec(0..6_u64, 0..4), size(), prop::option::of(size())), 0..3),
            chunk in prop_oneof![Just(16_usize), Just(256)],
        ) {
            let Some(span) = tensor.byte_span() else { return Ok(()) };
            let tensor = ShmTensor { segment_bytes: span, ..tensor };
            let mut registration = registration(engine, hints, vec![tensor; copies]);
            registration.groups = groups
                .into_iter()
                .map(|(engine_group_id, layer_indices, tokens_per_block, window_tokens)| EngineGroup {
                    engine_group_id, layer_indices, tokens_per_block, window_tokens,
                })
                .collect();
            let Ok(layout) = PagedLayout::of(&registration, chunk) else { return Ok(()) };
            let mut end = 0;
            for group in &layout.groups {
                for plane in &group.planes {
                    let last = (plane.blocks - 1) * plane.stride;
                    let behind = plane.start + last + group.block_bytes() as u64;
                    prop_assert!(behind <= span, "{:?} in {}", plane, span);
                }
                prop_assert_eq!(group.region, end);
                prop_assert!(group.copied_bytes() <= group.region_bytes);
                end += group.region_bytes;
            }
            prop_assert_eq!(layout.chunk_bytes, end);
            layout.report();
        }
    }
}
