//! Errors as RFC 9457 bodies, also those that no handler made.

use axum::{
    body::{Body, to_bytes},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;
use stockade_sandbox::SupervisorError;

/// Media type of a problem.
const PROBLEM_JSON: &str = "application/problem+json";
/// Longest text of a rejection that becomes a detail.
const MAX_DETAIL_BYTES: usize = 4 << 10;

/// What went wrong: a stable code for programs, and a sentence for the person who reads it.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
        }
    }

    pub(crate) fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    pub(crate) fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, detail)
    }

    pub(crate) fn internal(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, code, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": format!("urn:stockade:problem:{}", self.code),
            "title": self.status.canonical_reason(),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
            // LMCache's own clients look for the sentence here.
            "error": self.detail,
        });
        let mut response = (self.status, body.to_string()).into_response();
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"stockade\""),
            );
        }
        response
    }
}

impl From<SupervisorError> for Problem {
    fn from(error: SupervisorError) -> Self {
        let (status, code) = match error {
            SupervisorError::NotFound(_) => (StatusCode::NOT_FOUND, "plugin-not-found"),
            SupervisorError::Busy(_) => (StatusCode::CONFLICT, "plugin-busy"),
            SupervisorError::NotReloaded { .. } => (StatusCode::CONFLICT, "plugin-not-reloaded"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "plugin-error"),
        };
        Self::new(status, code, error.to_string())
    }
}

/// Turns rejections that axum made (bad JSON, bad query, wrong method, too large) into problems.
///
/// Answers that a handler made have a JSON type already and pass as they are.
pub(crate) async fn normalise(response: Response) -> Response {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("json"));
    if is_json {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = to_bytes(Body::new(body), MAX_DETAIL_BYTES)
        .await
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().replace('\n', " ");
    let code = match status {
        StatusCode::METHOD_NOT_ALLOWED => "method-not-allowed",
        StatusCode::PAYLOAD_TOO_LARGE => "body-too-large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported-media-type",
        StatusCode::REQUEST_TIMEOUT => "request-timeout",
        status if status.is_client_error() => "bad-request",
        _ => "server-error",
    };
    let detail = match (status, text.is_empty()) {
        (StatusCode::METHOD_NOT_ALLOWED, _) => {
            let allowed = parts.headers.get(header::ALLOW);
            let allowed = allowed
                .and_then(|value| value.to_str().ok())
                .unwrap_or("another method");
            format!("this route does not answer to the method: use {allowed}")
        }
        (_, false) => text,
        (_, true) => status.canonical_reason().unwrap_or("failed").to_owned(),
    };
    let mut problem = Problem::new(status, code, detail).into_response();
    if let Some(allow) = parts.headers.get(header::ALLOW) {
        problem.headers_mut().insert(header::ALLOW, allow.clone());
    }
    problem
}
