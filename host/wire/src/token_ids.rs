//! Token ids, turned from msgpack integers into hash input in one pass.

use std::fmt;

use bytes::Bytes;

use crate::error::{FieldProblem, Unit};
use crate::msgpack::{Narrow, Reader, Value};

/// Token ids as the token hasher takes them: four big-endian bytes each.
///
/// Cloning shares the bytes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TokenIds(Bytes);

impl TokenIds {
    /// The number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / BYTES_PER_TOKEN
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Four big-endian bytes per token.
    #[must_use]
    pub fn as_be_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of a range of tokens, sharing memory; `None` if it reaches past the end.
    #[must_use]
    pub fn slice(&self, tokens: std::ops::Range<usize>) -> Option<Self> {
        if tokens.start > tokens.end || tokens.end > self.len() {
            return None;
        }
        let bytes = tokens.start * BYTES_PER_TOKEN..tokens.end * BYTES_PER_TOKEN;
        Some(Self(self.0.slice(bytes)))
    }

    /// Takes bytes that already are four big-endian bytes per token; `None` if a token is cut.
    #[must_use]
    pub fn from_be_bytes(bytes: Bytes) -> Option<Self> {
        bytes
            .len()
            .is_multiple_of(BYTES_PER_TOKEN)
            .then_some(Self(bytes))
    }

    /// The tokens as numbers.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        let (tokens, _) = self.0.as_chunks::<BYTES_PER_TOKEN>();
        tokens.iter().map(|&token| u32::from_be_bytes(token))
    }
}

impl FromIterator<u32> for TokenIds {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        Self(tokens.into_iter().flat_map(u32::to_be_bytes).collect())
    }
}

impl fmt::Debug for TokenIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenIds({} tokens)", self.len())
    }
}

const BYTES_PER_TOKEN: usize = 4;

/// How a marker byte's number is cut out of the eight bytes that start with it.
///
/// `width` is what the value takes in all; 0 sends it to the slow path.
#[derive(Clone, Copy)]
struct Cut {
    width: u8,
    left: u8,
    right: u8,
}

/// Chosen by marker instead of branched on: real prompts mix two- and four-byte tokens in
/// no order a branch predictor could learn.
static CUTS: [Cut; 256] = {
    let slow = Cut {
        width: 0,
        left: 0,
        right: 0,
    };
    let mut cuts = [slow; 256];
    let mut marker = 0;
    while marker < 0x80 {
        cuts[marker] = Cut {
            width: 1,
            left: 0,
            right: 56,
        };
        marker += 1;
    }
    cuts[0xcc] = Cut {
        width: 2,
        left: 8,
        right: 56,
    };
    cuts[0xcd] = Cut {
        width: 3,
        left: 8,
        right: 48,
    };
    cuts[0xce] = Cut {
        width: 5,
        left: 8,
        right: 32,
    };
    cuts
};

/// Reads an array of token ids.
///
/// Memory follows what arrived: each announced token must have at least one byte left, so
/// at most four bytes are reserved per byte of the frame.
pub(crate) fn read(reader: &mut Reader<'_>, max_tokens: usize) -> Result<TokenIds, FieldProblem> {
    let count = reader.array_len()?;
    if count > max_tokens {
        return Err(FieldProblem::TooLarge {
            got: count,
            limit: max_tokens,
            unit: Unit::Tokens,
        });
    }
    let mut bytes = vec![0; count * BYTES_PER_TOKEN];
    let (mut slots, _) = bytes.as_chunks_mut::<BYTES_PER_TOKEN>();
    while !slots.is_empty() {
        let (read, written) = read_short(reader.rest(), slots);
        reader.advance(read)?;
        slots = slots.get_mut(written..).unwrap_or_default();
        // The short loop stops at the last few bytes, and at widths and types it does not know.
        let Some((slot, others)) = slots.split_first_mut() else {
            break;
        };
        *slot = read_any(reader)?.to_be_bytes();
        slots = others;
    }
    Ok(TokenIds(bytes.into()))
}

fn read_any(reader: &mut Reader<'_>) -> Result<u32, FieldProblem> {
    match reader.head()? {
        Value::Int(value) => u32::narrow(value),
        other => Err(FieldProblem::WrongType {
            expected: "int",
            found: other.type_name(),
        }),
    }
}

/// Reads unsigned tokens of up to five bytes while eight bytes are in sight.
///
/// Returns the bytes read and the slots written.
#[inline]
fn read_short(bytes: &[u8], slots: &mut [[u8; BYTES_PER_TOKEN]]) -> (usize, usize) {
    let mut position = 0;
    for (written, slot) in slots.iter_mut().enumerate() {
        let Some(window) = bytes
            .get(position..)
            .and_then(|rest| rest.first_chunk::<8>())
        else {
            return (position, written);
        };
        let word = u64::from_be_bytes(*window);
        let cut = CUTS[usize::from(window[0])];
        if cut.width == 0 {
            return (position, written);
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most 32 bits are left")]
        let token = ((word << cut.left) >> cut.right) as u32;
        *slot = token.to_be_bytes();
        position += usize::from(cut.width);
    }
    (position, slots.len())
}
