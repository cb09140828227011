//! One path per file, each read from top to bottom.

pub mod copy;
pub mod doctor;
pub mod documents;
pub mod events;
pub mod evidence;
pub mod import;
pub mod ingest;
pub mod invoices;
pub mod missed;
pub mod rebuild;
pub mod reconcile;
mod refusals;
pub mod replay;
pub mod secret_use;
pub mod signs;
pub mod verdict;
