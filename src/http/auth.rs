//! Authentication of API calls: `ApiKey: <key>`, `Authorization: <key>` or
//! `Authorization: Bearer <key>`.

use axum::http::{HeaderMap, HeaderName, header};

use super::AppState;
use super::error::ApiError;
use crate::domain::api_key;
use crate::store::{ApiKey, Scope};

static API_KEY: HeaderName = HeaderName::from_static("apikey");

/// Returns the scope of the key in the request.
///
/// # Errors
/// `Unauthorized` without a valid key. The error does not tell the client why a key is invalid.
pub async fn authenticate(state: &AppState, headers: &HeaderMap) -> Result<Scope, ApiError> {
    let mut found = Vec::new();
    for hash in key_hashes(headers).iter().flatten() {
        found.extend(state.store.key_by_hash(hash).await?);
    }
    scope(state, found)
}

/// Authenticates a request that only an operator may make.
///
/// # Errors
/// `Forbidden` for the key of a tenant, `Unauthorized` without a valid key.
pub async fn authenticate_operator(state: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    match authenticate(state, headers).await? {
        Scope::Operator => Ok(()),
        Scope::Tenant(_) => Err(ApiError::Forbidden),
    }
}

/// Returns the hashes of the keys in the request, one for each of the two headers.
pub fn key_hashes(headers: &HeaderMap) -> [Option<[u8; 32]>; 2] {
    let keys = [
        single_header(headers, &API_KEY),
        single_header(headers, &header::AUTHORIZATION).map(without_scheme),
    ];
    keys.map(|key| key.map(api_key::hash))
}

/// Returns the scope of the first key that is valid now.
///
/// # Errors
/// `Unauthorized` if `found` is empty, or if all its keys are expired or revoked.
pub fn scope(state: &AppState, found: Vec<ApiKey>) -> Result<Scope, ApiError> {
    let now_ms = state.clock.now_ms();
    let valid = found.into_iter().find(|key| {
        key.revoked_ms.is_none() && key.expires_ms.is_none_or(|expires_ms| now_ms < expires_ms)
    });
    valid.map(|key| key.scope).ok_or(ApiError::Unauthorized)
}

/// Returns the value of a header that occurs once. Repeated headers are rejected, because a proxy
/// may have checked a different one.
fn single_header<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.as_bytes().trim_ascii();
    (values.next().is_none() && !value.is_empty()).then_some(value)
}

/// Removes the `Bearer` scheme, if there is one.
fn without_scheme(value: &[u8]) -> &[u8] {
    match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => value,
    }
}
