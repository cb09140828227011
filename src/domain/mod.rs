//! The pure middle: plain functions over bytes and values. No clock, no pool, no `async`; time and secrets are arguments.

pub mod event;
pub mod fact;
pub mod history;
pub mod invoice;
mod links;
pub mod message;
pub mod money;
pub mod object;
pub mod signature;
mod tries;
