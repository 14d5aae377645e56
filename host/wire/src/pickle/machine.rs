//! The stack machine: the opcodes that a pickled list of tensors is made of, and no others.

use std::sync::Arc;

use crate::dtype::Dtype;
use crate::pickle::storage::{self, Storage, StorageType};
use crate::pickle::{PickleError, PickledTensor};

type Run<T> = Result<T, PickleError>;

/// A value on the machine's stack.
///
/// Containers are numbers of entries in the machine's tables, so values nest without
/// recursion and copy without allocation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Mark,
    None,
    Bool(bool),
    Int(i64),
    /// The integer that opens a legacy `torch.save` stream, too long for [`Self::Int`].
    SaveMagic,
    Str(&'a [u8]),
    Bytes(&'a [u8]),
    Global(Global),
    Tuple(Items),
    List(usize),
    Dict(usize),
    HookDict,
    Storage(usize),
    Tensor(usize),
}

/// A run of entries in the table of tuple items.
#[derive(Clone, Copy, Debug)]
pub(super) struct Items {
    start: u32,
    len: u32,
}

/// The names a pickled list of tensors may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    RebuildTensorV2,
    RebuildTensorV3,
    LoadFromBytes,
    OrderedDict,
    StorageType(StorageType),
    Dtype(Dtype),
}

impl Global {
    fn resolve(module: &[u8], name: &[u8]) -> Run<Self> {
        let name_text = str::from_utf8(name).unwrap_or_default();
        let known = match (module, name) {
            (b"torch._utils", b"_rebuild_tensor_v2") => Some(Self::RebuildTensorV2),
            (b"torch._utils", b"_rebuild_tensor_v3") => Some(Self::RebuildTensorV3),
            (b"torch.storage", b"_load_from_bytes") => Some(Self::LoadFromBytes),
            (b"collections", b"OrderedDict") => Some(Self::OrderedDict),
            (b"torch.storage" | b"torch", b"UntypedStorage") => {
                Some(Self::StorageType(StorageType::Untyped))
            }
            (b"torch", _) => StorageType::named(name_text)
                .map(Self::StorageType)
                .or_else(|| Dtype::parse(name_text).map(Self::Dtype)),
            (b"_codecs", b"encode") => return Err(PickleError::TextBytes),
            _ => None,
        };
        known.ok_or_else(|| PickleError::Global {
            name: format!("{}.{}", shown(module), shown(name)),
        })
    }
}

fn shown(name: &[u8]) -> String {
    const SHOWN_BYTES: usize = 64;
    name.get(..SHOWN_BYTES)
        .unwrap_or(name)
        .escape_ascii()
        .to_string()
}

/// What is kept of a dict: the one entry that matters here.
#[derive(Clone, Copy, Debug, Default)]
struct Dict {
    little_endian: Option<bool>,
    len: usize,
}

/// Runs one pickle after the other off the front of its input.
pub(super) struct Machine<'a> {
    input: &'a [u8],
    position: usize,
    /// Dense tensors may have this many bytes: the length of the outermost pickle.
    max_tensor_bytes: usize,
    /// Inside of a storage's bytes, where no further storage may be loaded.
    inside_storage: bool,
    stack: Vec<Value<'a>>,
    memo: Vec<Value<'a>>,
    items: Vec<Value<'a>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Dict>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<PickledTensor<'a>>,
}

pub(super) fn read_tensors(data: &[u8]) -> Run<Vec<PickledTensor<'_>>> {
    let mut machine = Machine::new(data, false);
    let list = match machine.run()? {
        Value::List(index) => machine
            .lists
            .get(index)
            .map(Vec::as_slice)
            .unwrap_or_default(),
        _ => return Err(machine.malformed("the pickle holds no list")),
    };
    let tensors = list.iter().map(|value| match *value {
        Value::Tensor(index) => machine.tensors.get(index).cloned(),
        _ => None,
    });
    let tensors: Option<Vec<_>> = tensors.collect();
    let tensors = tensors.ok_or_else(|| machine.malformed("the list holds more than tensors"))?;
    match machine.rest().len() {
        0 => Ok(tensors),
        count => Err(PickleError::TrailingBytes { count }),
    }
}

impl<'a> Machine<'a> {
    pub(super) fn new(input: &'a [u8], inside_storage: bool) -> Self {
        Self {
            input,
            position: 0,
            max_tensor_bytes: input.len(),
            inside_storage,
            stack: Vec::new(),
            memo: Vec::new(),
            items: Vec::new(),
            lists: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// What follows the pickles that have run.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.input.get(self.position..).unwrap_or_default()
    }

    pub(super) fn malformed(&self, problem: &'static str) -> PickleError {
        PickleError::Malformed {
            offset: self.position,
            problem,
        }
    }

    /// Runs up to the next STOP and gives the value it leaves.
    pub(super) fn run(&mut self) -> Run<Value<'a>> {
        self.stack.clear();
        self.memo.clear();
        loop {
            let offset = self.position;
            let [opcode] = self.array()?;
            match opcode {
                b'.' => {
                    let value = self.pop()?;
                    return match self.stack.len() {
                        0 => Ok(value),
                        _ => Err(self.malformed("values are left over at its end")),
                    };
                }
                0x80 => self.protocol()?,
                0x95 => self.frame()?,
                b'(' => self.push(Value::Mark)?,
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => {
                    let [value] = self.array()?;
                    self.push(Value::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => self.long()?,
                0x8c => {
                    let [len] = self.array()?;
                    let text = self.take(len.into())?;
                    self.push(Value::Str(text))?;
                }
                b'X' => {
                    let len = self.len32()?;
                    let text = self.take(len)?;
                    self.push(Value::Str(text))?;
                }
                b'C' => {
                    let [len] = self.array()?;
                    let bytes = self.take(len.into())?;
                    self.push(Value::Bytes(bytes))?;
                }
                b'B' => {
                    let len = self.len32()?;
                    let bytes = self.take(len)?;
                    self.push(Value::Bytes(bytes))?;
                }
                0x8e => {
                    let len = self.len64()?;
                    let bytes = self.take(len)?;
                    self.push(Value::Bytes(bytes))?;
                }
                b']' => {
                    self.lists.push(Vec::new());
                    self.push(Value::List(self.lists.len() - 1))?;
                }
                b'}' => {
                    self.dicts.push(Dict::default());
                    self.push(Value::Dict(self.dicts.len() - 1))?;
                }
                b')' => self.tuple_of(self.stack.len())?,
                0x85 => self.tuple_of_last(1)?,
                0x86 => self.tuple_of_last(2)?,
                0x87 => self.tuple_of_last(3)?,
                b't' => {
                    let first = self.pop_mark()?;
                    self.tuple_of(first)?;
                }
                0x94 => self.memoize(self.memo.len())?,
                b'q' => {
                    let [index] = self.array()?;
                    self.memoize(index.into())?;
                }
                b'r' => {
                    let index = self.len32()?;
                    self.memoize(index)?;
                }
                b'h' => {
                    let [index] = self.array()?;
                    self.recall(index.into())?;
                }
                b'j' => {
                    let index = self.len32()?;
                    self.recall(index)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.push(Value::Global(Global::resolve(module, name)?))?;
                }
                0x93 => self.stack_global()?,
                b'R' => self.reduce()?,
                b'Q' => self.persistent_id()?,
                b'a' => self.append(self.stack.len().saturating_sub(1))?,
                b'e' => {
                    let first = self.pop_mark()?;
                    self.append(first)?;
                }
                b's' => self.set_items(self.stack.len().saturating_sub(2))?,
                b'u' => {
                    let first = self.pop_mark()?;
                    self.set_items(first)?;
                }
                _ => return Err(PickleError::Opcode { opcode, offset }),
            }
        }
    }

    fn truncated(&self) -> PickleError {
        PickleError::Truncated {
            offset: self.input.len(),
        }
    }

    fn take(&mut self, count: usize) -> Run<&'a [u8]> {
        let end = self.position.checked_add(count);
        let taken = end.and_then(|end| self.input.get(self.position..end));
        let taken = taken.ok_or_else(|| self.truncated())?;
        self.position += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Run<[u8; N]> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| self.truncated())
    }

    fn len32(&mut self) -> Run<usize> {
        let len = u32::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| self.truncated())
    }

    fn len64(&mut self) -> Run<usize> {
        let len = u64::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| self.truncated())
    }

    /// Text up to the end of the line, as the GLOBAL opcode has it.
    fn line(&mut self) -> Run<&'a [u8]> {
        let end = self.rest().iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or_else(|| self.truncated())?)?;
        self.take(1)?;
        Ok(line)
    }

    fn protocol(&mut self) -> Run<()> {
        match self.array()? {
            [2..=5] => Ok(()),
            [version] => Err(PickleError::Protocol { version }),
        }
    }

    /// Frames only group opcodes for reading from a file; their bytes just follow.
    fn frame(&mut self) -> Run<()> {
        let len = self.len64()?;
        if len > self.rest().len() {
            return Err(self.truncated());
        }
        Ok(())
    }

    fn long(&mut self) -> Run<()> {
        let [len] = self.array()?;
        let bytes = self.take(len.into())?;
        if bytes == storage::SAVE_MAGIC {
            return self.push(Value::SaveMagic);
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        let Some(low) = wide.get_mut(..bytes.len()) else {
            return Err(self.malformed("an integer is longer than 64 bits"));
        };
        low.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    /// Real pickles keep at most 1 000 list entries and a dozen values on the stack, or all
    /// tensors of [`write_tensors`](super::write_tensors) at some 300 bytes each.
    fn push(&mut self, value: Value<'a>) -> Run<()> {
        if self.stack.len() >= 2048 + self.input.len() / 64 {
            return Err(self.expands());
        }
        self.stack.push(value);
        Ok(())
    }

    fn expands(&self) -> PickleError {
        PickleError::Expands {
            input_bytes: self.input.len(),
        }
    }

    fn pop(&mut self) -> Run<Value<'a>> {
        match self.stack.pop() {
            Some(Value::Mark) | None => Err(self.malformed("a value is missing")),
            Some(value) => Ok(value),
        }
    }

    /// Takes the topmost mark out and gives the position of the first value above it.
    fn pop_mark(&mut self) -> Run<usize> {
        let is_mark = |value: &Value<'_>| matches!(value, Value::Mark);
        let Some(mark) = self.stack.iter().rposition(is_mark) else {
            return Err(self.malformed("a mark is missing"));
        };
        self.stack.remove(mark);
        Ok(mark)
    }

    fn tuple_of_last(&mut self, count: usize) -> Run<()> {
        let first = self.stack.len().checked_sub(count);
        let first = first.ok_or_else(|| self.malformed("a tuple's value is missing"))?;
        self.tuple_of(first)
    }

    /// Makes a tuple of the values from `first` up.
    fn tuple_of(&mut self, first: usize) -> Run<()> {
        let above = self.stack.get(first..).unwrap_or_default();
        if above.iter().any(|value| matches!(value, Value::Mark)) {
            return Err(self.malformed("a mark is inside a tuple"));
        }
        let (Ok(start), Ok(len)) = (u32::try_from(self.items.len()), u32::try_from(above.len()))
        else {
            return Err(self.expands());
        };
        self.items.extend_from_slice(above);
        self.stack.truncate(first);
        self.push(Value::Tuple(Items { start, len }))
    }

    /// The values of a tuple.
    fn items(&self, items: Items) -> &[Value<'a>] {
        let start = items.start as usize;
        let end = start + items.len as usize;
        self.items.get(start..end).unwrap_or_default()
    }

    /// Real pickles memoise some ten values in 300 bytes and number them one after the other.
    fn memoize(&mut self, index: usize) -> Run<()> {
        let value = match self.stack.last() {
            Some(Value::Mark) | None => return Err(self.malformed("a value is missing")),
            Some(value) => *value,
        };
        if index >= 64 + self.input.len() / 8 {
            return Err(self.expands());
        }
        if index >= self.memo.len() {
            self.memo.resize(index + 1, Value::Mark);
        }
        if let Some(entry) = self.memo.get_mut(index) {
            *entry = value;
        }
        Ok(())
    }

    fn recall(&mut self, index: usize) -> Run<()> {
        match self.memo.get(index) {
            Some(Value::Mark) | None => Err(self.malformed("a memo entry is missing")),
            Some(&value) => self.push(value),
        }
    }

    fn stack_global(&mut self) -> Run<()> {
        match (self.pop()?, self.pop()?) {
            (Value::Str(name), Value::Str(module)) => {
                self.push(Value::Global(Global::resolve(module, name)?))
            }
            _ => Err(self.malformed("a name is not text")),
        }
    }

    fn reduce(&mut self) -> Run<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Global(callable)) = (arguments, callable) else {
            return Err(self.malformed("a call needs a name and a tuple"));
        };
        let value = match callable {
            Global::OrderedDict if arguments.len == 0 => Value::HookDict,
            Global::LoadFromBytes => self.load_storage(arguments)?,
            Global::RebuildTensorV2 | Global::RebuildTensorV3 => {
                let tensor = self.rebuild(callable, arguments)?;
                self.tensors.push(tensor);
                Value::Tensor(self.tensors.len() - 1)
            }
            _ => return Err(self.malformed("a name that cannot be called is called")),
        };
        self.push(value)
    }

    fn load_storage(&mut self, arguments: Items) -> Run<Value<'a>> {
        let &[Value::Bytes(bytes)] = self.items(arguments) else {
            return Err(self.malformed("a storage is loaded from something else than bytes"));
        };
        if self.inside_storage {
            return Err(self.malformed("a storage is inside of a storage"));
        }
        self.storages.push(storage::load(bytes)?);
        Ok(Value::Storage(self.storages.len() - 1))
    }

    /// `torch._utils._rebuild_tensor_v2`, and `_v3` for the dtypes without a storage class.
    fn rebuild(&self, callable: Global, arguments: Items) -> Run<PickledTensor<'a>> {
        let (given, dtype, metadata) = match (callable, self.items(arguments)) {
            (Global::RebuildTensorV2, [given @ .., metadata]) if given.len() == 6 => {
                (given, None, Some(metadata))
            }
            (Global::RebuildTensorV2, given) if given.len() == 6 => (given, None, None),
            (Global::RebuildTensorV3, [given @ .., dtype, metadata]) if given.len() == 6 => {
                (given, Some(dtype), Some(metadata))
            }
            (Global::RebuildTensorV3, [given @ .., dtype]) if given.len() == 6 => {
                (given, Some(dtype), None)
            }
            _ => return Err(self.malformed("a tensor has the wrong number of arguments")),
        };
        let &[
            Value::Storage(storage),
            Value::Int(offset),
            Value::Tuple(shape),
            Value::Tuple(strides),
            Value::Bool(_requires_grad),
            Value::HookDict,
        ] = given
        else {
            return Err(self.malformed("a tensor's arguments are of other types"));
        };
        let storage = self.storages.get(storage);
        let storage = storage.ok_or_else(|| self.malformed("a storage is missing"))?;
        self.check_metadata(metadata)?;
        let dtype = match (dtype, storage.dtype()) {
            (None, Some(dtype)) | (Some(&Value::Global(Global::Dtype(dtype))), _) => dtype,
            _ => return Err(self.malformed("a tensor has no dtype")),
        };
        let offset = u64::try_from(offset).map_err(|_| self.malformed("an offset is negative"))?;
        PickledTensor::new(
            dtype,
            storage.bytes,
            offset,
            self.sizes(shape)?,
            self.sizes(strides)?,
            self.max_tensor_bytes,
        )
    }

    /// Metadata tells that the elements are to be conjugated or negated when read.
    fn check_metadata(&self, metadata: Option<&Value<'a>>) -> Run<()> {
        match metadata {
            None | Some(Value::None) => Ok(()),
            Some(&Value::Dict(dict)) if self.dicts.get(dict).is_some_and(|dict| dict.len == 0) => {
                Ok(())
            }
            Some(_) => Err(PickleError::Unsupported {
                what: "lazy conjugation or negation; resolve it before sending",
            }),
        }
    }

    fn sizes(&self, sizes: Items) -> Run<Arc<[u64]>> {
        let size = |value: &Value<'_>| match *value {
            Value::Int(size) => u64::try_from(size).ok(),
            _ => None,
        };
        let sizes: Option<Arc<[u64]>> = self.items(sizes).iter().map(size).collect();
        sizes.ok_or_else(|| self.malformed("a shape or stride is not a positive number"))
    }

    /// The reference from the legacy stream's object to the storage that follows it.
    fn persistent_id(&mut self) -> Run<()> {
        let Value::Tuple(id) = self.pop()? else {
            return Err(self.malformed("a persistent id is no tuple"));
        };
        let &[
            Value::Str(b"storage"),
            Value::Global(Global::StorageType(kind)),
            Value::Str(key),
            Value::Str(location),
            Value::Int(elements),
            Value::None,
        ] = self.items(id)
        else {
            return Err(self.malformed("a persistent id is not that of a whole storage"));
        };
        if location != b"cpu" {
            return Err(PickleError::Unsupported {
                what: "storage on a device; copy to the CPU before sending",
            });
        }
        self.storages.push(Storage::announced(kind, key, elements)?);
        self.push(Value::Storage(self.storages.len() - 1))
    }

    /// The storage that the legacy stream's object announced.
    pub(super) fn announced_storage(&self, value: Value<'a>) -> Option<Storage<'a>> {
        match value {
            Value::Storage(index) => self.storages.get(index).copied(),
            _ => None,
        }
    }

    /// The entries of a list.
    pub(super) fn list(&self, value: Value<'a>) -> &[Value<'a>] {
        match value {
            Value::List(index) => self.lists.get(index).map(Vec::as_slice).unwrap_or_default(),
            _ => &[],
        }
    }

    /// What a dict says of `little_endian`.
    pub(super) fn little_endian(&self, value: Value<'a>) -> Option<bool> {
        match value {
            Value::Dict(index) => self.dicts.get(index)?.little_endian,
            _ => None,
        }
    }

    /// Moves the values from `first` up to the end of the list below them.
    fn append(&mut self, first: usize) -> Run<()> {
        let (below, values) = self.stack.split_at_checked(first).unwrap_or_default();
        let Some(&Value::List(list)) = below.last() else {
            return Err(self.malformed("values are appended to something else than a list"));
        };
        if !values
            .iter()
            .all(|value| matches!(value, Value::Tensor(_) | Value::Str(_)))
        {
            return Err(self.malformed("a list holds something else than tensors"));
        }
        if let Some(list) = self.lists.get_mut(list) {
            list.extend_from_slice(values);
        }
        self.stack.truncate(first);
        Ok(())
    }

    /// Takes the keys and values from `first` up into the dict below them.
    fn set_items(&mut self, first: usize) -> Run<()> {
        let (below, values) = self.stack.split_at_checked(first).unwrap_or_default();
        let Some(&Value::Dict(dict)) = below.last() else {
            return Err(self.malformed("entries are put into something else than a dict"));
        };
        let (entries, []) = values.as_chunks::<2>() else {
            return Err(self.malformed("a dict entry has no value"));
        };
        if let Some(dict) = self.dicts.get_mut(dict) {
            dict.len += entries.len();
            for entry in entries {
                if let [Value::Str(b"little_endian"), Value::Bool(little)] = *entry {
                    dict.little_endian = Some(little);
                }
            }
        }
        self.stack.truncate(first);
        Ok(())
    }
}
