//! The imports of `stockade:plugin/v1`, one function each, without the pointers.
//!
//! Results are as the contract has them: at least 0 is success, below 0 a code. On other targets
//! than `wasm32` the same functions ask the double that [`crate::testing`] installs.

#[cfg(target_arch = "wasm32")]
mod imports;
#[cfg(target_arch = "wasm32")]
pub(crate) use imports::*;

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use crate::testing::abi::*;

/// A time as the contract has it: milliseconds, at most what fits.
pub(crate) fn milliseconds(time: std::time::Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}
