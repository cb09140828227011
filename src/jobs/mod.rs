//! One-shot work on request: import, replay, rebuild and copy.

pub mod copy;
pub mod import;
mod json_reader;
pub mod rebuild;
pub mod replay;
