//! The pure core: what a set of events makes of an invoice's history. `stories` are examples that read as things that happen
//! at Stripe; `properties` hold for every generated life of an invoice; `fetched` is about objects that the API
//! returned; `accounts_and_modes` about attacks from other accounts; `stripe` writes the payloads.

mod accounts_and_modes;
mod fetched;
mod properties;
mod stories;
mod stripe;
