//! `GET /v1/events` and `GET /v1/events/{id}`: what was received, for the operator.

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::AppState;
use super::auth::authenticate_operator;
use super::error::ApiError;
use super::invoices;
use super::pagination;
use crate::queries::events::{self, Cursor, Listed, OutcomeFilter, PageRequest, Shown};

const NOT_SHARED: [(HeaderName, &str); 1] = [(header::CACHE_CONTROL, "private, no-cache")];

/// What a list may be asked for.
#[derive(Deserialize)]
pub struct ListQuery {
    #[serde(rename = "type")]
    event_type: Option<String>,
    invoice: Option<String>,
    outcome: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Items<Item> {
    items: Vec<Item>,
    /// Where the next page begins; left out on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// The latest received first. A page may be shorter than its limit; the last one has no `nextCursor`.
pub async fn list(
    State(state): State<AppState>,
    headers: HeaderMap,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    authenticate_operator(&state, &headers).await?;
    let Query(query) = query?;
    let page = events::page(&state.store, &query.into_request()?).await?;
    let items: Vec<Listed> = page.events.iter().map(events::listed).collect();
    let next_cursor = page.next.map(Cursor::to_text);
    Ok((NOT_SHARED, Json(Items { items, next_cursor })).into_response())
}

#[derive(Deserialize)]
pub struct RenderingsQuery {
    cursor: Option<String>,
}

/// All renderings that were received, oldest receipt first, with their bodies.
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
    let found = events::renderings(&state.store, &id, after).await?;
    if found.renderings.is_empty() && after.is_none() {
        return Err(ApiError::NotFound);
    }
    let items: Vec<Shown> = found.renderings.into_iter().map(events::show).collect();
    let next_cursor = found.next.map(Cursor::to_text);
    Ok((NOT_SHARED, Json(Items { items, next_cursor })).into_response())
}

/// `/v1/events/`: an event whose id is empty.
pub async fn without_id(State(state): State<AppState>, headers: HeaderMap) -> ApiError {
    match authenticate_operator(&state, &headers).await {
        Ok(()) => ApiError::InvalidPath("id is empty".to_owned()),
        Err(error) => error,
    }
}

impl ListQuery {
    fn into_request(self) -> Result<PageRequest, ApiError> {
        let unfit = |reason: String| ApiError::InvalidQuery(format!("outcome {reason}"));
        Ok(PageRequest {
            event_type: pagination::sought("type", self.event_type)?,
            stripe_invoice_id: pagination::sought("invoice", self.invoice)?,
            outcome: match self.outcome.as_deref() {
                None => OutcomeFilter::Any,
                Some(text) => OutcomeFilter::parse(text).map_err(unfit)?,
            },
            limit: pagination::limit(self.limit.as_deref())?,
            after: pagination::cursor(self.cursor.as_deref(), Cursor::parse)?,
        })
    }
}
