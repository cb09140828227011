//! What every request goes through: an id, a time limit, a line in the log, and the body of an error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{Instrument, Level, Span, field};
use uuid::Uuid;

use super::error::{ApiError, of_status};
use super::server::connection::ConnectionState;
use super::ui;
use crate::metrics::Metrics;
use crate::telemetry;

/// How long a request may take, its body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub async fn request(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    // Ours, whatever the client sends: it is what support is asked about.
    let id = Uuid::now_v7().to_string();
    let method = request.method().clone();
    // The pattern: a path may hold what does not belong into a log.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", MatchedPath::as_str)
        .to_owned();
    let place = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let span = span(&id, &method, &route, request.headers());
    let answered = tokio::time::timeout(REQUEST_TIMEOUT, next.run(request))
        .instrument(span.clone())
        .await;
    let mut response = answered.unwrap_or_else(|_| too_long(place.as_deref()).into_response());

    if let Some(StatusBeforeCompression(status)) = response.extensions_mut().remove() {
        *response.status_mut() = status;
    }
    let told = response.extensions_mut().remove::<ApiError>();
    let is_page = ui::is_page(&route);
    // A page may say itself what went wrong.
    let says_itself = is_page && response.headers().contains_key(header::CONTENT_TYPE);
    let error = told.or_else(|| of_status(response.status()).filter(|_| !says_itself));
    match &error {
        error if is_page => ui::finish(&mut response, error.as_ref(), &id),
        Some(error) => error.fill(&mut response, &id),
        None => {}
    }
    weaken_etag(&mut response);
    let id = HeaderValue::from_str(&id).expect("a UUID is a header value");
    response.headers_mut().insert(&REQUEST_ID, id);

    let status = response.status().as_u16();
    if (method == Method::GET || method == Method::HEAD) && route.starts_with("/v1/") {
        metrics.read(&route, response.status().as_str(), started.elapsed());
    }
    let duration_ms = started.elapsed().as_millis() as u64;
    span.record("http.response.status_code", status);
    if response.status().is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    let _entered = span.enter();
    match error.as_ref().and_then(ApiError::reason) {
        Some(reason) => {
            tracing::error!(%method, route, status, duration_ms, reason, "request failed")
        }
        // A line for each of thousands of deliveries a second would cost more than they do.
        None => tracing::debug!(%method, route, status, duration_ms, "request"),
    }
    response
}

/// What was answered, before compression looked at it. Where the client takes no encoding that there is, that makes a 406 of it,
/// whatever has been done already: such a client gets the answer as it is.
#[derive(Clone)]
struct StatusBeforeCompression(StatusCode);

/// Within the compression.
pub async fn note_status(request: Request, next: Next) -> Response {
    let is_negotiated = request.headers().contains_key(header::ACCEPT_ENCODING);
    let mut response = next.run(request).await;
    if is_negotiated {
        let given = StatusBeforeCompression(response.status());
        response.extensions_mut().insert(given);
    }
    response
}

/// What a collector wants to know of a request costs more than a delivery does: without one, the id will do.
fn span(id: &str, method: &Method, route: &str, headers: &HeaderMap) -> Span {
    if !tracing::enabled!(Level::DEBUG) {
        return tracing::info_span!("request", request.id = id);
    }
    let span = tracing::info_span!(
        "request",
        request.id = id,
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        http.request.method = %method,
        http.route = route,
        http.response.status_code = field::Empty,
        otel.status_code = field::Empty,
    );
    telemetry::continue_trace(&span, headers);
    span
}

/// Whose fault it is: the peer's, as long as its body is under way.
fn too_long(place: Option<&ConnectionState>) -> ApiError {
    match place {
        Some(place) if place.is_reading_body() => ApiError::TooSlow,
        _ => ApiError::Unavailable("the request took too long".to_owned()),
    }
}

/// A compressed answer is another sequence of bytes than the one that its strong tag names.
fn weaken_etag(response: &mut Response) {
    let headers = response.headers_mut();
    if !headers.contains_key(header::CONTENT_ENCODING) {
        return;
    }
    let strong = headers
        .get(header::ETAG)
        .and_then(|tag| tag.to_str().ok())
        .filter(|tag| !tag.starts_with("W/"));
    if let Some(weak) = strong.and_then(|tag| HeaderValue::from_str(&format!("W/{tag}")).ok()) {
        headers.insert(header::ETAG, weak);
    }
}
