//! The pure core: what a set of events makes of an invoice's history. `stories` are examples that read as things that happen
//! at Stripe; `properties` hold for every generated life of an invoice; `fetched` is about objects that the API
//! returned; `stripe` writes the payloads.

mod fetched;
mod properties;
mod stories;
mod stripe;
