//! The pure core: what a set of events makes of an invoice's history. `stories` are examples that read as things that happen
//! at Stripe; `properties` hold for every generated life of an invoice; `stripe` writes the payloads.

mod properties;
mod stories;
mod stripe;
