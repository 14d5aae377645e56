//! The plugin's own key-value state, which survives its restarts. Needs `state_kib` above 0 in the
//! manifest's `[limits]`; keys and values together count.

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    Error, ErrorCode, Result, abi,
    error::{answered, done, parsed, written},
};

fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of a key, if there is one.
///
/// # Errors
/// [`ErrorCode::Denied`] without the grant.
pub fn get(key: &str) -> Result<Option<Vec<u8>>> {
    found(answered(abi::state_get(key)))
}

/// Sets the value of a key.
///
/// # Errors
/// [`ErrorCode::Denied`] without the grant, [`ErrorCode::Limit`] when `state_kib` would be exceeded.
pub fn set(key: &str, value: &[u8]) -> Result<()> {
    done(abi::state_set(key, value))
}

/// Removes a key; tells whether it was there.
///
/// # Errors
/// [`ErrorCode::Denied`] without the grant.
pub fn delete(key: &str) -> Result<bool> {
    Ok(found(done(abi::state_delete(key)))?.is_some())
}

/// The keys that begin with `prefix`, in order.
///
/// # Errors
/// [`ErrorCode::Denied`] without the grant.
pub fn keys(prefix: &str) -> Result<Vec<String>> {
    parsed(&answered(abi::state_keys(prefix))?, "the list of keys")
}

/// The value of a key, kept as JSON by [`set_json`].
///
/// # Errors
/// As [`get`]; [`ErrorCode::Invalid`] when the value is no `T`.
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>> {
    let Some(value) = get(key)? else {
        return Ok(None);
    };
    serde_json::from_slice(&value).map(Some).map_err(|error| {
        let reason = format!("state `{key}` is not what is asked for: {error}");
        Error::new(ErrorCode::Invalid, reason)
    })
}

/// Sets the value of a key, as JSON.
///
/// # Errors
/// As [`set`]; [`ErrorCode::Invalid`] for what cannot be JSON.
pub fn set_json(key: &str, value: &impl Serialize) -> Result<()> {
    set(key, &written(value)?)
}
