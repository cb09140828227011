//! Progress of `invoices import` and `replay`: a counter on a terminal, and a line on standard
//! error for each invalid document.

use indicatif::ProgressBar;

use super::output;
use crate::jobs::{InvalidDocument, ProgressSink};

/// A counter of documents, and the output of invalid ones.
pub struct DocumentProgress(ProgressBar);

impl DocumentProgress {
    /// Shows the counter, with `unit` after the number.
    pub fn start(unit: &str) -> DocumentProgress {
        DocumentProgress(output::progress(unit))
    }

    /// Removes the counter from the terminal.
    pub fn finish(self) {
        self.0.finish_and_clear();
    }
}

impl ProgressSink for DocumentProgress {
    fn invalid(&mut self, document: InvalidDocument) {
        let file = if document.file.as_os_str() == "-" {
            "standard input".to_owned()
        } else {
            document.file.display().to_string()
        };
        let position = match document.line {
            0 => file,
            line => format!("{file}:{line}"),
        };

        self.0.suspend(|| {
            for reason in &document.reasons {
                output::note(format!("{position}: {reason}"));
            }
        });
    }

    fn progress(&mut self, documents: u64) {
        self.0.set_position(documents);
    }
}
