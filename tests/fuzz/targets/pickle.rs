//! Pickles from a stranger: nothing panics, tensors are views of what arrived, and what is read
//! can be written and read again.
#![no_main]
#![allow(clippy::expect_used, reason = "a target fails by panicking")]

use libfuzzer_sys::fuzz_target;
use stockade_fuzz as _;
use stockade_wire::{read_tensors, write_tensors};

/// Elements may overlap, so a tensor can be larger than its storage; this much is copied.
const COPIED_BYTES: u64 = 1 << 16;

fuzz_target!(|input: &[u8]| {
    let Ok(tensors) = read_tensors(input) else {
        return;
    };
    let total: u64 = tensors
        .iter()
        .map(|tensor| tensor.byte_len())
        .fold(0, u64::saturating_add);
    if total > COPIED_BYTES {
        return;
    }
    let copies: Vec<(_, Vec<u64>, Vec<u8>)> = tensors
        .iter()
        .map(|tensor| {
            let bytes: Vec<u8> = tensor.parts().flatten().copied().collect();
            assert_eq!(bytes.len() as u64, tensor.byte_len());
            (tensor.dtype, tensor.shape.to_vec(), bytes)
        })
        .collect();
    let borrowed: Vec<_> = copies
        .iter()
        .map(|(dtype, shape, bytes)| (*dtype, &shape[..], &bytes[..]))
        .collect();
    let Ok(written) = write_tensors(&borrowed) else {
        return;
    };
    let again = read_tensors(&written).expect("our own pickle is read");
    assert_eq!(again.len(), copies.len());
    for (tensor, (dtype, shape, bytes)) in again.iter().zip(&copies) {
        assert_eq!((tensor.dtype, &*tensor.shape), (*dtype, &shape[..]));
        let read: Vec<u8> = tensor.parts().flatten().copied().collect();
        assert_eq!(&read, bytes);
    }
});
