//! Lines of the server's log.

use crate::abi;

/// How urgent a line is; the server's `--log-level` decides what is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Somebody must do something.
    Error,
    /// Something is not as it should be.
    Warn,
    /// What a user wants to know.
    Info,
    /// What an author wants to know.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    fn number(self) -> i32 {
        match self {
            Self::Error => 0,
            Self::Warn => 1,
            Self::Info => 2,
            Self::Debug => 3,
            Self::Trace => 4,
        }
    }

    /// The level of a number of the contract; what lies outside is the nearest one.
    #[must_use]
    pub fn from_number(number: i32) -> Self {
        match number {
            ..=0 => Self::Error,
            1 => Self::Warn,
            2 => Self::Info,
            3 => Self::Debug,
            4.. => Self::Trace,
        }
    }
}

/// Logs a line. The macros [`error!`](crate::error!), [`warn!`](crate::warn!),
/// [`info!`](crate::info!), [`debug!`](crate::debug!) and [`trace!`](crate::trace!) format it.
///
/// Lines over the limits of the manifest are dropped and counted by the server; there is nothing
/// for a plugin to do about it, so nothing is returned.
pub fn log(level: Level, line: &str) {
    let _ = abi::log(level.number(), line);
}

/// Logs a line at [`Level::Error`], formatted as by `format!`.
#[macro_export]
macro_rules! error {
    ($($line:tt)*) => { $crate::log($crate::Level::Error, &::std::format!($($line)*)) };
}

/// Logs a line at [`Level::Warn`], formatted as by `format!`.
#[macro_export]
macro_rules! warn {
    ($($line:tt)*) => { $crate::log($crate::Level::Warn, &::std::format!($($line)*)) };
}

/// Logs a line at [`Level::Info`], formatted as by `format!`.
#[macro_export]
macro_rules! info {
    ($($line:tt)*) => { $crate::log($crate::Level::Info, &::std::format!($($line)*)) };
}

/// Logs a line at [`Level::Debug`], formatted as by `format!`.
#[macro_export]
macro_rules! debug {
    ($($line:tt)*) => { $crate::log($crate::Level::Debug, &::std::format!($($line)*)) };
}

/// Logs a line at [`Level::Trace`], formatted as by `format!`.
#[macro_export]
macro_rules! trace {
    ($($line:tt)*) => { $crate::log($crate::Level::Trace, &::std::format!($($line)*)) };
}
