//! `POST /webhooks/stripe`: Stripe delivers here.
//!
//! Limit, signature, then JSON: nothing is parsed before it is authentic, and nothing is answered 2xx before it is on disk.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::AppState;
use super::error::ApiError;
use crate::flows::ingest::{self, Delivery};
use crate::store::Source;

/// How long a delivery may wait for the disk.
const DEADLINE: Duration = Duration::from_secs(10);

pub async fn receive(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let body = body?;
    let received_ms = state.clock.now_ms();
    let signatures: Vec<&[u8]> = headers.get_all("stripe-signature").iter().map(|value| value.as_bytes()).collect();
    let verified = state.secrets.verify(&signatures, &body, received_ms.div_euclid(1000));
    let label = verified.map_err(|refusal| {
        tracing::warn!(reason = refusal.as_str(), "a delivery was refused");
        ApiError::InvalidSignature
    })?;
    if state.stopping.is_cancelled() {
        return Err(ApiError::Unavailable("shutting down".to_owned()));
    }
    let delivery = Delivery { body, source: Source::Webhook, secret_label: Some(label.to_owned()), received_ms };
    let kept = tokio::time::timeout(DEADLINE, ingest::ingest(&state.inbox, delivery)).await;
    let outcome = kept.map_err(|_| ApiError::Unavailable("the delivery waited too long for the disk".to_owned()))??;
    Ok(Json(json!({"received": true, "outcome": outcome.as_str()})))
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> ApiError {
        match rejection {
            BytesRejection::FailedToBufferBody(failed) if failed.status() == 413 => ApiError::TooLarge,
            _ => ApiError::BadBody,
        }
    }
}
