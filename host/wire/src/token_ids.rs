//! Token ids, turned from msgpack integers into hash input in one pass.

use std::fmt;

use bytes::Bytes;

use crate::Limits;
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

/// Tokens read between two calls of [`Limits::between`]: a microsecond or two.
const TOKENS_AT_A_TIME: usize = 1 << 10;

/// Markers of the two forms that nearly all tokens of a real prompt have.
const TWO_BYTES: u8 = 0xcd;
const FOUR_BYTES: u8 = 0xce;

/// What two tokens of four bytes take.
const PAIR_BYTES: usize = 10;

/// Reads two tokens of two or four bytes each; gives their bytes and what they took.
///
/// There is no branch on either width: vocabularies beyond 65 536 entries mix the two in an
/// order that no branch predictor could learn. Both places where the second token may start
/// are looked at before it is known which one it is, so that one pair's position waits for
/// two comparisons only.
#[inline]
fn read_pair(window: &[u8; PAIR_BYTES]) -> Option<([[u8; BYTES_PER_TOKEN]; 2], usize)> {
    let [first, _, _, near, _, far, ..] = *window;
    let wide = |marker| u32::from(marker == FOUR_BYTES);
    let first_wide = wide(first);
    // Arithmetic instead of `if`, which would be compiled to the branch to avoid.
    let far_mask = 0_u32.wrapping_sub(first_wide);
    let select = |if_near: u32, if_far: u32| if_near ^ ((if_near ^ if_far) & far_mask);
    let step = select(6 + 2 * wide(near), 8 + 2 * wide(far));
    let second_wide = (step >> 1) - 3 - first_wide;
    let second = select(near.into(), far.into());
    let known = |marker: u32| marker == TWO_BYTES.into() || marker == FOUR_BYTES.into();
    if !(known(first.into()) & known(second)) {
        return None;
    }
    let word = |at: usize| {
        u32::from_be_bytes([window[at], window[at + 1], window[at + 2], window[at + 3]])
    };
    let first = word(1) >> (16 - 16 * first_wide);
    let second = select(word(4), word(6)) >> (16 - 16 * second_wide);
    Some(([first.to_be_bytes(), second.to_be_bytes()], step as usize))
}

/// Reads one unsigned token of up to four bytes; gives its bytes and what it took.
#[inline]
fn read_one(window: &[u8]) -> Option<([u8; BYTES_PER_TOKEN], usize)> {
    match *window {
        [small @ ..0x80, ..] => Some(([0, 0, 0, small], 1)),
        [0xcc, a, ..] => Some(([0, 0, 0, a], 2)),
        [TWO_BYTES, a, b, ..] => Some(([0, 0, a, b], 3)),
        [FOUR_BYTES, a, b, c, d, ..] => Some(([a, b, c, d], 5)),
        _ => None,
    }
}

/// Reads an array of token ids.
///
/// Memory follows what arrived: each announced token must have at least one byte left, so
/// at most four bytes are reserved per byte of the frame.
pub(crate) fn read(reader: &mut Reader<'_>, limits: &Limits) -> Result<TokenIds, FieldProblem> {
    let count = reader.array_len()?;
    if count > limits.max_tokens {
        return Err(FieldProblem::TooLarge {
            got: count,
            limit: limits.max_tokens,
            unit: Unit::Tokens,
        });
    }
    let mut bytes = vec![0; count * BYTES_PER_TOKEN];
    let (slots, _) = bytes.as_chunks_mut::<BYTES_PER_TOKEN>();
    for (number, mut slots) in slots.chunks_mut(TOKENS_AT_A_TIME).enumerate() {
        if number > 0 {
            (limits.between)();
        }
        while !slots.is_empty() {
            let (read, written) = read_common(reader.rest(), slots);
            reader.advance(read)?;
            slots = slots.get_mut(written..).unwrap_or_default();
            // The fast loop stops at forms it does not know: 64-bit or signed ones, and errors.
            let Some((slot, others)) = slots.split_first_mut() else {
                break;
            };
            *slot = read_any(reader)?.to_be_bytes();
            slots = others;
        }
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

/// Reads tokens in the forms that clients write them in, up to the first in another form.
///
/// Returns the bytes read and the slots written.
#[inline]
fn read_common(bytes: &[u8], slots: &mut [[u8; BYTES_PER_TOKEN]]) -> (usize, usize) {
    let mut position = 0;
    let mut written = 0;
    while let Some(rest) = slots.get_mut(written..).filter(|rest| !rest.is_empty()) {
        let ahead = bytes.get(position..).unwrap_or_default();
        let window = ahead.first_chunk::<PAIR_BYTES>();
        if let (Some(pair), Some(window)) = (rest.first_chunk_mut::<2>(), window)
            && let Some((tokens, step)) = read_pair(window)
        {
            *pair = tokens;
            position += step;
            written += 2;
        } else if let (Some(slot), Some((token, step))) = (rest.first_mut(), read_one(ahead)) {
            *slot = token;
            position += step;
            written += 1;
        } else {
            break;
        }
    }
    (position, written)
}
