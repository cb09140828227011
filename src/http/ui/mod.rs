//! Web pages. They show whether an invoice is paid and which events prove it; for operators, they
//! also show unmatched events and problems.
//!
//! The template escapes all text, and no page needs a script. All pages are read-only. They are not
//! part of the API, so `openapi.json` omits them. Ids are query parameters, because a path cannot
//! hold every id. `visitor` identifies the visitor, `layout` is the frame, and `text` makes
//! external text safe to display; the other files are the pages.

mod events;
mod invoice;
mod invoices;
mod layout;
mod operations;
mod session;
pub mod session_token;
mod text;
mod visitor;

use std::sync::LazyLock;

use axum::Router;
use axum::body::Body;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use sha2::{Digest, Sha256};

use super::AppState;
use super::error::ApiError;

/// Largest form, in bytes. The sign-in form has a key and an address.
const FORM_LIMIT: usize = 16 * 1024;

/// Content security policy. It allows only our style sheet and our forms, so that injected markup
/// cannot load or send anything.
const POLICY: &str = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; \
                      frame-ancestors 'none'; base-uri 'none'";
/// Headers that restrict pages. The referrer policy is `same-origin`, because with `no-referrer`
/// browsers would not send the origin of a form either.
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

/// The style sheet. Its path contains a hash of its content, so browsers may cache it without
/// limit.
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

/// Returns the routes of all pages.
pub fn routes() -> Router<AppState> {
    Router::new()
        .route("/ui", get(invoices::list))
        .route("/ui/", get(invoices::list))
        .route("/ui/invoice", get(invoice::show))
        .route("/ui/waiting", get(operations::unmatched))
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

/// Serves the style sheet.
async fn style() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/css; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
    ];
    (headers, STYLE.text).into_response()
}

/// Returns whether a route belongs to [`routes`].
pub fn is_page(route: &str) -> bool {
    route == "/ui" || route.starts_with("/ui/")
}

/// Completes the response of a page: renders an error as a page and adds the [`GUARDS`].
pub fn finish(response: &mut Response, error: Option<&ApiError>, request_id: &str) {
    if let Some(error) = error.filter(|error| error.status() == response.status()) {
        let (title, text) = error_text(error);
        let page = layout::notice(title, &format!("{text} (Request {request_id}.)"));
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
    } else if !response.headers().contains_key(header::CONTENT_TYPE) {
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

/// Returns the title and the text of an error page.
fn error_text(error: &ApiError) -> (&'static str, String) {
    match error {
        ApiError::NotFound => (
            "Not found",
            "This page does not exist, or you may not see it.".to_owned(),
        ),
        ApiError::Forbidden => (
            "Operators only",
            "This page needs an operator's key.".to_owned(),
        ),
        ApiError::MethodNotAllowed => ("Method not allowed", "This page is read-only.".to_owned()),
        ApiError::InvalidQuery(reason) | ApiError::InvalidPath(reason) => {
            ("Invalid request", format!("{reason}."))
        }
        ApiError::Unavailable(_) => (
            "The database does not answer",
            "Try again in a moment. Until the database recovers, deliveries get 503 and \
             nothing is lost, because Stripe redelivers for three days. If you are on call: the \
             server log has the cause, and `stripe-reconciler doctor` tells you what to do."
                .to_owned(),
        ),
        ApiError::Internal(_) => (
            "Internal error",
            "The server log has the details.".to_owned(),
        ),
        _ => ("Invalid form", "Open the page again and retry.".to_owned()),
    }
}
