//! Element types by the names `torch` gives them.

use std::fmt;

macro_rules! dtypes {
    ($($variant:ident $name:literal $(| $alias:literal)* $size:literal),+ $(,)?) => {
        /// An element type: every attribute of the `torch` module that is a `torch.dtype`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Dtype {
            $(#[doc = concat!("`torch.", $name, "`, ", $size, " bytes per element")] $variant,)+
        }

        impl Dtype {
            /// Every element type.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Bytes per element, as `torch.dtype.itemsize` (1 for the sub-byte types).
            #[must_use]
            pub const fn item_size(self) -> u64 {
                match self { $(Self::$variant => $size),+ }
            }

            /// `str(dtype)` without the `torch.` in front: what slot descriptors carry.
            #[must_use]
            pub const fn torch_name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Finds the type by its canonical name or one of torch's aliases (`half`, `float`,
            /// `long`, ...); no `torch.` in front, as in LMCache's `dtype_str`.
            #[must_use]
            pub fn parse(name: &str) -> Option<Self> {
                match name { $($name $(| $alias)* => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

dtypes! {
    Float16 "float16" | "half" 2,
    BFloat16 "bfloat16" 2,
    Float32 "float32" | "float" 4,
    Float64 "float64" | "double" 8,
    Float8E4m3fn "float8_e4m3fn" 1,
    Float8E4m3fnuz "float8_e4m3fnuz" 1,
    Float8E5m2 "float8_e5m2" 1,
    Float8E5m2fnuz "float8_e5m2fnuz" 1,
    Float8E8m0fnu "float8_e8m0fnu" 1,
    Float4E2m1fnX2 "float4_e2m1fn_x2" 1,
    Int8 "int8" 1,
    Int16 "int16" | "short" 2,
    Int32 "int32" | "int" 4,
    Int64 "int64" | "long" 8,
    UInt8 "uint8" 1,
    UInt16 "uint16" 2,
    UInt32 "uint32" 4,
    UInt64 "uint64" 8,
    Bool "bool" 1,
    Complex32 "complex32" | "chalf" 4,
    Complex64 "complex64" | "cfloat" 8,
    Complex128 "complex128" | "cdouble" 16,
    BComplex32 "bcomplex32" 4,
    QInt8 "qint8" 1,
    QUInt8 "quint8" 1,
    QInt32 "qint32" 4,
    QUInt4x2 "quint4x2" 1,
    QUInt2x4 "quint2x4" 1,
    Bits1x8 "bits1x8" 1,
    Bits2x4 "bits2x4" 1,
    Bits4x2 "bits4x2" 1,
    Bits8 "bits8" 1,
    Bits16 "bits16" 2,
    Int1 "int1" 1,
    Int2 "int2" 1,
    Int3 "int3" 1,
    Int4 "int4" 1,
    Int5 "int5" 1,
    Int6 "int6" 1,
    Int7 "int7" 1,
    UInt1 "uint1" | "bit" 1,
    UInt2 "uint2" 1,
    UInt3 "uint3" 1,
    UInt4 "uint4" 1,
    UInt5 "uint5" 1,
    UInt6 "uint6" 1,
    UInt7 "uint7" 1,
}

impl Dtype {
    /// Bytes of a dense tensor of that shape; `None` if the product does not fit.
    #[must_use]
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        let elements = element_count(shape)?;
        elements.checked_mul(self.item_size())
    }
}

/// The product of the dimensions, 1 for none; `None` if it does not fit.
///
/// A zero dimension makes the product zero even where the others would overflow.
pub(crate) fn element_count(shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .try_fold(1_u64, |count, &dim| count.checked_mul(dim))
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.torch_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_names_and_aliases_are_understood() {
        for &dtype in Dtype::ALL {
            assert_eq!(Dtype::parse(dtype.torch_name()), Some(dtype));
        }
        for (alias, name) in [
            ("half", "float16"),
            ("float", "float32"),
            ("double", "float64"),
            ("short", "int16"),
            ("int", "int32"),
            ("long", "int64"),
            ("chalf", "complex32"),
            ("cfloat", "complex64"),
            ("cdouble", "complex128"),
            ("bit", "uint1"),
        ] {
            assert_eq!(Dtype::parse(alias).map(Dtype::torch_name), Some(name));
        }
        for unknown in ["torch.float16", "Float16", "", "float17"] {
            assert_eq!(Dtype::parse(unknown), None);
        }
    }

    #[test]
    fn byte_lengths_do_not_overflow() {
        assert_eq!(Dtype::BFloat16.byte_len(&[2, 3, 4]), Some(48));
        assert_eq!(Dtype::Float64.byte_len(&[]), Some(8));
        assert_eq!(Dtype::UInt8.byte_len(&[u64::MAX, 2, 0]), Some(0));
        assert_eq!(Dtype::UInt8.byte_len(&[u64::MAX, 2]), None);
        assert_eq!(Dtype::Float16.byte_len(&[u64::MAX]), None);
    }
}
