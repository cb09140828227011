//! Stripe's API, read only: the only room that uses async-stripe. Responses stay the bytes that
//! Stripe sent, because the event log stores bytes and typed objects break on other API versions.
//!
//! One [`StripeApi`] is one rate limit for the whole process: see `rate_limit`. `exchange` sends a
//! request and retries it, with growing delays and jitter, while Stripe is busy or unreachable.
//! `list_cursor` follows a list, and stops if it does not end. `reconcile` decides which objects to
//! request and interprets the responses. This room sends only GET.

mod exchange;
mod list_cursor;
mod rate_limit;
mod settings;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use hyper::header::HeaderValue;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::http_client::HttpClient;
pub use list_cursor::ListCursor;
use rate_limit::RateLimit;
pub use settings::{StripeApiKey, StripeSettings};

/// API version. Every call sends it, so that responses keep their format if Stripe's default
/// changes.
pub const VERSION: &str = "2026-09-30.endive";
/// Longest time for one attempt, its body included.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest accepted response, in bytes: a hundred events, each as large as a webhook may be.
const ANSWER_LIMIT: usize = 100 << 20;
/// Number of items per page, the maximum that Stripe allows.
const PAGE_SIZE: &str = "100";
/// Number of retries in background work, where nobody waits for the result. They take about half a
/// minute.
pub const RETRIES: usize = 6;

/// A client of Stripe's API; cheap to clone. Clones share the connections, the rate limit and the
/// call count.
#[derive(Clone)]
pub struct StripeApi(Arc<Shared>);

struct Shared {
    client: HttpClient,
    base: String,
    bearer: HeaderValue,
    rate_limit: RateLimit,
    retries: usize,
    calls: AtomicU64,
    /// Unix seconds of Stripe's clock in its latest response; 0 before the first response.
    answered_s: AtomicI64,
}

/// The account whose objects are requested.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The account of the key.
    Own,
    /// A connected account: `acct_...`.
    Account(String),
    /// The context that a thin event names.
    Context(String),
}

impl Scope {
    /// Returns the connected account, which may be the last part of a context such as
    /// `org_1/acct_1`.
    pub fn account(&self) -> Option<&str> {
        match self {
            Scope::Own => None,
            Scope::Account(account) => Some(account),
            Scope::Context(context) => context
                .rsplit('/')
                .next()
                .filter(|last| last.starts_with("acct_")),
        }
    }
}

/// One page of a list, in Stripe's order.
#[derive(Debug)]
pub struct StripePage {
    pub data: Vec<Box<RawValue>>,
    pub has_more: bool,
}

/// The reason why a call has no usable result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StripeApiError {
    /// No usable response, after all attempts.
    #[error("Stripe cannot be reached: {0}")]
    Away(String),
    /// Stripe limits the calls of this account, after all attempts.
    #[error("Stripe rate limit reached: {0}")]
    Busy(String),
    /// The key is invalid, so no call can succeed.
    #[error("Stripe does not accept STRIPE_API_KEY: {0}")]
    Unauthorized(String),
    /// Stripe rejected the request. A retry would not help.
    #[error("Stripe rejected {path}: {reason}")]
    Refused {
        path: String,
        status: u16,
        reason: String,
    },
    /// Stripe answered with success, but the response breaks the rules of its API.
    #[error("unusable response to {path}: {reason}")]
    Invalid { path: String, reason: String },
}

impl StripeApiError {
    fn invalid(path: &str, reason: impl Into<String>) -> StripeApiError {
        StripeApiError::Invalid {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Query parameters, named as Stripe names them, such as `created[gte]`.
pub type Query<'q> = &'q [(&'q str, &'q str)];

impl StripeApi {
    pub fn new(settings: StripeSettings) -> StripeApi {
        StripeApi(Arc::new(Shared {
            client: HttpClient::new(ATTEMPT_TIMEOUT, ANSWER_LIMIT),
            base: settings.base,
            bearer: settings.key.bearer(),
            rate_limit: RateLimit::new(settings.rate),
            retries: settings.retries,
            calls: AtomicU64::new(0),
            answered_s: AtomicI64::new(0),
        }))
    }

    /// Returns the number of calls so far, retries included.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::Relaxed)
    }

    /// Returns the time of Stripe's clock in its latest response, in Unix seconds, or `None` before
    /// the first response.
    pub fn answered_s(&self) -> Option<i64> {
        Some(self.0.answered_s.load(Ordering::Relaxed)).filter(|seconds| *seconds != 0)
    }

    /// Returns a page of a list such as `/v1/events`. Follow it with a [`ListCursor`].
    ///
    /// # Errors
    /// See [`StripeApiError`].
    pub async fn list(
        &self,
        path: &str,
        query: Query<'_>,
        scope: &Scope,
    ) -> Result<StripePage, StripeApiError> {
        #[derive(Deserialize)]
        struct List {
            data: Vec<Box<RawValue>>,
            #[serde(default)]
            has_more: bool,
        }

        let query = [query, &[("limit", PAGE_SIZE)]].concat();
        let answer = self.call(path, &query, scope).await?;
        let list: List = serde_json::from_slice(&answer)
            .map_err(|error| StripeApiError::invalid(path, format!("not a list: {error}")))?;
        Ok(StripePage {
            data: list.data,
            has_more: list.has_more,
        })
    }

    /// Returns an object such as `/v1/invoices/in_1`, or `None` if it does not exist or this key
    /// may not read it.
    ///
    /// # Errors
    /// See [`StripeApiError`].
    pub async fn get(
        &self,
        path: &str,
        query: Query<'_>,
        scope: &Scope,
    ) -> Result<Option<Box<RawValue>>, StripeApiError> {
        let answer = match self.call(path, query, scope).await {
            Err(StripeApiError::Refused { status: 404, .. }) => return Ok(None),
            answer => answer?,
        };
        serde_json::from_slice(&answer)
            .map(Some)
            .map_err(|error| StripeApiError::invalid(path, format!("not JSON: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_names_its_account() {
        let account = |context: &str| {
            let scope = Scope::Context(context.to_owned());
            scope.account().map(str::to_owned)
        };
        assert_eq!(account("acct_1").as_deref(), Some("acct_1"));
        assert_eq!(account("org_1/acct_2").as_deref(), Some("acct_2"));
        assert_eq!(account("org_1"), None);
        assert_eq!(Scope::Own.account(), None);
    }
}
