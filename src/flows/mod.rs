//! One path per file, each read from top to bottom.

pub mod ingest;
pub mod invoices;
