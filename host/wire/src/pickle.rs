//! The pickles that clients without shared memory send: `pickle.dumps(list[torch.Tensor])`.
//!
//! LMCache loads them with Python's `pickle.loads`, which runs whatever the peer names
//! (`transfer_context/pickle.py`, `modules/server_transfer.py`). Here a small machine knows
//! the opcodes, names and shapes of exactly this one kind of object; nothing is looked up,
//! imported or called, and all else is an error.
//!
//! Read are protocols 3 to 5 as Python 3.8 and later write them, dense and strided tensors,
//! several views of one storage, and the same tensor twice. Refused are tensors with
//! lazy conjugation or negation, quantised, sparse and subclassed tensors, tensors with
//! Python attributes, and tensors that are larger than the pickle that holds them.

mod machine;
mod storage;
mod tensor;
mod writer;

pub use tensor::{PickledTensor, TensorParts};
pub use writer::write_tensors;

/// Reads a list of tensors. Tensor bytes stay where they are in `data`.
///
/// Memory is bounded by a constant factor of `data`'s length, and far less for real
/// pickles: a few hundred bytes per tensor.
///
/// # Errors
/// [`PickleError`] for anything but one list of tensors that fills `data` exactly.
pub fn read_tensors(data: &[u8]) -> Result<Vec<PickledTensor<'_>>, PickleError> {
    machine::read_tensors(data)
}

/// Why a pickle is not a list of tensors that can be read, or tensors cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PickleError {
    /// The bytes end inside a value.
    #[error("pickle ends at byte {offset}, before its value is complete")]
    Truncated {
        /// Where more was expected.
        offset: usize,
    },
    /// Bytes follow the value.
    #[error("{count} bytes follow the pickled value")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// A protocol before 2 or after 5.
    #[error("pickle protocol {version} is not supported; use the default of Python 3.8 or later")]
    Protocol {
        /// The protocol.
        version: u8,
    },
    /// Protocol 2 writes bytes as text, which cannot be read in place.
    #[error("pickle protocol 2 writes tensor bytes as text; use protocol 3 or later")]
    TextBytes,
    /// An opcode that no pickled list of tensors holds.
    #[error("pickle opcode {opcode:#04x} at byte {offset} has no place in a list of tensors")]
    Opcode {
        /// The opcode.
        opcode: u8,
        /// Where it is.
        offset: usize,
    },
    /// A name that no pickled list of tensors holds. It was not looked up.
    #[error("pickle names `{name}`, which has no place in a list of tensors")]
    Global {
        /// Module and name, shortened and made printable.
        name: String,
    },
    /// Known opcodes in an order that builds no list of tensors.
    #[error("pickle at byte {offset}: {problem}")]
    Malformed {
        /// Where it went wrong.
        offset: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// A list of tensors, but of a kind that a KV cache does not hold.
    #[error("pickled tensor not supported: {what}")]
    Unsupported {
        /// What is not supported.
        what: &'static str,
    },
    /// The header of a tensor's storage disagrees with itself or with its bytes.
    #[error("pickled storage: {problem}")]
    Storage {
        /// What is wrong.
        problem: &'static str,
    },
    /// A tensor that reaches past its storage, or whose size overflows.
    #[error("pickled tensor reaches outside its storage of {storage_bytes} bytes")]
    OutOfBounds {
        /// Bytes of the storage.
        storage_bytes: usize,
    },
    /// More values at once, or a larger tensor, than the pickle's length accounts for.
    #[error("pickle of {input_bytes} bytes expands beyond its own size")]
    Expands {
        /// Bytes of the pickle.
        input_bytes: usize,
    },
    /// Bytes to write that are not what dtype and shape say.
    #[error("tensor {index} has {got} bytes where its dtype and shape need {needed:?}")]
    Length {
        /// Position in the list.
        index: usize,
        /// Bytes given.
        got: usize,
        /// Bytes needed; `None` if the product overflows.
        needed: Option<u64>,
    },
}
