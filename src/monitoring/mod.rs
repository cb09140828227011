//! Health of the service as `/metrics`, alerts and `doctor` see it.
//!
//! A scanner reads it from the event log, behind the deliveries. No delivery waits for it.

pub mod delivery_gap;
pub mod last_seen;
pub mod log_scanner;
pub mod missed_webhooks;
pub mod monitor;
mod rejections;
pub mod signing_secrets;
pub mod snapshot;
