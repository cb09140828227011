//! `GET /metrics`, for Prometheus: on the main listener with an operator's key, or on a separate
//! listener without one.

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

/// Media type of Prometheus's text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Longest time to look up a key, so that a scrape is answered while the database hangs.
const KEY_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest number of cached keys.
const CACHED_KEYS: usize = 4;

/// The operator keys, by hash, that scraped last.
///
/// While the database is unreachable, no key can be looked up. Cached keys can still scrape, so
/// that Prometheus sees the outage.
#[derive(Clone, Default)]
pub struct ScrapeKeyCache(Arc<Mutex<Vec<CachedKey>>>);

struct CachedKey {
    hash: [u8; 32],
    key: ApiKey,
}

impl ScrapeKeyCache {
    /// Caches an operator's key, or removes a hash that no longer belongs to one.
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
            known.truncate(CACHED_KEYS);
        }
    }

    /// Returns the cached key with this hash, compared in constant time.
    fn known(&self, hash: &[u8; 32]) -> Option<ApiKey> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .find(|scraper| bool::from(scraper.hash.ct_eq(hash)))
            .map(|scraper| scraper.key.clone())
    }
}

/// Serves the metrics to an operator.
pub async fn with_key(
    State(state): State<AppState>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut found = Vec::new();
    for hash in key_hashes(&headers).iter().flatten() {
        let lookup = tokio::time::timeout(KEY_TIMEOUT, state.store.key_by_hash(hash)).await;
        match lookup.unwrap_or_else(|_| Err(StoreError::unresponsive())) {
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

/// Serves the metrics on the separate listener.
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
