//! The only axum: routes, limits, and the server that drains.
//!
//! `webhook` is where Stripe delivers, `invoices` the read endpoint and the operator's calls beside it, `evidence` and `events` what
//! proves the answers, `ui` the pages that show it to a person, `health` what an orchestrator asks, `metrics` what Prometheus does, `openapi` the document of it all. `error`
//! is the one place where a failure becomes a status code, `around` what every request goes through.

mod around;
mod auth;
mod error;
mod events;
mod evidence;
mod health;
mod invoices;
mod metrics;
pub mod openapi;
mod query;
mod ui;
mod webhook;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

use crate::clock::Clock;
use crate::domain::signature::SigningSecrets;
use crate::flows::signs::Signs;
use crate::inbox::Inbox;
use crate::metrics::Metrics;
use crate::store::Store;
use error::ApiError;
use metrics::Scrapers;

/// The largest body that is read, in bytes.
const BODY_LIMIT: usize = 1024 * 1024;
/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 1024;
/// How long the head of a request may take; also ends idle connections.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests under way may take to finish after the stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// What handlers share.
#[derive(Clone)]
pub struct AppState {
    pub store: Store,
    pub inbox: Inbox,
    pub secrets: Arc<SigningSecrets>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub signs: Arc<Signs>,
    scrapers: Scrapers,
    /// Set when the server is asked to stop.
    pub stopping: CancellationToken,
}

impl AppState {
    pub fn new(
        store: Store,
        inbox: Inbox,
        secrets: SigningSecrets,
        clock: Clock,
        metrics: Arc<Metrics>,
        stopping: CancellationToken,
    ) -> AppState {
        let labels = secrets.labels().into_iter().map(str::to_owned).collect();
        let signs = Arc::new(Signs::new(store.clone(), metrics.clone(), clock.clone(), labels));
        let (secrets, scrapers) = (Arc::new(secrets), Scrapers::default());
        AppState { store, inbox, secrets, clock, metrics, signs, scrapers, stopping }
    }
}

/// Where `/metrics` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsAt {
    /// With the operator's key.
    MainListener,
    /// Without a key: see [`metrics_router`].
    ListenerOfItsOwn,
}

/// Whether there are pages for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ui {
    Shown,
    Absent,
}

pub fn router(state: AppState, metrics_at: MetricsAt, ui: Ui) -> Router {
    let invoice = get(invoices::read).put(invoices::put);
    let routes = Router::new()
        .route("/webhooks/stripe", post(webhook::receive))
        .route("/v1/tenants/{tenantUid}/invoices/{invoiceUid}", invoice)
        .route("/v1/tenants/{tenantUid}/invoices/{invoiceUid}/evidence", get(evidence::read))
        .route("/v1/tenants/{tenantUid}/invoices", get(invoices::list))
        .route("/v1/tenants/{tenantUid}/invoices/", get(invoices::without_uid).put(invoices::without_uid))
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

/// For a listener of its own, which nobody but Prometheus should reach.
pub fn metrics_router(state: AppState) -> Router {
    finish(Router::new().route("/metrics", get(metrics::without_key)), state)
}

/// What every route goes through.
fn finish(routes: Router<AppState>, state: AppState) -> Router {
    let metrics = state.metrics.clone();
    routes
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .with_state(state)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(CompressionLayer::new())
        .layer(axum::middleware::from_fn_with_state(metrics, around::request))
}

/// Serves until `stop`, then lets the requests under way finish.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(64 * 1024);
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of file descriptors, most likely: others have to close before it gets better.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "a socket kept its delay");
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(socket), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended badly");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests did not finish in time");
    }
}
