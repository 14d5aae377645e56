//! The stream inside: what `torch.save` wrote of one storage before it wrote zip files.
//!
//! Five pickles (a magic number, a version, facts on the machine, the storage's reference,
//! the list of its key), then the number of elements and the elements
//! (`torch/serialization.py`, `_legacy_save` and `_legacy_load`).

use crate::dtype::Dtype;
use crate::pickle::PickleError;
use crate::pickle::machine::{Machine, Value};

/// 0x1950a86a20f9469cfc6c as a pickled integer.
pub(super) const SAVE_MAGIC: &[u8] = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// The one version there has been.
pub(super) const SAVE_VERSION: u16 = 1001;

macro_rules! storage_classes {
    ($($dtype:ident $class:literal),+ $(,)?) => {
        /// The class that old streams give a dtype; newer dtypes have none.
        pub(super) const fn class_of(dtype: Dtype) -> Option<&'static str> {
            match dtype { $(Dtype::$dtype => Some($class),)+ _ => None }
        }

        fn dtype_of(class: &str) -> Option<Dtype> {
            match class { $($class => Some(Dtype::$dtype),)+ _ => None }
        }
    };
}

storage_classes! {
    Float64 "DoubleStorage",
    Float32 "FloatStorage",
    Float16 "HalfStorage",
    BFloat16 "BFloat16Storage",
    Int64 "LongStorage",
    Int32 "IntStorage",
    Int16 "ShortStorage",
    Int8 "CharStorage",
    UInt8 "ByteStorage",
    Bool "BoolStorage",
    Complex64 "ComplexFloatStorage",
    Complex128 "ComplexDoubleStorage",
    QInt8 "QInt8Storage",
    QInt32 "QInt32Storage",
    QUInt8 "QUInt8Storage",
    QUInt4x2 "QUInt4x2Storage",
    QUInt2x4 "QUInt2x4Storage",
}

/// What a storage counts its elements in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StorageType {
    Typed(Dtype),
    /// Counts bytes; the tensor names the dtype.
    Untyped,
}

impl StorageType {
    pub(super) fn named(class: &str) -> Option<Self> {
        dtype_of(class).map(Self::Typed)
    }

    const fn item_size(self) -> u64 {
        match self {
            Self::Typed(dtype) => dtype.item_size(),
            Self::Untyped => 1,
        }
    }
}

/// A storage: announced without bytes by the stream's object, loaded with them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    kind: StorageType,
    key: &'a [u8],
    elements: u64,
    pub(super) bytes: &'a [u8],
}

impl<'a> Storage<'a> {
    pub(super) fn announced(
        kind: StorageType,
        key: &'a [u8],
        elements: i64,
    ) -> Result<Self, PickleError> {
        let elements = u64::try_from(elements).map_err(|_| PickleError::Storage {
            problem: "the number of elements is negative",
        })?;
        Ok(Self {
            kind,
            key,
            elements,
            bytes: &[],
        })
    }

    pub(super) const fn dtype(&self) -> Option<Dtype> {
        match self.kind {
            StorageType::Typed(dtype) => Some(dtype),
            StorageType::Untyped => None,
        }
    }
}

pub(super) fn load(stream: &[u8]) -> Result<Storage<'_>, PickleError> {
    let wrong = |problem| PickleError::Storage { problem };
    let mut machine = Machine::new(stream, true);
    if !matches!(machine.run()?, Value::SaveMagic) {
        return Err(wrong("the stream does not start with torch's magic number"));
    }
    match machine.run()? {
        Value::Int(version) if version == i64::from(SAVE_VERSION) => {}
        _ => return Err(wrong("the stream is not of version 1001")),
    }
    let facts = machine.run()?;
    if machine.little_endian(facts) != Some(true) {
        return Err(wrong("the elements are not declared little-endian"));
    }
    let object = machine.run()?;
    let announced = machine.announced_storage(object);
    let mut storage = announced.ok_or(wrong("the stream holds something else than a storage"))?;
    let keys = machine.run()?;
    match machine.list(keys) {
        [Value::Str(key)] if *key == storage.key => {}
        _ => return Err(wrong("the list of keys does not name the storage")),
    }
    let Some((count, bytes)) = machine.rest().split_first_chunk::<8>() else {
        return Err(wrong("the number of elements is missing"));
    };
    if u64::from_le_bytes(*count) != storage.elements {
        return Err(wrong("two numbers of elements disagree"));
    }
    let needed = storage.elements.checked_mul(storage.kind.item_size());
    if needed != Some(bytes.len() as u64) {
        return Err(wrong("there are more or fewer bytes than elements need"));
    }
    storage.bytes = bytes;
    Ok(storage)
}
