//! The invoices of a tenant: read (the Palette endpoint), store or replace, list.

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::AppState;
use super::auth::{authenticate, key_hashes, scope};
use super::error::ApiError;
use super::pagination;
use crate::domain::invoice::schema;
use crate::domain::invoice::schema::InvalidField;
use crate::queries::invoices::{self as flow, Page, PageRequest, StateFilter};
use crate::store::{Put, Scope, StoredInvoice};

pub type TenantAndInvoice = Result<Path<(String, String)>, PathRejection>;

/// `GET /v1/tenants/{tenantUid}/invoices/{invoiceUid}`
pub async fn read(
    State(state): State<AppState>,
    headers: HeaderMap,
    path: TenantAndInvoice,
) -> Result<Response, ApiError> {
    let (tenant_uid, invoice_uid) = match valid(path) {
        Ok(ids) => ids,
        // Who has no key does not learn what a path may be.
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
        return Ok((
            StatusCode::NOT_MODIFIED,
            [
                (header::ETAG, tag),
                (header::VARY, "accept-encoding".to_owned()),
            ],
        )
            .into_response());
    }
    answer(StatusCode::OK, &invoice, tag)
}

/// `PUT /v1/tenants/{tenantUid}/invoices/{invoiceUid}`
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
        _ => return Err(ApiError::NotFound),
    }
    let document = parse(&body?)?;
    let new = flow::new_invoice(&tenant_uid, Some(&invoice_uid), document)
        .map_err(ApiError::InvalidInvoice)?;
    let precondition = |stored: Option<&StoredInvoice>| {
        let tag = stored.map(etag);
        matches(&headers, &header::IF_MATCH, tag.as_deref()) != Some(false)
            && matches(&headers, &header::IF_NONE_MATCH, tag.as_deref()) != Some(true)
    };
    let status = match state
        .store
        .put_invoice(&new, state.clock.now_ms(), &precondition)
        .await?
    {
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
    answer(status, &invoice, tag)
}

/// What a list may be asked for.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListQuery {
    state: Option<String>,
    stripe_invoice_id: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
}

/// `GET /v1/tenants/{tenantUid}/invoices`: newest first. A page may be shorter than its limit; the last one has no `nextCursor`.
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
    let Page { invoices, next } = flow::page(&state.store, &request).await?;
    let items = invoices
        .iter()
        .map(flow::render)
        .collect::<Result<Vec<Value>, _>>()?;
    let mut body = json!({ "items": items });
    if let Some(next) = next {
        body["nextCursor"] = next.to_text().into();
    }
    Ok((
        [
            (header::CONTENT_TYPE, "application/json"),
            (header::CACHE_CONTROL, "private, no-cache"),
        ],
        body.to_string(),
    )
        .into_response())
}

/// `/v1/tenants/{tenantUid}/invoices/`: an invoice whose uid is empty.
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
        let after = pagination::cursor(self.cursor.as_deref(), flow::Cursor::parse)?;
        Ok(PageRequest {
            tenant_uid: Some(tenant_uid),
            stripe_invoice_id,
            state,
            limit,
            after,
        })
    }
}

/// The ids in a path.
///
/// # Errors
/// `InvalidPath`: one of them can be none.
pub fn valid(path: TenantAndInvoice) -> Result<(String, String), ApiError> {
    let Path((tenant_uid, invoice_uid)) = path.map_err(|_| not_utf8())?;
    valid_uid("tenantUid", &tenant_uid)?;
    valid_uid("invoiceUid", &invoice_uid)?;
    Ok((tenant_uid, invoice_uid))
}

/// The only id in a path.
///
/// # Errors
/// `InvalidPath`: it can be none.
pub fn valid_id(name: &str, path: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    let Path(id) = path.map_err(|_| not_utf8())?;
    valid_uid(name, &id)?;
    Ok(id)
}

fn valid_uid(name: &str, uid: &str) -> Result<(), ApiError> {
    schema::validate_uid(uid).map_err(|reason| ApiError::InvalidPath(format!("{name} {reason}")))
}

fn not_utf8() -> ApiError {
    ApiError::InvalidPath("the path is not UTF-8".to_owned())
}

/// serde_json's own message may quote the body; its position does not.
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

fn answer(status: StatusCode, invoice: &StoredInvoice, tag: String) -> Result<Response, ApiError> {
    let body = flow::render(invoice)?.to_string();
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::ETAG, tag),
        (header::CACHE_CONTROL, "private, no-cache".to_owned()),
    ];
    Ok((status, headers, body).into_response())
}

/// Names what would be answered, without folding or rendering it: document, tellings, and the program that words them.
fn etag(invoice: &StoredInvoice) -> String {
    let mut keys: Vec<_> = invoice.observations.iter().map(|known| known.key).collect();
    keys.sort();
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(invoice.stored_ms.to_be_bytes());
    hash.update(invoice.revision.to_be_bytes());
    keys.iter().for_each(|key| hash.update(key.0));
    format!("\"{}\"", hex::encode(&hash.finalize()[..16]))
}

/// Whether a conditional header names the tag (None: nothing is stored); None when there is no such header. Compared weakly:
/// compression makes our tags weak on the way.
fn matches(headers: &HeaderMap, name: &HeaderName, tag: Option<&str>) -> Option<bool> {
    let mut values = headers.get_all(name).iter().peekable();
    values.peek()?;
    let named = |value: &str| {
        value
            .split(',')
            .map(str::trim)
            .any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag.unwrap_or("*"))
    };
    Some(tag.is_some() && values.any(|value| value.to_str().is_ok_and(named)))
}
