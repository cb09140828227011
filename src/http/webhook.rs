//! `POST /webhooks/stripe`: Stripe delivers here.
//!
//! Limit, signature, then JSON: nothing is parsed before it is authentic, and nothing is answered 2xx before it is on disk. What
//! cannot be right by its head alone is refused before its body is read: forgeries shall cost their sender more than us. Every
//! delivery is counted once, whatever becomes of it.

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

/// How long a delivery may wait for the disk.
const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a body that are hashed before others have their turn: large forgeries shall not hold small deliveries up.
const TURN: usize = 64 * 1024;

pub async fn receive(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut counting = OutcomeGuard {
        metrics: state.metrics.clone(),
        ended: Err(Rejection::Abandoned),
    };

    match take(&state, request).await {
        Ok((outcome, took)) => {
            counting.ended = Ok((outcome, took));
            Ok(Json(json!({"received": true, "outcome": outcome.as_str()})))
        }
        Err((why, error)) => {
            counting.ended = Err(why);
            Err(error)
        }
    }
}

/// What a delivery came to, and how long that took once all of it was there.
async fn take(
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
    let signature = SignatureHeader::read(&lines).map_err(refused)?;
    let body = Bytes::from_request(request, state).await.map_err(unread)?;
    let started = Instant::now();
    let received_ms = state.clock.now_ms();
    let mut verifier = state.secrets.verifier(&signature);
    for part in body.chunks(TURN) {
        verifier.update(part);
        if part.len() == TURN {
            tokio::task::yield_now().await;
        }
    }

    let label = verifier
        .finish(received_ms.div_euclid(1000))
        .map_err(refused)?;
    if let Some(connection) = &connection {
        connection.set_trusted();
    }

    // A connection that the server kept waiting until the stop is served as if it had been in time.
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
    let kept = tokio::time::timeout(DEADLINE, ingest::ingest(&state.inbox, delivery)).await;
    let too_slow = |_| {
        (
            Rejection::TimedOut,
            ApiError::Unavailable("the delivery waited too long for the disk".to_owned()),
        )
    };
    let outcome = kept
        .map_err(too_slow)?
        .map_err(|error| (reason(&error), error.into()))?;
    if outcome == Outcome::Unreadable {
        tracing::warn!(
            "a delivery is kept that this version cannot read: see `events list --outcome unreadable`"
        );
    }

    if outcome == Outcome::Duplicate {
        state.monitor.record_repeated(&body, received_ms, label);
    }

    Ok((outcome, started.elapsed()))
}

fn unread(rejection: BytesRejection) -> (Rejection, ApiError) {
    let error = ApiError::from(rejection);
    let reason = match error {
        ApiError::TooLarge => Rejection::TooLarge,
        ApiError::Overloaded => Rejection::Overloaded,
        _ => Rejection::Incomplete,
    };
    (reason, error)
}

fn reason(error: &AppendError) -> Rejection {
    match error {
        AppendError::Full => Rejection::QueueFull,
        AppendError::Closed => Rejection::ShuttingDown,
        AppendError::Store(_) => Rejection::Unavailable,
    }
}

/// Counts a delivery when it is dropped: also one whose sender went away, or was too slow, in the middle.
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

fn refused(refusal: SignatureError) -> (Rejection, ApiError) {
    tracing::warn!(
        reason = refusal.as_str(),
        meaning = refusal.meaning(),
        "a delivery was refused"
    );
    (Rejection::Signature(refusal), ApiError::InvalidSignature)
}
