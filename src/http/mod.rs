//! The only axum: routes, limits, and the server that drains.
//!
//! `webhook` is where Stripe delivers, `invoices` the read endpoint and the operator's calls beside it, `evidence` and `events` what
//! proves the answers, `health` what an orchestrator asks. `error` is the one place where a failure becomes a status code, `around`
//! what every request goes through. Below them, `serve` accepts connections, and `places` says how many there may be, how long
//! they may take, and who gives way.

mod around;
mod auth;
mod error;
mod events;
mod evidence;
mod health;
mod invoices;
mod places;
mod query;
mod serve;
mod webhook;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

use crate::clock::Clock;
use crate::domain::signature::SigningSecrets;
use crate::inbox::Inbox;
use crate::store::Store;
use error::ApiError;

pub use serve::serve;

/// The largest body that is read, in bytes.
const BODY_LIMIT: usize = 1024 * 1024;

/// What handlers share.
#[derive(Clone)]
pub struct AppState {
    pub store: Store,
    pub inbox: Inbox,
    pub secrets: Arc<SigningSecrets>,
    pub clock: Clock,
    /// Set when the server is asked to stop.
    pub stopping: CancellationToken,
}

pub fn router(state: AppState) -> Router {
    let invoice = get(invoices::read).put(invoices::put);
    Router::new()
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
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .with_state(state)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(CompressionLayer::new())
        .layer(axum::middleware::from_fn(around::request))
}
