//! The HTTP interface, and the only room that uses axum: routes, limits, and the server.
//!
//! `webhook` receives Stripe's deliveries. `invoices` is the read endpoint and the operator's calls
//! next to it; `evidence` and `events` show the proofs; `ui` serves pages. `health` answers
//! orchestrators, `metrics` Prometheus, and `openapi` documents the API. Only `error` turns
//! failures into status codes; `middleware` wraps every request. `server` accepts connections,
//! limits and evicts them, and drains them when the server stops.

mod auth;
mod error;
mod events;
mod evidence;
mod health;
mod invoices;
mod metrics;
mod middleware;
pub mod openapi;
mod pagination;
mod server;
mod ui;
mod webhook;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

use crate::clock::Clock;
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::ingest::batch_writer::BatchWriter;
use crate::metrics::Metrics;
use crate::monitoring::monitor::HealthMonitor;
use crate::store::Store;
use error::ApiError;
use metrics::ScrapeKeyCache;

pub use server::{listen, serve};
pub use ui::session_token;

/// Largest request body, in bytes. Stripe's events are far smaller.
const BODY_LIMIT: usize = 1024 * 1024;

/// The state that all handlers share; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    pub store: Store,
    pub inbox: BatchWriter,
    pub secrets: Arc<SigningSecrets>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub monitor: Arc<HealthMonitor>,
    scrapers: ScrapeKeyCache,
    /// Cancelled when the server has to stop.
    pub stopping: CancellationToken,
}

impl AppState {
    /// Creates the state. The health monitor is created, but not started.
    pub fn new(
        store: Store,
        inbox: BatchWriter,
        secrets: SigningSecrets,
        clock: Clock,
        metrics: Arc<Metrics>,
        stopping: CancellationToken,
    ) -> AppState {
        let monitor = Arc::new(HealthMonitor::new(
            store.clone(),
            metrics.clone(),
            clock.clone(),
            secrets.names(),
        ));
        let (secrets, scrapers) = (Arc::new(secrets), ScrapeKeyCache::default());

        AppState {
            store,
            inbox,
            secrets,
            clock,
            metrics,
            monitor,
            scrapers,
            stopping,
        }
    }
}

/// The listener that serves `/metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsAt {
    /// Requires an operator's key.
    MainListener,
    /// Requires no key: see [`metrics_router`].
    ListenerOfItsOwn,
}

/// The setting that serves or omits the pages at `/ui`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ui {
    Shown,
    Absent,
}

/// Returns the routes of the main listener.
pub fn router(state: AppState, metrics_at: MetricsAt, ui: Ui) -> Router {
    let invoice = get(invoices::read).put(invoices::put);
    let routes = Router::new()
        .route("/webhooks/stripe", post(webhook::receive))
        .route("/v1/tenants/{tenantUid}/invoices/{invoiceUid}", invoice)
        .route(
            "/v1/tenants/{tenantUid}/invoices/{invoiceUid}/evidence",
            get(evidence::read),
        )
        .route("/v1/tenants/{tenantUid}/invoices", get(invoices::list))
        .route(
            "/v1/tenants/{tenantUid}/invoices/",
            get(invoices::without_uid).put(invoices::without_uid),
        )
        .route("/v1/events", get(events::list))
        .route("/v1/events/", get(events::without_id))
        .route("/v1/events/{id}", get(events::show))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/openapi.json", get(openapi::read));
    let routes = match metrics_at {
        MetricsAt::MainListener => routes.route("/metrics", get(metrics::with_key)),
        MetricsAt::ListenerOfItsOwn => routes,
    };
    let routes = match ui {
        Ui::Shown => routes.merge(ui::routes()),
        Ui::Absent => routes,
    };

    finish(routes, state)
}

/// Returns the routes of a separate listener that only Prometheus should reach.
pub fn metrics_router(state: AppState) -> Router {
    finish(
        Router::new().route("/metrics", get(metrics::without_key)),
        state,
    )
}

/// Adds the layers that every route shares.
fn finish(routes: Router<AppState>, state: AppState) -> Router {
    let metrics = state.metrics.clone();

    routes
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .with_state(state)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(axum::middleware::from_fn(middleware::note_status))
        .layer(CompressionLayer::new())
        .layer(axum::middleware::from_fn_with_state(
            metrics,
            middleware::request,
        ))
}
