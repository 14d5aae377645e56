//! Reads pickled lists of tensors on standard input, writes them as this crate pickles them.
//!
//! Each message is eight bytes of little-endian length, then the pickle. A pickle that is
//! refused is answered with a length whose topmost bit is set, and the reason as text.
//! `tests/torch_roundtrip.py` drives it against the real torch.

use std::io::{self, Read, Write};

use stockade_wire::{PickleError, read_tensors, write_tensors};

const REFUSED: u64 = 1 << 63;

fn main() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut length = [0; 8];
    while let Ok(()) = input.read_exact(&mut length) {
        let mut pickle = Vec::new();
        (&mut input)
            .take(u64::from_le_bytes(length))
            .read_to_end(&mut pickle)?;
        let (flag, answer) = match rewrite(&pickle) {
            Ok(pickle) => (0, pickle),
            Err(error) => (REFUSED, error.to_string().into_bytes()),
        };
        output.write_all(&(answer.len() as u64 | flag).to_le_bytes())?;
        output.write_all(&answer)?;
        output.flush()?;
    }
    Ok(())
}

fn rewrite(pickle: &[u8]) -> Result<Vec<u8>, PickleError> {
    let tensors = read_tensors(pickle)?;
    let dense: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| tensor.parts().flatten().copied().collect())
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .zip(&dense)
        .map(|(tensor, bytes)| (tensor.dtype, &*tensor.shape, bytes.as_slice()))
        .collect();
    write_tensors(&tensors)
}
