//! What handlers take from a request; what does not fit becomes a problem that names the field.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use super::problem::Problem;

/// What a client gets to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// A JSON body, whatever media type the client claims; an empty one stands for `{}`.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned + Send + 'static, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let body = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "request-timeout",
                    format!("the body did not come within {BODY_TIMEOUT:?}: send it at once"),
                )
            })?
            .map_err(|rejection| {
                let code = match rejection.status() {
                    StatusCode::PAYLOAD_TOO_LARGE => "body-too-large",
                    _ => "bad-body",
                };
                Problem::new(
                    rejection.status(),
                    code,
                    format!("{}: send less at once", rejection.body_text()),
                )
            })?;
        let is_large = body.len() > super::MAX_BODY_BYTES;
        let parse = move || {
            let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
            serde_json::from_slice(text).map(Self).map_err(|error| {
                Problem::bad_request(
                    "bad-json",
                    format!("the body is not what this takes: {error}"),
                )
            })
        };
        // A million numbers take a while.
        if is_large {
            let parsed = tokio::task::spawn_blocking(parse).await;
            return parsed.map_err(|error| Problem::internal("bad-body", error.to_string()))?;
        }
        parse()
    }
}

/// Query parameters.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        axum::extract::Query::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|rejection| Problem::bad_request("bad-query", rejection.body_text()))
    }
}
