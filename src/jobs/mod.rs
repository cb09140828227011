//! One-shot work on request: import, replay, rebuild and copy.
//!
//! A job may run while another process serves the same database. Its write transactions are short.
//! A job reads before a transaction, and calls
//! [`Store::pause_after_write`](crate::store::Store::pause_after_write) after it, so that
//! deliveries can write in between.

pub mod copy;
pub mod import;
mod json_reader;
pub mod rebuild;
pub mod replay;

use std::path::PathBuf;

/// A document of a file that is invalid or was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidDocument {
    pub file: PathBuf,
    /// Line on which the document begins, from 1; 0 stands for the file as a whole.
    pub line: usize,
    pub reasons: Vec<String>,
}

/// The receiver of a job's progress.
pub trait ProgressSink {
    /// Receives a document that is invalid or was rejected.
    fn invalid(&mut self, document: InvalidDocument);
    /// Receives the number of documents processed so far, over all files.
    fn progress(&mut self, documents: u64);
}

/// The choice between saving differences and only reporting them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    Save,
    DryRun,
}
