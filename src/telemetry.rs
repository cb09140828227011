//! Logs: to standard error, for people or as JSON. A line is written once, where a failure is handled; never a payload, a header
//! or a secret.

use std::io;

use tracing_subscriber::EnvFilter;

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
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Only tests start it twice, and the first will do.
    let _ = match format {
        LogFormat::Text => subscriber.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
}
