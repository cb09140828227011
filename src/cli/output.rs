//! Printing: tables that line up, progress on a terminal, colours only there, and no complaint when a pipe closes.

use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use crate::domain::time::timestamp;

/// A line on standard output.
pub fn line(text: impl Display) -> anyhow::Result<()> {
    writeln!(anstream::stdout().lock(), "{text}")?;
    Ok(())
}

/// The bytes as they are, on standard output.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// A note for the person, on standard error.
pub fn note(text: impl Display) {
    // Where nobody can read it, there is nothing to do about it.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// `head` closed the pipe: it has what it wanted.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Columns that line up, without borders. An empty head: rows only.
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

/// Lines of so many letters at most, broken between words; a word that is longer stands alone.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is one from the start");
        match line.is_empty() {
            true => line.push_str(word),
            false if line.chars().count() + 1 + word.chars().count() <= width => {
                line.extend([" ", word])
            }
            false => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Counts on a terminal; elsewhere silent.
pub fn progress(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    let style = ProgressStyle::with_template("{spinner} {human_pos} {msg} ({per_sec})");
    bar.set_style(style.expect("the template is right"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Milliseconds as a person and a script can read them; `-` for none.
pub fn time(ms: Option<i64>) -> String {
    ms.map_or("-".to_owned(), timestamp)
}

pub fn or_dash(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(|| "-".to_owned())
}

/// Stands out on a terminal; plain elsewhere, where [`line`] drops the codes.
pub fn bold(text: &str) -> String {
    format!("\x1b[1m{text}\x1b[0m")
}
