//! The signed-in visitor of a page, read from the session cookie.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Redirect, Response};

use super::session_token::Claim;
use super::text::address;
use crate::http::AppState;
use crate::http::auth;
use crate::http::error::ApiError;
use crate::store::Scope;

/// Name of the session cookie.
pub const COOKIE: &str = "stripe_reconciler_session";

/// The signed-in visitor. Redirects to the sign-in page if there is no valid session.
pub struct Visitor(pub Scope);

/// A signed-in operator. Answers 403 to a visitor with a tenant's key.
pub struct Operator;

impl Visitor {
    /// Returns the tenant whose invoices the visitor may read, or `None` for all tenants.
    pub fn tenant(&self) -> Option<&str> {
        match &self.0 {
            Scope::Tenant(tenant_uid) => Some(tenant_uid),
            Scope::Operator => None,
        }
    }

    pub fn is_operator(&self) -> bool {
        self.0 == Scope::Operator
    }
}

impl FromRequestParts<AppState> for Visitor {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Visitor, Response> {
        match signed_in(state, &parts.headers).await {
            Ok(Some(scope)) => Ok(Visitor(scope)),
            Ok(None) => {
                let wanted = parts
                    .uri
                    .path_and_query()
                    .map_or("", |wanted| wanted.as_str());
                Err(Redirect::to(&address("/ui/sign-in", &[("next", wanted)])).into_response())
            }
            Err(error) => Err(error.into_response()),
        }
    }
}

impl FromRequestParts<AppState> for Operator {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Operator, Response> {
        match Visitor::from_request_parts(parts, state).await? {
            visitor if visitor.is_operator() => Ok(Operator),
            _ => Err(ApiError::Forbidden.into_response()),
        }
    }
}

/// Returns the scope of the signed-in visitor, or `None` if there is no valid session.
async fn signed_in(state: &AppState, headers: &HeaderMap) -> Result<Option<Scope>, ApiError> {
    let Some(claim) = cookie(headers).and_then(Claim::read) else {
        return Ok(None);
    };
    let Some((key, hash)) = state.store.key_by_id(claim.key_id).await? else {
        return Ok(None);
    };
    if !claim.holds(&state.secrets, &hash, state.clock.now_s()) {
        return Ok(None);
    }
    Ok(auth::scope(state, vec![key]).ok())
}

/// Returns the value of the session cookie. Other programs on this host may set cookies with
/// arbitrary bytes.
fn cookie(headers: &HeaderMap) -> Option<&str> {
    let lines = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes);
    let pairs = lines
        .flat_map(|line| line.split(|byte| *byte == b';'))
        .filter_map(|pair| std::str::from_utf8(pair).ok());
    pairs
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE)
        .map(|(_, value)| value)
}
