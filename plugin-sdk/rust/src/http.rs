//! HTTP to the addresses that the manifest's `[[http]]` tables grant.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    Result, abi,
    abi::milliseconds,
    error::{answered, length, parsed, written},
};

/// How much of a body is read at once, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// A request. It is sent by [`Request::send`], which waits for the response's head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Such as `GET`.
    pub method: String,
    /// With `http://` or `https://`.
    pub url: String,
    /// Names in any case. `Host` and `Content-Length` are the server's.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Milliseconds that it may take, at most the manifest's `http_timeout_ms`; that is also what
    /// holds where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<i32>,
    /// What is sent, at most the manifest's `http_body_kib`.
    #[serde(skip)]
    pub body: Vec<u8>,
}

impl Request {
    /// A request of any method.
    #[must_use]
    pub fn new(method: &str, url: impl Into<String>) -> Self {
        Self {
            method: method.to_owned(),
            url: url.into(),
            headers: BTreeMap::new(),
            timeout_ms: None,
            body: Vec::new(),
        }
    }

    /// A GET.
    #[must_use]
    pub fn get(url: impl Into<String>) -> Self {
        Self::new("GET", url)
    }

    /// A POST of `body`.
    #[must_use]
    pub fn post(url: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self::new("POST", url).body(body)
    }

    /// A PUT of `body`.
    #[must_use]
    pub fn put(url: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self::new("PUT", url).body(body)
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// With another body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// With a time of its own.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout_ms = Some(milliseconds(timeout));
        self
    }

    /// Sends it. A status of 400 or more is a response, not an error.
    ///
    /// # Errors
    /// [`ErrorCode::Denied`](crate::ErrorCode::Denied) for an address that is not granted,
    /// [`Limit`](crate::ErrorCode::Limit) when there were too many requests or the body is too long,
    /// [`Timeout`](crate::ErrorCode::Timeout), and [`Unavailable`](crate::ErrorCode::Unavailable)
    /// when nobody answers.
    pub fn send(&self) -> Result<Response> {
        let head = answered(abi::http_request(&written(self)?, &self.body))?;
        parsed(&head, "the head of a response")
    }
}

/// A response's head. Its body waits at the server until [`Response::body`] reads it, or the next
/// request is sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Length of the body.
    pub body_bytes: u64,
}

impl Response {
    /// Whether the status is 200 to 299.
    #[must_use]
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Reads the body.
    ///
    /// # Errors
    /// [`ErrorCode::State`](crate::ErrorCode::State) when another request was sent since.
    pub fn body(self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match length(abi::http_body_read(&mut piece))? {
                0 => return Ok(body),
                copied => body.extend(piece.iter().take(copied)),
            }
        }
    }
}
