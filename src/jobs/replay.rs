//! Delivers recorded payloads again: to the store without a signature, because the operator vouches
//! for them, or over HTTP with a new signature.

use std::path::{Path, PathBuf};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode};

use super::json_reader::{self, Document};
use super::{InvalidDocument, ProgressSink};
use crate::clock::Clock;
use crate::domain::stripe::event::{Reading, read};
use crate::domain::stripe::signature::sign;
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::http_client::HttpClient;
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::ingest::{Delivery, Outcome, ingest};
use crate::store::Source;

/// Concurrent deliveries to the store. They share one transaction. On SQLite a delivery of a
/// serving process waits for it.
const STORE_CONCURRENCY: usize = 64;
/// Concurrent deliveries over HTTP.
const HTTP_CONCURRENCY: usize = 8;
/// Repetitions of a request to an endpoint that answers 503.
const RETRIES: usize = 4;
/// Delay before the first repetition. It doubles each time.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Longest time until a response is complete.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest response that is read, in bytes.
const MAX_RESPONSE_BYTES: usize = 64 * 1024;

/// The receiver of recorded payloads.
pub enum Target {
    Store(BatchWriter),
    Url(Box<Endpoint>),
}

/// Number of payloads by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayCounts {
    pub recorded: u64,
    pub duplicate: u64,
    pub no_payment_fact: u64,
    pub unreadable: u64,
    /// Payloads that were not delivered: they are not JSON, are not events, or were rejected.
    pub invalid: u64,
}

/// The reason why a replay stopped: the target is unavailable.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    BatchWriter(#[from] AppendError),
    #[error("{url} is unreachable: {reason}")]
    Unreachable { url: String, reason: String },
}

/// The outcome of one delivery, or the reason why the target rejected it.
pub type Delivered = Result<Result<Outcome, String>, ReplayError>;

/// Replays files to one target.
pub struct Replayer<'r, P> {
    pub target: &'r Target,
    pub clock: &'r Clock,
    pub sink: &'r mut P,
    pub counts: ReplayCounts,
}

impl ReplayCounts {
    fn add(&mut self, outcome: Outcome) {
        *match outcome {
            Outcome::Recorded => &mut self.recorded,
            Outcome::Duplicate => &mut self.duplicate,
            Outcome::NoPaymentFact => &mut self.no_payment_fact,
            Outcome::Unreadable => &mut self.unreadable,
        } += 1;
    }

    fn total(self) -> u64 {
        self.recorded + self.duplicate + self.no_payment_fact + self.unreadable + self.invalid
    }
}

impl<P: ProgressSink> Replayer<'_, P> {
    /// Replays all files below a path (`-` for standard input) and adds to the counts.
    ///
    /// # Errors
    /// Returns an error if the target is unavailable. Payloads delivered before stay delivered.
    pub async fn replay(&mut self, path: &Path) -> Result<(), ReplayError> {
        match recorded_files(path) {
            Ok(files) => {
                for file in files {
                    self.replay_file(&file).await?;
                }
            }
            Err(error) => self.report(path, 0, format!("cannot be read: {error}")),
        }
        Ok(())
    }

    async fn replay_file(&mut self, path: &Path) -> Result<(), ReplayError> {
        let target = self.target;
        let concurrency = match target {
            Target::Store(_) => STORE_CONCURRENCY,
            Target::Url(_) => HTTP_CONCURRENCY,
        };
        let mut documents = json_reader::stream(path);
        let mut in_flight = FuturesUnordered::new();
        let mut is_at_end = false;

        while !is_at_end || !in_flight.is_empty() {
            tokio::select! {
                document = documents.recv(), if !is_at_end && in_flight.len() < concurrency => {
                    match document {
                        None => is_at_end = true,
                        Some(Err(error)) => {
                            self.report(path, 0, format!("cannot be read: {error}"));
                        }
                        Some(Ok(Document { line, text })) => match text.and_then(recorded_event) {
                            Ok(body) => {
                                let now_ms = self.clock.now_ms();
                                in_flight.push(deliver(target, body, line, now_ms));
                            }
                            Err(reason) => self.report(path, line, reason),
                        },
                    }
                }
                Some((line, delivered)) = in_flight.next() => {
                    match delivered? {
                        Ok(outcome) => self.counts.add(outcome),
                        Err(reason) => self.report(path, line, reason),
                    }
                    self.sink.progress(self.counts.total());
                }
            }
        }
        Ok(())
    }

    fn report(&mut self, file: &Path, line: usize, reason: String) {
        self.counts.invalid += 1;
        self.sink.invalid(InvalidDocument {
            file: file.to_owned(),
            line,
            reasons: vec![reason],
        });
    }
}

/// Returns all recordings below a folder, sorted by name, or the path itself if it is not a folder.
///
/// # Errors
/// Returns an error if a folder cannot be read.
fn recorded_files(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut entries = std::fs::read_dir(path)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort();

    let mut files = Vec::new();
    for entry in entries {
        let is_recording = entry
            .extension()
            .is_some_and(|e| e == "json" || e == "jsonl" || e == "ndjson");
        if entry.is_dir() || is_recording {
            files.extend(recorded_files(&entry)?);
        }
    }
    Ok(files)
}

/// Rejects payloads that are not events: the program stores unreadable payloads only if Stripe
/// signed them.
fn recorded_event(text: String) -> Result<Bytes, String> {
    match read(text.as_bytes()) {
        Reading::Event(_) => Ok(Bytes::from(text)),
        Reading::Unreadable { reason, .. } => Err(reason),
    }
}

async fn deliver(target: &Target, body: Bytes, line: usize, now_ms: i64) -> (usize, Delivered) {
    let delivered = match target {
        Target::Store(writer) => {
            let delivery = Delivery {
                body,
                source: Source::Replay,
                secret_label: None,
                received_ms: now_ms,
            };
            let outcome = ingest(writer, delivery).await;
            outcome.map(Ok).map_err(ReplayError::from)
        }
        Target::Url(endpoint) => endpoint.post(body).await,
    };

    (line, delivered)
}

/// A webhook endpoint, and the signing secret that it trusts.
pub struct Endpoint {
    url: String,
    secrets: SigningSecrets,
    clock: Clock,
    client: HttpClient,
}

/// The failure of one request, which decides whether it is repeated.
enum PostError {
    /// The endpoint answered 503.
    Busy(Response<Bytes>),
    Failed(ReplayError),
}

impl Endpoint {
    /// Returns an endpoint that accepts signatures made with the first of `secrets`.
    pub fn new(url: String, secrets: SigningSecrets, clock: Clock) -> Endpoint {
        Endpoint {
            url,
            secrets,
            clock,
            client: HttpClient::new(RESPONSE_TIMEOUT, MAX_RESPONSE_BYTES),
        }
    }

    /// Signs the body and delivers it. Repeats the request while the endpoint answers 503.
    pub async fn post(&self, body: Bytes) -> Delivered {
        let delays = ExponentialBuilder::new()
            .with_min_delay(FIRST_DELAY)
            .with_max_times(RETRIES);
        let posted = (|| self.post_once(body.clone()))
            .retry(delays)
            .when(|error| matches!(error, PostError::Busy(_)))
            .await;

        match posted {
            Ok(response) | Err(PostError::Busy(response)) => {
                Ok(outcome_of(response.status(), response.body()))
            }
            Err(PostError::Failed(error)) => Err(error),
        }
    }

    async fn post_once(&self, body: Bytes) -> Result<Response<Bytes>, PostError> {
        let signature = sign(self.secrets.first(), self.clock.now_s(), &body);
        let request = Request::post(&self.url)
            .header("content-type", "application/json")
            .header("stripe-signature", signature)
            .body(Full::new(body))
            .map_err(|error| self.unreachable(&error))?;

        let response = self.client.send(request).await;
        let response = response.map_err(|error| self.unreachable(&error))?;
        if response.status() == StatusCode::SERVICE_UNAVAILABLE {
            return Err(PostError::Busy(response));
        }
        Ok(response)
    }

    fn unreachable(&self, reason: &dyn std::fmt::Display) -> PostError {
        PostError::Failed(ReplayError::Unreachable {
            url: self.url.clone(),
            reason: reason.to_string(),
        })
    }
}

/// Reads the outcome from a response. Our own endpoint names it; any other 2xx counts as recorded.
fn outcome_of(status: StatusCode, response: &[u8]) -> Result<Outcome, String> {
    if !status.is_success() {
        return Err(format!("was rejected with {status}"));
    }
    let response: serde_json::Value = serde_json::from_slice(response).unwrap_or_default();
    Ok(match response["outcome"].as_str() {
        Some("duplicate") => Outcome::Duplicate,
        Some("no_payment_fact") => Outcome::NoPaymentFact,
        Some("unreadable") => Outcome::Unreadable,
        _ => Outcome::Recorded,
    })
}
