//! Logs and traces. Logs go to standard error, as text or JSON; spans go to a collector if one is
//! configured. A failure is logged once, where it is handled. No level logs a payload, header or
//! secret.
//!
//! The path of a single delivery is logged at `debug` and costs nothing while `debug` is off. Spans
//! of `debug` go to the collector whatever the log level.

mod log_rate_limit;
mod otlp;
mod settings;

use std::io;
use std::sync::OnceLock;

use hyper::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use log_rate_limit::LogRateLimit;
pub use otlp::dropped as dropped_spans;
pub use settings::OtlpSettings;

/// The log filter and format, and the trace collector.
#[derive(Debug)]
pub struct TelemetrySettings {
    pub filter: EnvFilter,
    pub format: LogFormat,
    /// Trace collector. `None` if spans are not sent.
    pub otlp: Option<OtlpSettings>,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// The queue of spans in front of the collector.
static QUEUE: OnceLock<otlp::Queue> = OnceLock::new();

/// Parses a log filter in the syntax of `RUST_LOG`.
///
/// # Errors
/// A message that repeats the filter.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| format!("invalid log filter `{text}`: {error}"))
}

/// Starts logs and traces. Only the first call has an effect. Requires a running tokio runtime.
pub fn start(settings: TelemetrySettings) {
    let TelemetrySettings {
        filter,
        format,
        otlp,
    } = settings;
    let base = Registry::default()
        .with(filter_fn(is_harmless))
        .with(LogRateLimit::start());

    // Only tests call this function twice. The first subscriber stays.
    let _ = match otlp {
        // One filter for all layers costs less than one per layer.
        None => base.with(lines(format)).with(filter).try_init(),
        Some(otlp) => {
            let (tracer, queue) = otlp::start(otlp);
            let spans = tracing_opentelemetry::layer()
                .with_tracer(tracer)
                .with_location(false)
                .with_threads(false)
                .with_target(false)
                .with_tracked_inactivity(false)
                .with_error_records_to_exceptions(false)
                .with_filter(filter_fn(|metadata| {
                    is_ours(metadata) && *metadata.level() <= Level::DEBUG
                }));
            let _ = QUEUE.set(queue);
            base.with(lines(format).with_filter(filter))
                .with(spans)
                .try_init()
        }
    };
}

/// Sends the queued spans. Call it after all other tasks have ended.
pub async fn finish() {
    if let Some(queue) = QUEUE.get() {
        queue.flush().await;
    }
}

/// Makes a span part of the trace that the request headers name, if any.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    if headers.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&Carrier(headers));
        // Fails only if no collector is configured.
        let _ = span.set_parent(parent);
    }
}

/// Request headers, from which the trace context is read.
struct Carrier<'h>(&'h HeaderMap);

impl Extractor for Carrier<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(hyper::http::HeaderName::as_str).collect()
    }
}

/// Returns the layer that writes log lines to standard error.
fn lines<S: Subscriber + for<'s> LookupSpan<'s>>(
    format: LogFormat,
) -> Box<dyn Layer<S> + Send + Sync> {
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match format {
        LogFormat::Text => lines
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .boxed(),
        LogFormat::Json => lines.json().boxed(),
    }
}

/// Target of a library that logs parts of connection strings and password files, at any level.
const NEVER: &str = "sqlx_postgres::options";

/// Returns whether an event may be logged. Below `info`, libraries may log rows, headers and keys,
/// so no setting enables those.
fn is_harmless(metadata: &Metadata) -> bool {
    is_ours(metadata) || *metadata.level() <= Level::INFO && !metadata.target().starts_with(NEVER)
}

fn is_ours(metadata: &Metadata) -> bool {
    metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
}
