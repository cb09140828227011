//! `/v1/tenants/{tenantUid}/invoices`: reads, stores and lists the invoices of a tenant.

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::AppState;
use super::auth::{authenticate, key_hashes, scope};
use super::error::ApiError;
use super::pagination::{self, ItemWriter};
use crate::domain::invoice::schema::{self, InvalidField};
use crate::queries::invoices::{self as queries, PageRequest, StateFilter};
use crate::store::{Put, Scope, StoredInvoice};

/// The two ids in the path of an invoice, as axum extracts them.
pub type TenantAndInvoice = Result<Path<(String, String)>, PathRejection>;

/// Answers `GET /v1/tenants/{tenantUid}/invoices/{invoiceUid}`.
pub async fn read(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: TenantAndInvoice,
) -> Result<Response, ApiError> {
    let (tenant_uid, invoice_uid) = match valid(path) {
        Ok(ids) => ids,
        // A client without a key does not learn which paths are valid.
        Err(error) => return authenticate(&state, &headers).await.and(Err(error)),
    };
    let (invoice, keys) = state
        .store
        .invoice_and_keys(&tenant_uid, &invoice_uid, key_hashes(&headers))
        .await?;

    if !scope(&state, keys)?.reads(&tenant_uid) {
        return Err(ApiError::NotFound);
    }
    let invoice = invoice.ok_or(ApiError::NotFound)?;

    let tag = etag(&invoice);
    if matches(&headers, &header::IF_NONE_MATCH, Some(&tag)) == Some(true) {
        let headers = [
            (header::ETAG, tag),
            (header::VARY, "accept-encoding".to_owned()),
        ];
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    answer(StatusCode::OK, invoice, tag).await
}

/// Answers `PUT /v1/tenants/{tenantUid}/invoices/{invoiceUid}`.
pub async fn put(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: TenantAndInvoice,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let scope = authenticate(&state, &headers).await?;
    let (tenant_uid, invoice_uid) = valid(path)?;
    match scope {
        Scope::Operator => {}
        scope if scope.reads(&tenant_uid) => return Err(ApiError::Forbidden),
        Scope::Tenant(_) => return Err(ApiError::NotFound),
    }

    let document = parse(&body?)?;
    let new = queries::new_invoice(&tenant_uid, Some(&invoice_uid), document)
        .map_err(ApiError::InvalidInvoice)?;
    let precondition = |stored: Option<&StoredInvoice>| {
        let tag = stored.map(etag);
        matches(&headers, &header::IF_MATCH, tag.as_deref()) != Some(false)
            && matches(&headers, &header::IF_NONE_MATCH, tag.as_deref()) != Some(true)
    };
    let now_ms = state.clock.now_ms();
    let status = match state.store.put_invoice(&new, now_ms, &precondition).await? {
        Put::Created => StatusCode::CREATED,
        Put::Replaced => StatusCode::OK,
        Put::StripeInvoiceTaken => return Err(ApiError::StripeInvoiceTaken),
        Put::StripeInvoiceFixed => return Err(ApiError::StripeInvoiceFixed),
        Put::PreconditionFailed => return Err(ApiError::PreconditionFailed),
    };

    let invoice = state
        .store
        .invoice(&tenant_uid, &invoice_uid)
        .await?
        .ok_or(ApiError::NotFound)?;
    let tag = etag(&invoice);
    answer(status, invoice, tag).await
}

/// The query parameters of the list of invoices.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListQuery {
    state: Option<String>,
    stripe_invoice_id: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// Answers `GET /v1/tenants/{tenantUid}/invoices`: a page of invoices, newest first.
///
/// A page may be shorter than its limit; only the last page has no `nextCursor`. Each invoice is
/// written into the response as soon as it is folded: 500 documents as trees of values would take
/// twenty times the memory of their text.
pub async fn list(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let scope = authenticate(&state, &headers).await?;
    let tenant_uid = valid_id("tenantUid", path)?;
    if !scope.reads(&tenant_uid) {
        return Err(ApiError::NotFound);
    }
    let Query(query) = query?;
    let request = query.into_request(tenant_uid)?;

    let mut items = ItemWriter::new();
    let page = queries::page(&state.store, &request, |invoice, history| {
        items.write(&queries::render_with(invoice, &history)?);
        Ok(())
    })
    .await?;
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "private, no-cache"),
    ];
    let next_cursor = page.next.map(|next| next.to_text());
    Ok((headers, items.finish(next_cursor.as_deref())).into_response())
}

/// Answers `/v1/tenants/{tenantUid}/invoices/`: the uid in the path is empty.
pub async fn without_uid(State(state): State<AppState>, headers: HeaderMap) -> ApiError {
    match authenticate(&state, &headers).await {
        Ok(_) => ApiError::InvalidPath("invoiceUid is empty".to_owned()),
        Err(error) => error,
    }
}

impl ListQuery {
    fn into_request(self, tenant_uid: String) -> Result<PageRequest, ApiError> {
        let state = match self.state.as_deref() {
            None => StateFilter::Any,
            Some(text) => StateFilter::parse(text).map_err(ApiError::InvalidQuery)?,
        };
        let stripe_invoice_id = pagination::sought("stripeInvoiceId", self.stripe_invoice_id)?;
        let limit = pagination::limit(self.limit.as_deref())?;
        let after = pagination::cursor(self.cursor.as_deref(), queries::Cursor::parse)?;

        Ok(PageRequest {
            tenant_uid: Some(tenant_uid),
            stripe_invoice_id,
            state,
            limit,
            after,
        })
    }
}

/// Returns the tenant and invoice in a path.
///
/// # Errors
/// `InvalidPath` if one of them is not a valid uid.
pub fn valid(path: TenantAndInvoice) -> Result<(String, String), ApiError> {
    let Path((tenant_uid, invoice_uid)) = path.map_err(|_| not_utf8())?;
    valid_uid("tenantUid", &tenant_uid)?;
    valid_uid("invoiceUid", &invoice_uid)?;
    Ok((tenant_uid, invoice_uid))
}

/// Returns the only id in a path. `name` is the name of the parameter in the error message.
///
/// # Errors
/// `InvalidPath` if it is not a valid id.
pub fn valid_id(name: &str, path: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    let Path(id) = path.map_err(|_| not_utf8())?;
    valid_uid(name, &id)?;
    Ok(id)
}

fn valid_uid(name: &str, uid: &str) -> Result<(), ApiError> {
    schema::validate_uid(uid).map_err(|reason| ApiError::InvalidPath(format!("{name} {reason}")))
}

/// Returns the error for a path that axum could not decode.
fn not_utf8() -> ApiError {
    ApiError::InvalidPath("the path is not UTF-8".to_owned())
}

/// Parses a body. The error holds only the position: serde_json's message may quote the body.
fn parse(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let reason = format!(
            "is not JSON (line {}, column {})",
            error.line(),
            error.column()
        );
        ApiError::InvalidInvoice(vec![InvalidField {
            pointer: String::new(),
            reason,
        }])
    })
}

/// Answers with an invoice and its history.
async fn answer(
    status: StatusCode,
    invoice: StoredInvoice,
    tag: String,
) -> Result<Response, ApiError> {
    let (invoice, history) = queries::with_history(invoice).await?;
    let body = queries::render_with(&invoice, &history)?.to_string();
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::ETAG, tag),
        (header::CACHE_CONTROL, "private, no-cache".to_owned()),
    ];
    Ok((status, headers, body).into_response())
}

/// Returns the entity tag of an invoice: a hash of everything that its response depends on.
///
/// The response depends on the document, the observations and the version of this program. The tag
/// is computed without folding the history.
fn etag(invoice: &StoredInvoice) -> String {
    let mut keys: Vec<_> = invoice.observations.iter().map(|known| known.key).collect();
    keys.sort();
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(invoice.stored_ms.to_be_bytes());
    hash.update(invoice.revision.to_be_bytes());
    for key in keys {
        hash.update(key.0);
    }
    format!("\"{}\"", hex::encode(&hash.finalize()[..16]))
}

/// Returns whether a conditional header names the tag, or `None` without such a header. `tag` is
/// `None` if nothing is stored. Tags are compared weakly, because compression weakens ours.
fn matches(headers: &HeaderMap, name: &HeaderName, tag: Option<&str>) -> Option<bool> {
    let mut values = headers.get_all(name).iter().peekable();
    values.peek()?;

    let mut listed = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim);
    Some(tag.is_some_and(|tag| {
        listed.any(|item| item == "*" || item.strip_prefix("W/").unwrap_or(item) == tag)
    }))
}
