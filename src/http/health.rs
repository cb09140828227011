//! `/healthz` reports that the process is alive. `/readyz` reports that the server can accept
//! deliveries and that its event writer runs.
//!
//! Neither needs a key, so neither reveals details.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::AppState;
use super::error::ApiError;

/// Longest time for a read from the database.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time until the writer has committed. Less than the three seconds that `healthcheck`
/// waits for a response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers `GET /healthz`.
pub async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Answers `GET /readyz`: 200 if the database is migrated and can be read, the queue has room, and
/// the writer can commit. A delivery needs all of these.
pub async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    if state.stopping.is_cancelled() {
        return Err(ApiError::Unavailable("shutting down".to_owned()));
    }
    if !state.inbox.is_running() {
        return Err(ApiError::Unavailable("event writer has stopped".to_owned()));
    }

    let read = async { Ok(state.store.ping_within(PING_TIMEOUT).await?) };
    tokio::try_join!(read, probe_writer(&state))?;
    Ok(Json(json!({"status": "ready"})))
}

async fn probe_writer(state: &AppState) -> Result<(), ApiError> {
    let probed = tokio::time::timeout(WRITE_TIMEOUT, state.inbox.probe()).await;
    probed.map_err(|_| ApiError::Unavailable("event writer does not respond".to_owned()))??;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::clock::Clock;
    use crate::domain::stripe::signing_secrets::SigningSecrets;
    use crate::ingest::batch_writer::Writer;
    use crate::ingest::{Delivery, ingest};
    use crate::store::{Source, Store};

    #[tokio::test]
    async fn dead_writer_makes_server_unready_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();

        let (inbox, mut writer) = Writer::start_panicking();
        let state = AppState::new(
            store,
            inbox.clone(),
            SigningSecrets::parse("whsec_a").unwrap(),
            Clock::system(),
            Arc::default(),
            CancellationToken::new(),
        );
        assert!(ready(State(state.clone())).await.is_ok());

        let delivery = Delivery {
            body: "{}".into(),
            source: Source::Webhook,
            secret_label: None,
            received_ms: 0,
        };
        assert!(ingest(&inbox, delivery).await.is_err());

        writer.ended().await;
        let error = ready(State(state)).await.unwrap_err();
        assert_eq!(error.reason(), Some("event writer has stopped"));
    }
}
