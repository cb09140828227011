//! `POST /webhooks/stripe`: Stripe delivers here.
//!
//! Limit, signature, then JSON: nothing is parsed before it is authentic, and nothing is answered 2xx before it is on disk. What
//! cannot be right by its head alone is refused before its body is read: forgeries shall cost their sender more than us.

use std::time::Duration;

use axum::Json;
use axum::body::{Bytes, HttpBody};
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request, State};
use axum::http::HeaderValue;
use serde_json::{Value, json};

use super::error::ApiError;
use super::{AppState, BODY_LIMIT};
use crate::domain::signature::{Refusal, SignatureHeader};
use crate::flows::ingest::{self, Delivery};
use crate::store::Source;

/// How long a delivery may wait for the disk.
const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a body that are hashed before others have their turn: large forgeries shall not hold small deliveries up.
const TURN: usize = 64 * 1024;

pub async fn receive(State(state): State<AppState>, request: Request) -> Result<Json<Value>, ApiError> {
    if request.body().size_hint().lower() > BODY_LIMIT as u64 {
        return Err(ApiError::TooLarge);
    }
    let lines: Vec<HeaderValue> = request.headers().get_all("stripe-signature").iter().cloned().collect();
    let lines: Vec<&[u8]> = lines.iter().map(HeaderValue::as_bytes).collect();
    let signature = SignatureHeader::read(&lines).map_err(refused)?;
    let body = Bytes::from_request(request, &state).await?;
    let received_ms = state.clock.now_ms();
    let mut verifier = state.secrets.verifier(&signature);
    for part in body.chunks(TURN) {
        verifier.update(part);
        if part.len() == TURN {
            tokio::task::yield_now().await;
        }
    }
    let label = verifier.finish(received_ms.div_euclid(1000)).map_err(refused)?;
    if state.stopping.is_cancelled() {
        return Err(ApiError::Unavailable("shutting down".to_owned()));
    }
    let delivery = Delivery { body, source: Source::Webhook, secret_label: Some(label.to_owned()), received_ms };
    let kept = tokio::time::timeout(DEADLINE, ingest::ingest(&state.inbox, delivery)).await;
    let outcome = kept.map_err(|_| ApiError::Unavailable("the delivery waited too long for the disk".to_owned()))??;
    Ok(Json(json!({"received": true, "outcome": outcome.as_str()})))
}

fn refused(refusal: Refusal) -> ApiError {
    tracing::warn!(reason = refusal.as_str(), "a delivery was refused");
    ApiError::InvalidSignature
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> ApiError {
        match rejection {
            BytesRejection::FailedToBufferBody(failed) if failed.status() == 413 => ApiError::TooLarge,
            _ => ApiError::BadBody,
        }
    }
}
