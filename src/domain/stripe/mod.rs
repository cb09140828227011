//! What Stripe sends: signatures, events, objects, and the observations they assert.

pub mod event;
mod json;
pub mod object;
pub mod signature;
