//! The dashboard: three embedded files that ask nothing of any other host.

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse as _, Response},
};

/// Nothing from elsewhere, nothing inline, and no page may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn embedded(media: &'static str, text: &'static str) -> Response {
    let mut response = text.into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, media),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

pub(super) async fn page() -> Response {
    embedded("text/html; charset=utf-8", include_str!("ui/index.html"))
}

pub(super) async fn script() -> Response {
    embedded("text/javascript; charset=utf-8", include_str!("ui/app.js"))
}

pub(super) async fn style() -> Response {
    embedded("text/css; charset=utf-8", include_str!("ui/style.css"))
}
