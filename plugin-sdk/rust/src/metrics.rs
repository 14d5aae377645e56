//! Metrics of the plugin's own, which the server shows at `/metrics` as
//! `stockade_plugin_custom_total{plugin,name}` and `stockade_plugin_custom_gauge{plugin,name}`. The
//! manifest's `metrics` limits how many names there are; each is a counter or a gauge for good.

use crate::{Result, abi, error::done};

/// Adds to a counter.
///
/// # Errors
/// [`ErrorCode::Limit`](crate::ErrorCode::Limit) for a further name when there are too many,
/// [`ErrorCode::Invalid`](crate::ErrorCode::Invalid) for a name of other than `a-z`, `0-9` and
/// `_`, a letter first, or a value that is negative or no number.
pub fn add(name: &str, value: f64) -> Result<()> {
    done(abi::metric_add(name, value))
}

/// Sets a gauge.
///
/// # Errors
/// As [`add`], but a gauge may be negative.
pub fn set(name: &str, value: f64) -> Result<()> {
    done(abi::metric_set(name, value))
}
