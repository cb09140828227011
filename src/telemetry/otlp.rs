//! Sends spans to a collector by OTLP over HTTP. No request waits for it: spans that do not fit
//! into the queue, or that the collector rejects, are dropped and counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Context, KeyValue};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span, SpanData, SpanProcessor};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use super::settings::OtlpSettings;
use crate::http_client::HttpClient;

/// Capacity of the queue in front of the collector, in spans.
const QUEUE: usize = 4096;
/// Largest number of spans in one request.
const BATCH: usize = 512;
/// Pause after a batch that was not full, so that spans gather.
const GATHER_DELAY: Duration = Duration::from_secs(1);
/// Longest time for one request, its response included.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time to send the queued spans when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest number of links of a span: a batch links to each request that it commits.
const MAX_LINKS: u32 = 1024;
/// Largest accepted response, in bytes.
const ANSWER_LIMIT: usize = 64 * 1024;

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Returns how many spans were dropped since the start.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The queue in front of the collector; cheap to clone.
#[derive(Clone, Debug)]
pub struct Queue(mpsc::Sender<Queued>);

#[derive(Debug)]
enum Queued {
    // Boxed, because the queue allocates every slot at the size of the largest variant.
    Span(Box<SpanData>),
    /// Answered when all spans queued before it have been sent or dropped.
    Flush(oneshot::Sender<()>),
}

/// Starts the sender. Requires a running tokio runtime.
pub fn start(settings: OtlpSettings) -> (SdkTracer, Queue) {
    let (queue, waiting) = mpsc::channel(QUEUE);
    let queue = Queue(queue);
    let resource = Resource::builder()
        .with_service_name(settings.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider = SdkTracerProvider::builder()
        .with_sampler(settings.sampler.clone())
        .with_max_links_per_span(MAX_LINKS)
        .with_resource(resource.clone())
        .with_span_processor(queue.clone())
        .build();
    tokio::spawn(send_all(waiting, Collector::new(settings, &resource)));

    (provider.tracer("stripe-reconciler"), queue)
}

impl Queue {
    /// Sends the queued spans, within [`FLUSH_TIMEOUT`].
    pub async fn flush(&self) {
        let flushed = async {
            let (done, is_done) = oneshot::channel();
            // Both calls fail only if the sender has ended. Then no span is left to wait for.
            let _ = self.0.send(Queued::Flush(done)).await;
            let _ = is_done.await;
        };
        if tokio::time::timeout(FLUSH_TIMEOUT, flushed).await.is_err() {
            tracing::warn!("collector did not accept the last spans in time");
        }
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.0.try_send(Queued::Span(Box::new(span))).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Does nothing: [`Queue::flush`] flushes without blocking a thread.
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Sends spans in batches until the queue is closed.
async fn send_all(mut waiting: mpsc::Receiver<Queued>, mut collector: Collector) {
    let mut queued = Vec::with_capacity(BATCH);
    while waiting.recv_many(&mut queued, BATCH).await > 0 {
        let is_full = queued.len() == BATCH;
        let (mut spans, mut flushes) = (Vec::new(), Vec::new());
        for queued in queued.drain(..) {
            match queued {
                Queued::Span(span) => spans.push(*span),
                Queued::Flush(done) => flushes.push(done),
            }
        }

        collector.send(spans).await;
        let is_flushing = !flushes.is_empty();
        // The caller may have timed out.
        for done in flushes {
            let _ = done.send(());
        }

        if !is_full && !is_flushing {
            tokio::time::sleep(GATHER_DELAY).await;
        }
    }
}

/// The collector and its last known state.
struct Collector {
    client: HttpClient,
    settings: OtlpSettings,
    resource: ResourceAttributesWithSchema,
    /// `true` if the last batch failed. A failure is logged once, not with every batch.
    is_failing: bool,
}

impl Collector {
    fn new(settings: OtlpSettings, resource: &Resource) -> Collector {
        Collector {
            client: HttpClient::new(SEND_TIMEOUT, ANSWER_LIMIT),
            settings,
            resource: resource.into(),
            is_failing: false,
        }
    }

    async fn send(&mut self, spans: Vec<SpanData>) {
        let count = spans.len();
        if count == 0 {
            return;
        }

        let sent = self.try_send(spans).await;
        if sent.is_err() {
            DROPPED.fetch_add(count as u64, Ordering::Relaxed);
        }

        let was_failing = std::mem::replace(&mut self.is_failing, sent.is_err());
        match sent {
            Err(reason) if !was_failing => {
                tracing::warn!(reason, "collector rejects spans, dropping them");
            }
            Ok(()) if was_failing => {
                tracing::warn!(dropped = dropped(), "collector accepts spans again");
            }
            _ => {}
        }
    }

    async fn try_send(&self, spans: Vec<SpanData>) -> Result<(), String> {
        let resource_spans = group_spans_by_resource_and_scope(spans, &self.resource);
        let body = ExportTraceServiceRequest { resource_spans }.encode_to_vec();
        let request =
            Request::post(&self.settings.endpoint).header("content-type", "application/x-protobuf");
        let mut request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| error.to_string())?;
        request.headers_mut().extend(self.settings.headers.clone());
        let answer = self
            .client
            .send(request)
            .await
            .map_err(|error| error.to_string())?;

        // Report only the status, because the body may repeat the spans.
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(format!("status {}", answer.status()))
        }
    }
}
