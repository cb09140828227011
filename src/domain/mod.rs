//! The pure middle: plain functions over bytes and values. No clock, no pool, no `async`; time and secrets are arguments.

pub mod api_key;
pub mod comparison;
pub mod event;
pub mod fact;
pub mod history;
pub mod invoice;
mod json;
pub mod links;
mod message;
pub mod money;
pub mod object;
pub mod redact;
mod returned;
pub mod session;
mod shape;
pub mod signature;
pub mod silence;
pub mod time;
mod tries;
