//! `POST /webhooks/stripe`: receives Stripe's deliveries.
//!
//! Checks the size, then the signature, and parses JSON last: only authentic deliveries are parsed,
//! and only deliveries on disk are answered 2xx. A delivery is rejected on its headers alone where
//! possible, so that forgeries are cheap for us. Every delivery is counted once, whatever its
//! outcome.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::{Bytes, HttpBody};
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request, State};
use axum::http::HeaderValue;
use serde_json::{Value, json};

use super::error::ApiError;
use super::server::connection::ConnectionState;
use super::{AppState, BODY_LIMIT};
use crate::domain::stripe::signature::{SignatureError, SignatureHeader};
use crate::ingest::batch_writer::AppendError;
use crate::ingest::{self, Delivery, Outcome};
use crate::metrics::{Metrics, Rejection};
use crate::store::Source;

/// Longest time for a delivery to become durable.
const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a body that are hashed before the task yields, so that large forgeries do not delay
/// small deliveries.
const TURN: usize = 64 * 1024;

/// Answers `POST /webhooks/stripe`.
pub async fn receive(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut guard = OutcomeGuard {
        metrics: state.metrics.clone(),
        ended: Err(Rejection::Abandoned),
    };

    match accept(&state, request).await {
        Ok((outcome, took)) => {
            guard.ended = Ok((outcome, took));
            Ok(Json(json!({"received": true, "outcome": outcome.as_str()})))
        }
        Err((why, error)) => {
            guard.ended = Err(why);
            Err(error)
        }
    }
}

/// Verifies and stores a delivery. Returns its outcome and the time since its body was complete.
async fn accept(
    state: &AppState,
    request: Request,
) -> Result<(Outcome, Duration), (Rejection, ApiError)> {
    if request.body().size_hint().lower() > BODY_LIMIT as u64 {
        return Err((Rejection::TooLarge, ApiError::TooLarge));
    }

    let connection = request.extensions().get::<Arc<ConnectionState>>().cloned();
    let lines: Vec<HeaderValue> = request
        .headers()
        .get_all("stripe-signature")
        .iter()
        .cloned()
        .collect();
    let lines: Vec<&[u8]> = lines.iter().map(HeaderValue::as_bytes).collect();
    let signature = SignatureHeader::read(&lines).map_err(rejected)?;
    let body = Bytes::from_request(request, state).await.map_err(unread)?;

    let started = Instant::now();
    let received_ms = state.clock.now_ms();
    let label = verify(state, &signature, &body, received_ms)
        .await
        .map_err(rejected)?;
    if let Some(connection) = &connection {
        connection.set_trusted();
    }

    // Still accept a delivery whose connection the server kept waiting until the stop.
    let was_waiting = connection.is_some_and(|connection| connection.was_waiting_at_stop());
    if state.stopping.is_cancelled() && !was_waiting {
        return Err((
            Rejection::ShuttingDown,
            ApiError::Unavailable("shutting down".to_owned()),
        ));
    }

    let (source, secret_label) = (Source::Webhook, Some(label.to_owned()));
    let delivery = Delivery {
        body: body.clone(),
        source,
        secret_label,
        received_ms,
    };
    let stored = tokio::time::timeout(DEADLINE, ingest::ingest(&state.inbox, delivery)).await;
    let outcome = stored
        .map_err(|_| {
            (
                Rejection::TimedOut,
                ApiError::Unavailable("delivery was not durable in time".to_owned()),
            )
        })?
        .map_err(|error| (reason(&error), error.into()))?;

    if outcome == Outcome::Unreadable {
        tracing::warn!("delivery stored as unreadable; see `events list --outcome unreadable`");
    }
    if outcome == Outcome::Duplicate {
        state.monitor.record_repeated(&body, received_ms, label);
    }

    Ok((outcome, started.elapsed()))
}

/// Returns the label of the secret that signed the body.
async fn verify<'s>(
    state: &'s AppState,
    signature: &SignatureHeader<'_>,
    body: &Bytes,
    received_ms: i64,
) -> Result<&'s str, SignatureError> {
    let mut verifier = state.secrets.verifier(signature);
    for part in body.chunks(TURN) {
        verifier.update(part);
        if part.len() == TURN {
            tokio::task::yield_now().await;
        }
    }

    verifier.finish(received_ms.div_euclid(1000))
}

/// Returns the reason and the error for a body that could not be read.
fn unread(rejection: BytesRejection) -> (Rejection, ApiError) {
    let error = ApiError::from(rejection);
    let reason = match error {
        ApiError::TooLarge => Rejection::TooLarge,
        ApiError::Overloaded => Rejection::Overloaded,
        _ => Rejection::Incomplete,
    };
    (reason, error)
}

/// Returns the reason, as metrics count it, for a delivery that was not stored.
fn reason(error: &AppendError) -> Rejection {
    match error {
        AppendError::Full => Rejection::QueueFull,
        AppendError::Closed => Rejection::ShuttingDown,
        AppendError::Store(_) => Rejection::Unavailable,
    }
}

/// Counts a delivery on drop. The count includes deliveries whose sender disconnected or was too
/// slow.
struct OutcomeGuard {
    metrics: Arc<Metrics>,
    ended: Result<(Outcome, Duration), Rejection>,
}

impl Drop for OutcomeGuard {
    fn drop(&mut self) {
        match self.ended {
            Ok((outcome, took)) => self.metrics.acknowledged(outcome.as_str(), took),
            Err(why) => self.metrics.rejected(why),
        }
    }
}

/// Logs a delivery with an invalid signature, and returns the reason and the error.
fn rejected(error: SignatureError) -> (Rejection, ApiError) {
    tracing::warn!(
        reason = error.as_str(),
        meaning = error.meaning(),
        "delivery rejected"
    );
    (Rejection::Signature(error), ApiError::InvalidSignature)
}
