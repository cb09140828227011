//! One-shot work on request: import, replay, rebuild and copy.
//!
//! A job may run beside a serving process on the same database. Its write transactions are short,
//! reads come before them, and [`Store::pause_after_write`](crate::store::Store::pause_after_write)
//! follows them, so that deliveries get their turn.

pub mod copy;
pub mod import;
mod json_reader;
pub mod rebuild;
pub mod replay;

use std::path::PathBuf;

/// A document of a file that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidDocument {
    pub file: PathBuf,
    /// Line on which the document begins, from 1; 0 stands for the file as a whole.
    pub line: usize,
    pub reasons: Vec<String>,
}

/// Receives the events of a job while it runs.
pub trait ProgressSink {
    fn invalid(&mut self, document: InvalidDocument);
    /// Receives the number of documents processed so far, over all files.
    fn progress(&mut self, documents: u64);
}

/// Whether differences are saved or only reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    Save,
    DryRun,
}
