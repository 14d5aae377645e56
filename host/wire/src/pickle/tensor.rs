//! A tensor as a view into the pickle's bytes.

use std::sync::Arc;

use crate::dtype::{Dtype, element_count};
use crate::pickle::PickleError;

/// One tensor of a pickle. Its elements are read where they are, little-endian.
#[derive(Clone, Debug)]
pub struct PickledTensor<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first; none for a scalar.
    pub shape: Arc<[u64]>,
    /// Elements from one index to the next, per dimension.
    strides: Arc<[u64]>,
    /// Elements from the storage's start to the first one.
    offset: u64,
    storage: &'a [u8],
    /// Bytes of all elements, one after the other.
    byte_len: u64,
}

/// Torch itself has no more.
const MAX_DIMS: usize = 64;

impl<'a> PickledTensor<'a> {
    /// Checks that every element lies within the storage and that the dense size is at most
    /// `max_bytes`: a stride of zero would otherwise make any size out of one element.
    pub(super) fn new(
        dtype: Dtype,
        storage: &'a [u8],
        offset: u64,
        shape: Arc<[u64]>,
        strides: Arc<[u64]>,
        max_bytes: usize,
    ) -> Result<Self, PickleError> {
        let outside = PickleError::OutOfBounds {
            storage_bytes: storage.len(),
        };
        if shape.len() != strides.len() || shape.len() > MAX_DIMS {
            return Err(PickleError::Unsupported {
                what: "shape and strides must be of one length of at most 64",
            });
        }
        let byte_len = dtype.byte_len(&shape).ok_or(outside.clone())?;
        let within = |end: u64| end <= storage.len() as u64;
        let end = last_element(offset, &shape, &strides)
            .and_then(|last| last.checked_add(u64::from(byte_len != 0)))
            .and_then(|elements| elements.checked_mul(dtype.item_size()));
        // An empty tensor reads nothing, so its offset may be anywhere.
        if byte_len != 0 && !end.is_some_and(within) {
            return Err(outside);
        }
        if byte_len > max_bytes as u64 {
            return Err(PickleError::Expands {
                input_bytes: max_bytes,
            });
        }
        Ok(Self {
            dtype,
            shape,
            strides,
            offset,
            storage,
            byte_len,
        })
    }

    /// Bytes of all elements: the dtype's size times the product of the shape.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// Elements from one index to the next, per dimension.
    #[must_use]
    pub fn strides(&self) -> &[u64] {
        &self.strides
    }

    /// All elements as one slice, if they lie one after the other in row-major order.
    #[must_use]
    pub fn contiguous(&self) -> Option<&'a [u8]> {
        let mut parts = self.parts();
        let first = parts.next().unwrap_or_default();
        (first.len() as u64 == self.byte_len).then_some(first)
    }

    /// All elements in row-major order, in the longest slices that lie in one piece.
    ///
    /// The slices' lengths sum up to [`byte_len`](Self::byte_len).
    #[must_use]
    pub fn parts(&self) -> TensorParts<'a> {
        TensorParts::new(self)
    }
}

/// The index of the tensor's last element; `None` on overflow.
fn last_element(offset: u64, shape: &[u64], strides: &[u64]) -> Option<u64> {
    let mut last = offset;
    for (&dim, &stride) in shape.iter().zip(strides) {
        last = last.checked_add(dim.saturating_sub(1).checked_mul(stride)?)?;
    }
    Some(last)
}

/// The slices of a tensor; see [`PickledTensor::parts`].
#[derive(Clone, Debug)]
pub struct TensorParts<'a> {
    storage: &'a [u8],
    /// The dimensions outside of one slice, innermost first.
    outer: Vec<Axis>,
    /// Byte at which the next slice starts.
    position: usize,
    slice_bytes: usize,
    remaining: usize,
}

#[derive(Clone, Copy, Debug)]
struct Axis {
    len: u64,
    index: u64,
    stride_bytes: usize,
}

impl<'a> TensorParts<'a> {
    fn new(tensor: &PickledTensor<'a>) -> Self {
        // All sizes were checked to lie within the storage when the tensor was made, so the
        // conversions hold; were one not to, the iterator would end early.
        let to_bytes = |elements: u64| {
            let bytes = elements.checked_mul(tensor.dtype.item_size());
            bytes.and_then(|bytes| usize::try_from(bytes).ok())
        };
        let mut slice_elements = 1;
        let mut outer: Vec<Axis> = Vec::new();
        let axes = tensor.shape.iter().zip(tensor.strides.iter());
        for (&len, &stride) in axes.rev() {
            if len == 1 {
                continue;
            }
            if outer.is_empty() && stride == slice_elements {
                slice_elements = slice_elements.saturating_mul(len);
            } else {
                outer.push(Axis {
                    len,
                    index: 0,
                    stride_bytes: to_bytes(stride).unwrap_or(usize::MAX),
                });
            }
        }
        let count = element_count(&tensor.shape)
            .and_then(|elements| elements.checked_div(slice_elements))
            .unwrap_or(0);
        Self {
            storage: tensor.storage,
            outer,
            position: to_bytes(tensor.offset).unwrap_or(usize::MAX),
            slice_bytes: to_bytes(slice_elements).unwrap_or(usize::MAX),
            remaining: usize::try_from(count).unwrap_or(0),
        }
    }

    /// Moves on to the next slice like an odometer.
    fn step(&mut self) {
        for axis in &mut self.outer {
            axis.index += 1;
            if axis.index < axis.len {
                self.position = self.position.saturating_add(axis.stride_bytes);
                return;
            }
            let back = usize::try_from(axis.len - 1).unwrap_or(usize::MAX);
            let back = back.saturating_mul(axis.stride_bytes);
            self.position = self.position.saturating_sub(back);
            axis.index = 0;
        }
    }
}

impl<'a> Iterator for TensorParts<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.remaining = self.remaining.checked_sub(1)?;
        let end = self.position.checked_add(self.slice_bytes)?;
        let slice = self.storage.get(self.position..end)?;
        self.step();
        Some(slice)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}
