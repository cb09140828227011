//! Stripe's API, read only: the only async-stripe. Answers are kept as the bytes that came, because the log keeps bytes and
//! because typed objects break on other API versions.
//!
//! One `StripeApi` is one budget of calls for the whole process: `budget` holds it. A call is tried again, with growing waits
//! and jitter, while Stripe is busy or away. What is asked, and what an answer means, is not known here: that is
//! `flows/reconcile`. Nothing here ever sends anything but GET.

mod rate_limit;
mod settings;

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::HeaderValue;
use hyper::{Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use stripe_client_core::{
    CustomizedStripeRequest, RequestBuilder, StripeClient, StripeClientErr, StripeMethod,
};
use tracing::{Instrument, field};

use crate::domain::redact;
use crate::http_client::{HttpClient, HttpClientError};
use rate_limit::RateLimit;
pub use settings::{StripeApiKey, StripeSettings};

/// Stated with every call, so that what comes back does not change when Stripe's default does.
pub const VERSION: &str = "2026-09-30.endive";
/// How long one try may take, its body included.
const TRY_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest answer that is read, in bytes: a hundred events, each of a size that a webhook would be taken at.
const ANSWER_LIMIT: usize = 100 << 20;
/// What a list answers at most, by Stripe's rules.
const PAGE: &str = "100";
/// Tries after the first, where nobody waits for the answer: about half a minute.
pub const RETRIES: usize = 6;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(8);

/// Cheap to clone; clones share the connections, the budget and the count.
#[derive(Clone)]
pub struct StripeApi(Arc<Shared>);

struct Shared {
    transport: HttpClient,
    base: String,
    bearer: HeaderValue,
    budget: RateLimit,
    retries: usize,
    calls: AtomicU64,
    /// What time it was at Stripe with the last answer, Unix seconds; 0: there was none.
    answered_s: AtomicI64,
}

/// Whose objects are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The account of the key.
    Own,
    /// A connected account: `acct_...`.
    Account(String),
    /// What a thin event names as its context.
    Context(String),
}

impl Scope {
    /// Returns the connected account: `acct_1` alone, or at the end of a path of contexts.
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

#[derive(Clone, Debug, thiserror::Error)]
pub enum StripeApiError {
    /// No answer that could be used, however often it was asked.
    #[error("Stripe cannot be reached: {0}")]
    Away(String),
    /// It has too much to do for this account, however often it was asked.
    #[error("Stripe takes no more calls now: {0}")]
    Busy(String),
    /// The key is not valid: nothing can be asked.
    #[error("Stripe does not accept STRIPE_API_KEY: {0}")]
    Unauthorized(String),
    /// Stripe answered, and asking again changes nothing.
    #[error("Stripe refused {path}: {reason}")]
    Refused {
        path: String,
        status: u16,
        reason: String,
    },
}

/// Parts of a query; names as Stripe writes them, such as `created[gte]`.
pub type Query<'q> = &'q [(&'q str, &'q str)];

impl StripeApi {
    pub fn new(settings: StripeSettings) -> StripeApi {
        StripeApi(Arc::new(Shared {
            transport: HttpClient::new(TRY_TIMEOUT, ANSWER_LIMIT),
            base: settings.base,
            bearer: settings.key.bearer(),
            budget: RateLimit::new(settings.rate),
            retries: settings.retries,
            calls: AtomicU64::new(0),
            answered_s: AtomicI64::new(0),
        }))
    }

    /// How many calls were made so far, retries among them.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::Relaxed)
    }

    /// What time it was at Stripe when it last answered, Unix seconds.
    pub fn answered_s(&self) -> Option<i64> {
        Some(self.0.answered_s.load(Ordering::Relaxed)).filter(|seconds| *seconds != 0)
    }

    /// A page of a list such as `/v1/events`.
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
        let query = [query, &[("limit", PAGE)]].concat();
        let answer = self.call(path, &query, scope).await?;
        let list: List = serde_json::from_slice(&answer)
            .map_err(|error| refused(path, 200, &format!("no list: {error}")))?;
        Ok(StripePage {
            data: list.data,
            has_more: list.has_more,
        })
    }

    /// An object such as `/v1/invoices/in_1`. None: there is none, or not for this key.
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
            .map_err(|error| refused(path, 200, &format!("no JSON: {error}")))
    }

    async fn call(
        &self,
        path: &str,
        query: Query<'_>,
        scope: &Scope,
    ) -> Result<Bytes, StripeApiError> {
        let query = encode(query);
        // What the crate cannot say goes beside it: it knows no context, and prefixes no version but v1.
        let (path_in_v1, account) = match (path.strip_prefix("/v1"), scope) {
            (Some(path), Scope::Own) => (path, None),
            (Some(path), Scope::Account(account)) => (path, Some(account)),
            _ => return self.with_retries(path, &query, scope).await,
        };
        let mut request = RequestBuilder::new(StripeMethod::Get, path_in_v1);
        request.query = Some(query);
        let mut request = request.customize::<()>();
        if let Some(account) = account {
            request = request.account_id(account.as_str().into());
        }
        let exchange = Exchange {
            api: self,
            answer: Mutex::default(),
        };
        request.send(&exchange).await?;
        let answer = exchange
            .answer
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        answer.ok_or_else(|| StripeApiError::Away("nothing was asked".to_owned()))
    }

    async fn with_retries(
        &self,
        path: &str,
        query: &str,
        scope: &Scope,
    ) -> Result<Bytes, StripeApiError> {
        let backoff = ExponentialBuilder::new()
            .with_min_delay(FIRST_WAIT)
            .with_max_delay(LONGEST_WAIT)
            .with_max_times(self.0.retries)
            .with_jitter();
        let once = || self.once(path, query, scope);
        let ended = once
            .retry(backoff)
            .when(|failure: &Failure| failure.passes)
            .await;
        ended.map_err(|failure| failure.error)
    }

    async fn once(&self, path: &str, query: &str, scope: &Scope) -> Result<Bytes, Failure> {
        self.0.budget.acquire(endpoint(path)).await;
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        let mut request = Request::get(format!(
            "{}{path}{}{query}",
            self.0.base,
            if query.is_empty() { "" } else { "?" }
        ))
        .header("authorization", self.0.bearer.clone())
        .header("stripe-version", VERSION)
        .header(
            "user-agent",
            concat!("stripe-reconciler/", env!("CARGO_PKG_VERSION")),
        );
        request = match scope {
            Scope::Own => request,
            Scope::Account(account) => request.header("stripe-account", account),
            Scope::Context(context) => request.header("stripe-context", context),
        };
        let request = request
            .body(Full::default())
            .map_err(|error| Failure::lasting(refused(path, 0, &error.to_string())))?;
        let span = tracing::debug_span!(
            "ask Stripe",
            otel.kind = "client",
            http.request.method = "GET",
            url.path = path,
            http.response.status_code = field::Empty
        );
        let answer = self
            .0
            .transport
            .send(request)
            .instrument(span.clone())
            .await?;
        span.record("http.response.status_code", answer.status().as_u16());
        let date = answer
            .headers()
            .get("date")
            .and_then(|value| value.to_str().ok());
        if let Some(date) = date.and_then(|text| jiff::fmt::rfc2822::parse(text).ok()) {
            self.0
                .answered_s
                .store(date.timestamp().as_second(), Ordering::Relaxed);
        }
        understand(path, &answer)
    }
}

/// What the crate asks through: it hands on only what its own reader made of an answer, so the bytes are put by here.
struct Exchange<'a> {
    api: &'a StripeApi,
    answer: Mutex<Option<Bytes>>,
}

impl StripeClient for Exchange<'_> {
    type Err = StripeApiError;

    async fn execute(&self, request: CustomizedStripeRequest) -> Result<Bytes, StripeApiError> {
        let (request, overrides) = request.into_pieces();
        let scope = overrides
            .account_id
            .map_or(Scope::Own, |id| Scope::Account(id.as_str().to_owned()));
        let path = format!("/v1{}", request.path);
        let answer = self
            .api
            .with_retries(&path, request.query.as_deref().unwrap_or_default(), &scope)
            .await?;
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        Ok(Bytes::from_static(b"null"))
    }
}

impl StripeClientErr for StripeApiError {
    fn deserialize_err(message: impl std::fmt::Display) -> StripeApiError {
        StripeApiError::Away(message.to_string())
    }
}

/// Why one try brought nothing, and whether another may.
struct Failure {
    error: StripeApiError,
    passes: bool,
}

impl Failure {
    fn passing(reason: String) -> Failure {
        Failure {
            error: StripeApiError::Away(reason),
            passes: true,
        }
    }

    fn lasting(error: StripeApiError) -> Failure {
        Failure {
            error,
            passes: false,
        }
    }
}

impl From<HttpClientError> for Failure {
    fn from(error: HttpClientError) -> Failure {
        Failure::passing(error.to_string())
    }
}

fn understand(path: &str, answer: &Response<Bytes>) -> Result<Bytes, Failure> {
    let (status, body) = (answer.status(), answer.body());
    if status.is_success() {
        // Cut short, or not from Stripe at all: the next answer may be whole.
        let is_whole = serde_json::from_slice::<&RawValue>(body);
        return is_whole
            .map(|_| body.clone())
            .map_err(|_| Failure::passing(format!("the answer to {path} is no JSON")));
    }
    let reason = reason(status, body);
    let told = answer
        .headers()
        .get("stripe-should-retry")
        .and_then(|value| value.to_str().ok());
    let is_passing = match (told, status.as_u16()) {
        (Some("true"), _) => true,
        (Some("false"), _) => false,
        (_, 409 | 424 | 429 | 500..) => true,
        _ => false,
    };
    let is_away = is_passing || status.is_server_error();
    let error = match status {
        StatusCode::UNAUTHORIZED => StripeApiError::Unauthorized(reason),
        StatusCode::TOO_MANY_REQUESTS => {
            StripeApiError::Busy(format!("{path} was answered {reason}"))
        }
        _ if is_away => StripeApiError::Away(format!("{path} was answered {reason}")),
        status => refused(path, status.as_u16(), &reason),
    };
    Err(Failure {
        error,
        passes: is_passing,
    })
}

/// Stripe's own words, from the error in the body; a page of somebody else's is not repeated.
fn reason(status: StatusCode, body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        error: Error,
    }
    #[derive(Deserialize)]
    struct Error {
        message: Option<String>,
        code: Option<String>,
    }
    let told = serde_json::from_slice::<Body>(body).ok();
    let words = told.and_then(|body| body.error.message.or(body.error.code));
    // The message about a wrong key repeats a part of it, and says no more than the status. That about a right that a key lacks does
    // so, too, behind a hundred asterisks, and then says which.
    match words.filter(|_| status != StatusCode::UNAUTHORIZED) {
        Some(words) => format!("{status}: {}", redact::clean(&words)),
        None => status.to_string(),
    }
}

fn refused(path: &str, status: u16, reason: &str) -> StripeApiError {
    StripeApiError::Refused {
        path: path.to_owned(),
        status,
        reason: reason.to_owned(),
    }
}

/// `/v1/invoices/in_1` counts against `/v1/invoices`.
fn endpoint(path: &str) -> &str {
    match path.match_indices('/').nth(2) {
        Some((end, _)) => &path[..end],
        None => path,
    }
}

fn encode(query: Query) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'~');
    let part = |text| utf8_percent_encode(text, RESERVED).to_string();
    let parts: Vec<String> = query
        .iter()
        .map(|(name, value)| format!("{}={}", part(name), part(value)))
        .collect();
    parts.join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, should_retry: Option<&str>, body: &'static str) -> Response<Bytes> {
        let mut answer = Response::builder().status(status);
        if let Some(told) = should_retry {
            answer = answer.header("stripe-should-retry", told);
        }
        answer.body(Bytes::from_static(body.as_bytes())).unwrap()
    }

    #[test]
    fn what_passes_is_tried_again_and_what_lasts_is_not() {
        let passes = |answer: Response<Bytes>| {
            understand("/v1/events", &answer)
                .err()
                .map(|failure| failure.passes)
        };
        assert_eq!(passes(answer(200, None, "{}")), None);
        assert_eq!(passes(answer(200, None, "{\"data\":[")), Some(true));
        for status in [409, 424, 429, 500, 502, 503, 504] {
            assert_eq!(
                passes(answer(status, None, "<html>")),
                Some(true),
                "{status}"
            );
        }
        for status in [400, 401, 402, 403, 404] {
            assert_eq!(passes(answer(status, None, "")), Some(false), "{status}");
        }
        assert_eq!(passes(answer(500, Some("false"), "")), Some(false));
        assert_eq!(passes(answer(400, Some("true"), "")), Some(true));
    }

    #[test]
    fn an_error_says_what_stripe_said_but_never_a_part_of_the_key() {
        let said = |status, body| {
            understand("/v1/events", &answer(status, None, body))
                .err()
                .unwrap()
                .error
                .to_string()
        };
        let denied = said(
            403,
            r#"{"error":{"message":"The key lacks `rak_event_read`."}}"#,
        );
        assert_eq!(
            denied,
            "Stripe refused /v1/events: 403 Forbidden: The key lacks `rak_event_read`."
        );
        let hidden = format!(
            "The provided key 'rk_live_{}qs8Kgd' does not have the required permissions for this endpoint on account \
             'acct_1'. Having the 'rak_event_read' permission would allow this request to continue.",
            "*".repeat(93)
        );
        let hidden = serde_json::json!({"error": {"message": hidden}}).to_string();
        let lacks = said(403, Box::leak(hidden.into_boxed_str()));
        assert!(
            !lacks.contains("qs8Kgd") && lacks.contains("Having the 'rak_event_read' permission"),
            "{lacks}"
        );
        let unauthorized = said(
            401,
            r#"{"error":{"message":"Invalid API Key provided: sk_live_abc"}}"#,
        );
        assert_eq!(
            unauthorized,
            "Stripe does not accept STRIPE_API_KEY: 401 Unauthorized"
        );
    }

    #[test]
    fn every_path_counts_against_its_endpoint() {
        assert_eq!(endpoint("/v1/events"), "/v1/events");
        assert_eq!(endpoint("/v1/invoices/in_1"), "/v1/invoices");
        assert_eq!(endpoint("/v1/invoices/in_1/lines"), "/v1/invoices");
    }

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

    #[test]
    fn a_query_is_encoded() {
        assert_eq!(
            encode(&[("created[gte]", "1"), ("x", "a&b")]),
            "created%5Bgte%5D=1&x=a%26b"
        );
        assert_eq!(encode(&[]), "");
    }
}
