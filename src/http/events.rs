//! `GET /v1/events` and `GET /v1/events/{id}`: the received events, for the operator.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::AppState;
use super::auth::authenticate_operator;
use super::error::ApiError;
use super::invoices;
use super::pagination::{self, ItemWriter};
use crate::queries::events::{self, Cursor, OutcomeFilter, PageRequest};

/// The query parameters of the list of events.
#[derive(Deserialize)]
pub struct ListQuery {
    #[serde(rename = "type")]
    event_type: Option<String>,
    invoice: Option<String>,
    outcome: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// Answers `GET /v1/events`: a page of events, the latest received first.
///
/// A page may be shorter than its limit; only the last page has no `nextCursor`.
pub async fn list(
    State(state): State<AppState>,
    headers: HeaderMap,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    authenticate_operator(&state, &headers).await?;
    let Query(query) = query?;
    let page = events::page(&state.store, &query.into_request()?).await?;

    let mut items = ItemWriter::new();
    for event in &page.events {
        items.write(&events::listed(event));
    }
    Ok(respond(items, page.next))
}

/// The query parameters of the list of renderings.
#[derive(Deserialize)]
pub struct RenderingsQuery {
    cursor: Option<String>,
}

/// Answers `GET /v1/events/{id}`: all renderings of an event with their bodies, oldest receipt
/// first.
///
/// Each body is written into the response before the next one is read.
pub async fn show(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<RenderingsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    authenticate_operator(&state, &headers).await?;
    let id = invoices::valid_id("id", path)?;
    let Query(query) = query?;
    let after = pagination::cursor(query.cursor.as_deref(), Cursor::parse)?;

    let mut items = ItemWriter::new();
    let found = events::renderings(&state.store, &id, after, |stored| {
        items.write(&events::show(stored));
    })
    .await?;
    if found.items.is_empty() && after.is_none() {
        return Err(ApiError::NotFound);
    }
    Ok(respond(items, found.next))
}

fn respond(items: ItemWriter, next: Option<Cursor>) -> Response {
    let next_cursor = next.map(Cursor::to_text);
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "private, no-cache"),
    ];
    (headers, items.finish(next_cursor.as_deref())).into_response()
}

/// Answers `/v1/events/`: the id in the path is empty.
pub async fn without_id(State(state): State<AppState>, headers: HeaderMap) -> ApiError {
    match authenticate_operator(&state, &headers).await {
        Ok(()) => ApiError::InvalidPath("id is empty".to_owned()),
        Err(error) => error,
    }
}

impl ListQuery {
    fn into_request(self) -> Result<PageRequest, ApiError> {
        Ok(PageRequest {
            event_type: pagination::sought("type", self.event_type)?,
            stripe_invoice_id: pagination::sought("invoice", self.invoice)?,
            outcome: match self.outcome.as_deref() {
                None => OutcomeFilter::Any,
                Some(text) => OutcomeFilter::parse(text)
                    .map_err(|reason| ApiError::InvalidQuery(format!("outcome {reason}")))?,
            },
            limit: pagination::limit(self.limit.as_deref())?,
            after: pagination::cursor(self.cursor.as_deref(), Cursor::parse)?,
        })
    }
}
