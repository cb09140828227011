//! The middleware of every request: a request id, a time limit, a log line, and the body of an
//! error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{Instrument, Level, Span, field};
use uuid::Uuid;

use super::error::{ApiError, from_status};
use super::server::connection::ConnectionState;
use super::ui;
use crate::metrics::Metrics;
use crate::telemetry;

/// Longest time for a request, its body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Runs a request within its time limit, then completes, counts and logs the response.
pub async fn request(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    // Ignore an id that the client sends: support looks up our own id in our log.
    let id = Uuid::now_v7().to_string();
    let method = request.method().clone();
    // The pattern, because a path may hold personal data that must not reach the log.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", MatchedPath::as_str)
        .to_owned();
    let connection = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let span = span(&id, &method, &route, request.headers());

    let run = async {
        if has_valid_host(&request) {
            next.run(request).await
        } else {
            ApiError::InvalidHost.into_response()
        }
    };
    let answered = tokio::time::timeout(REQUEST_TIMEOUT, run)
        .instrument(span.clone())
        .await;
    let mut response =
        answered.unwrap_or_else(|_| timed_out(connection.as_deref()).into_response());
    let error = complete(&mut response, &route, &id);

    let status = response.status();
    if (method == Method::GET || method == Method::HEAD) && route.starts_with("/v1/") {
        metrics.read(&route, status.as_str(), started.elapsed());
    }
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }

    let duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let status = status.as_u16();
    let _entered = span.enter();
    match error.as_ref().and_then(ApiError::reason) {
        Some(reason) => {
            tracing::error!(%method, route, status, duration_ms, reason, "request failed");
        }
        // `debug`, because a line costs more than a delivery, and thousands may arrive per second.
        None => tracing::debug!(%method, route, status, duration_ms, "request"),
    }
    response
}

/// Restores the status, writes the body of an error, and adds the request id. Returns the error.
fn complete(response: &mut Response, route: &str, id: &str) -> Option<ApiError> {
    if let Some(StatusBeforeCompression(status)) = response.extensions_mut().remove() {
        *response.status_mut() = status;
    }

    let reported = response.extensions_mut().remove::<ApiError>();
    let is_page = ui::is_page(route);
    // A page may have written its own error text.
    let has_own_text = is_page && response.headers().contains_key(header::CONTENT_TYPE);
    let error = reported.or_else(|| from_status(response.status()).filter(|_| !has_own_text));
    match &error {
        error if is_page => ui::finish(response, error.as_ref(), id),
        Some(error) => error.fill(response, id),
        None => {}
    }

    weaken_etag(response);
    let id = HeaderValue::from_str(id).expect("a UUID is a header value");
    response.headers_mut().insert(&REQUEST_ID, id);
    error
}

/// Returns whether the request names its host exactly once, as HTTP/1.1 requires (RFC 9112, 3.2).
/// Without this check, a proxy and this server could disagree on the host of the request.
fn has_valid_host(request: &Request) -> bool {
    let count = request.headers().get_all(header::HOST).iter().count();
    count == 1 || (count == 0 && request.version() < Version::HTTP_11)
}

/// Status before compression. `CompressionLayer` answers 406 if the client accepts no encoding we
/// support, even after a successful write, so we restore it.
#[derive(Clone)]
struct StatusBeforeCompression(StatusCode);

/// Records the status for [`complete`]. This layer is inside the compression layer.
pub async fn note_status(request: Request, next: Next) -> Response {
    let is_negotiated = request.headers().contains_key(header::ACCEPT_ENCODING);
    let mut response = next.run(request).await;
    if is_negotiated {
        let status = StatusBeforeCompression(response.status());
        response.extensions_mut().insert(status);
    }
    response
}

/// Returns the span of a request. Without a collector it holds only the id, because the other
/// attributes cost more than a delivery.
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

/// Returns the error of a request that exceeded its time limit. While its body arrives, the peer is
/// the slow side; afterwards the server is.
fn timed_out(connection: Option<&ConnectionState>) -> ApiError {
    match connection {
        Some(connection) if connection.is_reading_body() => ApiError::TooSlow,
        _ => ApiError::Unavailable("request timed out".to_owned()),
    }
}

/// Weakens the entity tag of a compressed response, whose bytes differ from those that a strong tag
/// identifies.
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
