//! Logs: to standard error, for people or as JSON. A line is written once, where a failure is handled; never a payload, a header
//! or a secret.

mod flood;

use std::io;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use flood::Flood;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// What to log, in `RUST_LOG`'s language.
///
/// # Errors
/// In words, what cannot be read in it.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| format!("the log filter `{text}` cannot be read: {error}"))
}

/// Starts logging; the first call counts.
pub fn start(filter: EnvFilter, format: LogFormat) {
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let flood = Flood::start();
    // Only tests start it twice, and the first will do.
    let _ = Registry::default().with(lines).with(filter).with(filter_fn(is_harmless)).with(flood).try_init();
}

/// Below `info`, libraries may write what goes over their wires: rows, headers, keys. No setting lets them.
fn is_harmless(metadata: &Metadata) -> bool {
    *metadata.level() <= Level::INFO || metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
}
