//! `GET /metrics`, for Prometheus: on the main listener with the operator's key, or on a listener of its own without one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::AppState;
use super::auth::{key_hashes, scope};
use super::error::ApiError;
use crate::store::{ApiKey, Scope, StoreError};
use crate::telemetry;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long the database may take to say whose key it is.
const KEY_TIMEOUT: Duration = Duration::from_secs(1);
/// Keys that are remembered.
const SCRAPERS: usize = 4;

/// The operator's keys, by their hashes, that scraped last. While the database is away, no key can be looked up; who was let in
/// before stays in, so that Prometheus learns of it.
#[derive(Clone, Default)]
pub struct ScrapeKeyCache(Arc<Mutex<Vec<CachedKey>>>);

struct CachedKey {
    hash: [u8; 32],
    key: ApiKey,
}

impl ScrapeKeyCache {
    fn remember(&self, hash: &[u8; 32], key: Option<&ApiKey>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|scraper| scraper.hash != *hash);
        if let Some(key) = key.filter(|key| key.scope == Scope::Operator) {
            known.insert(
                0,
                CachedKey {
                    hash: *hash,
                    key: key.clone(),
                },
            );
            known.truncate(SCRAPERS);
        }
    }

    fn known(&self, hash: &[u8; 32]) -> Option<ApiKey> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .find(|scraper| bool::from(scraper.hash.ct_eq(hash)))
            .map(|scraper| scraper.key.clone())
    }
}

pub async fn with_key(
    State(state): State<AppState>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut found = Vec::new();
    for hash in key_hashes(&headers).iter().flatten() {
        let asked = tokio::time::timeout(KEY_TIMEOUT, state.store.key_by_hash(hash)).await;
        match asked.unwrap_or_else(|_| Err(StoreError::unresponsive())) {
            Ok(key) => {
                state.scrapers.remember(hash, key.as_ref());
                found.extend(key);
            }
            Err(error) => found.push(state.scrapers.known(hash).ok_or(error)?),
        }
    }
    match scope(&state, found)? {
        Scope::Operator => Ok(text(&state).await),
        Scope::Tenant(_) => Err(ApiError::Forbidden),
    }
}

pub async fn without_key(State(state): State<AppState>) -> Response {
    text(&state).await
}

async fn text(state: &AppState) -> Response {
    let (depth, capacity) = state.inbox.depth();
    state.metrics.queue_depth.set(depth as i64);
    state.metrics.queue_capacity.set(capacity as i64);
    state
        .metrics
        .spans_dropped
        .set(telemetry::dropped_spans() as i64);
    state.monitor.refresh().await;
    (
        [
            (header::CONTENT_TYPE, TEXT),
            (header::CACHE_CONTROL, "no-store"),
        ],
        state.metrics.text(),
    )
        .into_response()
}
