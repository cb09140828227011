//! `GET /v1/tenants/{tenantUid}/invoices/{invoiceUid}/evidence`: the events that prove the state of
//! an invoice.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::AppState;
use super::auth::authenticate;
use super::error::ApiError;
use super::invoices::{TenantAndInvoice, valid};
use crate::queries::evidence;

/// The query parameters of the evidence.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvidenceQuery {
    /// The time after which received events are ignored. `None` for the current evidence.
    as_of: Option<String>,
}

/// Answers `GET .../evidence`: the evidence for an invoice.
pub async fn read(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: TenantAndInvoice,
    query: Result<Query<EvidenceQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let scope = authenticate(&state, &headers).await?;
    let (tenant_uid, invoice_uid) = valid(path)?;
    if !scope.reads(&tenant_uid) {
        return Err(ApiError::NotFound);
    }

    let Query(query) = query?;
    let as_of_ms = query
        .as_of
        .map(|text| evidence::as_of(&plus(&text), state.clock.now_ms()))
        .transpose()
        .map_err(|reason| ApiError::InvalidQuery(format!("asOf {reason}")))?;

    let evidence = evidence::gather(&state.store, &tenant_uid, &invoice_uid, as_of_ms)
        .await?
        .ok_or(ApiError::NotFound)?;
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "private, no-cache"),
    ];
    Ok((headers, evidence.to_json().to_string()).into_response())
}

/// Turns spaces back into `+`. Form decoding turns the `+` of a UTC offset into a space, and no
/// time contains a space.
fn plus(text: &str) -> String {
    text.replace(' ', "+")
}
