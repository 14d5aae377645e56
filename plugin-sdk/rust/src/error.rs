//! What the server answers where a call does not succeed.

use std::fmt;

use crate::abi;

/// What calls return.
pub type Result<T> = std::result::Result<T, Error>;

/// The kinds of refusals of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The manifest or the server's file does not grant it.
    Denied,
    /// An argument is not what the contract says.
    Invalid,
    /// There is no such key, timer or object.
    NotFound,
    /// One of the plugin's own limits is used up.
    Limit,
    /// It took longer than it may.
    Timeout,
    /// The other side could not be reached, or there is none.
    Unavailable,
    /// The call makes no sense now.
    State,
    /// A number that this version of the crate does not know, or an answer that it cannot read.
    Unknown(i32),
}

impl ErrorCode {
    pub(crate) fn from_number(number: i32) -> Self {
        match number {
            -1 => Self::Denied,
            -2 => Self::Invalid,
            -3 => Self::NotFound,
            -4 => Self::Limit,
            -5 => Self::Timeout,
            -6 => Self::Unavailable,
            -7 => Self::State,
            other => Self::Unknown(other),
        }
    }

    /// The number that the contract has for it.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Denied => -1,
            Self::Invalid => -2,
            Self::NotFound => -3,
            Self::Limit => -4,
            Self::Timeout => -5,
            Self::Unavailable => -6,
            Self::State => -7,
            Self::Unknown(number) => number,
        }
    }
}

/// A call that did not succeed: its kind, and the server's sentence for the author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    code: ErrorCode,
    message: String,
}

impl Error {
    /// An error of `code`; for doubles, which answer as the server would.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }

    /// The kind.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The reason as a sentence. For [`ErrorCode::Denied`], it names the line to add to the manifest.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message.is_empty() {
            true => write!(out, "the server refused the call: {:?}", self.code),
            false => out.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

/// The result of a call that has no answer.
pub(crate) fn done(result: i32) -> Result<()> {
    length(result).map(drop)
}

/// The result of a call that answers: the bytes of it.
pub(crate) fn answered(result: i32) -> Result<Vec<u8>> {
    length(result).map(abi::answer)
}

/// The number that a call came back with, where it is none of an error.
pub(crate) fn length(result: i32) -> Result<usize> {
    usize::try_from(result).map_err(|_| {
        let reason = abi::answer(usize::try_from(abi::answer_length()).unwrap_or_default());
        let reason = String::from_utf8_lossy(&reason).into_owned();
        Error::new(ErrorCode::from_number(result), reason)
    })
}

/// Reads JSON of the server.
pub(crate) fn parsed<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::new(
            ErrorCode::Unknown(0),
            format!("{what} of the server is not what this crate knows: {error}"),
        )
    })
}

/// Writes JSON for the server.
pub(crate) fn written(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::new(ErrorCode::Invalid, format!("it cannot be JSON: {error}")))
}
