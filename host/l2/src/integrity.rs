//! The checksum that is kept beside a value.
//!
//! LMCache's values have no header, so that nothing in them tells a torn or flipped value from a
//! good one. What we write gets a CRC-32C where LMCache does not look; what LMCache wrote has
//! none and is taken by its length.

use crate::adapter::AdapterError;

/// CRC-32C and length of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    crc32c: u32,
    length: u64,
}

impl Seal {
    pub(crate) fn of(value: &[u8]) -> Self {
        Self {
            crc32c: crc32c::crc32c(value),
            length: value.len() as u64,
        }
    }

    /// Whether it describes a value of `length` bytes.
    pub(crate) fn is_of(self, length: u64) -> bool {
        self.length == length
    }

    /// Reads what [`to_string`](ToString::to_string) wrote; `None` for anything else.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (crc32c, length) = text.strip_prefix("crc32c=")?.split_once(" length=")?;
        let seal = Self {
            crc32c: u32::from_str_radix(crc32c, 16).ok()?,
            length: length.parse().ok()?,
        };
        (seal.to_string() == text).then_some(seal)
    }

    /// Checks a value that is expected to have `wanted` bytes.
    ///
    /// # Errors
    /// What does not fit.
    pub(crate) fn check(seal: Option<Self>, value: &[u8], wanted: u64) -> Result<(), Fault> {
        let found = value.len() as u64;
        let damaged = |what: String| Err(Fault::Damaged(what));
        match seal {
            Some(seal) if seal.length != found => {
                damaged(format!("{found} of {} bytes are left", seal.length))
            }
            Some(seal) if crc32c::crc32c(value) != seal.crc32c => {
                damaged("its checksum does not match".to_owned())
            }
            Some(_) if found != wanted => Err(Fault::OtherLength { found, wanted }),
            None if found != wanted => damaged(format!("it has {found} bytes and not {wanted}")),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "crc32c={:08x} length={}", self.crc32c, self.length)
    }
}

/// Why a value must not be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// To be moved aside.
    Damaged(String),
    /// Good, but somebody else's.
    OtherLength { found: u64, wanted: u64 },
}

impl Fault {
    /// The error of a fault; `moved` tells what became of a damaged value.
    pub(crate) fn into_error(self, moved: bool) -> AdapterError {
        match self {
            Self::Damaged(what) => AdapterError::Damaged { what, moved },
            Self::OtherLength { found, wanted } => AdapterError::OtherLength { found, wanted },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_value_without_a_seal_is_taken_by_its_length() {
        assert_eq!(Seal::check(None, b"abc", 3), Ok(()));
        assert!(matches!(
            Seal::check(None, b"ab", 3),
            Err(Fault::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_and_any_cut_is_noticed(
            value in proptest::collection::vec(any::<u8>(), 1..600), at: prop::sample::Index, bit in 0..8_u32,
        ) {
            let seal = Seal::parse(Seal::of(&value).to_string().as_bytes()).unwrap();
            let wanted = value.len() as u64;
            prop_assert_eq!(Seal::check(Some(seal), &value, wanted), Ok(()));
            let at = at.index(value.len());
            prop_assert!(matches!(Seal::check(Some(seal), &value[..at], wanted), Err(Fault::Damaged(_))));
            let mut flipped = value.clone();
            flipped[at] ^= 1 << bit;
            prop_assert!(matches!(Seal::check(Some(seal), &flipped, wanted), Err(Fault::Damaged(_))));
            let longer = Err(Fault::OtherLength { found: wanted, wanted: wanted + 1 });
            prop_assert_eq!(Seal::check(Some(seal), &value, wanted + 1), longer);
        }

        #[test]
        fn only_what_was_written_is_read_as_a_seal(text in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(seal) = Seal::parse(&text) {
                prop_assert_eq!(seal.to_string().into_bytes(), text);
            }
        }
    }
}
