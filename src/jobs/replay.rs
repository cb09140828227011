//! Recorded payloads, once more: into the store without a signature (the operator's word is enough), or over HTTP, signed afresh.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode};

use super::json_reader;
use crate::clock::Clock;
use crate::domain::stripe::event::{Reading, read};
use crate::domain::stripe::signature::sign;
use crate::domain::stripe::signing_secrets::SigningSecrets;
use crate::http_client::HttpClient;
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::ingest::{Delivery, Outcome, ingest};
use crate::store::Source;

/// Deliveries under way at a time, into the store: as many as one commit takes.
const INTO_STORE: usize = 256;
/// Deliveries under way at a time, over HTTP.
const OVER_HTTP: usize = 8;
/// How often a busy server is asked.
const ATTEMPTS: u32 = 5;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 64 * 1024;

/// Where recorded payloads go.
pub enum Target {
    Store(BatchWriter),
    Url(Box<Endpoint>),
}

/// How many payloads met which end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayCounts {
    pub recorded: u64,
    pub duplicate: u64,
    pub no_payment_fact: u64,
    pub unreadable: u64,
    /// Not delivered: no JSON, no event, or not accepted.
    pub refused: u64,
}

/// Gets to know what happens meanwhile.
pub trait ProgressSink {
    /// `line` 0: the file as a whole.
    fn refused(&mut self, file: &Path, line: usize, reason: &str);
    fn progress(&mut self, counts: ReplayCounts);
}

/// The target cannot be reached: replaying stops.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    BatchWriter(#[from] AppendError),
    #[error("{url} cannot be reached: {reason}")]
    Unreachable { url: String, reason: String },
}

/// What one delivery came to: an outcome, or why it was refused.
pub type Delivered = Result<Result<Outcome, String>, ReplayError>;

/// Replays one file (`-`: standard input), adding to `counts`.
///
/// # Errors
/// [`ReplayError`]; what was delivered before stays delivered.
pub async fn file(
    target: &Target,
    path: &Path,
    clock: &Clock,
    watcher: &mut impl ProgressSink,
    counts: &mut ReplayCounts,
) -> Result<(), ReplayError> {
    let at_once = match target {
        Target::Store(_) => INTO_STORE,
        Target::Url(_) => OVER_HTTP,
    };
    let mut documents = json_reader::stream(path);
    let mut under_way = FuturesUnordered::new();
    let mut more = true;
    while more || !under_way.is_empty() {
        tokio::select! {
            document = documents.recv(), if more && under_way.len() < at_once => match document {
                None => more = false,
                Some(Err(error)) => refuse(watcher, counts, path, 0, &format!("cannot be read: {error}")),
                Some(Ok(document)) => match document.text.and_then(recorded_event) {
                    Ok(body) => under_way.push(deliver(target, body, document.line, clock.now_ms())),
                    Err(reason) => refuse(watcher, counts, path, document.line, &reason),
                },
            },
            Some((line, delivered)) = under_way.next() => {
                match delivered? {
                    Ok(Outcome::Recorded) => counts.recorded += 1,
                    Ok(Outcome::Duplicate) => counts.duplicate += 1,
                    Ok(Outcome::NoPaymentFact) => counts.no_payment_fact += 1,
                    Ok(Outcome::Unreadable) => counts.unreadable += 1,
                    Err(reason) => refuse(watcher, counts, path, line, &reason),
                }
                watcher.progress(*counts);
            }
        }
    }
    Ok(())
}

/// All files below a folder, by name; a path that is no folder is itself.
///
/// # Errors
/// A folder cannot be read.
pub fn walk(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut entries = std::fs::read_dir(path)?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort();
    let is_recorded = |path: &PathBuf| {
        path.is_dir()
            || path
                .extension()
                .is_some_and(|e| e == "json" || e == "jsonl" || e == "ndjson")
    };
    let mut files = Vec::new();
    for entry in entries.into_iter().filter(is_recorded) {
        files.extend(walk(&entry)?);
    }
    Ok(files)
}

fn refuse(
    watcher: &mut impl ProgressSink,
    counts: &mut ReplayCounts,
    path: &Path,
    line: usize,
    reason: &str,
) {
    counts.refused += 1;
    watcher.refused(path, line, reason);
}

/// What is no event was never Stripe's, and is not kept: only what Stripe signed is kept unread.
fn recorded_event(text: String) -> Result<Bytes, String> {
    match read(text.as_bytes()) {
        Reading::Event(_) => Ok(Bytes::from(text)),
        Reading::Unreadable { reason, .. } => Err(reason),
    }
}

async fn deliver(target: &Target, body: Bytes, line: usize, now_ms: i64) -> (usize, Delivered) {
    let delivered = match target {
        Target::Store(inbox) => {
            let delivery = Delivery {
                body,
                source: Source::Replay,
                secret_label: None,
                received_ms: now_ms,
            };
            ingest(inbox, delivery)
                .await
                .map(Ok)
                .map_err(ReplayError::from)
        }
        Target::Url(endpoint) => endpoint.post(body).await,
    };
    (line, delivered)
}

/// A webhook endpoint, and the secret that it believes.
pub struct Endpoint {
    url: String,
    secrets: SigningSecrets,
    clock: Clock,
    transport: HttpClient,
}

impl Endpoint {
    pub fn new(url: String, secrets: SigningSecrets, clock: Clock) -> Endpoint {
        Endpoint {
            url,
            secrets,
            clock,
            transport: HttpClient::new(ANSWER_TIMEOUT, ANSWER_LIMIT),
        }
    }

    /// Signs the body and delivers it, again while the endpoint is busy.
    pub async fn post(&self, body: Bytes) -> Delivered {
        let mut wait = Duration::from_millis(250);
        let mut answer = self.post_once(body.clone()).await?;
        for _ in 1..ATTEMPTS {
            if answer.status() != StatusCode::SERVICE_UNAVAILABLE {
                break;
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
            answer = self.post_once(body.clone()).await?;
        }
        Ok(understand(answer.status(), answer.body()))
    }

    async fn post_once(&self, body: Bytes) -> Result<Response<Bytes>, ReplayError> {
        let unreachable = |reason: &dyn std::fmt::Display| ReplayError::Unreachable {
            url: self.url.clone(),
            reason: reason.to_string(),
        };
        let signature = sign(self.secrets.first(), self.clock.now_s(), &body);
        let request = Request::post(&self.url)
            .header("content-type", "application/json")
            .header("stripe-signature", signature);
        let request = request.body(Full::new(body)).map_err(|e| unreachable(&e))?;
        self.transport
            .send(request)
            .await
            .map_err(|e| unreachable(&e))
    }
}

/// Our own endpoint says what became of a delivery; any other's 2xx counts as recorded.
fn understand(status: StatusCode, answer: &[u8]) -> Result<Outcome, String> {
    if !status.is_success() {
        return Err(format!("was answered {status}"));
    }
    let answer: serde_json::Value = serde_json::from_slice(answer).unwrap_or_default();
    Ok(match answer["outcome"].as_str() {
        Some("duplicate") => Outcome::Duplicate,
        Some("no_payment_fact") => Outcome::NoPaymentFact,
        Some("unreadable") => Outcome::Unreadable,
        _ => Outcome::Recorded,
    })
}
