//! HTTP as a client: one pool of connections, a limit on every wait and every body.

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// How long a connection without work is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Cheap to clone; clones share the connections.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
    /// The largest answer that is read, in bytes.
    limit: usize,
}

/// No answer, or none that could be read to its end. In words, without what was sent.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HttpClientError(String);

impl HttpClient {
    /// `timeout` holds for an exchange as a whole, its body included.
    pub fn new(timeout: Duration, limit: usize) -> HttpClient {
        let tls = hyper_rustls::HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .build();
        let pool = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build(tls);
        HttpClient {
            client: pool,
            timeout,
            limit,
        }
    }

    /// The whole answer, whatever its status.
    ///
    /// # Errors
    /// See [`HttpClientError`].
    pub async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, HttpClientError> {
        let exchange = async {
            let (head, body) = self
                .client
                .request(request)
                .await
                .map_err(|e| failed(root(&e)))?
                .into_parts();
            let body = Limited::new(body, self.limit)
                .collect()
                .await
                .map_err(failed)?
                .to_bytes();
            Ok(Response::from_parts(head, body))
        };
        let answered = tokio::time::timeout(self.timeout, exchange).await;
        answered.unwrap_or_else(|_| {
            Err(failed(format!(
                "no answer within {} s",
                self.timeout.as_secs()
            )))
        })
    }
}

fn failed(reason: impl Display) -> HttpClientError {
    HttpClientError(reason.to_string())
}

/// hyper's own message says only that something failed; the deepest cause says what.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
