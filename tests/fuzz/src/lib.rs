//! What all fuzz targets share: a bound on what they may hold.
//!
//! libFuzzer can bound single allocations only with a sanitizer's help, so the allocator does it.
#![cfg(feature = "libfuzzer")]
#![forbid(unsafe_code)]

use std::alloc::System;

use cap::Cap;

/// Most bytes that a target may hold at once, libFuzzer's own not counted. An allocation beyond
/// it fails, which ends the process, and libFuzzer keeps the input.
pub const HELD_BYTES: usize = 48 << 20;

/// Longest input that `run.sh` lets libFuzzer make.
pub const INPUT_BYTES: usize = 16 << 10;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, HELD_BYTES);

/// Bytes that the target holds now.
#[must_use]
pub fn held_bytes() -> usize {
    ALLOCATOR.allocated()
}
