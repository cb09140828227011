//! Health of the service for `/metrics`, alerts and `doctor`.
//!
//! A scanner derives it from the event log in the background. No delivery waits for it.

pub mod delivery_gap;
pub mod last_seen;
pub mod log_scanner;
pub mod missed_webhooks;
pub mod monitor;
mod rejections;
pub mod signing_secrets;
pub mod snapshot;
