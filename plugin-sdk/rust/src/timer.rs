//! Timers: each has a name, and comes as a [`Timer`](crate::Timer) message.

use std::time::Duration;

use crate::{ErrorCode, Result, abi, abi::milliseconds, error::done};

/// Starts a timer that comes once, or replaces the one of that name.
///
/// # Errors
/// [`ErrorCode::Limit`] when the plugin has too many timers, [`ErrorCode::Invalid`] for a name that
/// is empty or too long.
pub fn once(name: &str, after: Duration) -> Result<()> {
    done(abi::timer_set(name, milliseconds(after), 0))
}

/// Starts a timer that comes at once and then again and again, or replaces the one of that name.
/// Turns that the plugin is too slow for are left out, not made up for.
///
/// # Errors
/// As [`once`]; `every` below a millisecond is [`ErrorCode::Invalid`].
pub fn every(name: &str, every: Duration) -> Result<()> {
    every_after(name, Duration::ZERO, every)
}

/// As [`every()`], but comes for the first time after `first`.
///
/// # Errors
/// As [`every()`].
pub fn every_after(name: &str, first: Duration, every: Duration) -> Result<()> {
    if every < Duration::from_millis(1) {
        return Err(crate::Error::new(
            ErrorCode::Invalid,
            format!("timer `{name}`: `every` must be at least a millisecond"),
        ));
    }
    done(abi::timer_set(
        name,
        milliseconds(first),
        milliseconds(every),
    ))
}

/// Ends a timer; tells whether there was one.
///
/// # Errors
/// [`ErrorCode::Invalid`] for a name that no timer can have.
pub fn cancel(name: &str) -> Result<bool> {
    match done(abi::timer_cancel(name)) {
        Ok(()) => Ok(true),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
