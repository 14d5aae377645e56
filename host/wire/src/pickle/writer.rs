//! Writes a list of dense tensors that Python's `pickle.loads` turns into `list[torch.Tensor]`.

use crate::dtype::Dtype;
use crate::pickle::PickleError;
use crate::pickle::storage::{SAVE_MAGIC, SAVE_VERSION, class_of};

/// Writes tensors given as dtype, shape and row-major little-endian bytes.
///
/// The same tensors always give the same bytes, and memory for exactly these is reserved at
/// once. Dtypes that have a storage class are written as torch itself writes them. For the
/// others (float8, uint16, ...) torch writes an untyped storage that its own `pickle.loads`
/// then fails on (torch 2.15); these go out as a byte storage with the dtype beside it,
/// which it loads.
///
/// # Errors
/// [`PickleError::Length`] if bytes are not what dtype and shape say.
pub fn write_tensors(tensors: &[(Dtype, &[u64], &[u8])]) -> Result<Vec<u8>, PickleError> {
    for (index, (dtype, shape, bytes)) in tensors.iter().enumerate() {
        let needed = dtype.byte_len(shape);
        if needed != Some(bytes.len() as u64) {
            return Err(PickleError::Length {
                index,
                got: bytes.len(),
                needed,
            });
        }
    }
    let mut length = Length(0);
    write_list(&mut length, tensors);
    let mut out = Vec::with_capacity(length.0);
    write_list(&mut out, tensors);
    Ok(out)
}

/// Where bytes go: counted first, written second.
trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

struct Length(usize);

impl Sink for Length {
    fn put(&mut self, bytes: &[u8]) {
        self.0 += bytes.len();
    }
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Memo entries of the names that every tensor uses, in the order they are written.
const REBUILD_V2: u8 = 0;
const REBUILD_V3: u8 = 1;
const LOAD_FROM_BYTES: u8 = 2;
const ORDERED_DICT: u8 = 3;

/// The key of each stream's one storage; torch takes an address.
const KEY: &[u8] = b"X\x01\0\0\x000";

fn write_list(out: &mut impl Sink, tensors: &[(Dtype, &[u64], &[u8])]) {
    out.put(b"\x80\x04]");
    if !tensors.is_empty() {
        let mut named = [false; 4];
        out.put(b"(");
        for (dtype, shape, bytes) in tensors {
            write_tensor(out, &mut named, *dtype, shape, bytes);
        }
        out.put(b"e");
    }
    out.put(b".");
}

fn write_tensor(
    out: &mut impl Sink,
    named: &mut [bool; 4],
    dtype: Dtype,
    shape: &[u64],
    bytes: &[u8],
) {
    let class = class_of(dtype);
    let rebuild = if class.is_some() {
        REBUILD_V2
    } else {
        REBUILD_V3
    };
    write_name(out, named, rebuild);
    out.put(b"(");
    write_name(out, named, LOAD_FROM_BYTES);
    write_storage(out, dtype, bytes);
    // One argument, the call, then the offset 0.
    out.put(b"\x85RK\0(");
    for &dim in shape {
        write_int(out, dim);
    }
    out.put(b"t(");
    for axis in 0..shape.len() {
        // A dimension of 0 counts as 1, as torch does it.
        let inner = shape.get(axis + 1..).unwrap_or_default().iter();
        let stride = inner.fold(1_u64, |stride, &dim| stride.saturating_mul(dim.max(1)));
        write_int(out, stride);
    }
    // No gradient, no hooks.
    out.put(b"t\x89");
    write_name(out, named, ORDERED_DICT);
    out.put(b")R");
    if class.is_none() {
        write_text(out, "torch");
        write_text(out, dtype.torch_name());
        out.put(b"\x93");
    }
    out.put(b"tR");
}

fn write_name(out: &mut impl Sink, named: &mut [bool; 4], index: u8) {
    let (module, name) = match index {
        REBUILD_V2 => ("torch._utils", "_rebuild_tensor_v2"),
        REBUILD_V3 => ("torch._utils", "_rebuild_tensor_v3"),
        LOAD_FROM_BYTES => ("torch.storage", "_load_from_bytes"),
        _ => ("collections", "OrderedDict"),
    };
    match named.get_mut(usize::from(index)) {
        Some(written @ false) => {
            *written = true;
            write_text(out, module);
            write_text(out, name);
            out.put(&[0x93, b'q', index]);
        }
        _ => out.put(&[b'h', index]),
    }
}

/// Names here are shorter than 256 bytes.
fn write_text(out: &mut impl Sink, text: &str) {
    let len = u8::try_from(text.len()).unwrap_or(u8::MAX);
    out.put(&[0x8c, len]);
    out.put(text.as_bytes());
}

fn write_int(out: &mut impl Sink, value: u64) {
    if let Ok(value) = u8::try_from(value) {
        out.put(&[b'K', value]);
    } else if let Ok(value) = i32::try_from(value) {
        out.put(b"J");
        out.put(&value.to_le_bytes());
    } else if let Ok(value) = i64::try_from(value) {
        out.put(&[0x8a, 8]);
        out.put(&value.to_le_bytes());
    } else {
        // Nine bytes, because the topmost bit of the eighth would be a sign.
        out.put(&[0x8a, 9]);
        out.put(&value.to_le_bytes());
        out.put(&[0]);
    }
}

fn write_storage(out: &mut impl Sink, dtype: Dtype, bytes: &[u8]) {
    let (class, item_size) = match class_of(dtype) {
        Some(class) => (class, dtype.item_size()),
        None => ("ByteStorage", 1),
    };
    let elements = bytes.len() as u64 / item_size;
    let mut header = Vec::with_capacity(MAX_HEADER_BYTES);
    write_header(&mut header, class, elements);
    let len = header.len() + bytes.len();
    match u32::try_from(len) {
        Ok(len) => {
            out.put(b"B");
            out.put(&len.to_le_bytes());
        }
        Err(_) => {
            out.put(&[0x8e]);
            out.put(&(len as u64).to_le_bytes());
        }
    }
    out.put(&header);
    out.put(bytes);
}

/// Room for the longest class name and element count.
const MAX_HEADER_BYTES: usize = 256;

fn write_header(out: &mut Vec<u8>, class: &str, elements: u64) {
    out.put(b"\x80\x02\x8a\x0a");
    out.put(SAVE_MAGIC);
    out.put(b".\x80\x02M");
    out.put(&SAVE_VERSION.to_le_bytes());
    out.put(b".\x80\x02}(X\x10\0\0\0protocol_versionM");
    out.put(&SAVE_VERSION.to_le_bytes());
    out.put(b"X\x0d\0\0\0little_endian\x88X\x0a\0\0\0type_sizes}(");
    out.put(b"X\x05\0\0\0shortK\x02X\x03\0\0\0intK\x04X\x04\0\0\0longK\x04uu.");
    out.put(b"\x80\x02(X\x07\0\0\0storagectorch\n");
    out.put(class.as_bytes());
    out.put(b"\n");
    out.put(KEY);
    out.put(b"X\x03\0\0\0cpu");
    write_int(out, elements);
    out.put(b"NtQ.\x80\x02]");
    out.put(KEY);
    out.put(b"a.");
    out.put(&elements.to_le_bytes());
}
