//! A msgpack reader for hostile input: no panics, no recursion without a bound, and no
//! allocation of its own, so nothing that a header announces is believed before it is there.

use rmp::Marker;

use crate::error::{FieldProblem, Unit};

type Read<T> = Result<T, FieldProblem>;

/// Reads values off the front of a frame.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

/// One whole value; what a container holds has been skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    Nil,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    Array { len: u32 },
    Map { len: u32 },
    Ext { code: i8, data: &'a [u8] },
}

impl Value<'_> {
    pub(crate) const fn type_name(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Bin(_) => "bin",
            Self::Array { .. } => "array",
            Self::Map { .. } => "map",
            Self::Ext { .. } => "ext",
        }
    }
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read.
    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Moves on by what a specialised loop has read off [`rest`](Self::rest).
    pub(crate) fn advance(&mut self, count: usize) -> Read<()> {
        self.take(count).map(drop)
    }

    /// Ends the frame: exactly one value must have been in it.
    pub(crate) const fn finish(self) -> Read<()> {
        match self.rest.len() {
            0 => Ok(()),
            count => Err(FieldProblem::TrailingBytes { count }),
        }
    }

    fn take(&mut self, count: usize) -> Read<&'a [u8]> {
        let (head, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(FieldProblem::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(FieldProblem::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    fn len8(&mut self) -> Read<u32> {
        Ok(u32::from(u8::from_be_bytes(self.array()?)))
    }

    fn len16(&mut self) -> Read<u32> {
        Ok(u32::from(u16::from_be_bytes(self.array()?)))
    }

    fn len32(&mut self) -> Read<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn slice(&mut self, len: u32) -> Read<&'a [u8]> {
        self.take(usize::try_from(len).map_err(|_| FieldProblem::Truncated)?)
    }

    /// Reads a scalar whole, and of a container the header only.
    pub(crate) fn head(&mut self) -> Read<Value<'a>> {
        let [marker] = self.array()?;
        Ok(match Marker::from_u8(marker) {
            Marker::Null => Value::Nil,
            Marker::False => Value::Bool(false),
            Marker::True => Value::Bool(true),
            Marker::FixPos(value) => Value::Int(i128::from(value)),
            Marker::FixNeg(value) => Value::Int(i128::from(value)),
            Marker::U8 => Value::Int(u8::from_be_bytes(self.array()?).into()),
            Marker::U16 => Value::Int(u16::from_be_bytes(self.array()?).into()),
            Marker::U32 => Value::Int(u32::from_be_bytes(self.array()?).into()),
            Marker::U64 => Value::Int(u64::from_be_bytes(self.array()?).into()),
            Marker::I8 => Value::Int(i8::from_be_bytes(self.array()?).into()),
            Marker::I16 => Value::Int(i16::from_be_bytes(self.array()?).into()),
            Marker::I32 => Value::Int(i32::from_be_bytes(self.array()?).into()),
            Marker::I64 => Value::Int(i64::from_be_bytes(self.array()?).into()),
            Marker::F32 => Value::Float(f32::from_be_bytes(self.array()?).into()),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.array()?)),
            Marker::FixStr(len) => Value::Str(self.slice(len.into())?),
            Marker::Str8 => {
                let len = self.len8()?;
                Value::Str(self.slice(len)?)
            }
            Marker::Str16 => {
                let len = self.len16()?;
                Value::Str(self.slice(len)?)
            }
            Marker::Str32 => {
                let len = self.len32()?;
                Value::Str(self.slice(len)?)
            }
            Marker::Bin8 => {
                let len = self.len8()?;
                Value::Bin(self.slice(len)?)
            }
            Marker::Bin16 => {
                let len = self.len16()?;
                Value::Bin(self.slice(len)?)
            }
            Marker::Bin32 => {
                let len = self.len32()?;
                Value::Bin(self.slice(len)?)
            }
            Marker::FixArray(len) => Value::Array { len: len.into() },
            Marker::Array16 => Value::Array { len: self.len16()? },
            Marker::Array32 => Value::Array { len: self.len32()? },
            Marker::FixMap(len) => Value::Map { len: len.into() },
            Marker::Map16 => Value::Map { len: self.len16()? },
            Marker::Map32 => Value::Map { len: self.len32()? },
            Marker::FixExt1 => self.ext(1)?,
            Marker::FixExt2 => self.ext(2)?,
            Marker::FixExt4 => self.ext(4)?,
            Marker::FixExt8 => self.ext(8)?,
            Marker::FixExt16 => self.ext(16)?,
            Marker::Ext8 => {
                let len = self.len8()?;
                self.ext(len)?
            }
            Marker::Ext16 => {
                let len = self.len16()?;
                self.ext(len)?
            }
            Marker::Ext32 => {
                let len = self.len32()?;
                self.ext(len)?
            }
            Marker::Reserved => return Err(FieldProblem::Reserved),
        })
    }

    fn ext(&mut self, len: u32) -> Read<Value<'a>> {
        let code = i8::from_be_bytes(self.array()?);
        let data = self.slice(len)?;
        Ok(Value::Ext { code, data })
    }

    /// Reads one whole value of any type, at most `depth` containers deep. All text in it
    /// must be UTF-8, as where Python makes strings of it.
    pub(crate) fn value(&mut self, depth: usize) -> Read<Value<'a>> {
        self.value_within::<true>(depth, depth)
    }

    /// As [`value`](Self::value), for values of which nobody looks at the text.
    pub(crate) fn skim(&mut self, depth: usize) -> Read<Value<'a>> {
        self.value_within::<false>(depth, depth)
    }

    /// Reads and forgets one whole value.
    pub(crate) fn skip(&mut self, depth: usize) -> Read<()> {
        self.skim(depth).map(drop)
    }

    fn value_within<const UTF8: bool>(&mut self, depth: usize, limit: usize) -> Read<Value<'a>> {
        let head = self.head()?;
        // Twice the length of a map fits in u64, and each turn consumes at least one byte.
        let children = match head {
            Value::Array { len } => u64::from(len),
            Value::Map { len } => u64::from(len) * 2,
            Value::Str(text) if UTF8 && str::from_utf8(text).is_err() => {
                return Err(FieldProblem::NotUtf8);
            }
            _ => return Ok(head),
        };
        let inner = depth
            .checked_sub(1)
            .ok_or(FieldProblem::TooDeep { limit })?;
        for _ in 0..children {
            self.value_within::<UTF8>(inner, limit)?;
        }
        Ok(head)
    }

    fn wrong<T>(expected: &'static str, found: Value<'_>) -> Read<T> {
        Err(FieldProblem::WrongType {
            expected,
            found: found.type_name(),
        })
    }

    pub(crate) fn map_len(&mut self) -> Read<u32> {
        match self.head()? {
            Value::Map { len } if self.holds(u64::from(len) * 2) => Ok(len),
            Value::Map { .. } => Err(FieldProblem::Truncated),
            other => Self::wrong("map", other),
        }
    }

    /// The elements an array announces, never more than there are bytes left for.
    pub(crate) fn array_len(&mut self) -> Read<usize> {
        match self.head()? {
            Value::Array { len } if self.holds(len.into()) => {
                usize::try_from(len).map_err(|_| FieldProblem::Truncated)
            }
            Value::Array { .. } => Err(FieldProblem::Truncated),
            other => Self::wrong("array", other),
        }
    }

    /// Whether that many values can follow: each takes at least one byte.
    fn holds(&self, values: u64) -> bool {
        usize::try_from(values).is_ok_and(|values| values <= self.rest.len())
    }

    /// A map key: the bytes of a string, compared but never kept.
    pub(crate) fn key(&mut self) -> Read<&'a [u8]> {
        match self.head()? {
            Value::Str(bytes) => Ok(bytes),
            other => Self::wrong("str as the key of a map", other),
        }
    }

    pub(crate) fn str(&mut self, max_bytes: usize) -> Read<&'a str> {
        match self.head()? {
            Value::Str(bytes) if bytes.len() > max_bytes => Err(FieldProblem::TooLarge {
                got: bytes.len(),
                limit: max_bytes,
                unit: Unit::Bytes,
            }),
            Value::Str(bytes) => std::str::from_utf8(bytes).map_err(|_| FieldProblem::NotUtf8),
            other => Self::wrong("str", other),
        }
    }

    pub(crate) fn bin(&mut self) -> Read<&'a [u8]> {
        match self.head()? {
            Value::Bin(bytes) => Ok(bytes),
            other => Self::wrong("bin", other),
        }
    }

    pub(crate) fn bool(&mut self) -> Read<bool> {
        match self.head()? {
            Value::Bool(value) => Ok(value),
            other => Self::wrong("bool", other),
        }
    }

    /// A whole number in any msgpack width, narrowed to `T`.
    pub(crate) fn int<T: Narrow>(&mut self) -> Read<T> {
        match self.head()? {
            Value::Int(value) => T::narrow(value),
            other => Self::wrong("int", other),
        }
    }

    pub(crate) fn int_or_nil<T: Narrow>(&mut self) -> Read<Option<T>> {
        match self.head()? {
            Value::Nil => Ok(None),
            Value::Int(value) => T::narrow(value).map(Some),
            other => Self::wrong("int or nil", other),
        }
    }

    /// A number as seconds and the like: a float of either width or a whole number.
    pub(crate) fn float(&mut self) -> Read<f64> {
        match self.head()? {
            Value::Float(value) => Ok(value),
            #[expect(clippy::cast_precision_loss, reason = "as Python's float() of an int")]
            Value::Int(value) => Ok(value as f64),
            other => Self::wrong("float", other),
        }
    }
}

/// Whole numbers that a field may hold.
pub(crate) trait Narrow: Sized {
    fn narrow(value: i128) -> Read<Self>;
}

macro_rules! narrow {
    ($($int:ty),+) => {$(
        impl Narrow for $int {
            fn narrow(value: i128) -> Read<Self> {
                Self::try_from(value).map_err(|_| FieldProblem::OutOfRange {
                    value,
                    lowest: Self::MIN as i128,
                    highest: Self::MAX as i128,
                })
            }
        }
    )+};
}
narrow!(u32, u64, i64, i128);
