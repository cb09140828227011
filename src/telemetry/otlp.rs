//! Spans for a collector, by OTLP over HTTP. Nothing waits for it: what does not fit into the queue is dropped and counted, and
//! so is what a collector does not take.

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

/// Spans that may wait.
const QUEUE: usize = 4096;
/// Spans that are sent at once.
const BATCH: usize = 512;
/// How long spans gather when they are few.
const GATHER: Duration = Duration::from_secs(1);
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what waits may take at the end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// Requests that share one commit: each is a link.
const LINKS: u32 = 1024;
/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 64 * 1024;

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Spans that no collector has got, since the start.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The way to the collector.
#[derive(Clone, Debug)]
pub struct Queue(mpsc::Sender<Queued>);

#[derive(Debug)]
enum Queued {
    // Boxed: a queue of the largest things that it may hold is allocated whole.
    Span(Box<SpanData>),
    /// All before it is sent, or dropped.
    Flush(oneshot::Sender<()>),
}

/// Starts sending; needs a running tokio.
pub fn start(settings: OtlpSettings) -> (SdkTracer, Queue) {
    let (queue, waiting) = mpsc::channel(QUEUE);
    let queue = Queue(queue);
    let resource = Resource::builder()
        .with_service_name(settings.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let provider = SdkTracerProvider::builder()
        .with_sampler(settings.sampler.clone())
        .with_max_links_per_span(LINKS)
        .with_resource(resource.clone())
        .with_span_processor(queue.clone())
        .build();
    tokio::spawn(send_all(waiting, Collector::new(settings, &resource)));
    (provider.tracer("stripe-reconciler"), queue)
}

impl Queue {
    /// Sends what waits, within a time limit.
    pub async fn flush(&self) {
        let flushed = async {
            let (done, is_done) = oneshot::channel();
            // Gone: there is nobody to wait for.
            let _ = self.0.send(Queued::Flush(done)).await;
            let _ = is_done.await;
        };
        if tokio::time::timeout(FLUSH_TIMEOUT, flushed).await.is_err() {
            tracing::warn!("the collector did not take the last spans in time");
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

    /// See [`Queue::flush`], which does not block.
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

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
        // Who waited may have given up.
        for done in flushes {
            let _ = done.send(());
        }
        if !is_full && !is_flushing {
            tokio::time::sleep(GATHER).await;
        }
    }
}

struct Collector {
    transport: HttpClient,
    settings: OtlpSettings,
    resource: ResourceAttributesWithSchema,
    /// Said once, not with every batch.
    is_away: bool,
}

impl Collector {
    fn new(settings: OtlpSettings, resource: &Resource) -> Collector {
        let transport = HttpClient::new(SEND_TIMEOUT, ANSWER_LIMIT);
        Collector {
            transport,
            settings,
            resource: resource.into(),
            is_away: false,
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
        let was_away = std::mem::replace(&mut self.is_away, sent.is_err());
        match sent {
            Err(reason) if !was_away => tracing::warn!(
                reason,
                "the collector does not take spans: they are dropped"
            ),
            Ok(()) if was_away => {
                tracing::warn!(dropped = dropped(), "the collector takes spans again")
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
            .transport
            .send(request)
            .await
            .map_err(|error| error.to_string())?;
        // What it says may repeat what it was sent.
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(format!("it answers {}", answer.status()))
        }
    }
}
