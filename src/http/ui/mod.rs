//! Pages for a person: is this invoice paid, and how do we know? And for the operator: what waits, what went wrong.
//!
//! Written here, escaped by the template, without a script. They only read: no page changes anything. They are no part of the API,
//! so they are not in `openapi.json`; what they ask for stands in the query, where any id can stand. `session` says who looks,
//! `layout` is the frame, `text` makes what comes from outside harmless to look at; the others are the pages.

mod events;
mod invoice;
mod invoices;
mod layout;
mod operations;
mod session;
pub mod session_token;
mod text;

use std::sync::LazyLock;

use axum::Router;
use axum::body::Body;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use sha2::{Digest, Sha256};

use super::AppState;
use super::error::ApiError;

/// A form with a key and an address in it is not larger.
const FORM_LIMIT: usize = 16 * 1024;

/// Nothing but our style sheet and our forms: what gets past the escaping finds nothing to work with.
const POLICY: &str = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
/// `same-origin`, not `no-referrer`: that would keep browsers from saying where a form comes from, too.
const GUARDS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::REFERRER_POLICY, "same-origin"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
];

/// The style sheet. Its name changes with what is in it, so that it may be kept for ever.
struct Style {
    text: &'static str,
    path: String,
}

static STYLE: LazyLock<Style> = LazyLock::new(|| {
    let text = include_str!("style.css");
    let hash = hex::encode(&Sha256::digest(text)[..8]);
    Style {
        text,
        path: format!("/ui/style-{hash}.css"),
    }
});

pub fn routes() -> Router<AppState> {
    Router::new()
        .route("/ui", get(invoices::list))
        .route("/ui/", get(invoices::list))
        .route("/ui/invoice", get(invoice::show))
        .route("/ui/waiting", get(operations::waiting))
        .route("/ui/unreadable", get(events::unreadable))
        .route("/ui/events", get(events::list))
        .route("/ui/event", get(events::show))
        .route("/ui/reconciliation", get(operations::reconciliation))
        .route("/ui/alarms", get(operations::alarms))
        .route("/ui/sign-in", get(session::ask).post(session::sign_in))
        .route("/ui/sign-out", post(session::sign_out))
        .route(&STYLE.path, get(style))
        .route("/ui/{*other}", get(async || ApiError::NotFound))
        .layer(DefaultBodyLimit::max(FORM_LIMIT))
}

async fn style() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/css; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
    ];
    (headers, STYLE.text).into_response()
}

/// Whether a route, as it stands above, is a page.
pub fn is_page(route: &str) -> bool {
    route == "/ui" || route.starts_with("/ui/")
}

/// What every page's answer goes through: an error is said in a page, too, and browsers are told what pages may do.
pub fn finish(response: &mut Response, error: Option<&ApiError>, request_id: &str) {
    let is_said = |headers: &HeaderMap| headers.contains_key(header::CONTENT_TYPE);
    if let Some(error) = error.filter(|error| error.status() == response.status()) {
        let (title, said) = words(error);
        let page = layout::notice(title, &format!("{said} (Request {request_id}.)"));
        *response.body_mut() = Body::from(page.0);
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_LENGTH);
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        );
        if response.status() == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
    } else if !is_said(response.headers()) {
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
    }
    let headers = response.headers_mut();
    for (name, value) in &GUARDS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
}

/// What a person is told.
fn words(error: &ApiError) -> (&'static str, String) {
    match error {
        ApiError::NotFound => ("Not here", "There is no such page, or nothing that you may see at this address.".to_owned()),
        ApiError::Forbidden => ("For operators", "This page needs an operator's key.".to_owned()),
        ApiError::MethodNotAllowed => ("Not this way", "This page can only be looked at.".to_owned()),
        ApiError::InvalidQuery(reason) | ApiError::InvalidPath(reason) => ("That cannot be asked", format!("{reason}.")),
        ApiError::Unavailable(_) => (
            "The database does not answer",
            "Try again in a moment. Meanwhile deliveries are answered 503 and nothing is lost: Stripe repeats them for three days. For \
             the person on call: the log says why, and `stripe-reconciler doctor` what to do."
                .to_owned(),
        ),
        ApiError::Internal(_) => ("Something went wrong here", "The log says more.".to_owned()),
        _ => ("That could not be read", "Open the page again, and try once more.".to_owned()),
    }
}
