//! `/healthz`: alive. `/readyz`: the store can be reached and is migrated, and the server is not stopping. No key, no detail.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::AppState;
use super::error::ApiError;

const PING_TIMEOUT: Duration = Duration::from_secs(1);

pub async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

pub async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    if state.stopping.is_cancelled() {
        return Err(ApiError::Unavailable("shutting down".to_owned()));
    }
    state.store.ping_within(PING_TIMEOUT).await?;
    Ok(Json(json!({"status": "ready"})))
}
