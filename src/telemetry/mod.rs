//! Logs and traces. Logs go to standard error, for people or as JSON; spans to a collector, where one is named. A line is written
//! once, where a failure is handled; never a payload, a header or a secret, at whatever level.
//!
//! What shows the way of a single delivery is at `debug`, and costs nothing while nobody looks. Spans of `debug` go to the
//! collector whatever is logged.

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

/// How to log, and where spans go.
#[derive(Debug)]
pub struct TelemetrySettings {
    pub filter: EnvFilter,
    pub format: LogFormat,
    /// None: nowhere.
    pub otlp: Option<OtlpSettings>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Where spans wait for the collector.
static QUEUE: OnceLock<otlp::Queue> = OnceLock::new();

/// What to log, in `RUST_LOG`'s language.
///
/// # Errors
/// In words, what cannot be read in it.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text)
        .map_err(|error| format!("the log filter `{text}` cannot be read: {error}"))
}

/// Starts; the first call counts. Needs a running tokio.
pub fn start(settings: TelemetrySettings) {
    let TelemetrySettings {
        filter,
        format,
        otlp,
    } = settings;
    let base = Registry::default()
        .with(filter_fn(is_harmless))
        .with(LogRateLimit::start());
    // Only tests start it twice, and the first will do.
    let _ = match otlp {
        // Filters of single layers cost more than one for all.
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

/// Sends the spans that still wait. To be called when all else has ended.
pub async fn finish() {
    if let Some(queue) = QUEUE.get() {
        queue.flush().await;
    }
}

/// Makes a span part of the trace that a request came with, if it came with one.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    if headers.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&Carrier(headers));
        // Nobody traces it, then.
        let _ = span.set_parent(parent);
    }
}

struct Carrier<'h>(&'h HeaderMap);

impl Extractor for Carrier<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

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

/// Libraries that repeat what stands in a connection string or in a file of passwords, at whatever level.
const NEVER: &str = "sqlx_postgres::options";

/// Below `info`, libraries may write what goes over their wires: rows, headers, keys. No setting lets them.
fn is_harmless(metadata: &Metadata) -> bool {
    is_ours(metadata) || *metadata.level() <= Level::INFO && !metadata.target().starts_with(NEVER)
}

fn is_ours(metadata: &Metadata) -> bool {
    metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
}
