//! An HTTP client with one pool of connections. Every wait and every body has a limit.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{Request, Response};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// Longest time that an unused connection stays in the pool.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A pool of connections; cheap to clone, and clones share it.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
    /// Largest accepted response body, in bytes.
    limit: usize,
}

/// The reason why there is no complete response. The messages contain no part of the request.
#[derive(Debug, thiserror::Error)]
pub enum HttpClientError {
    #[error("no response within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the response is larger than {} MiB", .0 >> 20)]
    TooLarge(usize),
    #[error("{0}")]
    Failed(String),
}

impl HttpClient {
    /// Creates a pool. `timeout` applies to a whole exchange, its bodies included. `limit` is the
    /// largest accepted response body, in bytes.
    pub fn new(timeout: Duration, limit: usize) -> HttpClient {
        let tls = hyper_rustls::HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build(tls);

        HttpClient {
            client,
            timeout,
            limit,
        }
    }

    /// Sends a request and returns the complete response, whatever its status.
    ///
    /// # Errors
    /// See [`HttpClientError`].
    pub async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, HttpClientError> {
        let exchange = async {
            let response = self.client.request(request).await;
            let (head, body) = response.map_err(|error| failed(&error))?.into_parts();
            let collected = Limited::new(body, self.limit).collect().await;
            let body = collected.map_err(|error| self.body_failed(&*error))?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };

        tokio::time::timeout(self.timeout, exchange)
            .await
            .unwrap_or(Err(HttpClientError::Timeout(self.timeout)))
    }

    /// Returns the error for a response body that could not be read.
    fn body_failed(&self, error: &(dyn Error + Send + Sync + 'static)) -> HttpClientError {
        if error.is::<LengthLimitError>() {
            return HttpClientError::TooLarge(self.limit);
        }

        HttpClientError::Failed(error.to_string())
    }
}

/// Converts an error of hyper. Its own message only says that a request failed, so the deepest
/// cause is used.
fn failed(error: &dyn Error) -> HttpClientError {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    HttpClientError::Failed(cause.to_string())
}
