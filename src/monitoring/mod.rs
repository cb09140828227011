//! Health of the service as `/metrics`, alerts and `doctor` see it, read from the event log behind the deliveries.

pub mod delivery_gap;
pub mod missed_webhooks;
pub mod monitor;
mod rejections;
pub mod signing_secrets;
