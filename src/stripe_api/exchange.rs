//! Sends one request to Stripe, retries it, and classifies the response.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use stripe_client_core::{
    CustomizedStripeRequest, RequestBuilder, StripeClient, StripeClientErr, StripeMethod,
};
use tracing::{Instrument, field};

use super::{Query, Scope, StripeApi, StripeApiError, VERSION};
use crate::domain::redact;
use crate::http_client::HttpClientError;

/// Delay before the first retry. It doubles with each retry.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Longest delay between two attempts.
const MAX_DELAY: Duration = Duration::from_secs(8);

impl StripeApi {
    /// Returns the body of a successful response.
    pub(super) async fn call(
        &self,
        path: &str,
        query: Query<'_>,
        scope: &Scope,
    ) -> Result<Bytes, StripeApiError> {
        let query = encode(query);
        // async-stripe supports neither contexts nor versions other than v1, so those calls bypass
        // it.
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
        answer.ok_or_else(|| StripeApiError::Away("no request was sent".to_owned()))
    }

    async fn with_retries(
        &self,
        path: &str,
        query: &str,
        scope: &Scope,
    ) -> Result<Bytes, StripeApiError> {
        let backoff = ExponentialBuilder::new()
            .with_min_delay(FIRST_DELAY)
            .with_max_delay(MAX_DELAY)
            .with_max_times(self.0.retries)
            .with_jitter();
        let attempt = || self.attempt(path, query, scope);
        let ended = attempt
            .retry(backoff)
            .when(|failure: &Failure| failure.is_transient)
            .await;

        ended.map_err(|failure| failure.error)
    }

    async fn attempt(&self, path: &str, query: &str, scope: &Scope) -> Result<Bytes, Failure> {
        self.0.rate_limit.acquire(endpoint(path)).await;
        self.0.calls.fetch_add(1, Ordering::Relaxed);

        let request = self.request(path, query, scope)?;
        let span = tracing::debug_span!(
            "call Stripe",
            otel.kind = "client",
            http.request.method = "GET",
            url.path = path,
            http.response.status_code = field::Empty
        );
        let sent = self.0.client.send(request).instrument(span.clone()).await;
        let answer = sent.map_err(|error| Failure::from_client(path, error))?;
        span.record("http.response.status_code", answer.status().as_u16());

        self.record_time(&answer);
        classify(path, &answer)
    }

    fn request(
        &self,
        path: &str,
        query: &str,
        scope: &Scope,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let separator = if query.is_empty() { "" } else { "?" };
        let request = Request::get(format!("{}{path}{separator}{query}", self.0.base))
            .header("authorization", self.0.bearer.clone())
            .header("stripe-version", VERSION)
            .header(
                "user-agent",
                concat!("stripe-reconciler/", env!("CARGO_PKG_VERSION")),
            );
        let request = match scope {
            Scope::Own => request,
            Scope::Account(account) => request.header("stripe-account", account),
            Scope::Context(context) => request.header("stripe-context", context),
        };

        request
            .body(Full::default())
            .map_err(|error| Failure::lasting(denied(path, 0, &error.to_string())))
    }

    /// Stores the time of Stripe's clock, which `doctor` compares with ours.
    fn record_time(&self, answer: &Response<Bytes>) {
        let date = answer
            .headers()
            .get("date")
            .and_then(|value| value.to_str().ok());
        if let Some(date) = date.and_then(|text| jiff::fmt::rfc2822::parse(text).ok()) {
            let seconds = date.timestamp().as_second();
            self.0.answered_s.store(seconds, Ordering::Relaxed);
        }
    }
}

/// The transport that async-stripe sends through. The crate returns only what its own types read,
/// so this keeps the bytes and hands the crate `null`.
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
        let query = request.query.as_deref().unwrap_or_default();
        let answer = self.api.with_retries(&path, query, &scope).await?;

        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        Ok(Bytes::from_static(b"null"))
    }
}

impl StripeClientErr for StripeApiError {
    fn deserialize_err(message: impl fmt::Display) -> StripeApiError {
        StripeApiError::Away(message.to_string())
    }
}

/// The error of a failed attempt.
struct Failure {
    error: StripeApiError,
    /// `true` if a retry may succeed.
    is_transient: bool,
}

impl Failure {
    fn transient(reason: String) -> Failure {
        Failure {
            error: StripeApiError::Away(reason),
            is_transient: true,
        }
    }

    fn lasting(error: StripeApiError) -> Failure {
        Failure {
            error,
            is_transient: false,
        }
    }

    /// Converts an error of the HTTP client. A response above the size limit is not retried: it
    /// would exceed the limit again and cost as much.
    fn from_client(path: &str, error: HttpClientError) -> Failure {
        match error {
            HttpClientError::TooLarge(_) => {
                Failure::lasting(StripeApiError::invalid(path, error.to_string()))
            }
            HttpClientError::Timeout(_) | HttpClientError::Failed(_) => {
                Failure::transient(error.to_string())
            }
        }
    }
}

/// Returns the body of a successful response.
///
/// # Errors
/// A transient or lasting [`Failure`]. Stripe's header `stripe-should-retry` overrides the status.
fn classify(path: &str, answer: &Response<Bytes>) -> Result<Bytes, Failure> {
    let (status, body) = (answer.status(), answer.body());
    if status.is_success() {
        // The response was cut short or came from a proxy. The next one may be complete.
        let parsed = serde_json::from_slice::<&RawValue>(body);
        return parsed
            .map(|_| body.clone())
            .map_err(|_| Failure::transient(format!("the response to {path} is not JSON")));
    }

    let reason = reason(status, body);
    let should_retry = answer
        .headers()
        .get("stripe-should-retry")
        .and_then(|value| value.to_str().ok());
    let is_transient = match (should_retry, status.as_u16()) {
        (Some("true"), _) => true,
        (Some("false"), _) => false,
        (_, 409 | 424 | 429 | 500..) => true,
        _ => false,
    };
    let is_away = is_transient || status.is_server_error();
    let error = match status {
        StatusCode::UNAUTHORIZED => StripeApiError::Unauthorized(reason),
        StatusCode::TOO_MANY_REQUESTS => StripeApiError::Busy(format!("{path} answered {reason}")),
        _ if is_away => StripeApiError::Away(format!("{path} answered {reason}")),
        status => denied(path, status.as_u16(), &reason),
    };
    Err(Failure {
        error,
        is_transient,
    })
}

/// Returns the status, followed by Stripe's own message if that is safe and useful.
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

    let parsed = serde_json::from_slice::<Body>(body).ok();
    let message = parsed.and_then(|body| body.error.message.or(body.error.code));
    // Drop 401 messages: they echo part of the key and add nothing. Keep 403 messages, redacted:
    // they echo the masked key but name the missing permission.
    match message.filter(|_| status != StatusCode::UNAUTHORIZED) {
        Some(message) => format!("{status}: {}", redact::clean(&message)),
        None => status.to_string(),
    }
}

fn denied(path: &str, status: u16, reason: &str) -> StripeApiError {
    StripeApiError::Refused {
        path: path.to_owned(),
        status,
        reason: reason.to_owned(),
    }
}

/// Returns the endpoint whose rate limit applies to a path: `/v1/invoices` for `/v1/invoices/in_1`.
fn endpoint(path: &str) -> &str {
    match path.match_indices('/').nth(2) {
        Some((end, _)) => &path[..end],
        None => path,
    }
}

/// Percent-encodes query parameters.
fn encode(query: Query) -> String {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'~');

    let encoded = |text| utf8_percent_encode(text, RESERVED).to_string();
    let parameters: Vec<String> = query
        .iter()
        .map(|(name, value)| format!("{}={}", encoded(name), encoded(value)))
        .collect();
    parameters.join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, should_retry: Option<&str>, body: &'static str) -> Response<Bytes> {
        let mut answer = Response::builder().status(status);
        if let Some(value) = should_retry {
            answer = answer.header("stripe-should-retry", value);
        }
        answer.body(Bytes::from_static(body.as_bytes())).unwrap()
    }

    #[test]
    fn transient_failures_are_retried_and_others_are_not() {
        let is_transient = |answer: Response<Bytes>| {
            classify("/v1/events", &answer)
                .err()
                .map(|failure| failure.is_transient)
        };

        assert_eq!(is_transient(answer(200, None, "{}")), None);
        assert_eq!(is_transient(answer(200, None, "{\"data\":[")), Some(true));
        for status in [409, 424, 429, 500, 502, 503, 504] {
            assert_eq!(
                is_transient(answer(status, None, "<html>")),
                Some(true),
                "{status}"
            );
        }

        for status in [400, 401, 402, 403, 404] {
            assert_eq!(
                is_transient(answer(status, None, "")),
                Some(false),
                "{status}"
            );
        }

        assert_eq!(is_transient(answer(500, Some("false"), "")), Some(false));
        assert_eq!(is_transient(answer(400, Some("true"), "")), Some(true));
    }

    #[test]
    fn error_keeps_stripes_message_but_no_part_of_the_key() {
        let message = |status, body| {
            classify("/v1/events", &answer(status, None, body))
                .err()
                .unwrap()
                .error
                .to_string()
        };
        let denied = message(
            403,
            r#"{"error":{"message":"The key lacks `rak_event_read`."}}"#,
        );
        assert_eq!(
            denied,
            "Stripe rejected /v1/events: 403 Forbidden: The key lacks `rak_event_read`."
        );

        let hidden = format!(
            "The provided key 'rk_live_{}qs8Kgd' does not have the required permissions for this \
             endpoint on account 'acct_1'. Having the 'rak_event_read' permission would allow this \
             request to continue.",
            "*".repeat(93)
        );
        let hidden = serde_json::json!({"error": {"message": hidden}}).to_string();
        let lacks = message(403, Box::leak(hidden.into_boxed_str()));
        assert!(
            !lacks.contains("qs8Kgd") && lacks.contains("Having the 'rak_event_read' permission"),
            "{lacks}"
        );

        let unauthorized = message(
            401,
            r#"{"error":{"message":"Invalid API Key provided: sk_live_abc"}}"#,
        );
        assert_eq!(
            unauthorized,
            "Stripe does not accept STRIPE_API_KEY: 401 Unauthorized"
        );
    }

    #[test]
    fn path_counts_against_its_endpoint() {
        assert_eq!(endpoint("/v1/events"), "/v1/events");
        assert_eq!(endpoint("/v1/invoices/in_1"), "/v1/invoices");
        assert_eq!(endpoint("/v1/invoices/in_1/lines"), "/v1/invoices");
    }

    #[test]
    fn query_is_encoded() {
        assert_eq!(
            encode(&[("created[gte]", "1"), ("x", "a&b")]),
            "created%5Bgte%5D=1&x=a%26b"
        );
        assert_eq!(encode(&[]), "");
    }
}
