//! Printing: aligned tables, progress and colours on a terminal only, and a silent end when a pipe
//! closes.

use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use crate::domain::time::timestamp;

/// Prints a line on standard output.
pub fn line(text: impl Display) -> anyhow::Result<()> {
    writeln!(anstream::stdout().lock(), "{text}")?;
    Ok(())
}

/// Writes the bytes to standard output.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Prints a note for the user on standard error.
pub fn note(text: impl Display) {
    // If standard error is closed, the note is lost.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// Returns whether the reader closed the pipe, like `head` after its last line.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Formats aligned columns without borders. If `head` is empty, the result has only the rows.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    if !head.is_empty() {
        table.set_header(head);
    }

    table.add_rows(rows);

    table
        .lines()
        .map(|line| line.trim().to_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Breaks text between words into lines of at most `width` characters. A longer word gets a line of
/// its own.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("the list starts with one line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.extend([" ", word]);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// Shows a counter on a terminal. Elsewhere it is silent.
pub fn progress(message: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message.to_owned());
    let style = ProgressStyle::with_template("{spinner} {human_pos} {msg} ({per_sec})");
    bar.set_style(style.expect("the template is valid"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Formats Unix milliseconds for people and scripts; `-` for `None`.
pub fn time(ms: Option<i64>) -> String {
    ms.map_or("-".to_owned(), timestamp)
}

/// Returns the text, or `-` for `None`.
pub fn or_dash(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(|| "-".to_owned())
}

/// Makes text bold on a terminal. Elsewhere [`line`] drops the escape codes.
pub fn bold(text: &str) -> String {
    format!("\x1b[1m{text}\x1b[0m")
}
