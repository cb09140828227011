//! Data that Stripe sends: signatures, events, objects, and the observations derived from them.

pub mod event;
pub(in crate::domain) mod lenient;
pub mod object;
mod payload;
pub mod signature;
pub mod signing_secrets;
