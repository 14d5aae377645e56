//! Blocks of an engine to chunks and back, as LMCache's `torch_ops/mp_mem_kernels.py` moves them.

use super::{
    layout::{KernelGroup, PagedLayout},
    segment::{Segment, SegmentError},
};

/// Why a chunk was not copied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum CopyError {
    #[error("block_ids: group {group} has {got} block ids, but the range needs {needed}")]
    TooFewBlocks {
        group: usize,
        got: usize,
        needed: usize,
    },
    #[error("block_ids has {got} groups, but {needed} are registered")]
    Groups { got: usize, needed: usize },
    #[error(
        "block_ids: block {id} of group {group} is not one of the {blocks} that are registered"
    )]
    NoSuchBlock { group: usize, id: i64, blocks: u64 },
    #[error("kv_cache: its segment {0}")]
    Segment(#[from] SegmentError),
    #[error("not done within --request-deadline-seconds, or the worker's registration ended")]
    Over,
}

/// The blocks of a range of chunks, checked against a layout.
#[derive(Debug)]
pub(super) struct Blocks<'l> {
    layout: &'l PagedLayout,
    segments: &'l [Segment],
    /// Of each group, the ids of the blocks that chunks keep.
    kept: Vec<Vec<u64>>,
    /// Chunks all of whose blocks are the null block.
    null: Vec<bool>,
}

/// A stretch of a chunk that lies in one piece in a segment.
struct Run {
    segment: usize,
    offset: u64,
    length: usize,
}

impl<'l> Blocks<'l> {
    /// Checks the block ids of `chunks` chunks: enough of each group, and all of them registered.
    pub(super) fn of(
        layout: &'l PagedLayout,
        segments: &'l [Segment],
        block_ids: &[Vec<i64>],
        chunks: usize,
        null_block_id: i64,
    ) -> Result<Self, CopyError> {
        if block_ids.len() != layout.groups.len() {
            return Err(CopyError::Groups {
                got: block_ids.len(),
                needed: layout.groups.len(),
            });
        }
        let mut null = vec![true; chunks];
        let mut kept = Vec::with_capacity(layout.groups.len());
        for (index, (group, ids)) in layout.groups.iter().zip(block_ids).enumerate() {
            let too_few = |needed| CopyError::TooFewBlocks {
                group: index,
                got: ids.len(),
                needed,
            };
            let needed = chunks
                .checked_mul(group.blocks_per_chunk)
                .ok_or_else(|| too_few(usize::MAX))?;
            let ids = ids.get(..needed).ok_or_else(|| too_few(needed))?;
            let blocks = group.planes.iter().map(|plane| plane.blocks);
            let blocks = blocks.min().unwrap_or(0);
            let mut group_kept = Vec::with_capacity(chunks * group.kept_blocks);
            for (ids, null) in ids.chunks(group.blocks_per_chunk).zip(&mut null) {
                *null &= ids.iter().all(|&id| id == null_block_id);
                let dropped = ids.len() - group.kept_blocks;
                for &id in ids.iter().skip(dropped) {
                    let known = u64::try_from(id).ok().filter(|&id| id < blocks);
                    group_kept.push(known.ok_or(CopyError::NoSuchBlock {
                        group: index,
                        id,
                        blocks,
                    })?);
                }
            }
            kept.push(group_kept);
        }
        Ok(Self {
            layout,
            segments,
            kept,
            null,
        })
    }

    /// Whether a chunk holds nothing: recurrent layers only have a state at some chunks' ends,
    /// and the engine passes its null block for the others.
    pub(super) fn is_null(&self, chunk: usize) -> bool {
        self.null.get(chunk).copied().unwrap_or(true)
    }

    /// Copies a chunk out of the engine's blocks into `out`, whatever was in it.
    pub(super) fn gather(
        &self,
        chunk: usize,
        out: &mut Vec<u8>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(), CopyError> {
        // What no group copies (outside of a window) is zero and not a former chunk.
        out.clear();
        out.resize(self.layout.chunk_bytes, 0);
        let mut block = Vec::new();
        for (group, ids) in self.layout.groups.iter().zip(&self.kept) {
            let ids = ids_of(group, ids, chunk);
            let region = group.region..group.region + group.copied_bytes();
            let mut rest = out.get_mut(region).unwrap_or_default();
            for plane in 0..group.planes.len() {
                if is_over() {
                    return Err(CopyError::Over);
                }
                for run in runs(group, plane, ids) {
                    let (piece, behind) = rest.split_at_mut(run.length);
                    match group.head_major() {
                        None => self.segment(&run)?.read(run.offset, piece)?,
                        Some((heads, tokens)) => {
                            block.resize(run.length, 0);
                            self.segment(&run)?.read(run.offset, &mut block)?;
                            transpose(&block, heads, tokens, group.head_bytes(), piece);
                        }
                    }
                    rest = behind;
                }
            }
        }
        Ok(())
    }

    /// Copies a chunk into the engine's blocks, but for those that begin within the first
    /// `skip_tokens` tokens of all chunks and end there.
    pub(super) fn scatter(
        &self,
        chunk: usize,
        bytes: &[u8],
        skip_tokens: u64,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(), CopyError> {
        for segment in self.segments {
            segment.check()?;
        }
        let mut block = Vec::new();
        for (group, ids) in self.layout.groups.iter().zip(&self.kept) {
            let ids = ids_of(group, ids, chunk);
            // Of this chunk's blocks; those in front of the window are not kept anyway.
            let skipped = usize::try_from(skip_tokens / group.tokens_per_block())
                .unwrap_or(usize::MAX)
                .saturating_sub(chunk * group.blocks_per_chunk)
                .saturating_sub(group.blocks_per_chunk - group.kept_blocks)
                .min(ids.len());
            let region = group.region..group.region + group.copied_bytes();
            let mut rest = bytes.get(region).unwrap_or_default();
            for plane in 0..group.planes.len() {
                if is_over() {
                    return Err(CopyError::Over);
                }
                rest = rest
                    .get(skipped * group.block_bytes()..)
                    .unwrap_or_default();
                for run in runs(group, plane, ids.get(skipped..).unwrap_or_default()) {
                    let (piece, behind) = rest.split_at_checked(run.length).unwrap_or_default();
                    match group.head_major() {
                        None => self.segment(&run)?.write(run.offset, piece)?,
                        Some((heads, tokens)) => {
                            block.resize(run.length, 0);
                            transpose(piece, tokens, heads, group.head_bytes(), &mut block);
                            self.segment(&run)?.write(run.offset, &block)?;
                        }
                    }
                    rest = behind;
                }
            }
        }
        Ok(())
    }

    fn segment(&self, run: &Run) -> Result<&Segment, SegmentError> {
        self.segments.get(run.segment).ok_or(SegmentError::Cut)
    }
}

fn ids_of<'i>(group: &KernelGroup, ids: &'i [u64], chunk: usize) -> &'i [u64] {
    let start = chunk * group.kept_blocks;
    ids.get(start..start + group.kept_blocks)
        .unwrap_or_default()
}

/// The blocks of one plane in order, those that follow each other in memory as one run if they
/// need no turning.
fn runs<'i>(
    group: &'i KernelGroup,
    plane: usize,
    ids: &'i [u64],
) -> impl Iterator<Item = Run> + 'i {
    let length = group.block_bytes();
    let plane = group.planes.get(plane);
    let is_dense = plane.is_some_and(|plane| plane.stride == length as u64);
    let joins = is_dense && group.head_major().is_none();
    ids.chunk_by(move |&one, &next| joins && next == one + 1)
        .filter_map(move |run| {
            let (plane, &first) = (plane?, run.first()?);
            Some(Run {
                segment: plane.segment,
                // Below the plane's number of blocks, so within the registered segment.
                offset: plane.start + first * plane.stride,
                length: length * run.len(),
            })
        })
}

/// `from` as `[rows][columns][piece]` to `[columns][rows][piece]`.
fn transpose(from: &[u8], rows: usize, columns: usize, piece: usize, to: &mut [u8]) {
    for (column, to) in to.chunks_exact_mut(rows * piece).enumerate() {
        for (row, to) in to.chunks_exact_mut(piece).enumerate() {
            let at = (row * columns + column) * piece;
            if let Some(from) = from.get(at..at + piece) {
                to.copy_from_slice(from);
            }
        }
    }
}
