//! The checksum that is kept beside a value.
//!
//! LMCache's values have no header, so that nothing in them tells a torn or flipped value from a
//! good one. What we write gets a CRC-32C where LMCache does not look; what LMCache wrote has
//! none and is taken by its length.

use crate::adapter::{AdapterError, Form};

/// CRC-32C, length and layout of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    crc32c: u32,
    length: u64,
    layout: u32,
}

impl Seal {
    pub(crate) fn of(value: &[u8], layout: u32) -> Self {
        Self {
            crc32c: crc32c::crc32c(value),
            length: value.len() as u64,
            layout,
        }
    }

    /// Whether it describes a value of `length` bytes.
    pub(crate) fn is_of(self, length: u64) -> bool {
        self.length == length
    }

    /// Reads what [`to_string`](ToString::to_string) wrote; `None` for anything else.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (crc32c, rest) = text.strip_prefix("crc32c=")?.split_once(" length=")?;
        let (length, layout) = rest.split_once(" layout=")?;
        let seal = Self {
            crc32c: u32::from_str_radix(crc32c, 16).ok()?,
            length: length.parse().ok()?,
            layout: u32::from_str_radix(layout, 16).ok()?,
        };
        (seal.to_string() == text).then_some(seal)
    }

    /// Checks a value that is expected to have the form `wanted`.
    ///
    /// # Errors
    /// What does not fit.
    pub(crate) fn check(seal: Option<Self>, value: &[u8], wanted: Form) -> Result<(), Fault> {
        let found = value.len() as u64;
        let damaged = |what: String| Err(Fault::Damaged(what));
        match seal {
            Some(seal) if seal.length != found => {
                damaged(format!("{found} of {} bytes are left", seal.length))
            }
            Some(seal) if crc32c::crc32c(value) != seal.crc32c => {
                damaged("its checksum does not match".to_owned())
            }
            Some(seal) if found != wanted.length || seal.layout != wanted.layout => {
                Err(Fault::OtherForm { found })
            }
            None if found != wanted.length => {
                damaged(format!("it has {found} bytes and not {}", wanted.length))
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            crc32c,
            length,
            layout,
        } = self;
        write!(f, "crc32c={crc32c:08x} length={length} layout={layout:08x}")
    }
}

/// Why a value must not be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// To be moved aside.
    Damaged(String),
    /// Good, but somebody else's.
    OtherForm { found: u64 },
}

impl Fault {
    /// The error of a fault; `moved` tells what became of a damaged value.
    pub(crate) fn into_error(self, moved: bool) -> AdapterError {
        match self {
            Self::Damaged(what) => AdapterError::Damaged { what, moved },
            Self::OtherForm { found } => AdapterError::OtherForm { found },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    fn form(length: u64) -> Form {
        Form { length, layout: 7 }
    }

    #[test]
    fn a_value_without_a_seal_is_taken_by_its_length() {
        assert_eq!(Seal::check(None, b"abc", form(3)), Ok(()));
        assert!(matches!(
            Seal::check(None, b"ab", form(3)),
            Err(Fault::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_and_any_cut_is_noticed(
            value in proptest::collection::vec(any::<u8>(), 1..600), at: prop::sample::Index, bit in 0..8_u32,
        ) {
            let seal = Seal::parse(Seal::of(&value, 7).to_string().as_bytes()).unwrap();
            let found = value.len() as u64;
            let wanted = form(found);
            prop_assert_eq!(Seal::check(Some(seal), &value, wanted), Ok(()));
            let at = at.index(value.len());
            let mut flipped = value.clone();
            flipped[at] ^= 1 << bit;
            for damaged in [&value[..at], &flipped] {
                let fault = Seal::check(Some(seal), damaged, wanted);
                prop_assert!(matches!(fault, Err(Fault::Damaged(_))));
            }
            for other in [form(found + 1), Form { length: found, layout: 8 }] {
                prop_assert_eq!(Seal::check(Some(seal), &value, other), Err(Fault::OtherForm { found }));
            }
        }

        #[test]
        fn only_what_was_written_is_read_as_a_seal(text in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(seal) = Seal::parse(&text) {
                prop_assert_eq!(seal.to_string().into_bytes(), text);
            }
        }
    }
}
