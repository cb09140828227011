//! Who calls: `ApiKey: <key>`, `Authorization: <key>`, or `Authorization: Bearer <key>`.

use axum::http::{HeaderMap, HeaderName, header};

use super::AppState;
use super::error::ApiError;
use crate::domain::api_key;
use crate::store::{ApiKey, Scope};

static API_KEY: HeaderName = HeaderName::from_static("apikey");

/// The scope of the key that the request carries.
///
/// # Errors
/// `Unauthorized` without a valid key, whatever is wrong with it.
pub async fn authenticate(state: &AppState, headers: &HeaderMap) -> Result<Scope, ApiError> {
    let mut found = Vec::new();
    for hash in key_hashes(headers).iter().flatten() {
        found.extend(state.store.key_by_hash(hash).await?);
    }
    scope(state, found)
}

/// As [`authenticate`], for what only an operator may see.
///
/// # Errors
/// `Forbidden`: the key is a tenant's.
pub async fn authenticate_operator(state: &AppState, headers: &HeaderMap) -> Result<(), ApiError> {
    match authenticate(state, headers).await? {
        Scope::Operator => Ok(()),
        Scope::Tenant(_) => Err(ApiError::Forbidden),
    }
}

/// The hashes of what the request carries as a key, by either header.
pub fn key_hashes(headers: &HeaderMap) -> [Option<[u8; 32]>; 2] {
    let keys = [
        single_header(headers, &API_KEY),
        single_header(headers, &header::AUTHORIZATION).map(without_scheme),
    ];
    keys.map(|key| key.map(api_key::hash))
}

/// The scope of the first of these keys that is valid now.
///
/// # Errors
/// `Unauthorized`: none is.
pub fn scope(state: &AppState, found: Vec<ApiKey>) -> Result<Scope, ApiError> {
    let now_ms = state.clock.now_ms();
    let is_valid = |key: &ApiKey| {
        key.revoked_ms.is_none() && key.expires_ms.is_none_or(|expires_ms| now_ms < expires_ms)
    };
    found
        .into_iter()
        .find(is_valid)
        .map(|key| key.scope)
        .ok_or(ApiError::Unauthorized)
}

/// A header that is repeated is no key: nobody knows which one another party looked at.
fn single_header<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.as_bytes().trim_ascii();
    (values.next().is_none() && !value.is_empty()).then_some(value)
}

fn without_scheme(value: &[u8]) -> &[u8] {
    match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => value,
    }
}
